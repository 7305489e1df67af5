"""What recurrent kernels have in common, whatever multiplies: sequences, steps, states and the formulas of the cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import sigmoid, sigmoid_divisor, tanh, tanh_quotient
from mlec.backends.tvm.kernels.tile import (
    SERIAL_WORK,
    bits,
    ceildiv,
    multiply_adds,
    otherwise,
    parallel_if_large,
    parameter,
    vector_loop,
    vectors_loop,
)
from mlec.backends.tvm.kernels.vector import const, const_like, lanes_of, load, select, share, store
from mlec.backends.tvm.target import TargetInfo
from mlec.ir.op import Array

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
TOGETHER = 2
"""Vectors of units whose gate functions are computed side by side: 120 instructions in chains, each of which waits four cycles for the one
before, are more than a core looks ahead. Two chains side by side take 2 to 8 % of the time of a layer in float32 away, in bf16 5 to 30."""
STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}


def pack_recurrent(weights: npt.NDArray[np.generic], gates: int, lanes: int) -> npt.NDArray[np.generic]:
    """Weights ``[gates * h, k]`` as ``[ceil(h / lanes), k, gates * lanes]``: the gates of the same units side by side.

    Biases ``[gates * h]`` are packed as one-column weights, to ``[ceil(h / lanes), 1, gates * lanes]``.
    """
    columns = weights.reshape(weights.shape[0], -1)
    hidden, k = columns.shape[0] // gates, columns.shape[1]
    blocks = -(-hidden // lanes)
    padded = np.zeros((gates, blocks * lanes, k), weights.dtype)
    padded[:, :hidden] = columns.reshape(gates, hidden, k)
    return np.ascontiguousarray(padded.reshape(gates, blocks, lanes, k).transpose(1, 3, 0, 2).reshape(blocks, k, -1))


def joined_biases(b_ih: Array, b_hh: Array) -> Array:
    """Of a gru: the sum of both biases where the gates are sums of both products, which are the first two."""
    both = b_ih.copy()
    both[: len(both) // 3 * 2] += b_hh[: len(both) // 3 * 2]
    return both


@dataclass(frozen=True)
class Cells:
    """What a layer computes.

    Attributes:
        kind: ``lstm``, ``gru`` or ``rnn``.
        activation: of a plain recurrence.
        n, steps: sequences and their length; may be symbolic.
        features, hidden: of an input and of the state.
        reverse: whether the last step comes first.
        dtype: of states, sums and results.
    """

    kind: str
    activation: str
    n: Dim
    steps: Dim
    features: int
    hidden: int
    reverse: bool
    dtype: str

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def slots(self) -> int:
        """Sums of a unit: the gates, and of a gru what the input gives the last one, by itself."""
        return self.gates + (self.kind == "gru")


@dataclass(frozen=True)
class Operands:
    """The parameters of the program; those of one state in the order of ``STATES``."""

    x: Buffer
    initial: Sequence[Buffer]
    w_ih: Buffer
    w_hh: Buffer
    bias: Sequence[Buffer]
    y: Buffer
    final: Sequence[Buffer]

    @staticmethod
    def declare(cells: Cells, lanes: int, weights: Callable[[int, int], BufferSpec], rows: str) -> Operands:
        """``weights(blocks, k)`` are those of matrices, ``rows`` is the dtype of x."""
        blocks, dtype, states = -(-cells.hidden // lanes), cells.dtype, STATES[cells.kind]
        state = BufferSpec((cells.n, cells.hidden), dtype)
        x = parameter("x", BufferSpec((cells.n, cells.steps, cells.features), rows))
        initial = [parameter(f"{s}0", state) for s in states]
        w_ih, w_hh = (
            parameter(name, weights(blocks, k)) for name, k in (("w_ih", cells.features), ("w_hh", cells.hidden))
        )
        one = BufferSpec((blocks, 1, cells.gates * lanes), dtype)
        bias = [parameter(f"b{i}", one) for i in range(2 if cells.kind == "gru" else 1)]
        y = parameter("y", BufferSpec((cells.n, cells.steps, cells.hidden), dtype))
        return Operands(x, initial, w_ih, w_hh, bias, y, [parameter(f"{s}n", state) for s in states])


@dataclass(frozen=True)
class Task:
    """Some sequences from the first step to the last.

    Attributes:
        first, rows: which.
        state: of each state two halves ``[2, rows, blocks * lanes]``, of which a step reads one and writes the other.
    """

    first: Expr
    rows: Expr
    state: Sequence[Buffer]


@dataclass(frozen=True)
class Place:
    """A step: the halves of the states, and where it is in memory."""

    old: Expr
    new: Expr
    time: Expr


@dataclass(frozen=True)
class Layer(ABC):
    """A program for a layer; subclasses say what multiplies.

    Attributes:
        lanes: units of a block, which is a vector for each gate.
    """

    cells: Cells
    operands: Operands
    lanes: int
    target: TargetInfo
    rate: ClassVar[int] = 1
    """Products in the time of one by vectors."""
    least: ClassVar[int] = 3
    """Sequences that are worth a thread."""

    @property
    def blocks(self) -> int:
        """Vectors of units."""
        return -(-self.cells.hidden // self.lanes)

    # -- sequences -----------------------------------------------------------------------------------------------

    @abstractmethod
    def task(self, first: Expr, rows: Expr, most: int) -> None:
        """Some sequences, at most so many, step by step."""

    def share_out(self, most: int) -> None:
        """Tasks of at most so many sequences; a multiple of the threads, where each has some sequences."""
        c, cores = self.cells, self.target.cores
        few = ceildiv(c.n, most)
        many = larger(few, smaller(ceildiv(few, cores) * cores, c.n // self.least))
        weights = c.gates * c.hidden * (c.features + c.hidden)
        work = c.n * c.steps * -(-int(multiply_adds(weights, c.dtype, self.target)) // self.rate)

        def tasks(parallel: bool) -> None:
            count = many if parallel else few
            some = larger(count, 1)  # no loop without sequences, but TVM may look into it
            with (T.parallel if parallel else T.serial)(count) as index:
                first = share(c.n * index // some)
                self.task(first, share(c.n * (index + 1) // some - first), most)

        if isinstance(work, int):
            tasks(work >= SERIAL_WORK)
        else:
            otherwise([(work < SERIAL_WORK, lambda: tasks(False))], lambda: tasks(True))

    def begin(self, first: Expr, rows: Expr, most: int) -> Task:
        """The states before the first step; zeros in units that are not there."""
        dtype, hidden, whole = self.cells.dtype, self.cells.hidden, self.blocks * self.lanes
        state = [T.alloc_buffer((2, most, whole), dtype) for _ in self.operands.initial]
        for buffer, source in zip(state, self.operands.initial, strict=True):
            with T.serial(rows) as i:
                if hidden < whole:
                    store(buffer, const(0, dtype, self.lanes), [0, i, whole - self.lanes])
                with T.serial(hidden) as j:
                    T.buffer_store(buffer, source[first + i, j], [0, i, j])
        return Task(first, rows, state)

    def end(self, task: Task) -> None:
        """The states after the last step."""
        c = self.cells
        for buffer, result in zip(task.state, self.operands.final, strict=True):
            with T.grid(task.rows, c.hidden) as (i, j):
                T.buffer_store(result, buffer[c.steps % 2, i, j], [task.first + i, j])

    # -- steps ---------------------------------------------------------------------------------------------------

    def place(self, turn: Expr) -> Place:
        return Place(share(turn % 2), share((turn + 1) % 2), self.time(turn))

    def time(self, turn: Expr) -> Expr:
        return self.cells.steps - 1 - turn if self.cells.reverse else turn

    def across(self, width: int, body: Callable[[Expr, int], None], work: int = 0) -> None:
        """``body(first block, blocks)`` for all units, so many blocks at a time; by several threads if each is enough work."""
        parallel_if_large(self.blocks // width, work, lambda group: body(share(group * width), width))
        if rest := self.blocks % width:
            body(self.blocks - rest, rest)

    def update(
        self, task: Task, place: Place, sums: Buffer, first: Expr, count: Expr, block: Expr, blocks: int,
        also: Callable[[Expr, Expr, Expr], None] | None = None,
    ) -> None:  # fmt: skip
        """The new state of some sequences and blocks, of sums ``[rows, blocks, slots * lanes]``; ``also(row, unit, h)``."""
        c, lanes = self.cells, self.lanes

        def some(places: Sequence[tuple[Expr, Expr]]) -> None:
            """Vectors in one wider vector: their long chains of instructions lie side by side."""
            cells = [(i, b, share(first + i), share((block + b) * lanes)) for i, b in places]
            before = [
                joined([load(buffer, [place.old, row, column], lanes) for _, _, row, column in cells])
                for buffer in task.state
            ]
            totals = [
                joined([load(sums, [i, b, slot * lanes], lanes) for i, b, _, _ in cells]) for slot in range(c.slots)
            ]
            after = [parted(v, lanes) for v in advance(c.kind, c.activation, totals, before)]
            for (_, _, row, column), *values in zip(cells, *after, strict=True):
                for buffer, value in zip(task.state, values, strict=True):
                    store(buffer, value, [place.new, row, column])
                if also is not None:
                    also(row, column, values[0])

        together = TOGETHER if self.target.vector_registers >= 32 else 1
        if isinstance(count, int) and count == 1:
            vectors_loop(blocks, 1, together, lambda b, _, vectors: some([(0, b + v) for v in range(vectors)]))
        else:
            with T.serial(blocks) as b:
                vectors_loop(count, 1, together, lambda i, _, vectors: some([(i + v, b) for v in range(vectors)]))

    def give(self, task: Task, place: Place) -> None:
        """The new state as result of a step."""
        y, h = self.operands.y, task.state[0]
        with T.serial(task.rows) as i:
            vector_loop(
                self.cells.hidden, self.lanes,
                lambda at, width: store(y, load(h, [place.new, i, at], width), [task.first + i, place.time, at]),
            )  # fmt: skip


def joined(vectors: Sequence[Expr]) -> Expr:
    """One vector after the other, as one."""
    lanes = range(sum(map(lanes_of, vectors)))
    return share(tirx.Shuffle(list(vectors), list(lanes)) if len(vectors) > 1 else vectors[0])


def parted(vector: Expr, lanes: int) -> list[Expr]:
    """The vectors that were `joined`."""
    starts = range(0, lanes_of(vector), lanes)
    return (
        [share(tirx.Shuffle([vector], list(range(at, at + lanes)))) for at in starts] if len(starts) > 1 else [vector]
    )


def smaller(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)


def larger(a: Dim, b: Dim) -> Dim:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(a, b)


def weight_bytes(cells: Cells) -> int:
    """Of both matrices."""
    return cells.gates * cells.hidden * (cells.features + cells.hidden) * bits(cells.dtype) // 8


def gate_sums(kind: str, forward: Sequence[Expr], back: Sequence[Expr]) -> list[Expr]:
    """The sums that `advance` takes, of what input and previous state give each gate, biases included."""
    both = [share(a + b) for a, b in zip(forward, back, strict=True)]
    return [*both[:2], back[2], forward[2]] if kind == "gru" else both


def advance(kind: str, activation: str, sums: Sequence[Expr], before: Sequence[Expr]) -> list[Expr]:
    """The new state, h, and c of an lstm, of some units.

    A division takes 16 cycles, as much as 32 other instructions: where a gate multiplies, its divisor goes into one that is there anyway.

    Args:
        sums: of each gate what bias, input and previous state give. Of the last one of a gru what the state gives, then what the input
            gives: the reset gate multiplies the first.
        before: the previous state.
    """
    if kind == "lstm":
        i, f, g, o = sums
        new, divisor = tanh_quotient(g)
        c = share(before[1] / sigmoid_divisor(f) + new / (sigmoid_divisor(i) * divisor))
        result, divisor = tanh_quotient(c)
        return [share(result / (sigmoid_divisor(o) * divisor)), c]
    if kind == "gru":
        reset, update, back, forward = sums
        z = sigmoid(update)
        candidate = tanh(forward + back / sigmoid_divisor(reset))
        return [share((const_like(1, z) - z) * candidate + z * before[0])]
    return [share(ACTIVATIONS[activation](sums[0]))]


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "tanh": tanh,
    "relu": lambda x: select(x < 0.0, 0.0, x),
    "sigmoid": sigmoid,
}
"""Of a plain recurrence."""

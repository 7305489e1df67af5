"""Recurrent layers (LSTM, GRU, plain) over a whole sequence in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import sigmoid, tanh
from mlec.backends.tvm.kernels.schedule import variations
from mlec.backends.tvm.kernels.tile import RegisterTile, bits, ceildiv, parallel_if_large, parameter, vector_loop
from mlec.backends.tvm.kernels.vector import const_like, load, select, share, store
from mlec.backends.tvm.target import TargetInfo

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
CHAINS = 8
"""Of dependent multiply-adds that keep the units busy: two of them, for a latency of four cycles."""

STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}


@dataclass(frozen=True)
class RecurrentSchedule:
    """How `recurrent` goes over sequences, steps and units.

    Attributes:
        rows, gates: sequences, and gates of a block of units, whose sums are in registers together.
        tiles: so many times these rows are a task, as far as there is one for each thread.
        steps: whose input products are computed at once.
        group: blocks of units at once, of a sequence by itself.
    """

    rows: int
    gates: int
    tiles: int
    steps: int
    group: int

    @staticmethod
    def candidates(
        kind: str, n: Dim, steps: Dim, hidden: int, dtype: str, target: TargetInfo
    ) -> Iterator[RecurrentSchedule]:
        """For ``n`` sequences of ``steps``, which may be symbolic. Tiles that leave no register for the operands do not fit.

        By default four sequences: their sums times four gates take 16 registers; where there are no more, two gates at a time. Of a
        single gate eight, for enough independent sums; of a sequence by itself as many blocks.
        """
        gates, blocks = GATES[kind], -(-hidden // recurrent_lanes(dtype, target))
        room, fed = target.vector_registers - 4, fed_vectors(gates)
        height = max(4, CHAINS // gates)
        default = RecurrentSchedule(
            height, gates if height * gates <= room else fed, 4, min(8, room // fed), CHAINS // gates
        )

        def fits(s: RecurrentSchedule) -> bool:
            tiles = ((s.rows, s.gates), (s.steps, fed), (1, s.group * gates))
            return all(rows * vectors < target.vector_registers - vectors for rows, vectors in tiles)

        return variations(
            default,
            fits,
            rows=[r for r in (2, 3, 4, 6, 1, 8, 12) if not isinstance(n, int) or r <= n],
            gates=[g for g in (gates, fed, 1) if gates % g == 0],
            tiles=(1, 2, 8),
            steps=[s for s in (4, 12, 6, 2, 16) if not isinstance(steps, int) or s <= steps],
            group=[g for g in (1, 2, 3, 4, 8) if g <= blocks],
        )


def fed_vectors(gates: int) -> int:
    """Gates whose input products are in one tile."""
    return 2 if gates % 2 == 0 else 1


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


def recurrent_lanes(dtype: str, target: TargetInfo) -> int:
    """Units in a block of packed weights."""
    return target.lanes(bits(dtype))


def recurrent(
    kind: str,
    n: Dim,
    steps: Dim,
    features: int,
    hidden: int,
    reverse: bool,
    dtype: str,
    target: TargetInfo,
    activation: str = "tanh",
    name: str = "",
    schedule: RecurrentSchedule | None = None,
) -> tirx.PrimFunc:
    """One direction of one layer; ``kind`` is ``lstm``, ``gru`` or ``rnn``. float32 or float64; n and steps may be
    symbolic.

    Parameters of the program: x ``[n, steps, features]``, h0 ``[n, hidden]`` (lstm: c0 too), w_ih and w_hh packed by
    `pack_recurrent`, the biases packed (gru: b_ih and b_hh; else one), y ``[n, steps, hidden]``, h_n (lstm: c_n too).

    A task is up to 16 sequences. It first multiplies eight steps of input by w_ih (a tile of eight rows, so those
    weights are read once for eight steps), then advances step by step: for each block of units tiles of ``rows x
    gates`` run over the previous state, then the gate functions and the update of the state over rows and blocks.
    Fewer sequences than a tile has run one by one, two blocks at once for enough independent sums. Threads share out
    sequences; a step reads ``gates * hidden²`` weights from L2 once for all rows of the task: those of a block of units, 32 KB for
    four gates and 128 units, are in L1 for all tiles but the first. These numbers are those of the first candidate, which is
    taken without a schedule.
    """
    schedule = schedule or next(RecurrentSchedule.candidates(kind, n, steps, hidden, dtype, target))
    gates, lanes = GATES[kind], recurrent_lanes(dtype, target)
    blocks, wide = -(-hidden // lanes), gates * lanes
    state_spec = BufferSpec((n, hidden), dtype)
    states = STATES[kind]

    with prim_func(name or kind) as kernel:
        x = parameter("x", BufferSpec((n, steps, features), dtype))
        initial = [parameter(f"{s}0", state_spec) for s in states]
        w_ih = parameter("w_ih", BufferSpec((blocks, features, wide), dtype))
        w_hh = parameter("w_hh", BufferSpec((blocks, hidden, wide), dtype))
        bias = [parameter(f"b{i}", BufferSpec((blocks, 1, wide), dtype)) for i in range(2 if kind == "gru" else 1)]
        y = parameter("y", BufferSpec((n, steps, hidden), dtype))
        final = [parameter(f"{s}n", state_spec) for s in states]
        layer = _Layer(
            kind, activation, (n, steps, features, hidden), reverse, dtype, lanes, x, w_ih, w_hh, bias, y, schedule
        )
        work = schedule.rows * gates * hidden * (features + hidden) * steps
        tiles = ceildiv(n, schedule.rows)
        tasks = tirx.max(ceildiv(tiles, schedule.tiles), tirx.min(tiles, target.cores))
        parallel_if_large(tasks, work, lambda index: layer.task(index, tasks, initial, final))
    return kernel.func


@dataclass(frozen=True)
class _Layer:
    """The parts of the program, see `recurrent`; ``extents`` are n, steps, features, hidden.

    Buffers of a task, for all its rows, go from part to part: of each state two halves ``[2, rows, blocks * lanes]``, of which a step
    reads one and writes the other; the input products ``fed`` ``[rows, steps, blocks, wide]``; those of the state, ``back``
    ``[rows, blocks, wide]``.
    """

    kind: str
    activation: str
    extents: tuple[Dim, Dim, int, int]
    reverse: bool
    dtype: str
    lanes: int
    x: Buffer
    w_ih: Buffer
    w_hh: Buffer
    bias: Sequence[Buffer]
    y: Buffer
    schedule: RecurrentSchedule

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def blocks(self) -> int:
        """Vectors of units."""
        return -(-self.extents[3] // self.lanes)

    def task(self, index: Expr, tasks: Expr, initial: Sequence[Buffer], final: Sequence[Buffer]) -> None:
        """Some sequences from the first step to the last: its part of all tiles of rows."""
        n, steps, _, hidden = self.extents
        blocks, wide = self.blocks, self.gates * self.lanes
        height, at_once = self.schedule.rows, self.schedule.steps
        most, tiles = height * self.schedule.tiles, ceildiv(n, height)
        first, end = share(tiles * index // tasks * height), tiles * (index + 1) // tasks * height
        state = [T.alloc_buffer((2, most, blocks * self.lanes), self.dtype) for _ in initial]
        fed = T.alloc_buffer((most, at_once, blocks, wide), self.dtype)
        back = T.alloc_buffer((most, blocks, wide), self.dtype)
        rows = share(tirx.min(end, n) - first)
        for buffer, source in zip(state, initial, strict=True):
            with T.grid(rows, hidden) as (i, j):
                T.buffer_store(buffer, source[first + i, j], [0, i, j])
        with T.serial(ceildiv(steps, at_once)) as chunk:
            start = share(chunk * at_once)
            count = share(tirx.min(at_once, steps - start))
            with T.serial(rows) as i, T.serial(blocks) as block, T.If(count == at_once):
                with T.Then():
                    self.feed(fed, i, first + i, 0, start, block, at_once)
                with T.Else(), T.serial(count) as s:
                    self.feed(fed, i, first + i, s, start + s, block, 1)
            with T.serial(count) as s:
                self.step(rows, first, state, fed, back, s, start + s)
        for buffer, result in zip(state, final, strict=True):
            with T.grid(rows, hidden) as (i, j):
                T.buffer_store(result, buffer[steps % 2, i, j], [first + i, j])

    def time(self, turn: Expr) -> Expr:
        return self.extents[1] - 1 - turn if self.reverse else turn

    def feed(self, fed: Buffer, i: Expr, row: Expr, s: Expr, turn: Expr, block: Expr, count: int) -> None:
        """Input products of ``count`` steps of one sequence, for one block of units."""
        lanes, vectors = self.lanes, fed_vectors(self.gates)
        with T.serial(self.gates // vectors) as part:
            column = share(part * (vectors * lanes))
            sums = RegisterTile(count, vectors, lanes, self.dtype)
            with T.serial(self.extents[2]) as k:
                sums.multiply_add(
                    [self.x[row, self.time(turn + r), k] for r in range(count)],
                    [load(self.w_ih, [block, k, column + g * lanes], lanes) for g in range(vectors)],
                )
            for r in range(count):
                for g in range(vectors):
                    at = column + g * lanes
                    bias = load(self.bias[0], [block, 0, at], lanes)
                    store(fed, sums.value(r, g) + bias, [i, s + r, block, at])

    def step(
        self, rows: Expr, first: Expr, state: Sequence[Buffer], fed: Buffer, back: Buffer, s: Expr, turn: Expr
    ) -> None:
        """All rows of a task from one state to the next."""
        lanes, gates = self.lanes, self.gates
        old, new = share(turn % 2), share((turn + 1) % 2)
        self.recur(rows, state[0], old, back)
        with T.grid(rows, self.blocks) as (i, block):
            fed_back = [load(back, [i, block, g * lanes], lanes) for g in range(gates)]
            forward = [load(fed, [i, s, block, g * lanes], lanes) for g in range(gates)]
            before = [load(buffer, [old, i, block * lanes], lanes) for buffer in state]
            after = advance(self.kind, self.activation, forward, fed_back, before)
            for buffer, value in zip(state, after, strict=True):
                store(buffer, value, [new, i, block * lanes])
        with T.serial(rows) as i:
            place, source = [first + i, self.time(turn)], [new, i]
            vector_loop(
                self.extents[3],
                lanes,
                lambda at, width: store(self.y, load(state[0], [*source, at], width), [*place, at]),
            )

    def recur(self, rows: Expr, h: Buffer, old: Expr, back: Buffer) -> None:
        """Products of the previous state with w_hh: rows in tiles, those left one by one."""
        height, at_once, gates = self.schedule.rows, self.schedule.gates, self.gates
        group = min(self.schedule.group, self.blocks)

        def every_gate(count: int) -> list[tuple[int, int]]:
            return [(b, g) for b in range(count) for g in range(gates)]

        with T.grid(self.blocks, gates // at_once, rows // height) as (block, part, tile):
            picked = [(0, part * at_once + g) for g in range(at_once)]
            self.units(h, old, back, tile * height, height, block, picked)
        with T.serial(rows % height) as left:
            row = share(rows // height * height + left)
            with T.serial(self.blocks // group) as several:
                self.units(h, old, back, row, 1, several * group, every_gate(group))
            if rest := self.blocks % group:
                self.units(h, old, back, row, 1, self.blocks - rest, every_gate(rest))

    def units(
        self,
        h: Buffer,
        old: Expr,
        back: Buffer,
        first: Expr,
        count: int,
        block: Expr,
        picked: Sequence[tuple[int, Expr]],
    ) -> None:
        """The same for ``count`` rows and the ``picked`` blocks, counted from ``block``, and gates."""
        lanes = self.lanes
        sums = RegisterTile(count, len(picked), lanes, self.dtype)
        with T.serial(self.extents[3]) as k:
            sums.multiply_add(
                [h[old, first + i, k] for i in range(count)],
                [load(self.w_hh, [block + b, k, gate * lanes], lanes) for b, gate in picked],
            )
        for i in range(count):
            for v, (b, gate) in enumerate(picked):
                value = sums.value(i, v)
                if self.kind == "gru":
                    value = value + load(self.bias[1], [block + b, 0, gate * lanes], lanes)
                store(back, value, [first + i, block + b, gate * lanes])


def advance(
    kind: str, activation: str, forward: Sequence[Expr], back: Sequence[Expr], before: Sequence[Expr]
) -> list[Expr]:
    """The new state, h, and c of an lstm, of some units.

    Args:
        forward, back: what input and previous state give each gate, biases included (for a gru apart: one multiplies the other).
        before: the previous state.
    """
    if kind == "lstm":
        i, f, g, o = (share(a + b) for a, b in zip(forward, back, strict=True))
        c = share(sigmoid(f) * before[1] + sigmoid(i) * tanh(g))
        return [share(sigmoid(o) * tanh(c)), c]
    if kind == "gru":
        r, z = (sigmoid(a + b) for a, b in zip(forward[:2], back[:2], strict=True))
        candidate = tanh(forward[2] + r * back[2])
        return [share((const_like(1, z) - z) * candidate + z * before[0])]
    total = share(forward[0] + back[0])
    return [share(ACTIVATIONS[activation](total))]


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "tanh": tanh,
    "relu": lambda x: select(x < 0.0, 0.0, x),
    "sigmoid": sigmoid,
}
"""Of a plain recurrence."""

"""Loops over the elements of a result, each computed from the inputs by an expression: elementwise ops and moves of data.

Memory is what counts: a sum of two tensors of float32 reads 8 bytes for an element and writes 4, whose line is fetched first, for 1 FLOP.
Of 100000 elements, which stay in L2, that is 1.6 MB: measured 16 us by one thread, calling included, and 428 for 1 million, 37 GB/s; 8
million, 128 MB from memory, take 4.4 ms, 29 GB/s. So a chain of ops costs what its inputs and its result do: relu(2 a + b) * a takes as
long as a + b at each of these sizes. A transcendental function is hidden by memory as well, not by L2: with sigmoid(a) 100000 elements
take 31 us, 8 cycles more for a vector of 16, and 1 million 436.

Moves cost the same if neighbours stay neighbours, a slice of 0.8 million numbers 239 us; where vectors are turned, as in a flipped row, 1
million take 414.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.direct import Spread
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.tile import SERIAL_WORK, bits, ceildiv, parameter, product
from mlec.backends.tvm.kernels.vector import broadcast, cast_to, const, int64, ramp, select, share
from mlec.backends.tvm.target import TargetInfo

CHEAP = 256
"""Work (see `SERIAL_WORK`) of one vector of a cheap expression: 2.5 ns, for loads and the store rather than for arithmetic. Eight
operations more are as much again."""

CHEAP_ELEMENT = 24
"""The same of one element where there is no vector form: 0.04 to 0.4 ns were measured of what moves elements."""

CHUNK = 1 << 13
"""Elements that one turn of the parallel loop over a flat result computes."""


def memory_type(dtype: str) -> str:
    """How elements lie in memory: booleans as bytes. TVM would load and store a vector of them as packed bits."""
    return "int8" if dtype == "bool" else dtype


class NotContiguousError(Exception):
    """Neighbouring results do not need neighbouring inputs: the expression has no vector form."""


@dataclass(frozen=True)
class Lanes:
    """The elements computed at once.

    Attributes:
        count: how many: their last index is ``base``, ``base + 1`` ...
        base: a variable; None for a single element.
        extent: of the last axis.
    """

    count: int = 1
    base: Any = None
    extent: Any = None

    @property
    def is_vector(self) -> bool:
        return self.count > 1


Element = Callable[[tuple[Buffer, ...], tuple[Expr, ...], Lanes], Expr]
"""``(flat input buffers, index of the first element, lanes) -> value``; raises `NotContiguousError` where there is no vector form."""


@dataclass(frozen=True)
class Piece:
    """A box of one output that one loop nest computes.

    Attributes:
        output: which output.
        shape: extents of the box.
        element: the value at an index inside the box.
        offset: where the box lies in the output; none: it is the whole output, which may have another rank.
    """

    output: int
    shape: tuple[Dim, ...]
    element: Element
    offset: tuple[Dim, ...] = ()


def elementwise(
    name: str,
    inputs: Sequence[BufferSpec],
    outputs: Sequence[BufferSpec],
    pieces: Sequence[Piece],
    target: TargetInfo,
    work: int = 1,
    symbols: Sequence[Expr] = (),
    one_by_one: Spread | None = None,
    noalias: bool = True,
) -> Any:
    """A PrimFunc that computes its outputs piece by piece.

    The last axis of a piece is computed in vectors where the expression allows it; the others are one loop, parallel if
    there is enough to do (decided when the kernel runs if an extent is symbolic).

    Args:
        inputs, outputs: the parameter buffers.
        pieces: together they cover the outputs.
        work: arithmetic operations for each element, for the decision between one thread and all.
        symbols: extents that no buffer's shape tells; scalar parameters between inputs and outputs.
        one_by_one: runs one task for each element instead (on a GPU).
        noalias: the outputs lie in no input.
    """
    with prim_func(name, noalias) as kernel:
        arguments = [parameter(f"x{i}", spec) for i, spec in enumerate(inputs)]
        for symbol in symbols:
            T.arg(symbol.name, symbol)
        arguments += [parameter(f"y{i}", spec) for i, spec in enumerate(outputs)]
        flat = [
            T.decl_buffer((product(spec.shape),), memory_type(spec.dtype), data=buffer.data)
            for spec, buffer in zip((*inputs, *outputs), arguments, strict=True)
        ]
        sources, results = tuple(flat[: len(inputs)]), flat[len(inputs) :]
        width = max(bits(memory_type(spec.dtype)) for spec in (*inputs, *outputs))
        for piece in pieces:
            _nest(piece, sources, results[piece.output], outputs[piece.output], target.lanes(width), work, one_by_one)
    return kernel.func


def _nest(
    piece: Piece,
    sources: tuple[Buffer, ...],
    result: Buffer,
    spec: BufferSpec,
    lanes: int,
    work: int,
    one_by_one: Spread | None,
) -> None:
    """The loops of one piece."""
    shape = piece.shape
    if any(isinstance(d, int) and d == 0 for d in shape):
        return
    *outer, last = shape if shape else (1,)
    vector = one_by_one is None and lanes > 1 and not _is_one(last) and _has_vector_form(piece, sources, last)
    strides = _strides(spec.shape)

    def compute(position: tuple[Expr, ...], index: Expr, count: int) -> None:
        base = T.bind(index) if count > 1 else index
        indices = (*position, base) if shape else ()
        lanes = Lanes(count, base, last) if count > 1 else Lanes()
        value = piece.element(sources, indices, lanes)
        value = (
            select(value, const(1, "int8"), const(0, "int8")) if spec.dtype == "bool" else cast_to(spec.dtype, value)
        )
        if piece.offset:
            place = sum(((o + i) * s for o, i, s in zip(piece.offset, indices, strides, strict=True)), int64(0))
        else:
            place = sum((i * s for i, s in zip(indices, _strides(shape), strict=True)), int64(0))
        T.buffer_store(result, broadcast(value, count), [ramp(place, count)])

    def row(position: tuple[Expr, ...], begin: Expr, extent: Dim) -> None:
        """Elements ``begin .. begin + extent`` of the last axis."""
        step = lanes if vector else 1
        whole = extent // step
        if not isinstance(whole, int) or whole > 1:
            with T.serial(int64(whole)) as turn:
                compute(position, begin + turn * step, step)
        elif whole == 1:
            compute(position, begin, step)
        if step == 1:
            return
        done = begin + whole * step
        if isinstance(extent, int):
            if extent % step:
                compute(position, done, extent % step)
        else:
            with T.serial(extent % step) as turn:
                compute(position, done + turn, 1)

    total = product(shape)
    each = CHEAP / lanes if vector else CHEAP_ELEMENT
    threshold = max(1, int(SERIAL_WORK / each * 8 / (8 + work)))
    if one_by_one is not None:

        def element(number: Expr) -> None:
            *position, index = _unravel(number, (*outer, last))
            compute(tuple(position), index, 1)

        one_by_one(total, float(work), element)
    elif not outer:
        _several_threads(
            ceildiv(last, CHUNK),
            total,
            threshold,
            lambda turn: row((), turn * CHUNK, _min(CHUNK, last - turn * CHUNK, last)),
        )
    else:
        _several_threads(product(outer), total, threshold, lambda turn: row(_unravel(turn, outer), int64(0), last))


def _several_threads(turns: Dim, total: Dim, threshold: int, body: Callable[[Expr], None]) -> None:
    """A loop, parallel from ``threshold`` elements on."""
    turns = int64(turns)

    def loop(kind: Any) -> None:
        with kind(turns) as turn:
            body(turn)

    if isinstance(turns, tirx.IntImm) and turns.value == 1:
        body(int64(0))
    elif isinstance(total, int):
        loop(T.parallel if total >= threshold else T.serial)
    else:
        with T.If(share(total >= threshold)):  # under a name, as in `tile.parallel_if_large`
            with T.Then():
                loop(T.parallel)
            with T.Else():
                loop(T.serial)


def _has_vector_form(piece: Piece, sources: tuple[Buffer, ...], last: Dim) -> bool:
    """Whether the piece's expression can be built for two lanes."""
    with prim_func("probe"):
        indices = tuple(tirx.Var(f"i{axis}", "int64") for axis in range(len(piece.shape)))
        try:
            piece.element(sources, indices, Lanes(2, indices[-1], last))
        except NotContiguousError:
            return False
    return True


def _unravel(index: Expr, shape: Sequence[Dim]) -> tuple[Expr, ...]:
    """The index in a box of this shape, from the number of the element."""
    indices: list[Expr] = []
    for extent in reversed(shape[1:]):
        indices.append(index % extent if not _is_one(extent) else int64(0))
        index = index // extent
    return tuple(reversed([*indices, index]))


def _strides(shape: Sequence[Dim]) -> list[Dim]:
    strides: list[Dim] = []
    stride: Dim = 1
    for extent in reversed(shape):
        strides.append(stride)
        stride = stride * extent
    return strides[::-1]


def _min(bound: int, rest: Dim, whole: Dim) -> Dim:
    """``min(bound, rest)``; the plain number where the whole fits one chunk."""
    if isinstance(whole, int):
        if whole <= bound:
            return whole
        if whole % bound == 0:
            return bound
    return tirx.min(int64(bound), rest)


def _is_one(extent: Dim) -> bool:
    return isinstance(extent, int) and extent == 1

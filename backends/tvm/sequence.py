"""The call sequence of a lowered graph: how programs for CPUs call their kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlec.backends.tvm.lowering import Lowered, Tensor, ViewStep
from mlec.errors import LoweringError
from mlec.ir.dim import Dim, SymDim, evaluate, symbols_of
from mlec.runtime.program import Buffer, Call, CallSequence


class Extents:
    """Dims as text in which each symbol is an extent of an input by itself: the runtime evaluates dims, it solves no equations.

    Where a symbol n stands only in an extent such as ``2*n+1``, that extent gets a name, and n is written as ``(name-1)//2``. That no
    other extents are given, the signature sees to.

    Args:
        inputs: of the graph.

    Raises:
        LoweringError: no extent tells a symbol.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        dims = list(dict.fromkeys(dim for x in inputs for dim in x.shape if isinstance(dim, SymDim)))
        symbols = frozenset[str]().union(*map(symbols_of, dims))
        told = {str(dim) for dim in dims}
        self._named: dict[Dim, str] = {}
        self._solved: dict[str, str] = {}
        for dim in dims:
            untold = symbols_of(dim) - told
            if len(untold) != 1 or len(symbols_of(dim)) != 1:
                continue
            (symbol,) = untold
            first, second = (evaluate(dim, {symbol: value}) for value in (0, 1))
            if second <= first or dim != (second - first) * SymDim.named(symbol) + first:
                continue
            name = f"extent_of_{symbol}"
            while name in symbols:
                name += "_"
            self._named[dim], self._solved[symbol] = name, f"(({name}-{first})//{second - first})"
            told.add(symbol)
        if untold := symbols - told:
            raise LoweringError(
                f"no input has an axis of extent {min(untold)}, or of a multiple of it: only of other expressions with it",
                code="E_SHAPE",
                hint="name that extent by itself, or give the graph another input that has it",
            )

    def text(self, dim: Dim | str) -> int | str:
        """A dim, or the text of an expression in the graph's symbols."""
        if isinstance(dim, int) or not self._solved:
            return dim if isinstance(dim, int) else str(dim)
        if not isinstance(dim, str) and dim in self._named:
            return self._named[dim]
        return re.sub(r"[^\W\d]\w*\b(?!\()", lambda word: self._solved.get(word[0], word[0]), str(dim))


def call_sequence(lowered: Lowered) -> CallSequence:
    """The steps as plain data; buffers are numbered in the order of their definition.

    Raises:
        LoweringError: see `Extents`.
    """
    text = Extents(lowered.inputs).text

    def plain(dims: Sequence[Dim]) -> tuple[int | str, ...]:
        return tuple(map(text, dims))

    buffers: list[Buffer] = []
    numbers: dict[Tensor, int] = {}

    def define(x: Tensor, view: int | None = None) -> int:
        if x not in numbers:
            place: tuple[int | None, int | str | None, int | str] = view, None, 1
            if x.part is not None:  # nothing need have been written to what it lies in, nor to itself
                offset, lines = plain((x.part.offset, x.part.lines))
                place = define(x.part.whole), offset, lines
            numbers[x] = len(buffers)
            buffers.append(Buffer(str(x.type.dtype), plain(x.shape), *place))  # type: ignore[arg-type]
        return numbers[x]

    for x in (*lowered.inputs, *lowered.parameters.values()):
        define(x)
    given = len(buffers)
    calls = []
    for step in lowered.steps:
        if isinstance(step, ViewStep):
            define(step.result, define(step.source))
        else:
            reads, writes = (tuple(map(define, tensors)) for tensors in (step.operands, step.results))
            lines = None if step.lines is None else text(step.lines)
            over = tuple(reads[i] for i in step.over if reads[i] >= given)  # what the caller owns stays as it is
            calls.append(Call(step.code, reads, writes, plain(step.extents), lines, over))
    outputs = tuple(numbers[x] for x in lowered.outputs)
    return CallSequence(len(lowered.inputs), len(lowered.parameters), tuple(buffers), tuple(calls), outputs)

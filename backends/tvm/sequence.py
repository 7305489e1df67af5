"""The call sequence of a lowered graph: how programs for CPUs call their kernels."""

from __future__ import annotations

from collections.abc import Sequence

from mlec.backends.tvm.lowering import Lowered, Tensor, ViewStep
from mlec.errors import LoweringError
from mlec.ir.dim import Dim
from mlec.runtime.program import Buffer, Call, CallSequence


def call_sequence(lowered: Lowered) -> CallSequence:
    """The steps as plain data; buffers are numbered in the order of their definition.

    Raises:
        LoweringError: a symbol stands in no input by itself: the runtime evaluates dims, it solves no equations.
    """
    told = {str(dim) for x in lowered.inputs for dim in x.shape}
    if untold := sorted(frozenset().union(*(x.type.symbols for x in lowered.inputs)) - told):
        raise LoweringError(
            f"no input has an axis of extent {untold[0]}, only expressions with it",
            code="E_SHAPE",
            hint="name that extent by itself, or give the graph another input that has it",
        )
    buffers: list[Buffer] = []
    numbers: dict[Tensor, int] = {}

    def define(x: Tensor, view: int | None = None) -> int:
        if x not in numbers:
            place: tuple[int | None, int | str | None, int | str] = view, None, 1
            if x.part is not None:  # nothing need have been written to what it lies in, nor to itself
                offset, lines = _plain((x.part.offset, x.part.lines))
                place = define(x.part.whole), offset, lines
            numbers[x] = len(buffers)
            buffers.append(Buffer(str(x.type.dtype), _plain(x.shape), *place))  # type: ignore[arg-type]
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
            lines = None if step.lines is None else _plain((step.lines,))[0]
            over = tuple(reads[i] for i in step.over if reads[i] >= given)  # what the caller owns stays as it is
            calls.append(Call(step.code, reads, writes, _plain(step.extents), lines, over))
    outputs = tuple(numbers[x] for x in lowered.outputs)
    return CallSequence(len(lowered.inputs), len(lowered.parameters), tuple(buffers), tuple(calls), outputs)


def _plain(dims: Sequence[Dim]) -> tuple[int | str, ...]:
    return tuple(dim if isinstance(dim, int) else str(dim) for dim in dims)

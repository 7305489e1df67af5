"""How each op works on many lanes at once: one rule for each op, as `jax.vmap` has them.

Elementwise ops need no entry: their trait says it all. Any other op takes one line in the table at the end, mostly with a rule that is
there already: ``along`` for an op that works along the axes which its attribute ``axis`` or ``axes`` names, ``rows`` for one that
works on each entry of axis 0 by itself, ``leading`` for one whose leading axes broadcast. An op without a rule stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlec.ir import DType, Node, OpDef, Trait, Value
from mlec.ir.dim import product, static
from mlec.passes.vectorize.lanes import Batch, Lanes, inserted

Rule = Callable[[Batch, Node, Sequence[Lanes]], Sequence[Lanes]]


@dataclass(frozen=True)
class Batching:
    """How an op works on many lanes.

    Attributes:
        rule: from the operands to the results, where at least one operand differs between the lanes.
        varying: how many operands, of the first, may differ between the lanes; None for all of them.
        together: whether more than one operand may differ.
    """

    rule: Rule
    varying: int | None = None
    together: Callable[[Node], bool] = lambda node: True

    def refuses(self, node: Node, varying: Sequence[int]) -> str:
        """Why nodes that differ in these operands cannot become one; nothing if they can."""
        late = [node.op.operands[i].name for i in varying if self.varying is not None and i >= self.varying]
        if late:
            return f"each {node.name} has its own {late[0]}"
        return "" if len(varying) < 2 or self.together(node) else f"all operands of the {node.name} differ"


def _shifted(axis: int, rank: int, lane_axis: int) -> int:
    """An axis of a lane of ``rank``, as one of the stacked lanes."""
    axis %= rank
    return axis + (axis >= lane_axis)


def _first_axis(operands: Sequence[Lanes]) -> int:
    return next(o.axis for o in operands if o.axis is not None)


def _elementwise(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    rank = node.output.type.rank
    varying = [o for o in operands if o.axis is not None]
    # The largest operand stays as it lies; a constant goes where one that is computed is.
    shape = node.output.type.shape
    lead = max(varying, key=lambda o: (o.type.rank, not batch.is_constant(o.value), o.type.shape == shape))
    axis = lead.lane_axis + rank - lead.type.rank
    values = [batch.beside(o, rank, axis) for o in operands]
    return [Lanes(batch(node.name, *values, **node.attrs), axis)]


def _along(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    axis, rank = _first_axis(operands), operands[0].type.rank
    values = [batch.at(o, axis) for o in operands]
    attrs = dict(node.attrs)
    name = "axes" if "axes" in attrs else "axis"
    given = attrs[name] if name == "axes" else (attrs[name],)
    axes = tuple(_shifted(a, rank, axis) for a in given)
    attrs[name] = axes if name == "axes" else axes[0]
    gone = sum(a < axis for a in axes) if attrs.get("keepdims") is False else 0
    return [Lanes(v, axis - gone) for v in batch.multi(node.name, *values, **attrs)]


def _rows(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    """Operands that differ have their rows in axis 0: those of all lanes are the rows of one call.

    A lane axis behind the rows stays there: each row is followed by that of the next lane.
    """
    axis = min(_first_axis(operands), 1)
    rows = _row_operands(node)
    values = [_as_rows(batch, batch.at(o, axis)) if i < rows else o.value for i, o in enumerate(operands)]
    results = batch.multi(node.name, *values, **node.attrs)
    count = batch.count
    ends = [(count, v.type.shape[0] // count) if axis == 0 else (v.type.shape[0] // count, count) for v in results]
    return [Lanes(batch.reshape(v, (*e, *v.type.shape[1:])), axis) for v, e in zip(results, ends, strict=True)]


def _as_rows(batch: Batch, value: Value) -> Value:
    shape = value.type.shape
    return batch.reshape(value, (shape[0] * shape[1], *shape[2:]))


def _row_operands(node: Node) -> int:
    return BATCHING[node.name].varying or 1


def _leading(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    rank = node.output.type.rank
    values = [batch.beside(o, rank, 0) for o in operands]
    return [Lanes(batch(node.name, *values, **node.attrs), 0)]


def _matmul(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    a, b = operands
    if b.axis is None and b.type.rank == 2:
        axis = min(a.lane_axis, a.type.rank - 1)  # more rows of one product
        return [Lanes(batch("matmul", batch.at(a, axis), b.value), axis)]
    if a.axis is None and b.type.rank == 2 and batch.is_constant(b.value):
        wide = batch("matmul", a.value, batch.folded(b, 1))  # more columns of one product
        return [batch.split(wide, a.type.rank - 1)]
    if a.axis is None and a.type.rank == 2:
        axis = min(b.lane_axis, b.type.rank - 2)  # more columns, matrix by matrix
        return [Lanes(batch("matmul", a.value, batch.at(b, axis)), axis)]
    rank = max(a.type.rank, b.type.rank)
    return [Lanes(batch("matmul", batch.beside(a, rank, 0), batch.beside(b, rank, 0)), 0)]


def _norm(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    """Layer and RMS norm: the lane axis goes before the axes that are normalised; scales that differ are applied afterwards."""
    x, *affine = operands
    first = node.attrs["axis"] % x.type.rank
    axis = first if x.axis is None else min(x.axis, first)
    attrs = {**node.attrs, "axis": first + 1}
    if all(o.axis is None for o in affine):
        return [Lanes(batch(node.name, batch.at(x, axis), *(o.value for o in affine), **attrs), axis)]
    dtype = x.type.dtype.numpy
    shape = [int(str(d)) for d in affine[0].type.shape]
    neutral = [batch.constant(np.full(shape, value, dtype)) for value in (1, 0)][: len(affine)]
    result = batch(node.name, batch.at(x, axis), *neutral, **attrs)
    for op, operand in zip(("mul", "add"), affine, strict=False):
        result = batch(op, result, batch.beside(operand, x.type.rank, axis))
    return [Lanes(result, axis)]


def _reshape(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    """The lane axis stays where the elements before it do, else it goes to the front."""
    (x,) = operands
    shape = node.attrs["shape"]
    before = product(x.type.shape[: x.lane_axis])
    place = next((i for i in range(len(shape) + 1) if product(shape[:i]) == before), None)
    axis = 0 if place is None else place
    value = batch.at(x, 0 if place is None else x.lane_axis)
    return [Lanes(batch.reshape(value, inserted(shape, axis, batch.count)), axis)]


def _transpose(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    (x,) = operands
    axis = x.lane_axis
    perm = [_shifted(p, x.type.rank, axis) for p in node.attrs["perm"]]
    perm.insert(axis, axis)
    return [Lanes(batch("transpose", x.value, perm=tuple(perm)), axis)]


def _broadcast_to(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    (x,) = operands
    shape = node.attrs["shape"]
    axis = x.lane_axis + len(shape) - x.type.rank
    return [Lanes(batch("broadcast_to", x.value, shape=inserted(shape, axis, batch.count)), axis)]


def _pad(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    (x,) = operands
    widths = {name: inserted(node.attrs[name], x.lane_axis, 0) for name in ("before", "after")}
    return [Lanes(batch("pad", x.value, **{**node.attrs, **widths}), x.axis)]


def _one_hot(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    (indices,) = operands
    return [Lanes(batch("one_hot", indices.value, **node.attrs), indices.axis)]


def _gather(batch: Batch, node: Node, operands: Sequence[Lanes]) -> Sequence[Lanes]:
    """Where lanes pick from tables of their own by places of their own, the tables are parts of one."""
    x, indices = operands
    axis = node.attrs["axis"] % x.type.rank
    if x.axis is None:
        return [Lanes(batch("gather", x.value, indices.value, axis=axis), axis + indices.lane_axis)]
    if indices.axis is None:
        place = _shifted(axis, x.type.rank, x.axis)
        lane_axis = x.axis if x.axis <= axis else x.axis + indices.type.rank - 1
        return [Lanes(batch("gather", x.value, indices.value, axis=place), lane_axis)]
    extent = static(x.type.shape[axis])
    starts = np.arange(batch.count).reshape(-1, *[1] * (indices.type.rank - indices.axis)) * extent
    places = batch("cast", indices.value, dtype=DType.I64) if indices.type.dtype is not DType.I64 else indices.value
    for op, bound in (("maximum", np.int64(0)), ("minimum", np.int64(extent - 1)), ("add", starts)):
        places = batch(op, places, batch.constant(np.asarray(bound)))
    return [Lanes(batch("gather", batch.folded(x, axis), places, axis=axis), axis + indices.axis)]


def _is_from_fixed(node: Node) -> bool:
    """Whether it is known how many elements a gather picks from."""
    return isinstance(node.inputs[0].type.shape[node.attrs["axis"]], int)


ELEMENTWISE = Batching(_elementwise)
ALONG = Batching(_along)
BATCHING: dict[str, Batching] = {
    **dict.fromkeys(("sum", "mean", "prod", "max", "min", "logsumexp", "any", "all", "argmax", "argmin"), ALONG),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "sort", "topk", "fft", "rfft", "irfft"), ALONG),
    **dict.fromkeys(("flip", "concat", "slice", "take_along_axis"), ALONG),
    **dict.fromkeys(("batch_norm", "group_norm", "pairwise_distance", "nearest", "tree_ensemble"), Batching(_rows, varying=1)),
    **dict.fromkeys(("rnn", "gru"), Batching(_rows, varying=2)),
    "lstm": Batching(_rows, varying=3),
    "attention": Batching(_leading),
    "matmul": Batching(_matmul),
    "layer_norm": Batching(_norm),
    "rms_norm": Batching(_norm),
    "reshape": Batching(_reshape),
    "transpose": Batching(_transpose),
    "broadcast_to": Batching(_broadcast_to),
    "pad": Batching(_pad),
    "one_hot": Batching(_one_hot),
    "gather": Batching(_gather, together=_is_from_fixed),
}  # fmt: skip
UNBATCHED = {
    "constant": "constants that differ are stacked by themselves",
    "iota": "has no operands that could differ",
    **dict.fromkeys(
        ("conv", "conv_transpose", "max_pool", "avg_pool", "resize"),
        "images keep the layout that is chosen for them only where nothing reshapes them in between",
    ),
    **dict.fromkeys(("matmul_packed", "matmul_narrow", "matmul_narrow_packed", "matmul_int8"), "made by a later pass"),
    **dict.fromkeys(("conv2d_nchwc", "conv2d_narrow", "depthwise2d_nchwc", "conv_int8"), "made by a later pass"),
    **dict.fromkeys(("max_pool_int8", "sum_pool_int8"), "made by a later pass"),
    **dict.fromkeys(("unpack_int8", "fused"), "made by a later pass"),
}
"""Ops without a rule, and why."""


def batching(op: OpDef) -> Batching | None:
    """How an op works on many lanes; None if it has to stay as it is."""
    return BATCHING.get(op.name) or (ELEMENTWISE if op.has(Trait.ELEMENTWISE) else None)


def unbatched(op: OpDef) -> str:
    """Why many of an op without a rule stay apart."""
    return UNBATCHED.get(op.name, f"there is no rule for many of {op.name} at once")


def index_array(indices: Sequence[Sequence[int]] | Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(indices, DType.I64.numpy)

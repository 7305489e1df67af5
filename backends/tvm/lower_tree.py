"""Tree ensembles and distances to a set of points."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np

from mlec.backends.tvm.compat import T
from mlec.backends.tvm.decompose import decompose
from mlec.backends.tvm.kernels import direct
from mlec.backends.tvm.kernels.epilogue import Buffer, Expr
from mlec.backends.tvm.kernels.pairwise import Metric, PairwiseSchedule, nearest, pack_points, pairwise
from mlec.backends.tvm.kernels.tile import unflatten
from mlec.backends.tvm.kernels.tree_ensemble import TreeEnsemble, TreeSchedule, build, prepare
from mlec.backends.tvm.kernels.vector import const, share
from mlec.backends.tvm.lower_fused import Tail, lower_body
from mlec.backends.tvm.lowering import Lowering, Tensor, Version
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import CUDA, lowers
from mlec.errors import LoweringError
from mlec.ir.dtype import DType
from mlec.ir.graph import Node
from mlec.ir.types import TensorType
from mlec.ops.tree import OPERANDS, POSITIONS


@lowers("tree_ensemble")
def lower_tree_ensemble(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """The structure is repacked now, for the processor and for the kernel that fits it."""
    x, *structure = operands
    ensemble = constant_ensemble(node, operands)
    preferred = prepare(ensemble, lowering.target)

    def version(schedule: TreeSchedule) -> Version:
        plan = preferred if schedule == preferred.schedule else prepare(ensemble, lowering.target, *astuple(schedule))
        name = f"{structure[0].name}.{plan.strategy}"
        packed = [
            Tensor(TensorType(array.shape, DType.of(array.dtype)), array, name=f"{name}.{part}")
            for part, array in plan.packed.items()
        ]
        return Version(
            lambda name, dims: build(plan, dims(x.shape[0]), lowering.target, name),
            (x, *packed),
            plan.explain(),
            plan.row_times,
        )

    schedules = TreeSchedule.candidates(preferred, lowering.target)
    return lowering.scheduled(schedules, version, [node.output.type], node=node, typical=ensemble.typical_rows)[0]


def constant_ensemble(node: Node, operands: tuple[Tensor, ...]) -> TreeEnsemble:
    """The ensemble as arrays, checked: no kernel follows a child out of its arrays or round in a circle.

    Raises:
        LoweringError: a part is not constant, or they do not describe trees.
    """
    x, *structure = operands
    arrays = {}
    for name, tensor in zip(OPERANDS.split()[1:], structure, strict=True):
        array = (wide_position(tensor) if name in POSITIONS else tensor).array
        if array is None:
            raise LoweringError(
                f"tree_ensemble: {name} must be a constant",
                code="E_TREE_ARRAYS",
                loc=node.loc,
                hint="fold the constants first: the pipelines O1 to O3 do",
            )
        arrays[name] = array
    ensemble = TreeEnsemble(features=int(str(x.shape[1])), compare=node.attrs["compare"], **arrays)
    _ = ensemble.layout  # finds nodes with two parents, and so circles
    return ensemble


def wide_position(x: Tensor) -> Tensor:
    """Positions as kernels read them, in 32 bits."""
    if x.array is None or x.type.dtype is DType.I32:
        return x
    return Tensor(TensorType(x.shape, DType.I32), x.array.astype(np.int32), name=x.name)


@lowers("pairwise_distance", form="anchor")
def lower_pairwise_distance(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, points = operands
    if points.array is None:
        return tail.apply(lowering, node, lower_pairs(lowering, node, operands))
    metric, target = Metric(node.attrs["metric"], node.attrs["p"]), lowering.target
    m, d = points.array.shape

    def version(schedule: PairwiseSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue = tail.epilogue(lowering, dims)
            return pairwise(dims(x.shape[0]), m, d, x.dtype, metric, target, epilogue, name, schedule)

        operands = (x, packed_points(lowering, points, schedule), *tail.operands(lowering))
        return Version(build, operands, f"{metric.kind} distances{tail}")

    schedules = PairwiseSchedule.candidates(x.shape[0], m, x.dtype, target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


def packed_points(lowering: Lowering, points: Tensor, schedule: PairwiseSchedule) -> Tensor:
    """Constant points as the kernels read them."""
    return lowering.packed(points, f"points{schedule.vectors}", lambda a: pack_points(a, lowering.target, schedule))


@lowers("nearest")
def lower_nearest(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Distances and selection in one kernel, where the points are known."""
    x, points = operands
    if points.array is None or x.dtype not in ("float32", "float64"):
        return lower_body(lowering, node, decompose(node), operands)
    metric, k, target = Metric(node.attrs["metric"], node.attrs["p"]), node.attrs["k"], lowering.target
    m, d = points.array.shape

    def version(schedule: PairwiseSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            return nearest(dims(x.shape[0]), m, d, k, x.dtype, metric, target, name, schedule)

        strategy = f"{metric.kind} distances of some rows to all points, the {k} smallest kept"
        return Version(build, (x, packed_points(lowering, points, schedule)), strategy)

    schedules = PairwiseSchedule.candidates(x.shape[0], m, x.dtype, target)
    return lowering.scheduled(schedules, version, [v.type for v in node.outputs], node=node)


@lowers("pairwise_distance", on=CUDA)
def lower_pairs(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """Both sets of points computed: one task for each pair."""
    x, y = operands
    metric = Metric(node.attrs["metric"], node.attrs["p"]).canonical

    def build(name: str, dims: Dims) -> object:
        (n, features), m = dims.shape(x.shape), dims(y.shape[0])

        def pair(inputs: tuple[Buffer, ...], outputs: tuple[Buffer, ...], index: Expr) -> None:
            i, j = unflatten(index, (n, m))
            total = direct.variable(const(0.0, x.dtype))

            def add(where: tuple[Expr, ...]) -> None:
                a, b = (share(buffer[row * features + where[0]]) for buffer, row in zip(inputs, (i, j), strict=True))
                total.set(share(metric.add(share(total.value), a, b)))

            direct.over((features,), add)
            T.buffer_store(outputs[0], metric.finish(share(total.value)), [index])

        specs = [lowering.spec(t, dims) for t in operands], [lowering.spec(node.output.type, dims)]
        work = 2.0 * features if isinstance(features, int) else 64.0
        return direct.direct(name, *specs, n * m, work, pair, lowering.spread)

    return lowering.kernel(
        build, operands, [node.output.type], node=node, strategy=f"{metric.kind}, one pair at a time"
    )[0]

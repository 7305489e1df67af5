"""What a graph means in float64: the reference that compiled code is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir import Graph, Node
from mlec.ir.graph import constant_array
from mlec.ir.interp import bind_symbols
from mlec.ir.op import Array
from mlec.pipeline import nominal


def run_in_double(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    """The outputs with every float of the graph held in float64; an op whose reference knows its own type only is computed in that."""
    binding = bind_symbols([v.type for v in graph.inputs], [a.shape for a in inputs])
    values = dict(zip(graph.inputs, map(_widened, inputs), strict=True))
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node.is_constant:
                results = [_widened(constant_array(node, graph.constants))]
            else:
                results = _evaluated(node, [values[v] for v in node.inputs], binding)
            values.update(zip(node.outputs, results, strict=True))
    return [values[v] for v in graph.outputs]


def run_rounded_once(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    """The outputs with each op computed in float64 and its results rounded to their element types.

    The order of a sum does not show in these, but one rounding more or less does.
    """
    binding = bind_symbols([v.type for v in graph.inputs], [a.shape for a in inputs])
    values = dict(zip(graph.inputs, inputs, strict=True))
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            operands = [values[v] for v in node.inputs]
            results: Sequence[Array]
            if node.is_constant:
                results = [constant_array(node, graph.constants)]
            elif node.name == "fused":
                results = run_rounded_once(node.attrs["body"], operands)
            else:
                results = _evaluated(node, [_widened(a) for a in operands], binding)
            rounded = [a.astype(v.type.dtype.numpy) for a, v in zip(results, node.outputs, strict=True)]
            values.update(zip(node.outputs, rounded, strict=True))
    return [values[v] for v in graph.outputs]


EXACT = frozenset(
    {
        "abs",
        "neg",
        "relu",
        "maximum",
        "minimum",
        "where",
        "max",
        "min",
        "clip",
        "floor",
        "ceil",
        "trunc",
        "round",
        "sign",
    }
)
"""Ops whose results are rounded no further than their operands."""


def run_rounded(graph: Graph, inputs: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """The outputs with every float that an op rounds moved to a neighbour by chance, as another order or another formula would."""
    binding = bind_symbols([v.type for v in graph.inputs], [a.shape for a in inputs])
    values = dict(zip(graph.inputs, inputs, strict=True))
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node.is_constant:
                results: Sequence[Array] = [constant_array(node, graph.constants)]
            else:
                results = node.op.evaluate([values[v] for v in node.inputs], node.attrs, binding)
                if nominal(node.cost.flops) and node.name not in EXACT:
                    results = [_to_neighbours(r, rng) if r.dtype.kind == "f" else r for r in results]
            values.update(zip(node.outputs, results, strict=True))
    return [values[v] for v in graph.outputs]


def _to_neighbours(x: Array, rng: np.random.Generator) -> Array:
    there = rng.choice(np.array([-np.inf, np.inf], x.dtype), x.shape)
    return np.where(np.isfinite(x), np.nextafter(x, there), x)


def beyond(bounds: Sequence[float], expected: Sequence[Array], got: Sequence[Array]) -> str:
    """Which output is of another type or shape, or farther from what is expected than its bound, in words; empty where none is."""
    for i, (bound, wanted, found) in enumerate(zip(bounds, expected, got, strict=True)):
        if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
            return f"output {i} is {found.dtype}{found.shape} in place of {wanted.dtype}{wanted.shape}"
        moved = np.max(np.abs(found.astype(np.float64) - wanted.astype(np.float64)), initial=0.0)
        if np.isfinite(bound) and not moved <= bound:
            return f"output {i} moved by {moved:.3g}, its bound is {bound:.3g}"
    return ""


def _evaluated(node: Node, operands: Sequence[Array], binding: dict[str, int]) -> Sequence[Array]:
    if node.name == "cast" and node.output.type.dtype.is_float:
        return [operands[0].astype(np.float64)]
    if node.name != "fused":
        try:
            results = [_widened(a) for a in node.op.evaluate(operands, node.attrs, binding)]
        except (TypeError, ValueError, KeyError):
            results = []
        if [a.dtype.kind for a in results] == [
            _widened(np.empty(0, v.type.dtype.numpy)).dtype.kind for v in node.outputs
        ]:
            return results
    own = [a.astype(v.type.dtype.numpy) for a, v in zip(operands, node.inputs, strict=True)]
    return [_widened(a) for a in node.op.evaluate(own, node.attrs, binding)]


def _widened(array: Array) -> Array:
    """Floats as float64; the kind of bfloat16 is V."""
    return array.astype(np.float64) if array.dtype.kind in "fV" else array

"""Large constants that are only added, as positions of a sequence: numbers of 16 bits, in float32.

Files store such in half the bytes, and kernels read them as before. What is rounded off is a sixteenth of the steps that
8 bits would make of them, or less.
"""

from __future__ import annotations

import numpy as np

from mlec.ir import ConstantRef, Graph, GraphBuilder, Value
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.passes.quantize.tables import LEAST_BYTES

ERROR = 2.0**-11
"""By which f16 is off at most, as a part of the largest number."""


def with_halves(graph: Graph) -> Graph:
    """The graph with these constants rounded to f16, where that keeps them."""
    rounded = {name: half for name in _added(graph) if (half := _rounded(graph.constants[name])) is not None}
    if not rounded:
        return graph
    b = GraphBuilder(graph.name, taken=graph.constants)
    b.adopt_interface(graph)
    for node in graph.nodes:
        half = rounded.get(_name_of(node.output, graph)) if node.is_constant else None
        if half is None:
            b.keep(node)
            continue
        with b.at(node.loc):
            b.replace(node.output, b.constant(half, node.output.hint))
    return b.finish(graph.outputs, signature=graph.given_signature)


def _added(graph: Graph) -> list[str]:
    """Names of the large constants that are operands of sums and of nothing else."""
    found: dict[str, bool] = {}
    for node in graph.nodes:
        if node.is_constant and (name := _name_of(node.output, graph)):
            summed = all(user.name in ("add", "sub") for user in graph.users.get(node.output, ()))
            found[name] = found.get(name, True) and summed and node.output not in graph.outputs
    return [name for name, summed in found.items() if summed]


def _name_of(value: Value, graph: Graph) -> str:
    """Of a large constant of float32; empty for others."""
    ref = graph.producer[value].attrs["value"]
    large = isinstance(ref, ConstantRef) and value.type.dtype is DType.F32
    return ref.name if large and graph.constants[ref.name].nbytes >= LEAST_BYTES else ""


def _rounded(array: Array) -> Array | None:
    """The nearest numbers of f16, as f32; None if they are so already, or too far away, or counts and places, which would be others."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(np.float32)
    if np.array_equal(half, array) or not np.isfinite(half).all() or np.array_equal(array, np.rint(array)):
        return None
    error = np.abs(half - array).max()
    return half if error <= ERROR * np.abs(array).max() else None

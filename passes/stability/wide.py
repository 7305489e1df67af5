"""The reference interpreter in a wider precision than the graph states: what the exact result is, as far as a witness needs to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlec.ir import DType, Graph, Node, Value, bind_symbols, constant_array
from mlec.ir.op import Array


def wider(graph: Graph) -> np.dtype[Any]:
    """float64, or of graphs that have float64 themselves the long double of the machine."""
    dtypes = {value.type.dtype for node in graph.nodes for value in node.outputs} | {v.type.dtype for v in graph.inputs}
    return np.dtype(np.longdouble if DType.F64 in dtypes else np.float64)


class WideGraph:
    """A graph of which every float has one wide dtype, whatever its types state; integers and booleans are as they were."""

    def __init__(self, graph: Graph, dtype: np.dtype[Any]) -> None:
        self.graph, self.dtype = graph, dtype
        self._constants = {
            node.output: self.widened(constant_array(node, graph.constants)) for node in graph.nodes if node.is_constant
        }

    def widened(self, array: Array) -> Array:
        return np.asarray(array, self.dtype) if array.dtype.kind in "fV" else array

    def trace(self, inputs: Sequence[Array]) -> Mapping[Value, Array]:
        """Every value for these inputs, which are widened first."""
        graph, bound = self.graph, self.bound(inputs)
        values = {**self._constants, **{v: self.widened(a) for v, a in zip(graph.inputs, inputs, strict=True)}}
        with np.errstate(all="ignore"):
            for node in graph.nodes:
                if not node.is_constant:
                    results = self.evaluated(node, [values[v] for v in node.inputs], bound)
                    values.update(zip(node.outputs, results, strict=True))
        return values

    def bound(self, inputs: Sequence[Array]) -> Mapping[str, int]:
        """The extents of symbolic dims for these inputs."""
        return bind_symbols([v.type for v in self.graph.inputs], [a.shape for a in inputs])

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        values = self.trace(inputs)
        return [values[v] for v in self.graph.outputs]

    def evaluated(self, node: Node, operands: Sequence[Array], bound: Mapping[str, int]) -> list[Array]:
        """The results of one node on wide operands; a cast to a float of any width keeps every digit."""
        if node.name == "cast" and node.attrs["dtype"].is_float:
            return [operands[0].astype(self.dtype)]
        return [self.widened(np.asarray(result)) for result in node.op.evaluate(operands, node.attrs, bound)]

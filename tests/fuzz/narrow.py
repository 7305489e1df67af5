"""Graphs in 16 bits: what passes declare must hold of them as well, and a rounding more or less shows there."""

from __future__ import annotations

import numpy as np

from mlec.errors import MlecError
from mlec.ir import DType, Graph, GraphBuilder, TensorType
from mlec.ir.graph import constant_array
from tests.fuzz.graphs import Sample

NARROW = (DType.F16, DType.BF16)


def sometimes_narrow(sample: Sample, rng: np.random.Generator, share: float) -> Sample:
    """Such a share of the samples with 16 bits wherever they have float32, as far as their ops take that."""
    if rng.random() >= share:
        return sample
    dtype = NARROW[int(rng.integers(len(NARROW)))]
    try:
        graph = in_16_bits(sample.graph, dtype)
    except (MlecError, ValueError):
        return sample
    inputs = [a.astype(v.type.dtype.numpy) for a, v in zip(sample.inputs, graph.inputs, strict=True)]
    return Sample(graph, inputs)


def in_16_bits(graph: Graph, dtype: DType) -> Graph:
    """The graph with another type wherever it has float32.

    Raises:
        MlecError: an op does not take it.
    """
    b = GraphBuilder(graph.name)
    for value in graph.inputs:
        b.replace(value, b.input(value.hint, _retyped(value.type, dtype)))
    for node in graph.nodes:
        if node.is_constant:
            array = constant_array(node, graph.constants)
            with np.errstate(over="ignore"):
                narrow = array.astype(dtype.numpy) if array.dtype == np.float32 else array
            b.replace(node.output, b.constant(narrow, node.output.hint))
            continue
        attrs = {name: dtype if value is DType.F32 else value for name, value in node.attrs.items()}
        results = b.multi(node.op, *map(b.resolve, node.inputs), **attrs)
        for old, new in zip(node.outputs, results, strict=True):
            b.replace(old, new)
    return b.finish([b.resolve(value) for value in graph.outputs])


def _retyped(kind: TensorType, dtype: DType) -> TensorType:
    return TensorType(kind.shape, dtype) if kind.dtype is DType.F32 else kind

"""``fused``: a region of the graph that a backend compiles as one kernel. Its meaning is that of its body."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlec.ir.builder import GraphBuilder
from mlec.ir.dim import Dim, symbols_of
from mlec.ir.dtype import DType
from mlec.ir.graph import Graph
from mlec.ir.interp import bind_symbols, trace_graph
from mlec.ir.op import REQUIRED, Array, Attr, AttrKind, Attrs, Case, Cost, OpDef, moved_bytes, register
from mlec.ir.types import TensorType, tensor
from mlec.ops.common import N, floats, operands, require


def _type(types: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
    body: Graph = attrs["body"]
    require(len(types) == len(body.inputs), f"the body takes {len(body.inputs)} operands, got {len(types)}", "E_ARITY")
    binding: dict[str, Dim] = {}
    for given, declared in zip(types, (v.type for v in body.inputs), strict=True):
        require(
            given.rank == declared.rank and given.dtype is declared.dtype,
            f"the body takes {declared}, got {given}",
            "E_TYPE",
        )
        for extent, dim in zip(given.shape, declared.shape, strict=True):
            if not isinstance(dim, int) and str(dim) in symbols_of(dim):
                binding.setdefault(str(dim), extent)
    for given, declared in zip(types, (v.type for v in body.inputs), strict=True):
        require(declared.substitute(binding) == given, f"the body takes {declared}, got {given}", "E_TYPE")
    return [v.type.substitute(binding) for v in body.outputs]


def _reference(*arrays: Array, body: Graph) -> tuple[Array, ...]:
    types = [v.type for v in body.inputs]
    binding = bind_symbols(types, [np.shape(a) for a in arrays], known=dict.fromkeys(_free(types), 0))
    values = trace_graph(body, arrays, binding)
    return tuple(values[v] for v in body.outputs)


def _free(types: Sequence[TensorType]) -> set[str]:
    """Symbols that may have any value, as only their sum with others is an extent of operands: m + n of what was joined before.

    Of each sum another symbol has what is left: one that is in as few of them as can be.
    """
    sums = [symbols_of(extent) for extent in {extent for kind in types for extent in kind.shape}]
    told = {name for names in sums if len(names) == 1 for name in names}
    uses = Counter(name for names in sums for name in names)
    return {name for names in sums for name in sorted(names - told, key=lambda name: (uses[name], name))[1:]}


def _cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    """The arithmetic of the body; only operands and results move."""
    return Cost(attrs["body"].cost.flops, moved_bytes(inputs, results))


def _sample(rng: np.random.Generator) -> Case:
    b = GraphBuilder("body")
    x = b.input("x", tensor(DType.F32, ("n", 5)))
    bias = b.input("bias", tensor(DType.F32, (5,)))
    body = b.finish([b("relu", b("add", b("mul", x, 2.0), bias))])
    return Case((floats(rng, N, 5), floats(rng, 5)), {"body": body})


register(
    OpDef(
        "fused", operands("inputs*"), (Attr("body", AttrKind.GRAPH, REQUIRED),), _type, _reference, _sample, _cost, tolerance=64.0,
        doc="a region compiled as one kernel; computes what its body computes",
    )
)  # fmt: skip

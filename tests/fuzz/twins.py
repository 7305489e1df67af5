"""Twins of a graph: spelled in another way, and the same function bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlec.ir import DType, Graph, GraphBuilder, Value

SHARE = 0.3
"""Of the values that get a detour."""


def twin(graph: Graph, rng: np.random.Generator) -> Graph:
    """The graph with a detour behind some of its values."""
    b = GraphBuilder(f"{graph.name}_twin")
    b.adopt_interface(graph)
    for node in graph.nodes:
        b.keep(node)
        for value in node.outputs:
            here = b.resolve(value)
            fitting = [make for fits, make in DETOURS if fits(here)]
            if fitting and not node.is_constant and rng.random() < SHARE:
                b.replace(here, fitting[int(rng.integers(len(fitting)))](b, here))
    return b.finish(graph.outputs, signature=graph.given_signature)


def _is_float(value: Value) -> bool:
    return value.type.dtype.is_float


def _has_width(value: Value) -> bool:
    return bool(value.type.rank) and isinstance(value.type.shape[-1], int) and value.type.shape[-1] >= 2


def _split(b: GraphBuilder, value: Value) -> Value:
    axis, width = value.type.rank - 1, value.type.shape[-1]
    assert isinstance(width, int)
    parts = [b("slice", value, axis=axis, start=i, stop=j, step=1) for i, j in ((0, 1), (1, width))]
    return b("concat", *parts, axis=axis)


def _turned(b: GraphBuilder, value: Value) -> Value:
    perm = list(range(value.type.rank))[::-1]
    return b("transpose", b("transpose", value, perm=perm), perm=perm)


def _reshaped(b: GraphBuilder, value: Value) -> Value:
    return b("reshape", b("reshape", value, shape=(*value.type.shape, 1)), shape=value.type.shape)


def _chosen(b: GraphBuilder, value: Value) -> Value:
    return b("where", b.constant(np.bool_(True)), value, b("neg", value))


def _through_double(b: GraphBuilder, value: Value) -> Value:
    return b("cast", b("cast", value, dtype=DType.F64), dtype=value.type.dtype)


DETOURS: list[tuple[Callable[[Value], bool], Callable[[GraphBuilder, Value], Value]]] = [
    (_is_float, lambda b, v: b("sub", v, 0.0)),  # adding 0 would turn -0.0 into 0.0
    (_is_float, lambda b, v: b("mul", v, 1.0)),
    (_is_float, lambda b, v: b("neg", b("neg", v))),
    (_is_float, _through_double),
    (_is_float, _chosen),
    (lambda v: v.type.rank >= 2, _turned),
    (lambda v: v.type.rank >= 1, _reshaped),
    (_has_width, _split),
    (_has_width, lambda b, v: b("flip", b("flip", v, axes=(v.type.rank - 1,)), axes=(v.type.rank - 1,))),
]
"""For which values, and what then stands between them and their users."""

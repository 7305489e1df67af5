"""Results that kernels write straight into a concatenation, and slices that are read where they lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.runtime.executable import Executable
from mlec.target import Target

Make = Callable[[GraphBuilder, Value], list[Value]]


def product(b: GraphBuilder, x: Value, columns: int) -> Value:
    """A product, by weights that each call draws anew."""
    rows = x.type.shape[-1]
    assert isinstance(rows, int)
    return b("matmul", x, b.constant(np.random.default_rng(columns).normal(size=(rows, columns)).astype(np.float32)))


def graph_of(make: Make, columns: int = 8) -> Graph:
    b = GraphBuilder()
    return b.finish(make(b, b.input("x", tensor("f32", ("n", columns)))))


def copies(executable: Executable, x: np.ndarray) -> list[str]:
    """The calls that are made to copy, for inputs of this shape."""
    kernels, moves = executable.program.kernels, ("concat", "slice", "reshape")
    return [kernels[number].op for number in executable.plan([x]).made if kernels[number].op in moves]


def side_by_side(b: GraphBuilder, x: Value) -> list[Value]:
    joined = b("concat", product(b, x, 4), b("tanh", product(b, x, 6)), b("exp", x), axis=1)
    return [product(b, joined, 3)]


def dense(b: GraphBuilder, x: Value) -> list[Value]:
    """Each concatenation begins with the last one; the input lies in none of them by itself."""
    features = [x]
    for columns in (4, 2, 6):
        features.append(product(b, b("tanh", b("concat", *features, axis=1)), columns))
    return [b("concat", *features, axis=1)]


def shared(b: GraphBuilder, x: Value) -> list[Value]:
    """One operand twice, one in two concatenations in another order, one that is an output as well."""
    p, q = product(b, x, 4), product(b, x, 6)
    return [b("concat", p, p, q, axis=1), b("tanh", b("concat", q, p, axis=1)), q]


def cut(b: GraphBuilder, x: Value) -> list[Value]:
    """Slices of an input, of a result, of a slice, and of a concatenation whose operands lie in it; one is an output."""
    p = product(b, x, 16)
    parts = [b("slice", p, axis=1, start=start, stop=stop, step=1) for start, stop in ((0, 4), (4, 12), (12, 16))]
    inner = b("slice", parts[1], axis=1, start=2, stop=6, step=1)
    joined = b("concat", product(b, parts[0], 8), product(b, inner, 8), axis=1)
    across = b("slice", joined, axis=1, start=6, stop=10, step=1)
    own = b("slice", x, axis=1, start=2, stop=6, step=1)
    return [product(b, across, 3), product(b, own, 3), parts[2], b("concat", parts[0], parts[2], axis=1)]


def reshaped(b: GraphBuilder, x: Value) -> list[Value]:
    """Views of results in a concatenation, and views of the concatenation."""
    p = b("reshape", product(b, x, 8), shape=(x.type.shape[0], 2, 4))
    joined = b("concat", p, b("reshape", b("exp", x), shape=(x.type.shape[0], 2, 4)), axis=1)
    return [
        product(b, b("reshape", joined, shape=(x.type.shape[0], 16)), 5),
        b("reshape", p, shape=(x.type.shape[0] * 2, 4)),
    ]


def below(b: GraphBuilder, x: Value) -> list[Value]:
    """Along the outermost axis a part begins where the rows before it end, however many these are."""
    joined = b("concat", b("tanh", product(b, x, 8)), b("exp", x), axis=0)
    n = x.type.shape[0]
    return [product(b, joined, 3), product(b, b("slice", joined, axis=0, start=n, stop=n * 2, step=1), 5)]


def odd(b: GraphBuilder, x: Value) -> list[Value]:
    """Parts that begin where kernels could not write: these are copied."""
    joined = b("concat", product(b, x, 3), product(b, x, 5), axis=1)
    return [product(b, joined, 2), product(b, b("slice", x, axis=1, start=1, stop=4, step=1), 2)]


@pytest.mark.parametrize(
    ("make", "one", "several"),
    [
        (side_by_side, [], ["concat"]),
        (dense, ["concat"] * 2, ["concat"] * 5),
        (shared, ["concat"] * 2, ["concat"] * 3),
        (cut, ["concat", "reshape"], ["slice"] * 6 + ["concat"] * 2 + ["reshape"]),
        (reshaped, ["reshape"], ["concat", "reshape"]),
        (below, [], []),
        (odd, ["concat", "slice"], ["concat"] * 2 + ["slice"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_results_are_those_of_copies(make: Make, one: list[str], several: list[str]) -> None:
    graph = graph_of(make)
    module = TVMBackend().compile(graph, Target())
    executable = Executable(module.program, module.objects, module.constants, num_threads=1)
    for rows in (1, 0, 2, 7, 1):
        x = np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)
        for got, wanted in zip(executable.run([x]), run_graph(graph, [x]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        assert sorted(copies(executable, x)) == sorted(one if rows == 1 else several), f"{rows} rows"

"""NaN, infinities, signed zeros and denormals in expressions that algebra would shorten and floating point does not allow to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.passes.fusion import FuseOperators
from mlec.pipeline import PassPipeline
from mlec.runtime.executable import Executable
from mlec.target import Target

SIGN_OF_ZERO_IS_FREE = ("maximum", "minimum", "mod", "floordiv")


def expressions(b: GraphBuilder, x: Value, y: Value) -> dict[str, Value]:
    """Every one is another value than its simplest algebraic equal for some x and y."""
    zero, negative_zero, one = (b.constant(np.asarray(v, x.type.dtype.numpy)) for v in (0.0, -0.0, 1.0))
    less, at_least = b("lt", x, y), b("ge", x, y)
    both = ("sub", "eq", "ne", "le", "ge", "lt", "gt", "div", "mod", "floordiv", "maximum", "minimum")
    with_zero = ("mul", "add", "sub", "div", "pow")
    return {
        **{f"{op} x x": b(op, x, x) for op in both},
        **{f"{op} x 0": b(op, x, zero) for op in (*with_zero, "mod", "floordiv", "le")},
        **{f"{op} x -0": b(op, x, negative_zero) for op in with_zero},
        **{f"{op} 0 x": b(op, zero, x) for op in (*with_zero, "mod", "floordiv")},
        **{f"{op} -0 x": b(op, negative_zero, x) for op in with_zero},
        "1 ** x": b("pow", one, x),
        "(x + c) - c": b("sub", b("add", x, 1e4), 1e4),
        "(x + y) - y": b("sub", b("add", x, y), y),
        "x - (x - y)": b("sub", x, b("sub", x, y)),
        "x + (y - x)": b("add", x, b("sub", y, x)),
        "x + (-x)": b("add", x, b("neg", x)),
        "x * y - x * y": b("sub", b("mul", x, y), b("mul", x, y)),
        "x * 3 + x * -3": b("add", b("mul", x, 3.0), b("mul", x, -3.0)),
        "x * big * small": b("mul", b("mul", x, 2.0**14), 2.0**-14),
        "not x < y": b("logical_not", less),
        "x < y and x >= y": b("logical_and", less, at_least),
        "x < y or x >= y": b("logical_or", less, at_least),
        "x < y xor x >= y": b("logical_xor", less, at_least),
        "2 x == x + x": b("eq", b("mul", x, 2.0), b("add", x, x)),
        "x - y <= 0": b("le", b("sub", x, y), 0.0),
        "x + 1 < y + 1": b("lt", b("add", x, 1.0), b("add", y, 1.0)),
        "x <= max(x, y)": b("le", x, b("maximum", x, y)),
        "min(x, y) <= x": b("le", b("minimum", x, y), x),
        "x where x == y else y": b("where", b("eq", x, y), x, y),
        "nested where": b(
            "where", b("logical_not", less), b("sub", x, y), b("where", less, b("mul", x, y), y)
        ),
        "isnan(x - y)": b("isnan", b("sub", x, y)),
        "0 / (x - x)": b("div", zero, b("sub", x, x)),
    }  # fmt: skip


def graph_of(dtype: str) -> tuple[Graph, list[str]]:
    b = GraphBuilder("ieee")
    found = expressions(b, b.input("x", tensor(dtype, ("n",))), b.input("y", tensor(dtype, ("n",))))
    return b.finish(list(found.values())), list(found)


def pairs(dtype: np.dtype[Any]) -> list[np.ndarray]:
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-7, -1e-7, 1e-40, -1e-310, 1.0, -1.0, 2.5, -2.5, 6e4, 1e30, -3e38]
    with np.errstate(all="ignore"):
        values = np.array(special).astype(dtype)
    return [a.ravel() for a in np.meshgrid(values, values)]


def outputs(graph: Graph, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    module = TVMBackend().compile(graph, Target())
    return Executable(module.program, module.objects, module.constants, num_threads=1).run(list(arrays))


# Within one kernel bf16 is not rounded between ops: TVM drops the conversions there and back.
@pytest.mark.parametrize(
    ("dtype", "fused"), [("f32", False), ("f32", True), ("f64", False), ("f16", True), ("bf16", False)]
)
def test_arithmetic_is_that_of_the_reference(dtype: str, fused: bool) -> None:
    graph, names = graph_of(dtype)
    arrays = pairs(graph.inputs[0].type.dtype.numpy)
    wanted = run_graph(graph, arrays)
    if fused:
        graph, _ = PassPipeline([FuseOperators()]).run(graph)
    for name, a, b in zip(names, wanted, outputs(graph, arrays), strict=True):
        if a.dtype.kind in "fV":
            a, b = a.astype(np.float64), b.astype(np.float64)
            if not name.startswith(SIGN_OF_ZERO_IS_FREE):
                a, b = (np.where(v == 0, np.copysign(1e-320, v), v) for v in (a, b))
        np.testing.assert_array_equal(a, b, err_msg=name)

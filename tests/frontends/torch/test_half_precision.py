"""Tensors of 16 bits with numbers that these do not hold: every value of both types, against torch bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mlec.frontends.fx_context import to_numpy
from mlec.ir import Graph, run_graph
from mlec.ir.op import Array
from tests.frontends.torch.common import lower

TYPES = (torch.float16, torch.bfloat16)
# Rounded to 16 bits these are other numbers, in float16 1e6 is infinite and 1e-8 is 0; 0.75 is held by both types.
NUMBERS = (0.1, -1 / 3, 1e6, 1e-8, 0.75)
SMALL = (0.1, 1 / 3, 3.14159, 0.75)


def every(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values, each in the same place of its row for kernels on vectors and for the end of one."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1024, 64)


def scalar(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64)


def with_each(
    function: Callable[[torch.Tensor, Any], Any], numbers: tuple[float, ...]
) -> Callable[[torch.Tensor], Any]:
    return lambda x: [function(x, number) for number in numbers]


NUMBER_OPS: dict[str, Callable[[torch.Tensor, Any], Any]] = {
    "add": lambda x, s: (x + s, s + x),
    "sub": lambda x, s: (x - s, s - x),
    "mul": lambda x, s: (x * s, s * x),
    "div": lambda x, s: x / s,
    "floor_divide": lambda x, s: x // s,
    "trunc_divide": lambda x, s: torch.div(x, s, rounding_mode="trunc"),
    "remainder": lambda x, s: x % s,
    "fmod": lambda x, s: torch.fmod(x, s),
    "compare": lambda x, s: (x < s, x <= s, x == s, x != s, x > s, x >= s),
    "where": lambda x, s: (torch.where(x > 0, x, s), torch.where(x > 0, s, x)),
    "leaky_relu": lambda x, s: F.leaky_relu(x, s),
    "scalar_tensor": lambda x, s: (x * scalar(s), x / scalar(s), scalar(s) * x, x + scalar(s), scalar(s) - x),
    "scalar_tensor_compare": lambda x, s: (x < scalar(s), torch.maximum(x, scalar(s)), torch.minimum(scalar(s), x)),
}
SMALL_OPS: dict[str, Callable[[torch.Tensor, Any], Any]] = {
    "add_alpha": lambda x, s: torch.add(x, x.flip(1) / 4, alpha=s),
    "sub_alpha": lambda x, s: torch.sub(x, x.flip(1) / 4, alpha=s),
    "clamp": lambda x, s: (x.clamp(min=s), x.clamp(max=s), F.hardtanh(x, -s, s)),
    "masked_fill": lambda x, s: (x.masked_fill(x > 0, s), torch.full_like(x, s)),
    "threshold": lambda x, s: (F.threshold(x, s, 2.0), F.threshold(x, 1.0, s)),
    "hardshrink": lambda x, s: F.hardshrink(x, s),
    "addcmul": lambda x, s: torch.addcmul(x, x.flip(1), x.flip(0), value=s),
    "addcdiv": lambda x, s: torch.addcdiv(x, x.flip(1), x.flip(0), value=s),
    "lerp": lambda x, s: torch.lerp(x, x.flip(1), s),
    "lerp_tensor": lambda x, s: torch.lerp(x, x.flip(1), x.flip(0)),
    "pow": lambda x, s: (torch.pow(x, s), torch.pow(s, x)),
    "elu": lambda x, s: (F.elu(x, s), F.celu(x, s)),
    "softplus": lambda x, s: (F.softplus(x, s), F.softplus(x, 1, s)),
}
PLAIN_OPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "powers": lambda x: (x**2, x**3, x**-1, x**-2, x.abs() ** 0.5, x.abs() ** -0.5, x**1, x**0),
    "selu": F.selu,
    "mish": F.mish,
    "glu": lambda x: F.glu(x, 1),
    "hyperbolic": lambda x: (x.clamp(-88, 88).sinh(), x.clamp(-88, 88).cosh(), x.asinh(), x.acosh(), x.atanh()),
    "arcs": lambda x: (x.asin(), x.acos()),
    "logarithms": lambda x: (x.log2(), x.log10()),
    "batch": lambda x: (x * x.shape[0], x / (x.shape[0] * 1001)),
    "arange": lambda x: x * 0 + torch.arange(0.1, 6.5, 0.1, dtype=x.dtype)[:64],
}
NEAR = ("elu", "selu", "mish", "softplus", "glu", "hyperbolic", "arcs", "pow", "powers", "logarithms", "addcmul")
"""Their float32 is not that of torch to the last bit, so that now and then a result is rounded to the neighbour."""

OPS: dict[str, Callable[[torch.Tensor], Any]] = {
    **{name: with_each(function, NUMBERS) for name, function in NUMBER_OPS.items()},
    **{name: with_each(function, SMALL) for name, function in SMALL_OPS.items()},
    **PLAIN_OPS,
}


@cache
def graph_of_all(dtype: torch.dtype) -> Graph:
    return lower(lambda x: {name: function(x) for name, function in OPS.items()}, every(dtype))


@cache
def results(dtype: torch.dtype) -> dict[str, list[Array]]:
    """What the graph gives for each op."""
    graph = graph_of_all(dtype)
    assert graph.signature is not None
    found: dict[str, list[Array]] = {name: [] for name in OPS}
    with np.errstate(all="ignore"):
        outputs = run_graph(graph, [to_numpy(every(dtype))])
    for spec, output in zip(graph.signature.outputs, outputs, strict=True):
        found[spec.name.split(".")[0]].append(output)
    return found


def units_apart(ours: Array, theirs: Array) -> Array:
    """How many floats lie between two of 16 bits, from one to the other; 0 for NaN and NaN, very many for NaN and a number."""
    nan, other_nan = np.isnan(ours), np.isnan(theirs)
    places = []
    for array in (ours, theirs):
        bits = array.view(np.int16).astype(np.int32)
        places.append(np.where(bits < 0, -(2**15) - bits, bits))  # -0.0 and 0.0 are one
    apart = np.abs(places[0] - places[1])
    return np.asarray(np.where(nan & other_nan, 0, np.where(nan | other_nan, 2**16, apart)))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_all_values(dtype: torch.dtype, name: str) -> None:
    expected = torch.utils._pytree.tree_leaves(OPS[name](every(dtype)))
    for ours, tensor in zip(results(dtype)[name], expected, strict=True):
        theirs = to_numpy(tensor)
        if theirs.dtype.kind == "b":
            np.testing.assert_array_equal(ours, theirs)
            continue
        apart = units_apart(ours, theirs)
        if name in ("remainder", "fmod"):  # NaN for very many times the divisor: only in torch's kernels on vectors
            apart[np.isnan(theirs) & np.isfinite(to_numpy(every(dtype)))] = 0
        assert apart.max() <= 2 * (name in NEAR)
        assert np.count_nonzero(apart) <= 2e-3 * apart.size


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_float32_only_where_it_counts(dtype: torch.dtype) -> None:
    def ops(function: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        graph = lower(function, torch.ones(3, 4, dtype=dtype))
        return [node.name for node in graph.compute_nodes]

    assert ops(lambda x: x * 0.75) == ["mul"]
    assert ops(lambda x: x * torch.tensor(3)) == ["cast", "mul"]  # of the constant
    assert ops(lambda x: x / 8) == ["div"]
    assert ops(lambda x: x + 0.1) == ["add"]
    assert ops(lambda x: x * x[:, :1]) == ["slice", "mul"]
    assert ops(lambda x: x * 0.1) == ["cast", "mul", "cast"]
    assert ops(lambda x: F.leaky_relu(x, 0.25)) == ["gt", "mul", "where"]


def test_a_large_factor_is_not_infinite() -> None:
    x = torch.tensor([[0.0, 1e-3, -2e-2]], dtype=torch.float16)
    (y,) = run_graph(lower(lambda x: x * 1e6, x), [to_numpy(x)])
    np.testing.assert_array_equal(y, to_numpy(x * 1e6))
    assert np.isfinite(y).all()

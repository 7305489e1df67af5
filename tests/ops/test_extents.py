"""No op has a result of a negative extent, whatever its attributes say, and none chooses among no elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mlec.ops  # noqa: F401  (fills the op table)
from mlec.errors import TypeRuleError
from mlec.ir import OPS, DType, GraphBuilder, tensor


@pytest.mark.parametrize(
    ("op", "operand", "attrs"),
    [
        ("iota", None, {"shape": (-1, 3), "axis": 0, "dtype": "i32"}),
        ("one_hot", tensor("i64", ("n",)), {"depth": -1, "dtype": "bool"}),
        ("resize", tensor("f32", ("n", 2, 4, 5)), {"size": (-1, 3)}),
        ("topk", tensor("f32", (3, "n")), {"k": -2}),
    ],
)
def test_refused(op: str, operand: Any, attrs: dict[str, Any]) -> None:
    b = GraphBuilder()
    operands = [] if operand is None else [b.input("x", operand)]
    with pytest.raises(TypeRuleError, match=rf"{op}\(.*of a negative extent"):
        b.multi(op, *operands, **attrs)


@pytest.mark.parametrize("shape", [("n", 0), (0, 0)])
@pytest.mark.parametrize(
    ("op", "attrs", "indices"),
    [
        ("max", {"axes": (0, 1)}, None),
        ("min", {"axes": (-1,)}, None),
        ("argmax", {"axis": 1}, None),
        ("argmin", {"axis": -1}, None),
        ("gather", {"axis": 1}, (3,)),
        ("gather", {"axis": 1}, ("m",)),
    ],
)
def test_nothing_to_choose_from(op: str, attrs: dict[str, Any], indices: Any, shape: Any) -> None:
    b = GraphBuilder()
    operands = [b.input("x", tensor("f32", shape)), *([b.input("i", tensor("i64", indices))] if indices else [])]
    with pytest.raises(TypeRuleError, match=rf"{op}\(.*axis \d of .* has no element to choose from"):
        b(op, *operands, **attrs)


def test_nothing_to_take_along() -> None:
    b = GraphBuilder()
    x, indices = b.input("x", tensor("f32", ("n", 0))), b.input("i", tensor("i64", ("n", 2)))
    with pytest.raises(TypeRuleError, match=r"axis 1 of .* has no element to choose from"):
        b("take_along_axis", x, indices, axis=1)


@pytest.mark.parametrize(
    ("op", "attrs", "operands", "expected"),
    [
        ("max", {"axes": (1,)}, [np.ones((0, 3), np.float32)], np.ones(0)),  # the empty axis is another one
        ("argmin", {"axis": 1}, [np.ones((0, 3), np.float32)], np.ones(0)),
        ("gather", {"axis": 1}, [np.ones((2, 0), np.float32), np.ones(0, np.int64)], np.ones((2, 0))),  # no index
        ("logsumexp", {"axes": (1,)}, [np.ones((2, 0), np.float32)], np.full(2, -np.inf)),  # as in torch
        ("sum", {"axes": (1,)}, [np.ones((2, 0), np.float32)], np.zeros(2)),
    ],
)
def test_results_of_no_elements(op: str, attrs: dict[str, Any], operands: list[Any], expected: Any) -> None:
    """What is well defined stays allowed, and the reference computes it."""
    b = GraphBuilder()
    b(op, *(b.input(f"x{i}", tensor(DType.of(x), x.shape)) for i, x in enumerate(operands)), **attrs)
    definition = OPS[op]
    with np.errstate(divide="ignore"):
        (result,) = definition.evaluate(operands, definition.complete_attrs(attrs), {})
    np.testing.assert_array_equal(result, expected)

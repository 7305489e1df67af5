"""No op has a result of a negative extent, whatever its attributes say."""

from __future__ import annotations

from typing import Any

import pytest

import mlec.ops  # noqa: F401  (fills the op table)
from mlec.errors import TypeRuleError
from mlec.ir import GraphBuilder, tensor


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

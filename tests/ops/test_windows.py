"""Attributes of windows that make no sense are refused by name, wherever they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlec.errors import ParseError, TypeRuleError
from mlec.ir import GraphBuilder, parse_graph, tensor
from mlec.ops.windows import Geometry

IMAGE = ("n", 4, 8, 9)


@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [
        ("conv", {"strides": (0, 1)}, "strides must be at least 1"),
        ("conv", {"strides": (1,)}, "strides must have 2 entries"),
        ("conv", {"dilations": (1, -1)}, "dilations must be at least 1"),
        ("conv", {"pads": (0, 0, -1, 0)}, "pads must be at least 0"),
        ("conv", {"groups": 0}, "groups must be at least 1"),
        ("conv_transpose", {"strides": (0, 1)}, "strides must be at least 1"),
        ("conv_transpose", {"groups": 0}, "groups must be at least 1"),
        ("conv_transpose", {"output_padding": (-1, 0)}, "output_padding must be at least 0"),
        ("max_pool", {"kernel": ()}, "kernel must be positive extents"),
        ("max_pool", {"kernel": (2, 0)}, "kernel must be positive extents"),
        ("max_pool", {"kernel": (2, 2), "strides": (1,)}, "strides must have 2 entries"),
        ("avg_pool", {"kernel": (2, 2), "strides": (1, 0)}, "strides must be at least 1"),
        ("avg_pool", {"kernel": (9, 9)}, "a window of 9 does not fit 8"),
    ],
)
def test_refused(op: str, attrs: dict[str, Any], message: str) -> None:
    b = GraphBuilder()
    operands = [b.input("x", tensor("f32", IMAGE))]
    if op.startswith("conv"):
        operands.append(b.constant(np.ones((4, 4, 3, 2), np.float32)))
    with pytest.raises(TypeRuleError, match=message):
        b(op, *operands, **attrs)


def test_refused_in_text_that_nobody_vouches_for() -> None:
    text = """graph @g(%x: f32[n, 4, 8, 9]) -> (f32[n, 4, 4, 4]) {
      %y = max_pool(%x) {kernel = [2, 2], strides = [0, 0]} : f32[n, 4, 4, 4]
      return %y
    }"""
    with pytest.raises(ParseError, match="strides must be at least 1"):
        parse_graph(text)


def test_positions() -> None:
    plain = Geometry.of({"strides": (), "pads": (), "dilations": ()}, 2)
    assert plain.positions((8, 9), (3, 2)) == (6, 8)
    side_by_side = Geometry.of({"strides": (), "pads": ()}, 2, strides=(3, 2))
    assert side_by_side.positions((8, 9), (3, 2)) == (2, 4)
    assert side_by_side.positions((8, 9), (3, 2), ceil_mode=True) == (3, 5)
    given = Geometry.of({"strides": (2, 1), "pads": (1, 0, 1, 2), "dilations": (1, 2)}, 2)
    assert given.pads == (1, 0, 1, 2)
    assert given.positions((8, 9), (3, 2)) == (4, 9)

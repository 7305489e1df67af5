"""Roots of unity, and what the type rules of Fourier transforms refuse."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.errors import TypeRuleError
from mlec.ir import GraphBuilder, tensor
from mlec.ops.fourier import roots


@pytest.mark.parametrize("n", [1, 4, 7, 12, 96, 1000])
def test_roots_are_exact_at_quarters_and_lie_on_the_circle(n: int) -> None:
    found = roots(n)
    for quarter, unit in enumerate((1, 1j, -1, -1j)):
        if quarter * n % 4 == 0:
            assert found[quarter * n // 4] == unit
    turn = 8 * np.arctan(np.longdouble(1))
    np.testing.assert_allclose(found, np.exp(1j * turn * np.arange(n) / n), rtol=0, atol=3e-16)


def test_what_cannot_be_transformed() -> None:
    b = GraphBuilder()
    x, other, half = (
        b.input("x", tensor("f32", ("n", 6))),
        b.input("y", tensor("f32", ("n", 7))),
        b.input("z", tensor("f16", (2, 6))),
    )
    for name, operands, attrs, text in (
        ("rfft", [x], {"axis": 0}, "fixed extent"),
        ("rfft", [half], {}, "f32 or f64"),
        ("fft", [x, other], {}, "one shape"),
        ("irfft", [x, x], {"n": 8}, "has 5 numbers"),
    ):
        with pytest.raises(TypeRuleError, match=text):
            b.multi(name, *operands, **attrs)

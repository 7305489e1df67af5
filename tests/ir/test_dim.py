from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlec.ir.dim import (
    Dim,
    Proof,
    SymDim,
    divide_exact,
    evaluate,
    parse_dim,
    product,
    proves_equal,
    substitute,
    symbols_of,
)

n, m = SymDim.named("n"), SymDim.named("m")
BINDING = {"n": 5, "m": 3}


@st.composite
def dims(draw: st.DrawFn, depth: int = 3) -> Dim:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from([n, m, 0, 1, 2, 3, -1]))
    a, b = draw(dims(depth - 1)), draw(dims(depth - 1))
    kind = draw(st.sampled_from(["add", "sub", "mul", "div"]))
    if kind == "div":
        return a // draw(st.integers(1, 4))
    return a + b if kind == "add" else a - b if kind == "sub" else a * b


def test_normal_form_is_canonical() -> None:
    assert n * m + n + 1 == 1 + n + m * n
    assert (n + 1) * (n - 1) == n * n - 1
    assert n - n == 0
    assert isinstance(n - n + 4, int)
    assert (4 * n + 3) // 2 == 2 * n + 1


@given(dims())
def test_text_round_trips(dim: Dim) -> None:
    assert parse_dim(str(dim)) == dim


@given(dims(), dims())
def test_arithmetic_agrees_with_integers(a: Dim, b: Dim) -> None:
    x, y = evaluate(a, BINDING), evaluate(b, BINDING)
    assert evaluate(a + b, BINDING) == x + y
    assert evaluate(a - b, BINDING) == x - y
    assert evaluate(a * b, BINDING) == x * y
    assert evaluate(a // 3, BINDING) == x // 3
    assert evaluate(a % 3, BINDING) == x % 3


@given(dims(), dims())
def test_a_proof_never_lies(a: Dim, b: Dim) -> None:
    proof = proves_equal(a, b)
    for binding in ({"n": i, "m": j} for i in range(3) for j in range(3)):
        equal = evaluate(a, binding) == evaluate(b, binding)
        assert proof is Proof.UNKNOWN or equal == (proof is Proof.YES)


@given(dims(), dims())
def test_exact_division_undoes_multiplication(a: Dim, b: Dim) -> None:
    quotient = divide_exact(a * b, b)
    if quotient is not None:
        assert evaluate(quotient, BINDING) * evaluate(b, BINDING) == evaluate(a, BINDING) * evaluate(b, BINDING)


def test_exact_division_of_polynomials() -> None:
    assert divide_exact(n * m * 12 + 4 * m, 4 * m) == 3 * n + 1
    assert divide_exact(n * n - 1, n - 1) == n + 1
    assert divide_exact(n + 1, 2) is None
    assert divide_exact(n, 0) is None


def test_substitution_and_symbols() -> None:
    assert substitute(n * m + (n + 1) // 2, {"n": m}) == m * m + (m + 1) // 2
    assert symbols_of((n + m) // 2) == {"n", "m"}
    assert product((n, 3, 4)) == 12 * n
    with pytest.raises(KeyError, match="no value for m"):
        evaluate(n + m, {"n": 1})


@pytest.mark.parametrize(
    "text", ["", "n+", "(n", "n)", "n//0", "n//m", "2..", "n $", "*n", "n n", "(" * 60 + "n" + ")" * 60]
)
def test_text_that_is_no_dim(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_dim(text)

"""Dim expressions as text."""

import pytest

from mlec.errors import UsageError
from mlec.runtime import dims
from mlec.runtime.dims import evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n", 7), ("2*n+1", 15), ("n*m-3", 32), ("((n+1)//2)", 4), ("n%4", 3), ("-n", -7), ("12", 12), ("k+n", None),
        ("max(1, 4096//n)", 585), ("max(n, m)-min(n, m)", 2), ("min(1, k)", None), ("max", None),
    ],
)  # fmt: skip
def test_value(text: str, value: int | None) -> None:
    assert evaluate(text, {"n": 7, "m": 5}) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "n+", "n**2", "f(n)", "n.real", "__import__('os')", "n/2", "[n]", "True", "1.5", "n//0", "(" * 500,
        "max(n)", "max(n, m, 1)", "min(n, key=m)", "max(*n, m)", "n.max(1, 2)", "abs(n, 1)",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        evaluate(text, {"n": 7})


@pytest.mark.parametrize(
    ("text", "extent", "found"),
    [
        ("2*n", 8, {"n": 4}), ("2*n", 9, {}), ("2*n+1", 9, {"n": 4}), ("2*n+1", 0, {}), ("3*n+m", 11, {"n": 2}), ("2*n+k", 8, {}),
        ("2*m", 10, {}), ("n//2", 3, {}), ("n*n", 9, {}), ("8-n", 5, {"n": 3}), ("n", 0, {"n": 0}),
    ],
)  # fmt: skip
def test_the_symbol_that_an_extent_tells(text: str, extent: int, found: dict[str, int]) -> None:
    assert dims.solved(text, extent, {"m": 5}) == found


def test_symbols_may_be_called_like_functions() -> None:
    assert dims.symbols_of("max(max, min(n, 2))") == {"max", "n"}
    assert evaluate("max(max, 3)", {"max": 5}) == 5


def test_long_expressions_are_not_kept() -> None:
    """The tree of one takes megabytes, and a file can hold thousands of them."""
    kept = dims._parsed_once.cache_info().currsize
    for number in range(3):
        assert dims.symbols_of("n" + "+n" * 200 + f"+{number}") == {"n"}
    assert dims._parsed_once.cache_info().currsize == kept

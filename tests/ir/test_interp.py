"""What the extents of arrays say of a graph's symbols."""

from __future__ import annotations

import pytest

from mlec.errors import InputError
from mlec.ir import DType, TensorType, parse_dim
from mlec.ir.interp import bind_symbols


def test_a_symbol_is_found_in_a_multiple_of_it() -> None:
    """A fused region of windows of pictures sees 4*n of them, and n nowhere."""
    kinds = [TensorType((parse_dim("4*n"), 3), DType.F32)]
    assert bind_symbols(kinds, [(8, 3)]) == {"n": 2}
    assert bind_symbols(kinds, [(0, 3)]) == {"n": 0}


def test_a_known_symbol_is_not_found_again() -> None:
    kinds = [TensorType((parse_dim("n"),), DType.F32), TensorType((parse_dim("4*n"),), DType.F32)]
    with pytest.raises(InputError, match=r"expected 4\*n = 8, got 12"):
        bind_symbols(kinds, [(2,), (12,)])


@pytest.mark.parametrize(("dim", "extent"), [("4*n", 6), ("n+3", 1), ("n*n", 9), ("m+n", 5)])
def test_a_symbol_that_no_extent_tells_is_refused(dim: str, extent: int) -> None:
    with pytest.raises(InputError, match="got") as caught:
        bind_symbols([TensorType((parse_dim(dim),), DType.F32)], [(extent,)])
    assert dim in caught.value.message

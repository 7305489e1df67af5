"""Pieces of long lines: each element is in one of them, and none is larger than a piece."""

from __future__ import annotations

import pytest

from mlec.backends.tvm.compat import prim_func
from mlec.backends.tvm.kernels import pieces
from mlec.backends.tvm.kernels.pieces import Pieces, column_blocks


@pytest.mark.parametrize(
    ("lines", "length"), [(1, 1), (1, 8), (1, 30), (5, 3), (4, 2), (17, 1), (3, 8), (2, 19), (0, 5)]
)
def test_pieces_cover_lines_once(lines: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 8)
    cut, covered = Pieces(lines, length), []
    with prim_func("places"):
        for number in range(cut.number):
            piece = cut.at(number)
            own = [(line, at) for line in _run(piece.first, piece.count) for at in _run(piece.start, piece.length)]
            assert 0 < len(own) <= 8
            covered += own
    assert covered == [(line, at) for line in range(lines) for at in range(length)]


def _run(first: object, count: object) -> range:
    begin, some = (int(getattr(value, "value", value)) for value in (first, count))  # type: ignore[call-overload]
    return range(begin, begin + some)


@pytest.mark.parametrize(("columns", "blocks"), [(1, 1), (1023, 1), (1024, 2), (1300, 2), (4096, 8), (10_007, 18)])
def test_blocks_of_columns_are_some_hundred_wide(columns: int, blocks: int) -> None:
    assert column_blocks(columns, 64) == blocks

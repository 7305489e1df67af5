"""Lines too long for one thread, or for the caches: cut into pieces, of each of which something small is kept and joined.

Where the cuts lie depends on extents alone, and what the pieces gave is joined in their order: results are the same bits for any number
of threads.

A piece is 32768 elements, 128 KB of float32: read from memory once (6 us at 20 GB/s, less than a third of what waking a thread takes),
and again from L2 by templates that look at a piece twice. What is kept of it are two numbers for each line at most: of one line next to
nothing, and of lines side by side 2 of 32 numbers in a column at most. Sums of sums are more exact, too: a softmax over the rows of
100000 x 16 errs by 5e-6 of a result in pieces, and by 1e-4 with one sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.epilogue import Dim, Expr
from mlec.backends.tvm.kernels.tile import ceildiv, chunks
from mlec.backends.tvm.kernels.vector import share

PIECE = 1 << 15
"""Elements of a piece."""

COLUMNS = 512
"""Of a piece of lines side by side, or up to twice as many: 2 KB of float32 that follow each other, and 64 rows."""


@dataclass(frozen=True)
class Piece:
    """Some lines, or a part of one: ``length`` elements from ``start`` on of each of ``count`` lines from ``first`` on."""

    first: Expr
    count: Dim
    start: Expr
    length: Dim


@dataclass(frozen=True)
class Pieces:
    """So many ``lines`` of ``length`` consecutive elements (1 or more), cut: long ones by themselves, of short ones some go together.

    ``whole`` lines are never cut: those whose elements have nothing to do with each other.
    """

    lines: Dim
    length: Dim
    whole: bool = False

    @property
    def together(self) -> Dim:
        """Lines of a piece."""
        return _largest(1, PIECE // self.length)

    @property
    def cuts(self) -> Dim:
        """Pieces of a line."""
        return 1 if self.whole else ceildiv(self.length, PIECE)

    @property
    def number(self) -> Dim:
        """Of pieces."""
        return ceildiv(self.lines, self.together) * self.cuts

    def at(self, number: Expr) -> Piece:
        """The piece of that number."""
        first, start = number // self.cuts * self.together, number % self.cuts * PIECE
        count = _part(self.lines, self.together, first)
        return Piece(share(first), count, share(start), self.length if self.whole else _part(self.length, PIECE, start))


def _part(extent: Dim, size: Dim, start: Expr) -> Dim:
    """What is left of an extent from ``start`` on, and at most ``size``; a number where it is the same for all."""
    if isinstance(extent, int) and isinstance(size, int) and (extent % size == 0 or extent < size):
        return min(extent, size)
    return share(tirx.min(size, extent - start))


def _largest(a: int, b: Dim) -> Dim:
    return max(a, b) if isinstance(b, int) else tirx.max(a, b)


def passes_over(extents: Sequence[object], whole: str, cut: Callable[[], Expr]) -> str:
    """What a report says of lines: how they are gone over in ``whole``, or that they are ``cut``, where the extents of x tell that."""
    if not all(isinstance(extent, int) for extent in extents):
        return f"{whole} passes over each line or its pieces"
    return "each line in pieces, joined" if cut() else f"{whole} passes over each line"


def column_blocks(extent: Dim, wide: int) -> int:
    """In how many parts pieces share the columns of a row, in whole runs of ``wide`` (see `vectors_loop`); one if they are symbolic."""
    if not isinstance(extent, int) or extent < 2 * COLUMNS:
        return 1
    runs = extent // wide
    return chunks(runs, min(runs, extent // COLUMNS))[1]

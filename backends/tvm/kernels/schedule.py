"""Schedules: what a template may decide without changing what it computes, as records.

A template that leaves something open takes a frozen dataclass of numbers, its *schedule*, whose ``candidates`` lists those that fit the
shapes and the processor, the one that the cost model prefers first. Compiling takes that one, or, with `mlec.backends.tvm.tuning`, the one
that measurements prefer. The ``repr`` of a schedule is its name: in the report, and in the files that remember measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product, zip_longest
from typing import Any, TypeVar

from mlec.backends.tvm.kernels.epilogue import Dim

S = TypeVar("S")


def variations(default: S, fits: Callable[[S], bool], **values: Iterable[Any]) -> Iterator[S]:
    """The default, then records that differ from it in one field, then those that differ in two, and so on, each once.

    Args:
        default: a frozen dataclass; comes first whether it fits or not.
        fits: which of the others are valid.
        values: of the fields that may differ.
    """
    yield default
    others: dict[str, list[Any]] = {
        name: [value for value in dict.fromkeys(given) if value != getattr(default, name)]
        for name, given in values.items()
    }
    for count in range(1, len(others) + 1):
        for names in combinations(others, count):
            for chosen in product(*(others[name] for name in names)):
                candidate = replace(default, **dict(zip(names, chosen, strict=True)))  # type: ignore[type-var]
                if fits(candidate):
                    yield candidate


def alternating(*candidates: Iterable[S]) -> Iterator[S]:
    """The first of each, then the second of each, and so on."""
    nothing: Any = object()
    merged = chain.from_iterable(zip_longest(*candidates, fillvalue=nothing))
    return (candidate for candidate in merged if candidate is not nothing)


@dataclass(frozen=True)
class FoldSchedule:
    """How a template goes along lines that it reduces.

    Attributes:
        vectors: taken in at once: partial results along the line (see `kernels.tile.Fold`), or neighbouring columns across lines.
    """

    vectors: int

    @staticmethod
    def candidates(vectors: int, length: Dim, lanes: int) -> Iterator[FoldSchedule]:
        """By default so many. ``length`` is the extent along memory, which may be symbolic, ``lanes`` those of a vector."""
        most = vectors_across(length, lanes)
        return variations(FoldSchedule(vectors), lambda s: s.vectors <= most, vectors=(1, 2, 4, 8))


def vectors_across(extent: Dim, lanes: int) -> int:
    """Vectors that hold so many elements; some where the extent is symbolic."""
    return -(-extent // lanes) if isinstance(extent, int) else 8


def around(value: int, least: int = 1, most: int | None = None) -> Sequence[int]:
    """A quarter, a half, twice and four times a number, as far as they lie within bounds."""
    near = (value // 2, value * 2, value // 4, value * 4)
    return [v for v in dict.fromkeys(near) if v >= least and (most is None or v <= most)]


def even(extent: int, most: int) -> int:
    """Width of as few tiles as cover an extent, each at most so wide, when they are as equal as can be."""
    return -(-extent // -(-extent // most))


def even_widths(extent: int, most: Iterable[int], near: int) -> Sequence[int]:
    """The widths of `even` for each of these bounds, those nearest to a number first."""
    return sorted({even(extent, width) for width in most}, key=lambda width: abs(width - near))

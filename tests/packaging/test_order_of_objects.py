"""Object files in a file: alike ones side by side, so that compression sees them, and always in the same order."""

from __future__ import annotations

import zlib

import numpy as np

from mlec.packaging.packing import _in_order

RNG = np.random.default_rng(0)
KINDS = [RNG.bytes(12_000) for _ in range(4)]
"""Nothing in them can be compressed."""


def test_alike_ones_are_side_by_side_and_the_last_stays_the_last() -> None:
    """Two of each kind are further apart than compression sees: 36 KB of others between them."""
    objects = [kind + RNG.bytes(100) for _ in range(2) for kind in KINDS]
    ordered = _in_order([*objects, b"calls"])
    assert ordered[-1] == b"calls"
    assert sorted(ordered) == sorted([*objects, b"calls"])
    kinds = [objects.index(data) % 4 for data in ordered[:-1]]
    assert kinds[::2] == kinds[1::2]
    assert len(zlib.compress(b"".join(ordered))) < 0.6 * len(zlib.compress(b"".join(objects)))
    assert _in_order([*objects, b"calls"]) == ordered


def test_little_ones_keep_their_order() -> None:
    assert _in_order([]) == []
    for count in range(1, 8):
        objects = [bytes([number]) * number for number in range(count)]
        assert _in_order(objects) == objects

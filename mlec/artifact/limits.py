"""Upper bounds that every reader checks before it allocates or parses.

The limits are part of the format: a writer must stay below them, so that every reader may refuse what lies above.
Parsers of the graph text (the IR's own) get the text only after these checks and can rely on them.
"""

from __future__ import annotations

from typing import Final

SECTION_BYTES: Final = {
    "metadata": 16 << 20,
    "graph": 256 << 20,
    "weights": 1 << 40,
    "kernels": 2 << 30,
    "signature": 16 << 20,
}
"""Largest size of each section in bytes."""

JSON_DEPTH: Final = 64
"""Deepest nesting of arrays and objects in a JSON section."""
JSON_VALUES: Final = 1 << 22
"""Most values (scalars, arrays and objects together) in a JSON section."""
JSON_INT_MIN: Final = -(1 << 63)
JSON_INT_MAX: Final = (1 << 64) - 1

TENSORS: Final = 1 << 18
"""Most entries of the tensor index."""
NAME_BYTES: Final = 512
"""Longest tensor name in bytes of UTF-8."""
RANK: Final = 32
"""Most axes of a tensor."""
DIM: Final = 1 << 48
"""Largest length of one axis."""
PACKED_RATIO: Final = 1024
"""Most bytes that one byte of a zstd frame or a zlib stream may hold; one of few bytes may hold `PACKED_FREE` whatever its own length."""
PACKED_FREE: Final = 1 << 20
ZSTD_WINDOW_LOG: Final = 23
"""Largest window of a zstd frame, as a power of two: 8 MiB."""
DECODED_WEIGHTS: Final = 64 << 30
"""Most bytes of all compressed tensors together, once decoded."""
KERNELS: Final = 4096
"""Most entries of the kernels table."""
ATTRIBUTE_BYTES: Final = 1 << 16
"""Longest text of a signature's attributes."""
FEATURES: Final = 1 << 24
"""Most columns of a table that a model takes."""
LABEL_BYTES: Final = 4096
"""Longest text of a class label in memory, four bytes a character."""

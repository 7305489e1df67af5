"""How messages are worded."""

from __future__ import annotations


def plural(number: int, noun: str, ending: str = "s") -> str:
    """``(2, "node") -> "2 nodes"``."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"

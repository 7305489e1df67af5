"""How messages are worded."""

from __future__ import annotations


def plural(number: int, noun: str, ending: str = "s") -> str:
    """``(2, "node") -> "2 nodes"``."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def visible(text: str) -> str:
    """The text without characters that command a terminal: names in a file can come from anybody."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

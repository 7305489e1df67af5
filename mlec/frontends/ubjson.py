"""Reads UBJSON as XGBoost writes it, from untrusted bytes: every length is checked against what is left."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from mlec.errors import FrontendError

MAX_DEPTH = 64
VALUE_BYTES = 200
"""Of memory that a value takes at most, with its name and its place, besides the characters of a text and the numbers of a typed array."""

_NUMBERS = {
    ord(tag): (struct.Struct(f">{code}"), np.dtype(f">{code}"), np.dtype(code))
    for tag, code in {"i": "b", "U": "B", "I": "h", "l": "i", "L": "q", "d": "f", "D": "d"}.items()
}
"""By the byte of its tag, each type of numbers: as one is stored, as an array of them is, and that array in this machine's order."""
_LENGTHS = {tag: _NUMBERS[tag][0] for tag in b"iUIlL"}
_LITERALS = {ord("Z"): None, ord("T"): True, ord("F"): False}
_OBJECT, _OBJECT_END, _ARRAY, _ARRAY_END, _TEXT, _LETTER, _TYPED, _COUNTED = b"{}[]SC$#"


def loads(data: bytes, *, memory: int = 1 << 63) -> Any:
    """The value that the bytes encode: dicts, lists, strings, numbers, and typed arrays as numpy arrays.

    Args:
        data: all of them.
        memory: bytes that it may take, these included.

    Raises:
        FrontendError: for anything but one complete value; says at which byte.
        MemoryError: it may take more.
    """
    reader = _Reader(data, (memory - 2 * len(data)) // VALUE_BYTES)
    value = reader.value(reader.tag(), 0)
    if reader.at != len(data):
        raise reader.error(f"{len(data) - reader.at} bytes follow the end of the value")
    return value


class _Reader:
    """Large ensembles have millions of names and numbers, so that each is read where it lies, without a slice of its own."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data = data
        self.at = 0
        self.left = most  # values that there is memory for

    def error(self, what: str) -> FrontendError:
        return FrontendError(
            f"not valid UBJSON: {what}, at byte {self.at}", code="E_MODEL_FILE", hint="save the model again, or as JSON"
        )

    def skip(self, count: int) -> int:
        """Goes on by so many bytes.

        Returns:
            Where they begin.
        """
        begin = self.at
        if count < 0 or count > len(self.data) - begin:
            raise self.error(f"{count} bytes expected, {len(self.data) - begin} left")
        self.at = begin + count
        return begin

    def tag(self) -> int:
        return self.data[self.skip(1)]

    def number(self, stored: struct.Struct) -> Any:
        return stored.unpack_from(self.data, self.skip(stored.size))[0]

    def length(self) -> int:
        tag = self.tag()
        if tag not in _LENGTHS:
            raise self.error(f"a length of type {chr(tag)!r}")
        return self.number(_LENGTHS[tag])  # type: ignore[no-any-return]

    def text(self) -> str:
        begin = self.skip(self.length())
        self.left -= 4 * (self.at - begin) // VALUE_BYTES  # a character takes four bytes where one of them is rare
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.error("text that is not UTF-8") from error

    def value(self, tag: int, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise MemoryError
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH}")
        if tag == _ARRAY:
            return self.array(depth)
        if tag == _OBJECT:
            return self.object(depth)
        if tag == _TEXT:
            return self.text()
        if tag in _NUMBERS:
            return self.number(_NUMBERS[tag][0])
        if tag in _LITERALS:
            return _LITERALS[tag]
        if tag == _LETTER:
            return chr(self.tag())
        raise self.error(f"unknown type {chr(tag)!r}")

    def object(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while self.at >= len(self.data) or self.data[self.at] != _OBJECT_END:
            name = self.text()
            if name in members:
                raise self.error(f"the name {name[:80]!r} occurs twice")
            members[name] = self.value(self.tag(), depth + 1)
        self.at += 1
        return members

    def array(self, depth: int) -> Any:
        tag = self.tag()
        if tag == _TYPED:
            kind = self.tag()
            if kind not in _NUMBERS or self.tag() != _COUNTED:
                raise self.error(f"a typed array of {chr(kind)!r}")
            _, stored, native = _NUMBERS[kind]
            count = self.length()
            return np.frombuffer(self.data, stored, count, self.skip(count * stored.itemsize)).astype(native)
        if tag == _COUNTED:
            # Each value takes a byte at least, so a length that lies runs into the end of the data.
            return [self.value(self.tag(), depth + 1) for _ in range(self.length())]
        values: list[Any] = []
        while tag != _ARRAY_END:
            values.append(self.value(tag, depth + 1))
            tag = self.tag()
        return values

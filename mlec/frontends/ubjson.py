"""Reads UBJSON as XGBoost writes it, from untrusted bytes: every length is checked against what is left."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from mlec.errors import FrontendError

MAX_DEPTH = 64

_NUMBERS = {"i": ">i1", "U": ">u1", "I": ">i2", "l": ">i4", "L": ">i8", "d": ">f4", "D": ">f8"}
_LITERALS = {"Z": None, "T": True, "F": False}


def loads(data: bytes) -> Any:
    """The value that the bytes encode: dicts, lists, strings, numbers, and typed arrays as numpy arrays.

    Raises:
        FrontendError: for anything but one complete value; says at which byte.
    """
    reader = _Reader(data)
    value = reader.value(reader.tag(), 0)
    if reader.at != len(data):
        raise reader.error(f"{len(data) - reader.at} bytes follow the end of the value")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def error(self, what: str) -> FrontendError:
        return FrontendError(
            f"not valid UBJSON: {what}, at byte {self.at}", code="E_MODEL_FILE", hint="save the model again, or as JSON"
        )

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise self.error(f"{count} bytes expected, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def tag(self) -> str:
        return self.take(1).decode("latin-1")

    def number(self, tag: str) -> int | float:
        kind = _NUMBERS[tag]
        (value,) = struct.unpack(f">{'bBhiqfd'['iUIlLdD'.index(tag)]}", self.take(int(kind[-1])))
        return value  # type: ignore[no-any-return]

    def length(self) -> int:
        tag = self.tag()
        if tag not in "iUIlL":
            raise self.error(f"a length of type {tag!r}")
        return int(self.number(tag))

    def text(self) -> str:
        try:
            return self.take(self.length()).decode()
        except UnicodeDecodeError as error:
            raise self.error("text that is not UTF-8") from error

    def value(self, tag: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH}")
        if tag in _NUMBERS:
            return self.number(tag)
        if tag in _LITERALS:
            return _LITERALS[tag]
        if tag == "S":
            return self.text()
        if tag == "C":
            return self.tag()
        if tag == "{":
            return self.object(depth)
        if tag == "[":
            return self.array(depth)
        raise self.error(f"unknown type {tag!r}")

    def object(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while self.data[self.at : self.at + 1] != b"}":
            name = self.text()
            if name in members:
                raise self.error(f"the name {name[:80]!r} occurs twice")
            members[name] = self.value(self.tag(), depth + 1)
        self.at += 1
        return members

    def array(self, depth: int) -> Any:
        tag = self.tag()
        if tag == "$":
            kind = self.tag()
            if kind not in _NUMBERS or self.tag() != "#":
                raise self.error(f"a typed array of {kind!r}")
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(self.length() * dtype.itemsize), dtype).astype(dtype.newbyteorder("="))
        if tag == "#":
            # Each value takes a byte at least, so a length that lies runs into the end of the data.
            return [self.value(self.tag(), depth + 1) for _ in range(self.length())]
        values: list[Any] = []
        while tag != "]":
            values.append(self.value(tag, depth + 1))
            tag = self.tag()
        return values

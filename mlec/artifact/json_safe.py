"""Strict, bounded JSON for bytes that may be hostile, and the canonical form that the writer uses.

The parser refuses what JSON libraries usually let through: duplicate keys, NaN and infinities, numbers that overflow,
unbounded nesting, lone surrogates, NUL characters. Parsed values are plain dicts, lists, strings, numbers, booleans
and None; nothing from the text ever names an attribute, a module or a path.
"""

from __future__ import annotations

import re
from math import isfinite
from typing import Any, Final, NoReturn

import msgspec
import numpy as np

from mlec.artifact import limits
from mlec.errors import CorruptedFileError, UsageError

# The closing quote is optional: were an unterminated string no match, each quote in it would be tried again.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_INT_MIN, _INT_MAX = limits.JSON_INT_MIN, limits.JSON_INT_MAX
_MAX_INT_CHARS = 20
_MAX_FLOAT_CHARS = 128

_NUMBERED_ESCAPE = re.compile(rb"\\u")
_MOST_INDENTATION: Final = 1 << 24
"""Bytes by which a text may grow when it is indented."""
_DEEP: Final = b"\n" + b" " * (limits.JSON_DEPTH - 1)
_UNDECIDED: Final = object()


def parse(data: bytes | bytearray, *, what: str, max_bytes: int) -> Any:
    """Parse one JSON document.

    Args:
        data: the text in UTF-8.
        what: name of the document for messages, e.g. ``"metadata"``.
        max_bytes: refuse longer text before looking at it.

    Raises:
        CorruptedFileError: code ``E_JSON_CAP``, ``E_JSON_UTF8``, ``E_JSON_DEPTH``, ``E_JSON_COUNT``,
            ``E_JSON_DUPLICATE``, ``E_JSON_NONFINITE``, ``E_JSON_INT``, ``E_JSON_NUMBER``, ``E_JSON_STRING``
            or ``E_JSON_SYNTAX``.
    """

    def refuse(code: str, why: str) -> NoReturn:
        raise CorruptedFileError(f"{what} is not valid JSON for a .mle file: {why}", code=code)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse("E_JSON_DUPLICATE", f"the key {twice[:80]!r} occurs twice in one object")
        return result

    def integer(text: str) -> int:
        # The length is checked first: converting a long run of digits takes quadratic time.
        if len(text) > _MAX_INT_CHARS or not _INT_MIN <= (value := int(text)) <= _INT_MAX:
            refuse("E_JSON_INT", f"the integer {text[:40]} does not fit in 64 bits")
        return value

    def number(text: str) -> float:
        if len(text) > _MAX_FLOAT_CHARS:
            refuse("E_JSON_NUMBER", f"a number is written with {len(text)} characters")
        value = float(text)
        if not isfinite(value):
            refuse("E_JSON_NONFINITE", f"the number {text[:40]} is out of range")
        return value

    def constant(text: str) -> NoReturn:
        refuse("E_JSON_NONFINITE", f"{text} is not a number that JSON knows")

    if len(data) > max_bytes:
        refuse("E_JSON_CAP", f"it has {len(data)} bytes, the limit is {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("E_JSON_UTF8", f"byte {error.start} is not UTF-8")
    if text.startswith("\ufeff"):
        refuse("E_JSON_UTF8", "it starts with a byte order mark")
    if not _is_small(data):
        depth, count = measure(data)
        if depth > limits.JSON_DEPTH:
            refuse("E_JSON_DEPTH", f"it is nested more than {limits.JSON_DEPTH} deep")
        if count > limits.JSON_VALUES:
            refuse("E_JSON_COUNT", f"it holds more than {limits.JSON_VALUES} values")
    value = _parse_plain(data)
    if value is not _UNDECIDED:
        return value
    import json  # takes 1.5 ms, and few texts come this far

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_int=integer, parse_float=number, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        refuse("E_JSON_SYNTAX", f"{error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        refuse("E_JSON_DEPTH", "it is nested too deep for this thread")
    # The text is UTF-8, so only an escape can have made a lone surrogate or a NUL.
    if "\\u" in text:
        _check_strings(value, refuse)
    return value


def _is_small(data: bytes | bytearray) -> bool:
    """Whether depth and number of values of a text are clearly within the limits, seen five times faster than by `measure`."""
    opened = data.count(b"[") + data.count(b"{")  # no fewer than it is deep
    lines = 2 * opened + data.count(b",") + 1  # no fewer than values
    if lines > limits.JSON_VALUES or lines * opened > _MOST_INDENTATION:
        return False
    if opened <= limits.JSON_DEPTH:
        return True
    try:
        # One space for each level at the begin of a line; others are in strings, which is for `measure` to tell.
        return _DEEP not in msgspec.json.format(data, indent=1)
    except (ValueError, RecursionError):
        return False


def _parse_plain(data: bytes | bytearray) -> Any:
    """The value of a text that breaks no rule and has no escape by number, in half the time: nothing in Python looks at each value.

    Returns:
        `_UNDECIDED` for any other text: whether it is right, and else what is wrong, has to be found out the long way.
    """
    if _NUMBERED_ESCAPE.search(data):
        return _UNDECIDED  # only such a one can make a NUL, half of a surrogate pair, or a colon
    try:
        value = _decode(data)
        if _encode(value).count(b":") != data.count(b":"):
            return _UNDECIDED  # all colons in strings are still there, so it is a key that was there twice
        _pack(value)  # takes the integers that JSON may hold here, and no others
    except (ValueError, OverflowError, RecursionError):
        return _UNDECIDED
    return value


def _plain_number(text: str) -> float:
    value = float(text)
    if len(text) > _MAX_FLOAT_CHARS or not isfinite(value):
        raise ValueError
    return value


_decode: Final = msgspec.json.Decoder(float_hook=_plain_number).decode
_encode: Final = msgspec.json.Encoder().encode
_pack: Final = msgspec.msgpack.Encoder().encode


def measure(data: bytes | bytearray) -> tuple[int, int]:
    """Deepest nesting, and an upper bound of the number of values, without recursion and before parsing."""
    # With its escapes cut to their backslash, a text has a string between every other pair of quotes, which is seen faster than by matching
    # strings. Backslashes outside of strings, which no JSON has, might hide a quote from this.
    bare = b"".join(_ESCAPE.sub(rb"\\", data).split(b'"')[::2])
    structure = (_STRING.sub(b"", data) if b"\\" in bare else bare).translate(None, _NOT_STRUCTURE)
    depth = deepest = opened = 0
    for start in range(0, len(structure), 1 << 20):
        marks = np.frombuffer(structure[start : start + (1 << 20)], np.uint8)
        opens = (marks == ord("[")) | (marks == ord("{"))
        closes = (marks == ord("]")) | (marks == ord("}"))
        levels = depth + np.cumsum(opens.astype(np.int64) - closes)
        deepest = max(deepest, int(levels.max()))
        depth = int(levels[-1])
        opened += int(opens.sum())
    return deepest, opened + structure.count(b",") + 1


def _check_strings(value: Any, refuse: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in item):
            refuse("E_JSON_STRING", "a string holds a NUL character or half of a surrogate pair")


def dump(value: object, *, what: str, max_bytes: int, sort_keys: bool = True) -> bytes:
    """Canonical JSON: UTF-8, no spaces, keys sorted. What this returns, `parse` accepts.

    Raises:
        UsageError: ``E_USAGE_JSON``: the value holds something that JSON or the limits of the format cannot; the
            message names the place.
    """
    plain = _plain(value, what, 0)
    import json  # reading files takes none of it

    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    data = text.encode("utf-8")
    try:
        parse(data, what=what, max_bytes=max_bytes)
    except CorruptedFileError as error:
        raise UsageError(
            error.message,
            code="E_USAGE_JSON",
            hint="metadata holds text, numbers, booleans, None, lists, and mappings from text",
        ) from None
    return data


def _plain(value: object, where: str, depth: int) -> Any:
    def refuse(why: str) -> NoReturn:
        raise UsageError(
            f"{where} cannot be stored: {why}",
            code="E_USAGE_JSON",
            hint="use dicts with text keys, lists, text, finite numbers, True, False and None",
        )

    if depth > limits.JSON_DEPTH:
        refuse(f"it is nested more than {limits.JSON_DEPTH} deep")
    match value:
        case None | bool():
            return value
        case str():
            if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
                refuse("the text holds a NUL character or half of a surrogate pair")
            return str(value)
        case int():
            if not limits.JSON_INT_MIN <= value <= limits.JSON_INT_MAX:
                refuse(f"the integer {value} does not fit in 64 bits")
            return int(value)
        case float():
            if not isfinite(value):
                refuse(f"{value} is not a number that JSON knows")
            return float(value)
        case dict():
            for key in value:
                if not isinstance(key, str):
                    refuse(f"the key {key!r} is not text")
            return {_plain(k, where, depth): _plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        case _:
            refuse(f"{type(value).__name__} is not a JSON type")

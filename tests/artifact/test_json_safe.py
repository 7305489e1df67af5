"""JSON as the writer makes it is read a shorter way than any other, and that way accepts nothing that the other refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlec.artifact import json_safe, limits
from mlec.errors import CorruptedFileError

VALUES: tuple[Any, ...] = (
    {
        "report": {"passes": [{"name": "fuse", "seconds": 1.25e-05}, {}], "notes": ['a "b" [c', "\\", "é\n"]},
        "x": [[], True, None, -0.0],
    },
    {"n": [0, -1, limits.JSON_INT_MIN, limits.JSON_INT_MAX, 1e300, 5e-324, 0.1], "m": {"a": {"b": {}}}},
)
MARKS = b'0123456789-+.eE"\\[]{},:ntu \n'


def outcome(data: bytes) -> str:
    """The value or the code of the error, as text that tells -0.0 from 0 and True from 1."""
    try:
        return repr(json_safe.parse(data, what="x", max_bytes=1 << 24))
    except CorruptedFileError as error:
        return error.code


def strictly(data: bytes) -> str:
    """`outcome` without the short way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_safe, "_SHORT", -1)
        return outcome(data)


def is_short(data: bytes) -> bool:
    return json_safe._parse_canonical(data) is not json_safe._NOT_CANONICAL


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_read_the_short_way(value: Any) -> None:
    for sort_keys in (True, False):
        data = json_safe.dump(value, what="x", max_bytes=1 << 16, sort_keys=sort_keys)
        assert is_short(data)
        assert outcome(data) == strictly(data)
        assert json_safe.parse(data, what="x", max_bytes=1 << 16) == value


def test_both_ways_agree_on_whatever_the_short_one_takes() -> None:
    rng = random.Random(0)
    texts = [json_safe.dump(value, what="x", max_bytes=1 << 16) for value in VALUES]
    taken = 0
    for _ in range(4000):
        data = bytearray(rng.choice(texts))
        for _ in range(rng.choice((1, 1, 2))):
            place, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                data[place] = rng.choice(MARKS)
            elif kind == 1:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 2:
                data.insert(place, rng.choice(MARKS))
            else:
                del data[place]
        if is_short(bytes(data)):
            taken += 1
            assert outcome(bytes(data)) == strictly(bytes(data)), bytes(data)
    assert taken > 400


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a":1,"a":1}', "E_JSON_DUPLICATE"),
        (b"18446744073709551616", "E_JSON_INT"),
        (b"-9223372036854775809", "E_JSON_INT"),
        (b"[" * 65 + b"]" * 65, "E_JSON_DEPTH"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "E_JSON_DEPTH"),
        (b"[" * 5000 + b"]" * 5000, "E_JSON_DEPTH"),
        (b'"\\u0000"', "E_JSON_STRING"),
        (b'{"\xff":1}', "E_JSON_UTF8"),
        (b"1e400", "E_JSON_NONFINITE"),
        (b"null ", "None"),
        (b"-0", "0"),
    ],
)
def test_what_is_not_written_so_is_left_to_the_strict_way(data: bytes, expected: str) -> None:
    assert not is_short(data)
    assert outcome(data) == expected


def test_the_deepest_that_is_allowed() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        data = opening * limits.JSON_DEPTH + b"0" * (opening != b"[") + closing * limits.JSON_DEPTH
        assert outcome(data) == strictly(data) != "E_JSON_DEPTH"

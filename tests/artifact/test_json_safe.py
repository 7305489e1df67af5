"""Plain JSON is read a shorter way than any other: that way reads the same values, and nothing that the long one refuses."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest

from mlec.artifact import json_safe, limits
from mlec.errors import CorruptedFileError

VALUES: tuple[Any, ...] = (
    {
        "report": {"passes": [{"name": "fuse: a:b", "seconds": 1.25e-05}, {}], "notes": ['a "b" [c', "\\", "é\n"]},
        "x": [[], True, None, -0.0, 1e-05],
    },
    {"n": [0, -1, limits.JSON_INT_MIN, limits.JSON_INT_MAX, 1e300, 5e-324, 0.1], "m": {"a": {"b:": {}}, "c": "::"}},
)
MARKS = b'0123456789-+.eE"\\[]{},:ntu \n\x00\x1f\x7f\xc3'


def outcome(data: bytes) -> str:
    """The value or the code of the error, as text that tells -0.0 from 0 and True from 1."""
    try:
        return repr(json_safe.parse(data, what="x", max_bytes=1 << 24))
    except CorruptedFileError as error:
        return error.code


def the_long_way(data: bytes) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_safe, "_is_small", lambda data: False)
        patch.setattr(json_safe, "_parse_plain", lambda data: json_safe._UNDECIDED)
        return outcome(data)


def is_plain(data: bytes) -> bool:
    return json_safe._is_small(data) and json_safe._parse_plain(data) is not json_safe._UNDECIDED


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_plain(value: Any) -> None:
    for sort_keys in (True, False):
        data = json_safe.dump(value, what="x", max_bytes=1 << 16, sort_keys=sort_keys)
        assert is_plain(data)
        assert outcome(data) == the_long_way(data)
        assert json_safe.parse(data, what="x", max_bytes=1 << 16) == value


def test_both_ways_agree() -> None:
    rng = random.Random(0)
    texts = [json_safe.dump(value, what="x", max_bytes=1 << 16) for value in VALUES]
    plain = 0
    for _ in range(6000):
        data = bytearray(rng.choice(texts))
        for _ in range(rng.choice((1, 1, 2))):
            place, kind = rng.randrange(len(data)), rng.randrange(5)
            if kind == 0:
                data[place] = rng.choice(MARKS)
            elif kind == 1:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 2:
                data.insert(place, rng.choice(MARKS))
            elif kind == 3:
                data[place:place] = data[place : place + rng.randrange(40)]
            else:
                del data[place]
        plain += is_plain(bytes(data))
        assert outcome(bytes(data)) == the_long_way(bytes(data)), bytes(data)
    assert plain > 1000


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a":1,"a":1}', "E_JSON_DUPLICATE"),
        (b'{"a":{"b":1,"b":2}}', "E_JSON_DUPLICATE"),
        (b'{"a":1,"\\u0061":"\\u003a"}', "E_JSON_DUPLICATE"),
        (b'{"a":":","a":"\\u003a"}', "E_JSON_DUPLICATE"),
        (b"18446744073709551616", "E_JSON_INT"),
        (b"-9223372036854775809", "E_JSON_INT"),
        (b"9" * 5000, "E_JSON_INT"),
        (b"0." + b"1" * 127, "E_JSON_NUMBER"),
        (b"1e400", "E_JSON_NONFINITE"),
        (b"-1e400", "E_JSON_NONFINITE"),
        (b"[NaN]", "E_JSON_NONFINITE"),
        (b"[" * 65 + b"]" * 65, "E_JSON_DEPTH"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "E_JSON_DEPTH"),
        (b"[" * 5000 + b"]" * 5000, "E_JSON_DEPTH"),
        (b"[" * 60000, "E_JSON_DEPTH"),
        (b'"\\u0000"', "E_JSON_STRING"),
        (b'"\\ud800"', "E_JSON_STRING"),
        (b'{"\xff":1}', "E_JSON_UTF8"),
        (b'"\xed\xa0\x80"', "E_JSON_UTF8"),
        (b'"\x01"', "E_JSON_SYNTAX"),
        (b"1 2", "E_JSON_SYNTAX"),
        (b"01", "E_JSON_SYNTAX"),
    ],
)
def test_what_is_wrong_is_not_plain(data: bytes, expected: str) -> None:
    assert not is_plain(data)
    assert outcome(data) == the_long_way(data) == expected


@pytest.mark.parametrize("data", [b" null\r\n\t", b"-0", b"-0.0", b"1E2", b"1e-400", b"0." + b"1" * 126, b'"\x7f\\/"'])
def test_how_values_are_spelled_is_free(data: bytes) -> None:
    assert is_plain(data)
    assert outcome(data) == the_long_way(data)


def test_the_deepest_that_is_allowed() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        data = opening * limits.JSON_DEPTH + b"0" * (opening != b"[") + closing * limits.JSON_DEPTH
        assert outcome(data) == the_long_way(data) != "E_JSON_DEPTH"


def test_a_deep_text_takes_little_memory() -> None:
    deep = 900  # within the recursion that Python allows
    data = b"[" * deep + b"0," * 31_000 + b"0" + b"]" * deep
    tracemalloc.start()
    assert outcome(data) == "E_JSON_DEPTH"
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40 * len(data)

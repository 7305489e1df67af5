"""Damaged and hostile files: an error of the artifact, or the file loads; never anything else, and the second reader agrees."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlec.artifact import json_safe
from mlec.errors import CorruptedFileError
from tests.artifact import second_reader
from tests.artifact.mutants import EDGES, FIELDS, Readers, corpus, mutant, second_opinion
from tests.artifact.surgery import seal

MUTANTS = 100_000
PARTS = 4


@pytest.fixture
def readers() -> Iterator[Readers]:
    """Both readers. Descriptors, maps of mutants and memory stay what they were."""
    gc.collect()
    descriptors, peak = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readers = Readers()
    yield readers
    readers.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert "memfd:mutant" not in Path("/proc/self/maps").read_text()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10


@pytest.mark.parametrize("name", corpus())
def test_kept_files_are_accepted(name: str, readers: Readers) -> None:
    data = corpus()[name]
    assert (readers.first(data), second_opinion(data)) == ("", "")


def test_no_changed_byte_is_accepted(sample: bytes, readers: Readers) -> None:
    """One bit of every byte, every bit of the header; nothing repaired."""
    rng = random.Random(0)
    bits = [(i, bit) for i in range(128) for bit in range(8)] + [(i, rng.randrange(8)) for i in range(128, len(sample))]
    for position, bit in bits:
        changed = bytearray(sample)
        changed[position] ^= 1 << bit
        assert readers.first(bytes(changed)), (position, bit)
        assert second_opinion(bytes(changed)), (position, bit)


def test_truncated_and_extended_files_are_refused(sample: bytes, readers: Readers) -> None:
    rng = random.Random(1)
    for length in [*range(0, 700), *rng.sample(range(700, len(sample)), 300)]:
        assert readers.first(sample[:length])
    for extra in (1, 63, 4096):
        assert readers.first(sample + bytes(extra))


def test_header_fields(sample: bytes, readers: Readers) -> None:
    """Edge values and flipped bits in each field, checksum repaired."""
    values = dict(zip(["magic", *FIELDS], struct.unpack("<4sII10QIIIIIQ4B", sample[:124]), strict=True))
    accepted = []
    for name, bits in FIELDS.items():
        candidates = {v for v in EDGES if v < 2**bits} | {values[name] ^ 1 << bit for bit in range(bits)}
        for value in candidates - {values[name]}:
            data = seal(values | {name: value}) + sample[128:]
            assert not readers.differ(data), (name, value)
            if not readers.first(data):
                accepted.append((name, value))
    # Optional flags may be anything; all other fields have one valid value for this content.
    assert {name for name, _ in accepted} == {"flags"}
    assert all(value & 0xFFFF == 1 for _, value in accepted)


@pytest.mark.parametrize("part", range(PARTS))
def test_mutants(part: int, readers: Readers) -> None:
    """Of every kept file, most with all checksums repaired. ``python -m tests.fuzz files`` tries as many as one likes."""
    files = list(corpus().values())
    rng = random.Random(part)
    accepted = 0
    for number in range(MUTANTS // PARTS):
        data = mutant(rng, rng.choice(files), files)
        assert not (difference := readers.differ(data)), (part, number, difference)
        accepted += number % 100 == 0 and not readers.first(data)
    # Other names, texts and weights make other valid files; most mutants are none.
    assert 0 < accepted < MUTANTS // PARTS // 200


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text()
    | st.text("\0\ud800\udfffa\\", max_size=3)
)
_DOCUMENTS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=10
)
_TEXTS = st.text('[]{}:,"\\u0dD8e+-.19 \n\t\0NaItrlsfn\ufeff\u2028', max_size=30)


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(_DOCUMENTS.map(json.dumps), _DOCUMENTS.map(lambda value: json.dumps(value, ensure_ascii=False)), _TEXTS)
)
def test_the_two_parsers_of_json_agree(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    results: list[Any] = []
    for parse in (lambda: json_safe.parse(data, what="x", max_bytes=1000), lambda: second_reader.parse(data, 1000)):
        try:
            results.append(repr(parse()))
        except (CorruptedFileError, second_reader.RefusedError):
            results.append(None)
    assert results[0] == results[1]

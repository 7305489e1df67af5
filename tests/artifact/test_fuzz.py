"""Damaged and hostile files: only errors of the artifact, or the file loads. Never anything else."""

from __future__ import annotations

import copy
import gc
import os
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd

from mlec.artifact import Artifact, EncryptionKey, Keyring, Signer, Storage, TrustedKey
from mlec.errors import ArtifactError
from tests.artifact.conftest import made
from tests.artifact.surgery import NAMES, Parts, dumps, join, seal, split

SIGNER = Signer(bytes(range(32)))
KEY = EncryptionKey(bytes(range(32)))
NASTY: list[Any] = [
    *(None, True, False, 0.5, 1e308, float("nan"), float("inf")),
    *(-1, 0, 1, 63, 64, 2**31, 2**32, 2**48 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400),
    *("", "x" * 600, "\0", "\u202e", "\ud800", "../../etc/passwd", "f64", "bool", "u16", "0" * 64),
    *([], {}, [[]], [0] * 40, [2**32] * 3, {"__class__": "os"}, {"a": {"a": {"a": 1}}}),
]
SECTION_FIELDS = [f"{name}.{field}" for name in NAMES for field in ("offset", "size")]
CRCS = [f"crc.{name}" for name in NAMES]
ALGORITHMS = ["digest_alg", "sig_alg", "aead_alg", "codecs"]
EDGES = [0, 1, 63, 64, 127, 128, 129, 4095, 4096, 4097, 2**31, 2**32 - 1, 2**32, 2**48, 2**63, 2**64 - 1]


@pytest.fixture
def survives(tmp_path: Path) -> Callable[[bytes], bool]:
    """Write bytes, open them, use everything. Returns whether the file was accepted."""
    path = tmp_path / "mutant.mle"

    def survives(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            with Artifact.open(path) as artifact:
                artifact.describe()
                for name in artifact.tensors:
                    artifact.tensors[name].sum()
        except ArtifactError as caught:
            refusal = caught
        else:
            return True
        assert refusal.code.startswith("E_")
        assert len(refusal.render()) < 4000
        return False

    return survives


@pytest.fixture(autouse=True)
def no_leaks() -> Any:
    """Descriptors, maps of mutants and memory stay what they were."""
    gc.collect()
    descriptors, peak = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert "mutant.mle" not in Path("/proc/self/maps").read_text()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10


def test_no_changed_byte_is_accepted(sample: bytes, survives: Callable[[bytes], bool]) -> None:
    """One bit of every byte, every bit of the header; nothing repaired."""
    rng = random.Random(0)
    bits = [(i, bit) for i in range(128) for bit in range(8)] + [(i, rng.randrange(8)) for i in range(128, len(sample))]
    for position, bit in bits:
        mutant = bytearray(sample)
        mutant[position] ^= 1 << bit
        assert not survives(bytes(mutant)), (position, bit)


def test_truncated_and_extended_files_are_refused(sample: bytes, survives: Callable[[bytes], bool]) -> None:
    rng = random.Random(1)
    for length in [*range(0, 700), *rng.sample(range(700, len(sample)), 300)]:
        assert not survives(sample[:length])
    for extra in (1, 63, 4096):
        assert not survives(sample + bytes(extra))


def test_header_fields(sample: bytes, survives: Callable[[bytes], bool]) -> None:
    """Edge values and flipped bits in each field, checksum repaired."""
    names = ["magic", "version", "flags", *SECTION_FIELDS, *CRCS, "file_size", *ALGORITHMS]
    values = dict(zip(names, struct.unpack("<4sII10QIIIIIQ4B", sample[:124]), strict=True))
    widths = dict.fromkeys(["version", "flags", *CRCS], 32) | dict.fromkeys(ALGORITHMS, 8)
    accepted = []
    for name in names[1:]:
        width = widths.get(name, 64)
        candidates = {v for v in EDGES if v < 2**width} | {values[name] ^ 1 << bit for bit in range(width)}
        for value in candidates - {values[name]}:
            if survives(seal(values | {name: value}) + sample[128:]):
                accepted.append((name, value))
    # Optional flags may be anything; all other fields have one valid value for this content.
    assert {name for name, _ in accepted} == {"flags"}
    assert all(value & 0xFFFF == 1 for _, value in accepted)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Replace, remove, repeat or rename something in a document."""
    path: list[tuple[Any, Any]] = []
    node = value
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.75):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return value
    parent, key = path[-1]
    match rng.randrange(4):
        case 0 if isinstance(parent, dict):
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        case 2 if isinstance(parent, dict):
            parent[rng.choice(["", "w", "__init__", "x" * 300])] = parent.pop(key)
        case _:
            parent[key] = (
                node + rng.choice([-64, -1, 1, 64]) if type(node) is int and rng.random() < 0.5 else rng.choice(NASTY)
            )
    return value


def flip(rng: random.Random, data: bytes) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0:
                mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
            case 1:
                mutant[rng.randrange(len(mutant))] = rng.choice(b'\0\xff"\\{}[],:0-e')
            case 2:
                del mutant[rng.randrange(len(mutant)) :][: rng.randint(1, 9)]
            case 3:
                at = rng.randrange(len(mutant))
                mutant[at:at] = rng.choice([b"[", b"{", b'"', b"\\u0000", b"1e999", b"NaN", b",", b"\xff", b"9" * 30])
        if not mutant:
            return b"x"
    return bytes(mutant)


def mutant_of(rng: random.Random, parts: Parts) -> bytes:
    match rng.randrange(6):
        case 0:
            mutate_json(rng, parts.metadata)
        case 1:
            mutate_json(rng, parts.graph)
        case 2:
            parts.metadata_bytes = flip(rng, dumps(parts.metadata))
        case 3:
            parts.graph_bytes = flip(rng, dumps(parts.graph))
        case 4:
            parts.weights[rng.randrange(len(parts.weights))] ^= 1 << rng.randrange(8)
            if rng.random() < 0.5:
                parts.seal_tensors()
        case _:
            name, limit = rng.choice([("kind", 32), ("target", 32), ("off", 64), ("size", 64), ("reserved", 64)])
            rng.choice(parts.kernels).fields[name] = rng.choice([value for value in EDGES if value < 2**limit])
    return join(parts)


def test_sealed_mutants(sample: bytes, survives: Callable[[bytes], bool]) -> None:
    """Changes inside the sections, with all checksums and digests repaired."""
    rng = random.Random(2)
    accepted = sum(survives(mutant_of(rng, split(sample))) for _ in range(4000))
    # Other names, texts and weights make other valid files; most mutants are none.
    assert 0 < accepted < 2000


@pytest.mark.parametrize(
    "storage",
    [
        Storage("zstd"),
        Storage(signer=SIGNER),
        Storage(key=KEY),
        Storage("zstd", SIGNER, EncryptionKey(KEY.secret, "ChaCha20-Poly1305")),
    ],
    ids=["compressed", "signed", "encrypted", "all"],
)
def test_sealed_mutants_of_other_kinds(
    storage: Storage, tmp_path: Path, survives: Callable[[bytes], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for files stored otherwise: encrypted and signed again by those who have the keys, so that the change gets in."""
    monkeypatch.setenv("MLEC_KEY", KEY.text())
    monkeypatch.setattr(Keyring, "load", lambda: Keyring((TrustedKey(SIGNER.public, "acme"),)))
    master = storage.key.secret if storage.key else None
    tensors = {"w": np.arange(600, dtype=np.int32), "mask": np.arange(300) % 7 == 0, "scalar": np.array(2.5)}
    content = made(tmp_path, storage, tensors=tensors, graph="text " * 40)
    assert survives(content)
    rng = random.Random(3)
    tried = accepted = 0
    while tried < 400:
        parts = split(content, master)
        parts.private = storage.signer.private if storage.signer else None
        if parts.frames and rng.random() < 0.4:
            name = rng.choice(list(parts.frames))
            parts.frames[name] = flip(rng, zstd.compress(b"a frame of some other bytes " * 9, level=9))
        try:
            mutant = mutant_of(rng, parts)
        except (TypeError, KeyError, ValueError, zstd.ZstdError):
            continue  # what the tests' own writer needs was broken: a salt, a frame
        tried += 1
        accepted += survives(mutant)
    assert 0 < accepted < 200

"""Damaged and hostile files made from good ones, and the two readers side by side.

`mutant` knows the structure of a file: most of what it makes has every checksum, digest and signature repaired, so that the change
reaches the check behind them. `Readers` opens bytes with both readers: they must agree on what is accepted, and on the code of what
is not.
"""

from __future__ import annotations

import copy
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from backports import zstd
from cryptography.exceptions import InvalidTag

from mlec.artifact import Artifact, EncryptionKey, Keyring, Signer, TrustedKey
from mlec.errors import ArtifactError
from tests.artifact.second_reader import RefusedError, read
from tests.artifact.surgery import LAYOUT, NAMES, Parts, compressed, dumps, join, seal, split

SIGNER = Signer(bytes(range(32)))
KEY = EncryptionKey(bytes(range(100, 132)))
KEYRING = Keyring((TrustedKey(SIGNER.public, "acme"),))
CORPUS = Path(__file__).parents[1] / "artifacts"
"""Files that are kept for ever, one for each feature; those that are signed or encrypted are so with the two keys."""

NASTY: list[Any] = [
    *(None, True, False, 0.5, 1e308, float("nan"), float("inf")),
    *(-1, 0, 1, 63, 64, 2**31, 2**32, 2**48 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400),
    *("", "x" * 600, "\0", "\u202e", "\ud800", "../../etc/passwd", "f64", "bool", "u16", "0" * 64),
    *([], {}, [[]], [0] * 40, [2**32] * 3, {"__class__": "os"}, {"a": {"a": {"a": 1}}}),
]
EDGES = [0, 1, 63, 64, 127, 128, 129, 4095, 4096, 4097, 2**31, 2**32 - 1, 2**32, 2**48, 2**63, 2**64 - 1]
FIELDS = {
    **{"version": 32, "flags": 32},
    **{f"{name}.{field}": 64 for name in NAMES for field in ("offset", "size")},
    **{f"crc.{name}": 32 for name in NAMES},
    **{"file_size": 64, "digest_alg": 8, "sig_alg": 8, "aead_alg": 8, "codecs": 8},
}
"""Fields of the header behind the magic, and their bits."""
_TOKENS = [
    b"[",
    b"{",
    b'"',
    b"\\u0000",
    b"1e999",
    b"NaN",
    b",",
    b"\xff",
    b"9" * 30,
    b"\\ud83d",
    b"\xef\xbb\xbf",
    b"-0",
    b"1E5",
    b" ",
]
_MORE = ("E_JSON_SYNTAX", "E_JSON_DUPLICATE", "E_JSON_NONFINITE", "E_JSON_INT", "E_JSON_NUMBER")


def corpus() -> dict[str, bytes]:
    """The kept files, by name."""
    return {path.stem: path.read_bytes() for path in sorted(CORPUS.glob("*.mle"))}


class Readers:
    """Both readers; the first reads from a file, as it does for users: one in memory, always the same."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("mutant")
        self._path = f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        os.close(self._fd)

    def first(self, data: bytes) -> str:
        """The code with which mlec refuses the bytes; empty if it accepts them. Any other error than its own passes through."""
        os.ftruncate(self._fd, len(data))
        os.pwrite(self._fd, data, 0)
        try:
            with Artifact.open(self._path, keyring=KEYRING, key=KEY) as artifact:
                artifact.describe()
                for name in artifact.tensors:
                    artifact.tensors[name]
        except ArtifactError as refusal:
            return refusal.code if len(refusal.render()) < 4000 else "an error without an end"
        return ""

    def differ(self, data: bytes) -> str:
        """How the two differ about the bytes, in words; empty if they agree."""
        first, second = self.first(data), second_opinion(data)
        if first == second or (
            first in _MORE and second in _MORE
        ):  # what of a text with two faults comes first is not specified
            return ""
        return f"mlec: {first or 'accepted'}, the second reader: {second or 'accepted'}"


def second_opinion(data: bytes) -> str:
    """The code with which the second reader refuses the bytes; empty if it accepts them."""
    try:
        read(data, {bytes.fromhex(key.key_id): key.public for key in KEYRING.keys}, KEY.secret)
    except RefusedError as refusal:
        return str(refusal)
    return ""


def mutant(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Another file, mostly a broken one.

    Args:
        rng: decides about everything.
        data: any bytes; of those that are no file of ours, bytes are changed.
        others: files to take sections from.
    """
    if rng.random() < 0.5:
        return _raw(rng, data)
    try:
        if rng.random() < 0.2:
            return _header(rng, data)
        parts = _taken_apart(data)
        _change(rng, parts, others)
        return join(parts)
    except (
        TypeError,
        KeyError,
        ValueError,
        AttributeError,
        IndexError,
        struct.error,
        zstd.ZstdError,
        zlib.error,
        InvalidTag,
    ):
        return _raw(
            rng, data
        )  # the tests' own writer cannot store that: a salt that is none, a frame that does not decode


def _taken_apart(data: bytes) -> Parts:
    fields = struct.unpack(LAYOUT, data[:128])
    parts = split(data, KEY.secret if fields[2] & 4 else None)
    parts.private = SIGNER.private if fields[2] & 8 else None
    return parts


def _raw(rng: random.Random, data: bytes) -> bytes:
    """Changed bytes, nothing repaired."""
    match rng.randrange(5):
        case 0:
            return data[: rng.randrange(len(data) + 1)]
        case 1:
            return data + bytes(rng.choice([1, 63, 4096]))
        case 2:
            at = rng.randrange(128) if len(data) > 128 else 0
            return flipped(rng, data[:at]) + data[at:]
        case _:
            return flipped(rng, data)


def _header(rng: random.Random, data: bytes) -> bytes:
    """Fields of the header at the edges of what they hold, its checksum repaired."""
    values = dict(zip(["magic", *FIELDS], struct.unpack(LAYOUT[:-1], data[:124]), strict=True))
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice(list(FIELDS))
        bits = FIELDS[name]
        near = [values[name] + step & (1 << bits) - 1 for step in (-4096, -64, -1, 1, 64, 4096)]
        values[name] = rng.choice(
            [values[name] ^ 1 << rng.randrange(bits), *near, *(v for v in EDGES if v < 1 << bits)]
        )
    return seal(values) + data[128:]


def _change(rng: random.Random, parts: Parts, others: list[bytes]) -> None:
    """A change inside the sections."""
    match rng.randrange(9):
        case 0:
            changed(rng, parts.metadata)
        case 1:
            changed(rng, parts.graph)
        case 2:
            parts.metadata_bytes = flipped(rng, dumps(parts.metadata))
        case 3:
            parts.graph_bytes = flipped(rng, dumps(parts.graph))
        case 4:
            parts.weights[rng.randrange(len(parts.weights))] ^= 1 << rng.randrange(8)
            if rng.random() < 0.5:
                parts.seal_tensors()
        case 5:
            name, bits = rng.choice([("kind", 32), ("target", 32), ("off", 64), ("size", 64), ("reserved", 64)])
            rng.choice(parts.kernels).fields[name] = rng.choice([value for value in EDGES if value < 1 << bits])
        case 6:
            other = _taken_apart(rng.choice(others))
            match rng.randrange(4):
                case 0:
                    parts.kernels = other.kernels
                case 1:
                    parts.weights = other.weights
                case 2:
                    parts.attributes = other.attributes
                case _:
                    parts.metadata = other.metadata
        case 7 if parts.frames:
            name = rng.choice(list(parts.frames))
            frame = compressed(
                rng.choice([b"", b"a frame of other bytes " * 9, bytes(5000)]), parts.codecs.get(name, 1)
            )
            parts.frames[name] = flipped(rng, frame)
        case 8 if parts.private:
            parts.attributes = flipped(rng, parts.attributes)
        case _:
            parts.metadata_bytes = flipped(rng, dumps(parts.metadata, indent=rng.choice([None, 1])))


def changed(rng: random.Random, value: Any) -> Any:
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


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, left out or put in."""
    mutant = bytearray(data or b"x")
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0:
                mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
            case 1:
                mutant[rng.randrange(len(mutant))] = rng.choice(b'\0\xff"\\{}[],:0-e')
            case 2:
                at = rng.randrange(len(mutant))
                del mutant[at : at + rng.randint(1, 9)]
            case 3:
                at = rng.randrange(len(mutant))
                mutant[at:at] = rng.choice(_TOKENS)
        if not mutant:
            return b"x"
    return bytes(mutant)

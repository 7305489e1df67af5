"""A second implementation of the format, for tests: take a file apart, change it, put it together again.

It shares no code with mlec.artifact: `join(split(data)) == data` shows that both follow the same description.
`join` repairs every checksum and digest, so that a change reaches exactly the check that it is meant for.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backports import zstd
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LAYOUT = "<4sII10QIIIIIQ4BI"
NAMES = ("metadata", "graph", "weights", "kernels", "signature")
ALIGN = {"metadata": 128, "graph": 64, "weights": 4096, "kernels": 4096, "signature": 64}
ENTRY = "<IIQQ32s32sQ"
SHIFTS = {"graph": 2, "kernels": 6}
"""Of sections that can be compressed as a whole, in the field ``codecs``."""


def align(position: int, to: int) -> int:
    return (position + to - 1) // to * to


def dumps(value: Any, **options: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), **options).encode("utf-8", "surrogatepass")


def compressed(data: bytes, codec: int) -> bytes:
    if codec == 1:
        return zstd.compress(data, level=9)
    return b"MLEZ" + struct.pack("<Q", len(data)) + zlib.compress(data, 6)


def root(section: str, data: bytes) -> bytes:
    leaves = [
        hashlib.sha256(b"\xa5" + struct.pack("<I", len(chunk)) + chunk).digest()
        for chunk in (data[i : i + 2**20] for i in range(0, len(data), 2**20))
    ]
    head = b"\x5a" + struct.pack("<BQI", NAMES.index(section) + 1, len(data), len(leaves))
    return hashlib.sha256(head + b"".join(leaves)).digest()


@dataclass
class Kernel:
    kind: int
    target: int
    data: bytes
    fields: dict[str, Any] = field(default_factory=dict)  # table fields that `join` must not compute


@dataclass
class Parts:
    """The content of a file. ``*_bytes`` replace a whole section."""

    metadata: dict[str, Any]
    graph: dict[str, Any]
    weights: bytearray
    kernels: list[Kernel]
    metadata_bytes: bytes | None = None
    graph_bytes: bytes | None = None
    kernels_bytes: bytes | None = None
    header: dict[str, int] = field(default_factory=dict)  # e.g. {"flags": 3, "graph.offset": 7, "crc.graph": 0}
    digests: dict[str, str | None] = field(default_factory=dict)
    padding: bytes = b"\0"
    frames: dict[str, bytes | None] = field(
        default_factory=dict
    )  # stored compressed: as this frame, None for the usual one
    codecs: dict[str, int] = field(default_factory=dict)  # of those that are no frames of zstd
    private: bytes | None = None  # signs the file; `split` cannot know it
    attributes: bytes = b"{}"
    signature_bytes: bytes | None = None  # instead of a signature
    master: bytes | None = None  # encrypts the sections
    aead: int = 0
    tampered: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)  # change an encrypted section

    @property
    def tensors(self) -> list[dict[str, Any]]:
        return self.graph["tensors"]

    def tensor(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.tensors if entry["name"] == name)

    def seal_tensors(self) -> None:
        """Recompute the checksums in the tensor index."""
        for entry in self.tensors:
            data = self.weights[entry["off"] : entry["off"] + entry["size"]]
            if entry["codec"] == "zstd":
                data = zstd.decompress(data)
            entry["crc32"] = zlib.crc32(data)
            entry["sha256"] = hashlib.sha256(data).hexdigest()

    def store(self, name: str, data: bytes, **fields: Any) -> None:
        """Put other bytes in the place of a tensor's; those behind it move."""
        entry = self.tensor(name)
        old = {e["name"]: bytes(self.weights[e["off"] : e["off"] + e["size"]]) for e in self.tensors}
        entry.update(fields, size=len(data))
        self.weights.clear()
        for e in self.tensors:
            self.weights += bytes(align(len(self.weights), 64) - len(self.weights))
            e["off"] = len(self.weights)
            self.weights += data if e is entry else old[e["name"]]


def split(data: bytes, master: bytes | None = None) -> Parts:
    fields = struct.unpack(LAYOUT, data[:128])
    stored = {name: data[fields[3 + 2 * i] :][: fields[4 + 2 * i]] for i, name in enumerate(NAMES)}
    if master:
        document = json.loads(stored["metadata"])
        sections, numbers = fields[3:11], (fields[1], fields[2], *fields[-5:-1])
        bare = dumps(document | {"digests": None}, sort_keys=True)
        for name in NAMES[1:4]:
            pieces = [stored[name][i : i + 2**20 + 16] for i in range(0, len(stored[name]), 2**20 + 16)]
            salt = bytes.fromhex(document["encryption"]["salt"])
            stored[name] = b"".join(crypt("decrypt", name, pieces, master, salt, numbers, sections, bare))
    frames: dict[str, bytes | None] = {}
    codecs: dict[str, int] = {}
    for name, shift in SHIFTS.items():
        codec = fields[-2] >> shift & 3
        if codec == 1:
            stored[name], frames[name] = zstd.decompress(stored[name]), None
        elif codec:
            stored[name], frames[name], codecs[name] = zlib.decompress(stored[name][12:]), None, codec
    kernels = []
    if stored["kernels"]:
        for i in range(struct.unpack_from("<I", stored["kernels"], 4)[0]):
            kind, target, off, size, *_ = struct.unpack_from(ENTRY, stored["kernels"], 8 + 96 * i)
            kernels.append(Kernel(kind, target, stored["kernels"][off : off + size]))
    header = {} if fields[1] == 1 else {"version": fields[1]}
    metadata, graph = (json.loads(stored[name]) for name in ("metadata", "graph"))
    parts = Parts(metadata, graph, bytearray(stored["weights"]), kernels, header=header, frames=frames, codecs=codecs)
    parts.attributes = stored["signature"][108:] or b"{}"
    parts.master, parts.aead = master, fields[-3]
    return parts


def crypt(
    way: str,
    name: str,
    pieces: list[bytes],
    master: bytes,
    salt: bytes,
    numbers: tuple[int, ...],
    sections: Any,
    metadata: bytes,
) -> list[bytes]:
    """Chunks of a section, encrypted or decrypted; ``numbers``: version, flags, and the four bytes from 120 on."""
    version, flags, digest_alg, _, aead, codecs = numbers
    identity = NAMES.index(name) + 1
    key = HKDF(SHA256(), 32, salt, b"mle:v1:enc:" + bytes([identity])).derive(master)
    cipher = AESGCM(key) if aead == 1 else ChaCha20Poly1305(key)
    data = b"mle:aad:v1\0" + struct.pack("<II8Q4B", version, flags & ~8, *sections, digest_alg, aead, codecs, identity)
    data += hashlib.sha256(metadata).digest()
    return [
        getattr(cipher, way)(bytes(7) + struct.pack("<IB", i, i == len(pieces) - 1), piece, data)
        for i, piece in enumerate(pieces)
    ]


def kernel_section(parts: Parts, graph_root: bytes) -> bytes:
    if not parts.kernels:
        return b""
    table, blobs = b"", b""
    base = 8 + 96 * len(parts.kernels)
    for kernel in parts.kernels:
        off = align(base + len(blobs), 64)
        blobs += parts.padding * (off - base - len(blobs)) + kernel.data
        entry = {
            "kind": kernel.kind,
            "target": kernel.target,
            "off": off,
            "size": len(kernel.data),
            "sha256": hashlib.sha256(kernel.data).digest(),
            "graph_root": graph_root,
            "reserved": 0,
        } | kernel.fields
        table += struct.pack(ENTRY, *entry.values())
    return b"MLEK" + struct.pack("<I", len(parts.kernels)) + table + blobs


def join(parts: Parts) -> bytes:
    graph = parts.graph_bytes if parts.graph_bytes is not None else dumps(parts.graph)
    kernels = parts.kernels_bytes if parts.kernels_bytes is not None else kernel_section(parts, root("graph", graph))
    stored = {"graph": graph, "weights": bytes(parts.weights), "kernels": kernels}
    index = parts.graph.get("tensors") if isinstance(parts.graph, dict) else None
    entries = [entry for entry in index if isinstance(entry, dict)] if isinstance(index, list) else []
    codecs = 16 * any(entry.get("codec") == "zstd" for entry in entries)
    for name, frame in parts.frames.items():
        if not stored[name]:
            continue
        codec = parts.codecs.get(name, 1)
        stored[name] = compressed(stored[name], codec) if frame is None else frame
        codecs |= codec << SHIFTS[name]
    flags = bool(kernels) | 2 * bool(codecs) | 4 * bool(parts.master)
    if parts.master:
        nothing = {name: "0" * 64 if data else None for name, data in stored.items()}
        sizes = [len(dumps(parts.metadata | {"digests": nothing}))]
        sizes += [len(data) + 16 * -(-len(data) // 2**20) for data in stored.values()]
        sections, end = [], 128
        for name, size in zip(NAMES, sizes, strict=False):
            sections += [align(end, ALIGN[name]) if size else 0, size]
            end = sections[-2] + size if size else end
        bare = dumps(parts.metadata | {"digests": None}, sort_keys=True)
        salt = bytes.fromhex(parts.metadata["encryption"]["salt"])
        for name, data in stored.items():
            pieces = [data[i : i + 2**20] for i in range(0, len(data), 2**20)]
            numbers = (1, flags, 1, 0, parts.aead, codecs)
            stored[name] = b"".join(crypt("encrypt", name, pieces, parts.master, salt, numbers, sections, bare))
            stored[name] = parts.tampered.get(name, bytes)(stored[name])
    digests = {name: root(name, data).hex() if data else None for name, data in stored.items()} | parts.digests
    document = parts.metadata | ({"digests": digests} if "digests" in parts.metadata else {})
    metadata = parts.metadata_bytes if parts.metadata_bytes is not None else dumps(document, sort_keys=True)
    signature = bytes(108 + len(parts.attributes)) if parts.private else b""
    if parts.signature_bytes is not None:
        signature = parts.signature_bytes
    stored = {"metadata": metadata} | stored | {"signature": signature}

    body, header = (
        b"",
        {"magic": b"MLE\0", "version": 1, "flags": flags | 8 * bool(signature)},
    )
    for name in NAMES:
        data = stored[name]
        offset = align(128 + len(body), ALIGN[name]) if data else 0
        if data:
            body += parts.padding * (offset - 128 - len(body)) + data
        header |= {f"{name}.offset": offset, f"{name}.size": len(data)}
    header |= {f"crc.{name}": zlib.crc32(stored[name]) for name in NAMES}
    header |= {
        "file_size": 128 + len(body),
        "digest_alg": 1,
        "sig_alg": bool(signature),
        "aead_alg": parts.aead,
        "codecs": codecs,
    }
    header |= parts.header
    if parts.private and parts.signature_bytes is None:
        signature = sign(parts.private, header, root("metadata", metadata), parts.attributes)
        body = body[: -len(signature)] + signature
        header["crc.signature"] = zlib.crc32(signature)
    return seal(header) + body


def sign(private: bytes, header: dict[str, Any], metadata_root: bytes, attributes: bytes) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(private)
    identity = hashlib.sha256(key.public_key().public_bytes_raw()).digest()
    signed = seal(header | {"crc.signature": 0, "header_crc32": 0})
    message = b"mle:artifact:v1\0" + struct.pack("<HH", 1, 1) + identity + signed + metadata_root
    message += struct.pack("<I", len(attributes)) + attributes
    return (
        b"MLES"
        + struct.pack("<HH", 1, 1)
        + identity
        + key.sign(message)
        + struct.pack("<I", len(attributes))
        + attributes
    )


def seal(header: dict[str, Any]) -> bytes:
    packed = struct.pack(LAYOUT[:-1], *(header[key] for key in header if key != "header_crc32"))
    return packed + struct.pack("<I", header.get("header_crc32", zlib.crc32(packed)))

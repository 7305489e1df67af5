"""Every check of the loader: a valid file is broken in exactly one way and sealed again, and the check says so."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.artifact import Artifact, compression, header, json_safe, limits, mapped, reader, write
from mlec.errors import ArtifactError, CorruptedFileError, MlecError, SecurityError, VersionMismatchError
from tests.artifact.mutants import second_opinion
from tests.artifact.surgery import Parts, dumps, join, split

Load = Callable[..., Artifact]
ROOT = Path(__file__).parents[2]


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(MlecError) as caught:
        action()
    return caught.value.code


def with_header(**fields: int) -> Callable[[Parts], None]:
    return lambda parts: parts.header.update({key.replace("__", "."): value for key, value in fields.items()})


def with_tensor(name: str, /, **fields: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.tensor(name).update(fields)


def with_kernel(**fields: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.kernels[0].fields.update(fields)


def with_metadata(**keys: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.metadata.update(keys)


def metadata_text(text: bytes) -> Callable[[Parts], None]:
    """Add a key with this JSON text to the metadata."""

    def change(parts: Parts) -> None:
        clean = split(join(parts)).metadata
        parts.metadata_bytes = b'{"odd":' + text + b"," + dumps(clean)[1:]

    return change


def drop(document: str, key: str) -> Callable[[Parts], None]:
    return lambda parts: getattr(parts, document).pop(key)


def weights_byte(position: int, value: int, *, seal: bool) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.weights[position] = value
        if seal:
            parts.seal_tensors()

    return change


def duplicate_tensor(parts: Parts) -> None:
    parts.tensor("idx")["name"] = "w"


def shift_tensor(parts: Parts) -> None:
    """Leave a hole of 64 bytes before the last tensor."""
    entry = parts.tensor("idx")
    parts.weights[entry["off"] : entry["off"]] = bytes(64)
    entry["off"] += 64


def swap_entries(parts: Parts) -> None:
    parts.tensors[0], parts.tensors[1] = parts.tensors[1], parts.tensors[0]


def longer_weights(parts: Parts) -> None:
    parts.weights += bytes(64)


def no_weights(parts: Parts) -> None:
    parts.graph["tensors"] = []
    parts.weights.clear()


def crossed_sections(parts: Parts) -> None:
    good = struct.unpack_from("<10Q", join(parts), 12)
    parts.header |= {"graph.offset": good[4], "weights.offset": good[2]}


BROKEN: list[tuple[str, Callable[[Parts], None]]] = [
    # Header.
    ("E_VERSION_MAJOR", with_header(version=2)),
    ("E_VERSION_MAJOR", with_header(version=0)),
    ("E_VERSION_MAJOR", with_header(version=1 << 16)),
    ("E_HEADER_CRC", with_header(header_crc32=0)),
    ("E_FLAG_UNKNOWN", with_header(flags=1 | 16)),
    ("E_FLAG_UNKNOWN", with_header(flags=1 | 1 << 15)),
    ("E_DIGEST_ALG", with_header(digest_alg=2)),
    ("E_DIGEST_ALG", with_header(digest_alg=0)),
    ("E_SIG_ALG", with_header(sig_alg=2)),
    ("E_AEAD_ALG", with_header(aead_alg=3)),
    ("E_CODEC", with_header(codecs=0b01, flags=3)),  # metadata is never compressed
    ("E_CODEC", with_header(codecs=0b1100, flags=3)),
    ("E_CODEC", with_header(codecs=0b10_0000, flags=3)),  # weights are no stream of zlib
    ("E_FLAG_MISMATCH", with_header(flags=0)),  # kernels without the flag
    ("E_FLAG_MISMATCH", lambda parts: (parts.kernels.clear(), with_header(flags=1)(parts))),
    ("E_FLAG_MISMATCH", with_header(flags=1 | 2)),
    ("E_FLAG_MISMATCH", with_header(codecs=0b100)),
    ("E_FLAG_MISMATCH", with_header(flags=1 | 4)),
    ("E_FLAG_MISMATCH", with_header(aead_alg=1)),
    ("E_FLAG_MISMATCH", with_header(flags=1 | 8)),
    ("E_FLAG_MISMATCH", with_header(flags=1 | 8, sig_alg=1)),
    ("E_FLAG_MISMATCH", with_header(sig_alg=1)),
    ("E_FLAG_MISMATCH", with_header(signature__size=108, signature__offset=64)),
    ("E_FLAG_MISMATCH", lambda parts: (parts.kernels.clear(), with_header(flags=2, codecs=1 << 6)(parts))),
    ("E_FLAG_MISMATCH", lambda parts: (no_weights(parts), with_header(flags=3, codecs=1 << 4)(parts))),
    ("E_ENCRYPTION_METADATA", with_header(flags=1 | 4, aead_alg=1)),
    ("E_FILE_SIZE", with_header(file_size=2**63)),
    # Section table.
    ("E_SECTION_MISSING", with_header(metadata__offset=0, metadata__size=0, crc__metadata=0)),
    ("E_SECTION_MISSING", with_header(graph__offset=0, graph__size=0, crc__graph=0)),
    ("E_SECTION_ABSENT", with_header(signature__offset=64)),
    ("E_SECTION_ABSENT", with_header(crc__signature=1)),
    ("E_SECTION_CAP", with_header(metadata__size=(16 << 20) + 1)),
    ("E_SECTION_CAP", with_header(graph__size=(256 << 20) + 1)),
    ("E_SECTION_CAP", with_header(weights__size=(1 << 40) + 1)),
    ("E_SECTION_CAP", with_header(kernels__size=(2 << 30) + 1)),
    ("E_SECTION_CAP", with_header(metadata__size=2**64 - 1)),
    ("E_SECTION_BOUNDS", with_header(weights__offset=2**63)),
    ("E_SECTION_BOUNDS", with_header(kernels__offset=2**64 - 1)),
    ("E_SECTION_BOUNDS", with_header(metadata__size=1 << 20)),
    ("E_SECTION_PLACEMENT", with_header(metadata__offset=129)),
    ("E_SECTION_PLACEMENT", with_header(graph__offset=128)),  # overlap
    ("E_SECTION_PLACEMENT", with_header(weights__offset=4096 + 64)),  # misaligned
    ("E_SECTION_PLACEMENT", crossed_sections),
    ("E_PADDING", lambda parts: setattr(parts, "padding", b"\1")),
    (
        "E_FILE_END",
        lambda parts: with_header(
            weights__offset=0,
            weights__size=0,
            crc__weights=0,
            flags=0,
            kernels__offset=0,
            kernels__size=0,
            crc__kernels=0,
        )(parts),
    ),
    # Checksums and digests.
    ("E_CRC_METADATA", with_header(crc__metadata=1)),
    ("E_CRC_GRAPH", with_header(crc__graph=1)),
    ("E_CRC_WEIGHTS", with_header(crc__weights=1)),
    ("E_CRC_KERNELS", with_header(crc__kernels=1)),
    (
        "E_CRC_SIGNATURE",
        lambda parts: (setattr(parts, "signature_bytes", bytes(108)), with_header(crc__signature=1)(parts)),
    ),
    ("E_DIGEST_GRAPH", lambda parts: parts.digests.update(graph="0" * 64)),
    ("E_DIGEST_WEIGHTS", lambda parts: parts.digests.update(weights="0" * 64)),
    ("E_DIGEST_KERNELS", lambda parts: parts.digests.update(kernels="0" * 64)),
    ("E_DIGEST_MISSING", lambda parts: parts.digests.update(kernels=None)),
    ("E_DIGEST_MISSING", lambda parts: (parts.kernels.clear(), parts.digests.update(kernels="0" * 64))),
    # JSON.
    ("E_JSON_UTF8", metadata_text(b'"\xff"')),
    ("E_JSON_UTF8", metadata_text(b'"\xed\xa0\x80"')),
    ("E_JSON_UTF8", lambda parts: setattr(parts, "graph_bytes", b"\xef\xbb\xbf" + dumps(parts.graph))),
    ("E_JSON_DEPTH", metadata_text(b"[" * 65 + b"]" * 65)),
    ("E_JSON_DEPTH", metadata_text(b'{"a":' * 5000 + b"1" + b"}" * 5000)),
    ("E_JSON_DUPLICATE", metadata_text(b'{"a":1,"a":1}')),
    ("E_JSON_DUPLICATE", metadata_text(b'0,"odd":0')),
    ("E_JSON_NONFINITE", metadata_text(b"NaN")),
    ("E_JSON_NONFINITE", metadata_text(b"-Infinity")),
    ("E_JSON_NONFINITE", metadata_text(b"1e999")),
    ("E_JSON_INT", metadata_text(b"18446744073709551616")),
    ("E_JSON_INT", metadata_text(b"-9223372036854775809")),
    ("E_JSON_INT", metadata_text(b"9" * 100_000)),
    ("E_JSON_NUMBER", metadata_text(b"0." + b"1" * 127)),
    ("E_JSON_STRING", metadata_text(rb'"\ud800"')),
    ("E_JSON_STRING", metadata_text(rb'{"\u0000":1}')),
    ("E_JSON_SYNTAX", metadata_text(b"{a:1}")),
    ("E_JSON_SYNTAX", metadata_text(b'"\x01"')),
    ("E_JSON_SYNTAX", lambda parts: setattr(parts, "graph_bytes", dumps(parts.graph) + b"{}")),
    ("E_JSON_SYNTAX", lambda parts: setattr(parts, "graph_bytes", b" ")),
    # Documents.
    ("E_METADATA_SCHEMA", drop("metadata", "format")),
    ("E_METADATA_SCHEMA", drop("metadata", "targets")),
    ("E_METADATA_SCHEMA", drop("metadata", "digests")),
    ("E_METADATA_SCHEMA", drop("metadata", "mlec_version")),
    ("E_METADATA_SCHEMA", with_metadata(targets={})),
    ("E_METADATA_SCHEMA", lambda parts: parts.digests.update(graph="0" * 63 + "G")),
    ("E_METADATA_SCHEMA", lambda parts: parts.digests.update(graph="0" * 64 + "\n")),
    ("E_METADATA_SCHEMA", lambda parts: parts.digests.update(more="0" * 64)),
    ("E_METADATA_SCHEMA", lambda parts: setattr(parts, "metadata_bytes", b"[]")),
    ("E_METADATA_VERSION", with_metadata(format="1.1")),
    ("E_CRITICAL", with_metadata(critical=["sparse-weights"])),
    ("E_GRAPH_SCHEMA", drop("graph", "ir")),
    ("E_GRAPH_SCHEMA", drop("graph", "tensors")),
    ("E_GRAPH_SCHEMA", lambda parts: parts.graph.update(ir=3)),
    ("E_GRAPH_SCHEMA", lambda parts: parts.tensor("w").pop("sha256")),
    ("E_GRAPH_SCHEMA", with_tensor("w", sha256="A" * 64)),
    ("E_GRAPH_SCHEMA", with_tensor("w", name=3)),
    ("E_GRAPH_SCHEMA", with_tensor("w", shape=[True, 3])),
    ("E_GRAPH_SCHEMA", with_tensor("w", shape=[4.0, 3])),
    ("E_GRAPH_SCHEMA", with_tensor("w", shape=[-4, -3])),
    ("E_GRAPH_SCHEMA", with_tensor("w", off=-64)),
    ("E_GRAPH_SCHEMA", with_tensor("w", size=False)),
    ("E_GRAPH_SCHEMA", with_tensor("w", crc32=2**32)),
    ("E_GRAPH_FORMAT", lambda parts: parts.graph.update(format=2)),
    # Tensors.
    ("E_TENSOR_NAME", with_tensor("w", name="")),
    ("E_TENSOR_NAME", with_tensor("w", name="x" * 513)),
    ("E_TENSOR_NAME", with_tensor("w", name="中" * 171)),
    ("E_TENSOR_NAME", with_tensor("w", name="a\nb")),
    ("E_TENSOR_NAME", with_tensor("w", name="a\u202eb")),
    ("E_TENSOR_NAME", with_tensor("w", name="a\u2028b")),
    ("E_TENSOR_NAME", with_tensor("w", name="e\u0301")),
    ("E_TENSOR_DUPLICATE", duplicate_tensor),
    ("E_TENSOR_DTYPE", with_tensor("w", dtype="f128")),
    ("E_TENSOR_DTYPE", with_tensor("w", dtype="O")),
    ("E_TENSOR_SHAPE", with_tensor("w", shape=[1] * 33)),
    ("E_TENSOR_SHAPE", with_tensor("empty", shape=[0, 2**48 + 1])),
    ("E_TENSOR_RAW", with_tensor("w", shape=[4, 4])),
    ("E_TENSOR_RAW", with_tensor("w", shape=[2**32, 2**32, 3])),  # the product is 0 in 64 bits
    ("E_TENSOR_RAW", with_tensor("w", dtype="f64")),
    ("E_TENSOR_RAW", with_tensor("scalar", shape=[0])),
    ("E_TENSOR_CODEC", with_tensor("w", codec="lz4")),
    ("E_TENSOR_CODEC", with_tensor("w", codec="")),
    ("E_TENSOR_SIZE", with_tensor("w", size=40)),
    ("E_TENSOR_PLACEMENT", shift_tensor),
    ("E_TENSOR_PLACEMENT", swap_entries),
    ("E_TENSOR_PLACEMENT", with_tensor("mask", off=0)),  # overlap
    ("E_TENSOR_PLACEMENT", with_tensor("mask", off=65)),
    ("E_TENSOR_BOUNDS", with_tensor("idx", shape=[500], raw=2000, size=2000)),
    ("E_WEIGHTS_END", longer_weights),
    ("E_WEIGHTS_END", lambda parts: parts.graph.update(tensors=[])),
    ("E_WEIGHTS_PADDING", weights_byte(50, 1, seal=True)),
    ("E_TENSOR_CRC", with_tensor("w", crc32=0)),
    ("E_TENSOR_CRC", weights_byte(0, 9, seal=False)),
    ("E_TENSOR_DIGEST", with_tensor("w", sha256="0" * 64)),
    ("E_TENSOR_BOOL", weights_byte(64, 2, seal=True)),
    # Kernels.
    ("E_KERNEL_MAGIC", lambda parts: setattr(parts, "kernels_bytes", b"MLEX" + bytes(124))),
    ("E_KERNEL_MAGIC", lambda parts: setattr(parts, "kernels_bytes", b"MLEK")),
    ("E_KERNEL_COUNT", lambda parts: setattr(parts, "kernels_bytes", b"MLEK" + bytes(124))),
    ("E_KERNEL_COUNT", lambda parts: setattr(parts, "kernels_bytes", b"MLEK\xff\xff\xff\xff" + bytes(124))),
    ("E_KERNEL_COUNT", lambda parts: setattr(parts, "kernels_bytes", b"MLEK\2\0\0\0" + bytes(96))),
    ("E_KERNEL_KIND", with_kernel(kind=0)),
    ("E_KERNEL_KIND", with_kernel(kind=7)),
    ("E_KERNEL_TARGET", with_kernel(target=2)),
    ("E_KERNEL_RESERVED", with_kernel(reserved=1)),
    ("E_KERNEL_BOUNDS", with_kernel(size=0)),
    ("E_KERNEL_BOUNDS", with_kernel(size=2**64 - 1)),
    ("E_KERNEL_BOUNDS", with_kernel(off=2**63)),
    ("E_KERNEL_PLACEMENT", with_kernel(off=0)),
    ("E_KERNEL_PLACEMENT", with_kernel(off=257)),
    ("E_KERNEL_PADDING", lambda parts: pad_kernels(parts)),
    ("E_KERNEL_DIGEST", with_kernel(sha256=bytes(32))),
    ("E_KERNEL_GRAPH", with_kernel(graph_root=bytes(32))),
    ("E_KERNEL_END", lambda parts: trailing_kernel_bytes(parts)),
]


def pad_kernels(parts: Parts) -> None:
    section = bytearray(stored(parts, 3))
    section[201] = 1  # the table ends at 200, the first blob starts at 256
    parts.kernels_bytes = bytes(section)


def trailing_kernel_bytes(parts: Parts) -> None:
    parts.kernels_bytes = stored(parts, 3) + b"\0"


def stored(parts: Parts, index: int) -> bytes:
    data = join(parts)
    offset, size = struct.unpack_from("<2Q", data, 12 + 16 * index)
    return data[offset : offset + size]


@pytest.mark.parametrize(("code", "change"), BROKEN, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BROKEN)])
def test_broken_rule(load: Load, parts: Parts, code: str, change: Callable[[Parts], None]) -> None:
    load(join(parts)).close()
    change(parts)
    with pytest.raises(ArtifactError) as caught:
        load(join(parts))
    assert caught.value.code == second_opinion(join(parts)) == code
    assert "broken.mle" in caught.value.render()


def test_newer_minor_versions_optional_flags_and_unknown_keys_are_accepted(load: Load, parts: Parts) -> None:
    parts.header |= {"version": 1 | 7 << 16, "flags": 1 | 1 << 16 | 1 << 31}
    parts.metadata |= {"format": "1.7", "novelty": {"a": [1]}}
    parts.tensor("w")["novelty"] = 1
    artifact = load(join(parts))
    assert artifact.header.version == "1.7"
    assert artifact.metadata["novelty"] == {"a": [1]}


def test_a_major_version_is_named_whatever_else_is_wrong(load: Load, sample: bytes) -> None:
    data = bytearray(sample)
    data[4] = 9
    with pytest.raises(VersionMismatchError) as caught:
        load(bytes(data))
    assert "9.0" in caught.value.message
    assert "1.x" in caught.value.message
    assert "damaged" in caught.value.render()


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.header.update(version=2),
        lambda parts: parts.header.update(flags=17),
        lambda parts: parts.header.update(digest_alg=2),
        lambda parts: parts.graph.update(format=2),
        lambda parts: parts.tensor("w").update(codec="lz"),
    ],
)
def test_an_unknown_version_or_feature_says_who_reads_it(
    load: Load, parts: Parts, change: Callable[[Parts], None]
) -> None:
    parts.metadata["mlec_version"] = "7.8.9"
    change(parts)
    with pytest.raises(VersionMismatchError) as caught:
        load(join(parts))
    assert caught.value.notes == ("by what it says, mlec 7.8.9 wrote it, and reads it",)
    assert "compile the model again" in str(caught.value.hint)


def test_what_a_file_says_of_its_version_is_one_line(load: Load, parts: Parts) -> None:
    parts.metadata["mlec_version"] = "1\nhint: run this"
    parts.header.update(flags=17)
    with pytest.raises(VersionMismatchError) as caught:
        load(join(parts))
    assert caught.value.notes == ("by what it says, mlec 1 hint: run this wrote it, and reads it",)


@pytest.mark.parametrize("odd", [{"metadata.offset": 2**64 - 1}, {"metadata.size": 2**40}, {"crc.metadata": 0}])
def test_of_metadata_that_is_none_nothing_is_said(load: Load, parts: Parts, odd: dict[str, int]) -> None:
    parts.header |= {"flags": 17, **odd}
    with pytest.raises(VersionMismatchError) as caught:
        load(join(parts))
    assert not caught.value.notes


def test_every_truncation_of_the_header(load: Load, sample: bytes) -> None:
    for length in range(128):
        assert code_of(lambda length=length: load(sample[:length])) == "E_HEADER_TRUNCATED"


def test_truncation_at_every_boundary(load: Load, sample: bytes) -> None:
    fields = struct.unpack_from("<10Q", sample, 12)
    edges = (
        {128, len(sample)} | {fields[i] for i in range(0, 8, 2)} | {fields[i] + fields[i + 1] for i in range(0, 8, 2)}
    )
    lengths = {edge + step for edge in edges for step in (-1, 0, 1)} - {len(sample), 127}
    for length in lengths:
        data = sample[:length].ljust(length, b"\0")
        assert code_of(lambda data=data: load(data)) == "E_FILE_SIZE"


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"PK\x03\x04", "zip"),
        (b"\x80\x04\x95", "pickle"),
        (b"GGUF", "GGUF"),
        (b"\0ELM", "byte-swapped"),
        (b'{"learner"', "JSON"),
        (b"hello world", "not a .mle file"),
    ],
)
def test_foreign_files_are_recognised(load: Load, start: bytes, hint: str) -> None:
    for data in (start, start + bytes(1000)):
        with pytest.raises(CorruptedFileError, match=hint) as caught:
            load(data)
        assert caught.value.code == "E_MAGIC"


def test_only_regular_files_are_opened(tmp_path: Path, sample: bytes) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert code_of(lambda: Artifact.open(tmp_path / "socket")) == "E_OPEN"
    for path in (tmp_path, tmp_path / "pipe", "/dev/null", "/dev/zero"):
        assert code_of(lambda path=path: Artifact.open(path)) == "E_NOT_A_FILE"
    for path in (tmp_path / "missing", tmp_path / "missing" / "m.mle", "a\0b", "x" * 5000):
        assert code_of(lambda path=path: Artifact.open(path)) == "E_OPEN"


def test_a_file_is_opened_once(tmp_path: Path, sample: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, never waiting, not inherited; everything that is read comes through that descriptor."""
    (tmp_path / "m.mle").write_bytes(sample)
    opened: list[tuple[Any, ...]] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *given, **options: (opened.append(given), real(*given, **options))[1])
    Artifact.open(tmp_path / "m.mle").close()
    assert opened == [(str(tmp_path / "m.mle"), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)]


def test_sizes_are_checked_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, load: Load, sample: bytes
) -> None:
    asked: list[int] = []
    real = compression.allocate
    monkeypatch.setattr(compression, "allocate", lambda size, *, what: (asked.append(size), real(size, what=what))[1])
    layout = [change for code, change in BROKEN if code.startswith(("E_SECTION_", "E_FILE_"))]
    assert len(layout) > 15
    for change in layout:
        parts = split(sample)
        change(parts)
        assert code_of(lambda parts=parts: load(join(parts))).startswith(("E_SECTION_", "E_FILE_"))
    assert set(asked) == {header.SIZE}


HOSTILE = [
    "__class__",
    "__init__",
    "os.system",
    "{0.__class__}",
    "%s%n",
    "../../etc/passwd",
    "http://localhost/x",
    "$(id)",
]
WATCHED = """
import sys
from mlec.artifact import Artifact

def look(path):
    with Artifact.open(path) as artifact:
        artifact.describe()
        return [name for name in artifact.tensors if artifact.tensors[name] is not None]

path, *wanted = sys.argv[1:]
look(path)
events = set()
sys.addaudithook(lambda event, args: events.add((event, str(args[0]) if event == "open" else "")))
names = look(path)
print(names[len(names) - len(wanted) :] == wanted, sorted(events))
"""


def test_names_and_keys_in_a_file_are_data_and_nothing_else(tmp_path: Path, parts: Parts) -> None:
    """Whatever they say, the interpreter reports no import, attribute, process or file but those of every file."""
    seen = []
    for names in ([], HOSTILE):
        path = tmp_path / "m.mle"
        for name in names:
            parts.metadata[name] = {name: [name]}
            parts.tensors.append(parts.tensor("empty") | {"name": name, "off": -(-len(parts.weights) // 64) * 64})
        if names:
            parts.weights += bytes(-len(parts.weights) % 64)
            parts.metadata["targets"][0] = {"triple": names[0], names[5]: names[3]}
            parts.graph["ir"] = "".join(names)
        path.write_bytes(join(parts))
        words = [sys.executable, "-c", WATCHED, str(path), *names]
        seen.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert seen[0] == seen[1]
    assert seen[0].startswith("True ")
    opened = [
        path for path in re.findall("'open', '([^']*)'", seen[0]) if not path.isdigit()
    ]  # descriptors that are open
    assert opened == [str(tmp_path / "m.mle")]


def test_symbolic_links(tmp_path: Path, sample: bytes) -> None:
    (tmp_path / "m.mle").write_bytes(sample)
    (tmp_path / "link.mle").symlink_to("m.mle")
    with Artifact.open(tmp_path / "link.mle") as artifact:
        assert artifact.path == str(tmp_path / "m.mle")
    with pytest.raises(SecurityError) as caught:
        Artifact.open(tmp_path / "link.mle", follow_symlinks=False)
    assert caught.value.code == "E_SYMLINK"
    Artifact.open(tmp_path / "m.mle", follow_symlinks=False).close()


def test_corruption_says_what_is_intact(load: Load, sample: bytes) -> None:
    data = bytearray(sample)
    offset = struct.unpack_from("<Q", data, 44)[0]
    data[offset + 3] ^= 1
    with pytest.raises(CorruptedFileError) as caught:
        load(bytes(data))
    assert caught.value.code == "E_CRC_WEIGHTS"
    assert caught.value.notes == ("intact: metadata, graph, kernels", "damaged tensors (1 of 5): w")
    data = bytearray(sample)
    data[128] ^= 1
    with pytest.raises(CorruptedFileError) as caught:
        load(bytes(data), verify="fast")
    assert caught.value.notes == ("intact: graph, kernels",)


def test_fast_mode_checks_a_tensor_when_it_is_first_asked_for(load: Load, parts: Parts) -> None:
    weights_byte(0, 9, seal=False)(parts)
    artifact = load(join(parts), verify="fast")
    assert artifact.tensors["idx"].tolist() == [0, 1, 2, 3, 4]
    assert code_of(lambda: artifact.tensors["w"]) == "E_TENSOR_CRC"


SECOND_LOOKS = ("E_CRC_WEIGHTS", "E_TENSOR_CRC", "E_TENSOR_DIGEST")


def settled(load: Load, data: bytes) -> None:
    load(data, verify="once", wait=False).settle()


def test_once_makes_all_checks_but_those_of_bytes_that_the_digest_covers(load: Load, sample: bytes) -> None:
    for code, change in BROKEN:
        parts = split(sample)
        change(parts)
        if code in SECOND_LOOKS:
            assert load(join(parts), verify="once").tensors["w"].size
        else:
            assert code_of(partial(load, join(parts), verify="once")) == code
            assert code_of(partial(settled, load, join(parts))) == code
    parts = split(sample)
    parts.tensor("mask")["crc32"] = 0  # its bytes are looked at in any case
    assert code_of(lambda: load(join(parts), verify="once")) == "E_TENSOR_CRC"


def test_once_looks_at_every_byte_of_the_weights(load: Load, sample: bytes) -> None:
    start, size = struct.unpack_from("<QQ", sample, 44)
    for position in range(size):
        data = bytearray(sample)
        data[start + position] ^= 1
        assert code_of(partial(load, bytes(data), verify="once")) == "E_CRC_WEIGHTS"


def test_what_did_not_wait_gives_no_weights_unchecked(tmp_path: Path) -> None:
    """Whoever is the first to ask, and again; wherever the damage is, of those pieces that are hashed side by side."""
    asking: tuple[Callable[[Artifact], object], ...] = (
        lambda artifact: artifact.tensors, Artifact.settle, lambda artifact: artifact.check_tensors(["w"]),
    )  # fmt: skip
    path = tmp_path / "m.mle"
    write(path, metadata={}, graph="", tensors={"w": np.arange(3 << 18, dtype=np.int64)})  # 6 MiB
    start, size = struct.unpack_from("<QQ", path.read_bytes(), 44)
    for place in (0, size // 2, size - 1):
        data = bytearray(path.read_bytes())
        data[start + place] ^= 1
        (tmp_path / "other.mle").write_bytes(data)
        artifact = Artifact.open(tmp_path / "other.mle", verify="once", wait=False)
        for ask in asking:
            with pytest.raises(CorruptedFileError, match="weights") as caught:
                ask(artifact)
            assert caught.value.code == "E_CRC_WEIGHTS"
            assert caught.value.loc == str(tmp_path / "other.mle")
    sound = Artifact.open(path, verify="once", wait=False)
    assert sound.unchecked_tensors()["w"][-1] == sound.tensors["w"][-1] == (3 << 18) - 1


def test_caps_that_are_too_large_to_reach_in_a_test(monkeypatch: pytest.MonkeyPatch, load: Load, parts: Parts) -> None:
    data = join(parts)
    for name, value, code in (
        ("JSON_VALUES", 20, "E_JSON_COUNT"),
        ("TENSORS", 4, "E_TENSOR_COUNT"),
        ("KERNELS", 1, "E_KERNEL_COUNT"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, value)
            assert code_of(lambda: load(data)) == code
    assert code_of(lambda: json_safe.parse(b"[1]", what="x", max_bytes=2)) == "E_JSON_CAP"


def test_machines_that_cannot_read_the_file(monkeypatch: pytest.MonkeyPatch, load: Load, sample: bytes) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "byteorder", "big")
        assert code_of(lambda: load(sample)) == "E_BYTE_ORDER"
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert code_of(lambda: load(sample, copy_weights=True)) == "E_NO_MEMORY"


@pytest.mark.parametrize("step", ["check_file_size", "_writable_by_others", "mmap"])
def test_a_file_that_changes_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sample: bytes, step: str
) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    module = {"check_file_size": header, "mmap": mapped.mmap}.get(step, reader)
    original = getattr(module, step)

    def truncate(*args: Any, **options: Any) -> Any:
        if step == "mmap":
            os.truncate(path, 200)
        result = original(*args, **options)
        os.truncate(path, 200)
        return result

    monkeypatch.setattr(module, step, truncate)
    assert code_of(lambda: Artifact.open(path)) == "E_CHANGED"


def test_file_systems_without_maps(monkeypatch: pytest.MonkeyPatch, load: Load, sample: bytes) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(19, "No such device")

    monkeypatch.setattr(mapped.mmap, "mmap", refuse)
    assert load(sample).tensors["w"].sum() == 66


def test_a_file_without_a_name(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "gone" / "m.mle"
    path.parent.mkdir()
    path.write_bytes(sample)
    with open(path, "rb") as file:
        path.unlink()
        path.parent.rmdir()
        with Artifact.open(f"/proc/self/fd/{file.fileno()}") as artifact:
            assert artifact.writable_by_others
            assert artifact.tensors["w"].sum() == 66


def test_a_disk_that_fails(monkeypatch: pytest.MonkeyPatch, load: Load, sample: bytes) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(reader.io, "FileIO", Failing)
    assert code_of(lambda: load(sample)) == "E_READ"


def test_options_are_checked(load: Load, sample: bytes) -> None:
    assert code_of(lambda: load(sample, verify="none")) == "E_USAGE"


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b'\\"' * 4_000_000,
        b"[" * 8_000_000,
        b'{"a":' * 1_500_000,
        b"-" + b"1" * 8_000_000,
        b"0." + b"3" * 8_000_000,
        b"[" + b"0," * 5_000_000 + b"0]",
        b'"' + b"\\" * 8_000_001,
        b'{"' + b'":0,"'.join(str(i).encode() for i in range(500_000)) + b'":0,"7":0}',
    ],
    ids=["quotes", "arrays", "objects", "integer", "fraction", "count", "backslashes", "keys"],
)
def test_hostile_json_is_refused_in_linear_time(text: bytes) -> None:
    start = time.process_time()
    with pytest.raises(CorruptedFileError):
        json_safe.parse(text, what="metadata", max_bytes=limits.SECTION_BYTES["metadata"])
    assert time.process_time() - start < 10


def test_json_strings_keep_what_is_allowed() -> None:
    text = rb'["\u00e9\ud83d\ude00", "\\u0000", "\\\\ud800", "a\"b", "{[,]}"]'
    assert json_safe.parse(text, what="x", max_bytes=1000) == ["é😀", "\\u0000", "\\\\ud800", 'a"b', "{[,]}"]


def test_integer_limits_are_exact() -> None:
    for value in (2**64 - 1, -(2**63), 0):
        assert json_safe.parse(str(value).encode(), what="x", max_bytes=100) == value


def test_large_indexes_load(tmp_path: Path, parts: Parts, load: Load) -> None:
    entry = dict(parts.tensor("empty"), off=0)
    parts.graph["tensors"] = [dict(entry, name=f"t{i}") for i in range(20_000)]
    parts.weights.clear()
    assert len(load(join(parts)).tensors) == 20_000


def test_every_code_is_tested_and_documented() -> None:
    checking = [
        *(ROOT / "mlec" / "artifact").glob("*.py"),
        ROOT / "mlec" / "packaging" / "loading.py",
        ROOT / "mlec" / "packaging" / "recompiling.py",
        ROOT / "mlec" / "runtime" / "objects.py",
    ]
    source = "".join(path.read_text() for path in checking)
    written = set(re.findall(r'"(E_[A-Z0-9_]+)"', source))
    written |= {f"E_CRC_{name}" for name in ("METADATA", "GRAPH", "WEIGHTS", "KERNELS", "SIGNATURE")}
    written |= {f"E_DIGEST_{name}" for name in ("GRAPH", "WEIGHTS", "KERNELS")}
    written |= {"E_DIGEST_ALG", "E_SIG_ALG", "E_AEAD_ALG"}
    testing = [
        *Path(__file__).parent.glob("test_*.py"),
        ROOT / "tests" / "e2e" / "test_variants.py",
        ROOT / "tests" / "packaging" / "test_code_cache.py",
        ROOT / "tests" / "runtime" / "test_objects.py",
    ]
    tests = "".join(path.read_text() for path in testing)
    documented = set(re.findall(r"^\| `(E_[A-Z0-9_]+)` \|", (ROOT / "docs" / "format.md").read_text(), re.MULTILINE))
    assert written - set(re.findall(r'"(E_[A-Z0-9_]+)"', tests)) == set()
    assert written == documented


LISTED = (
    (ROOT / "docs" / "format.md").read_text().partition("### What shows that each is made")[2].partition("## 8.")[0]
)
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", LISTED, re.MULTILINE)
"""Number, what is checked, code or guarantee, and tests of each check."""


def test_every_check_is_listed_once() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 82))


@pytest.mark.parametrize(("what", "codes", "tests"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_every_check_names_tests_that_there_are(what: str, codes: str, tests: str) -> None:
    """And its codes are in their files; a scenario among the tests is one."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)(?:\[([\w-]+)\])?`", tests)
    assert ", ".join(f"`{file}::{name}{f'[{case}]' if case else ''}`" for file, name, case in named) == tests
    texts = []
    for file, name, case in named:
        text = (ROOT / "tests" / ("artifact" if "/" not in file else "") / file).read_text()
        assert re.search(rf"^(    )?def {name}\(", text, re.MULTILINE), f"{file} has no {name}"
        if case:
            text += (ROOT / "tests" / "faults" / "scenarios.py").read_text()
            assert f'"{case}": Scenario(' in text
        texts.append(text)
    assert texts, what
    for code in re.findall(r"`(E_\w+)`", codes):
        assert any(f'"{code}"' in text for text in texts), f"no test names {code}"

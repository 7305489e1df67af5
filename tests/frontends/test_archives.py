"""Zip archives made to do harm are refused before anything of them is unpacked."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest

from mlec.errors import FrontendError
from mlec.frontends import archives
from mlec.frontends.archives import checked_archive, entry_names, read_json, written_anew

PATH = Path("m.zip")


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return made.getvalue()


def refused(data: bytes, name: str = "schema.json") -> FrontendError:
    with pytest.raises(FrontendError) as caught, checked_archive(io.BytesIO(data), PATH) as archive:
        read_json(archive, name, PATH)
    assert caught.value.hint
    assert "m.zip" in caught.value.message
    return caught.value


def put(data: bytes, offset: int, value: bytes) -> bytes:
    """With other bytes in the record of the first entry in the list at the end."""
    at = data.index(b"PK\1\2") + offset
    return data[:at] + value + data[at + len(value) :]


SCHEMA = {"schema.json": b'{"a": 1}'}
METHOD, FLAGS, SIZE, LOCAL = 10, 8, 24, 42
"""Places in such a record: how it is compressed, flags, the size that it unpacks to, where its content is."""


def test_an_archive_in_order() -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with checked_archive(io.BytesIO(zipped(SCHEMA, method)), PATH) as archive:
            assert read_json(archive, "schema.json", PATH) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (zipped({"../x": b""}), "E_FILE_PATH"),
        (zipped({"a/../../x": b""}), "E_FILE_PATH"),
        (zipped({"/etc/x": b""}), "E_FILE_PATH"),
        (zipped({"a\\..\\x": b""}), "E_FILE_PATH"),
        (zipped({"c:x": b""}), "E_FILE_PATH"),
        (zipped({"a_x": b""}).replace(b"a_x", b"a\0x"), "E_FILE_PATH"),
        (zipped({"a": b"", "A": b""}), "E_FILE_TWICE"),
        (zipped({"a": b"", "b": b""}).replace(b"b", b"a"), "E_FILE_TWICE"),
        (zipped({"a": bytes(1 << 22)}, zipfile.ZIP_DEFLATED), "E_FILE_SIZE"),
        (put(zipped(SCHEMA), SIZE, struct.pack("<I", 1 << 31)), "E_FILE_SIZE"),
        (zipped(SCHEMA, zipfile.ZIP_BZIP2), "E_FILE"),
        (zipped(SCHEMA, zipfile.ZIP_LZMA), "E_FILE"),
        (put(zipped(SCHEMA), METHOD, b"\x63\0"), "E_FILE"),
        (put(zipped(SCHEMA), FLAGS, b"\1\0"), "E_FILE"),
        (put(zipped(SCHEMA), LOCAL, b"\xff\xff\0\0"), "E_FILE"),
        (zipped(SCHEMA).replace(b'"a": 1', b'"a": 2', 1), "E_FILE"),
        (zipped(SCHEMA)[:-1], "E_FILE"),
        (zipped({}), "E_FILE"),
        (b"PK\3\4" + bytes(100), "E_FILE"),
        (b"", "E_FILE"),
        (zipped({"schema.json": b"{"}), "E_FILE_JSON"),
        (zipped({"schema.json": b"\xff"}), "E_FILE_JSON"),
        (zipped({"schema.json": b"9" * 10_000}), "E_FILE_JSON"),
        (zipped({"schema.json": b"[" * 100_000}), "E_FILE_JSON"),
        (zipped({"schema.json": b"[" * 100_000 + b"]" * 100_000}), "E_FILE_JSON"),
    ],
)  # fmt: skip
def test_each_harm_has_its_code(data: bytes, code: str) -> None:
    assert refused(data).code == code


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_written_anew(method: int) -> None:
    entries = {"a/schema.json": b'{"a": 1}', "a/é": bytes(5_000), "a/empty": b""}
    data = b"in front" + zipped(entries, method)
    with written_anew(io.BytesIO(data), PATH) as copy, zipfile.ZipFile(copy) as archive:
        assert {entry.filename: archive.read(entry) for entry in archive.infolist()} == entries
        assert archive.infolist()[0].header_offset == 0


def test_what_is_unpacked_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "COPY_FREE_BYTES", 10_000)
    with pytest.raises(FrontendError, match="unpacks to 50000") as caught:
        written_anew(io.BytesIO(zipped({"a": bytes(50_000)}, zipfile.ZIP_DEFLATED)), PATH)
    assert caught.value.code == "E_FILE_SIZE"


def test_no_memory_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", lambda name: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(FrontendError, match=r"m\.zip cannot be copied to memory: No space left") as caught:
        written_anew(io.BytesIO(zipped({"a": bytes(50_000)})), PATH)
    assert caught.value.code == "E_FILE"


def test_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "JSON_VALUES", 10)
    assert refused(zipped({"schema.json": b"[" + b"[]," * 20 + b"0]"})).code == "E_FILE_JSON"
    monkeypatch.setattr(archives, "MAX_JSON", 7)
    assert "has 8 bytes" in refused(zipped(SCHEMA)).message


def test_a_list_of_entries_that_takes_all_memory() -> None:
    """46 bytes of the file would become an object of `zipfile` each."""
    one = zipped({"a": b""})
    record = one[one.index(b"PK\1\2") : one.index(b"PK\5\6")]
    count = archives.MAX_DIRECTORY // len(record) + 1
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, count * len(record), one.index(b"PK\1\2"), 0)
    start = time.process_time()
    assert "list of its entries" in refused(one[: one.index(b"PK\1\2")] + record * count + end).message
    assert time.process_time() - start < 2


def test_content_that_is_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ZipFile.read` would unpack all of it."""
    data = put(zipped({"schema.json": b" " * 50_000_000}, zipfile.ZIP_DEFLATED), SIZE, struct.pack("<I", 100))
    asked: list[int] = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: (asked.append(n), read(self, n))[1])
    assert refused(data).code in ("E_FILE", "E_FILE_JSON")
    assert asked == [101]


def test_a_missing_entry() -> None:
    assert "has no entry 'other.json'" in refused(zipped(SCHEMA), "other.json").message


def test_names_of_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"", b"PK\3\4", b"PK\3\4" + bytes(50), b"text", zipped(SCHEMA)[:-3]):
        path.write_bytes(data)
        assert entry_names(path) == []
    path.write_bytes(zipped(SCHEMA))
    assert entry_names(path) == ["schema.json"]
    assert entry_names(tmp_path / "absent") == []


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def test_damaged_archives_never_escape_the_error_tree() -> None:
    rng = random.Random(0)
    whole = zipped({**SCHEMA, "a.npy": bytes(40), "b.npy": bytes(3)}, zipfile.ZIP_DEFLATED)
    refusals = 0
    for _ in range(2000):
        try:
            with checked_archive(io.BytesIO(_flipped(rng, whole)), PATH) as archive:
                read_json(archive, "schema.json", PATH)
        except FrontendError:
            refusals += 1
    assert 500 < refusals < 2000

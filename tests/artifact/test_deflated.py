"""Graph and kernels as streams of zlib, which is how they are stored unless something else is asked for."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.artifact import Artifact, KernelBlob, Storage, deflated, limits, packed_sections
from mlec.artifact.header import ZLIB
from mlec.artifact.recovery import recover
from mlec.errors import CorruptedFileError
from tests.artifact.conftest import made
from tests.artifact.mutants import KEY, second_opinion
from tests.artifact.surgery import Parts, compressed, dumps, join, split

GOLDEN = Path(__file__).parents[1] / "artifacts" / "zlib.mle"
NOISE = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
CONTENT: dict[str, Any] = {
    "metadata": {"targets": ["any"]},
    "tensors": {"ramp": np.arange(3000, dtype=np.int32), "mask": np.arange(99) % 7 == 0},
    "kernels": [KernelBlob(6, 0, bytes(range(64)) * 80)],
    "graph": "graph text " * 400,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("packed"), **CONTENT)


def check_content(artifact: Artifact) -> None:
    assert artifact.graph == CONTENT["graph"]
    assert list(artifact.kernels) == CONTENT["kernels"]
    assert {entry.codec for entry in artifact.tensors.entries} == {"raw"}
    for name, array in CONTENT["tensors"].items():
        np.testing.assert_array_equal(artifact.tensors[name], array)


def test_what_is_written_is_what_is_read(packed: bytes, load: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = load(packed)
    check_content(artifact)
    assert artifact.header.compressions == ["zlib"]
    assert artifact.header.codecs == ZLIB << 2 | ZLIB << 6
    assert made(tmp_path, **CONTENT) == packed
    assert join(split(packed)) == packed


def test_the_golden_file_stays_readable() -> None:
    with Artifact.open(GOLDEN) as artifact:
        check_content(artifact)


@pytest.mark.parametrize(
    "data", [b"", bytes(deflated.LEAST - 1), NOISE, bytes(64 << 20)], ids=["none", "few", "noise", "bomb"]
)
def test_what_is_stored_as_it_is(data: bytes) -> None:
    """Little, what saves nothing, and what readers would take for a bomb."""
    assert packed_sections.encode(data, zstd=False) == (0, data)


def test_a_long_section_comes_back(load: Callable[..., Artifact], tmp_path: Path) -> None:
    data = (NOISE + bytes(5000)) * 500
    artifact = load(made(tmp_path, **CONTENT | {"kernels": [KernelBlob(6, 0, data)]}))
    assert artifact.kernels[0].data == data


def test_it_is_read_without_any_library(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.mle").write_bytes(packed)
    code = (
        f"import sys, mlec.artifact as a; a.Artifact.open({str(tmp_path / 'm.mle')!r}); "
        "print([m for m in sys.modules if m.partition('.')[0] in ('cryptography', 'backports', 'compression')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("header", [True, False])
def test_it_is_recovered(packed: bytes, tmp_path: Path, header: bool) -> None:
    (tmp_path / "d.mle").write_bytes(packed if header else bytes(128) + packed[128:])
    found = recover(tmp_path / "d.mle")
    assert found.graph == CONTENT["graph"]
    assert set(found.tensors) == set(CONTENT["tensors"])


def test_what_no_graph_holds_is_not_decoded_to_find_its_end(packed: bytes, tmp_path: Path) -> None:
    """Where the header is lost, only the stream tells: a short one may claim a terabyte."""
    start = packed.index(b"MLEZ")
    maker = zlib.compressobj(9)
    bomb = b"".join(maker.compress(bytes(1 << 20)) for _ in range(64)) + maker.flush()
    for size in (64 << 20, 1 << 40):
        data = packed[:start] + b"MLEZ" + struct.pack("<Q", size) + bomb
        (tmp_path / "d.mle").write_bytes(bytes(128) + data[128:])
        tracemalloc.start()
        with pytest.raises(CorruptedFileError) as caught:
            recover(tmp_path / "d.mle")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.code == "E_NOTHING_INTACT"
        assert peak < 16 << 20


# -- what is refused -------------------------------------------------------------------------------------------------


def stream(data: bytes, size: int | None = None, **options: Any) -> bytes:
    maker = zlib.compressobj(**options)
    return b"MLEZ" + struct.pack("<Q", len(data) if size is None else size) + maker.compress(data) + maker.flush()


def graph_as(make: Callable[[bytes], bytes]) -> Callable[[Parts], None]:
    return lambda parts: parts.frames.update(graph=make(dumps(parts.graph)))


BROKEN: list[tuple[str, Callable[[Parts], None]]] = [
    ("E_SECTION_ZLIB", graph_as(lambda data: b"MLEZ")),
    ("E_SECTION_ZLIB", graph_as(lambda data: b"MLEK" + stream(data)[4:])),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data)[12:])),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data)[:-1])),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data)[:-5] + b"\0" + stream(data)[-4:])),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data)[:-4] + b"ABCD")),  # its own checksum
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data) + b"\0")),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data) + stream(data)[12:])),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data, len(data) - 1))),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data, len(data) + 1))),
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data, wbits=-15))),  # without its header
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data, wbits=31))),  # of gzip
    ("E_SECTION_ZLIB", graph_as(lambda data: stream(data, zdict=b"graph text"))),
    ("E_SECTION_RAW", graph_as(lambda data: stream(bytes(200 << 20)))),
    ("E_SECTION_RAW", graph_as(lambda data: stream(data, 1 << 63))),
    ("E_SECTION_RAW", graph_as(lambda data: stream(NOISE))),
    ("E_JSON_SYNTAX", graph_as(lambda data: stream(data + b"{}"))),
    ("E_KERNEL_MAGIC", lambda parts: parts.frames.update(kernels=stream(bytes(5000)))),
]


@pytest.mark.parametrize(("code", "change"), BROKEN, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BROKEN)])
def test_broken_rule(packed: bytes, load: Callable[..., Artifact], code: str, change: Callable[[Parts], None]) -> None:
    parts = split(packed)
    load(join(parts)).close()
    change(parts)
    with pytest.raises(CorruptedFileError) as caught:
        load(join(parts))
    assert caught.value.code == second_opinion(join(parts)) == code


def test_a_size_above_the_cap_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = compressed(bytes(20_000), ZLIB)
    monkeypatch.setitem(limits.SECTION_BYTES, "graph", 10_000)
    monkeypatch.setattr(packed_sections.compression, "allocate", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(CorruptedFileError) as caught:
        packed_sections.decode(stored, ZLIB, name="graph")
    assert caught.value.code == "E_SECTION_RAW"


def test_zstd_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    data = made(tmp_path, Storage("zstd"), **CONTENT)
    assert split(data).codecs == {}
    assert set(split(data).frames) == {"graph", "kernels"}


def test_an_encrypted_file_is_compressed_as_another_one(load: Callable[..., Artifact], tmp_path: Path) -> None:
    data = made(tmp_path, Storage(key=KEY), **CONTENT)
    assert split(data, KEY.secret).codecs == {"graph": ZLIB, "kernels": ZLIB}
    assert second_opinion(data) == ""
    check_content(load(data, key=KEY))
    (tmp_path / "d.mle").write_bytes(data[:100] + b"\1" + data[101:])  # its header is damaged
    found = recover(tmp_path / "d.mle", KEY)
    assert (found.lost, found.graph) == (["header"], CONTENT["graph"])

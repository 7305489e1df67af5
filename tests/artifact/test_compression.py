"""Compressed files: what is stored so, that it is what was written, and that no declared size is believed unchecked."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd

from mlec.artifact import Artifact, KernelBlob, Storage, compression, limits, packed_sections, write
from mlec.artifact.header import ZSTD
from mlec.errors import CorruptedFileError, MlecError, RuntimeUnavailableError, UsageError
from tests.artifact.conftest import made
from tests.artifact.mutants import second_opinion
from tests.artifact.surgery import Parts, dumps, join, split

GOLDEN = Path(__file__).parents[1] / "artifacts" / "zstd.mle"
RAMP = np.arange(3000, dtype=np.int32)
NOISE = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
CONTENT: dict[str, Any] = {
    "tensors": {"ramp": RAMP, "noise": NOISE, "mask": RAMP % 7 == 0, "scalar": np.array(2.5), "empty": RAMP[:0]},
    "kernels": [KernelBlob(6, 0, bytes(range(64)) * 40)],
    "graph": "graph text " * 40,
}
CODECS = {"ramp": "zstd", "noise": "raw", "mask": "zstd", "scalar": "raw", "empty": "raw"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("packed"), Storage("zstd"), **CONTENT)


def test_what_is_written_is_what_is_read(packed: bytes, load: Callable[..., Artifact]) -> None:
    for verify in ("full", "fast"):
        artifact = load(packed, verify=verify)
        assert {entry.name: entry.codec for entry in artifact.tensors.entries} == CODECS
        for name, array in CONTENT["tensors"].items():
            read = artifact.tensors[name]
            assert read.dtype == array.dtype
            assert read.flags.writeable is False
            assert read.ctypes.data % 64 == 0
            np.testing.assert_array_equal(read, array)
        assert artifact.graph == CONTENT["graph"]
        assert list(artifact.kernels) == CONTENT["kernels"]
        assert artifact.describe()["flags"] == ["KERNELS", "COMPRESSED"]


def test_the_same_input_gives_the_same_smaller_file(packed: bytes, tmp_path: Path) -> None:
    assert made(tmp_path, Storage("zstd"), **CONTENT) == packed
    assert len(packed) < 0.7 * len(made(tmp_path, **CONTENT))


def test_the_other_implementation_agrees(packed: bytes) -> None:
    assert join(split(packed)) == packed


def test_the_golden_file_stays_readable() -> None:
    with Artifact.open(GOLDEN) as artifact:
        assert artifact.graph == CONTENT["graph"]
        assert {entry.name: entry.codec for entry in artifact.tensors.entries} == CODECS
        for name, array in CONTENT["tensors"].items():
            np.testing.assert_array_equal(artifact.tensors[name], array)
        assert artifact.kernels[0].data == CONTENT["kernels"][0].data
    assert join(split(GOLDEN.read_bytes())) == GOLDEN.read_bytes()


def test_what_is_not_compressed_stays_mapped(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "mapped.mle").write_bytes(packed)
    with Artifact.open(tmp_path / "mapped.mle") as artifact:
        where = artifact.tensors["noise"].ctypes.data
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "mapped.mle" in line]
        ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
        assert any(start <= where < end for start, end in ranges)


def test_a_tensor_is_decoded_once_while_it_is_used(packed: bytes, load: Callable[..., Artifact]) -> None:
    artifact = load(packed)
    first = artifact.tensors["ramp"]
    assert artifact.tensors["ramp"] is first
    artifact.close()
    np.testing.assert_array_equal(first, RAMP)


def test_checking_a_large_tensor_takes_little_memory(tmp_path: Path) -> None:
    array = np.arange(4 << 20, dtype=np.int32)
    write(tmp_path / "m.mle", metadata={}, graph="", tensors={"a": array}, storage=Storage("zstd"))
    tracemalloc.start()
    try:
        with Artifact.open(tmp_path / "m.mle") as artifact:
            assert tracemalloc.get_traced_memory()[1] < 6 << 20
            np.testing.assert_array_equal(artifact.tensors["a"], array)
    finally:
        tracemalloc.stop()


def test_nothing_to_save_gives_a_plain_file(tmp_path: Path) -> None:
    data = made(tmp_path, Storage("zstd"), tensors={"noise": NOISE}, kernels=[], graph="é")
    parts = split(data)
    assert not parts.frames or [e["codec"] for e in parts.tensors] == ["raw"]


def test_ways_to_compress_are_checked() -> None:
    for odd in ("gzip", "", True, 9):
        with pytest.raises(UsageError, match="compression takes None or 'zstd'"):
            Storage.of({"compression": odd})


# -- what is refused -------------------------------------------------------------------------------------------------


def frame(data: bytes, **parameters: int) -> bytes:
    return zstd.compress(data, options={getattr(zstd.CompressionParameter, k): v for k, v in parameters.items()})


def bomb(parts: Parts) -> None:
    """256 MiB in 8 kB."""
    parts.store("ramp", frame(bytes(256 << 20)), shape=[256 << 20], dtype="u8", raw=256 << 20)


def ramp_as(data: bytes) -> Callable[[Parts], None]:
    return lambda parts: parts.store("ramp", data)


def graph_as(make: Callable[[bytes], bytes]) -> Callable[[Parts], None]:
    return lambda parts: parts.frames.update(graph=make(dumps(parts.graph)))


GOOD = frame(RAMP.tobytes())
BROKEN: list[tuple[str, Callable[[Parts], None]]] = [
    ("E_CODEC_WEIGHTS", lambda parts: parts.header.update({"codecs": 0b01000100})),
    ("E_CODEC_WEIGHTS", lambda parts: [parts.store(n, b"".ljust(s), codec="raw", raw=s) for n, s in (("ramp", 12000), ("mask", 3000))]
        and parts.header.update({"codecs": 0b01010100})),
    ("E_TENSOR_RATIO", bomb),
    ("E_TENSOR_RATIO", lambda parts: parts.tensor("ramp").update(size=0)),
    ("E_TENSOR_RATIO", lambda parts: parts.store("noise", frame(NOISE.tobytes()), codec="zstd")),  # saves nothing
    ("E_TENSOR_RAW", lambda parts: parts.tensor("ramp").update(raw=11999)),
    ("E_TENSOR_ZSTD", ramp_as(frame(RAMP.tobytes()[:-4]))),  # holds less than it must
    ("E_TENSOR_ZSTD", ramp_as(frame(RAMP.tobytes() + b"1234"))),
    ("E_TENSOR_ZSTD", ramp_as(frame(RAMP.tobytes(), content_size_flag=0))),
    ("E_TENSOR_ZSTD", ramp_as(GOOD + b"\0")),
    ("E_TENSOR_ZSTD", ramp_as(GOOD + frame(b"x" * 9))),
    ("E_TENSOR_ZSTD", ramp_as(GOOD + bytes.fromhex("502a4d1800000000"))),  # a frame to be skipped
    ("E_TENSOR_ZSTD", ramp_as(bytes.fromhex("502a4d1800000000") + GOOD)),
    ("E_TENSOR_ZSTD", ramp_as(GOOD[:-1])),
    ("E_TENSOR_ZSTD", ramp_as(GOOD[:3])),
    ("E_TENSOR_ZSTD", ramp_as(GOOD[:4] + b"\x61\0" + GOOD[5:])),  # a dictionary named 0
    ("E_TENSOR_ZSTD", ramp_as(GOOD[:20] + b"\xff" * 40 + GOOD[60:])),
    ("E_TENSOR_ZSTD", ramp_as(b"no frame at all")),
    ("E_TENSOR_CRC", ramp_as(frame(RAMP[::-1].tobytes()))),
    ("E_TENSOR_DIGEST", lambda parts: parts.tensor("ramp").update(sha256="0" * 64)),
    ("E_TENSOR_BOOL", lambda parts: (parts.store("mask", frame(b"\2" * 3000)), parts.seal_tensors())),
    ("E_SECTION_ZSTD", graph_as(lambda data: frame(data, content_size_flag=0))),
    ("E_SECTION_ZSTD", graph_as(lambda data: frame(data) + b"\0")),
    ("E_SECTION_ZSTD", graph_as(lambda data: frame(data)[:-1])),
    ("E_SECTION_ZSTD", graph_as(lambda data: b"no frame")),
    ("E_SECTION_ZSTD", graph_as(lambda data: bytes.fromhex("502a4d1800000000"))),
    ("E_SECTION_RAW", graph_as(lambda data: frame(bytes(255 << 20)))),
    ("E_SECTION_RAW", graph_as(lambda data: frame(NOISE.tobytes()))),
    ("E_JSON_SYNTAX", graph_as(lambda data: frame(data + b"{}"))),
    ("E_KERNEL_MAGIC", lambda parts: parts.frames.update(kernels=frame(bytes(3000)))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "change"), BROKEN, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BROKEN)])
def test_broken_rule(packed: bytes, load: Callable[..., Artifact], code: str, change: Callable[[Parts], None]) -> None:
    parts = split(packed)
    load(join(parts)).close()
    change(parts)
    with pytest.raises(CorruptedFileError) as caught:
        load(join(parts))
    assert caught.value.code == second_opinion(join(parts)) == code


def test_a_size_above_the_cap_is_refused_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, packed: bytes, load: Callable[..., Artifact]
) -> None:
    parts = split(packed)
    parts.frames["graph"] = frame(NOISE.tobytes() * 4)
    monkeypatch.setitem(limits.SECTION_BYTES, "graph", 10_000)
    monkeypatch.setattr(compression, "allocate", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(CorruptedFileError) as caught:
        packed_sections.decode(parts.frames["graph"], ZSTD, name="graph")
    assert caught.value.code == "E_SECTION_RAW"


def test_many_tensors_together_are_bounded(
    monkeypatch: pytest.MonkeyPatch, packed: bytes, load: Callable[..., Artifact]
) -> None:
    monkeypatch.setattr(limits, "DECODED_WEIGHTS", 15_000)
    load(packed).close()
    monkeypatch.setattr(limits, "DECODED_WEIGHTS", 14_999)
    with pytest.raises(CorruptedFileError) as caught:
        load(packed)
    assert caught.value.code == "E_TENSOR_TOTAL"


def test_wide_windows_are_refused(load: Callable[..., Artifact], packed: bytes) -> None:
    """A decoder needs as much memory as the window is wide, whatever comes out at a time."""
    array = np.tile(NOISE, 2000)
    for log, fine in ((23, True), (24, False)):
        parts = split(packed)
        data = frame(array.tobytes(), window_log=log)
        parts.store("ramp", data, shape=[len(array)], dtype="u8", raw=len(array))
        parts.seal_tensors()
        if fine:
            load(join(parts)).close()
            continue
        with pytest.raises(CorruptedFileError, match="memory") as caught:
            load(join(parts))
        assert caught.value.code == "E_TENSOR_ZSTD"


def test_fast_mode_finds_a_broken_frame_when_it_is_first_asked_for(
    packed: bytes, load: Callable[..., Artifact]
) -> None:
    parts = split(packed)
    parts.store("ramp", GOOD[:-1])
    artifact = load(join(parts), verify="fast")
    assert artifact.tensors["mask"].sum() == 429
    with pytest.raises(CorruptedFileError) as caught:
        artifact.tensors["ramp"]
    assert caught.value.code == "E_TENSOR_ZSTD"


def test_corruption_names_the_tensor(packed: bytes, load: Callable[..., Artifact]) -> None:
    parts = split(packed)
    data = bytearray(packed)
    at = packed.index(bytes(parts.weights)) + parts.tensor("mask")["off"]
    data[at + 2] ^= 255
    with pytest.raises(CorruptedFileError) as caught:
        load(bytes(data))
    assert caught.value.notes[1] == "damaged tensors (1 of 5): mask"


def test_what_there_is_no_memory_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    array = np.arange(5 << 20, dtype=np.int32)
    write(tmp_path / "m.mle", metadata={}, graph="", tensors={"a": array}, storage=Storage("zstd"))
    monkeypatch.setattr(compression, "_available", lambda: 19 << 20)
    with Artifact.open(tmp_path / "m.mle", verify="fast") as artifact, pytest.raises(MlecError) as caught:
        artifact.tensors["a"]
    assert caught.value.code == "E_NO_MEMORY"


def test_without_the_library_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, packed: bytes, sample: bytes, load: Callable[..., Artifact], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    load(sample).close()
    for action in (lambda: load(packed), lambda: made(tmp_path, Storage("zstd"))):
        with pytest.raises(RuntimeUnavailableError, match=r"backports\.zstd") as caught:
            action()
        assert caught.value.code == "E_NO_ZSTD"
        assert "mlec[zstd]" in str(caught.value.hint)


def test_plain_files_need_no_library(tmp_path: Path, sample: bytes) -> None:
    (tmp_path / "m.mle").write_bytes(sample)
    code = (
        f"import sys, mlec.artifact as a; a.decide(a.Artifact.open({str(tmp_path / 'm.mle')!r})); "
        "print([m for m in sys.modules if m.partition('.')[0] in ('cryptography', 'backports', 'compression')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

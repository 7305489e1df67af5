"""Tensors of float32 whose numbers are all numbers of 16 bits take half the bytes, and come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest

from mlec.artifact import Artifact, write
from mlec.artifact.weights import MIN_HALVED, check_index
from mlec.errors import CorruptedFileError
from tests.artifact import second_reader

RNG = np.random.default_rng(0)
PLAIN = RNG.normal(size=(80, 80)).astype(np.float32)
BF16 = PLAIN.astype(ml_dtypes.bfloat16).astype(np.float32)
F16 = PLAIN.astype(np.float16).astype(np.float32)
SPECIAL = np.resize(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, 65504.0], np.float16), 7000).astype(np.float32)

NANS = (
    np.resize(np.array([0x7E00, 0x7E01, 0xFE55, 0x7FFF, 0xFFFF], np.uint16), 7000).view(np.float16).astype(np.float32)
)


def saved(path: Path, **tensors: np.ndarray) -> Artifact:
    write(path, metadata={}, graph="graph @g() -> () {}", tensors=tensors)
    return Artifact.open(path)


@pytest.mark.parametrize(
    ("array", "codec"),
    [(BF16, "bf16"), (F16, "f16"), (PLAIN, "raw"), (SPECIAL, "f16"), (NANS, "f16"), (BF16[:1], "raw"), (BF16.astype(np.float64), "raw"),
     (np.full(MIN_HALVED, 1e-44, np.float32), "raw"), (np.full(MIN_HALVED, np.float32(1e30)), "raw")],
)  # fmt: skip
def test_codec(tmp_path: Path, array: np.ndarray, codec: str) -> None:
    path = tmp_path / "m.mle"
    artifact = saved(path, w=array)
    (entry,) = artifact.tensors.entries
    assert entry.codec == codec
    assert entry.size == array.nbytes // (2 if codec != "raw" else 1)
    got = artifact.tensors["w"]
    assert got.dtype == array.dtype
    assert got.tobytes() == array.tobytes()
    artifact.tensors.check_all()
    second_reader.read(path.read_bytes())


@pytest.mark.parametrize(
    "changes", [{"dtype": "i32"}, {"size": 4}, {"codec": "bf16", "dtype": "f16", "raw": 2 * F16.size}]
)
def test_only_float32_of_twice_the_bytes(tmp_path: Path, changes: dict[str, object]) -> None:
    (entry,) = saved(tmp_path / "m.mle", w=F16).tensors.entries
    check_index([entry], entry.size, compressed=False)
    with pytest.raises(CorruptedFileError) as caught:
        check_index([msgspec.structs.replace(entry, **changes)], entry.size, compressed=False)
    assert caught.value.code == "E_TENSOR_SIZE"


def test_a_damaged_half_is_noticed(tmp_path: Path) -> None:
    artifact = saved(tmp_path / "m.mle", w=F16)
    (entry,) = artifact.tensors.entries
    section = np.array(artifact.tensors._section)
    section[entry.off] ^= 1
    damaged = type(artifact.tensors)([entry], section)
    assert damaged.damaged() == ["w"]
    with pytest.raises(CorruptedFileError, match="wrong checksum"):
        damaged["w"]

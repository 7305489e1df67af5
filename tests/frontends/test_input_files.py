"""Files given as models: their content decides what they are, and whatever they are ends in a clear error."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import pytest

from mlec.errors import FrontendError, MlecError, UntrustedPickleError, UsageError
from mlec.frontends import select
from mlec.frontends.base import LowerOptions
from mlec.frontends.pickles import digest, is_trusted
from mlec.frontends.select import load_model_file
from mlec.frontends.sklearn import files


def refused(path: Path, **options: object) -> MlecError:
    with pytest.raises(MlecError) as caught:
        load_model_file(path, LowerOptions(**options))  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return made.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(50), "an ONNX model"),
        (b"\x08\x0a:" + bytes(50), "an ONNX model"),
        (tar(), "a tar archive"),
        (b"\x40\0\0\0\0\0\0\0{\"w\": {}}", "safetensors"),
        (b"binf" + bytes(50), "binary format that XGBoost 3 reads no more"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"GGUF" + bytes(50), "GGUF"),
        (b"CBM1" + bytes(50), "CatBoost"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"MLE\0" + bytes(50), "a compiled model already"),
        (b"PK\3\4" + bytes(50), "a damaged zip archive"),
        (b"", "not a model file of a known kind"),
        (b"\0" * 100, "not a model file of a known kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:4].hex(),
)  # fmt: skip
def test_what_a_file_is_when_it_is_no_model(tmp_path: Path, data: bytes, what: str) -> None:
    for name in ("m.json", "m.pkl", "m.pt2"):  # the ending counts for nothing
        (tmp_path / name).write_bytes(data)
        error = refused(tmp_path / name, trust_pickle=True)
        assert error.code == "E_MODEL_FILE"
        assert what in error.message


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (
        tmp_path,
        tmp_path / "fifo",
        tmp_path / "loop",
        tmp_path / "absent",
        Path("/dev/zero"),
        tmp_path / ("n" * 300),
    ):
        assert refused(path).code == "E_MODEL_FILE"


@pytest.mark.parametrize(
    "head", [b"tree\nversion=v4\n", b'{"learner":', b"{L\0\0\0\0\0\0\0\x07learner{", b"graph @g(", b"PK\3\4"]
)
def test_a_file_larger_than_memory_is_not_read(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 42)
    assert refused(path).code == "E_NO_MEMORY"


def test_what_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"tree\nversion=v4\n")
    for error, code in ((PermissionError(13, "Permission denied"), "E_MODEL_FILE"), (MemoryError(), "E_NO_MEMORY")):

        def fail(error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(select, "_frontends", fail)
        assert refused(path).code == code


def test_compressed_heads_are_unpacked_within_bounds() -> None:
    zeros = bytes(2_000_000)
    for data in (zlib.compress(zeros), bz2.compress(zeros), lzma.compress(zeros)):
        assert len(files._plain(data[: 1 << 16])) <= files.HEAD_BYTES
    greedy = lzma.compress(b"x" * 100, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])
    assert files._plain(greedy) == b""


def test_permission_to_execute(tmp_path: Path) -> None:
    path, data = tmp_path / "m.pkl", b"data"
    assert is_trusted(path, data, True)
    assert not is_trusted(path, data, False)
    assert is_trusted(path, data, digest(data))
    assert is_trusted(path, data, "sha256:" + digest(data)[7:].upper())
    with pytest.raises(UntrustedPickleError, match="is not the file that you trust"):
        is_trusted(path, data, digest(b"other"))
    for text in ("yes", "sha256:", "sha256:" + "0" * 63, "md5:" + "0" * 64, "x" * 10_000):
        with pytest.raises(UsageError) as caught:
            is_trusted(path, data, text)
        assert len(caught.value.message) < 300


def test_the_bytes_of_the_digest_are_those_that_are_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is another one as soon as it has been read."""
    from sklearn.linear_model import LinearRegression

    good = pickle.dumps(LinearRegression())
    path = tmp_path / "m.pkl"
    path.write_bytes(good)
    read = Path.read_bytes

    def then_replaced(self: Path) -> bytes:
        data = read(self)
        self.write_bytes(b"\x80\x04cos\nabort\n(tR.")
        return data

    monkeypatch.setattr(Path, "read_bytes", then_replaced)
    assert isinstance(files.load(path, LowerOptions(trust_pickle=digest(good))), LinearRegression)
    with pytest.raises(FrontendError, match="is not the file that you trust"):
        files.load(path, LowerOptions(trust_pickle=digest(good)))

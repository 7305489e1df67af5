"""What is taken out of damaged files is right, and whatever is intact is found."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from mlec.artifact import Artifact, EncryptionKey, Storage, encryption
from mlec.artifact.recovery import Recovered, recover
from mlec.errors import ArtifactError, MlecError, RuntimeUnavailableError
from tests.artifact.conftest import CONTENT, made
from tests.artifact.mutants import KEY, corpus, flipped

Span = tuple[int, int]


def spans(data: bytes) -> dict[str, Span]:
    fields = struct.unpack_from("<10Q", data, 12)
    names = ("metadata", "graph", "weights", "kernels", "signature")
    return {name: (fields[2 * i], fields[2 * i] + fields[2 * i + 1]) for i, name in enumerate(names)}


def damaged(data: bytes, *places: int) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 0x5A
    return bytes(changed)


def recovered(folder: Path, data: bytes) -> Recovered:
    (folder / "d.mle").write_bytes(data)
    return recover(folder / "d.mle")


@pytest.fixture(params=[None, "zstd"])
def content(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    tensors = CONTENT["tensors"] | {"long": np.arange(3000)}
    return made(tmp_path, Storage(request.param), tensors=tensors, graph="text " * 50)


def test_a_sound_file_is_recovered_as_a_whole(content: bytes, tmp_path: Path) -> None:
    found = recovered(tmp_path, content)
    assert (found.complete, found.lost, found.graph) == (True, [], "text " * 50)
    assert found.metadata is not None
    assert found.metadata["name"] == "mlp é"
    for name, array in (CONTENT["tensors"] | {"long": np.arange(3000)}).items():
        np.testing.assert_array_equal(found.tensors[name], array)


def test_a_damaged_header_loses_nothing_else(content: bytes, tmp_path: Path) -> None:
    for header in (damaged(content[:128], 5), damaged(content[:128], 60, 124)):
        found = recovered(tmp_path, header + content[128:])
        assert found.lost == ["header"]
        assert found.complete
        assert len(found.tensors) == 6


def test_without_its_checksum_in_the_header_nothing_proves_the_metadata(content: bytes, tmp_path: Path) -> None:
    """That its digests are right says nothing about the rest of it."""
    for data in (bytes(128) + content[128:], damaged(content, 5, 93), damaged(content, 5, content.index(b"mlp"))):
        found = recovered(tmp_path, data)
        assert found.lost == ["header", "metadata"]
        assert (found.metadata, found.graph, len(found.tensors)) == (None, "text " * 50, 6)
        assert not found.complete


@pytest.mark.parametrize("section", ["metadata", "graph", "weights", "kernels"])
def test_one_damaged_section(content: bytes, tmp_path: Path, section: str) -> None:
    start, end = spans(content)[section]
    found = recovered(tmp_path, damaged(content, (start + end) // 2))
    assert (found.metadata is None) == (section == "metadata")
    assert (found.graph is None) == (section == "graph")
    assert len(found.tensors) == {"graph": 0, "weights": 5}.get(section, 6)
    assert found.complete == (section == "kernels")


def test_a_file_that_was_cut(content: bytes, tmp_path: Path) -> None:
    start, end = spans(content)["weights"]
    found = recovered(tmp_path, content[: start + 100])
    assert found.metadata is not None
    assert found.graph is not None
    assert "w" in found.tensors
    assert "tensor long" in found.lost
    assert end - start > 200


def test_nothing_wrong_is_ever_taken_out(tmp_path: Path) -> None:
    """Random damage: whatever comes out is what was there."""
    rng = random.Random(0)
    for data in corpus().values():
        whole = unsealed(tmp_path, data)
        assert whole.metadata is not None
        no_digests = {name: value for name, value in whole.metadata.items() if name != "digests"}
        for _ in range(150):
            try:
                found = unsealed(
                    tmp_path, flipped(rng, data) if rng.random() < 0.7 else data[: rng.randrange(len(data))]
                )
            except ArtifactError:
                continue
            assert found.metadata in (None, whole.metadata, no_digests)
            assert found.graph in (None, whole.graph)
            for tensor, array in found.tensors.items():
                assert array.tobytes() == whole.tensors[tensor].tobytes()


@pytest.mark.parametrize("data", [b"", b"MLE\0", bytes(200), b"x" * 5000, b"{" * 9000])
def test_where_nothing_is_left(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        recovered(tmp_path, data)
    assert caught.value.code == "E_NOTHING_INTACT"


def test_a_missing_library_is_named_and_nothing_is_called_lost_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = (made(tmp_path, Storage(compression), graph="text " * 5000) for compression in ("zstd", None))
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    for data in (packed, bytes(128) + packed[128:]):
        with pytest.raises(RuntimeUnavailableError) as caught:
            recovered(tmp_path, data)
        assert caught.value.code == "E_NO_ZSTD"
    start, _ = spans(plain)["graph"]
    with pytest.raises(ArtifactError) as nothing:
        recovered(tmp_path, bytes(128) + damaged(plain, start + 20)[128:])
    assert nothing.value.code == "E_NOTHING_INTACT"


# -- encrypted files -----------------------------------------------------------------------------------------------------


CHUNK = (1 << 20) + 16
LONG = {"first": np.arange(200_000), "zeros": np.zeros(9), "last": np.arange(100_000)[::-1]}
"""Three chunks of weights: the second holds parts of both long tensors, ``zeros`` too."""


@pytest.fixture(scope="module", params=["AES-256-GCM", "ChaCha20-Poly1305"])
def sealed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    storage = Storage(key=EncryptionKey(KEY.secret, request.param))
    return made(tmp_path_factory.mktemp("sealed"), storage, tensors=LONG)


def unsealed(folder: Path, data: bytes, key: EncryptionKey | None = KEY) -> Recovered:
    (folder / "d.mle").write_bytes(data)
    return recover(folder / "d.mle", key)


def test_a_sound_encrypted_file_is_recovered_as_a_whole(sealed: bytes, tmp_path: Path) -> None:
    found = unsealed(tmp_path, sealed)
    assert (found.complete, found.lost, found.graph) == (True, [], CONTENT["graph"])
    for name, array in LONG.items():
        np.testing.assert_array_equal(found.tensors[name], array)
    assert found.key == EncryptionKey(KEY.secret, encryption.CIPHERS[sealed[122]])


@pytest.mark.parametrize(
    ("number", "intact"), [(0, {"last", "zeros"}), (1, set()), (2, {"first", "zeros"})], ids=["first", "second", "last"]
)
def test_a_damaged_chunk_loses_the_tensors_in_it(sealed: bytes, tmp_path: Path, number: int, intact: set[str]) -> None:
    start, end = spans(sealed)["weights"]
    at = start + number * CHUNK
    found = unsealed(tmp_path, damaged(sealed, at + 99))
    assert found.metadata is not None
    assert found.graph == CONTENT["graph"]
    assert set(found.tensors) - {"zeros"} == intact - {"zeros"}
    for name, array in found.tensors.items():
        np.testing.assert_array_equal(array, LONG[name])
    assert found.lost[0] == f"bytes {at} to {min(at + CHUNK, end)} of the file, in the weights"
    assert {f"tensor {name}" for name in LONG} - set(found.lost) == {f"tensor {name}" for name in found.tensors}


def test_chunks_in_each_others_place_are_lost(sealed: bytes, tmp_path: Path) -> None:
    start, _ = spans(sealed)["weights"]
    first, second = sealed[start : start + CHUNK], sealed[start + CHUNK : start + 2 * CHUNK]
    found = unsealed(tmp_path, sealed[:start] + second + first + sealed[start + 2 * CHUNK :])
    assert sum("in the weights" in line for line in found.lost) == 2
    assert set(found.tensors) <= {"zeros"}


def test_an_encrypted_file_that_was_cut(sealed: bytes, tmp_path: Path) -> None:
    start, end = spans(sealed)["weights"]
    found = unsealed(tmp_path, sealed[: start + 2 * CHUNK + 7])
    assert set(found.tensors) == {"first", "zeros"}
    assert f"bytes {start + 2 * CHUNK + 7} to {end} of the file, which was cut" in found.lost
    found = unsealed(tmp_path, sealed[: spans(sealed)["graph"][0]])
    assert (found.graph, found.tensors) == (None, {})
    assert found.metadata is not None


@pytest.mark.parametrize("at", [0, 95, 100, 115, 125], ids=["magic", "metadata crc", "crc", "length", "header crc"])
def test_a_header_that_is_damaged_where_nothing_depends_on_it(sealed: bytes, tmp_path: Path, at: int) -> None:
    """What is authentic proves what it says of the sections, and the metadata."""
    found = unsealed(tmp_path, damaged(sealed, at))
    assert found.lost == ["header"]
    assert found.complete


@pytest.mark.parametrize("at", [6, 55, 122], ids=["version", "size", "cipher"])
def test_nothing_is_authentic_without_the_fields_it_is_bound_to(sealed: bytes, tmp_path: Path, at: int) -> None:
    found = unsealed(tmp_path, damaged(sealed, at))
    assert (found.graph, found.tensors) == (None, {})
    assert found.metadata is not None
    assert found.lost[0] == "header"


def test_damaged_digests_are_left_out_of_the_metadata(sealed: bytes, tmp_path: Path) -> None:
    """Chunks are not bound to them."""
    at = sealed.index(b'"graph":"') + 9
    found = unsealed(tmp_path, sealed[:at] + (b"1" if sealed[at : at + 1] == b"0" else b"0") + sealed[at + 1 :])
    assert found.complete
    assert found.metadata is not None
    assert "digests" not in found.metadata
    assert found.metadata["name"] == "mlp é"


def test_nothing_is_authentic_without_the_metadata(sealed: bytes, tmp_path: Path) -> None:
    for at in (150, sealed.index(b"mlp"), sealed.index(b'"salt":"') + 8, sealed.index(b'"check"') + 1):
        with pytest.raises(ArtifactError) as caught:
            unsealed(tmp_path, damaged(sealed, at))
        assert caught.value.code == "E_NOTHING_INTACT"


def test_only_with_the_key(sealed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLEC_KEY", raising=False)
    for key, code in ((None, "E_KEY_MISSING"), (EncryptionKey(bytes(32)), "E_KEY_WRONG")):
        with pytest.raises(MlecError) as caught:
            unsealed(tmp_path, sealed, key)
        assert caught.value.code == code
    monkeypatch.setenv("MLEC_KEY", KEY.text())
    assert unsealed(tmp_path, sealed, None).complete


def test_the_command_with_a_key(
    sealed: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was encrypted is for nobody else, and the file that can be made of it is encrypted again."""
    from mlec.cli import main

    monkeypatch.delenv("MLEC_KEY", raising=False)
    (tmp_path / "d.mle").write_bytes(damaged(sealed, 100))
    (tmp_path / "key").write_bytes(KEY.secret)
    (tmp_path / "key").chmod(0o600)
    umask = os.umask(0o022)
    try:
        assert main(["recover", str(tmp_path / "d.mle"), "-o", str(tmp_path / "out")]) == 1
        assert "--key-file" in capsys.readouterr().err
        words = ["recover", str(tmp_path / "d.mle"), "-o", str(tmp_path / "out"), "--key-file", str(tmp_path / "key")]
        assert main(words) == 0
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
    out = tmp_path / "out"
    assert {path.name: path.stat().st_mode & 0o777 for path in (out, *out.iterdir())} == {
        "out": 0o700, "metadata.json": 0o600, "graph.mlet": 0o600, "weights.npz": 0o600, "model.mle": 0o600,
    }  # fmt: skip
    with Artifact.open(out / "model.mle", key=KEY) as artifact:
        assert artifact.header.aead_alg == sealed[122]
        np.testing.assert_array_equal(artifact.tensors["last"], LONG["last"])


def test_the_command(tmp_path: Path, sample: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    from mlec.cli import main

    start, _ = spans(sample)["kernels"]
    (tmp_path / "d.mle").write_bytes(damaged(sample, start + 300))
    with pytest.raises(MlecError, match="mlec recover"):
        Artifact.open(tmp_path / "d.mle")
    assert main(["recover", str(tmp_path / "d.mle"), "-o", str(tmp_path / "out")]) == 0
    assert "5 tensors" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metadata.json",
        "graph.mlet",
        "weights.npz",
        "model.mle",
    }
    assert json.loads((tmp_path / "out/metadata.json").read_text())["name"] == "mlp é"
    with np.load(tmp_path / "out/weights.npz") as saved, Artifact.open(tmp_path / "out/model.mle") as artifact:
        np.testing.assert_array_equal(saved["w"], artifact.tensors["w"])
        assert artifact.kernels == ()
    made(tmp_path, tensors={"file": np.ones(3, np.float32), "allow_pickle": np.zeros(2)})
    assert main(["recover", str(tmp_path / "m.mle"), "-o", str(tmp_path / "named")]) == 0
    with np.load(tmp_path / "named/weights.npz") as saved:
        assert (saved["file"].tolist(), saved["allow_pickle"].tolist()) == ([1, 1, 1], [0, 0])
    capsys.readouterr()
    (tmp_path / "d.mle").write_bytes(b"no")
    assert main(["recover", str(tmp_path / "d.mle"), "-o", str(tmp_path / "none"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "E_NOTHING_INTACT"
    assert not (tmp_path / "none").exists()

"""What is taken out of damaged files is right, and whatever is intact is found."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from mlec.artifact import Artifact, Storage
from mlec.artifact.recovery import Recovered, recover
from mlec.errors import ArtifactError, MlecError
from tests.artifact.conftest import CONTENT, made
from tests.artifact.mutants import corpus, flipped

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


def test_a_lost_header_loses_nothing_else(content: bytes, tmp_path: Path) -> None:
    for header in (bytes(128), damaged(content[:128], 5), damaged(content[:128], 60, 124)):
        found = recovered(tmp_path, header + content[128:])
        assert found.lost == ["header"]
        assert found.complete
        assert len(found.tensors) == 6


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
    for name, data in corpus().items():
        if name in ("aes_gcm", "chacha20", "everything"):
            continue  # encrypted
        whole = recovered(tmp_path, data)
        for _ in range(150):
            try:
                found = recovered(
                    tmp_path, flipped(rng, data) if rng.random() < 0.7 else data[: rng.randrange(len(data))]
                )
            except ArtifactError:
                continue
            assert found.metadata in (None, whole.metadata)
            assert found.graph in (None, whole.graph)
            for tensor, array in found.tensors.items():
                assert array.tobytes() == whole.tensors[tensor].tobytes()


@pytest.mark.parametrize("data", [b"", b"MLE\0", bytes(200), b"x" * 5000, b"{" * 9000])
def test_where_nothing_is_left(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        recovered(tmp_path, data)
    assert caught.value.code == "E_NOTHING_INTACT"


def test_encrypted_files_are_whole_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="encrypted"):
        recovered(tmp_path, corpus()["aes_gcm"])


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

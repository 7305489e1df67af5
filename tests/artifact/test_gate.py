"""Before the decision about trust, none of a file's machine code gets near the linker; after it, only the bytes that were hashed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.artifact import Artifact, decide
from mlec.artifact.weights import numpy_dtype
from mlec.backends.tvm.backend import TVMBackend
from mlec.cli import main
from mlec.errors import CorruptedFileError, LoweringError
from mlec.ir import GraphBuilder, tensor
from mlec.ops.tree import OPERANDS, sample_ensemble
from mlec.packaging import loading
from mlec.runtime import library
from tests.artifact.surgery import join, split

X = np.random.default_rng(0).normal(size=(40, 3))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STATE", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    path = tmp_path / "m.mle"
    mlec.compile(LogisticRegression().fit(X, X[:, 0] > 0), X, progress=False).save(path)
    return path


@pytest.fixture
def linked(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """SHA-256 of each object file that reaches the linker from now on."""
    seen: list[str] = []
    real = library.check_objects

    def watching(objects: Sequence[bytes]) -> None:
        seen.extend(hashlib.sha256(data).hexdigest() for data in objects)
        real(objects)

    monkeypatch.setattr(library, "check_objects", watching)  # what is linked is looked at right before
    return seen


def own(path: Path) -> list[str]:
    with Artifact.open(path) as artifact:
        return [kernel.sha256 for kernel in artifact.kernels]


def test_looking_at_a_file_links_nothing(model: Path, linked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", "--kernels", "--graph"], ["inspect", "--json"], ["verify"], ["report"]):
        assert main([words[0], str(model), *words[1:]]) == 0
    assert main(["recover", str(model), "-o", str(model.parent / "out")]) == 0
    assert linked == []


def test_code_that_is_not_trusted_is_never_linked(model: Path, linked: list[str]) -> None:
    """The code is marked: other bytes behind its symbols, so that what is compiled here differs from it."""
    parts = split(model.read_bytes())
    for kernel in parts.kernels:
        kernel.data += b"marked"
    model.write_bytes(join(parts))
    mlec.load(model).predict(X)
    assert linked
    assert not set(linked) & set(own(model))


def test_what_is_linked_is_what_was_hashed(model: Path, linked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if other code lies in the file by the time it is decided about."""
    wanted, content = own(model), model.read_bytes()
    with Artifact.open(model) as artifact:
        section = artifact.header.sections["kernels"]

    def swapped(*given: Any) -> Any:
        with open(model, "r+b") as file:
            os.pwrite(file.fileno(), bytes(section.size), section.offset)
        return decide(*given)

    monkeypatch.setattr(loading, "decide", swapped)
    mlec.load(model)
    assert linked == wanted
    assert model.read_bytes() != content


def test_trusted_code_is_linked_as_it_is(model: Path, linked: list[str]) -> None:
    mlec.load(model).predict(X)
    assert linked == own(model)


def written_to(path: Path) -> None:
    """Change the bytes of a file's weights where they lie."""
    with Artifact.open(path) as artifact:
        section = artifact.header.sections["weights"]
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), bytes(section.size), section.offset)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_no_program_is_opened_on_weights_that_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the file waits for its decision, while its graph is compiled, and when the model that runs is saved again."""
    content = model.read_bytes()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
    real = TVMBackend.compile

    def slowly(*arguments: Any, **options: Any) -> Any:
        module = real(*arguments, **options)
        written_to(model)
        return module

    with monkeypatch.context() as patch:
        patch.setattr(TVMBackend, "compile", slowly)
        with pytest.raises(CorruptedFileError) as caught:
            mlec.load(model)
        assert caught.value.code == "E_CHANGED"
    model.write_bytes(content)
    digest = f"sha256:{Artifact.open(model).code_id}"
    with monkeypatch.context() as patch:
        patch.setattr(loading, "decide", lambda *given: (decide(*given), written_to(model))[0])
        with pytest.raises(CorruptedFileError) as caught:
            mlec.load(model, trust=digest)
        assert caught.value.code == "E_CHANGED"
    model.write_bytes(content)
    with mlec.load(model, trust=digest) as running:
        written_to(model)
        with pytest.raises(CorruptedFileError) as caught:
            running.save(tmp_path / "again.mle")
    assert caught.value.code == "E_CHANGED"
    assert not (tmp_path / "again.mle").exists()


@pytest.mark.parametrize("index", [-(2**31), -1, 4, 2**31 - 1])
def test_positions_in_a_file_read_nothing_outside_of_it(tmp_path: Path, index: int) -> None:
    """The graph of a file that nobody vouches for is compiled; what it indexes with may be anything."""
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    at = np.random.default_rng(0).integers(0, 4, 40, np.int32)
    graph = b.finish([b("gather", x, b.constant(at, "at"), axis=1)])
    mlec.compile(graph, validate=False, progress=False).save(tmp_path / "m.mle")
    parts = split((tmp_path / "m.mle").read_bytes())
    entry = parts.tensor("at")
    parts.weights[entry["off"] : entry["off"] + 4] = np.int32(index).tobytes()
    parts.seal_tensors()
    (tmp_path / "m.mle").write_bytes(join(parts))
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    (result,) = mlec.load(tmp_path / "m.mle").run([rows])
    np.testing.assert_array_equal(result, rows[:, [min(max(index, 0), 3), *at[1:]]])


@pytest.mark.parametrize("name", ["feature", "left", "right", "roots", "output"])
def test_trees_in_a_file_lead_nowhere_outside_of_it(tmp_path: Path, name: str) -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    arrays = sample_ensemble(np.random.default_rng(0), "float32")
    operands = [b.constant(array, part) for part, array in zip(OPERANDS.split()[1:], arrays, strict=True)]
    graph = b.finish([b("tree_ensemble", x, *operands, compare="lt")])
    mlec.compile(graph, validate=False, progress=False).save(tmp_path / "m.mle")
    parts = split((tmp_path / "m.mle").read_bytes())
    entry = next(entry for entry in parts.tensors if re.fullmatch(rf"{name}(_\d)?", entry["name"]))
    most = np.array(np.iinfo(numpy_dtype(entry["dtype"])).max, numpy_dtype(entry["dtype"]))
    parts.weights[entry["off"] : entry["off"] + most.nbytes] = most.tobytes()
    parts.seal_tensors()
    (tmp_path / "m.mle").write_bytes(join(parts))
    with pytest.raises(LoweringError) as caught:
        mlec.load(tmp_path / "m.mle")
    assert caught.value.code == "E_TREE_ARRAYS"


def test_two_models_with_the_same_names_of_kernels(tmp_path: Path, model: Path) -> None:
    """Both are linked into one process; each runs its own."""
    other = tmp_path / "other.mle"
    sources = [LogisticRegression().fit(X, X[:, 0] > 0), LogisticRegression().fit(X, X[:, 1] > 0)]
    mlec.compile(sources[1], X, progress=False).save(other)
    with mlec.load(model) as first, mlec.load(other) as second:
        for _ in range(3):
            for compiled, source in zip((first, second), sources, strict=True):
                np.testing.assert_allclose(compiled.predict_proba(X), source.predict_proba(X), rtol=1e-10)

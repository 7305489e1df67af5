"""Graphs that are compiled where they are loaded are compiled once, and only what this user compiled runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.artifact import Artifact, EncryptionKey
from mlec.backends.tvm import backend as tvm_backend
from mlec.errors import SecurityError
from mlec.ir import GraphBuilder, tensor
from mlec.packaging import code_cache
from mlec.target import Target

X = np.random.default_rng(0).normal(size=(60, 5))
SOURCE = LogisticRegression().fit(X, X[:, 0] + X[:, 1] > 0)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("models") / "m.mle"
    mlec.compile(SOURCE, X, progress=False).save(path)
    return path.read_bytes()


@pytest.fixture
def foreign(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that somebody else built, on a machine where nothing was compiled yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "m.mle").write_bytes(content)
    return tmp_path / "m.mle"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each graph that is compiled."""
    done: list[object] = []
    real = tvm_backend.TVMBackend.compile
    monkeypatch.setattr(tvm_backend.TVMBackend, "compile", lambda *a, **k: (done.append(a[1]), real(*a, **k))[1])
    return done


def agrees(path: Path) -> bool:
    return np.array_equal(mlec.load(path).predict_proba(X), mlec.load(path).predict_proba(X)) and np.allclose(
        mlec.load(path).predict_proba(X), SOURCE.predict_proba(X), rtol=1e-12
    )


def test_a_graph_is_compiled_once(foreign: Path, compilations: list[object], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mlec")
    assert agrees(foreign)
    assert len(compilations) == 1
    assert [record.message.rpartition("; ")[2] for record in caplog.records] == [
        "the graph is compiled on this machine instead",
        *["the graph is compiled on this machine instead, as it was before"] * 2,
    ]
    (entry,) = (foreign.parent / "cache/mlec/compiled").iterdir()
    assert (entry.parent.stat().st_mode & 0o777, entry.stat().st_mode & 0o022) == (0o700, 0)


def _cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-1])


def _another_builder(entry: Path) -> None:
    os.rename(entry.parents[3] / "state", entry.parents[3] / "lost")


def _writable(entry: Path) -> None:
    entry.chmod(0o666)


@pytest.mark.parametrize("spoil", [_cut, _another_builder, _writable])
def test_an_entry_that_proves_nothing_is_ignored(
    foreign: Path, compilations: list[object], spoil: Callable[[Path], None]
) -> None:
    mlec.load(foreign)
    spoil(next((foreign.parent / "cache/mlec/compiled").glob("*.mle")))
    assert agrees(foreign)
    assert len(compilations) == 2


def test_an_entry_is_of_one_model(foreign: Path, compilations: list[object]) -> None:
    other = foreign.with_name("other.mle")
    mlec.load(foreign)
    first = next((foreign.parent / "cache/mlec/compiled").glob("*.mle"))
    # Another model's good entry under the name of this one: both were built by this user.
    mlec.compile(LogisticRegression().fit(-X, X[:, 0] > 1), X, progress=False).save(other)
    os.replace(other, first)
    assert agrees(foreign)
    assert len(compilations) == 3


def test_nothing_of_an_encrypted_model_is_kept(foreign: Path, compilations: list[object]) -> None:
    key = EncryptionKey(bytes(32))
    mlec.load(foreign).save(foreign, encryption_key=key)
    compilations.clear()
    kept = set((foreign.parent / "cache/mlec/compiled").glob("*"))
    mlec.load(foreign, encryption_key=key)
    assert set((foreign.parent / "cache/mlec/compiled").glob("*")) == kept
    assert len(compilations) == 1


@pytest.mark.parametrize("home", ["/proc/nothing", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_no_error(foreign: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert agrees(foreign)


def test_what_was_not_used_for_longest_makes_room(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlec.load(foreign)
    folder = foreign.parent / "cache/mlec/compiled"
    (entry,) = folder.iterdir()
    for number in range(3):
        (folder / f"{number}.mle").write_bytes(bytes(100))
        os.utime(folder / f"{number}.mle", (number, number))
    monkeypatch.setattr(code_cache, "MOST_BYTES", entry.stat().st_size + 250)
    monkeypatch.setattr(code_cache, "_compiler", lambda: ("another version",))
    entry.unlink()
    mlec.load(foreign)
    (entry,) = (path for path in folder.iterdir() if len(path.stem) == 64)
    assert {path.name for path in folder.iterdir()} == {entry.name, "1.mle", "2.mle"}


def test_constants_that_the_file_lacks_are_kept(foreign: Path, tmp_path: Path) -> None:
    """Weights that the graph in a file makes of others (`unpack_int8`) are none of its tensors."""
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 3)))
    graph = b.finish([b("add", x, b.constant(np.arange(3, dtype=np.float32), "made_on_loading"))])
    module = tvm_backend.TVMBackend().compile(graph, Target())
    with Artifact.open(foreign) as artifact:
        assert "made_on_loading" not in artifact.tensors
        code_cache.keep(tmp_path / "compiled/e.mle", artifact, graph, module)
        found = code_cache.find(tmp_path / "compiled/e.mle", artifact)
        assert found is not None
        program, _, tensors = found
        assert program.constants
        assert all(np.array_equal(tensors[name], module.constants[name]) for name in program.constants)


def test_a_lock_file_of_an_editor_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".#a.py").symlink_to("someone@somewhere:1")
    monkeypatch.setattr(code_cache, "SOURCES", tmp_path)
    code_cache._compiler.cache_clear()
    try:
        state = code_cache._compiler()
    finally:
        code_cache._compiler.cache_clear()
    assert len(state) == 3


def test_policies(foreign: Path, tmp_path: Path) -> None:
    from mlec.artifact import Keyring, Signer, TrustedKey, keyring_changes, sign

    for policy, code in (("require_native", "E_UNTRUSTED_NATIVE"), ("require_signature", "E_UNSIGNED")):
        with pytest.raises(SecurityError) as caught:
            mlec.load(foreign, **{policy: True})  # type: ignore[arg-type]
        assert caught.value.code == code
        assert "mlec trust add" in (caught.value.hint or "")
    signer = Signer(bytes(range(32)))
    sign(foreign, signer)
    with pytest.raises(SecurityError, match="unknown key"):
        mlec.load(foreign, require_signature=True)
    keyring_changes.add(TrustedKey(signer.public, "acme", scope=("data",)))
    mlec.load(foreign, require_signature=True)
    with pytest.raises(SecurityError, match="trusted for data only"):
        mlec.load(foreign, require_native=True)
    keyring_changes.remove(Keyring.load().keys[0])
    keyring_changes.add(TrustedKey(signer.public, "acme"))
    mlec.load(foreign, require_signature=True, require_native=True)


def test_a_graph_that_there_is_no_memory_to_compile(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("Unable to allocate 30 GiB")

    monkeypatch.setattr(tvm_backend.TVMBackend, "compile", fail)
    with pytest.raises(mlec.MlecError, match=r"memory to compile the graph of .*: Unable to allocate") as caught:
        mlec.load(foreign)
    assert caught.value.code == "E_NO_MEMORY"

"""When weights are read: not before they are needed where there are many, and never unchecked."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact, signing
from mlec.ir import GraphBuilder, tensor
from mlec.packaging import loading

WIDTH = 256
X = np.random.default_rng(1).standard_normal((3, WIDTH), dtype=np.float32)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with two matrices, of numbers that no 16 bits hold."""
    rng = np.random.default_rng(0)
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", WIDTH)))
    for _ in range(2):
        x = b("relu", b("matmul", x, b.constant(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32))))
    path = tmp_path_factory.mktemp("loading") / "m.mle"
    mlec.compile(b.finish([x]), validate=False, progress=False).save(path)
    return path.read_bytes()


@pytest.fixture
def model(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "m.mle"
    path.write_bytes(content)
    return path


def damage(path: Path, tensor: int = 0) -> None:
    """Changes one byte of a tensor, as a failing disk does."""
    with Artifact.open(path) as artifact:
        place = artifact.header.sections["weights"].offset + artifact.tensors.entries[tensor].off
    data = bytearray(path.read_bytes())
    data[place + 2] ^= 1
    path.write_bytes(data)


def test_few_weights_are_checked_when_they_are_loaded(model: Path) -> None:
    damage(model)
    with pytest.raises(mlec.CorruptedFileError) as caught:
        mlec.load(model)
    assert caught.value.code == "E_CRC_WEIGHTS"


def test_many_weights_are_checked_by_the_first_call(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mlec.load(model).run([X])[0]
    monkeypatch.setattr(loading, "CHECKED_AT_ONCE", 0)
    np.testing.assert_array_equal(mlec.load(model).run([X])[0], expected)
    damage(model)
    damaged = mlec.load(model)
    for call in (damaged.run, damaged.run, damaged.profile):  # not the first alone
        with pytest.raises(mlec.CorruptedFileError) as caught:
            call([X])
        assert caught.value.code == "E_TENSOR_CRC"
        assert caught.value.loc == str(model)


def test_what_is_loaded_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlec.artifact import weights

    checked: list[str] = []
    real = weights._check
    monkeypatch.setattr(weights, "_check", lambda entry, pieces: (checked.append(entry.name), real(entry, pieces)))
    monkeypatch.setattr(loading, "CHECKED_AT_ONCE", 0)
    loaded = mlec.load(model)
    assert not checked
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: loaded.run([X])[0], range(8))
    assert set(checked) == {*loaded.executable.program.constants}  # type: ignore[attr-defined]
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("at_once", [0, 1 << 30])
def test_weights_stay_pages_of_the_file(model: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all processes that load it have them in memory once."""
    monkeypatch.setattr(loading, "CHECKED_AT_ONCE", at_once)
    loaded = mlec.load(model)
    loaded.run([X])
    sizes = {"Rss": 0, "Anonymous": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name:  # the begin of a mapping
            inside = line.endswith(str(model))
        elif inside and name in sizes:
            sizes[name] += int(rest.split()[0])
    assert sizes["Rss"] >= 2 * WIDTH * WIDTH * 4 / 1024
    assert sizes["Anonymous"] == 0  # what is not of the file


def test_loading_imports_nothing_that_only_writing_takes(tmp_path: Path) -> None:
    """Each of these takes as long as all else that a small model needs."""
    b = GraphBuilder("twice")
    x = b.input("x", tensor("f32", ("n", 3)))
    compiled = mlec.compile(b.finish([b("add", x, x)]), progress=False)
    private, public = signing.generate()
    (tmp_path / "own.key").write_bytes(private)
    (tmp_path / "own.key").chmod(0o600)
    compiled.save(tmp_path / "m.mle", sign_key=tmp_path / "own.key")
    code = f"""
import sys, numpy as np
writing = {{"pathlib", "tempfile", "cryptography.hazmat.primitives.serialization", "typing_extensions"}}
for name in writing & set(sys.modules):  # the environment begins with them
    del sys.modules[name]
from mlec.artifact import Keyring, TrustedKey, keyring
Keyring.load = lambda: Keyring((TrustedKey({public!r}, "own"),))
import mlec
model = mlec.load({str(tmp_path / "m.mle")!r}, require_signature=True, require_native=True)
assert model.run([np.ones((1, 3), np.float32)])[0].tolist() == [[2, 2, 2]]
assert not writing & set(sys.modules), writing & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

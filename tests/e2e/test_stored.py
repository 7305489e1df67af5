"""Compressed, signed and encrypted files: compiled, saved, loaded and run as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact, EncryptionKey, Keyring, Signer, TrustedKey, decide
from mlec.errors import SecurityError


@pytest.fixture(scope="module")
def forest() -> tuple[mlec.CompiledModel, np.ndarray]:
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier

    x, y = make_classification(500, 12, random_state=0)
    return mlec.compile(RandomForestClassifier(20, max_depth=8, random_state=0).fit(x, y), x, progress=False), x


def test_a_compressed_model_computes_the_same(
    forest: tuple[mlec.CompiledModel, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    compiled, x = forest
    plain, small = compiled.save(tmp_path / "plain.mle"), compiled.save(tmp_path / "small.mle", compression="zstd")
    assert small.sections["weights"] < 0.6 * plain.sections["weights"]  # the others are compressed anyway
    with Artifact.open(tmp_path / "small.mle") as artifact:
        assert artifact.header.flags & 2
        assert mlec.artifact.decide(artifact).native
    with mlec.load(tmp_path / "small.mle") as loaded:
        np.testing.assert_array_equal(loaded.predict_proba(x), compiled.predict_proba(x))
        again = loaded.save(tmp_path / "again.mle", compression="zstd")
    assert (tmp_path / "again.mle").read_bytes() == (tmp_path / "small.mle").read_bytes()
    assert again.code_id == small.code_id


def test_a_model_compiled_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    x, y = load_iris(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    for name in ("a", "b"):
        compiled = mlec.compile(model, x, progress=False, measure_passes=name == "a")
        compiled.save(tmp_path / f"{name}.mle", reproducible=True)
    compiled.save(tmp_path / "timed.mle")
    assert (tmp_path / "a.mle").read_bytes() == (tmp_path / "b.mle").read_bytes()
    with mlec.load(tmp_path / "timed.mle") as loaded:
        assert loaded.report.timing["measured"]
        loaded.save(tmp_path / "c.mle", reproducible=True)
    assert (tmp_path / "a.mle").read_bytes() == (tmp_path / "c.mle").read_bytes()
    with mlec.load(tmp_path / "a.mle") as loaded:
        assert not loaded.report.timing
        assert loaded.report.parity == compiled.report.parity
        assert "passes" in loaded.report.to_text()


def test_an_encrypted_and_signed_model_computes_the_same(
    forest: tuple[mlec.CompiledModel, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MLEC_KEY", raising=False)
    compiled, x = forest
    key, signer = bytes(range(32)), Signer(bytes(32))
    for cipher in ("AES-256-GCM", "ChaCha20-Poly1305"):
        path = tmp_path / f"{cipher}.mle"
        compiled.save(path, "zstd", signer, EncryptionKey(key, cipher))
        with pytest.raises(SecurityError) as caught:
            mlec.load(path)
        assert caught.value.code == "E_KEY_MISSING"
        with mlec.load(path, encryption_key=key) as loaded:
            np.testing.assert_array_equal(loaded.predict_proba(x), compiled.predict_proba(x))
            loaded.save(tmp_path / "plain.mle")
        keyring = Keyring((TrustedKey(signer.public, "acme"),))
        with Artifact.open(path, key=EncryptionKey(key), keyring=keyring) as artifact:
            assert decide(artifact).reason.startswith("signed by acme")
    with mlec.load(tmp_path / "plain.mle") as loaded:
        assert "encryption" not in loaded.metadata
        np.testing.assert_array_equal(loaded.predict(x), compiled.predict(x))

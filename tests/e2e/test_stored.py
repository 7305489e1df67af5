"""Compressed files: compiled, saved, loaded and run as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact


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
    assert small.size_bytes < 0.6 * plain.size_bytes
    with Artifact.open(tmp_path / "small.mle") as artifact:
        assert artifact.header.flags & 2
        assert mlec.artifact.decide(artifact).native
    with mlec.load(tmp_path / "small.mle") as loaded:
        np.testing.assert_array_equal(loaded.predict_proba(x), compiled.predict_proba(x))
        again = loaded.save(tmp_path / "again.mle", compression="zstd")
    assert (tmp_path / "again.mle").read_bytes() == (tmp_path / "small.mle").read_bytes()
    assert again.code_id == small.code_id

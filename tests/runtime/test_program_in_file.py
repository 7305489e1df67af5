"""A program that comes from a file: what is refused, and what is not trusted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.artifact import Artifact, write
from mlec.artifact.model import with_entries_unpacked
from mlec.runtime.program import Buffer, Call, CallSequence

X = np.random.default_rng(0).normal(size=(60, 5))
SOURCE = LogisticRegression().fit(X, X[:, 0] + X[:, 1] > 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("models") / "m.mle"
    mlec.compile(SOURCE, X, progress=False).save(path)
    return Artifact.open(path)


def rewritten(saved: Artifact, path: Path, metadata: dict[str, Any]) -> Path:
    """The same graph, weights and kernels with other metadata; all checksums and digests are right."""
    write(path, metadata=metadata, graph=saved.graph, tensors=saved.tensors, kernels=saved.kernels)
    return path


def test_another_call_sequence_is_not_trusted(
    saved: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mlec")
    same = rewritten(saved, tmp_path / "same.mle", saved.metadata)
    assert np.array_equal(mlec.load(same).predict(X), SOURCE.predict(X))
    assert not caplog.records
    metadata = with_entries_unpacked(saved.metadata)
    metadata["program"]["alignment"] //= 2
    other = rewritten(saved, tmp_path / "other.mle", metadata)
    assert np.array_equal(mlec.load(other).predict(X), SOURCE.predict(X))
    assert "not built by this user" in caplog.text


def test_a_sequence_that_makes_no_sense_is_refused(saved: Artifact, tmp_path: Path) -> None:
    metadata = with_entries_unpacked(saved.metadata)
    metadata["program"]["sequence"]["calls"][0]["reads"][0] = 99
    with pytest.raises(mlec.MlecError, match="there is no buffer 99") as caught:
        mlec.load(rewritten(saved, tmp_path / "bad.mle", metadata))
    assert caught.value.code == "E_METADATA"


def test_parts_of_parts_without_an_end_are_found_in_linear_time() -> None:
    depth = 20_000
    whole = Buffer("f32", (4,))
    parts = tuple(Buffer("f32", (4,), view=number, offset=0) for number in range(1, depth))
    reads = tuple(range(2, depth))

    def sequence(*calls: Call) -> CallSequence:
        return CallSequence(1, 0, (whole, whole, *parts), calls, (1,))

    assert sequence(Call("k", (0,), (1,)), Call("k", reads[::-1], ())).outputs == (1,)
    with pytest.raises(ValueError, match="call 0 reads buffer 19999 before anything is written"):
        sequence(Call("k", reads[::-1], ()), Call("k", (0,), (1,)))

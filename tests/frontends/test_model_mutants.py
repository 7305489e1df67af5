"""Damaged model files: each is read, or refused with an error of ours; nothing in them is executed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.frontends.model_mutants import MARK, corpus, mutant, read


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["json", "ubj", "lightgbm", "pt2", "pt", "skops"])
def test_damaged_files(kind: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model"
    path.write_bytes(files[kind])
    assert read(kind, path) == "read"
    rng = random.Random(0)
    outcomes = set()
    for _ in range(200):
        path.write_bytes(mutant(rng, kind, files[kind]))
        outcomes.add(read(kind, path))
    assert len(outcomes) > 1
    assert not Path(MARK).exists()

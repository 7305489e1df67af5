"""Models that are kept for ever, one for each feature of compiling: every later version gives the answers that their sources gave, from
their graphs and, where the processor runs it, from the machine code that was compiled then.

``answers.json`` beside them says what each was made of, and holds inputs and the answers of its source. A new feature gets a new file;
neither a file nor its entry ever changes. Where machine code of before cannot be called any more, its interface needs another name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mlec
from mlec.artifact import Artifact, read_model
from mlec.processor import best_of
from mlec.runtime.library import runtime_abi
from tests.artifact.mutants import CORPUS, KEYRING

FOLDER = CORPUS / "models"
ANSWERS: dict[str, Any] = json.loads((FOLDER / "answers.json").read_text())
SIGNED = [name for name, entry in ANSWERS.items() if entry["source"].endswith("signed")]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who compiled nothing yet and trusts nobody."""
    for name in ("STATE", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    return tmp_path / "CONFIG" / "mlec"


def check_answers(name: str, model: mlec.CompiledModel) -> None:
    """Whether a model says of its inputs what its source said."""
    entry = ANSWERS[name]
    inputs, outputs = entry["inputs"], entry["outputs"]
    if isinstance(inputs, dict):  # a table; the outputs are those of the methods
        found = [model.source_method(method)(pd.DataFrame(inputs)) for method in outputs]
        wanted = list(map(np.asarray, outputs.values()))
    else:
        found = model.run([np.array(values, dtype) for dtype, values in inputs])
        wanted = [np.array(values, dtype) for dtype, values in outputs]
    for answer, right in zip(found, wanted, strict=True):
        if right.dtype.kind == "f":
            np.testing.assert_allclose(answer, right, rtol=entry["tolerance"], atol=entry["tolerance"])
        else:
            assert answer.tolist() == right.tolist()


def test_every_file_is_there_as_it_was() -> None:
    found = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.mle")}
    assert found == {name: entry["file"] for name, entry in ANSWERS.items()}


@pytest.mark.parametrize("name", ANSWERS)
def test_graphs(name: str) -> None:
    with mlec.load(FOLDER / f"{name}.mle") as model:
        check_answers(name, model)


@pytest.mark.parametrize("name", SIGNED)
def test_machine_code(name: str, home: Path) -> None:
    with Artifact.open(FOLDER / f"{name}.mle") as artifact:
        found = read_model(artifact)
    if best_of(found.needed_cpu_flags) is None or found.targets[0]["abi"] != runtime_abi():
        pytest.skip("for another processor or runtime")
    (home / "trusted_keys.d").mkdir(parents=True)
    (home / "trusted_keys.d" / "acme.pub").write_text(KEYRING.keys[0].line())
    with mlec.load(FOLDER / f"{name}.mle", require_signature=True, require_native=True) as model:
        check_answers(name, model)


@pytest.mark.parametrize("name", ANSWERS)
def test_reports(name: str) -> None:
    with Artifact.open(FOLDER / f"{name}.mle") as artifact:
        report = mlec.OptimizationReport.from_dict(read_model(artifact).read_report())
    assert "pass fuse" in report.to_text()
    assert "<html" in report.to_html()
    assert bool(report.tuning) is (name == "tuned")
    assert bool(report.quantization) is (name == "int8")

"""Files that are kept for ever, one for each feature: every later version reads from them what was written.

``contents.json`` beside them says what that was. A new feature gets a new file; neither a file nor its entry ever changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact
from tests.artifact.mutants import CORPUS, KEY, KEYRING

CONTENTS: dict[str, Any] = json.loads((CORPUS / "contents.json").read_text())


def content_of(path: Path) -> dict[str, Any]:
    """What is in a file: texts by their SHA-256, tensors by type, shape and the SHA-256 of their bytes."""
    with Artifact.open(path, keyring=KEYRING, key=KEY) as artifact:
        metadata = json.dumps(artifact.metadata, sort_keys=True)
        return {
            "format": artifact.header.version,
            "file": hashlib.sha256(path.read_bytes()).hexdigest(),
            "metadata": hashlib.sha256(metadata.encode()).hexdigest(),
            "graph": hashlib.sha256(artifact.graph.encode()).hexdigest(),
            "tensors": {
                entry.name: [
                    entry.dtype,
                    list(artifact.tensors[entry.name].shape),
                    hashlib.sha256(artifact.tensors[entry.name].tobytes()).hexdigest(),
                ]
                for entry in artifact.tensors.entries
            },
            "kernels": [[kernel.kind, kernel.target, kernel.data.decode()] for kernel in artifact.kernels],
            "signed_by": artifact.signature.key.label if artifact.signature and artifact.signature.key else None,
        }


def test_every_file_is_there() -> None:
    assert {path.stem for path in CORPUS.glob("*.mle")} == set(CONTENTS)


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_read_is_what_was_written(name: str) -> None:
    assert content_of(CORPUS / f"{name}.mle") == CONTENTS[name]


def test_a_model_still_runs() -> None:
    """A logistic regression without machine code: its graph is compiled here."""
    model = mlec.load(CORPUS / "classifier.mle")
    rows = np.arange(-6.0, 6.0).reshape(3, 4)
    assert model.predict(rows).tolist() == CLASSES
    np.testing.assert_allclose(model.predict_proba(rows)[:, 1], PROBABILITIES, rtol=1e-12)


CLASSES = ["no", "no", "yes"]
PROBABILITIES = [
    8.402536590058772e-08,
    0.002036275507713133,
    0.9802171355938274,
]  # of scikit-learn, when the model was trained

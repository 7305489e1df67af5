"""Runs the command line as a process of its own; models that several tests share."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    def error(self, code: str) -> str:
        """The message of a clear error with this code; wrong usage exits 2."""
        assert self.code == (2 if code in ("E_USAGE", "E_USAGE_TRUST", "E_PIPELINE") else 1), (self.out, self.err)
        assert f"error[{code}]:" in self.err, self.err
        assert "hint: " in self.err
        assert "Traceback" not in self.err
        return self.err


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The list of what this user built, and the keyring, are the tests' own."""
    state, config = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("config")
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), "XDG_CONFIG_HOME": str(config)}


@pytest.fixture(scope="session")
def mlec(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    elsewhere = tmp_path_factory.mktemp("cwd")

    def run(*words: object, cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "mlec", *map(str, words)],
            capture_output=True, text=True, timeout=300, cwd=cwd or elsewhere, env={**environment, **(env or {})}, **options,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@dataclass
class Iris:
    """A classifier with text labels that knows its columns by name: source, data, and what compiling it printed."""

    source: Any
    table: Any
    pickle: Path
    mle: Path
    csv: Path
    compiled: Done


@pytest.fixture(scope="session")
def iris(mlec: Run, tmp_path_factory: pytest.TempPathFactory) -> Iris:
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folder = tmp_path_factory.mktemp("iris")
    data = load_iris(as_frame=True)
    table = data.data.set_axis(["sepal_l", "sepal_w", "petal_l", "petal_w"], axis=1)
    source = make_pipeline(StandardScaler(), LogisticRegression()).fit(table, data.target_names[data.target])
    (folder / "iris.pkl").write_bytes(pickle.dumps(source))
    table.to_csv(folder / "iris.csv", index=False)
    compiled = mlec("compile", folder / "iris.pkl", "--trust-pickle", "--report", folder / "iris.html")
    assert compiled.code == 0, compiled.err
    return Iris(source, table, folder / "iris.pkl", folder / "iris.mle", folder / "iris.csv", compiled)

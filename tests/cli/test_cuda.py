"""A model for a GPU through the command line: compiled and looked into anywhere, and what is missing said where it cannot run."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Iris, Run


def _compilers() -> bool:
    nvcc = shutil.which("nvcc") and shutil.which("gcc")
    return bool(nvcc) or importlib.util.find_spec("cuda") is not None


def _driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def model(mlec: Run, iris: Iris, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not _compilers():
        pytest.skip("there is neither nvcc nor NVRTC")
    path = tmp_path_factory.mktemp("cuda") / "m.mle"
    done = mlec("compile", iris.pickle, "--trust-pickle", "--target", "cuda:sm_80,sm_90", "-o", path)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "not compared with the source: compiling runs nothing on cuda" in done.out
    return path


def test_inspect_lists_kernels_and_architectures(mlec: Run, model: Path) -> None:
    done = mlec("inspect", model, "--kernels", env={"COLUMNS": "250"})  # so that no cell is wrapped
    assert done.code == 0, done.err
    for part in ("matmul", "DLight's schedule", "loop over elements", "LogisticRegression"):
        assert part in done.out
    assert re.search(r"archs=sm_80,sm_90 compiler=(nvcc|NVRTC) [\d.]+ kind=cuda ptx=compute_90", done.out)
    facts = mlec("inspect", model, "--json").document()["metadata"]["targets"][0]
    assert facts["archs"] == ["sm_80", "sm_90"]


@pytest.mark.skipif(_driver(), reason="there is a CUDA driver")
@pytest.mark.parametrize("command", ["run", "bench"])
def test_running_without_a_driver_says_what_is_missing(mlec: Run, iris: Iris, model: Path, command: str) -> None:
    error = mlec(command, model, *([iris.csv] if command == "run" else [])).error("E_RUNTIME")
    assert "no CUDA driver" in error
    assert "install the NVIDIA driver, or compile the model with --target cpu" in error
    assert mlec("verify", model, "--full").code == 0


def test_compiling_without_a_compiler_says_what_to_install(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    (tmp_path / "cuda.py").write_text("raise ImportError('no cuda here')")
    root = Path(__file__).parents[2]
    env = {"PATH": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{root}"}
    done = mlec("compile", iris.pickle, "--trust-pickle", "--target", "cuda", "-o", tmp_path / "m.mle", env=env)
    error = done.error("E_TARGET")
    for part in ("needs nvcc or NVRTC", "not on the PATH", "no cuda here", "pip install 'mlec[cuda]'"):
        assert part in error
    assert not (tmp_path / "m.mle").exists()

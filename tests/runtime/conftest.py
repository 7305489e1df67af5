"""Object files of small programs, compiled once in a process that has no C compiler on its PATH."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.runtime import Executable, KernelInfo, Program
from tests.runtime.programs import SEQUENCES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pickled object files by the name of the program; see build_module.py for what is in them."""
    folder = tmp_path_factory.mktemp("objects")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": str(folder)}
    script = Path(__file__).with_name("build_module.py")
    subprocess.run([sys.executable, str(script), str(folder / "objects.pkl")], env=environment, check=True)
    return folder / "objects.pkl"


@pytest.fixture(scope="session")
def objects(object_file: Path) -> dict[str, tuple[bytes, ...]]:
    """The object files by the name of the program."""
    found: dict[str, tuple[bytes, ...]] = pickle.loads(object_file.read_bytes())
    return found


@pytest.fixture(scope="session")
def weight() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The (8, 4) constant of the module."""
    return np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)


INFOS = {
    "matmul": KernelInfo(symbol="matmul", op="matmul", location="net.py:3", flops="64*n", bytes="48*n+128"),
    "relu": KernelInfo(symbol="relu", op="relu", location="net.py:4", flops="4*n", bytes="32*n"),
}


def program_of(entry: str) -> Program:
    """The program that makes one of the call sequences."""
    sequence = SEQUENCES[entry]
    kernels = tuple(
        INFOS.get(call.code) or KernelInfo(f"{call.code}_{i}", call.code, f"net.py:{i}")
        for i, call in enumerate(sequence.calls)
    )
    constants = ("w",) * sequence.constants
    return Program("tvm", "cpu", constants=constants, kernels=kernels, alignment=8, sequence=sequence)


@pytest.fixture
def make_executable(
    objects: dict[str, tuple[bytes, ...]], weight: np.ndarray[Any, np.dtype[np.float32]]
) -> Callable[..., Executable]:
    """Link a program; ``entry`` chooses which."""

    def make(entry: str = "main", num_threads: int | None = None) -> Executable:
        return Executable(program_of(entry), objects[entry], {"w": weight}, num_threads)

    return make

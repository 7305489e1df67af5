from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlec.artifact import Artifact, KernelBlob, write
from tests.artifact.surgery import Parts, split

IR = 'graph @mlp(%x: f32[n, 4]) -> (f32[n, 4]) {\n  return %x // "é \\" 中"\n}\n'


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small valid file: several dtypes, padding between tensors, two kernels."""
    path = tmp_path_factory.mktemp("sample") / "m.mle"
    write(
        path,
        metadata={"name": "mlp é", "targets": [{"triple": "x86_64-linux-gnu"}, {"sm": 90}], "classes": [0, 1.5, None]},
        graph=IR,
        tensors={
            "w": np.arange(12, dtype=np.float32).reshape(4, 3),
            "mask": np.array([True, False, True]),
            "scalar": np.array(2.5),
            "empty": np.zeros((0, 7), np.int64),
            "idx": np.arange(5, dtype=np.int32),
        },
        kernels=[KernelBlob(6, 0, b"\x7fELF not really" * 9), KernelBlob(5, 1, b".version 8.0\n")],
    )
    return path.read_bytes()


@pytest.fixture
def parts(sample: bytes) -> Parts:
    """The sample, taken apart and ready to be broken."""
    return split(sample)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Artifact]:
    """Open bytes as a file."""

    def load(data: bytes, **options: object) -> Artifact:
        path = tmp_path / "broken.mle"
        path.write_bytes(data)
        return Artifact.open(path, **options)  # type: ignore[arg-type]

    return load

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.artifact import Artifact, KernelBlob, Storage, write
from tests.artifact.surgery import Parts, split

IR = 'graph @mlp(%x: f32[n, 4]) -> (f32[n, 4]) {\n  return %x // "é \\" 中"\n}\n'


CONTENT: dict[str, Any] = {
    "metadata": {"name": "mlp é", "targets": [{"triple": "x86_64-linux-gnu"}, {"sm": 90}], "classes": [0, 1.5, None]},
    "graph": IR,
    "tensors": {
        "w": np.arange(12, dtype=np.float32).reshape(4, 3),
        "mask": np.array([True, False, True]),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 7), np.int64),
        "idx": np.arange(5, dtype=np.int32),
    },
    "kernels": [KernelBlob(6, 0, b"\x7fELF not really" * 9), KernelBlob(5, 1, b".version 8.0\n")],
}
"""Several dtypes, padding between tensors, two kernels."""


def made(folder: Path, storage: Storage | None = None, **changes: Any) -> bytes:
    """The bytes of a small valid file."""
    write(folder / "m.mle", **CONTENT | changes, storage=storage)
    return (folder / "m.mle").read_bytes()


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small valid file, nothing compressed, signed or encrypted."""
    return made(tmp_path_factory.mktemp("sample"))


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

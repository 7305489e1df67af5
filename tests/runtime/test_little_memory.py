"""Calls in processes that may take little more memory: a clear error or the right answer, never the end of the process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact

CHILD = """
import mmap, resource, sys
import numpy as np
import mlec
model = mlec.load(sys.argv[1], num_threads=int(sys.argv[2]))
x, y = np.load(sys.argv[3]), np.empty((3, 64, 14, 14), np.float32)
hole = mmap.mmap(-1, int(sys.argv[4]))
taken = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_AS, (taken, taken))
heap = []
try:
    while True:
        heap.append(bytearray(1 << 14))
except MemoryError:
    hole.close()
try:
    model.run([x], out=[y])
    print(float(np.abs(y - np.load(sys.argv[5])).max() < 1e-3))
except mlec.MlecError as error:
    print(error.code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("little")
    module = torch.nn.Conv2d(256, 64, 3, padding=1).eval()
    x = torch.randn(3, 256, 14, 14)
    mlec.compile(module, (x[:2],), validate=False, progress=False).save(folder / "m.mle")
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "y.npy", module(x).detach().numpy())
    return folder


def test_what_kernels_take_is_told(model: Path) -> None:
    """Of a Winograd convolution: padded images, sums of inputs and products."""
    with Artifact.open(model / "m.mle") as artifact:
        assert 200_000 < artifact.metadata["program"]["scratch"] < 4 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_with_little_memory(model: Path, threads: int) -> None:
    codes = []
    for nbytes in (1 << 16, 800_000, 1_100_000, 1_600_000, 2_500_000, 5 << 20, 200 << 20):
        arguments = [model / "m.mle", threads, model / "x.npy", nbytes, model / "y.npy"]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (nbytes, done.stderr[-500:])
        codes.append(done.stdout.strip())
    assert set(codes) == {"E_NO_MEMORY", "1.0"}
    assert codes[-1] == "1.0"
    assert codes[0] == "E_NO_MEMORY"

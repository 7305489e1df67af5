"""Calls in processes that may take little more memory: a clear error or the right answer, never the end of the process."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact, read_model
from mlec.ir import DType, GraphBuilder, tensor
from mlec.runtime import executable
from mlec.runtime.dims import evaluate

CHILD = """
import mmap, resource, sys
import numpy as np
import mlec
model = mlec.load(sys.argv[1], num_threads=int(sys.argv[2]))
x, right = np.load(sys.argv[3]), np.load(sys.argv[5])
y = np.empty(right.shape, right.dtype)
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
    print(float(np.abs(y - right).max() < 1e-3))
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
        assert 200_000 < read_model(artifact).program.scratch < 4 << 20


def codes_of(model: Path, threads: int, sizes: Sequence[int]) -> list[str]:
    """What a call says that may take so many bytes more."""
    codes = []
    for nbytes in sizes:
        arguments = [model / "m.mle", threads, model / "x.npy", nbytes, model / "y.npy"]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (nbytes, done.stderr[-500:])
        codes.append(done.stdout.strip())
    assert set(codes) == {"E_NO_MEMORY", "1.0"}
    assert codes[-1] == "1.0"
    assert codes[0] == "E_NO_MEMORY"
    return codes


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_with_little_memory(model: Path, threads: int) -> None:
    codes_of(model, threads, (1 << 16, 800_000, 1_100_000, 1_600_000, 2_500_000, 5 << 20, 200 << 20))


@pytest.fixture(scope="module")
def sorting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose kernel takes memory for a whole line, of which only the call tells how long it is."""
    folder = tmp_path_factory.mktemp("sorting")
    b = GraphBuilder("sorting")
    x = b.input("x", tensor(DType.F32, ("n",)))
    mlec.compile(b.finish(b.multi("sort", x, axis=0)[:1]), validate=False, progress=False).save(folder / "m.mle")
    line = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    np.save(folder / "x.npy", line)
    np.save(folder / "y.npy", np.sort(line))
    return folder


def test_what_kernels_take_may_depend_on_the_call(sorting: Path) -> None:
    with Artifact.open(sorting / "m.mle") as artifact:
        scratch = read_model(artifact).program.scratch
    (expression,) = [dim for dim in scratch if isinstance(dim, str)]
    assert evaluate(expression, {"n": 1000}) == 1000 * (4 + 8)


def test_calls_that_need_more_than_others(sorting: Path) -> None:
    """12 MiB for the kernel, and as much again for its results."""
    codes_of(sorting, 1, (1 << 20, 4 << 20, 8 << 20, 12 << 20, 16 << 20, 40 << 20, 200 << 20))


def test_each_thread_asks_for_itself(sorting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of kernels belongs to the thread that calls them."""
    asked: list[int] = []
    monkeypatch.setattr(executable, "require_room", asked.append)
    line = np.arange(5000, dtype=np.float32)
    with mlec.load(sorting / "m.mle", num_threads=1) as model:
        for _ in range(3):
            model.run([line])
        here = len(asked)
        thread = threading.Thread(target=lambda: [model.run([line]) for _ in range(3)])
        thread.start()
        thread.join()
    assert here == 1
    assert len(asked) == 2
    assert asked[1] >= 5000 * 12

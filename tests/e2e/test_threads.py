"""Whether the number of threads shows in the results, and whether small work leaves the other threads asleep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlec
from mlec.runtime import library, threads

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from sklearn.ensemble import RandomForestRegressor  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.neighbors import KNeighborsRegressor  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812


class Rows(nn.Module):
    """Of rows: products, normalisations, reductions along both axes, loops over elements, moves."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(96, 160), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            self.wide(x).relu(), self.narrow(x), x.softmax(-1), F.layer_norm(x, (96,)), x.sum(-1), x.mean(0), x.argmax(-1),
            F.gelu(x), torch.cat([x.flip(-1), x], -1), x.t().contiguous(), x.t() @ x, x.cumsum(-1),
        )  # fmt: skip


class Images(nn.Module):
    """Convolutions of each kind, pools, and what else there is of images."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.strided = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2)
        self.point, self.stem = nn.Conv2d(16, 32, 1), nn.Conv2d(3, 8, 5)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            self.plain(x), self.strided(x), self.point(x), self.stem(x[:, :3]), self.depthwise(x), self.norm(x),
            F.max_pool2d(x, 3, 2), F.adaptive_avg_pool2d(x, 1), F.interpolate(x, scale_factor=2.0), x.permute(0, 2, 3, 1).contiguous(),
        )  # fmt: skip


class Sequences(nn.Module):
    """Attention, products of many matrices, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 24, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads), x @ x.transpose(1, 2), self.recurrent(x)[0]


class Bytes(nn.Module):
    """What there is on 8 bits: convolutions of each kind, a residual sum, a maximum pool, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 32, 5, padding=2), nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise, self.point = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 48, 1)
        self.head = nn.Linear(48 * 100, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu(), 2)
        x = (x + self.plain(x)).relu()
        out: Tensor = self.head(self.point(self.depthwise(x).relu()).relu().flatten(1))
        return out


def network(module: nn.Module, *shape: int, passes: str = "default") -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return mlec.compile(module.eval(), (torch.randn(4, *shape),), passes=passes, validate=False, progress=False)

    return make


def estimator(model: Any) -> Callable[[], Any]:
    def make() -> Any:
        x = np.random.default_rng(0).normal(size=(600, 12))
        return mlec.compile(model.fit(x, (x[:, 0] > x[:, 1]).astype(float)), validate=False, progress=False)

    return make


MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "rows": (network(Rows(), 96), 2, 3000),
    "images": (network(Images(), 16, 20, 20), 1, 70),
    "bytes": (network(Bytes(), 3, 20, 20, passes="default,quantize-int8{measure = false}"), 1, 100),
    "sequences": (network(Sequences(), 12, 16), 1, 1500),
    "row program": (estimator(make_pipeline(StandardScaler(), LogisticRegression())), 64, 200_000),
    "forest": (estimator(RandomForestRegressor(20, max_depth=6, random_state=0)), 64, 20_000),
    "neighbours": (estimator(KNeighborsRegressor()), 2, 3000),
}
"""What makes a model, a number of rows for each of whose kernels 20 us are more than enough, and one that threads pay for."""


def inputs_of(model: Any, rows: int) -> list[Any]:
    (spec,) = model.signature.inputs
    return [np.random.default_rng(1).normal(size=(rows, *spec.shape[1:])).astype("f8" if spec.dtype == "f64" else "f4")]


def tasks() -> set[int]:
    """The threads of this process."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def sleeps(others: set[int]) -> dict[int, str]:
    """How often each of the threads has gone to sleep, once all of them do."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [Path(f"/proc/self/task/{other}/status").read_text() for other in others]
        if all("State:\tS" in text for text in found):
            break
        time.sleep(0.01)
    return {
        other: text.split("\nvoluntary_ctxt_switches:")[1].split()[0] for other, text in zip(others, found, strict=True)
    }


@pytest.mark.parametrize("name", MODELS)
def test_threads_change_no_bit_and_sleep_while_work_is_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, few, many = MODELS[name]
    model = make()
    executable = model.executable
    monkeypatch.setattr(threads, "effective_cpu_count", lambda: 4)
    monkeypatch.setattr(library, "default_num_threads", lambda: 4)
    small, large = inputs_of(model, few), inputs_of(model, many)

    def outputs(count: int) -> list[Any]:
        """In a thread of its own, as the pool belongs to that and keeps its size."""
        before = tasks()
        executable.num_threads = count
        found = executable.run(large)
        others = tasks() - before
        before_small = sleeps(others)
        for _ in range(20):
            executable.run(small)
        assert sleeps(others) == before_small
        executable.run(large)
        assert (sleeps(others) != before_small) == (count > 1)
        return list(found)

    results = []
    for count in (1, 2, 3, 4):
        with ThreadPoolExecutor(1) as caller:
            results.append(caller.submit(outputs, count).result())
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, more)

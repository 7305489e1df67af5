"""Models whose arguments hold tensors in dicts, lists, tuples and dataclasses: names, validation, every way to pass them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import mlec

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402


class Batched(nn.Module):
    """A tensor, a dict and a tuple within it, and an argument that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, extra: dict[str, Any], bias: Tensor | None = None) -> dict[str, Any]:
        low, high = extra["bounds"]
        y = self.layer(x * extra["mask"]).clamp(low, high)
        return {"y": y if bias is None else y + bias, "parts": [y.sum(1), y.mean(1)]}


def batched(n: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(n)
    extra = {"mask": rng.random((n, 4)), "bounds": (-rng.random((n, 3)), rng.random((n, 3)))}
    x = rng.normal(size=(n, 4)).astype(np.float32)
    return x, torch.utils._pytree.tree_map(lambda a: a.astype(np.float32), extra)


def expected(module: nn.Module, *arguments: Any) -> list[Any]:
    with torch.no_grad():
        tensors = torch.utils._pytree.tree_map(torch.from_numpy, arguments)
        return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(module(*tensors))]


def test_dicts_and_tuples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Batched().eval()
    compiled = mlec.compile(module, batched(3))
    names = [spec.name for spec in compiled.signature.inputs]
    assert names == ["x", "extra.mask", "extra.bounds.0", "extra.bounds.1"]
    assert [spec.name for spec in compiled.signature.outputs] == ["y", "parts.0", "parts.1"]
    assert compiled.report.parity["methods"]["run"]["max_abs_error"] < 1e-6
    compiled.save(tmp_path / "model.mle")
    model = mlec.load(tmp_path / "model.mle")
    for n in (0, 1, 5):
        x, extra = batched(n)
        wanted = expected(module, x, extra)
        flat = [x, extra["mask"], *extra["bounds"]]
        for given in (
            [x, extra], (x, extra, None), flat, {"x": x, "extra": extra}, dict(zip(names, flat, strict=True)),
            [x, {"bounds": list(extra["bounds"]), "mask": extra["mask"]}],
        ):  # fmt: skip
            for got, want in zip(model.run(given), wanted, strict=True):
                np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_allclose(model(x, extra)[0], wanted[0], atol=1e-6)
        np.testing.assert_allclose(model(x=x, extra=extra)[0], wanted[0], atol=1e-6)
    assert mlec.validate_export(module, tmp_path / "model.mle", batched(4))["passed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, e: [x], "expected 2 arguments"),
        (lambda x, e: [x, {"mask": e["mask"]}], "input 'extra': missing bounds"),
        (lambda x, e: [x, {**e, "other": x}], "input 'extra': unexpected other"),
        (lambda x, e: [x, {**e, "bounds": e["bounds"][:1]}], r"input 'extra.bounds': missing 1"),
        (lambda x, e: {"x": x, "extras": e}, "missing extra"),
        (lambda x, e: [x, {**e, "mask": x[:, :2]}], "extra.mask"),
    ],
)
def test_entries_that_do_not_fit_are_named(change: Any, message: str) -> None:
    compiled = mlec.compile(Batched().eval(), batched(3), validate=False)
    with pytest.raises(mlec.InputError, match=message):
        compiled.run(change(*batched(2)))


@dataclass
class Pair:
    left: Any
    right: Any


class Named(NamedTuple):
    left: Any
    right: Any


torch.export.register_dataclass(Pair)


class Sums(nn.Module):
    def forward(self, both: Any) -> Any:
        return Pair(both.left + both.right, both.left * both.right)


class FromDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["a"] - batch["b"]


class FromList(nn.Module):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return parts[0] - parts[1]


@pytest.mark.parametrize("kind", [Pair, Named])
def test_records(kind: Any) -> None:
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    compiled = mlec.compile(Sums(), (kind(torch.from_numpy(a), torch.from_numpy(b)),))
    assert [spec.name for spec in compiled.signature.inputs] == ["both.left", "both.right"]
    assert [spec.name for spec in compiled.signature.outputs] == ["left", "right"]
    for given in ([kind(a, b)], kind(a, b), [a, b], {"left": a, "right": b}, {"both": kind(a, b)}):
        np.testing.assert_array_equal(compiled.run(given)[1], a * b)
    np.testing.assert_array_equal(compiled(kind(a, b))[0], a + b)


@pytest.mark.parametrize(
    ("module", "make"), [(FromDict(), lambda a, b: {"a": a, "b": b}), (FromList(), lambda a, b: [a, b])]
)
def test_a_single_container(module: nn.Module, make: Any) -> None:
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    example = make(torch.from_numpy(a), torch.from_numpy(b))
    program = torch.export.export(module, (example,))
    for compiled in (mlec.compile(module, (example,)), mlec.compile(program), mlec.compile(program, (example,))):
        for given in (make(a, b), [make(a, b)], [a, b]):
            np.testing.assert_array_equal(compiled.run(given)[0], a - b)
        np.testing.assert_array_equal(compiled(make(a, b))[0], a - b)

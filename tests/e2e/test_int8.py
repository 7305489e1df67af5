"""precision="int8" from a trained network to a file: accuracy, what the report says, size, saving, the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn

import mlec
from mlec.cli import main
from mlec.ir import run_graph

CALIBRATION = 128


class Transformer(nn.Module):
    """Rows of an image as words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8 * 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer(self.embed(x)).flatten(1))
        return out


def convolutional() -> nn.Module:
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    second = (
        nn.Conv2d(16, 32, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU(),
    )
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(dense, (64,)), (convolutional, (1, 8, 8)), (Transformer, (8, 8))],
    ids=["mlp", "cnn", "transformer"],
)
def test_a_trained_classifier_loses_half_a_point_at_most(
    make: Callable[[], nn.Module], shape: tuple[int, ...], one_thread: None
) -> None:
    """By the interpreter, which is what every kernel is measured against."""
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32).reshape(-1, *shape)
    train, test, train_labels, labels = train_test_split(X, y, test_size=0.4, random_state=0)
    module, data, wanted = make(), torch.tensor(train), torch.tensor(train_labels)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for step in range(160):
        picked = slice(step % 8 * 128, step % 8 * 128 + 128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data[picked]), wanted[picked]).backward()
        optimizer.step()
    module.eval()
    model = mlec.compile(
        module, test[:4], precision="int8", calibration=train[:CALIBRATION], target="numpy", validate=False
    )
    eight = np.asarray(model.run([test])[0]).argmax(axis=1)
    with torch.no_grad():
        source = module(torch.tensor(test)).numpy().argmax(axis=1)
    assert np.mean(source == labels) > 0.9
    assert np.mean(eight == labels) >= np.mean(source == labels) - 0.005
    assert np.mean(eight == source) >= 0.985
    assert all(finding["decision"] == "int8" for finding in model.report.quantization)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks train no faster with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def lowered(wide: nn.Module, data: np.ndarray) -> mlec.Graph:
    """Where no source is needed, without torch's export each time."""
    return mlec.lower(wide, data[:4])


@pytest.fixture(scope="module")
def eight(wide: nn.Module, data: np.ndarray) -> Iterator[mlec.CompiledModel]:
    passes = "default,quantize-int8{measure = false}"  # so that what is tested does not depend on the time of day
    with mlec.compile(wide, data[:4], precision="int8", calibration=data, passes=passes) as model:
        yield model


def test_the_compiled_network_is_the_interpreted_one(
    lowered: mlec.Graph, data: np.ndarray, eight: mlec.CompiledModel
) -> None:
    wanted = mlec.compile(lowered, data[:4], precision="int8", calibration=data, target="numpy", validate=False)
    for rows in (1, 5, 96):
        ours, theirs = eight.run([data[:rows]])[0], wanted.run([data[:rows]])[0]
        np.testing.assert_allclose(ours, theirs, atol=0.01 * np.abs(theirs).max())


class Squeezing(nn.Module):
    """Channels that are scaled by what all of the image says, neighbours, means of windows; then a sequence of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.scales = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 1)
        self.after, self.along = nn.Conv2d(20, 24, 3, padding=1, groups=4), nn.Conv1d(24, 18, 5, padding=2)
        self.head = nn.Linear(18, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.hardswish(self.before(x))
        h = h * nn.functional.hardsigmoid(self.scales(h.mean((2, 3), keepdim=True)))
        h = nn.functional.relu(self.after(nn.functional.interpolate(h, scale_factor=2.0)))
        h = nn.functional.avg_pool2d(h, 3, 2, 1, count_include_pad=False).flatten(2)
        result: torch.Tensor = self.head(nn.functional.silu(self.along(h)).mean(2))
        return result


def test_images_and_sequences_in_8_bits_all_the_way() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(9, 3, 7, 6)).astype(np.float32)
    passes = "default,quantize-int8{measure = false}"
    with mlec.compile(Squeezing().eval(), x, precision="int8", calibration=x, passes=passes) as model:
        assert {finding["decision"] for finding in model.report.quantization} == {"int8"}
        kernels = " ".join(kernel["op"] for kernel in model.report.kernels)
        assert kernels.count("sum_pool_int8") == 3
        for rows in (1, 9):
            ours, theirs = model.run([x[:rows]])[0], run_graph(model.graph, [x[:rows]])[0]
            np.testing.assert_allclose(ours, theirs, atol=0.01 * np.abs(theirs).max())


def test_the_report(eight: mlec.CompiledModel) -> None:
    report = eight.report.to_dict()
    assert report["model"]["precision"] == "int8"
    assert [finding["decision"] for finding in report["quantization"]] == ["int8"] * 3
    first = report["quantization"][0]
    assert (first["layer"], first["op"], first["method"]) == ("0", "matmul", "mse")
    assert first["sqnr_db"] > 30
    assert report["parity"]["tolerance"]["rtol"] == 0.2
    found = report["parity"]["methods"]["run"]
    assert found["rows"] == 100
    assert 0 < found["max_rel_error"] < 0.05
    assert found["label_mismatches"] <= 2
    assert first["reason"] in eight.report.to_html()
    assert report["accuracy"]["layers"] == report["accuracy"]["kept"] == 3
    assert 0 <= report["accuracy"]["accuracy_loss"] < 0.005
    assert "3 of 3 layers" in " ".join(eight.report.to_text().split())
    assert report["warnings"] == []


def test_a_file_of_it(wide: nn.Module, data: np.ndarray, eight: mlec.CompiledModel, tmp_path: Path) -> None:
    saved = eight.save(tmp_path / "m.mle")
    with mlec.load(tmp_path / "m.mle") as loaded:
        np.testing.assert_array_equal(loaded.run([data])[0], eight.run([data])[0])
        assert loaded.report.quantization == eight.report.quantization
        assert {array.dtype.name for array in loaded.graph.constants.values() if array.ndim == 2} == {"int8"}
        assert run_graph(loaded.graph, [data])[0] == pytest.approx(run_graph(eight.graph, [data])[0])
    assert 4 * sum(p.numel() for p in wide.parameters()) / saved.sections["weights"] > 3.5, "each weight is there once"
    found = mlec.validate_export(wide, tmp_path / "m.mle", [data])
    assert found["passed"]
    assert found["tolerance"]["rtol"] == 0.2


def test_without_calibration_the_examples_serve(wide: nn.Module, lowered: mlec.Graph, data: np.ndarray) -> None:
    model = mlec.compile(lowered, data, precision="int8", target="numpy")
    assert "calibrated with the examples, 96 rows" in model.report.warnings[0]
    with pytest.raises(mlec.UsageError, match="needs inputs to calibrate with"):
        mlec.compile(wide, input_shapes=[("n", 64)], precision="int8", target="numpy")


def test_calibration_comes_in_many_forms(lowered: mlec.Graph, data: np.ndarray) -> None:
    loader = [(torch.tensor(data[:50]), torch.zeros(50)), (torch.tensor(data[50:]), torch.zeros(46))]
    forms: list[Any] = [torch.tensor(data), (data,), {"input": data}, iter(loader), [data[:50], data[50:]]]
    scales = set()
    for form in forms:
        model = mlec.compile(lowered, data[:4], precision="int8", calibration=form, target="numpy", validate=False)
        scales.add(tuple(finding["scale"] for finding in model.report.quantization))
    assert len(scales) == 1


def test_calibration_that_does_not_fit(lowered: mlec.Graph, data: np.ndarray) -> None:
    for wrong, error in ((data[:, :3], mlec.InputError), (7, mlec.UsageError), ([], mlec.UsageError)):
        with pytest.raises(error):
            mlec.compile(lowered, data[:4], precision="int8", calibration=wrong, target="numpy")
    with pytest.raises(mlec.UsageError, match="calibration is for"):
        mlec.compile(lowered, data[:4], calibration=data, target="numpy")


def test_a_bound_of_ones_own_sends_layers_back_to_float32(wide: nn.Module, data: np.ndarray) -> None:
    model = mlec.compile(wide, data, precision="int8", target="numpy", tolerance=mlec.Tolerance(rtol=1e-4))
    assert {finding["decision"] for finding in model.report.quantization} == {"float32"}
    assert model.report.parity["methods"]["run"]["max_rel_error"] < 1e-4
    assert "3 layers went back to float32" in " ".join(model.report.to_text().split())


def test_a_bound_that_the_examples_break(wide: nn.Module, data: np.ndarray) -> None:
    with pytest.raises(mlec.ToleranceError, match="beyond") as caught:
        mlec.compile(wide, 100 * data, precision="int8", calibration=data, target="numpy")
    assert "min_sqnr" in str(caught.value.hint)


def test_a_budget_of_ones_own(lowered: mlec.Graph, data: np.ndarray) -> None:
    def compiled(budget: float) -> mlec.CompiledModel:
        return mlec.compile(lowered, data, precision="int8", target="numpy", accuracy_budget=budget)

    free, nothing = compiled(0.5).report, compiled(0.0).report
    assert free.accuracy["max_accuracy_loss"] == free.accuracy["max_error"] == 0.5
    assert free.accuracy["kept"] == 3
    assert nothing.accuracy["kept"] < 3 or free.accuracy["changed_labels"] == 0
    for wrong in (-0.1, 2, True, "half"):
        with pytest.raises(mlec.UsageError, match="between 0 and 1"):
            compiled(wrong)  # type: ignore[arg-type]
    with pytest.raises(mlec.UsageError, match="is for int8"):
        mlec.compile(lowered, data, target="numpy", accuracy_budget=0.1)


def test_estimators_are_refused() -> None:
    X, y = load_iris(return_X_y=True)
    with pytest.raises(mlec.UsageError, match="is for networks, and this is a classifier"):
        mlec.compile(LogisticRegression(max_iter=500).fit(X, y), precision="int8", calibration=X)


def test_export_model(wide: nn.Module, data: np.ndarray, tmp_path: Path) -> None:
    done = mlec.export_model(wide, tmp_path / "m.mle", [1, 64], quantization="int8", calibration=data, target="numpy")
    assert done["success"], done
    assert done["report"]["model"]["precision"] == "int8"


def test_on_the_command_line(
    wide: nn.Module,
    data: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(wide, (torch.tensor(data[:4]),)), tmp_path / "m.pt2")
    np.savez(tmp_path / "x.npz", input=data[:4])

    def run(*words: str) -> str:
        assert main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    words = ("--precision", "int8", "--calibration", "x.npz", "--accuracy-budget", "0.01", "--target", "numpy")
    out = run("compile", "m.pt2", *words, "-o", "m.mle")
    assert "of the bound" in out
    assert "at most 1.00% of accuracy" in " ".join(out.split())
    assert "of the bound" in run("verify", "m.mle", "--against", "m.pt2", "--inputs", "x.npz")

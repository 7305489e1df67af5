"""Networks through the whole path: compile, save, load and run, at batch sizes that the compiler never saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlec

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from bench.networks import DepthwiseCnn, Encoder, Mlp, Recurrent, ResNet8  # noqa: E402

BATCHES = (1, 2, 5, 33)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.numbers = nn.Linear(4, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.words(ids).mean(1), torch.tanh(self.numbers(numbers))], 1)
        out = self.head(joined)
        return out, torch.softmax(out, -1)


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 10, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gru(x)[0]
        return out[:, -1]


class LogMel(nn.Module):
    """What speech models begin with."""

    def __init__(self, length: int = 400, bands: int = 8) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("window", torch.hann_window(length))
        self.register_buffer("bands", torch.rand(length // 2 + 1, bands, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        power = torch.stft(x, self.length, 160, window=self.window, return_complex=True).abs() ** 2
        return torch.log((power.transpose(1, 2) @ self.bands).clamp(min=1e-10))


class Mixing(nn.Module):
    """What mixes positions in the frequency domain: by a transform of both axes, and by weights for each frequency."""

    def __init__(self, width: int = 8, modes: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.randn(modes, width, width, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.fft.fft2(x).real)
        spectrum = torch.fft.rfft(x, dim=1)
        out = torch.zeros_like(spectrum)
        out[:, : len(self.weight)] = torch.einsum("bki,kio->bko", spectrum[:, : len(self.weight)], self.weight)
        mixed: Tensor = torch.fft.irfft(out, n=x.shape[1], dim=1)
        return mixed


def floats(*shape: int) -> Callable[[int], list[Any]]:
    return lambda n: [np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)]


def ids(*shape: int) -> Callable[[int], list[Any]]:
    return lambda n: [np.random.default_rng(n).integers(0, 50, (n, *shape))]


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[int], list[Any]]]] = {
    "mlp": (lambda: Mlp(20, 33, 7), floats(20)),
    "resnet": (lambda: ResNet8(width=8), floats(3, 16, 16)),
    "depthwise": (lambda: DepthwiseCnn(width=16), floats(1, 49, 10)),
    "lstm": (lambda: Recurrent(6, 20, 3), floats(9, 6)),
    "gru": (Gru, floats(5, 6)),
    "encoder": (lambda: Encoder(50, 32, 2, 2, 12), ids(12)),
    "log_mel": (LogMel, floats(1000)),
    "mixing": (Mixing, floats(16, 8)),
    "two_inputs": (TwoInputs, lambda n: [*ids(5)(n), *floats(4)(n)]),
}


def trained_like(module: Any) -> Any:
    """Running statistics that are not the initial ones, as after training."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return module.eval()


def source(module: Any, inputs: list[Any]) -> list[Any]:
    with torch.no_grad():
        result = module(*(torch.from_numpy(x) for x in inputs))
    return [r.numpy() for r in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", NETWORKS)
def test_any_batch(name: str, tmp_path: Path) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    module = trained_like(make())
    compiled = mlec.compile(module, tuple(inputs(2)))
    compiled.save(tmp_path / "model.mle")
    loaded = mlec.load(tmp_path / "model.mle")
    for rows in BATCHES:
        given = inputs(rows)
        for got, wanted in zip(loaded.run(given), source(module, given), strict=True):
            assert got.shape == wanted.shape
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1e-3, np.abs(wanted).max()))
    empty = loaded.run(inputs(0))
    assert all(len(e) == 0 for e in empty)


def test_exported_program_file(tmp_path: Path) -> None:
    module = trained_like(Mlp(8, 16, 4))
    program = torch.export.export(module, (torch.zeros(4, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    compiled = mlec.compile(tmp_path / "model.pt2")
    x = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
    np.testing.assert_allclose(compiled.run([x])[0], source(module, [x])[0], atol=1e-5)
    np.testing.assert_allclose(compiled(x)[0], compiled.run({compiled.signature.inputs[0].name: x})[0])


def test_double_examples_of_a_single_network(tmp_path: Path) -> None:
    """numpy makes float64: a network of float32 takes it as what it computes in, and so does its source."""
    module = trained_like(Mlp(8, 16, 4))
    x = np.random.default_rng(0).normal(size=(7, 8))
    wanted = source(module, [x.astype(np.float32)])[0]
    compiled = mlec.compile(module, x)
    np.testing.assert_allclose(compiled.run([x])[0], wanted, atol=1e-5)
    program = torch.export.export(module, (torch.zeros(7, 8),))
    np.testing.assert_allclose(mlec.compile(program, x).run([x])[0], wanted, atol=1e-5)
    compiled.save(tmp_path / "model.mle")
    assert mlec.validate_export(module, tmp_path / "model.mle", x)["passed"]


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)])
def test_networks_in_16_bits(dtype: Any, unit: float) -> None:
    torch.manual_seed(0)
    module = Mlp(64, 128, 4).eval().to(dtype)
    x = torch.randn(50, 64).to(dtype)
    compiled = mlec.compile(module, x)
    got = compiled.run([x])[0].astype(np.float64)
    wanted = module(x).detach().double().numpy()
    assert np.abs(got - wanted).max() <= 8 * unit * np.abs(wanted).max()
    assert compiled.report.parity["tolerance"]["rtol"] == 8 * unit


@pytest.mark.parametrize("option", [{"tolerance": 1e-3}, {"passes": 5}])
def test_options_of_another_type(option: dict[str, Any]) -> None:
    with pytest.raises(mlec.MlecError, match=f"{next(iter(option))} takes"):
        mlec.compile(Mlp(8, 16, 4).eval(), torch.zeros(2, 8), **option)


def test_metadata_is_a_mapping(tmp_path: Path) -> None:
    compiled = mlec.compile(nn.Linear(3, 2).eval(), torch.zeros(2, 3), validate=False)
    with pytest.raises(mlec.MlecError, match="metadata takes a mapping"):
        compiled.save(tmp_path / "model.mle", metadata=[1])  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_tensors_without_elements_are_refused() -> None:
    compiled = mlec.compile(nn.Linear(3, 2).eval(), torch.zeros(2, 3), validate=False)
    with pytest.raises(mlec.InputError, match="meta device"):
        compiled.run([torch.zeros(2, 3, device="meta")])


def test_a_source_that_cannot_run_the_inputs(tmp_path: Path) -> None:
    ones = np.ones((4, 3), np.float32)
    mlec.compile(nn.Linear(3, 2).eval(), ones).save(tmp_path / "model.mle")
    with pytest.raises(mlec.MlecError, match="source model fails") as caught:
        mlec.validate_export(nn.Linear(5, 2), tmp_path / "model.mle", ones)
    assert "validate=False" in (caught.value.hint or "")


def test_the_same_tensor_twice() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + 2 * y

    ones = torch.ones(2, 3)
    compiled = mlec.compile(Sum(), (ones, ones))
    np.testing.assert_array_equal(compiled.run([np.ones((4, 3)), np.zeros((4, 3))])[0], np.ones((4, 3)))


def test_positions_outside_an_embedding_are_refused_as_torch_does(tmp_path: Path) -> None:
    module = nn.Embedding(5, 3)
    compiled = mlec.compile(module, torch.zeros(2, 2, dtype=torch.int64))
    compiled.save(tmp_path / "model.mle")
    for model in (compiled, mlec.load(tmp_path / "model.mle")):
        assert model.run([np.array([[0, 4]])])[0].shape == (1, 2, 3)
        for position in (5, -1):
            with pytest.raises(mlec.InputError, match=rf"picks entries 0 to 4, got {position}"):
                model.run([np.array([[0, position]])])


def test_float64_is_promised_only_where_the_network_computes_in_it() -> None:
    module = torch.nn.Linear(3, 2).eval()
    with pytest.raises(mlec.MlecError, match="computes in f32") as caught:
        mlec.compile(module, torch.zeros(4, 3), precision="fp64", progress=False)
    assert caught.value.code == "E_NOT_OFFERED"
    x = torch.randn(4, 3, dtype=torch.float64)
    compiled = mlec.compile(module.double(), x, precision="fp64", progress=False)
    np.testing.assert_allclose(compiled.run([x])[0], module(x).detach(), rtol=1e-12, atol=1e-15)

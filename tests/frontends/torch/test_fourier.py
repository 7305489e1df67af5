"""torch.fft, short-time transforms and models with them, against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlec.errors import UnsupportedOpError
from mlec.frontends.base import LowerOptions
from mlec.ir import run_graph
from tests.frontends.torch.common import FRONTEND, compare, lower
from tests.frontends.torch.test_ops import Together, check, floats

LENGTHS = (1, 2, 5, 8, 97, 400, 509, 1000)


def real(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z.resolve_conj()) if z.is_complex() else z


def around(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers that depend on x, with a spectrum of no symmetry."""
    return torch.complex(x, x.flip(-1) * 0.5 - x * x)


TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fft": lambda x: real(torch.fft.fft(around(x))),
    "ifft": lambda x: real(torch.fft.ifft(around(x))),
    "fft_of_real": lambda x: real(torch.fft.fft(x)),
    "ifft_of_real": lambda x: real(torch.fft.ifft(x)),
    "rfft": lambda x: real(torch.fft.rfft(x)),
    "hfft": lambda x: torch.fft.hfft(around(x), n=x.shape[-1]),
    "ihfft": lambda x: real(torch.fft.ihfft(x)),
    "irfft": lambda x: torch.fft.irfft(around(x), n=x.shape[-1]),
}


@pytest.mark.parametrize("n", LENGTHS)
def test_every_transform(n: int) -> None:
    group = Together(TRANSFORMS, floats(3, n))
    for name in TRANSFORMS:
        group.check(name)


def transform(name: str, **settings: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: real(getattr(torch.fft, name)(around(x) if name == "irfft" else x, **settings))


SETTINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{
        f"norm_{norm}_{name}": transform(name, norm=norm)
        for norm in ("forward", "backward", "ortho")
        for name in ("fft", "ifft", "rfft", "irfft")
    },
    **{f"n_{n}_{name}": transform(name, n=n) for n in (5, 11, 30) for name in ("fft", "rfft", "irfft")},
    "dim": lambda x: real(torch.fft.fft(x, dim=1)),
    "dim_rfft": lambda x: real(torch.fft.rfft(x, dim=1, n=7)),
    "dim_irfft": lambda x: torch.fft.irfft(around(x), dim=1),
    "fft2": lambda x: real(torch.fft.fft2(x)),
    "ifft2": lambda x: real(torch.fft.ifft2(around(x), norm="ortho")),
    "rfft2": lambda x: real(torch.fft.rfft2(x)),
    "irfft2": lambda x: torch.fft.irfft2(around(x)),
    "fftn": lambda x: real(torch.fft.fftn(x, dim=(1, 2), s=(4, 20))),
    "irfftn": lambda x: torch.fft.irfftn(around(x), dim=(1, 2), s=(6, 9), norm="forward"),
    "shifted": lambda x: real(torch.fft.fftshift(torch.fft.fft(x), dim=-1)),
    "frequencies": lambda x: x * torch.fft.rfftfreq(2 * x.shape[-1] - 1),
}  # fmt: skip


def test_settings() -> None:
    group = Together(SETTINGS, floats(3, 9, 14))
    for name in SETTINGS:
        group.check(name)


def test_of_doubles_and_of_integers() -> None:
    check(lambda x: real(torch.fft.fft(x)), floats(3, 60, dtype=torch.float64), rtol=1e-14)
    check(lambda x: real(torch.fft.rfft(x)), torch.arange(36).reshape(3, 12))


def test_what_is_not_finite_is_so_in_every_result() -> None:
    x = floats(4, 64)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    graph = lower(lambda x: real(torch.fft.rfft(x)), x)
    (found,) = run_graph(graph, [x.numpy()])
    assert np.isfinite(found[[0, 3]]).all()
    assert not np.isfinite(found[[1, 2]]).all(axis=-1).any()


def test_the_length_must_be_known() -> None:
    with pytest.raises(UnsupportedOpError, match="must be fixed") as caught:
        FRONTEND.lower(Rows(), LowerOptions(input_shapes={"x": ("n", "length")}))
    assert "test_fourier.py" in str(caught.value)


class Rows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(x).abs()


SHORT_TIME: dict[str, dict[str, Any]] = {
    "plain": {"n_fft": 16},
    "window": {"n_fft": 20, "hop_length": 7, "win_length": 15, "window": torch.hann_window(15), "normalized": True},
    "not_centred": {"n_fft": 16, "hop_length": 5, "center": False, "window": torch.hann_window(16)},
    "two_sided": {"n_fft": 12, "hop_length": 6, "onesided": False, "pad_mode": "constant"},
}


@pytest.mark.parametrize("name", SHORT_TIME)
def test_short_time_transforms(name: str) -> None:
    settings = SHORT_TIME[name]
    check(lambda x: real(torch.stft(x, return_complex=True, **settings)), floats(3, 70))


@pytest.mark.parametrize("name", ["plain", "window"])
def test_back_from_short_time_transforms(name: str) -> None:
    settings = dict(SHORT_TIME[name])
    settings.setdefault("window", torch.hann_window(settings["n_fft"]))

    def back(x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, return_complex=True, **settings)
        return torch.istft(spectrum * (1 + spectrum.abs()), length=61, **settings)

    check(back, floats(3, 70), rtol=5e-6)


def test_a_signal_of_any_length() -> None:
    class Power(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            window = torch.hann_window(32)
            return torch.stft(x, 32, 8, window=window, return_complex=True).abs()

    graph = FRONTEND.lower(Power(), LowerOptions(input_shapes={"x": ("n", "length")}))
    run = FRONTEND.oracle(Power())["run"]
    for shape in ((1, 64), (3, 101)):
        compare(graph, run, [floats(*shape)])

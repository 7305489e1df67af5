"""Ops on complex tensors, against torch itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from mlec.errors import MlecError
from mlec.frontends import fx_fourier  # noqa: F401  (fills the table)
from mlec.frontends.fx_complex import COMPLEX
from tests.frontends.torch.common import Function, lower
from tests.frontends.torch.test_handlers import overload
from tests.frontends.torch.test_ops import Together, check, floats

X, Y = floats(3, 4, 6), floats(3, 4, 6, dtype=torch.float64).float().roll(1, 2)
MASK = torch.arange(6) % 2 == 0


@pytest.mark.parametrize("name", sorted(COMPLEX))
def test_key_names_an_op_of_torch(name: str) -> None:
    assert str(overload(name)) == name


def parts(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z.resolve_conj()) if z.is_complex() else z


ONE: dict[str, Any] = {
    "abs": torch.abs, "angle": torch.angle, "conj": torch.conj, "conj_physical": torch.conj_physical, "neg": torch.neg, "real": torch.real,
    "imag": torch.imag, "exp": torch.exp, "log": torch.log, "sgn": torch.sgn, "reciprocal": torch.reciprocal, "square": torch.square,
    "power": lambda z: z**3, "isnan": torch.isnan, "sum": lambda z: z.sum(1), "mean": lambda z: z.mean((1, 2)),
    "cumsum": lambda z: z.cumsum(2), "turned": lambda z: z.transpose(1, 2), "adjoint": lambda z: z.mH, "cut": lambda z: z[:, 1:3, ::2],
    "picked": lambda z: z[:, :, [0, 0, 5]], "stacked": lambda z: torch.stack([z, z + 1], 1), "joined": lambda z: torch.cat([z, z.abs()], 2),
    "flipped": lambda z: z.flip(2), "rolled": lambda z: z.roll(2, -1), "padded": lambda z: F.pad(z, (1, 2), value=3.0),
    "split": lambda z: z.split(2, 1)[1], "reshaped": lambda z: z.reshape(z.shape[0], 24), "repeated": lambda z: z.repeat(1, 2, 1),
    "masked": lambda z: z.masked_fill(MASK, 2.0), "chosen": lambda z: torch.where(MASK, z, z.conj()), "number": lambda z: z * 2 + 1,
    "complex_number": lambda z: z * (2 - 1j) + 1j, "from_number": lambda z: 1 - z, "over_number": lambda z: z / 4.0,
    "number_over": lambda z: 2 / z, "wider": lambda z: z.to(torch.complex128), "assigned": lambda z: _assigned(z),
    "zeros": lambda z: torch.zeros_like(z) + z, "full": lambda z: torch.full((6,), 1 - 2j) * z, "of_pairs": lambda z: _turned(z),
    "unbound": lambda z: z.unbind(1)[2], "real_of_conj": lambda z: (z.conj() * z).real, "imag_of_conj": lambda z: z.conj().imag * 2,
    "size": lambda z: z.abs().pow(2).sum(1), "sqrt": torch.sqrt, "tanh": torch.tanh, "far_tanh": lambda z: torch.tanh(60 * z),
    "near_tanh": lambda z: torch.tanh(1e-3 * z), "sigmoid": torch.sigmoid, "var": lambda z: z.var(2),
    "std": lambda z: z.std((1, 2), correction=0), "norm": lambda z: torch.linalg.vector_norm(z, 3, 2),
    "prod": lambda z: z.prod(1), "prod_of_odd": lambda z: z[:, :3].prod(1, keepdim=True), "prod_of_one": lambda z: z[:, :, :1].prod(-1),
    "prod_of_none": lambda z: z[:, :0].prod(1), "prod_of_real": lambda z: z.abs().prod(2, dtype=torch.cfloat),
    "is_number": lambda z: z * MASK == 0, "is_not": lambda z: z != 1j, "roots_of_squares": lambda z: torch.sqrt(z * z),
    "roots_beside_the_cut": lambda z: torch.sqrt(torch.complex(-z.abs(), torch.where(MASK, -0.0, 0.0) * z.abs())),
}  # fmt: skip
TWO: dict[str, Any] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "alpha": lambda z, w: torch.sub(z, w, alpha=2),
    "eq": lambda z, w: torch.where(MASK, z, w) == w, "ne": lambda z, w: torch.where(MASK, z, w) != w,
    "matmul": lambda z, w: z @ w.mT, "einsum": lambda z, w: torch.einsum("bik,bok->bio", z, w),
    "over_rows": lambda z, w: torch.einsum("bik,iok->bok", z, w[0, :, None]),
}  # fmt: skip


PRODUCTS = ("matmul", "einsum", "over_rows")
"""These take no real tensor beside a complex one, in torch."""


def _assigned(z: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(z.shape[0], 4, 8, dtype=torch.cfloat)
    out[:, :, 1:4] = z[:, :, :3]
    out[:, 2] = 1
    return out


def _turned(z: torch.Tensor) -> torch.Tensor:
    """Positions as language models turn them."""
    angle = torch.outer(torch.arange(4), torch.tensor([1.0, 0.5, 0.25]))
    pairs = torch.view_as_complex(z.abs().reshape(z.shape[0], 4, 3, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(2)


ALL = {name: lambda x, y, f=f: parts(f(torch.complex(x, y))) for name, f in ONE.items()} | {
    **{name: lambda x, y, f=f: parts(f(torch.complex(x, y), torch.complex(y, x.sin()))) for name, f in TWO.items()},
    **{
        f"{name}_real": lambda x, y, f=f: parts(f(torch.complex(x, y), y))
        for name, f in TWO.items()
        if name not in PRODUCTS
    },
    **{
        f"real_{name}": lambda x, y, f=f: parts(f(y, torch.complex(x, y)))
        for name, f in TWO.items()
        if name not in PRODUCTS
    },
}
TOGETHER = Together(ALL, X, Y)


@pytest.mark.parametrize("name", ALL)
def test_an_op(name: str) -> None:
    TOGETHER.check(name, rtol=5e-6)


def test_products_of_what_is_not_finite() -> None:
    special = torch.tensor([[torch.inf, 1.0, torch.nan, -torch.inf, 0.0, 3e38, 1e-40]])
    check(lambda x: parts(torch.complex(x, x.roll(1, 1)) * 2.0), special)
    check(lambda x: torch.complex(x, x.roll(1, 1)).abs(), special)


def test_product_of_all() -> None:
    check(lambda x: parts(torch.complex(x, x.sin()).prod()), floats(3, 5), batches=False)


class Spectral(nn.Module):
    """The layer of Fourier neural operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(x.shape[0], 5, spectrum.shape[-1], dtype=torch.cfloat)
        out[:, :, :4] = torch.einsum("bix,iox->box", spectrum[:, :, :4], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


def test_complex_weights() -> None:
    check(Spectral(), floats(3, 3, 20))


REFUSED: dict[str, tuple[Any, str]] = {
    "op": (lambda x: torch.fft.fft(x).cumprod(-1).abs(), "aten.cumprod.default"),
    "power": (lambda x: (torch.fft.fft(x) ** 0.3).abs(), "to the power of 0.3"),
    "output": (lambda x: torch.fft.fft(x), "output 'y' is complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(MlecError) as caught:
        lower(function, X)
    assert message in str(caught.value)
    assert caught.value.hint
    assert caught.value.loc


def test_a_complex_input_is_refused() -> None:
    with pytest.raises(MlecError, match="complex64") as caught:
        lower(Function(lambda x: x.real, 1), X.to(torch.complex64))
    assert "torch.complex" in (caught.value.hint or "")

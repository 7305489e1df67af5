"""Fourier transforms as products, against numpy's in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mlec.backends.tvm.fourier_products import (
    LONGEST,
    MOST_FACTORS,
    Chirp,
    Dft,
    Direct,
    Steps,
    fourier,
    real_of_half,
    way,
)
from mlec.errors import UnsupportedOpError
from mlec.ir import Graph, GraphBuilder, run_graph, tensor

LENGTHS = (1, 2, 3, 5, 7, 8, 16, 60, 97, 251, 400, 509, 512, 1000, 1009, 1024, 2003, 4096, 3 * 1009)
RNG = np.random.default_rng(0)


def graph_of(dft: Dft, dtype: str, is_complex: bool, behind: int = 1) -> Graph:
    b = GraphBuilder()
    inputs = [b.input(name, tensor(dtype, ("n", dft.given, behind))) for name in ("x", "y")[: 1 + is_complex]]
    return b.finish(fourier(b, (inputs[0], inputs[1] if is_complex else None), 1, dft))


def error(dft: Dft, dtype: str, is_complex: bool, behind: int = 1) -> float:
    """The largest, as a part of the largest result."""
    arrays = [RNG.normal(size=(5, dft.given, behind)).astype(dtype) for _ in range(1 + is_complex)]
    z = np.zeros((5, dft.n, behind), np.complex128)
    z[:, : dft.given] = arrays[0] + (1j * arrays[1] if is_complex else 0)
    wanted = np.fft.fft(z, axis=1) if dft.sign < 0 else np.fft.ifft(z, axis=1, norm="forward")
    wanted = wanted[:, : dft.kept] * dft.scale
    re, im = run_graph(graph_of(dft, "f64" if dtype == "float64" else "f32", is_complex, behind), arrays)
    assert re.dtype == im.dtype == dtype
    return float(np.abs(re + 1j * im - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("n", LENGTHS)
def test_all_lengths(n: int) -> None:
    for is_complex, behind in ((False, 1), (True, 1), (True, 3)):
        kept = n if is_complex else n // 2 + 1
        assert error(Dft(n, n, kept, -1), "float32", is_complex, behind) < 1e-6
        assert error(Dft(n, n, kept, 1, 1 / n), "float64", is_complex, behind) < 1e-14


def test_inputs_that_are_zero_and_results_that_are_not_wanted() -> None:
    for n in (60, 400, 1009):
        for given, kept in ((1, n), (n, 1), (n // 3, n // 2), (n - 1, 7)):
            assert error(Dft(n, given, kept, -1, 0.5), "float64", True) < 1e-14


@pytest.mark.parametrize("n", [1, 2, 3, 9, 400, 512, 1009])
def test_real_results_of_half_a_spectrum(n: int) -> None:
    wanted = RNG.normal(size=(4, n, 2))
    spectrum = np.fft.rfft(wanted, axis=1)
    b = GraphBuilder()
    re, im = (b.input(name, tensor("f64", ("n", n // 2 + 1, 2))) for name in ("x", "y"))
    graph = b.finish([real_of_half(b, (re, im), 1, n, 1, 1 / n)])
    np.testing.assert_allclose(run_graph(graph, [spectrum.real, spectrum.imag])[0], wanted, atol=1e-14)


def test_the_cheapest_way() -> None:
    assert way(16, 16, 9, 1, 0)[1] == Direct()
    assert isinstance(way(512, 512, 257, 1, 0)[1], Steps)
    assert isinstance(way(10007, 10007, 10007, 2, 0)[1], Chirp)
    costs = [way(n, n, n, 2, 0)[0] for n in (256, 1024, 4096)]
    assert all(4 * a < b < 16 * a for a, b in pairwise(costs))  # more than lengths grow, less than their squares


@pytest.mark.parametrize("n", [521, 4096, 10007])
def test_constants_stay_small(n: int) -> None:
    constants = graph_of(Dft(n, n, n, -1), "f32", True).constants.values()
    assert max(array.size for array in constants) <= MOST_FACTORS
    assert sum(array.nbytes for array in constants) < 100 * n + 100_000


def test_too_long() -> None:
    with pytest.raises(UnsupportedOpError, match=str(LONGEST)) as caught:
        graph_of(Dft(LONGEST + 1, 8, 8, -1), "f32", False)
    assert caught.value.hint

"""Kernels of Fourier transforms, against numpy in float64 and beside torch's own errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.fourier import Fourier, fourier, radices
from mlec.ir import Graph, GraphBuilder, run_graph, tensor
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, same_by_threads
from tests.backends.tvm.test_elementwise_tvm import compiled

NARROW = HOST.lanes(32)
RNG = np.random.default_rng(0)
PARTS = {"fft": 2, "rfft": 1, "irfft": 2}


def parts(z: np.ndarray, dtype: str) -> list[np.ndarray]:
    return [z.real.astype(dtype), z.imag.astype(dtype)]


def wanted(f: Fourier, x: Sequence[np.ndarray]) -> np.ndarray:
    """The spectrum, or the real line, along axis 1."""
    z = x[0].astype(np.complex128) + (1j * x[1] if f.parts == 2 else 0)
    if f.op == "rfft":
        return np.fft.rfft(z.real, axis=1) * f.scale
    if f.op == "irfft":
        return np.fft.irfft(z, f.n, axis=1, norm="forward") * f.scale
    return (np.fft.ifft(z, axis=1, norm="forward") if f.inverse else np.fft.fft(z, axis=1)) * f.scale


def error(f: Fourier, lines: int, behind: int = 1, symbolic: bool = False, threads: bool = False) -> float:
    """The largest, as a part of the largest result."""
    first = tirx.Var("n", "int64") if symbolic else lines
    run = compile_kernel(fourier(f, (first, f.given, behind), 1))
    tables = f.places, f.factors.astype(f.dtype)
    worst = 0.0
    for rows in (lines, 1, 0) if symbolic else (lines,):
        x = [RNG.normal(size=(rows, f.given, behind)).astype(f.dtype) for _ in range(f.parts)]
        out = [(rows, f.kept, behind, *[2][: f.pairs])] * f.results
        call = (lambda *a, **k: same_by_threads(run, *a, **k)) if threads else run
        found = call(*x, *tables, out=out if f.results > 1 else out[0], dtype=f.dtype)
        if rows:
            parts = np.moveaxis(found, -1, 0) if f.pairs else found
            numbers = found if f.op == "irfft" else parts[0] + 1j * parts[1]
            expected = wanted(f, x)
            worst = max(worst, float(np.abs(numbers - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("op", PARTS)
def test_lengths(op: str) -> None:
    for n in (1, 3, 26, 77, 400):
        assert error(Fourier(op, n, PARTS[op], False, 0.5, "float32", HOST), 2 * NARROW + 3) < 3e-7, n


@pytest.mark.parametrize("op", PARTS)
def test_lines_of_any_number_behind_and_before(op: str) -> None:
    f = Fourier(op, 24, PARTS[op], False, 1.0, "float64", HOST)
    assert error(f, 19, symbolic=True) < 1e-15
    assert error(f, 3, 2 * NARROW, symbolic=True) < 1e-15
    assert error(Fourier("fft", 12, 2, True, 1 / 12, "float64", HOST), 7) < 1e-15
    assert error(Fourier("fft", 9, 1, True, 1.0, "float64", HOST), 7) < 1e-15


@pytest.mark.parametrize("op", ["fft", "rfft"])
def test_real_and_imaginary_parts_in_turn(op: str) -> None:
    for n in (1, 6, 26, 77):
        f = Fourier(op, n, PARTS[op], False, 0.5, "float32", HOST, pairs=True)
        assert error(f, NARROW + 3, symbolic=n == 6) < 3e-7, n
        assert error(f, 2, 2 * NARROW) < 3e-7, n
    assert error(Fourier("fft", 12, 2, True, 1.0, "float64", HOST, pairs=True), 7) < 1e-15


def test_long_lines_on_several_threads() -> None:
    assert error(Fourier("irfft", 4096, 2, False, 1.0, "float32", HOST), 70, threads=True) < 5e-7


def test_errors_are_those_of_torch() -> None:
    for n in (512, 1000, 1001):
        x = RNG.normal(size=(64, n)).astype(np.float32)
        spectrum = np.fft.rfft(x.astype(np.float64), axis=1)
        theirs = np.abs(torch.fft.rfft(torch.from_numpy(x)).numpy() - spectrum).max() / np.abs(spectrum).max()
        assert error(Fourier("rfft", n, 1, False, 1.0, "float32", HOST), 64) < 2 * theirs


def test_what_is_not_finite_stays_in_its_line() -> None:
    for op in ("rfft", "irfft"):
        f = Fourier(op, 64, PARTS[op], False, 1.0, "float32", HOST)
        x = [RNG.normal(size=(NARROW + 2, f.given, 1)).astype("float32") for _ in range(f.parts)]
        x[0][3, 5], x[-1][NARROW, 7] = np.nan, np.inf
        run = compile_kernel(fourier(f, x[0].shape, 1))
        out = [(len(x[0]), f.kept, 1)] * f.results
        found = run(*x, f.places, f.factors.astype("float32"), out=out if f.results > 1 else out[0])
        for part in found if f.results > 1 else [found]:
            finite = np.isfinite(part[..., 0])
            odd = np.isin(np.arange(len(finite)), (3, NARROW))
            assert finite[~odd].all()
            # The first and the last number of a real spectrum have no imaginary part.
            assert not finite[odd, 1:-1].any()


def test_passes() -> None:
    assert radices(1024, 16) == (16, 8, 8)
    assert radices(8, 8) == (8,)
    assert radices(210, 16) == (2, 3, 5, 7)
    assert radices(34, 16) is None
    for n in range(1, 200):
        found = radices(n, 16)
        assert found is None or np.prod(found, dtype=int) == n
    assert Fourier("fft", 1 << 20, 2, False, 1.0, "float32", HOST).radices is None


def graph_of(op: str, shape: Sequence[int | str], axis: int, **attrs: object) -> Graph:
    b = GraphBuilder()
    x = [b.input(f"x{i}", tensor("f32", tuple(shape))) for i in range(PARTS[op])]
    return b.finish(b.multi(op, *x, axis=axis, **attrs))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("axis", "length"), [(0, 12), (1, 17)])  # of 17, as a product of matrices
def test_any_axis_and_any_length(axis: int, length: int, pairs: bool) -> None:
    sizes = [3, 5, 7]
    sizes[axis] = length
    shape: list[int | str] = list(sizes)
    shape[axis + 1] = "n"
    graph = graph_of("fft", shape, axis, inverse=True, scale=0.25, pairs=pairs)
    x = [RNG.normal(size=sizes).astype("float32") for _ in range(2)]
    for found, expected in zip(compiled(graph).run(x), run_graph(graph, x), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-6)

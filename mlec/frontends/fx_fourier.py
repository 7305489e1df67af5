"""ATen's Fourier transforms, and what torch makes of short-time ones (stft, istft), as IR ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlec.frontends.fx_complex import Complex, as_complex, complex_rule
from mlec.frontends.fx_context import Context, lowers
from mlec.ir import Dim, Value

_SCALES = (lambda n: 1.0, lambda n: 1 / math.sqrt(n), lambda n: 1 / n)
"""By torch's number of each normalisation."""


def _scale(c: Context, x: Complex | Value, axes: Sequence[int], normalization: int) -> float:
    value = x.re if isinstance(x, Complex) else x
    return _SCALES[normalization](math.prod(c.static(value, axis, "a transformed axis") for axis in axes))


def _along(c: Context, x: Complex, axes: Sequence[int], inverse: bool, scale: float) -> Complex:
    """One axis after the other, the last first."""
    for axis in reversed(axes):
        re, im = c.b.multi("fft", *x.parts, axis=axis, inverse=inverse, scale=scale)
        x, scale = Complex(re, im), 1.0
    return x


@complex_rule("_fft_c2c.default")
def _c2c(c: Context, x: Complex, dim: Sequence[int], normalization: int, forward: bool) -> Complex:
    return _along(c, x, dim, not forward, _scale(c, x, dim, normalization))


@complex_rule("_fft_r2c.default")
def _r2c(c: Context, x: Value, dim: Sequence[int], normalization: int, onesided: bool) -> Complex:
    scale = _scale(c, x, dim, normalization)
    if not onesided:
        return _along(c, Complex(x), dim, False, scale)
    *others, last = dim
    re, im = c.b.multi("rfft", x, axis=last, scale=scale)
    return _along(c, Complex(re, im), others, False, 1.0)


@complex_rule("_fft_c2r.default")
def _c2r(c: Context, x: Complex, dim: Sequence[int], normalization: int, last_dim_size: Dim) -> Value:
    *others, last = dim
    if not isinstance(last_dim_size, int):
        raise c.unsupported(
            f"the length must be fixed, but it is {last_dim_size}", "give it as a number in input_shapes"
        )
    c.static(x.re, last, "a transformed axis")
    size = last_dim_size * math.prod(c.static(x.re, axis, "a transformed axis") for axis in others)
    re, im = as_complex(c, _along(c, x, others, True, 1.0))
    return c.b("irfft", re, im, axis=last, n=last_dim_size, scale=_SCALES[normalization](size))


@lowers("unfold_backward.default")
def _overlap_add(c: Context, x: Value, input_sizes: Sequence[Dim], dim: int, size: int, step: int) -> Value:
    """Windows along the last axis are added up where they overlap: as many shifted sums as windows lie over one place."""
    rank = x.type.rank - 1
    axis = dim % rank
    x = c.transpose(x, (*range(axis + 1), rank, *range(axis + 1, rank)))
    over = -(-size // step)
    x = _extended(c, x, axis + 1, 0, over * step - size)
    total: Value | None = None
    for i in range(over):
        piece = _extended(c, c.take(x, axis + 1, i * step, (i + 1) * step), axis, i, over - i)
        total = piece if total is None else c.b("add", total, piece)
    assert total is not None
    blocks, behind = total.type.shape[axis], total.type.shape[axis + 2 :]
    line = c.reshape(total, (*total.type.shape[:axis], blocks * step, *behind))
    return c.take(line, axis, 0, c.shape[axis])


def _extended(c: Context, x: Value, axis: int, before: int, after: int) -> Value:
    """With zeros around, along an axis."""
    if not before and not after:
        return x
    widths = [tuple(count if i == axis else 0 for i in range(x.type.rank)) for count in (before, after)]
    return c.b("pad", x, before=widths[0], after=widths[1], value=0.0, mode="constant")

"""Discrete Fourier transforms along one axis. Complex numbers are pairs of real ones: real parts, imaginary parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from mlec.ir.dim import Dim, static
from mlec.ir.op import Array, Attr, Attrs, Case, Cost, CostRule, OpDef, Reference, TypeRule, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    bool_attr,
    float_attr,
    floats,
    int_attr,
    normal_axis,
    operands,
    pick_dtype,
    require,
    same_dtype,
)

Complexes = npt.NDArray[np.complex128]


def roots(n: int) -> Complexes:
    """``exp(2 pi i m / n)`` for m from 0 to n - 1: exact at multiples of a quarter turn, as angles are reduced to an eighth of a turn as
    whole numbers.
    """  # fmt: skip
    quarter, rest = np.divmod(4 * np.arange(n), n)
    swapped = 2 * rest > n
    angle = np.pi / 2 * np.minimum(rest, n - rest) / n
    near, far = np.cos(angle), np.sin(angle)
    found = np.where(swapped, far, near) + 1j * np.where(swapped, near, far)
    return np.asarray(found * np.array([1, 1j, -1, -1j])[quarter])


def _along(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, int, int]:
    """The type of a part of the operand, the axis counted from the front, and its extent."""
    dtype, t = same_dtype(types), types[0]
    require(dtype.bits >= 32 and dtype.is_float, f"needs f32 or f64, got {t}", "E_DTYPE")
    require(
        len({t.shape for t in types}) == 1, f"parts must have one shape, got {', '.join(map(str, types))}", "E_SHAPE"
    )
    axis = normal_axis(attrs["axis"], t.rank)
    extent = t.shape[axis]
    require(
        isinstance(extent, int) and extent > 0, f"the transformed axis must have a fixed extent, got {t}", "E_SHAPE"
    )
    assert isinstance(extent, int)
    return t, axis, extent


def _resized(t: TensorType, axis: int, extent: Dim) -> TensorType:
    return TensorType((*t.shape[:axis], extent, *t.shape[axis + 1 :]), t.dtype)


def _complex(part: TensorType, attrs: Attrs) -> Sequence[TensorType]:
    """The results that hold complex numbers: one of `pairs`, or both parts."""
    return [TensorType((*part.shape, 2), part.dtype)] if attrs["pairs"] else [part] * 2


def _fft_type(types: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
    return _complex(_along(types, attrs)[0], attrs)


def _rfft_type(types: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
    t, axis, extent = _along(types, attrs)
    return _complex(_resized(t, axis, extent // 2 + 1), attrs)


def _irfft_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    t, axis, extent = _along(types, attrs)
    n = attrs["n"]
    require(n > 0 and extent == n // 2 + 1, f"half a spectrum of {n} has {n // 2 + 1} numbers, got {extent}", "E_SHAPE")
    return _resized(t, axis, n)


def _fft(
    re: Array, im: Array | None = None, *, axis: int, inverse: bool, scale: float, pairs: bool
) -> tuple[Array, Array] | Array:
    z = re.astype(np.complex128)
    if im is not None:
        z.imag = im
    found = np.fft.ifft(z, axis=axis, norm="forward") if inverse else np.fft.fft(z, axis=axis)
    return _parts(found, scale, pairs, re)


def _rfft(x: Array, *, axis: int, scale: float, pairs: bool) -> tuple[Array, Array] | Array:
    return _parts(np.fft.rfft(x.astype(np.float64), axis=axis), scale, pairs, x)


def _irfft(re: Array, im: Array, *, axis: int, n: int, scale: float) -> Array:
    z = re.astype(np.complex128)
    z.imag = im
    return np.asarray(np.fft.irfft(z, n, axis=axis, norm="forward") * scale, re.dtype)


def _parts(z: Complexes, scale: float, pairs: bool, like: Array) -> tuple[Array, Array] | Array:
    """Scaled apart: numpy would multiply by a complex number, whose imaginary part of zero makes NaN of infinity."""
    parts = np.asarray(z.real * scale, like.dtype), np.asarray(z.imag * scale, like.dtype)
    return np.stack(parts, -1) if pairs else parts


def _cost(of_real: bool) -> CostRule:
    """``5 n log2(n)`` operations for a complex line; half as many where one side is real."""

    def cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
        axis = normal_axis(attrs["axis"], inputs[0].rank)
        whole = max(inputs[0], results[0], key=lambda t: static(t.shape[axis]))
        each = 5 * math.log2(static(whole.shape[axis])) / (2 if of_real else 1)
        return Cost(whole.size * max(1, round(each)), moved_bytes(inputs, results))

    return cost


LENGTHS = (1, 2, 5, 6, 16, 30, 34)
"""Of samples."""


def _sample(op: str, rng: np.random.Generator) -> Case:
    n, dtype, axis = int(rng.choice(LENGTHS)), pick_dtype(rng), int(rng.choice((-1, 1)))
    length = n // 2 + 1 if op == "irfft" else n
    shape = (N, length, int(rng.choice((1, 3, 16)))) if axis == 1 else (N, 2, length)
    parts = 1 if op == "rfft" else 2 if op == "irfft" else int(rng.integers(1, 3))
    attrs = {"axis": axis, "scale": float(rng.choice((1.0, 1 / n)))}
    if op == "fft":
        attrs["inverse"] = bool(rng.integers(2))
    if op == "irfft":
        attrs["n"] = n
    else:
        attrs["pairs"] = bool(rng.integers(2))
    return Case(tuple(floats(rng, *shape, dtype=dtype) for _ in range(parts)), attrs)


def _register(op: str, parts: str, settings: Sequence[Attr], types: TypeRule, function: Reference, doc: str) -> None:
    attrs = (int_attr("axis", -1), *settings, float_attr("scale", 1.0))
    register(
        OpDef(
            op, operands(parts), attrs, types, function, partial(_sample, op), _cost(of_real=op != "fft"), tolerance=64.0, doc=doc
        )
    )  # fmt: skip


_PAIRS = bool_attr("pairs")
_register(
    "fft", "re im?", [bool_attr("inverse"), _PAIRS], _fft_type, _fft,
    "discrete Fourier transform times `scale`; inverse: other sign of the exponent, no factor 1 / n; pairs: one result [..., 2], not two",
)  # fmt: skip
_register(
    "rfft", "x", [_PAIRS], _rfft_type, _rfft,
    "the first half of the spectrum of real numbers, times `scale`: n // 2 + 1 of n; pairs: as fft",
)  # fmt: skip
_register(
    "irfft", "re im", [int_attr("n")], _irfft_type, _irfft,
    "the n real numbers whose spectrum's first half is given, times n * `scale`",
)  # fmt: skip

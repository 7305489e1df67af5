"""Elementary functions as TIR expressions that vectorise: polynomials and integer arithmetic, no call into libm.

Each takes a float32 or float64 expression, scalar or vector (see `vector`), and returns one of the same type. NaN stays
NaN, infinities give the limits. Largest errors in units in the last place, of every 331st float32: exp 1.0, log 0.8,
expm1 1.6, gelu 1.9, silu 2.0, sigmoid 2.4, erf 2.4, log1p 2.4, tanh 2.5, softplus 2.6; in float64 up to 4. Those of gelu
and silu are units of ``|x| / 2`` where x is negative and the result less: of its own units, gelu is off by 41 at -3 and by
some 300 below -4. Intermediate values are named by statements: call them with a builder open.

TVM's simplifier is not faithful to IEEE arithmetic (``not (a < b)`` becomes ``b <= a``, ``x + c - c`` becomes ``x``),
so only ordered comparisons select here and NaN takes the other branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.vector import bits_as, cast_to, const_like, dtype_of, is_nan, select, share


def exp(x: Expr) -> Expr:
    """``e ** x``, with gradual underflow; overflows to infinity."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    low, high = (const_like(v * math.log(2), x) for v in (f.min_exponent - f.digits - 1, f.bias + 2))
    raised = share(select(x < low, low, x))
    n, r = _reduce_by_ln2(f, share(select(high < raised, high, raised)))  # NaN stays: n is any number then, r is NaN
    # One factor 2**n leaves the range of exponents where the result is subnormal or nearly infinite: two halves do not.
    half = share(n >> const_like(1, n))
    return share((_expm1_series(f, r) + 1) * _power_of_two(f, half) * _power_of_two(f, n - half))


def exp_of_negative(x: Expr) -> Expr:
    """``e ** x`` for ``x <= 0``, as a softmax needs it: what would be subnormal is zero, and NaN stays NaN."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    # 2**n is assembled as bits: the exponent 0 makes it 0.
    low = const_like(-f.bias * math.log(2), x)
    n, r = _reduce_by_ln2(f, share(select(x < low, low, x)))
    return share((_expm1_series(f, r) + 1) * _power_of_two(f, n))


def expm1(x: Expr) -> Expr:
    """``e ** x - 1`` without cancellation near zero."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    overflow = (f.bias + 1) * math.log(2)
    n, r = _reduce_by_ln2(f, _clamp(x, -(f.digits + 2) * math.log(2), overflow))
    # 2**n (p + 1) - 1 = 2 (2**(n-1) p + (2**(n-1) - 1/2)): inexact in p and one addition only; 2**(n-1) is a normal
    # number.
    scale = share(_power_of_two(f, n - const_like(1, n)))
    value = (_expm1_series(f, r) * scale + (scale - const_like(0.5, x))) * 2
    bounded = select(x < const_like(overflow, x), value, math.inf)
    return share(_or_nan(x, _with_sign_of(x, bounded)))


def log(x: Expr) -> Expr:
    """Natural logarithm: ``-inf`` at zero, NaN below."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    # Subnormal numbers are scaled into the normal range first.
    subnormal = x < const_like(2.0**f.min_exponent, x)
    bits = bits_as(f.integer, select(subnormal, x * const_like(2.0**f.digits, x), x))
    # Counted from sqrt(1/2), the exponent field splits x into 2**k m with m in [sqrt(1/2), sqrt(2)).
    bits = share(bits - const_like(f.bits_of(math.sqrt(0.5)), bits))
    k = share(
        cast_to(f.dtype, bits >> const_like(f.mantissa_bits, bits))
        - select(subnormal, const_like(float(f.digits), x), 0.0)
    )
    mantissa = (bits & const_like((1 << f.mantissa_bits) - 1, bits)) + const_like(f.bits_of(math.sqrt(0.5)), bits)
    t = share(bits_as(f.dtype, mantissa) - 1)
    # log(1 + t) = 2 atanh(s) with s = t / (2 + t), |s| < 0.172; spelled t - (t²/2 - s (t²/2 + R(s²))) to keep the low
    # bits.
    s = share(t / (t + 2))
    z = share(s * s)
    half_square = share(t * t * const_like(0.5, x))
    tail = s * (half_square + z * _horner(f.log_coefficients, z)) + k * const_like(f.ln2_low, x)
    finite = share(k * const_like(f.ln2_high, x) - ((half_square - tail) - t))
    infinity = const_like(math.inf, x)
    positive = select(x < infinity, finite, x)
    return share(select(x > 0.0, positive, select(x < 0.0, math.nan, select(is_nan(x), x, -infinity))))


def log1p(x: Expr) -> Expr:
    """``log(1 + x)`` without cancellation near zero."""
    x = share(x)
    u = share(x + 1)
    value = log(u)
    # What 1 + x lost in rounding comes back as the ratio of x to what is left of it.
    near = select(u > 1.0, value * (x / (u - 1)), select(u < 1.0, value * (x / (u - 1)), x))
    within = select(u > 0.0, select(u < const_like(math.inf, x), near, value), value)
    return share(within)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent, from ``expm1(-2 |x|)``, which neither overflows nor cancels."""
    dividend, divisor = tanh_quotient(x)
    return share(dividend / divisor)


def tanh_quotient(x: Expr) -> tuple[Expr, Expr]:
    """Two numbers whose quotient is the hyperbolic tangent: at most 1, and from 1 to 2."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    low, twice = const_like(-(f.digits + 2) * math.log(2), x), share(_absolute(x) * -2)
    n, r = _reduce_by_ln2(f, share(select(twice < low, low, twice)))  # NaN stays: n is any number then, r is NaN
    scale = share(_power_of_two(f, n))
    t = share(_expm1_series(f, r) * scale + (scale - 1))
    return share(_with_sign_of(x, t)), share(t + 2)


def sigmoid(x: Expr) -> Expr:
    """``1 / (1 + e ** -x)``; what would be subnormal is zero."""
    return share(const_like(1.0, x) / sigmoid_divisor(x))


def sigmoid_divisor(x: Expr) -> Expr:
    """``1 + e ** -x``; infinite where the sigmoid, of which it is the reciprocal, would be subnormal."""
    f = _FORMATS[dtype_of(x)]
    x = share(-x)
    low, high = (const_like(exponent * math.log(2), x) for exponent in (-f.bias, f.bias + 1))
    raised = share(select(x < low, low, x))
    # As bits of numbers, 2**-bias is zero and 2**(bias + 1) infinite: enough where one is added.
    n, r = _reduce_by_ln2(f, share(select(high < raised, high, raised)))
    return share((_expm1_series(f, r) + 1) * _power_of_two(f, n) + 1)


def erf(x: Expr) -> Expr:
    """Error function: its Maclaurin series up to 1, ``1 - exp(-x²) erfcx(x)`` above."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    square = share(x * x)
    near = x * _horner(f.erf_coefficients, square)
    a = share(_clamp(_absolute(x), 1.0, f.erf_limit))
    u = share(const_like(f.erfcx_slope, x) / (a + _ERFCX_POLE) + const_like(f.erfcx_offset, x))
    far = const_like(1.0, x) - exp_of_negative(-(a * a)) * _horner(f.erfcx_coefficients, u)
    return share(_or_nan(x, select(square < 1.0, near, _with_sign_of(x, far))))


def gelu(x: Expr) -> Expr:
    """``x Phi(x)`` with the normal distribution's Phi; the limits 0 and infinity at the infinities.

    float32: ``max(x, 0) - |x| Phi(-|x|)`` with one exponential, within 2 units in the last place of ``|x| / 2``, and without
    the cancellation of ``1 + erf`` for negative x. float64: by `erf`.
    """
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    if f.dtype == "float64":
        value = share(x * const_like(0.5, x) * (erf(x * const_like(math.sqrt(0.5), x)) + 1))
        return share(select(x < const_like(-float(np.finfo(f.dtype).max), x), 0.0, value))  # -inf * 0 would be NaN
    a, end = share(_absolute(x)), const_like(_GELU_END, x)
    within = share(select(end < a, end, a))  # NaN stays
    n, r = _nearest_integer(f, share(_horner(_LOG2_OF_TWICE_PHI, within) * within))
    tail = a * const_like(0.5, x) * (_horner(_EXP2, r) * _power_of_two(f, n))
    return share(select(x < 0.0, 0.0, x) - share(select(end < a, 0.0, tail)))


def softplus(x: Expr) -> Expr:
    """``log(1 + e ** x)``, as ``max(x, 0) + log1p(e ** -|x|)``."""
    x = share(x)
    return share(select(x < 0.0, 0.0, x) + log1p(exp(-_absolute(x))))


# ---- helpers ----

_ERFCX_POLE = 2.0

_GELU_END = 5.6
_LOG2_OF_TWICE_PHI = [
    *(-1.15110609, -0.459198547, -0.0525281185, 0.00710651616),
    *(-0.000159242231, -0.000187646754, 4.50054103e-05, -4.73072209e-06, 1.9827489e-07),
]
"""``log2(2 Phi(-a)) / a`` in powers of a, from 0 to `_GELU_END`: least squares, its largest error times ``Phi(-a) + 0.001`` made
small by reweighting (2.4e-8). Phi is all but 0 beyond."""

_EXP2: list[float] = (
    Chebyshev.interpolate(lambda r: 2.0**r, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial).coef.tolist()
)
"""``2**r`` in powers of r, for ``|r| <= 1/2``, to 2e-9."""


@dataclass(frozen=True)
class _Format:
    """A binary floating-point format and the constants that depend on it."""

    dtype: str
    integer: str
    mantissa_bits: int
    bias: int
    exp_terms: int
    log_terms: int
    erf_terms: int
    erfcx_degree: int
    erf_limit: float

    @property
    def digits(self) -> int:
        return self.mantissa_bits + 1

    @property
    def min_exponent(self) -> int:
        return 1 - self.bias

    def bits_of(self, value: float) -> int:
        return int(np.array(value, self.dtype).view(self.integer))

    @property
    def ln2_high(self) -> float:
        """ln 2 cut to so few bits that its product with any exponent is exact (matters where there is no FMA)."""
        unit = 2.0 ** -(self.digits - 12)
        return math.floor(math.log(2) / unit) * unit

    @property
    def ln2_low(self) -> float:
        # ln 2 = 0.693147180559945309417232..., the digits beyond float64 given by the residual.
        return (math.log(2) - self.ln2_high) + 2.319046813846299e-17

    @property
    def exp_coefficients(self) -> list[float]:
        """``(e**r - 1 - r) / r²`` in powers of r."""
        return [1 / math.factorial(n + 2) for n in range(self.exp_terms)]

    @property
    def log_coefficients(self) -> list[float]:
        """``2 atanh(s) / s`` less its first term, over s², in powers of s²."""
        return [2 / (2 * n + 3) for n in range(self.log_terms)]

    @property
    def erf_coefficients(self) -> list[float]:
        """``erf(x) / x`` in powers of x²."""
        scale = 2 / math.sqrt(math.pi)
        return [scale * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(self.erf_terms)]

    @property
    def erfcx_slope(self) -> float:
        """With `erfcx_offset`: ``slope / (a + pole) + offset`` maps a in [1, erf_limit] to [1, -1]."""
        return 2 / (1 / (1 + _ERFCX_POLE) - 1 / (self.erf_limit + _ERFCX_POLE))

    @property
    def erfcx_offset(self) -> float:
        return 1 - self.erfcx_slope / (1 + _ERFCX_POLE)

    @cached_property
    def erfcx_coefficients(self) -> list[float]:
        """``exp(a²) erfc(a)`` in powers of the mapped argument, by Chebyshev interpolation."""

        def erfcx(u: Any) -> Any:
            a = self.erfcx_slope / (u - self.erfcx_offset) - _ERFCX_POLE
            return np.array([math.exp(v * v) * math.erfc(v) for v in a])

        return list(Chebyshev.interpolate(erfcx, self.erfcx_degree).convert(kind=Polynomial).coef)


_FORMATS = {
    "float32": _Format("float32", "int32", 23, 127, 6, 5, 10, 8, 4.0),
    "float64": _Format("float64", "int64", 52, 1023, 12, 11, 19, 18, 6.0),
}


def _horner(coefficients: list[float], x: Expr) -> Expr:
    """The polynomial with these coefficients, lowest power first."""
    value = const_like(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + const_like(coefficient, x)
    return value


def _reduce_by_ln2(f: _Format, x: Expr) -> tuple[Expr, Expr]:
    """``(n, r)`` with ``x = n ln 2 + r``, n an integer expression, ``|r| <= ln(2) / 2``."""
    # Adding 1.5 * 2**mantissa_bits rounds to an integer and leaves it in the low bits.
    shifter = 1.5 * 2.0**f.mantissa_bits
    shifted = share(x * const_like(1 / math.log(2), x) + const_like(shifter, x))
    count = share(shifted - const_like(shifter, x))
    bits = bits_as(f.integer, shifted)
    r = share((x - count * const_like(f.ln2_high, x)) - count * const_like(f.ln2_low, x))
    return share(bits - const_like(f.bits_of(shifter), bits)), r


def _nearest_integer(f: _Format, x: Expr) -> tuple[Expr, Expr]:
    """``(n, x - n)`` with the integer expression n nearest to a moderate x."""
    shifter = 1.5 * 2.0**f.mantissa_bits
    shifted = share(x + const_like(shifter, x))
    n = bits_as(f.integer, shifted) - const_like(f.bits_of(shifter), bits_as(f.integer, shifted))
    return share(n), share(x - share(shifted - const_like(shifter, x)))


def _expm1_series(f: _Format, r: Expr) -> Expr:
    """``e**r - 1`` for ``|r| <= ln(2) / 2``."""
    return r * r * _horner(f.exp_coefficients, r) + r


def _power_of_two(f: _Format, n: Expr) -> Expr:
    """``2**n`` for an integer expression n within the range of normal exponents."""
    return bits_as(f.dtype, (n + const_like(f.bias, n)) << const_like(f.mantissa_bits, n))


def _clamp(x: Expr, low: float, high: float) -> Expr:
    """Between the bounds; NaN becomes ``low``, so that what follows is defined."""
    raised = share(select(x > const_like(low, x), x, low))
    return share(select(raised < const_like(high, x), raised, high))


def _or_nan(x: Expr, value: Expr) -> Expr:
    """``value``, or ``x`` itself where it is NaN."""
    return select(is_nan(x), x, value)


def _absolute(x: Expr) -> Expr:
    f = _FORMATS[dtype_of(x)]
    bits = bits_as(f.integer, x)
    return bits_as(f.dtype, bits & const_like((1 << (f.mantissa_bits + f.bias.bit_length() + 1)) - 1, bits))


def _with_sign_of(x: Expr, magnitude: Expr) -> Expr:
    """The magnitude of one, the sign bit of the other (zeros too)."""
    f = _FORMATS[dtype_of(x)]
    bits = bits_as(f.integer, x)
    sign = bits & const_like(np.iinfo(f.integer).min, bits)
    return bits_as(f.dtype, bits_as(f.integer, _absolute(magnitude)) | sign)

"""Elementary functions as TIR expressions that vectorise: polynomials and integer arithmetic, no call into libm.

Each takes a float32 or float64 expression, scalar or vector (see `vector`), and returns one of the same type. NaN stays
NaN, infinities give the limits. What `exp`, `expm1`, `log`, `log1p`, `tanh`, `sigmoid`, `softplus` and `erf` return is within 2 units in
the last place of the right result, subnormal ones included; `gelu` within 2 units of ``|x| / 2`` where x is negative and the result less.
``python -m bench.accuracy`` measures it (docs/numerics.md).

TVM's simplifier is not faithful to IEEE arithmetic (``not (a < b)`` becomes ``b <= a``, ``x + c - c`` becomes ``x``),
so only ordered comparisons select here and NaN takes the other branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.vector import bits_as, cast_to, const_like, dtype_of, is_nan, select, share


def exp(x: Expr) -> Expr:
    """``e ** x``, with gradual underflow; overflows to infinity."""
    f = _FORMATS[dtype_of(x)]
    low, high = (v * math.log(2) for v in (f.min_exponent - f.digits - 1, f.bias + 2))
    n, p = _exp_parts(f, _at_most(_at_least(share(x), low), high))
    # One factor 2**n leaves the range of exponents where the result is subnormal or nearly infinite: two halves do not.
    half = share(n >> const_like(1, n))
    return share((p + 1) * _power_of_two(f, half) * _power_of_two(f, n - half))


def exp_of_negative(x: Expr) -> Expr:
    """``e ** x`` for ``x <= 0``, as a softmax needs it: what would be subnormal is zero, and NaN stays NaN."""
    f = _FORMATS[dtype_of(x)]
    # 2**n is assembled as bits: the exponent 0 makes it 0.
    n, p = _exp_parts(f, _at_least(share(x), -f.bias * math.log(2)))
    return share((p + 1) * _power_of_two(f, n))


def expm1(x: Expr) -> Expr:
    """``e ** x - 1`` without cancellation near zero."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    overflow = (f.bias + 1) * math.log(2)
    n, p = _exp_parts(f, _at_most(_at_least(x, -(f.digits + 2) * math.log(2)), overflow))
    # 2**n (p + 1) - 1 = 2 (2**(n-1) p + (2**(n-1) - 1/2)): inexact in p and one addition only; 2**(n-1) is a normal
    # number.
    scale = share(_power_of_two(f, n - const_like(1, n)))
    value = (p * scale + (scale - const_like(0.5, x))) * 2
    return share(_with_sign_of(x, select(const_like(overflow, x) <= x, math.inf, value)))


def log(x: Expr) -> Expr:
    """Natural logarithm: ``-inf`` at zero, NaN below."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    # Subnormal numbers are scaled into the normal range first.
    subnormal = x < const_like(2.0**f.min_exponent, x)
    scaled = share(select(subnormal, x * const_like(2.0**f.digits, x), x))
    return _within_domain(
        x, _log_of_normal(f, scaled, exponent=select(subnormal, const_like(-float(f.digits), x), 0.0))
    )


def log1p(x: Expr) -> Expr:
    """``log(1 + x)`` without cancellation near zero."""
    x = share(x)
    u, value = _log_of_one_plus(_FORMATS[dtype_of(x)], x)
    return share(select(tirx.EQ(u, const_like(1.0, u)), x, _within_domain(u, value)))


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent: an odd polynomial up to 0.55, ``1 - 2 / (e ** 2|x| + 1)`` above."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    square = share(x * x)
    near = x * (square * _horner(f.tanh_coefficients, square) + 1)
    n, p = _exp_parts(f, _at_most(share(_absolute(x) * 2), (f.digits + 3) * math.log(2)))
    scale = share(_power_of_two(f, n))
    far = const_like(1.0, x) - const_like(2.0, x) / (p * scale + (scale + 1))
    return share(select(square < const_like(_TANH_END**2, x), near, _with_sign_of(x, far)))


def tanh_quotient(x: Expr) -> tuple[Expr, Expr]:
    """Two numbers whose quotient is the hyperbolic tangent, within 2.5 units in the last place: at most 1, and from 1 to 2."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    n, p = _exp_parts(f, _at_least(share(_absolute(x) * -2), -(f.digits + 2) * math.log(2)))
    scale = share(_power_of_two(f, n))
    t = share(p * scale + (scale - 1))
    return share(_with_sign_of(x, t)), share(t + 2)


def sigmoid(x: Expr) -> Expr:
    """``1 / (1 + e ** -x)``; 0 where ``e ** -x`` is beyond the largest number, as in the libraries: its logarithm is then -infinity."""
    f = _FORMATS[dtype_of(x)]
    x, overflow = share(x), const_like(-math.log(float(np.finfo(f.dtype).max)), x)
    low, high = -(f.digits + 3) * math.log(2), (f.digits + 1 - f.min_exponent) * math.log(2)
    n, p = _exp_parts(f, _at_most(_at_least(share(-x), low), high))
    # Dividend and divisor are made smaller by a power of two, so that the largest e**-x is finite. The divisor is rounded once.
    smaller = f.digits + 2
    one, scale = const_like(2.0**-smaller, x), share(_power_of_two(f, n - const_like(smaller, n)))
    most = share(scale + one)
    lost = one - share(most - scale)
    return share(select(x < overflow, 0.0, share(one / (most + (p * scale + lost)))))


def sigmoid_divisor(x: Expr) -> Expr:
    """``1 + e ** -x``; infinite where the sigmoid, of which it is the reciprocal, would be subnormal."""
    f = _FORMATS[dtype_of(x)]
    x, most = share(x), (f.bias + 0.4999) * math.log(2)
    # As the bits of a number, 2**-bias is zero: enough where one is added.
    n, p = _exp_parts(f, _at_most(_at_least(share(-x), -f.bias * math.log(2)), most))
    scale = share(_power_of_two(f, n))
    return share(select(x < -most, math.inf, _plus_one(scale, p * scale)))


def _plus_one(large: Expr, small: Expr) -> Expr:
    """``large + small + 1``, rounded once in all but ``small``, for a power of two and a number that is less."""
    most = share(large + 1)
    return most + (small + (1 - share(most - large)))


def erf(x: Expr) -> Expr:
    """Error function: its Maclaurin series up to 1, ``1 - exp(-x²) erfcx(x)`` above."""
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    square = share(x * x)
    near = x * _horner(f.erf_coefficients, square) + x
    a = _at_most(_at_least(share(_absolute(x)), 1.0), f.erf_limit)
    # slope / (a + pole) + offset, with less rounding
    dividend = a * const_like(f.erfcx_offset, x) + const_like(f.erfcx_slope + f.erfcx_offset * _ERFCX_POLE, x)
    u = share(dividend / (a + _ERFCX_POLE))
    far = const_like(1.0, x) - exp_of_negative(-(a * a)) * _horner(f.erfcx_coefficients, u)
    return share(select(square < 1.0, near, _with_sign_of(x, far)))


def gelu(x: Expr) -> Expr:
    """``x Phi(x)`` with the normal distribution's Phi; the limits 0 and infinity at the infinities.

    float32: ``max(x, 0) - |x| Phi(-|x|)`` with one exponential, without the cancellation of ``1 + erf`` for negative x. Of units of the
    result itself, it is off by 9 at -2, 41 at -3 and 300 below -4, as the exponent is rounded. float64: by `erf`.
    """
    f = _FORMATS[dtype_of(x)]
    x = share(x)
    if f.dtype == "float64":
        value = share(x * const_like(0.5, x) * (erf(x * const_like(math.sqrt(0.5), x)) + 1))
        return share(select(x < const_like(-float(np.finfo(f.dtype).max), x), 0.0, value))  # -inf * 0 would be NaN
    a, end = share(_absolute(x)), const_like(_GELU_END, x)
    within = _at_most(a, _GELU_END)
    n, r = _nearest_integer(f, share(_horner(_LOG2_OF_TWICE_PHI, within) * within))
    tail = a * const_like(0.5, x) * (_horner(_EXP2, r) * _power_of_two(f, n))
    return share(select(x < 0.0, 0.0, x) - share(select(end < a, 0.0, tail)))


def softplus(x: Expr) -> Expr:
    """``log(1 + e ** x)``, as ``max(x, 0) + log1p(e ** -|x|)``."""
    x = share(x)
    _, value = _log_of_one_plus(_FORMATS[dtype_of(x)], exp(_negative_absolute(x)))
    return share(select(x < 0.0, 0.0, x) + value)


# ---- helpers ----

_ERFCX_POLE = 2.0

_TANH_END = 0.55
"""Up to there tanh is a polynomial; from there on it is above a half, so that it is 1 less a smaller number."""

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


_TWO_OVER_ROOT_PI_LESS_1 = 0.12837916709551257
"""``2 / sqrt(pi) - 1``: a difference in float64 would lose its last digits."""


def _economised(series: list[float], low: float, high: float, terms: int) -> list[float]:
    """The power series as a polynomial of fewer terms: less its Chebyshev terms beyond so many, on the interval."""
    on_interval = Polynomial(series).convert(kind=Chebyshev, domain=[low, high])
    return list(on_interval.truncate(terms).convert(kind=Polynomial).coef.tolist())


@dataclass(frozen=True)
class _Format:
    """A binary floating-point format and the constants that depend on it."""

    dtype: str
    integer: str
    mantissa_bits: int
    bias: int
    exp_terms: int
    log_terms: int
    tanh_terms: int
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

    @cached_property
    def exp_coefficients(self) -> list[float]:
        """``(e**r - 1 - r) / r²`` in powers of r, for ``|r| <= ln(2) / 2``."""
        half = math.log(2) / 2
        return _economised([1 / math.factorial(n + 2) for n in range(20)], -half, half, self.exp_terms)

    @cached_property
    def log_coefficients(self) -> list[float]:
        """``2 atanh(s) / s`` less its first term, over s², in powers of s², for ``|s| <= (sqrt(2) - 1)²``."""
        return _economised([2 / (2 * n + 3) for n in range(20)], 0, (math.sqrt(2) - 1) ** 4, self.log_terms)

    @cached_property
    def tanh_coefficients(self) -> list[float]:
        """``(tanh(x) / x - 1) / x²`` in powers of x², up to `_TANH_END`."""
        series = [1.0]
        for n in range(1, 30):  # tanh' = 1 - tanh²
            series.append(-sum(a * b for a, b in zip(series, reversed(series), strict=True)) / (2 * n + 1))
        return _economised(series[1:], 0, _TANH_END**2, self.tanh_terms)

    @cached_property
    def erf_coefficients(self) -> list[float]:
        """``erf(x) / x - 1`` in powers of x², up to 1."""
        scale = 2 / math.sqrt(math.pi)
        series = [scale * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(1, 30)]
        return _economised([_TWO_OVER_ROOT_PI_LESS_1, *series], 0, 1, self.erf_terms)

    @property
    def erfcx_slope(self) -> float:
        """With `erfcx_offset`: ``slope / (a + pole) + offset`` maps a in [1, erf_limit] to [1, -1]."""
        return 2 / (1 / (1 + _ERFCX_POLE) - 1 / (self.erf_limit + _ERFCX_POLE))

    @property
    def erfcx_offset(self) -> float:
        return 1 - self.erfcx_slope / (1 + _ERFCX_POLE)

    @cached_property
    def erfcx_coefficients(self) -> list[float]:
        """``exp(a²) erfc(a)`` in powers of the mapped argument: the polynomial through its values at Chebyshev's points."""
        points = math.pi * (np.arange(self.erfcx_degree + 1) + 0.5) / (self.erfcx_degree + 1)
        a = self.erfcx_slope / (np.cos(points) - self.erfcx_offset) - _ERFCX_POLE
        values = np.exp(a.astype(np.longdouble) ** 2) * [math.erfc(v) for v in a]
        series = [float(np.mean(values * np.cos(n * points)) * (2 if n else 1)) for n in range(points.size)]
        return list(Chebyshev(series).convert(kind=Polynomial).coef.tolist())


_FORMATS = {
    "float32": _Format("float32", "int32", 23, 127, 5, 3, 5, 7, 7, 4.0),
    "float64": _Format("float64", "int64", 52, 1023, 11, 7, 10, 12, 15, 6.0),
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


def _exp_parts(f: _Format, x: Expr) -> tuple[Expr, Expr]:
    """``(n, p)`` with ``e**x = 2**n (1 + p)``, ``|p| < 0.42``, n an integer expression (any number where x is NaN, and p is)."""
    n, r = _reduce_by_ln2(f, x)
    return n, share(_expm1_series(f, r))


def _log_of_normal(f: _Format, x: Expr, exponent: Expr | None = None, term: Expr | None = None) -> Expr:
    """Logarithm of a positive normal number times ``2**exponent``, plus a small term."""
    # Counted from sqrt(1/2), the exponent field splits x into 2**k m with m in [sqrt(1/2), sqrt(2)).
    bits = bits_as(f.integer, x)
    bits = share(bits - const_like(f.bits_of(math.sqrt(0.5)), bits))
    k = cast_to(f.dtype, bits >> const_like(f.mantissa_bits, bits))
    k = share(k if exponent is None else k + exponent)
    mantissa = (bits & const_like((1 << f.mantissa_bits) - 1, bits)) + const_like(f.bits_of(math.sqrt(0.5)), bits)
    t = share(bits_as(f.dtype, mantissa) - 1)
    # log(1 + t) = 2 atanh(s) with s = t / (2 + t), |s| < 0.172; spelled t - (t²/2 - s (t²/2 + R(s²))) to keep the low
    # bits.
    s = share(t / (t + 2))
    z = share(s * s)
    half_square = share(t * t * const_like(0.5, x))
    low = k * const_like(f.ln2_low, x)
    tail = s * (half_square + z * _horner(f.log_coefficients, z)) + (low if term is None else low + term)
    return share(k * const_like(f.ln2_high, x) - ((half_square - tail) - t))


def _log_of_one_plus(f: _Format, x: Expr) -> tuple[Expr, Expr]:
    """``1 + x`` rounded, and ``log(1 + x)`` where that is positive and finite; of x = -0.0, 0.0."""
    x = share(x)
    u = share(x + 1)
    lost = share(x - share(u - 1))
    return u, _log_of_normal(f, u, term=share(lost / u))


def _within_domain(x: Expr, logarithm: Expr) -> Expr:
    """The logarithm of x where x is positive and finite, and its limits elsewhere."""
    infinity = const_like(math.inf, x)
    positive = select(x < infinity, logarithm, x)
    return share(select(x > 0.0, positive, select(x < 0.0, math.nan, select(is_nan(x), x, -infinity))))


def _power_of_two(f: _Format, n: Expr) -> Expr:
    """``2**n`` for an integer expression n within the range of normal exponents."""
    return bits_as(f.dtype, (n + const_like(f.bias, n)) << const_like(f.mantissa_bits, n))


def _at_least(x: Expr, low: float) -> Expr:
    """The named x, or the bound if that is more; NaN stays."""
    bound = const_like(low, x)
    return share(select(x < bound, bound, x))


def _at_most(x: Expr, high: float) -> Expr:
    """The named x, or the bound if that is less; NaN stays."""
    bound = const_like(high, x)
    return share(select(bound < x, bound, x))


def _absolute(x: Expr) -> Expr:
    f = _FORMATS[dtype_of(x)]
    bits = bits_as(f.integer, x)
    return bits_as(f.dtype, bits & const_like(np.iinfo(f.integer).max, bits))


def _negative_absolute(x: Expr) -> Expr:
    f = _FORMATS[dtype_of(x)]
    bits = bits_as(f.integer, x)
    return bits_as(f.dtype, bits | const_like(np.iinfo(f.integer).min, bits))


def _with_sign_of(x: Expr, magnitude: Expr) -> Expr:
    """The magnitude of one, the sign bit of the other (zeros too)."""
    f = _FORMATS[dtype_of(x)]
    bits = bits_as(f.integer, x)
    sign = bits & const_like(np.iinfo(f.integer).min, bits)
    return bits_as(f.dtype, bits_as(f.integer, _absolute(magnitude)) | sign)

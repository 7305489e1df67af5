"""Discrete Fourier transforms as matrix products, where there is no kernel for them.

``X[k] = scale * sum(x[j] * w ** (j * k))`` with ``w = exp(sign * 2 pi i / n)``, along one axis. A complex value is a pair of real ones.
Of three ways to compute it, `way` finds the one that takes the least work:

    Direct       products by the matrices of all cosines and of all sines
    Steps(p, q)  for n = p q: with ``j = q j1 + j2`` and ``k = k1 + p k2``, a product by the matrix of length p over j1, by the
                 factors ``w ** (j2 * k1)`` element by element, and by the matrix of length q over j2. Either product may again be in steps.
    Chirp(m)     for what a large prime divides, by Bluestein: as ``2 j k = j * j + k * k - (k - j) * (k - j)`` it is a convolution, which
                 two transforms of a length m of small factors compute

Inputs that are zero and results that nobody wants cost nothing: `Dft.given` and `Dft.kept` count those that matter.

What half the spectrum of a real row takes, and the KB of factors that it is multiplied by:

    length                                400      512     1024     4096
    multiply-adds, direct              161000   263000  1050000 16800000
    multiply-adds, in two steps         34000    51000   135000  1060000
    factors, direct                       643     1053     4203    67142
    factors, in two steps                   8       10       21       82

Steps also write and read each element about nine times, mostly in a cache. `kernels.fourier` does a fifth of the arithmetic or less, for
the lengths that it takes; this is for the others, and for GPUs.

The factors are exact at multiples of a quarter turn, correct in float64 elsewhere, and rounded once, to the type of the input. In float32
the largest error of any result, as a part of the largest result, has been 0.5e-7 to 3e-7 in steps, 2e-7 to 9e-7 in direct ones of
60 to 360, and 1e-7 to 3e-7 in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.registry import lowers
from mlec.errors import UnsupportedOpError
from mlec.ir import Dim, GraphBuilder, Node, Value
from mlec.ir.dim import product, static
from mlec.ops.fourier import Complexes, roots

Pair = tuple[Value, Value | None]
"""Real and imaginary part; None for an imaginary part that is zero."""

LONGEST = 1 << 20
"""The factors of one that is prime, and hardly shorter, take 70 MB in float32."""
MOST_FACTORS = 1 << 17
"""Elements in both matrices of one product: 512 KB of float32, which stay in a cache. It also bounds the error: a sum of k products
has about sqrt(k) times that of one."""
LANES = 16
"""Columns that a product computes at once, whether there are as many or not."""
START = 16
"""What an element of a product costs besides its multiply-adds, in terms of these: measured, as the next two. With them, costs were within
a third of the times for lengths of 64 to 1024, at 90 multiply-adds in a nanosecond (AVX-512, one thread)."""
PASS = 15
"""What an element costs that is multiplied by a factor, and turned as the next product reads it."""
MOVE = 4 * PASS
"""What it costs where turning it takes a kernel of its own."""
NOMINAL_COLUMNS = 64
"""What stands for a symbolic extent behind the transformed axis."""


@dataclass(frozen=True)
class Dft:
    """One transform.

    Attributes:
        n: its length.
        given: how many of the inputs, from the first, are there; the others are zero.
        kept: how many of the results, from the first, are wanted.
        sign: of the exponent: -1 forward, 1 backward.
        scale: what the results are multiplied by.
    """

    n: int
    given: int
    kept: int
    sign: int
    scale: float = 1.0


@dataclass(frozen=True)
class Direct:
    """A product by one matrix."""


@dataclass(frozen=True)
class Steps:
    """Two transforms, of lengths ``p`` and ``q``."""

    p: int
    q: int


@dataclass(frozen=True)
class Chirp:
    """A convolution, by transforms of length ``m``."""

    m: int


Way = Direct | Steps | Chirp


# -- how -------------------------------------------------------------------------------------------------------------


@cache
def way(n: int, given: int, kept: int, parts: int, columns: int) -> tuple[int, Way]:
    """The cheapest way, after what it costs in multiply-adds.

    Args:
        n, given, kept: as of `Dft`.
        parts: 1 for real inputs, 2 for complex ones.
        columns: elements behind the axis, for which the same is done; 0 if there is nothing behind it.
    """
    width = columns or 1
    found: list[tuple[int, Way]] = []
    if 2 * kept * given <= MOST_FACTORS:
        across = kept * 2 * _padded(columns) if columns else _padded(2 * kept)
        found.append((parts * (given + START) * across, Direct()))
    for p in _divisors(n):
        q = n // p
        first = way(p, -(-given // q), p, parts, q * width)[0]
        second = way(q, q, -(-kept // p), 2, p * width)[0]
        moved = 2 * n * width * (MOVE if columns else PASS)
        found.append((first + moved + second, Steps(p, q)))
    if max(_primes(n), default=1) > 5:
        for m in (_at_least(given + kept - 1, factor) for factor in (1, 3, 5)):
            there, back = way(m, given, m, 2, columns)[0], way(m, m, kept, 2, columns)[0]
            found.append((there + back + 2 * (given + m + kept) * width * PASS, Chirp(m)))
    return min(found, key=lambda entry: entry[0])


def _padded(columns: int) -> int:
    return -(-columns // LANES) * LANES


def _primes(n: int) -> list[int]:
    """The prime factors, without repetition."""
    found, factor = [], 2
    while n > 1:
        if factor * factor > n:
            factor = n
        if n % factor == 0:
            found.append(factor)
            while n % factor == 0:
                n //= factor
        factor += 1
    return found


def _divisors(n: int) -> list[int]:
    """All but 1 and n."""
    small = [d for d in range(2, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _at_least(length: int, factor: int) -> int:
    """The smallest ``factor * 2 ** e`` that is no shorter."""
    return factor << max(0, (-(-length // factor) - 1).bit_length())


# -- factors ---------------------------------------------------------------------------------------------------------


def _powers(dft: Dft, exponents: npt.NDArray[np.int64], n: int) -> Complexes:
    """``exp(sign * 2 pi i e / n)`` for each exponent."""
    found = roots(n)[exponents % n]
    return found.conj() if dft.sign < 0 else found


# -- graphs ----------------------------------------------------------------------------------------------------------


def fourier(b: GraphBuilder, x: Pair, axis: int, dft: Dft) -> tuple[Value, Value]:
    """Real and imaginary part of the first `Dft.kept` results, in place of the `Dft.given` inputs along an axis.

    Raises:
        UnsupportedOpError: the transform is longer than `LONGEST`.
    """
    if dft.n > LONGEST:
        raise UnsupportedOpError(
            f"a Fourier transform of length {dft.n}; at most {LONGEST} is supported",
            hint="transform shorter pieces, or leave that part of the model outside",
        )
    shape = x[0].type.shape
    axis %= len(shape)
    lead, behind = shape[:axis] or (1,), product(shape[axis + 1 :])
    columns = () if behind == 1 else (behind,)
    flat = _each(x, lambda part: _shaped(b, part, (*lead, dft.given, *columns)))
    result = (*shape[:axis], dft.kept, *shape[axis + 1 :])
    re, im = (_shaped(b, part, result) for part in _Emit(b, columns).transformed(flat, dft))
    return re, im


def real_of_half(b: GraphBuilder, x: Pair, axis: int, n: int, sign: int, scale: float) -> Value:
    """The real results of a transform whose inputs are those of ``x`` and, at ``n - j``, the conjugate of each."""
    half = x[0].type.shape[axis]
    assert half == n // 2 + 1
    axis %= x[0].type.rank
    twice = np.full((half, *[1] * (x[0].type.rank - axis - 1)), 2.0, x[0].type.dtype.numpy)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    weights = b.constant(twice)
    weighted = _each(x, lambda part: b("mul", part, weights))
    return fourier(b, weighted, axis, Dft(n, half, n, sign, scale))[0]


def _each(x: Pair, action: Callable[[Value], Value]) -> Pair:
    return action(x[0]), None if x[1] is None else action(x[1])


def _shaped(b: GraphBuilder, x: Value, shape: tuple[Dim, ...]) -> Value:
    return x if x.type.shape == shape else b("reshape", x, shape=shape)


@dataclass(frozen=True)
class _Emit:
    """Makes the nodes of transforms of values ``[*lead, given, *columns]``; columns are one axis or none."""

    b: GraphBuilder
    columns: tuple[Dim, ...]

    @property
    def axis(self) -> int:
        return -1 - len(self.columns)

    def transformed(self, x: Pair, dft: Dft) -> tuple[Value, Value]:
        """``[*lead, kept, *columns]``"""
        width = sum(NOMINAL_COLUMNS if not isinstance(extent, int) else extent for extent in self.columns)
        how = way(dft.n, dft.given, dft.kept, 1 if x[1] is None else 2, width)[1]
        if isinstance(how, Steps):
            return self.in_steps(x, dft, how)
        return self.by_chirp(x, dft, how) if isinstance(how, Chirp) else self.direct(x, dft)

    def direct(self, x: Pair, dft: Dft) -> tuple[Value, Value]:
        """A matrix times columns; without columns, rows times its transpose."""
        matrix = _powers(dft, np.outer(np.arange(dft.kept), np.arange(dft.given)), dft.n) * dft.scale
        cos, sin = (self.constant(x[0], part if self.columns else part.T) for part in (matrix.real, matrix.imag))

        def product(part: Value, factors: Value) -> Value:
            return self.b("matmul", factors, part) if self.columns else self.b("matmul", part, factors)

        re, im = product(x[0], cos), product(x[0], sin)
        if x[1] is None:
            return re, im
        return self.b("sub", re, product(x[1], sin)), self.b("add", im, product(x[1], cos))

    def in_steps(self, x: Pair, dft: Dft, how: Steps) -> tuple[Value, Value]:
        p, q = how.p, how.q
        lead, columns = x[0].type.shape[: self.axis], self.columns
        width = product(columns)
        given, kept = -(-dft.given // q), -(-dft.kept // p)
        x = _each(x, lambda part: _shaped(self.b, self.padded(part, given * q), (*lead, given, q * width)))
        once = _Emit(self.b, (q * width,)).transformed(x, Dft(p, given, p, dft.sign, dft.scale))
        factors = _powers(dft, np.outer(np.arange(p), np.arange(q)), dft.n)
        apart = _each(once, lambda part: _shaped(self.b, part, (*lead, p, q, *columns)))
        turned = self.times(apart, factors.reshape(p, q, *[1] * len(columns)))
        order = (*range(len(lead)), len(lead) + 1, len(lead), *range(len(lead) + 2, len(lead) + 2 + len(columns)))
        x = _each(turned, lambda part: _shaped(self.b, self.b("transpose", part, perm=order), (*lead, q, p * width)))
        twice = _Emit(self.b, (p * width,)).transformed(x, Dft(q, q, kept, dft.sign))
        re, im = (self.cut(_shaped(self.b, part, (*lead, kept * p, *columns)), 0, dft.kept) for part in twice)
        return re, im

    def by_chirp(self, x: Pair, dft: Dft, how: Chirp) -> tuple[Value, Value]:
        m, across = how.m, (-1, *[1] * len(self.columns))
        squares = np.arange(max(dft.given, dft.kept)) ** 2
        chirp = _powers(dft, squares, 2 * dft.n)
        around = np.zeros(m, np.complex128)
        around[: dft.kept] = chirp[: dft.kept].conj()
        around[m - dft.given + 1 :] = chirp[1 : dft.given][::-1].conj()
        x = self.times(x, chirp[: dft.given].reshape(across))
        there = self.transformed(x, Dft(m, dft.given, m, -1))
        product = self.times(there, np.fft.fft(around).reshape(across))
        back = self.transformed(product, Dft(m, m, dft.kept, 1, dft.scale / m))
        return self.times(back, chirp[: dft.kept].reshape(across))

    def times(self, x: Pair, factors: Complexes) -> tuple[Value, Value]:
        """Element by element."""
        (re, im), cos, sin = x, self.constant(x[0], factors.real), self.constant(x[0], factors.imag)
        if im is None:
            return self.b("mul", re, cos), self.b("mul", re, sin)
        real = self.b("sub", self.b("mul", re, cos), self.b("mul", im, sin))
        return real, self.b("add", self.b("mul", re, sin), self.b("mul", im, cos))

    def constant(self, like: Value, array: npt.NDArray[np.float64]) -> Value:
        return self.b.constant(np.ascontiguousarray(array, dtype=like.type.dtype.numpy), "dft")

    def cut(self, x: Value, start: int, stop: int) -> Value:
        axis = x.type.rank + self.axis
        if (start, stop) == (0, x.type.shape[axis]):
            return x
        return self.b("slice", x, axis=axis, start=start, stop=stop)

    def padded(self, x: Value, extent: int) -> Value:
        axis = x.type.rank + self.axis
        missing = extent - int(x.type.shape[axis])  # type: ignore[arg-type]
        if not missing:
            return x
        before = (0,) * x.type.rank
        after = tuple(missing if i == axis else 0 for i in range(x.type.rank))
        return self.b("pad", x, before=before, after=after, value=0.0, mode="constant")


@lowers("fft", form="graph")
def fft(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    re, *im = operands
    n, sign = _length(re, node), 1 if node.attrs["inverse"] else -1
    dft = Dft(n, n, n, sign, node.attrs["scale"])
    return _results(b, node, fourier(b, (re, im[0] if im else None), node.attrs["axis"], dft))


@lowers("rfft", form="graph")
def rfft(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    (x,) = operands
    n = _length(x, node)
    return _results(b, node, fourier(b, (x, None), node.attrs["axis"], Dft(n, n, n // 2 + 1, -1, node.attrs["scale"])))


@lowers("irfft", form="graph")
def irfft(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    re, im = operands
    return real_of_half(b, (re, im), node.attrs["axis"], node.attrs["n"], 1, node.attrs["scale"])


def _results(b: GraphBuilder, node: Node, parts: tuple[Value, Value]) -> Sequence[Value]:
    """As the node has them."""
    if not node.attrs["pairs"]:
        return parts
    return [b("concat", *(b("reshape", part, shape=(*part.type.shape, 1)) for part in parts), axis=-1)]


def _length(x: Value, node: Node) -> int:
    return static(x.type.shape[node.attrs["axis"]])

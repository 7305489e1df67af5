"""Discrete Fourier transforms of many lines at once: each lane of a vector has a line of its own.

A line of n complex numbers is brought into a workspace of vectors, in the order of reversed digits, so that Cooley and Tukey's passes
work in place and end in order. With ``n = r1 r2 ... rk``, pass t takes blocks of ``l = r1 ... r(t-1)``: r of them side by side, whose
numbers q are multiplied by ``w ** (q i)`` (the *twiddles*; none in the first pass) and become r numbers by a transform in registers. Lines
along the last axis are turned as they come and go, in squares of registers; those along another axis lie as vectors in memory already.

A real line of even length n is a complex one of half the length, whose even elements are the real parts and whose odd ones the imaginary
parts: one more pass over the numbers k and n / 2 - k, together, makes half the spectrum of what came out, or makes what goes in of half a
spectrum. An inverse transform is the transform with real and imaginary parts exchanged, before and after.

About 5 n log2(n) operations for a complex line, half for a real one, whose operands come from the workspace of ``8 n lanes`` bytes for
float32: 64 KB for 16 real lines of 1024. The first passes go over blocks that stay in L1, one after the other; the others read and write
the workspace in L2 once each. 256 real lines of 1024 (AVX-512, one thread): 6.6 million operations, which adders take at 90 in a
nanosecond: predicted 73 us and 35 us of turning and moving, measured 145; torch (MKL) 127. At 64, 400 and 4096: 5, 41 and 870; torch 10,
45 and 750. One line takes as long as there are lanes: at 1024 6 us; torch 14.

Results in pairs of real and imaginary part are what the workspace holds, turned: 1024 real lines of 512 take 325 us, of 1024 756, where
parts that are written apart and then put in turn take 480 and 920; torch 243 and 569.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.interleave import in_turn
from mlec.backends.tvm.kernels.tile import (
    bits,
    ceildiv,
    flat_view,
    if_,
    multiply_adds,
    parallel_if_large,
    parameter,
    product,
)
from mlec.backends.tvm.kernels.transpose import turn
from mlec.backends.tvm.kernels.vector import broadcast, const, dtype_of, lanes_of, load, share, store
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.fourier import roots

Number = tuple[Expr, Expr]
"""Real and imaginary part, each a vector of one number of several lines."""

PRIMES = (3, 5, 7, 11, 13)
"""Odd factors of a length that have a pass."""
WORKSPACE = 1 << 20
"""Bytes that the lines of a task may take: they should stay in L2."""
TASK_NUMBERS = 1 << 13
"""Numbers of a task's lines, at least: a workspace is asked for once in a task."""


def radices(n: int, most: int) -> tuple[int, ...] | None:
    """The passes of a transform, powers of two first; None if a prime factor is too large for one.

    Args:
        n: its length.
        most: the largest power of two of a pass.
    """
    twos = (n & -n).bit_length() - 1
    n >>= twos
    found: list[int] = []
    width = most.bit_length() - 1
    while twos:
        passes = -(-twos // width)
        step = -(-twos // passes)
        found.append(1 << step)
        twos -= step
    for prime in PRIMES:
        while n % prime == 0:
            found.append(prime)
            n //= prime
    return tuple(found) if n == 1 else None


@dataclass(frozen=True)
class Fourier:
    """One kind of transform.

    Attributes:
        op: ``fft``, ``rfft`` or ``irfft``.
        n: length of the line, of which ``rfft`` and ``irfft`` have one half as numbers of a spectrum.
        parts: of the operand: 1 if it is real.
        inverse: of ``fft``: which sign the exponent has.
        scale: what the results are multiplied by.
        dtype: of all numbers.
        target: what the program is for.
        pairs: whether real and imaginary parts of the result are in turn, not apart.
    """

    op: str
    n: int
    parts: int
    inverse: bool
    scale: float
    dtype: str
    target: TargetInfo
    pairs: bool = False

    @property
    def lanes(self) -> int:
        """Lines at once."""
        return self.target.lanes(bits(self.dtype))

    @property
    def folded(self) -> bool:
        """Whether a real line is a complex one of half the length."""
        return self.op != "fft" and self.n % 2 == 0

    @property
    def length(self) -> int:
        """Numbers of the complex line."""
        return self.n // 2 if self.folded else self.n

    @cached_property
    def radices(self) -> tuple[int, ...] | None:
        """Of the passes; None if there is no such program."""
        if self.length * 2 * self.lanes * bits(self.dtype) // 8 > WORKSPACE:
            return None
        return radices(self.length, 16 if self.target.vector_registers >= 32 else 8)

    @property
    def given(self) -> int:
        """Elements of a line of the operand."""
        return self.n // 2 + 1 if self.op == "irfft" else self.n

    @property
    def kept(self) -> int:
        """Elements of a line of the result."""
        return self.n // 2 + 1 if self.op == "rfft" else self.n

    @property
    def results(self) -> int:
        """Tensors that it makes."""
        return 1 if self.op == "irfft" or self.pairs else 2

    @property
    def operations(self) -> int:
        """On the numbers of a line, about."""
        return 5 * self.length * max(1, self.length.bit_length()) + 10 * self.n

    @property
    def near(self) -> int:
        """How many passes, from the first, work on blocks that stay in L1."""
        sizes = np.cumprod(self.radices or ()) * 2 * self.lanes * bits(self.dtype) // 8
        return int((2 * sizes <= self.target.l1_bytes).sum())

    @property
    def swapped(self) -> bool:
        """Whether it is an inverse transform: real parts are where imaginary ones are, before and after."""
        return self.inverse or self.op == "irfft"

    @cached_property
    def places(self) -> npt.NDArray[np.int32]:
        """By its index, where a number of the complex line comes to lie, (length + 1,); one more stays at the end.

        Of ``r j + i``, with r the radix of the last pass, i says which of its r blocks, and j the place in that.
        """
        order = np.zeros(1, np.int64)
        for radix in self.radices or ():
            order = (order[:, None] + len(order) * np.arange(radix)).reshape(-1)
        return np.append(order, self.length).astype(np.int32)

    @cached_property
    def factors(self) -> npt.NDArray[np.float64]:
        """The twiddles of all passes but the first, then what joins two numbers of half a spectrum: pairs of real and imaginary part."""
        found, length = [], 1
        for radix in self.radices or ():
            if length > 1:
                found.append(roots(length * radix)[np.outer(np.arange(length), np.arange(1, radix))].conj().reshape(-1))
            length *= radix
        if self.folded:
            found.append(roots(self.n)[: self.length // 2 + 1].conj())
        joined = np.concatenate([*found, np.ones(1)])  # never empty
        return np.stack([joined.real, joined.imag], 1)


def fourier(transform: Fourier, shape: Sequence[Dim], axis: int, name: str = "fourier") -> tirx.PrimFunc:
    """The transform along one axis of operands of this shape; behind the axis there is one element, or a multiple of the lanes.

    Parameters: the operand's parts, `Fourier.places`, `Fourier.factors`, the result's parts or pairs. A task is some blocks of
    lines: as many as there are lanes, neighbours in memory.
    """
    lanes, dtype = transform.lanes, transform.dtype
    before, behind = shape[:axis], shape[axis + 1 :]
    lines, columns = product(before), product(behind)
    assert isinstance(columns, int)
    assert columns == 1 or columns % lanes == 0
    blocks = ceildiv(lines, lanes) if columns == 1 else lines * (columns // lanes)
    each = max(1, TASK_NUMBERS // (transform.length * lanes))
    with prim_func(name) as kernel:
        x_args = [parameter(f"x{i}", BufferSpec(shape, dtype)) for i in range(transform.parts)]
        places_arg = parameter("places", BufferSpec(transform.places.shape, "int32"))
        factors_arg = parameter("factors", BufferSpec(transform.factors.shape, dtype))
        result = (*before, transform.kept, *behind, *([2] if transform.pairs else []))
        y_args = [parameter(f"y{i}", BufferSpec(result, dtype)) for i in range(transform.results)]
        x, y = (
            tuple(flat_view(b, (product(s),), dtype) for b in args) for args, s in ((x_args, shape), (y_args, result))
        )
        places = flat_view(places_arg, (transform.places.size,), "int32")
        factors = flat_view(factors_arg, (transform.factors.size,), dtype)

        def task(number: Expr) -> None:
            work = T.alloc_buffer(((transform.length + 1) * 2 * lanes,), dtype)
            with T.serial(each) as i:
                block = share(number * each + i)
                with if_(block < blocks):
                    _Block(transform, lines, columns, block, x, places, factors, y, work).run()

        operations = transform.operations * lanes * each
        parallel_if_large(ceildiv(blocks, each), multiply_adds(operations // 2, dtype, transform.target), task)
    return kernel.func


@dataclass(frozen=True)
class _Block:
    """The program of one block of lines."""

    f: Fourier
    lines: Dim
    columns: int
    block: Expr
    x: Sequence[Buffer]
    places: Buffer
    factors: Buffer
    y: Sequence[Buffer]
    work: Buffer

    def run(self) -> None:
        f = self.f
        self.read()
        if f.op == "irfft" and f.folded:
            self.joined(self.to_folded)
        self.passes()
        if f.op == "rfft" and f.folded:
            self.joined(self.from_folded)
        self.write()

    # -- the workspace ---------------------------------------------------------------------------------------------

    def at(self, place: Expr, part: Expr | int) -> Expr:
        """Where the vector of a part of a number lies."""
        return (place * 2 + part) * self.f.lanes

    def number(self, place: Expr) -> Number:
        re, im = (share(load(self.work, [self.at(place, part)], self.f.lanes)) for part in range(2))
        return re, im

    def put(self, place: Expr, value: Number) -> None:
        for part in range(2):
            store(self.work, value[part], [self.at(place, part)])

    def factor(self, index: Expr) -> Number:
        re, im = (share(broadcast(self.factors[index * 2 + part], self.f.lanes)) for part in range(2))
        return re, im

    # -- passes ----------------------------------------------------------------------------------------------------

    def passes(self) -> None:
        """Those of blocks that stay in L1 one block after the other, then those of the whole line."""
        radices, near = self.f.radices or (), self.f.near
        inner = math.prod(radices[:near])
        with T.serial(self.f.length // inner) as part:
            begin = share(part * inner)
            for i in range(near):
                self.one_pass(i, begin, inner)
        for i in range(near, len(radices)):
            self.one_pass(i, const(0, "int64"), self.f.length)

    def one_pass(self, number: int, begin: Expr, extent: int) -> None:
        """One pass over so many numbers."""
        radices = self.f.radices or ()
        radix, length = radices[number], math.prod(radices[:number])
        first = length - radices[0]  # of the twiddles: those of the passes before are as many
        with T.serial(extent // (length * radix)) as block, T.serial(length) as q:
            place = share(begin + block * (length * radix) + q)
            places = [place + i * length for i in range(radix)]
            given = [self.number(place) for place in places]
            if number:
                row = share(first + q * (radix - 1))
                given[1:] = [times(z, self.factor(row + i)) for i, z in enumerate(given[1:])]
            for place, value in zip(places, small(given), strict=True):
                self.put(place, value)

    def joined(self, both: Callable[[Number, Number, Number], tuple[Number, Number]]) -> None:
        """The numbers of half a spectrum in pairs: k and ``length - k``, by ``both(of k, of the other, factor)``; 0 goes with the last."""
        f = self.f
        first = len(f.factors) - 1 - (f.length // 2 + 1)
        (re, im), (last, _) = self.number(0), self.number(f.length)
        if f.op == "rfft":
            zero, two = const(0, f.dtype, f.lanes), const(2, f.dtype, f.lanes)
            self.put(0, (two * (re + im), zero))
            self.put(f.length, (two * (re - im), zero))
        else:
            self.put(0, (re - last, re + last))
        with T.serial(f.length // 2) as before:
            k = share(before + 1)
            here, there = (k, f.length - k) if f.op == "rfft" else (self.place(k), self.place(f.length - k))
            one, other = both(self.number(here), self.number(there), self.factor(first + k))
            self.put(here, one)
            self.put(there, other)

    @staticmethod
    def from_folded(a: Number, b: Number, w: Number) -> tuple[Number, Number]:
        """Twice the spectrum at k and at ``length - k``, of that of the even elements plus i times that of the odd ones."""
        re, im = share(a[0] + b[0]), share(a[1] - b[1])
        x, y = times((share(a[0] - b[0]), share(a[1] + b[1])), w)
        return (re + y, im - x), (re - y, -im - x)

    @staticmethod
    def to_folded(a: Number, b: Number, w: Number) -> tuple[Number, Number]:
        """The other way round, with real and imaginary part exchanged."""
        re, im = share(a[0] + b[0]), share(a[1] - b[1])
        x, y = times((share(a[0] - b[0]), share(a[1] + b[1])), (w[0], share(-w[1])))
        return (im + x, re - y), (x - im, re + y)

    # -- to and from memory ----------------------------------------------------------------------------------------

    def place(self, index: Expr) -> Expr:
        """Where the number with this index comes to lie before the first pass."""
        return share(tirx.Cast("int64", self.places[index]))

    def read(self) -> None:
        """Brings the lines into the workspace."""
        f = self.f
        zero = const(0, f.dtype, f.lanes)
        for part, x in enumerate(self.x):
            self.each_vector(f.given, part, x, None)
        if f.parts == 1 and not f.folded:  # no imaginary parts
            with T.serial(f.length) as i:
                store(self.work, zero, [self.at(i, 0 if f.swapped else 1)])
        if f.op == "irfft" and not f.folded:
            store(self.work, zero, [self.at(0, 0)])

    def write(self) -> None:
        """Brings them from the workspace into the results."""
        for part, y in enumerate(self.y):
            self.each_vector(self.f.kept, part, None, y)

    def keep(self, element: Expr, part: int, value: Expr) -> None:
        """Puts an element of the operand where the passes want it."""
        f = self.f
        if f.op == "rfft" and f.folded:
            store(self.work, value, [self.at(self.place(element // 2), element % 2)])
            return
        plane = part if f.op == "irfft" and f.folded else part ^ int(f.swapped)
        store(self.work, value, [self.at(self.place(element), plane)])
        if f.op == "irfft" and not f.folded:  # the other half of the spectrum
            store(self.work, -value if part else value, [self.at(self.place(f.n - element), plane)])

    def result(self, element: Expr, part: Expr | int) -> Expr:
        """An element of the result."""
        f = self.f
        if f.op == "irfft" and f.folded:
            element, part = element // 2, element % 2
        value = load(self.work, [self.at(element, 1 - part if f.swapped else part)], f.lanes)
        factor = f.scale / 2 if f.op == "rfft" and f.folded else f.scale
        return share(value if factor == 1 else value * const(factor, f.dtype, f.lanes))

    def in_line(self, number: Expr, part: int) -> Expr:
        """A number of a line of the result in memory."""
        return self.result(number // 2, number % 2) if self.f.pairs else self.result(number, part)

    def each_vector(self, count: int, part: int, x: Buffer | None, y: Buffer | None) -> None:
        """All elements of the lines from ``x`` to the workspace, or from there to ``y``."""
        lanes = self.f.lanes
        if self.columns > 1:
            across = self.columns // lanes
            line, column = share(self.block // across), share(self.block % across * lanes)
            with T.serial(count) as i:
                at = share((line * count + i) * self.columns + column)
                if x is not None:
                    self.keep(i, part, share(load(x, [at], lanes)))
                elif self.f.pairs:
                    for half, numbers in enumerate(in_turn(self.result(i, 0), self.result(i, 1))):
                        store(y, numbers, [at * 2 + half * lanes])
                else:
                    store(y, self.result(i, part), [at])
            return
        if self.f.pairs and y is not None:
            count *= 2
        first = share(self.block * lanes)
        if count < lanes:
            self.each_element(count, part, first, x, y)
            return
        if count % lanes:  # some elements twice
            self.square(const(count - lanes, "int64"), count, part, first, x, y)
        with T.serial(count // lanes) as i:
            self.square(share(i * lanes), count, part, first, x, y)

    def each_element(self, count: int, part: int, first: Expr, x: Buffer | None, y: Buffer | None) -> None:
        """Of lines that are shorter than a vector: one by one, by way of a vector."""
        lanes = self.f.lanes
        held = T.alloc_buffer((lanes,), self.f.dtype)
        with T.serial(count) as i:
            if x is not None:
                with T.serial(lanes) as lane:
                    line = tirx.min(first + lane, self.lines - 1)
                    T.buffer_store(held, x[line * count + i], [lane])
                self.keep(i, part, share(load(held, [0], lanes)))
                return
            store(held, self.in_line(i, part), [0])
            with T.serial(tirx.min(lanes, self.lines - first)) as lane:
                T.buffer_store(y, held[lane], [(first + lane) * count + i])

    def square(self, start: Expr, count: int, part: int, first: Expr, x: Buffer | None, y: Buffer | None) -> None:
        """As many elements of as many lines as a vector has lanes."""
        lanes = self.f.lanes
        if x is not None:
            lines = [share(tirx.min(first + i, self.lines - 1)) for i in range(lanes)]
            rows = [share(load(x, [line * count + start], lanes)) for line in lines]
            for i, value in enumerate(turn(rows)):
                self.keep(start + i, part, value)
            return
        rows = turn([self.in_line(start + i, part) for i in range(lanes)])
        with T.If(first + lanes <= self.lines):
            with T.Then():
                for i, row in enumerate(rows):
                    store(y, row, [(first + i) * count + start])
            with T.Else():
                for i, row in enumerate(rows):
                    with if_(first + i < self.lines):
                        store(y, row, [(first + i) * count + start])


# -- in registers ------------------------------------------------------------------------------------------------------


def times(a: Number, b: Number) -> Number:
    """The product of two complex numbers."""
    return share(a[0] * b[0] - a[1] * b[1]), share(a[0] * b[1] + a[1] * b[0])


def small(z: Sequence[Number]) -> list[Number]:
    """The transform of a few numbers, in order: halves of halves, and of a prime length by pairs ``j`` and ``n - j``."""
    n = len(z)
    if n == 1:
        return list(z)
    if n % 2 == 0:
        even, odd = small(z[::2]), small(z[1::2])
        turned = [_rotated(value, k, n) for k, value in enumerate(odd)]
        pairs = list(zip(even, turned, strict=True))
        return [(share(a[0] + b[0]), share(a[1] + b[1])) for a, b in pairs] + [
            (share(a[0] - b[0]), share(a[1] - b[1])) for a, b in pairs
        ]
    half = n // 2
    sums = [(share(z[j][0] + z[n - j][0]), share(z[j][1] + z[n - j][1])) for j in range(1, half + 1)]
    apart = [(share(z[j][0] - z[n - j][0]), share(z[j][1] - z[n - j][1])) for j in range(1, half + 1)]
    found: list[Number] = [z[0]] * n
    found[0] = (_total([z[0][0], *(s[0] for s in sums)]), _total([z[0][1], *(s[1] for s in sums)]))
    circle = roots(n)
    for k in range(1, half + 1):
        powers = [circle[j * k % n] for j in range(1, half + 1)]
        along = [
            _total([z[0][part], *(s[part] * _like(w.real, s[part]) for s, w in zip(sums, powers, strict=True))])
            for part in range(2)
        ]
        across = [
            _total([d[part] * _like(w.imag, d[part]) for d, w in zip(apart, powers, strict=True)]) for part in range(2)
        ]
        found[k] = share(along[0] + across[1]), share(along[1] - across[0])
        found[n - k] = share(along[0] - across[1]), share(along[1] + across[0])
    return found


def _rotated(z: Number, k: int, n: int) -> Number:
    """``z * exp(-2 pi i k / n)``, for k below n / 2."""
    re, im = z
    if k == 0:
        return z
    if 4 * k == n:
        return im, share(-re)
    if 8 * k in (n, 3 * n):
        factor = _like(math.sqrt(0.5), re)
        mean, far = share((re + im) * factor), share((im - re) * factor)
        return (mean, far) if 8 * k == n else (far, share(-mean))
    w = roots(n)[k].conj()
    return times(z, (_like(w.real, re), _like(w.imag, re)))


def _like(value: float, x: Expr) -> Expr:
    return const(float(value), dtype_of(x), lanes_of(x))


def _total(terms: Sequence[Expr]) -> Expr:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return share(total)

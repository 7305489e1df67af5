"""Symbolic extents in normal form.

    Dim     ::= int | SymDim
    SymDim  ::= sum of  coefficient * atom * atom ...      (a polynomial with integer coefficients)
    atom    ::= Symbol("n") | Quotient(SymDim, divisor)    (floor division by a positive int)

The normal form is canonical: two dims are structurally equal iff their polynomials are. A symbol stands for an
integer >= 0, which is what makes ``n + 1 == 0`` provably false.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering

from mlec.errors import TypeRuleError


class Proof(Enum):
    """Answer of `proves_equal`."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@total_ordering
@dataclass(frozen=True, slots=True)
class Symbol:
    """A named extent such as the batch size ``n``."""

    name: str

    def __str__(self) -> str:
        return self.name

    def __lt__(self, other: Symbol | Quotient) -> bool:
        return str(self) < str(other)


@total_ordering
@dataclass(frozen=True, slots=True)
class Quotient:
    """``numerator // divisor``, rounded towards minus infinity."""

    numerator: SymDim
    divisor: int

    def __str__(self) -> str:
        return f"(({self.numerator})//{self.divisor})"

    def __lt__(self, other: Symbol | Quotient) -> bool:
        return str(self) < str(other)


Atom = Symbol | Quotient
Monomial = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class SymDim:
    """A polynomial over atoms: ``terms`` are (monomial, coefficient), sorted, without zeros; never a plain int."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def named(name: str) -> SymDim:
        """The dim that is just the symbol ``name``."""
        return SymDim((((Symbol(name),), 1),))

    def __add__(self, other: Dim) -> Dim:
        return _normal([*self.terms, *_terms(other)])

    def __mul__(self, other: Dim) -> Dim:
        if not isinstance(other, int) and len(self.terms) * len(other.terms) > MAX_PRODUCT:
            raise TypeRuleError(
                f"a product of sums of {len(self.terms)} and {len(other.terms)} terms is no extent", code="E_SHAPE"
            )
        return _normal([(tuple(sorted(m + k)), c * d) for m, c in self.terms for k, d in _terms(other)])

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + -1 * other

    def __rsub__(self, other: Dim) -> Dim:
        return -1 * self + other

    def __floordiv__(self, divisor: int) -> Dim:
        if not isinstance(divisor, int) or divisor <= 0:
            raise ValueError(f"a dim can be divided by a positive int only, not by {divisor}")
        if divisor == 1:
            return self
        # Multiples of the divisor leave the quotient exactly: (4*n + 3)//2 == 2*n + 3//2.
        whole = [(m, c // divisor) for m, c in self.terms if c % divisor == 0 or not m]
        rest = _normal([(m, c % divisor if not m else c) for m, c in self.terms if c % divisor or not m])
        if isinstance(rest, int):
            return _normal([*whole, ((), rest // divisor)])
        *atoms, (_, constant) = rest.terms if not rest.terms[-1][0] else (*rest.terms, ((), 0))
        if len(atoms) == 1 and atoms[0][1] == 1 and len(atoms[0][0]) == 1 and isinstance(atoms[0][0][0], Quotient):
            # (a//b + c)//d == (a + b*c)//(b*d): one division, however many layers an extent went through.
            inner = atoms[0][0][0]
            return _normal([*whole]) + (inner.numerator + inner.divisor * constant) // (inner.divisor * divisor)
        return _normal([*whole, ((Quotient(rest, divisor),), 1)])

    def __mod__(self, divisor: int) -> Dim:
        return self - divisor * (self // divisor)

    def __str__(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in self.terms:
            atoms = "*".join(map(str, monomial))
            magnitude = abs(coefficient)
            text = atoms if atoms and magnitude == 1 else f"{magnitude}*{atoms}" if atoms else str(magnitude)
            if not parts:
                parts.append(text if coefficient > 0 else f"-{text}")
            else:
                parts.append(f"+{text}" if coefficient > 0 else f"-{text}")
        return "".join(parts)

    __repr__ = __str__


Dim = int | SymDim

MAX_PRODUCT = 1 << 12
"""Terms of a product of two sums, before equal ones are joined: the products that a text can ask for grow beyond any memory."""

MAX_NUMBER = 1 << 64
"""No number in the text of a dim is as large."""

Ranges = Mapping[str, tuple[int, int | None]]
"""Of symbols, the smallest and the largest value (None: unbounded)."""


def _terms(dim: Dim) -> list[tuple[Monomial, int]]:
    return [((), dim)] if isinstance(dim, int) else list(dim.terms)


def _normal(terms: list[tuple[Monomial, int]]) -> Dim:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = sorted(((m, c) for m, c in total.items() if c), key=lambda t: (-len(t[0]), [str(a) for a in t[0]]))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return SymDim(tuple(kept))


def static(dim: Dim) -> int:
    """The number that a dim is.

    Raises:
        TypeRuleError: it is symbolic.
    """
    if isinstance(dim, int):
        return dim
    raise TypeRuleError(f"must be static, got {dim}", code="E_SHAPE")


def static_dims(dims: Iterable[Dim]) -> tuple[int, ...]:
    """The same of several, such as the extents of weights."""
    return tuple(map(static, dims))


def substitute(dim: Dim, binding: Mapping[str, Dim]) -> Dim:
    """Replaces symbols; those not in ``binding`` stay."""
    if isinstance(dim, int):
        return dim
    result: Dim = 0
    for monomial, coefficient in dim.terms:
        product: Dim = coefficient
        for atom in monomial:
            if isinstance(atom, Symbol):
                factor: Dim = binding.get(atom.name, SymDim(((((atom,)), 1),)))
            else:
                factor = substitute(atom.numerator, binding) // atom.divisor
            product = product * factor
        result = result + product
    return result


def evaluate(dim: Dim, binding: Mapping[str, int]) -> int:
    """The value under a binding of every symbol.

    Raises:
        KeyError: naming the symbol without a value.
    """
    value = substitute(dim, binding)
    if isinstance(value, int):
        return value
    raise KeyError(f"no value for {', '.join(sorted(symbols_of(value)))} in {dim}")


def evaluate_at(dim: Dim, extent: int) -> int:
    """The value where every symbol is ``extent``."""
    return evaluate(dim, dict.fromkeys(symbols_of(dim), extent))


def symbols_of(dim: Dim) -> frozenset[str]:
    """Names of the symbols in a dim."""
    if isinstance(dim, int):
        return frozenset()
    names: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            names |= {atom.name} if isinstance(atom, Symbol) else symbols_of(atom.numerator)
    return frozenset(names)


def proves_equal(a: Dim, b: Dim, ranges: Ranges | None = None) -> Proof:
    """Whether two dims are equal for all (YES), for no (NO) or maybe for some (UNKNOWN) values of the symbols, or those in ranges."""
    difference = a - b
    if isinstance(difference, int):
        return Proof.YES if difference == 0 else Proof.NO
    for sign in (1, -1):
        terms = {m: sign * c for m, c in difference.terms}
        # All atoms are >= 0 (a Quotient of a sum with a negative term may not be), so a positive sum cannot vanish.
        if terms.get((), 0) > 0 and all(c > 0 and _non_negative(m) for m, c in terms.items()):
            return Proof.NO
    least, most = bounds(difference, ranges or {})
    return Proof.NO if (least or 0) > 0 or (0 if most is None else most) < 0 else Proof.UNKNOWN


def bounds(dim: Dim, ranges: Ranges) -> tuple[int | None, int | None]:
    """Numbers that a dim is never below, and never above; None where there is none.

    Args:
        ranges: of symbols; the others are at least 0.
    """
    if isinstance(dim, int):
        return dim, dim
    total: tuple[float, float] = (0, 0)
    for monomial, coefficient in dim.terms:
        factor: tuple[float, float] = (1, 1)
        for atom in monomial:
            low: float | None
            high: float | None
            if isinstance(atom, Symbol):
                low, high = ranges.get(atom.name, (0, None))
            else:
                ends = bounds(atom.numerator, ranges)
                low, high = (None if end is None else end // atom.divisor for end in ends)
            factor = _times(factor, (-math.inf if low is None else low, math.inf if high is None else high))
        scaled = _times(factor, (coefficient, coefficient))
        total = total[0] + scaled[0], total[1] + scaled[1]
    least, most = (None if math.isinf(end) else int(end) for end in total)
    return least, most


def _times(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """The interval of the products of two intervals' numbers."""
    products = [x * y if x and y else 0 for x in a for y in b]
    return min(products), max(products)


def _non_negative(monomial: Monomial) -> bool:
    return all(isinstance(a, Symbol) or all(c > 0 and _non_negative(m) for m, c in a.numerator.terms) for a in monomial)


def divide_exact(dim: Dim, divisor: Dim) -> Dim | None:
    """``dim / divisor`` when the division is exact for all values of the symbols, else None."""
    if isinstance(divisor, int):
        if divisor == 0:
            return None
        if isinstance(dim, int):
            return dim // divisor if dim % divisor == 0 else None
        if all(c % divisor == 0 for _, c in dim.terms):
            return _normal([(m, c // divisor) for m, c in dim.terms])
        return None
    if isinstance(dim, int):
        return 0 if dim == 0 else None
    if dim == divisor:
        return 1
    # Polynomial long division on the leading terms of the (sorted) normal form.
    quotient: Dim = 0
    rest: Dim = dim
    lead_m, lead_c = divisor.terms[0]
    for _ in range(len(dim.terms) + 1):
        if isinstance(rest, int):
            return quotient if rest == 0 else None
        m, c = rest.terms[0]
        left = list(m)
        for atom in lead_m:
            if atom not in left:
                return None
            left.remove(atom)
        if c % lead_c:
            return None
        step = _normal([(tuple(left), c // lead_c)])
        quotient = quotient + step
        rest = rest - step * divisor
    return None


def product(dims: tuple[Dim, ...]) -> Dim:
    """Number of elements of a shape."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][A-Za-z0-9_.]*)|(//|[-+*()]))")


def parse_dim(text: str | int) -> Dim:
    """The inverse of ``str``: ``"n"``, ``"2*n+1"``, ``"((n+1)//2)*k"``.

    Raises:
        ValueError: for text that is not a dim.
        TypeRuleError: for products of sums that are too long.
    """
    if isinstance(text, int):
        return text
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise ValueError(f"{text[:80]!r} is not a dim: unexpected {stripped[position]!r}")
        tokens.append(match.group().strip())
        position = match.end()
    if len(tokens) > 1000:
        raise ValueError("a dim of more than 1000 tokens")

    def within(value: Dim) -> Dim:
        if any(abs(coefficient) >= MAX_NUMBER for _, coefficient in _terms(value)):
            raise ValueError("a dim with a number of more than 64 bits")
        return value

    def expression(at: int, depth: int) -> tuple[Dim, int]:
        sign = 1
        if at < len(tokens) and tokens[at] == "-":
            sign, at = -1, at + 1
        value, at = term(at, depth)
        value = value * sign
        while at < len(tokens) and tokens[at] in "+-":
            sign = 1 if tokens[at] == "+" else -1
            right, at = term(at + 1, depth)
            value = value + right * sign
        return value, at

    def term(at: int, depth: int) -> tuple[Dim, int]:
        value, at = atom(at, depth)
        while at < len(tokens) and tokens[at] in ("*", "//"):
            operator = tokens[at]
            right, at = atom(at + 1, depth)
            if operator == "*":
                value = within(value * right)
            elif isinstance(right, int) and right > 0:
                value = value // right
            else:
                raise ValueError(f"{text[:80]!r} is not a dim: // takes a positive int on its right")
        return value, at

    def atom(at: int, depth: int) -> tuple[Dim, int]:
        if depth > 40:
            raise ValueError("a dim nested deeper than 40")
        if at >= len(tokens):
            raise ValueError(f"{text[:80]!r} is not a dim: it ends early")
        token = tokens[at]
        if token.isdigit():
            return within(int(token) if len(token) <= 20 else MAX_NUMBER), at + 1
        if token == "(":
            value, at = expression(at + 1, depth + 1)
            if at >= len(tokens) or tokens[at] != ")":
                raise ValueError(f"{text[:80]!r} is not a dim: a ')' is missing")
            return value, at + 1
        if token[0].isalpha() or token[0] == "_":
            return SymDim.named(token), at + 1
        raise ValueError(f"{text[:80]!r} is not a dim: unexpected {token!r}")

    value, end = expression(0, 0)
    if end != len(tokens):
        raise ValueError(f"{text[:80]!r} is not a dim: unexpected {tokens[end]!r}")
    return value

"""What every elementwise op computes for one element (or one vector of elements), as a TIR expression; the table is at the end.

The rules are numpy's: NaN spreads through ``maximum``, ``minimum``, ``relu`` and ``clip``; ``round`` breaks ties to even; the
remainder has the sign of the divisor; an integer division by zero gives 0; floats truncate towards zero to integers; a
16-bit float is computed in float32 and rounded once.

TVM's simplifier reasons about floats as if NaN did not exist (``not (a < b)`` becomes ``b <= a``, and inside a ``Select`` it
believes the negated condition), and as if ``x - x`` and ``0 * x`` were 0 and ``x + 0`` were ``x`` for every x; a division by the
constant 0 ends it. The operands that come here are loads or names (`vector.share`), and so is every result that a condition of
another op may see: the simplifier cannot look behind a name. `_apart` and `_hidden` give such names where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from mlec.backends.tvm.compat import structural_equal, tirx
from mlec.backends.tvm.kernels import mathlib
from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.vector import (
    Cell,
    bits_as,
    cast_to,
    const,
    const_like,
    dtype_of,
    is_nan,
    lanes_of,
    maximum,
    minimum,
    select,
    share,
)
from mlec.backends.tvm.registry import find, lowers
from mlec.ir.dtype import DType
from mlec.ir.op import Attrs

Function = Callable[..., Expr]

TVM_NAMES = {
    DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16",
    DType.I64: "int64", DType.I32: "int32", DType.I16: "int16", DType.I8: "int8", DType.U8: "uint8", DType.BOOL: "bool",
}  # fmt: skip
"""TVM's name of each element type."""


def apply(op: str, attrs: Attrs, arguments: Sequence[Expr], result: DType) -> Expr:
    """The value of an elementwise op. ``arguments`` are loads, names or constants, of equal lanes or scalar.

    Needs an open builder: intermediate values are named by statements.
    """
    if op == "cast":
        return cast(arguments[0], TVM_NAMES[result])
    low_precision = dtype_of(arguments[-1]) in ("float16", "bfloat16")
    if low_precision:
        arguments = [cast_to("float32", a) if dtype_of(a) in ("float16", "bfloat16") else a for a in arguments]
    function = find(op, "scalar")
    assert function is not None, op
    value = function(*arguments, **attrs)
    return cast_to(TVM_NAMES[result], value) if low_precision and result.is_float else value


@lowers("cast", form="scalar")
def cast(x: Expr, dtype: str) -> Expr:
    """Numeric conversion by numpy's rules."""
    source = dtype_of(x)
    if dtype == source:
        return x
    if dtype == "bool":
        return _not_equal(x, const_like(0, x))
    if source == "bool":
        return select(x, const(1, dtype, lanes_of(x)), const(0, dtype, lanes_of(x)))
    if "float16" in (dtype, source) or "bfloat16" in (dtype, source):
        return cast_to(dtype, cast_to("float32", x))
    return cast_to(dtype, x)


# -- one operand -----------------------------------------------------------------------------------------------------


def _neg(x: Expr) -> Expr:
    if not _is_float(x):
        return const_like(0, x) - x
    sign = {"float32": ("int32", -(2**31)), "float64": ("int64", -(2**63))}[dtype_of(x)]
    bits = bits_as(sign[0], x)
    return bits_as(dtype_of(x), bits ^ const_like(sign[1], bits))


def _abs(x: Expr) -> Expr:
    if _is_float(x):
        mask = {"float32": ("int32", 2**31 - 1), "float64": ("int64", 2**63 - 1)}[dtype_of(x)]
        bits = bits_as(mask[0], x)
        return bits_as(dtype_of(x), bits & const_like(mask[1], bits))
    return x if dtype_of(x).startswith("uint") else select(x < const_like(0, x), const_like(0, x) - x, x)


def _sign(x: Expr) -> Expr:
    zero = const_like(0, x)
    return select(x > zero, const_like(1, x), select(x < zero, const_like(-1, x), x) if not _is_unsigned(x) else x)


def _relu(x: Expr) -> Expr:
    # One ordered comparison: false for NaN, which therefore stays.
    return select(x < const_like(0, x), const_like(0, x), x)


def _clip(x: Expr, lo: float, hi: float) -> Expr:
    value = x if lo == -math.inf else share(select(x < const_like(lo, x), const_like(lo, x), x))
    return value if hi == math.inf else select(value > const_like(hi, x), const_like(hi, x), value)


def _rsqrt(x: Expr) -> Expr:
    return const_like(1.0, x) / tirx.sqrt(x)


def _silu(x: Expr) -> Expr:
    x = share(x)
    return share(x / mathlib.sigmoid_divisor(x))


def _gelu(x: Expr, approximate: str) -> Expr:
    if approximate != "tanh":
        return mathlib.gelu(x)
    # (1 + tanh u) / 2 is the sigmoid of 2 u.
    inner = share(x * (const_like(1.0, x) + const_like(0.044715, x) * x * x))
    return x / mathlib.sigmoid_divisor(inner * const_like(2 * math.sqrt(2 / math.pi), x))


def _isnan(x: Expr) -> Expr:
    return is_nan(x)


def _isinf(x: Expr) -> Expr:
    return share(_abs(x)) > const_like(_largest(x), x)


def _isfinite(x: Expr) -> Expr:
    return share(_abs(x)) <= const_like(_largest(x), x)


def _logical_not(x: Expr) -> Expr:
    return select(x, const_like(False, x), const_like(True, x))


# -- two operands ----------------------------------------------------------------------------------------------------


def _add(a: Expr, b: Expr) -> Expr:
    return _hidden(a) + _hidden(b)


def _sub(a: Expr, b: Expr) -> Expr:
    return a - _apart(b, a)


def _mul(a: Expr, b: Expr) -> Expr:
    return _hidden(a) * _hidden(b)


def _div(a: Expr, b: Expr) -> Expr:
    return _hidden(a) / _hidden(b)


def _floordiv(a: Expr, b: Expr) -> Expr:
    if not _is_float(a):
        return _guarded(a, b, tirx.floordiv, lambda: const_like(0, a) - a)
    a, b = _hidden(a), _hidden(b)
    remainder = share(_fmod(a, b))
    quotient = (a - remainder) / b
    one = const_like(1.0, a)
    zero = const_like(0.0, a)
    exact = share(select(_signs_differ(remainder, b), quotient - one, quotient))
    floor = share(tirx.floor(exact))
    rounded = select(exact - floor > const_like(0.5, a), floor + one, floor)
    return share(select(tirx.EQ(b, zero), a / b, rounded))


def _mod(a: Expr, b: Expr) -> Expr:
    if not _is_float(a):
        return _guarded(a, b, tirx.floormod, lambda: const_like(0, a))
    remainder = share(_fmod(a, b))
    return share(select(_signs_differ(remainder, b), remainder + b, remainder))


def _guarded(a: Expr, b: Expr, divide: Function, by_minus_one: Callable[[], Expr]) -> Expr:
    """Integer division that cannot trap: 0 for a zero divisor, and no ``min // -1``."""
    zero, one = const_like(0, b), const_like(1, b)
    safe = select(tirx.EQ(b, zero), one, b)
    if _is_unsigned(b):
        return select(tirx.EQ(b, zero), zero, divide(a, share(safe)))
    minus_one = const_like(-1, b)
    safe = share(select(tirx.EQ(b, minus_one), one, safe))
    value = share(select(tirx.EQ(b, minus_one), by_minus_one(), divide(a, safe)))
    return select(tirx.EQ(b, zero), zero, value)


def _signs_differ(remainder: Expr, b: Expr) -> Expr:
    zero = const_like(0.0, b)
    opposite = tirx.Or(tirx.And(remainder < zero, b > zero), tirx.And(remainder > zero, b < zero))
    return share(opposite)


def _fmod(a: Expr, b: Expr) -> Expr:
    name = "fmodf" if dtype_of(a) == "float32" else "fmod"
    return tirx.call_pure_extern(dtype_of(a), name, a, b)


def _hypot(a: Expr, b: Expr) -> Expr:
    a, b = share(_abs(a)), share(_abs(b))
    larger = share(select(a < b, b, a))
    smaller = share(select(a < b, a, b))
    ratio = share(smaller / select(larger > const_like(0, a), larger, const_like(1, a)))
    length = share(larger * tirx.sqrt(const_like(1, a) + ratio * ratio))
    largest, infinite = const_like(_largest(a), a), const_like(math.inf, a)
    return select(a > largest, infinite, share(select(b > largest, infinite, length)))


def _left_shift(a: Expr, b: Expr) -> Expr:
    within = share(_is_shift(b))
    return select(within, tirx.shift_left(a, share(select(within, b, const_like(0, b)))), const_like(0, a))


def _right_shift(a: Expr, b: Expr) -> Expr:
    within = share(_is_shift(b))
    if _is_unsigned(a):
        return select(within, tirx.shift_right(a, share(select(within, b, const_like(0, b)))), const_like(0, a))
    return tirx.shift_right(a, share(select(within, b, const_like(_bits(b) - 1, b))))


def _is_shift(b: Expr) -> Expr:
    """Whether a number is from 0 to the number of its bits: a shift by any other one means nothing to processors."""
    bits = _bits(b)
    b = (
        cast_to("int32", b) if _is_unsigned(b) else b
    )  # TVM compares by subtracting, and refuses unsigned numbers below 0
    return tirx.And(b >= const_like(0, b), b < const_like(bits, b))


def _equal(a: Expr, b: Expr) -> Expr:
    return tirx.EQ(*_comparable(a, _apart(b, a)))


def _not_equal(a: Expr, b: Expr) -> Expr:
    if _is_float(a):  # LLVM's instruction for NE is false for NaN
        return _logical_not(share(_equal(a, b)))
    return tirx.NE(*_comparable(a, b))


def _comparable(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Booleans as bytes: the code generator would compare them as floats."""
    return (cast(a, "int8"), cast(b, "int8")) if dtype_of(a) == "bool" else (a, b)


def _where(condition: Expr, a: Expr, b: Expr) -> Expr:
    return select(condition, a, b)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _apart(b: Expr, a: Expr) -> Expr:
    """``b`` under a name of its own where the simplifier would see that it is ``a``: it takes x - x for 0, and x for equal to x."""
    return share(b) if _is_float(b) and structural_equal(a, b) else b


def _hidden(x: Expr) -> Expr:
    """``x`` under a name if it is the constant 0.0 or -0.0."""
    scalar = x
    while isinstance(scalar, tirx.Broadcast | tirx.Cast):
        scalar = scalar.value
    if _is_float(x) and isinstance(scalar, tirx.FloatImm) and scalar.value == 0:
        return Cell(dtype_of(x), lanes_of(x), x).value
    return x


def _is_float(x: Expr) -> bool:
    return dtype_of(x).startswith(("float", "bfloat"))


def _is_unsigned(x: Expr) -> bool:
    return dtype_of(x).startswith("uint")


def _bits(x: Expr) -> int:
    return int(dtype_of(x).lstrip("uint"))


def _largest(x: Expr) -> float:
    """The largest finite number of the type."""
    return {"float32": (2 - 2.0**-23) * 2.0**127, "float64": (2 - 2.0**-52) * 2.0**1023}[dtype_of(x)]


def _extern(stem: str) -> Function:
    """A function of the C library."""

    def call(*arguments: Expr) -> Expr:
        dtype = dtype_of(arguments[0])
        return tirx.call_pure_extern(dtype, f"{stem}f" if dtype == "float32" else stem, *arguments)

    return call


def _binary(operator: Any) -> Function:
    return lambda a, b: operator(a, b)


_FUNCTIONS: dict[str, Function] = {
    "neg": _neg, "abs": _abs, "sign": _sign, "relu": _relu, "clip": _clip,
    "exp": mathlib.exp, "expm1": mathlib.expm1, "log": mathlib.log, "log1p": mathlib.log1p, "tanh": mathlib.tanh,
    "sigmoid": mathlib.sigmoid, "erf": mathlib.erf, "silu": _silu, "gelu": _gelu,
    "sqrt": tirx.sqrt, "rsqrt": _rsqrt,
    "sin": _extern("sin"), "cos": _extern("cos"), "tan": _extern("tan"), "atan": _extern("atan"), "erfc": _extern("erfc"),
    "floor": tirx.floor, "ceil": tirx.ceil, "round": tirx.nearbyint, "trunc": tirx.trunc,
    "isnan": _isnan, "isinf": _isinf, "isfinite": _isfinite, "logical_not": _logical_not,
    "add": _add, "sub": _sub, "mul": _mul, "div": _div,
    "floordiv": _floordiv, "mod": _mod, "pow": _extern("pow"), "atan2": _extern("atan2"),
    "hypot": _hypot,
    "maximum": maximum, "minimum": minimum,
    "eq": _equal, "ne": _not_equal, "lt": _binary(tirx.LT), "le": _binary(tirx.LE),
    "gt": _binary(tirx.GT), "ge": _binary(tirx.GE),
    "logical_and": _binary(tirx.And), "logical_or": _binary(tirx.Or), "logical_xor": _not_equal, "where": _where,
    "bitwise_and": _binary(tirx.bitwise_and), "bitwise_or": _binary(tirx.bitwise_or), "bitwise_xor": _binary(tirx.bitwise_xor),
    "left_shift": _left_shift, "right_shift": _right_shift,
}  # fmt: skip
"""The elementwise ops but ``cast``, by name: ``function(*operands, **attributes)``."""

for _op, _function in _FUNCTIONS.items():
    lowers(_op, form="scalar")(_function)

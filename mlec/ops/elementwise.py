"""Ops on each element by itself; operands broadcast as in numpy and share a dtype (nothing is promoted silently)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlec.ir.dtype import DType
from mlec.ir.op import REQUIRED, Array, Attr, AttrKind, Attrs, Case, OpDef, Trait, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    broadcast_shapes,
    choice_attr,
    float_attr,
    float_dtype,
    floats,
    operands,
    per_element,
    pick_dtype,
    require,
    same_dtype,
)

EW = Trait.ELEMENTWISE


def _unary_type(float_only: bool) -> Callable[[Sequence[TensorType], Attrs], TensorType]:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
        (x,) = types
        require(not x.dtype.is_bool, f"needs numbers, got {x}", "E_DTYPE")
        if float_only:
            float_dtype(x)
        return x

    return infer


def _unary(
    name: str,
    reference: Callable[..., Any],
    doc: str,
    *,
    traits: Trait = Trait.NONE,
    flops: int = 1,
    low: float = -3.0,
    high: float = 3.0,
    float_only: bool = True,
    tolerance: float = 8.0,
    attrs: tuple[Attr, ...] = (),
) -> OpDef:
    def sample(rng: np.random.Generator) -> Case:
        dtype = str(rng.choice(["float32", "float64", "float16"]))
        given = {attr.name: str(rng.choice(attr.choices)) for attr in attrs if attr.choices}
        return Case((floats(rng, N, 5, dtype=dtype, low=low, high=high),), given)

    return register(
        OpDef(
            name, operands("x"), attrs, _unary_type(float_only), _keeps_dtype(reference), sample, per_element(flops), EW | traits,
            tolerance, doc,
        )
    )  # fmt: skip


def _keeps_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Low-precision floats are computed in float32 and rounded once."""

    def reference(x: Array, *rest: Any, **attrs: Any) -> Array:
        if x.dtype.itemsize == 2 and x.dtype.kind != "i":
            wide = (np.asarray(a, np.float32) for a in (x, *rest))
            return np.asarray(function(*wide, **attrs)).astype(x.dtype)
        return np.asarray(function(x, *rest, **attrs)).astype(x.dtype, copy=False)

    return reference


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def _in_float64(function: Callable[[float], float]) -> Callable[[Array], Array]:
    """A function of one number, for each element in float64."""

    def each(x: Array) -> Array:
        values = np.asarray(x, np.float64)
        return np.fromiter(map(function, values.ravel()), np.float64, values.size).reshape(values.shape)

    return each


erf = _in_float64(math.erf)


def _gelu(x: Array, approximate: str = "none") -> Array:
    wide = np.asarray(x, np.float64)
    if approximate == "tanh":
        return np.asarray(0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))))
    return np.asarray(np.where(np.isneginf(wide), 0.0, 0.5 * wide * (1 + erf(wide / math.sqrt(2)))))


_unary("neg", np.negative, "minus x", traits=Trait.INVOLUTION, float_only=False)
_unary("abs", np.abs, "|x|", traits=Trait.IDEMPOTENT, float_only=False)
_unary("sign", np.sign, "-1, 0 or 1; NaN stays NaN", traits=Trait.IDEMPOTENT | Trait.MONOTONE, float_only=False)
_unary("exp", np.exp, "e to the x", traits=Trait.MONOTONE, flops=8)
_unary("expm1", np.expm1, "exp(x) - 1, accurate near 0", traits=Trait.MONOTONE, flops=10)
_unary("log", np.log, "natural logarithm", traits=Trait.MONOTONE, flops=8, low=0.01, high=9.0)
_unary("log1p", np.log1p, "log(1 + x), accurate near 0", traits=Trait.MONOTONE, flops=10, low=-0.9)
_unary("sqrt", np.sqrt, "square root", traits=Trait.MONOTONE, flops=2, low=0.0, high=9.0)
_unary("rsqrt", lambda x: 1 / np.sqrt(x), "1 / sqrt(x)", flops=3, low=0.1, high=9.0)
_unary("sin", np.sin, "sine", traits=Trait.LIBRARY_CALL, flops=10)
_unary("cos", np.cos, "cosine", traits=Trait.LIBRARY_CALL, flops=10)
_unary("tan", np.tan, "tangent", traits=Trait.LIBRARY_CALL, flops=12, low=-1.2, high=1.2, tolerance=32.0)
_unary("atan", np.arctan, "arc tangent", traits=Trait.MONOTONE | Trait.LIBRARY_CALL, flops=12)
_unary("tanh", np.tanh, "hyperbolic tangent", traits=Trait.MONOTONE, flops=10)
_unary("sigmoid", sigmoid, "1 / (1 + exp(-x))", traits=Trait.MONOTONE, flops=10)
_unary("erf", erf, "error function", traits=Trait.MONOTONE, flops=12, tolerance=16.0)
_unary(
    "erfc", _in_float64(math.erfc), "1 - erf(x), accurate where that is small", traits=Trait.LIBRARY_CALL, flops=20, tolerance=16.0
)  # fmt: skip
_unary(
    "relu",
    lambda x: np.maximum(x, 0),
    "max(x, 0); NaN stays NaN",
    traits=Trait.IDEMPOTENT | Trait.MONOTONE,
    float_only=False,
)
_unary("silu", lambda x: x * sigmoid(x), "x * sigmoid(x)", flops=11, tolerance=16.0)
_unary("floor", np.floor, "round down", traits=Trait.IDEMPOTENT | Trait.MONOTONE)
_unary("ceil", np.ceil, "round up", traits=Trait.IDEMPOTENT | Trait.MONOTONE)
_unary("round", np.rint, "round to nearest, ties to even", traits=Trait.IDEMPOTENT | Trait.MONOTONE)
_unary("trunc", np.trunc, "round towards zero", traits=Trait.IDEMPOTENT | Trait.MONOTONE)
_unary(
    "gelu", _gelu, "x * normal CDF(x), exact or by tanh", flops=14, tolerance=32.0,
    attrs=(choice_attr("approximate", "none", "tanh"),),
)  # fmt: skip


def _clip(x: Array, lo: float, hi: float) -> Array:
    return np.asarray(np.minimum(np.maximum(x, np.asarray(lo, x.dtype)), np.asarray(hi, x.dtype)))


register(
    OpDef(
        "clip", operands("x"), (float_attr("lo", default=-math.inf), float_attr("hi", default=math.inf)), _unary_type(True),
        _keeps_dtype(_clip), lambda rng: Case((floats(rng, N, 5, dtype=pick_dtype(rng)),), {"lo": -1.0, "hi": 2.0}),
        per_element(2), EW | Trait.IDEMPOTENT | Trait.MONOTONE, doc="min(max(x, lo), hi); NaN stays NaN",
    )
)  # fmt: skip


def _test_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    float_dtype(types[0])
    return TensorType(types[0].shape, DType.BOOL)


def _specials(rng: np.random.Generator) -> Case:
    x = floats(rng, N, 5, dtype=pick_dtype(rng))
    x.flat[:3] = [np.nan, np.inf, -np.inf]
    return Case((x,), {})


for _name, _function in {"isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite}.items():
    register(OpDef(_name, operands("x"), (), _test_type, _function, _specials, traits=EW, doc=f"{_name[2:]}, as bool"))


# -- two operands ----------------------------------------------------------------------------------------------------


def _binary_type(kinds: str, boolean: bool = False) -> Callable[[Sequence[TensorType], Attrs], TensorType]:
    """``kinds``: which operands are taken, of f (floats), i (integers), b (bool)."""

    def infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
        dtype = same_dtype(types)
        kind = "f" if dtype.is_float else "i" if dtype.is_int else "b"
        require(kind in kinds, f"does not take {dtype}", "E_DTYPE")
        return TensorType(broadcast_shapes(*(t.shape for t in types)), DType.BOOL if boolean else dtype)

    return infer


def _binary_sample(kinds: str, low: float, high: float) -> Callable[[np.random.Generator], Case]:
    shapes = [((N, 5), (N, 5)), ((N, 5), (5,)), ((N, 1), (1, 5)), ((N, 5), ())]

    def sample(rng: np.random.Generator) -> Case:
        left, right = shapes[int(rng.integers(len(shapes)))]
        kind = str(rng.choice(list(kinds)))
        if kind == "f":
            dtype = pick_dtype(rng)
            return Case(
                (
                    floats(rng, *left, dtype=dtype, low=low, high=high),
                    floats(rng, *right, dtype=dtype, low=low, high=high),
                ),
                {},
            )
        if kind == "i":
            return Case(tuple(rng.integers(1, 9, s) for s in (left, right)), {})
        return Case(tuple(np.asarray(rng.random(s) < 0.5) for s in (left, right)), {})

    return sample


def _binary(
    name: str, reference: Callable[..., Any], doc: str, kinds: str = "fi", *, traits: Trait = Trait.NONE, flops: int = 1,
    low: float = -3.0, high: float = 3.0, boolean: bool = False, tolerance: float = 8.0,
) -> OpDef:  # fmt: skip
    function = reference if boolean else _keeps_dtype(reference)
    return register(
        OpDef(
            name, operands("a b"), (), _binary_type(kinds, boolean), function, _binary_sample(kinds, low, high), per_element(flops),
            EW | traits, tolerance, doc,
        )
    )  # fmt: skip


AC = Trait.COMMUTATIVE | Trait.ASSOCIATIVE
_binary("add", np.add, "a + b", traits=AC)
_binary("sub", np.subtract, "a - b")
_binary("mul", np.multiply, "a * b", traits=AC)
_binary("div", np.divide, "a / b", "f", low=0.5)
_binary("floordiv", np.floor_divide, "a // b, rounded down", traits=Trait.LIBRARY_CALL, low=0.5, flops=2)
_binary("mod", np.mod, "a - b * floor(a / b), sign of b", traits=Trait.LIBRARY_CALL, low=0.5, flops=3)
_binary("pow", np.power, "a to the b", "f", traits=Trait.LIBRARY_CALL, flops=20, low=0.2, tolerance=32.0)
_binary("maximum", np.maximum, "the larger; NaN if either is", traits=AC)
_binary("minimum", np.minimum, "the smaller; NaN if either is", traits=AC)
_binary("atan2", np.arctan2, "angle of (b, a)", "f", traits=Trait.LIBRARY_CALL, flops=20, tolerance=16.0)
_binary(
    "hypot", np.hypot, "sqrt(a * a + b * b), which overflows only where the result does; inf if either is, whatever the other", "f",
    traits=Trait.COMMUTATIVE, flops=16,
)  # fmt: skip
_binary("eq", np.equal, "a == b", "fib", boolean=True, traits=Trait.COMMUTATIVE)
_binary("ne", np.not_equal, "a != b", "fib", boolean=True, traits=Trait.COMMUTATIVE)
_binary("lt", np.less, "a < b", boolean=True)
_binary("le", np.less_equal, "a <= b", boolean=True)
_binary("gt", np.greater, "a > b", boolean=True)
_binary("ge", np.greater_equal, "a >= b", boolean=True)
_binary("logical_and", np.logical_and, "a and b", "b", boolean=True, traits=AC)
_binary("logical_or", np.logical_or, "a or b", "b", boolean=True, traits=AC)
_binary("logical_xor", np.logical_xor, "a xor b", "b", boolean=True, traits=AC)
_binary("bitwise_and", np.bitwise_and, "a and b, bit by bit", "i", traits=AC)
_binary("bitwise_or", np.bitwise_or, "a or b, bit by bit", "i", traits=AC)
_binary("bitwise_xor", np.bitwise_xor, "a xor b, bit by bit", "i", traits=AC)
_binary(
    "left_shift", np.left_shift, "a * 2**b, of which bits fall off; 0 where b is negative, or has no bit of a left", "i"
)
_binary(
    "right_shift",
    np.right_shift,
    "a // 2**b; -1 of a negative a, else 0, where b is negative, or has no bit of a left",
    "i",
)


def _not_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    require(types[0].dtype.is_bool, f"needs bool, got {types[0]}", "E_DTYPE")
    return types[0]


register(
    OpDef(
        "logical_not", operands("x"), (), _not_type, np.logical_not, lambda rng: Case((np.asarray(rng.random((N, 5)) < 0.5),), {}),
        traits=EW | Trait.INVOLUTION, doc="not x",
    )
)  # fmt: skip


def _where_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    condition, a, b = types
    require(condition.dtype.is_bool, f"the condition must be bool, got {condition}", "E_DTYPE")
    return TensorType(broadcast_shapes(condition.shape, a.shape, b.shape), same_dtype((a, b)))


register(
    OpDef(
        "where", operands("condition a b"), (), _where_type, np.where,
        lambda rng: Case((np.asarray(rng.random((N, 5)) < 0.5), floats(rng, N, 5), floats(rng, 5)), {}),
        traits=EW, doc="a where the condition holds, else b",
    )
)  # fmt: skip


def _cast_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    return TensorType(types[0].shape, attrs["dtype"])


def _cast(x: Array, dtype: DType) -> Array:
    return x.astype(dtype.numpy)


def _cast_sample(rng: np.random.Generator) -> Case:
    target = DType(str(rng.choice(["f64", "f32", "f16", "i64", "i32", "i16", "i8", "bool"])))
    source = str(rng.choice(["float64", "float32", "float16", "int64", "int32", "int8", "bool"]))
    return Case((floats(rng, N, 5).astype(source),), {"dtype": target})


register(
    OpDef(
        "cast", operands("x"), (Attr("dtype", AttrKind.DTYPE, REQUIRED),), _cast_type, _cast, _cast_sample, traits=EW,
        doc="another element type; floats truncate towards zero to integers, to bool they compare with 0",
    )
)  # fmt: skip

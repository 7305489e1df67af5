"""ATen ops on elements, reductions and matrix products, as IR ops. `mlec.frontends.fx_context.HANDLERS` is the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlec.frontends.fx_context import HANDLERS, TORCH_DTYPES, Context, Number, Operand, lowers, to_numpy
from mlec.ir import Dim, DType, SymDim, Value
from mlec.ops.common import broadcast_shapes

# -- one operand -----------------------------------------------------------------------------------------------------


def _table(names: dict[str, str], make: Callable[[str], Callable[..., Value]]) -> None:
    for aten, op in names.items():
        HANDLERS[f"aten.{aten}"] = make(op)


def _float_unary(op: str) -> Callable[..., Value]:
    return lambda c, x: c.float_op(op, x)


def _unary(op: str) -> Callable[..., Value]:
    return lambda c, x: c.b(op, x)


def _rounding(op: str) -> Callable[..., Value]:
    return lambda c, x: c.b(op, x) if x.type.dtype.is_float else x


_FLOAT_UNARY = "exp expm1 log log1p sqrt rsqrt sin cos tan atan tanh sigmoid erf erfc silu"
_table({f"{name}.default": name for name in _FLOAT_UNARY.split()}, _float_unary)
_table({"neg.default": "neg", "_neg_view.default": "neg", "relu.default": "relu"}, _unary)
_table(
    {
        "floor.default": "floor",
        "ceil.default": "ceil",
        "round.default": "round",
        "trunc.default": "trunc",
        "fix.default": "trunc",
    },
    _rounding,
)


@lowers("abs.default")
def _abs(c: Context, x: Value) -> Value:
    return x if x.type.dtype.is_bool else c.b("abs", x)


@lowers("sign.default", "sgn.default")
def _sign(c: Context, x: Value) -> Value:
    """0 for NaN, as in torch."""
    if not x.type.dtype.is_float:
        return x if x.type.dtype.is_bool else c.b("sign", x)
    return c.b("sub", c.cast(c.b("gt", x, 0), c.dtype), c.cast(c.b("lt", x, 0), c.dtype))


@lowers("isnan.default", "isinf.default")
def _test(c: Context, x: Value) -> Value:
    return c.b(c.target.split(".")[1], x) if x.type.dtype.is_float else c.full(False, x.type.shape, DType.BOOL)


@lowers("logical_not.default")
def _not(c: Context, x: Value) -> Value:
    return c.b("logical_not", c.cast(x, DType.BOOL))


@lowers("bitwise_not.default")
def _bitwise_not(c: Context, x: Value) -> Value:
    return c.b("logical_not", x) if x.type.dtype.is_bool else c.b("sub", c.b("neg", x), 1)


@lowers("reciprocal.default")
def _reciprocal(c: Context, x: Value) -> Value:
    return c.b("div", c.number(1, c.dtype), c.cast(x, c.dtype))


@lowers("log2.default", "log10.default")
def _log(c: Context, x: Value) -> Value:
    # In float64, so that powers of the base come out as whole numbers.
    base = 2.0 if "log2" in c.target else 10.0
    wide = c.b("div", c.b("log", c.cast(x, DType.F64)), math.log(base))
    return c.cast(wide, c.dtype)


@lowers("exp2.default")
def _exp2(c: Context, x: Value) -> Value:
    return c.b("pow", c.number(2, c.dtype), c.cast(x, c.dtype))


@lowers("sinh.default", "cosh.default")
def _hyperbolic(c: Context, x: Value) -> Value:
    x = c.cast(x, c.wide)
    # exp(x / 2) squared step by step does not overflow before the result does.
    half = c.b("exp", c.b("mul", x, 0.5))
    up, down = c.b("mul", c.b("mul", half, 0.5), half), c.b("div", c.b("div", c.number(0.5, c.wide), half), half)
    if "cosh" in c.target:
        return c.cast(c.b("add", up, down), c.dtype)
    t = c.b("expm1", x)  # accurate near 0, where up and down cancel
    small = c.b("mul", c.b("add", t, c.b("div", t, c.b("add", t, 1))), 0.5)
    return c.cast(c.b("where", c.b("lt", c.b("abs", x), 1), small, c.b("sub", up, down)), c.dtype)


@lowers("asin.default", "acos.default")
def _arc(c: Context, x: Value) -> Value:
    x = c.cast(x, c.wide)
    other = c.b("sqrt", c.b("mul", c.b("sub", c.number(1, c.wide), x), c.b("add", x, 1)))
    return c.cast(c.b("atan2", x, other) if "asin" in c.target else c.b("atan2", other, x), c.dtype)


@lowers("asinh.default")
def _asinh(c: Context, x: Value) -> Value:
    x = c.cast(x, c.wide)
    size = c.b("abs", x)
    # log1p(a + a^2 / (1 + sqrt(1 + a^2))) is accurate near 0; where the square overflows, log(2 a) is.
    square = c.b("mul", size, size)
    near = c.b("add", size, c.b("div", square, c.b("add", c.b("sqrt", c.b("add", square, 1)), 1)))
    far = c.b("add", c.b("log", size), math.log(2))
    result = c.b("where", c.b("gt", size, 1e4), far, c.b("log1p", near))
    return c.cast(c.b("where", c.b("lt", x, 0), c.b("neg", result), result), c.dtype)


@lowers("acosh.default")
def _acosh(c: Context, x: Value) -> Value:
    x = c.cast(x, c.wide)
    above = c.b("sub", x, 1)
    near = c.b("log1p", c.b("add", above, c.b("sqrt", c.b("mul", above, c.b("add", x, 1)))))
    result = c.b("where", c.b("gt", x, 1e4), c.b("add", c.b("log", x), math.log(2)), near)
    # Far below 1, where there is none, rounding would leave a logarithm of 0 or more.
    return c.cast(c.b("where", c.b("lt", x, 1), c.number(math.nan, x.type.dtype), result), c.dtype)


@lowers("atanh.default")
def _atanh(c: Context, x: Value) -> Value:
    x = c.cast(x, c.wide)
    ratio = c.b("div", c.b("mul", x, 2), c.b("sub", c.number(1, c.wide), x))
    return c.cast(c.b("mul", c.b("log1p", ratio), 0.5), c.dtype)


@lowers("gelu.default")
def _gelu(c: Context, x: Value, approximate: str = "none") -> Value:
    return c.b("gelu", x, approximate=approximate)


@lowers("elu.default")
def _elu(c: Context, x: Value, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1) -> Value:
    if alpha == scale == input_scale == 1:  # one step
        return c.b("where", c.b("gt", x, 0), x, c.b("expm1", x))
    x = c.cast(x, c.wide)
    below = c.b("mul", c.b("expm1", c.b("mul", x, input_scale) if input_scale != 1 else x), alpha * scale)
    above = c.b("mul", x, scale) if scale != 1 else x
    return c.cast(c.b("where", c.b("gt", x, 0), above, below), c.dtype)


@lowers("celu.default")
def _celu(c: Context, x: Value, alpha: Number = 1) -> Value:
    return _elu(c, x, alpha, 1, 1 / alpha)


@lowers("selu.default")
def _selu(c: Context, x: Value) -> Value:
    return _elu(c, x, 1.6732632423543772, 1.0507009873554805)


@lowers("leaky_relu.default")
def _leaky_relu(c: Context, x: Value, negative_slope: Number = 0.01) -> Value:
    return c.b("where", c.b("gt", x, 0), x, _by_scalar(c, "mul", x, negative_slope))


@lowers("clamp.default", "hardtanh.default", "clamp_min.default", "clamp_max.default")
def _clamp(c: Context, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    if "hardtanh" in c.target:
        min, max = -1 if min is None else min, 1 if max is None else max
    if "clamp_max" in c.target:
        min, max = None, min
    return _between(c, x, min, max)


@lowers("clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor")
def _clamp_tensor(c: Context, x: Value, min: Value | None = None, max: Value | None = None) -> Value:
    return _between(c, x, None, min) if "clamp_max" in c.target else _between(c, x, min, max)


def _between(c: Context, x: Value, low: Operand | None, high: Operand | None) -> Value:
    x = c.cast(x, c.dtype)
    if c.dtype.is_float and not isinstance(low, (Value, SymDim)) and not isinstance(high, (Value, SymDim)):
        if low == 0 and high is None:
            return c.b("relu", x)
        bounds = {"lo": low, "hi": high}
        attrs: dict[str, Any] = {name: float(bound) for name, bound in bounds.items() if bound is not None}
        return c.b("clip", x, **attrs)
    if low is not None:
        x = c.b("maximum", x, c.operand(low, c.dtype))
    return x if high is None else c.b("minimum", x, c.operand(high, c.dtype))


# -- two operands ----------------------------------------------------------------------------------------------------


# Of a tensor of 16 bits and a scalar, torch on CPUs computes in float32 and rounds the result once. The scalar is one of 16 bits
# before that (in float16, 1e6 is infinite), except on the right of a product or a quotient: there it is one of float32.


def _by_scalar(c: Context, op: str, x: Operand, y: Operand) -> Value:
    """A product or a quotient."""
    dtype = c.dtype if c.fits(y) else c.wide
    return c.cast(c.b(op, c.rounded(x, dtype), c.operand(y, dtype)), c.dtype)


def _scaled(c: Context, x: Operand, alpha: Number | Dim) -> Operand:
    """``x * alpha`` in the dtype of the result."""
    return x if alpha == 1 else c.b("mul", c.operand(x, c.dtype), c.number(alpha, c.dtype))


def _with_scaled(c: Context, op: str, x: Operand, y: Operand, alpha: Number | Dim) -> Value:
    """``x + alpha * y``, or with minus, in one rounding (torch: all but the last elements, which do not fill a vector)."""
    if alpha == 1:
        return c.b(op, c.operand(x, c.dtype), c.operand(y, c.dtype))
    product = c.b("mul", c.rounded(y, c.wide), c.rounded(alpha, c.wide))
    return c.cast(c.b(op, c.rounded(x, c.wide), product), c.dtype)


@lowers("add.Tensor", "add.Scalar")
def _add(c: Context, x: Value, y: Operand, alpha: Number = 1) -> Value:
    if c.dtype.is_bool:
        return c.b("logical_or", x, c.operand(y, DType.BOOL))
    return _with_scaled(c, "add", x, y, alpha)


@lowers("sub.Tensor", "sub.Scalar")
def _sub(c: Context, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _with_scaled(c, "sub", x, y, alpha)


@lowers("rsub.Tensor", "rsub.Scalar")
def _rsub(c: Context, x: Value, y: Operand, alpha: Number = 1) -> Value:
    return _sub(c, y, x, alpha)


@lowers("mul.Tensor", "mul.Scalar")
def _mul(c: Context, x: Value, y: Operand) -> Value:
    return _by_scalar(c, "logical_and" if c.dtype.is_bool else "mul", x, y)


@lowers("div.Tensor", "div.Scalar")
def _div(c: Context, x: Value, y: Operand) -> Value:
    return _by_scalar(c, "div", x, y)


@lowers("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(c: Context, x: Value, y: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return _div(c, x, y)
    if rounding_mode == "floor":
        return _by_scalar(c, "floordiv", x, y)
    if c.dtype.is_float:
        if isinstance(y, Value) and y.type.rank:
            return c.b("trunc", _div(c, x, y))
        return c.cast(c.b("trunc", c.b("div", c.rounded(x, c.wide), c.operand(y, c.wide))), c.dtype)
    a, b = c.operand(x, c.dtype), c.operand(y, c.dtype)
    if c.dtype is DType.U8:
        return c.b("floordiv", a, b)
    sign = c.b("mul", c.b("sign", a), c.b("sign", b))
    return c.b("mul", c.b("floordiv", c.b("abs", a), c.b("abs", b)), sign)


@lowers("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(c: Context, x: Value, y: Operand) -> Value:
    return _div_mode(c, x, y, "floor")


@lowers("remainder.Tensor", "remainder.Scalar")
def _remainder(c: Context, x: Value, y: Operand) -> Value:
    return c.b("mod", c.operand(x, c.dtype), c.operand(y, c.dtype))


@lowers("fmod.Tensor", "fmod.Scalar")
def _fmod(c: Context, x: Value, y: Operand) -> Value:
    a, b = c.operand(x, c.dtype), c.operand(y, c.dtype)
    if c.dtype is DType.U8:
        return c.b("mod", a, b)
    magnitude = c.b("mod", c.b("abs", a), c.b("abs", b))
    return c.b("where", c.b("lt", a, 0), c.b("neg", magnitude), magnitude)


@lowers("maximum.default", "minimum.default")
def _extremum(c: Context, x: Value, y: Value) -> Value:
    op = c.target.split(".")[1]
    if c.dtype.is_bool:
        return c.b("logical_or" if op == "maximum" else "logical_and", x, y)
    return c.b(op, c.cast(x, c.dtype), c.cast(y, c.dtype))


@lowers("fmax.default", "fmin.default")
def _extremum_of_numbers(c: Context, x: Value, y: Value) -> Value:
    """A NaN loses against any number."""
    x, y = c.cast(x, c.dtype), c.cast(y, c.dtype)
    result = c.b("maximum" if "fmax" in c.target else "minimum", x, y)
    if not c.dtype.is_float:
        return result
    return c.b("where", c.b("isnan", x), y, c.b("where", c.b("isnan", y), x, result))


@lowers("atan2.default")
def _atan2(c: Context, x: Value, y: Value) -> Value:
    return c.b("atan2", c.cast(x, c.dtype), c.cast(y, c.dtype))


@lowers("hypot.default")
def _hypot(c: Context, x: Value, y: Value) -> Value:
    return c.b("hypot", c.cast(x, c.dtype), c.cast(y, c.dtype))


@lowers("pow.Tensor_Tensor", "pow.Scalar")
def _pow(c: Context, x: Operand, y: Operand) -> Value:
    if not c.dtype.is_float:
        raise c.unsupported(
            "integer powers of integers are supported for a fixed exponent only", "make one operand a float"
        )
    return c.b("pow", c.operand(x, c.dtype), c.operand(y, c.dtype))


@lowers("pow.Tensor_Scalar")
def _pow_scalar(c: Context, x: Value, exponent: Number) -> Value:
    x = c.cast(x, c.dtype)
    if c.dtype is DType.F16 and exponent in (3, -2):  # of float16, torch takes these in one step as well
        return c.cast(_power(c, c.cast(x, c.wide), exponent), c.dtype)
    return _power(c, x, exponent)


def _power(c: Context, x: Value, exponent: Number) -> Value:
    """A power in the dtype of x, with the same special cases as torch's, for the same results."""
    dtype = x.type.dtype
    whole = float(exponent).is_integer()
    if exponent == 0:
        return c.full(1, x.type.shape, dtype)
    if (whole and 1 <= exponent <= 3) or (whole and exponent > 0 and not dtype.is_float):
        result = x
        for _ in range(int(exponent) - 1):
            result = c.b("mul", result, x)
        return result
    if not dtype.is_float:
        raise c.unsupported(f"an integer to the power of {exponent}", "cast to a float first")
    if exponent == 0.5:
        return c.b("sqrt", x)
    if exponent == -0.5:
        return c.b("rsqrt", x)
    if exponent in (-1, -2):
        return c.b("div", c.number(1, dtype), x if exponent == -1 else c.b("mul", x, x))
    return c.b("pow", x, exponent)


def _compare(op: str) -> Callable[..., Value]:
    def handler(c: Context, x: Value, y: Operand) -> Value:
        a, b = c.promoted(x, y)
        if a.type.dtype.is_bool and op not in ("eq", "ne"):
            a, b = c.cast(a, DType.U8), c.cast(b, DType.U8)
        return c.b(op, a, b)

    return handler


for _form in ("Tensor", "Scalar"):
    _table({f"{op}.{_form}": op for op in ("eq", "ne", "lt", "le", "gt", "ge")}, _compare)


def _logical(op: str) -> Callable[..., Value]:
    def handler(c: Context, x: Operand, y: Operand) -> Value:
        if "logical" in c.target or c.dtype.is_bool:
            return c.b(f"logical_{op}", c.operand(x, DType.BOOL), c.operand(y, DType.BOOL))
        return c.b(f"bitwise_{op}", c.operand(x, c.dtype), c.operand(y, c.dtype))

    return handler


for _word in ("and", "or", "xor"):
    _forms = (
        f"logical_{_word}.default",
        *(f"bitwise_{_word}.{kind}" for kind in ("Tensor", "Scalar", "Scalar_Tensor")),
        *(f"__{_word}__.{kind}" for kind in ("Tensor", "Scalar")),
    )
    _table(dict.fromkeys(_forms, _word), _logical)


def _shift(op: str) -> Callable[..., Value]:
    return lambda c, x, y: c.b(op, c.operand(x, c.dtype), c.operand(y, c.dtype))


for _word in ("left", "right"):
    _forms = (
        *(f"bitwise_{_word}_shift.{kind}" for kind in ("Tensor", "Tensor_Scalar", "Scalar_Tensor")),
        *(f"__{_word[0]}shift__.{kind}" for kind in ("Tensor", "Scalar")),
    )
    _table(dict.fromkeys(_forms, f"{_word}_shift"), _shift)


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(c: Context, condition: Value, x: Operand, y: Operand) -> Value:
    return c.b("where", c.cast(condition, DType.BOOL), c.operand(x, c.dtype), c.operand(y, c.dtype))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(c: Context, x: Value, mask: Value, value: Operand) -> Value:
    return c.b("where", mask, c.operand(value, c.dtype), x)


# -- the same elements -----------------------------------------------------------------------------------------------


@lowers(
    "clone.default",
    "alias.default",
    "detach.default",
    "contiguous.default",
    "lift_fresh_copy.default",
    "positive.default",
)
def _same(c: Context, x: Value, **memory_format: Any) -> Value:
    return x


@lowers("_to_copy.default", "to.dtype", "to.dtype_layout", "to.device", "to.other", "copy.default", "type_as.default")
def _to(c: Context, x: Value, *settings: Any, **more: Any) -> Value:
    if c.target == "aten.copy.default":  # copy(destination, source)
        return c.broadcast(c.cast(settings[0], c.dtype), c.shape)
    return c.cast(x, c.dtype)


@lowers(
    "dropout.default",
    "native_dropout.default",
    "alpha_dropout.default",
    "feature_dropout.default",
    "feature_alpha_dropout.default",
)
def _dropout(c: Context, x: Value, p: float, train: bool | None) -> Value | tuple[Value, None]:
    if train and p > 0:
        raise c.unsupported(
            "dropout is active", "call model.eval() before torch.export, and pass training=self.training to F.dropout"
        )
    return (x, None) if "native" in c.target else x


# -- reductions ------------------------------------------------------------------------------------------------------


@lowers("sum.dim_IntList", "sum.default", "mean.dim", "mean.default", "prod.default", "prod.dim_int")
def _sum(c: Context, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    axes = [dim] if isinstance(dim, int) else dim
    return c.reduce(c.target.split(".")[1], c.cast(x, c.dtype), axes, keepdim)


@lowers("amax.default", "amin.default")
def _amax(c: Context, x: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    if x.type.dtype.is_bool:
        return c.reduce("any" if "amax" in c.target else "all", x, dim, keepdim)
    return c.reduce("max" if "amax" in c.target else "min", x, dim, keepdim)


@lowers("max.default", "min.default")
def _max(c: Context, x: Value) -> Value:
    return c.reduce(c.target.split(".")[1], x, None, False)


@lowers("max.dim", "min.dim")
def _max_dim(c: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    name = c.target.split(".")[1]
    if not x.type.rank:
        return x, c.number(0, DType.I64)
    return c.reduce(name, x, [dim], keepdim), c.b(f"arg{name}", x, axis=dim, keepdims=keepdim)


@lowers("argmax.default", "argmin.default")
def _argmax(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    name = c.target.split(".")[1]
    if dim is None:
        return c.reshape(c.b(name, c.reshape(x, (x.type.size,)), axis=0, keepdims=False), c.shape)
    return c.b(name, x, axis=dim, keepdims=keepdim) if x.type.rank else c.number(0, DType.I64)


@lowers("any.default", "any.dim", "any.dims", "all.default", "all.dim", "all.dims")
def _any(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    axes = [dim] if isinstance(dim, int) else dim
    return c.cast(c.reduce(c.target.split(".")[1], c.cast(x, DType.BOOL), axes, keepdim), c.dtype)


@lowers("logsumexp.default")
def _logsumexp(c: Context, x: Value, dim: Sequence[int], keepdim: bool = False) -> Value:
    return c.reduce("logsumexp", c.cast(x, c.dtype), dim, keepdim)


@lowers("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def _var(c: Context, x: Value, dim: Any = None, correction: Number | None = 1, keepdim: bool = False) -> Any:
    axes = [dim] if isinstance(dim, int) else list(dim or range(x.type.rank))
    x = c.cast(x, c.wide)
    centre = c.reduce("mean", x, axes, True)
    difference = c.b("sub", x, centre)
    total = c.reduce("sum", c.b("mul", difference, difference), axes, keepdim)
    count: Dim = 1
    for axis in axes:
        count = count * x.type.shape[axis]
    free = c.number(count, c.wide)
    if correction != 0:
        free = c.b("maximum", c.b("sub", free, 1 if correction is None else correction), 0)
    variance = c.b("div", total, free)
    if "std" in c.target:
        variance = c.b("sqrt", variance)
    variance, centre = c.cast(variance, c.dtype), c.cast(centre, c.dtype)
    return (variance, c.reshape(centre, variance.type.shape)) if "mean" in c.target else variance


@lowers("linalg_vector_norm.default")
def _vector_norm(
    c: Context, x: Value, ord: Number = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    return c.cast(_norm(c, c.rounded(x, c.wide), ord, [dim] if isinstance(dim, int) else dim, keepdim), c.dtype)


def _norm(c: Context, x: Value, ord: Number, axes: Sequence[int] | None, keepdim: bool) -> Value:
    """The p-norm of vectors, with ``ord`` for p, in the dtype of x."""
    if ord in (math.inf, -math.inf):
        return c.reduce("max" if ord > 0 else "min", c.b("abs", x), axes, keepdim)
    if ord == 0:
        return c.reduce("sum", c.cast(c.b("ne", x, 0), x.type.dtype), axes, keepdim)
    total = c.reduce("sum", _power(c, x if ord % 2 == 0 else c.b("abs", x), ord), axes, keepdim)
    return total if ord == 1 else _power(c, total, 1 / ord)


@lowers("cosine_similarity.default")
def _cosine_similarity(c: Context, x: Value, y: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    shape = broadcast_shapes(x.type.shape, y.type.shape)
    units = []
    for side in (x, y):
        side = c.broadcast(c.cast(side, c.dtype), shape)
        length = c.cast(_norm(c, c.cast(side, c.wide), 2, [dim], True), c.dtype)
        units.append(c.b("div", side, _between(c, length, eps, None)))
    return c.reduce("sum", c.b("mul", *units), [dim], False)


@lowers("cumsum.default")
def _cumsum(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    return c.b("cumsum", c.cast(x, c.dtype), axis=dim) if x.type.rank else c.cast(x, c.dtype)


@lowers("cumprod.default")
def _cumprod(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    return _scanned(c, c.cast(x, c.dtype), dim, "mul", 1)


@lowers("cummax.default", "cummin.default")
def _cummax(c: Context, x: Value, dim: int) -> tuple[Value, None]:
    largest = "cummax" in c.target
    return _scanned(c, x, dim, "maximum" if largest else "minimum", -math.inf if largest else math.inf), None


def _scanned(c: Context, x: Value, dim: int, op: str, neutral: Number) -> Value:
    """Each element with all before it, in steps that double how many are taken in."""
    if not x.type.rank:
        return x
    if not x.type.dtype.is_float:
        raise c.unsupported(f"needs floats, got {x.type}", "cast to a float first")
    axis = dim % x.type.rank
    extent = c.static(x, axis, "the scanned axis")
    shift = 1
    while shift < extent:
        before = c.full(neutral, (*x.type.shape[:axis], shift, *x.type.shape[axis + 1 :]), x.type.dtype)
        x = c.b(op, x, c.b("concat", before, c.take(x, axis, 0, extent - shift), axis=axis))
        shift *= 2
    return x


@lowers("searchsorted.Tensor", "searchsorted.Scalar")
def _searchsorted(
    c: Context, boundaries: Value, values: Operand, *, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: Value | None = None,
) -> Value:  # fmt: skip
    """The number of boundaries that lie before a value: one comparison for each pair of both."""
    if sorter is not None:
        raise c.unsupported("a sorter", "sort the boundaries first: boundaries.gather(-1, sorter)")
    boundaries, found = c.promoted(boundaries, values)
    shape = found.type.shape
    if boundaries.type.rank > 1:  # a row of boundaries for each row of values
        boundaries = c.reshape(boundaries, (*boundaries.type.shape[:-1], 1, boundaries.type.shape[-1]))
    beyond = c.b("gt" if right or side == "right" else "ge", boundaries, c.reshape(found, (*shape, 1)))
    before = c.b("cast", c.b("logical_not", beyond), dtype=c.dtype)  # of NaN, all boundaries, as in torch
    return c.b("sum", before, axes=(-1,))


@lowers("bucketize.Tensor", "bucketize.Scalar")
def _bucketize(
    c: Context, values: Operand, boundaries: Value, *, out_int32: bool = False, right: bool = False
) -> Value:
    return _searchsorted(c, boundaries, values, right=right)


@lowers("topk.default")
def _topk(c: Context, x: Value, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, ...]:
    if not isinstance(k, int):
        raise c.unsupported(f"k must be fixed, but it is {k}")
    return c.b.multi("topk", x, k=k, axis=dim, largest=largest)


@lowers("sort.default", "sort.stable")
def _sort(c: Context, x: Value, *settings: Any, **named: Any) -> tuple[Value, ...]:
    names = ("stable", "dim", "descending") if c.target == "aten.sort.stable" else ("dim", "descending")
    given = {**dict(zip(names, settings, strict=False)), **named}
    return c.b.multi("sort", x, axis=given.get("dim", -1), descending=given.get("descending", False))


@lowers("median.dim")
def _median(c: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    """Of an even number of values the lower one; the first NaN if there is one."""
    if not x.type.rank:
        return x, c.number(0, DType.I64)
    extent = c.static(x, dim, "the axis of the median")
    found = _ranked(c, x, (extent + 1) // 2, dim)
    if not x.type.dtype.is_float:
        return found
    empty = c.b("isnan", x)
    first = c.b("argmax", c.cast(empty, DType.U8), axis=dim, keepdims=True)
    any_empty = c.reshape(c.b("any", empty, axes=(dim,)), c.shape)
    value = c.b("where", any_empty, c.number(math.nan, x.type.dtype), found[0])
    return value, c.b("where", any_empty, c.reshape(first, c.shape), found[1])


@lowers("kthvalue.default")
def _kth_value(c: Context, x: Value, k: Dim, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    if not isinstance(k, int):
        raise c.unsupported(f"k must be fixed, but it is {k}")
    return _ranked(c, x, k, dim) if x.type.rank else (x, c.number(0, DType.I64))


def _ranked(c: Context, x: Value, k: int, dim: int) -> tuple[Value, Value]:
    """The k-th smallest value along an axis, and its position."""
    values, positions = c.b.multi("sort", x, axis=dim, descending=False)
    return c.reshape(c.take(values, dim, k - 1, k), c.shape), c.reshape(c.take(positions, dim, k - 1, k), c.shape)


# -- matrix products -------------------------------------------------------------------------------------------------


@lowers("mm.default", "bmm.default")
def _mm(c: Context, x: Value, y: Value) -> Value:
    return c.b("matmul", x, y)


@lowers("matmul.default", "mv.default", "dot.default")
def _matmul(c: Context, x: Value, y: Value) -> Value:
    """A vector is a row on the left and a column on the right; its axis is dropped from the result."""
    if x.type.rank == 1:
        x = c.reshape(x, (1, *x.type.shape))
    if y.type.rank == 1:
        y = c.reshape(y, (*y.type.shape, 1))
    return c.reshape(c.b("matmul", x, y), c.shape)


@lowers("addmm.default", "baddbmm.default", "addmv.default")
def _addmm(c: Context, added: Value, x: Value, y: Value, beta: Number = 1, alpha: Number = 1) -> Value:
    result = c.operand(_scaled(c, _matmul(c, x, y), alpha), c.dtype)
    # beta = 0 ignores what would be added, even a NaN.
    return (
        result if beta == 0 else c.broadcast(c.b("add", result, c.operand(_scaled(c, added, beta), c.dtype)), c.shape)
    )


@lowers("linear.default")
def _linear(c: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.type.rank == 1:
        result = _matmul(c, x, weight)
    else:
        rows = c.reshape(x, (1, *x.type.shape)) if x.type.rank == 1 else x
        result = c.reshape(c.b("matmul", rows, c.transpose(weight, (1, 0))), c.shape)
    return result if bias is None else c.b("add", result, bias)


@lowers("bilinear.default")
def _bilinear(c: Context, x: Value, y: Value, weight: Value, bias: Value | None = None) -> Value:
    outputs, left, right = weight.type.shape
    by_row = c.reshape(c.transpose(weight, (1, 0, 2)), (left, outputs * right))
    partial = c.reshape(c.b("matmul", x, by_row), (*x.type.shape[:-1], outputs, right))
    product = c.b("mul", partial, c.reshape(y, (*y.type.shape[:-1], 1, right)))
    result = c.b("sum", product, axes=(-1,))
    return result if bias is None else c.b("add", result, bias)


@lowers("_cdist_forward.default")
def _cdist(c: Context, x: Value, y: Value, p: float, compute_mode: int | None = None) -> Value:
    if p == 0:
        raise c.unsupported("p = 0 (the count of differing features)")
    if x.type.rank == 2 and y.type.rank == 2:
        metric = {1.0: "manhattan", 2.0: "euclidean", math.inf: "chebyshev"}.get(p, "minkowski")
        return c.b("pairwise_distance", x, y, metric=metric, p=p)
    rows = c.reshape(x, (*x.type.shape[:-1], 1, x.type.shape[-1]))
    columns = c.reshape(y, (*y.type.shape[:-2], 1, *y.type.shape[-2:]))
    apart = c.b("abs", c.b("sub", rows, columns))
    if p == math.inf:
        return c.b("max", apart, axes=(-1,))
    if p == 1:
        return c.b("sum", apart, axes=(-1,))
    if p == 2:
        return c.b("sqrt", c.b("sum", c.b("mul", apart, apart), axes=(-1,)))
    return c.b("pow", c.b("sum", c.b("pow", apart, p), axes=(-1,)), 1 / p)


# -- made from nothing -----------------------------------------------------------------------------------------------


@lowers("full.default", "full_like.default", "new_full.default", "scalar_tensor.default")
def _full(c: Context, *args: Any, fill_value: Any = None, **settings: Any) -> Value:
    if fill_value is None:
        fill_value = args[0] if "scalar_tensor" in c.target else args[2] if "new_full" in c.target else args[1]
    return c.full(fill_value, c.shape, c.dtype)


_ZEROS = ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty")


@lowers(*(f"{n}.default" for n in _ZEROS if n != "empty"), "empty.memory_format")
def _zeros(c: Context, *args: Any, **settings: Any) -> Value:
    return c.full(0, c.shape, c.dtype)


@lowers("ones.default", "ones_like.default", "new_ones.default")
def _ones(c: Context, *args: Any, **settings: Any) -> Value:
    return c.full(1, c.shape, c.dtype)


@lowers("arange.start_step", "arange.default", "arange.start")
def _arange(c: Context, *bounds: Any, **settings: Any) -> Value:
    start: Any = bounds[0] if len(bounds) > 1 else 0
    step: Any = bounds[2] if len(bounds) > 2 else 1
    if c.wide is not c.dtype and all(isinstance(bound, (int, float)) for bound in bounds):
        # Of 16 bits torch rounds sums of sums, and where depends on the width of its vectors.
        return c.b.constant(to_numpy(torch.arange(*bounds, dtype=TORCH_DTYPES[c.dtype])))
    # torch computes start + i * step in double precision and rounds once.
    wide = DType.F64 if c.dtype.is_float else DType.I64
    line = c.b("iota", shape=c.shape, dtype=wide)
    if step != 1:
        line = c.b("mul", line, c.number(step, wide))
    if start != 0:
        line = c.b("add", line, c.number(start, wide))
    return c.cast(line, c.dtype)

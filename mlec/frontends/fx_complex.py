"""ATen ops on complex tensors. The graph has real tensors only: while a program is lowered, a complex one is a pair of these.

`COMPLEX` is the table for calls that take or give a complex tensor, as `HANDLERS` is for all others. An op that does the same to
real and imaginary part (`_PARTWISE`) is the real op on each. Every other op has a rule here, or is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mlec.frontends import fx_nn, fx_ops, fx_shape  # noqa: F401  (they fill HANDLERS)
from mlec.frontends.fx_context import HANDLERS, Context, Number, Operand, Results, dtype_of, lowers
from mlec.ir import DType, Value
from mlec.ir.dim import product

PART_TYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""Element types of complex tensors, and those of their parts."""


def part_dtype(dtype: torch.dtype) -> DType:
    """The IR's dtype of a tensor's elements, of complex ones that of their parts."""
    return dtype_of(PART_TYPES.get(dtype, dtype))


def parts_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensor itself, or the parts of a complex one."""
    return torch.view_as_real(tensor.resolve_conj()).unbind(-1) if tensor.is_complex() else (tensor,)


@dataclass(frozen=True)
class Complex:
    """A complex tensor.

    Attributes:
        re: real part.
        im: imaginary part, of the same type; None where it is zero, of what was real.
    """

    re: Value
    im: Value | None = None

    @property
    def parts(self) -> tuple[Value, ...]:
        return (self.re,) if self.im is None else (self.re, self.im)


Result = Value | Complex | Sequence[Complex]
Rule = Callable[..., Result]
_RuleT = TypeVar("_RuleT", bound=Rule)
COMPLEX: dict[str, Rule] = {}
"""ATen op to its rule: ``rule(context, *args, **kwargs)``. Complex tensors arrive as `Complex`, everything else as in `HANDLERS`.

The types in ``context.results`` are those of the parts; ``context.is_complex`` tells whether the result is complex.
"""


def complex_rule(*names: str) -> Callable[[_RuleT], _RuleT]:
    """Enters a function into `COMPLEX` under some ATen names, written without the ``aten.``."""

    def enter(rule: _RuleT) -> _RuleT:
        for name in names:
            assert f"aten.{name}" not in COMPLEX, name
            COMPLEX[f"aten.{name}"] = rule
        return rule

    return enter


def is_complex(meta: Any) -> bool:
    """Whether what torch states of a node is a complex tensor, or several values with such a tensor among them."""
    parts = meta if isinstance(meta, (tuple, list)) else (meta,)
    return any(isinstance(part, torch.Tensor) and part.is_complex() for part in parts)


def takes_complex(node: torch.fx.Node) -> bool:
    """Whether any operand or result of a call is complex."""
    return any(is_complex(n.meta.get("val")) for n in (node, *node.all_input_nodes))


# -- operands --------------------------------------------------------------------------------------------------------

Scalar = Number | complex


def as_complex(c: Context, x: Complex | Operand | complex, dtype: DType | None = None) -> tuple[Value, Value]:
    """Both parts of an operand; without a type in that of the result's."""
    dtype = dtype or c.dtype
    if isinstance(x, Complex):
        im = c.full(0, x.re.type.shape, dtype) if x.im is None else c.cast(x.im, dtype)
        return c.cast(x.re, dtype), im
    if isinstance(x, complex):
        return c.number(x.real, dtype), c.number(x.imag, dtype)
    re = c.operand(x, dtype)
    return re, c.full(0, re.type.shape, dtype)


def _pair(re: Results, im: Results) -> Complex:
    """What a handler gave for each part, of one result each."""
    assert isinstance(re, Value)
    assert isinstance(im, Value)
    return Complex(re, im)


# -- the same on both parts ------------------------------------------------------------------------------------------

_PARTWISE = """
view.default _unsafe_view.default reshape.default view_copy.default squeeze.default squeeze.dim squeeze.dims unsqueeze.default
flatten.using_ints unflatten.int permute.default transpose.int t.default expand.default expand_as.default broadcast_to.default flip.default
slice.Tensor slice_copy.Tensor select.int select_copy.int split.Tensor split_with_sizes.default split.sizes chunk.default
tensor_split.sections split_copy.Tensor split_with_sizes_copy.default unbind.int unbind_copy.int unfold.default repeat.default tile.default
repeat_interleave.self_int roll.default reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default
replication_pad1d.default replication_pad2d.default replication_pad3d.default tril.default triu.default index_select.default index.Tensor
_unsafe_index.Tensor gather.default diagonal.default diagonal_copy.default clone.default alias.default detach.default contiguous.default
lift_fresh_copy.default positive.default dropout.default neg.default sum.dim_IntList sum.default mean.dim mean.default cumsum.default
"""
"""Linear ops of one tensor: what they make of zero is zero."""

_TOGETHER = """
add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar cat.default stack.default where.self where.ScalarOther where.ScalarSelf
where.Scalar masked_fill.Scalar masked_fill.Tensor slice_scatter.default select_scatter.default index_put.default
"""
"""Linear ops of several tensors or numbers, of which some may be real."""

_OTHERS = {
    "where": (0,), "masked_fill": (1,), "index_put": (1, 3), "slice_scatter": (2, 3, 4, 5), "select_scatter": (2, 3),
    "add": (2,), "sub": (2,), "rsub": (2,), "cat": (1,), "stack": (1,),
}  # fmt: skip
"""Their arguments that are no elements: conditions, places, sizes, a real factor."""


def _partwise(name: str) -> Rule:
    handler = HANDLERS[f"aten.{name}"]

    def rule(c: Context, x: Complex, *args: Any, **kwargs: Any) -> Result:
        found = [handler(c, part, *args, **kwargs) for part in x.parts]
        if isinstance(found[0], Value):
            return Complex(*found)  # type: ignore[arg-type]
        return [Complex(*parts) for parts in zip(*found, strict=True)]

    return rule


def _together(name: str) -> Rule:
    handler, others = HANDLERS[f"aten.{name}"], _OTHERS[name.split(".")[0]]

    def part(c: Context, place: int, i: int, x: Any) -> Any:
        if i in others:
            return x
        if isinstance(x, (list, tuple)):
            return [part(c, place, i, entry) for entry in x]
        return as_complex(c, x)[place]

    def rule(c: Context, *args: Any, **kwargs: Any) -> Result:
        re, im = (handler(c, *(part(c, place, i, x) for i, x in enumerate(args)), **kwargs) for place in (0, 1))
        return _pair(re, im)

    return rule


for _name in _PARTWISE.split():
    complex_rule(_name)(_partwise(_name))
for _name in _TOGETHER.split():
    complex_rule(_name)(_together(_name))


# -- parts -----------------------------------------------------------------------------------------------------------


@complex_rule("complex.default")
def _complex(c: Context, re: Value, im: Value) -> Complex:
    return Complex(c.broadcast(re, c.shape), c.broadcast(im, c.shape))


@complex_rule("polar.default")
def _polar(c: Context, size: Value, angle: Value) -> Complex:
    re, im = (c.b("mul", size, c.b(turn, angle)) for turn in ("cos", "sin"))
    return Complex(re, im)


@complex_rule("view_as_complex.default")
def _view_as_complex(c: Context, x: Value) -> Complex:
    return Complex(c.pick(x, -1, 0), c.pick(x, -1, 1))


@complex_rule("view_as_real.default")
def _view_as_real(c: Context, x: Complex) -> Value:
    parts = [c.reshape(part, (*part.type.shape, 1)) for part in as_complex(c, x)]
    return c.b("concat", *parts, axis=-1)


@complex_rule("real.default")
def _real(c: Context, x: Complex) -> Value:
    return x.re


@complex_rule("imag.default")
def _imag(c: Context, x: Complex) -> Value:
    return as_complex(c, x)[1]


@complex_rule(
    "conj.default", "_conj.default", "_conj_physical.default", "conj_physical.default",
)  # fmt: skip
def _conj(c: Context, x: Complex) -> Complex:
    return Complex(x.re, None if x.im is None else c.b("neg", x.im))


@complex_rule("resolve_conj.default", "resolve_neg.default")
def _resolved(c: Context, x: Complex) -> Complex:
    return x


@complex_rule("abs.default")
def _abs(c: Context, x: Complex) -> Value:
    return c.b("abs", x.re) if x.im is None else c.b("hypot", x.re, x.im)


@complex_rule("angle.default")
def _angle(c: Context, x: Complex) -> Value:
    re, im = as_complex(c, x)
    return c.b("atan2", im, re)


@complex_rule("_to_copy.default", "to.dtype", "copy.default")
def _to(c: Context, x: Value | Complex, *settings: Any, **more: Any) -> Value | Complex:
    """Of complex numbers, real ones are the real parts."""
    if c.target == "aten.copy.default":  # copy(destination, source)
        x = settings[0]
    if c.dtype.is_bool:
        raise c.unsupported("complex numbers as bool", "compare the absolute value with 0")
    parts = [c.broadcast(c.cast(part, c.dtype), c.shape) for part in (x.parts if isinstance(x, Complex) else (x,))]
    return Complex(*parts) if c.is_complex else parts[0]


# -- made from nothing -----------------------------------------------------------------------------------------------


def _made(name: str) -> Rule:
    handler = HANDLERS[name]

    def rule(c: Context, *args: Any, **kwargs: Any) -> Value | Complex:
        value = handler(c)
        assert isinstance(value, Value)
        return Complex(value) if c.is_complex else value

    return rule


for _name in (
    *(f"{kind}{form}.default" for kind in ("zeros", "ones") for form in ("", "_like")),
    *(f"new_{kind}.default" for kind in ("zeros", "ones", "empty")),
    "empty_like.default",
    "empty.memory_format",
):
    complex_rule(_name)(_made(f"aten.{_name}"))


@complex_rule("full.default", "full_like.default", "new_full.default", "scalar_tensor.default")
def _full(c: Context, *args: Any, **kwargs: Any) -> Value | Complex:
    place = 0 if "scalar_tensor" in c.target else 2 if "new_full" in c.target else 1
    number = complex(kwargs["fill_value"] if "fill_value" in kwargs else args[place])
    re, im = (c.full(part, c.shape, c.dtype) for part in (number.real, number.imag))
    return Complex(re, im) if c.is_complex else re


@complex_rule("constant_pad_nd.default")
def _pad(c: Context, x: Complex, pad: Sequence[Any], value: Scalar = 0) -> Complex:
    numbers = complex(value)
    parts = zip(as_complex(c, x), (numbers.real, numbers.imag), strict=True)
    re, im = (HANDLERS["aten.constant_pad_nd.default"](c, part, pad, number) for part, number in parts)
    return _pair(re, im)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _product(c: Context, x: Any, y: Any, multiply: Callable[[Value, Value], Value]) -> Complex:
    """``(a + bi)(d + ei)``, by products of real operands. A real operand has an imaginary part of 0, also where that makes NaN."""
    (a, b), (d, e) = as_complex(c, x), as_complex(c, y)
    re = c.b("sub", multiply(a, d), multiply(b, e))
    return Complex(re, c.b("add", multiply(a, e), multiply(b, d)))


@complex_rule("mul.Tensor", "mul.Scalar")
def _mul(c: Context, x: Any, y: Any) -> Complex:
    return _product(c, x, y, lambda a, b: c.b("mul", a, b))


@complex_rule("prod.default", "prod.dim_int")
def _prod(
    c: Context, x: Complex | Value, dim: int | None = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Complex:
    """One half of the axis by the other, again and again: no number is rounded more often than there are steps."""
    z = Complex(*as_complex(c, x))
    if dim is None:
        z, dim = Complex(*(c.reshape(part, (product(part.type.shape),)) for part in z.parts)), 0
    extent = c.static(z.re, dim, "the axis of a product")
    if extent == 0:
        return Complex(c.full(1, c.shape, c.dtype))
    while extent > 1:
        half = extent // 2
        found = _mul(c, _cut(c, z, dim, 0, half), _cut(c, z, dim, half, 2 * half))
        if extent % 2:
            last = _cut(c, z, dim, extent - 1, extent)
            found = Complex(*(c.b("concat", *pair, axis=dim) for pair in zip(found.parts, last.parts, strict=True)))
        z, extent = found, half + extent % 2
    return Complex(*(c.reshape(part, c.shape) for part in z.parts))


def _cut(c: Context, z: Complex, axis: int, start: int, stop: int) -> Complex:
    return Complex(*(c.take(part, axis, start, stop) for part in z.parts))


@complex_rule("div.Tensor", "div.Scalar")
def _div(c: Context, x: Any, y: Any) -> Complex:
    """By the conjugate, after both are brought to the size of the divisor's larger part: its square would overflow."""
    (a, b), (d, e) = as_complex(c, x), as_complex(c, y)
    scale = c.b("div", c.number(1, c.dtype), c.b("maximum", c.b("abs", d), c.b("abs", e)))
    a, b, d, e = (c.b("mul", part, scale) for part in (a, b, d, e))
    size = c.b("add", c.b("mul", d, d), c.b("mul", e, e))
    re = c.b("add", c.b("mul", a, d), c.b("mul", b, e))
    im = c.b("sub", c.b("mul", b, d), c.b("mul", a, e))
    return Complex(c.b("div", re, size), c.b("div", im, size))


@complex_rule("reciprocal.default")
def _reciprocal(c: Context, x: Complex) -> Complex:
    return _div(c, 1, x)


_MOST_FACTORS = 8


@complex_rule("pow.Tensor_Scalar")
def _pow(c: Context, x: Complex, exponent: Scalar) -> Complex:
    if isinstance(exponent, complex) or not float(exponent).is_integer() or not 1 <= exponent <= _MOST_FACTORS:
        raise c.unsupported(
            f"a complex number to the power of {exponent}",
            f"whole powers up to {_MOST_FACTORS} are supported; or use torch.polar",
        )
    result = x
    for _ in range(int(exponent) - 1):
        result = _mul(c, result, x)
    return result


@complex_rule("exp.default")
def _exp(c: Context, x: Complex) -> Complex:
    re, im = as_complex(c, x)
    return _polar(c, c.b("exp", re), im)


@complex_rule("log.default")
def _log(c: Context, x: Complex) -> Complex:
    re, im = as_complex(c, x)
    return Complex(c.b("log", c.b("hypot", re, im)), c.b("atan2", im, re))


@complex_rule("sqrt.default")
def _sqrt(c: Context, x: Complex) -> Complex:
    """The root in the right half plane: of the larger part the root of a sum without cancellation, the other one by it.

    On which side of the cut a number is, the sign of a zero tells, which `atan2` sees.
    """
    re, im = as_complex(c, x)
    large = c.b("sqrt", c.b("mul", c.b("add", c.b("abs", re), c.b("hypot", re, im)), 0.5))
    small = c.b("div", c.b("mul", c.b("abs", im), 0.5), c.b("where", c.b("eq", large, 0), c.number(1, c.dtype), large))
    right = c.b("ge", re, 0)
    size = c.b("where", right, small, large)
    return Complex(
        c.b("where", right, large, small), c.b("where", c.b("lt", c.b("atan2", im, re), 0), c.b("neg", size), size)
    )


@complex_rule("tanh.default")
def _tanh(c: Context, x: Complex) -> Complex:
    """``(sinh 2a + i sin 2b) / (cosh 2a + cos 2b)``, both divided by ``exp |2a| / 2``, which overflows."""
    re, im = as_complex(c, x)
    size, turn = c.b("abs", re), c.b("mul", im, 2)
    fall = c.b("exp", c.b("mul", size, -2))
    divisor = c.b("add", c.b("add", c.b("mul", fall, fall), 1), c.b("mul", c.b("mul", fall, 2), c.b("cos", turn)))
    rise = c.b("mul", c.b("neg", c.b("expm1", c.b("mul", size, -4))), c.b("sign", re))
    return Complex(c.b("div", rise, divisor), c.b("div", c.b("mul", c.b("mul", fall, 2), c.b("sin", turn)), divisor))


@complex_rule("sigmoid.default")
def _sigmoid(c: Context, x: Complex) -> Complex:
    """``(1 + tanh(x / 2)) / 2``: the exponential itself overflows."""
    half = Complex(*(c.b("mul", part, 0.5) for part in as_complex(c, x)))
    re, im = (c.b("mul", part, 0.5) for part in as_complex(c, _tanh(c, half)))
    return Complex(c.b("add", re, 0.5), im)


@complex_rule("sgn.default")
def _sgn(c: Context, x: Complex) -> Complex:
    """On the unit circle; 0 for 0."""
    re, im = as_complex(c, x)
    size = c.b("hypot", re, im)
    size = c.b("where", c.b("eq", size, 0), c.number(1, c.dtype), size)
    return Complex(c.b("div", re, size), c.b("div", im, size))


def _multiplied(name: str) -> Callable[[Context, Any, Any], Complex]:
    """A rule for products of matrices, by the handler of real ones."""
    handler = HANDLERS[f"aten.{name}"]

    def rule(c: Context, x: Any, y: Any) -> Complex:
        def multiply(a: Value, b: Value) -> Value:
            result = handler(c, a, b)
            assert isinstance(result, Value)
            return result

        return _product(c, x, y, multiply)

    return rule


for _name in ("mm.default", "bmm.default", "matmul.default", "mv.default", "dot.default"):
    complex_rule(_name)(_multiplied(_name))


def _sum(c: Context, x: Any, y: Any) -> Complex:
    re, im = (c.b("add", a, b) for a, b in zip(as_complex(c, x), as_complex(c, y), strict=True))
    return Complex(re, im)


@complex_rule("linear.default")
def _linear(c: Context, x: Any, weight: Any, bias: Any = None) -> Complex:
    result = _multiplied("linear.default")(c, x, weight)
    return result if bias is None else _sum(c, result, bias)


@complex_rule("addmm.default", "baddbmm.default")
def _addmm(c: Context, added: Any, x: Any, y: Any, beta: Scalar = 1, alpha: Scalar = 1) -> Complex:
    result = _multiplied("matmul.default")(c, x, y)
    return _sum(c, result if alpha == 1 else _mul(c, result, alpha), added if beta == 1 else _mul(c, added, beta))


# -- comparisons -----------------------------------------------------------------------------------------------------


@complex_rule("isnan.default", "isinf.default")
def _test(c: Context, x: Complex) -> Value:
    op = c.target.split(".")[1]
    found = [c.b(op, part) for part in x.parts]
    return found[0] if len(found) == 1 else c.b("logical_or", *found)


def _equal(c: Context, x: Any, y: Any) -> Value:
    dtypes = [part.type.dtype for z in (x, y) if isinstance(z, Complex) for part in z.parts]
    dtype = max(dtypes, key=lambda dtype: dtype.numpy.itemsize)
    re, im = (c.b("eq", a, b) for a, b in zip(as_complex(c, x, dtype), as_complex(c, y, dtype), strict=True))
    return c.b("logical_and", re, im)


@complex_rule("eq.Tensor", "eq.Scalar")
def _eq(c: Context, x: Any, y: Any) -> Value:
    return _equal(c, x, y)


@complex_rule("ne.Tensor", "ne.Scalar")
def _ne(c: Context, x: Any, y: Any) -> Value:
    return c.b("logical_not", _equal(c, x, y))


# -- spread ----------------------------------------------------------------------------------------------------------


@complex_rule("var.correction", "std.correction")
def _spread(c: Context, x: Complex, *args: Any, **kwargs: Any) -> Value:
    """That of both parts together, a real number."""
    re, im = (HANDLERS[c.target](c, part, *args, **kwargs) for part in as_complex(c, x))
    assert isinstance(re, Value)
    assert isinstance(im, Value)
    return c.b("hypot" if "std" in c.target else "add", re, im)


# -- of real tensors -------------------------------------------------------------------------------------------------


@lowers(
    "real.default", "conj.default", "_conj.default", "_conj_physical.default", "conj_physical.default", "resolve_conj.default",
    "resolve_neg.default",
)  # fmt: skip
def _same(c: Context, x: Value) -> Value:
    return x


@lowers("angle.default")
def _real_angle(c: Context, x: Value) -> Value:
    """Half a turn for negative numbers."""
    x = c.cast(x, c.dtype)
    angle = c.b("where", c.b("lt", x, 0), c.number(math.pi, c.dtype), c.number(0, c.dtype))
    return c.b("where", c.b("isnan", x), x, angle)

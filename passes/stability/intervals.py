"""Interval analysis: between which numbers the elements of each value lie, given those of the inputs.

An interval holds the exact results, before rounding: the sum of squares is at least 0 and `exp` is positive, but nothing is known of the
overflow and the cancellation of a finite precision, which is what the findings are about. NaN is in no interval and never ruled out. There
is one rule for each op; an op without one, such as that of a plugin, can have any result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlec.ir import Dim, Graph, Node, Trait, Value
from mlec.ir.op import Array

INF = math.inf


@dataclass(frozen=True, slots=True)
class Interval:
    """The numbers from ``lo`` to ``hi``, both included; either may be infinite."""

    lo: float = -INF
    hi: float = INF

    def __contains__(self, number: float) -> bool:
        return self.lo <= number <= self.hi

    def __or__(self, other: Interval) -> Interval:
        return Interval(min(self.lo, other.lo), max(self.hi, other.hi))

    def __add__(self, other: Interval) -> Interval:
        return _valid(Interval(self.lo + other.lo, self.hi + other.hi))

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        corners = [_product(a, b) for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return Interval(min(corners), max(corners))

    def inverse(self) -> Interval:
        """``1 / x``: anything, if 0 lies inside."""
        if self.lo < 0 < self.hi:
            return FULL
        return Interval(1 / self.hi if self.hi else -INF, 1 / self.lo if self.lo else INF)

    @property
    def magnitude(self) -> float:
        return max(abs(self.lo), abs(self.hi))

    def __str__(self) -> str:
        return f"[{self.lo:.6g}, {self.hi:.6g}]"


FULL = Interval()
UNIT = Interval(0.0, 1.0)
ZERO = Interval(0.0, 0.0)

Rule = Callable[[Node, Sequence[Interval], Graph], "Interval | Sequence[Interval]"]


def value_intervals(graph: Graph, inputs: Mapping[Value, Interval]) -> dict[Value, Interval]:
    """The interval of every value of a graph; inputs that are not given can be anything."""
    known = {value: inputs.get(value, FULL) for value in graph.inputs}
    for node in graph.nodes:
        operands = [known[value] for value in node.inputs]
        rule = RULES.get(node.name) or (_monotone if node.op.has(Trait.MONOTONE) and len(operands) == 1 else _unknown)
        found = rule(node, operands, graph)
        results = [found] if isinstance(found, Interval) else found
        known.update((value, _valid(result)) for value, result in zip(node.outputs, results, strict=True))
    return known


def interval_of(array: Array) -> Interval:
    """From the smallest to the largest number in an array; NaN is left out."""
    if not array.size:
        return ZERO
    lo, hi = float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None))
    return ZERO if math.isnan(lo) else Interval(lo, hi)


def _valid(found: Interval) -> Interval:
    """``inf - inf`` of bounds tells nothing."""
    return Interval(-INF if math.isnan(found.lo) else found.lo, INF if math.isnan(found.hi) else found.hi)


def _product(a: float, b: float) -> float:
    """With ``0 * inf = 0``: an infinite bound stands for arbitrarily large numbers."""
    return a * b if a and b else 0.0


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except (OverflowError, ZeroDivisionError):
        return INF


def _count(dims: Sequence[Dim]) -> float:
    """How many elements axes have; symbolic extents have no bound."""
    return float(math.prod(d if isinstance(d, int) else INF for d in dims)) if 0 not in dims else 0.0


def _axes(node: Node) -> Sequence[Dim]:
    shape = node.inputs[0].type.shape
    return [shape[axis] for axis in node.attrs["axes"]]


# -- rules ---------------------------------------------------------------------------------------------------------------


def _unknown(node: Node, operands: Sequence[Interval], graph: Graph) -> Sequence[Interval]:
    return [UNIT if value.type.dtype.is_bool else FULL for value in node.outputs]


def _monotone(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    """The op itself at both ends; NaN outside its domain tells nothing."""
    ends = np.array([operands[0].lo, operands[0].hi])
    with np.errstate(all="ignore"):
        lo, hi = (float(end) for end in node.op.reference(ends, **node.attrs))
    return Interval(lo, hi)


def _same(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    return operands[0]


def _hull(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    found = operands[0]
    for operand in operands[1:]:
        found = found | operand
    return found


def _constant(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    array = graph.constant_value(node.output)
    return FULL if array is None else interval_of(array)


def _iota(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    return Interval(0.0, max(0.0, _count([node.attrs["shape"][node.attrs["axis"]]]) - 1))


def _abs(x: Interval) -> Interval:
    return Interval(0.0 if 0.0 in x else min(abs(x.lo), abs(x.hi)), x.magnitude)


def _sqrt(x: Interval) -> Interval:
    return Interval(math.sqrt(max(x.lo, 0.0)), math.sqrt(max(x.hi, 0.0)))


def _above(least: float) -> Callable[[Interval], Interval]:
    """Of a function that is at least `least`, at most its operand (or 0), and close to it for large ones."""
    return lambda x: Interval(0.0 if x.lo >= 0 else least, max(x.hi, 0.0))


def _unary(function: Callable[[Interval], Interval]) -> Rule:
    return lambda node, operands, graph: function(operands[0])


def _binary(function: Callable[[Interval, Interval], Interval]) -> Rule:
    return lambda node, operands, graph: function(operands[0], operands[1])


def _mul(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    if node.inputs[0] is node.inputs[1]:
        return _abs(operands[0]) * _abs(operands[0])
    return operands[0] * operands[1]


def _sub(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    """What the largest element, or something larger, is taken from is not positive: the stable spelling of a softmax."""
    a, b = node.inputs
    if a is b:
        return ZERO
    found = operands[0] - operands[1]
    if is_bound_of(b, a, graph, ("max", "logsumexp")) or is_bound_of(a, b, graph, ("min",)):
        return Interval(min(found.lo, 0.0), min(found.hi, 0.0))
    if is_bound_of(b, a, graph, ("min",)) or is_bound_of(a, b, graph, ("max", "logsumexp")):
        return Interval(max(found.lo, 0.0), max(found.hi, 0.0))
    return found


def is_bound_of(bound: Value, value: Value, graph: Graph, ops: Sequence[str]) -> bool:
    """Whether one value is the other's reduction by one of these ops, and broadcasts back to the elements it was made of."""
    node = graph.producer.get(bound)
    if node is not None and node.name == "broadcast_to":
        bound = node.inputs[0]
        node = graph.producer.get(bound)
    if node is not None and node.name == "reshape":
        node = graph.producer.get(node.inputs[0])
    if node is None or node.name not in ops or node.inputs[0] is not value:
        return False
    shape = value.type.shape
    axes = {axis % len(shape) for axis in node.attrs["axes"]}
    kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
    return (1,) * (len(shape) - bound.type.rank) + bound.type.shape == kept


def _pow(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    base, exponent = operands
    if base.lo >= 0:
        corners = [_power(a, b) for a in (base.lo, base.hi) for b in (exponent.lo, exponent.hi)]
        found = Interval(min(corners), max(corners))
        return found | Interval(1.0, 1.0) if base.lo < 1 < base.hi and exponent.lo < 0 < exponent.hi else found
    if exponent.lo == exponent.hi and exponent.lo >= 0 and exponent.lo % 2 == 0:
        size = _abs(base)
        return Interval(_power(size.lo, exponent.lo), _power(size.hi, exponent.lo))
    return FULL


def _mod(a: Interval, b: Interval) -> Interval:
    return Interval(min(b.lo, 0.0), max(b.hi, 0.0))


def _where(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    return operands[1] | operands[2]


def _cast(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    dtype, x = node.attrs["dtype"], operands[0]
    if dtype.is_bool:
        return UNIT
    if dtype.is_float or not node.inputs[0].type.dtype.is_float:
        return x
    return Interval(*(math.trunc(end) if math.isfinite(end) else end for end in (x.lo, x.hi)))


def _total(x: Interval, count: float) -> Interval:
    """The sum of up to ``count`` elements."""
    return Interval(_product(min(x.lo, 0.0), count), _product(max(x.hi, 0.0), count))


def _sum(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    count = _count(_axes(node))
    if math.isfinite(count):
        return Interval(_product(operands[0].lo, count), _product(operands[0].hi, count))
    return _total(operands[0], count)


def _cumsum(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    return _total(operands[0], _count([node.inputs[0].type.shape[node.attrs["axis"]]])) | operands[0]


def _prod(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    size = max(operands[0].magnitude, 1.0)
    bound = _power(size, _count(_axes(node))) if size > 1 else 1.0
    return Interval(0.0 if operands[0].lo >= 0 else -bound, bound)


def _logsumexp(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    count = _count(_axes(node))
    return Interval(operands[0].lo, operands[0].hi + math.log(count)) if count else Interval(-INF, -INF)


def _position(node: Node, axis: int) -> Interval:
    return Interval(0.0, max(0.0, _count([node.inputs[0].type.shape[axis]]) - 1))


def _arg(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    return _position(node, node.attrs["axis"])


def _with_positions(node: Node, operands: Sequence[Interval], graph: Graph) -> Sequence[Interval]:
    return operands[0], _position(node, node.attrs["axis"])


def _matmul(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    product, count = operands[0] * operands[1], _count([node.inputs[0].type.shape[-1]])
    if math.isfinite(count):
        return Interval(_product(product.lo, count), _product(product.hi, count))
    return _total(product, count)


def _conv(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    """Of each output, at most as many products as the weights have elements; beyond the edge there are fewer."""
    weights = node.inputs[1].type.shape
    per_output = (weights[0], *weights[2:]) if node.name == "conv_transpose" else weights[1:]
    return _total(operands[0] * operands[1], _count(per_output))


def _distance(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    apart = (operands[0] - operands[1]).magnitude
    features = _count([node.inputs[0].type.shape[1]])
    squared = _product(_power(apart, 2), features)
    bounds = {"sqeuclidean": squared, "euclidean": math.sqrt(squared), "chebyshev": apart}
    return Interval(0.0, bounds.get(node.attrs["metric"], _product(apart, features)))


def _nearest(node: Node, operands: Sequence[Interval], graph: Graph) -> Sequence[Interval]:
    points = _count([node.inputs[1].type.shape[0]])
    return _distance(node, operands, graph), Interval(0.0, max(0.0, points - 1))


def _log_softmax(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    count = _count([node.inputs[0].type.shape[node.attrs["axis"]]])
    return Interval(operands[0].lo - operands[0].hi - (math.log(count) if count else 0.0), 0.0)


def _normalised(count: float) -> Interval:
    """Zero mean and unit variance, or a unit mean of squares: no element of n is beyond the root of n."""
    return Interval(-math.sqrt(count), math.sqrt(count))


def _layer_norm(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    shape = node.inputs[0].type.shape
    found = _normalised(_count(shape[node.attrs["axis"] % len(shape) :])) * operands[1]
    return found + operands[2] if len(operands) > 2 else found


def _group_norm(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    count = _count(node.inputs[0].type.shape[1:]) / node.attrs["groups"]
    return _normalised(count) * operands[1] + operands[2]


def _batch_norm(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    x, scale, bias, mean, variance = operands
    eps = Interval(node.attrs["eps"], node.attrs["eps"])
    return (x - mean) * (scale * _sqrt(variance + eps).inverse()) + bias


def _lstm(node: Node, operands: Sequence[Interval], graph: Graph) -> Sequence[Interval]:
    """Hidden states are a gate's part of a tanh; the cell may grow."""
    hidden = Interval(-1.0, 1.0)
    return hidden, hidden | operands[1], FULL


def _gru(node: Node, operands: Sequence[Interval], graph: Graph) -> Sequence[Interval]:
    """Each state lies between the one before and a tanh."""
    hidden = Interval(-1.0, 1.0) | operands[1]
    return hidden, hidden


def _pad(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    value = node.attrs["value"]
    return operands[0] | Interval(value, value) if node.attrs["mode"] == "constant" else operands[0]


def _trees(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    """At most a leaf of every tree, and the base."""
    trees, values, base = _count(node.inputs[8].type.shape), operands[10], operands[11]
    return _total(values, trees) + base


def _unit(node: Node, operands: Sequence[Interval], graph: Graph) -> Interval:
    return UNIT


_BOOLEAN = (
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isinf", "isfinite", "any",
    "all",
)  # fmt: skip
_PICKING = (
    "reshape", "transpose", "broadcast_to", "flip", "slice", "gather", "take_along_axis", "mean", "max", "min", "max_pool", "resize",
)  # fmt: skip
RULES: dict[str, Rule] = {
    # Ops that are monotone say so themselves, and need no rule.
    **dict.fromkeys(_BOOLEAN, _unit),
    **dict.fromkeys(_PICKING, _same),
    **dict.fromkeys(("sin", "cos"), _unary(lambda x: Interval(-1.0, 1.0))),
    **dict.fromkeys(("softmax", "one_hot"), _unit),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    **dict.fromkeys(("sort", "topk"), _with_positions),
    **dict.fromkeys(("conv", "conv_transpose"), _conv),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "constant": _constant,
    "iota": _iota,
    "neg": _unary(lambda x: -x),
    "abs": _unary(_abs),
    "sqrt": _unary(_sqrt),
    "rsqrt": _unary(lambda x: _sqrt(x).inverse()),
    "silu": _unary(_above(-0.2785)),
    "gelu": _unary(_above(-0.171)),
    "add": _binary(lambda a, b: a + b),
    "sub": _sub,
    "mul": _mul,
    "div": _binary(lambda a, b: a * b.inverse()),
    "mod": _binary(_mod),
    "pow": _pow,
    "maximum": _binary(lambda a, b: Interval(max(a.lo, b.lo), max(a.hi, b.hi))),
    "minimum": _binary(lambda a, b: Interval(min(a.lo, b.lo), min(a.hi, b.hi))),
    "erfc": _unary(lambda x: Interval(0.0, 2.0)),
    "atan2": _binary(lambda a, b: Interval(-math.pi, math.pi)),
    "hypot": _binary(lambda a, b: Interval(0.0, math.inf)),
    "where": _where,
    "cast": _cast,
    "concat": _hull,
    "pad": _pad,
    "sum": _sum,
    "cumsum": _cumsum,
    "prod": _prod,
    "logsumexp": _logsumexp,
    "avg_pool": _unary(lambda x: x | ZERO),
    "matmul": _matmul,
    "pairwise_distance": _distance,
    "nearest": _nearest,
    "log_softmax": _log_softmax,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "attention": lambda node, operands, graph: operands[2],
    "lstm": _lstm,
    "gru": _gru,
    "tree_ensemble": _trees,
}  # fmt: skip

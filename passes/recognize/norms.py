"""Normalisations: the core (centred, divided by the deviation) first, then the factors and offsets that follow it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mlec.ir import AnyOf, Const, Dim, Graph, GraphBuilder, Match, Miss, Node, P, Rule, TensorType, Value
from mlec.ir.dim import product, static_dims
from mlec.ir.op import Array
from mlec.ir.pattern import match
from mlec.ir.types import Shape

CENTRED = P("sub", "x", P("mean", "x", bind="mean"))


def _divided(top: P | AnyOf | str, square: str) -> AnyOf:
    """``top / sqrt(mean(square²) + eps)`` and its other spellings; without eps as well. A factor may come with the divisor.

    Where eps is added to the root, it is bound as ``beside``.
    """
    mean = P("mean", P("mul", square, square), bind="squares")
    inside = AnyOf(P("add", mean, Const(bind="eps")), mean)
    inverse = P("rsqrt", inside)
    return AnyOf(
        P("div", top, P("sqrt", inside)),
        P("mul", top, inverse),
        P("mul", square, P("mul", inverse, "w")),
        P("div", top, P("add", P("sqrt", inside), Const(bind="beside"))),
    )


def _scaled(value: str) -> AnyOf:
    """A value, or its product with a factor that was applied before the division."""
    return AnyOf(value, P("mul", value, "w"))


def trailing_axis(node: Node) -> int | None:
    """The first axis of a reduction over all axes from one on, that keeps them as axes of extent 1; else None."""
    rank = node.inputs[0].type.rank
    axes = sorted(axis % rank for axis in node.attrs["axes"])
    return axes[0] if axes and node.attrs["keepdims"] and axes == list(range(axes[0], rank)) else None


def filled(b: GraphBuilder, number: float, like: TensorType, axis: int) -> Value:
    """A constant of the shape of the axes from one on."""
    return b.constant(np.full(static_dims(like.shape[axis:]), number, like.dtype.numpy))


def _number(m: Match, name: str) -> float | None:
    """A constant of one element; 0 where the pattern had none."""
    array = m.constants.get(name)
    if array is None:
        return 0.0
    return float(array.reshape(())) if array.size == 1 else None


class _Core(Rule):
    """Shared by the norms: over which axes they may go."""

    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        squares = m.nodes["squares"]
        eps = _number(m, "eps")
        if "beside" in m.constants:
            return Miss("its eps is added to the root, not to what the root is taken of, and no norm has that")
        if m.node.output.type != squares.inputs[0].type or eps is None or not eps >= 0:
            return Miss()
        if trailing_axis(squares) is None:
            return Miss(
                f"it goes over the axes {list(squares.attrs['axes'])} of {squares.inputs[0].type}, not over the last ones"
            )
        return None

    def scaled(self, b: GraphBuilder, result: Value, m: Match) -> Value:
        """The result times the factor that was applied before the division, if there was one."""
        return b("mul", result, m["w"]) if "w" in m.values else result


class LayerNorm(_Core):
    """(x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) -> layer_norm(x, 1, 0)"""

    pattern = _divided(_scaled("centred"), "centred")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        centred = _centred(m["centred"], graph)
        if centred is None or centred.nodes["mean"].attrs != m.nodes["squares"].attrs:
            return Miss()
        if (miss := super().check(m, graph)) is not None:
            return miss
        x, axis = centred["x"].type, trailing_axis(m.nodes["squares"])
        if axis is None or not (_is_static(x.shape[axis:]) or _are_channels(x, axis)):
            return Miss("the extents that it goes over are symbolic")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        centred = _centred(m["centred"], graph)
        axis = trailing_axis(m.nodes["squares"])
        assert centred is not None
        assert axis is not None
        x, eps = centred["x"], _number(m, "eps")
        if _is_static(x.type.shape[axis:]):
            one, zero = (filled(b, number, x.type, axis) for number in (1, 0))
            return self.scaled(b, b("layer_norm", x, one, zero, axis=axis - x.type.rank, eps=eps), m)
        one, zero = _channels(b, 1, x.type), _channels(b, 0, x.type)
        return self.scaled(b, b("group_norm", x, one, zero, groups=x.type.shape[1], eps=eps), m)


def _centred(value: Value, graph: Graph) -> Match | None:
    node = graph.producer.get(value)
    return None if node is None else match(CENTRED, node, graph)


def _is_static(shape: Shape) -> bool:
    return all(isinstance(extent, int) for extent in shape)


def _are_channels(x: TensorType, axis: int) -> bool:
    """Whether the axes from one on are the space of an image with so many channels."""
    return axis == 2 and isinstance(x.shape[1], int)


def _channels(b: GraphBuilder, number: float, like: TensorType) -> Value:
    return b.constant(np.full(static_dims(like.shape[1:2]), number, like.dtype.numpy))


class RmsNorm(_Core):
    """x / sqrt(mean(x²) + eps) -> rms_norm(x, 1)"""

    pattern = _divided(_scaled("x"), "x")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        if _centred(m["x"], graph) is not None:
            return Miss()  # a layer norm, if anything
        if (miss := super().check(m, graph)) is not None:
            return miss
        axis = trailing_axis(m.nodes["squares"])
        return None if _is_static(m["x"].type.shape[axis:]) else Miss("the extents that it goes over are symbolic")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        axis, x = trailing_axis(m.nodes["squares"]), m["x"]
        assert axis is not None
        one = filled(b, 1, x.type, axis)
        return self.scaled(b, b("rms_norm", x, one, axis=axis - x.type.rank, eps=_number(m, "eps")), m)


# -- factors and offsets ---------------------------------------------------------------------------------------------


def _fits(value: Value, wanted: Shape, graph: Graph) -> Array | Value | None:
    """A factor or offset of a norm: the constant spread over the axes ``wanted``, or a value of just their shape."""
    array = graph.constant_value(value)
    if array is None:
        return value if value.type.shape == wanted else None
    while array.ndim > len(wanted) and array.shape[0] == 1:
        array = array[0]
    try:
        return np.broadcast_to(array, static_dims(wanted))
    except ValueError:
        return None


class _IntoNorm(Rule):
    """Shared by the rules that give a norm another factor or offset.

    Attributes:
        place: the operand that changes.
    """

    rounds_once = True
    place: ClassVar[int]

    def check(self, m: Match, graph: Graph) -> Miss | None:
        norm = m.nodes["norm"]
        if m.node.output.type != norm.output.type or graph.use_count(norm.output) > 1:
            return Miss()
        new = _aligned(m, graph)
        if new is None:
            return Miss()
        old = [graph.constant_value(v) for v in norm.inputs[self.place :]]
        if any(a is None for a in old):
            return Miss("the norm has a factor or an offset that is not constant")
        neutral = all(np.all(a == n) for a, n in zip(old, (1, 0)[self.place - 1 :], strict=False) if a is not None)
        return None if isinstance(new, np.ndarray) or neutral else Miss("the norm has a factor or an offset already")


class NormScale(_IntoNorm):
    """norm(x, 1, 0) * w -> norm(x, w, 0)"""

    pattern = P("mul", P("layer_norm|rms_norm|group_norm", bind="norm"), "w")
    place = 1

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        norm, new = m.nodes["norm"], _aligned(m, graph)
        if isinstance(new, Value):
            return b(norm.op, norm.inputs[0], new, *norm.inputs[2:], **norm.attrs)
        old = [graph.constant_value(v) for v in norm.inputs[1:]]
        scaled = [b.constant(np.asarray(a * new), m["w"].hint) for a in old if a is not None and new is not None]
        return b(norm.op, norm.inputs[0], *scaled, **norm.attrs)


class NormOffset(_IntoNorm):
    """norm(x, w, 0) + b -> norm(x, w, b)"""

    pattern = P("add", P("layer_norm|group_norm", bind="norm"), "w")
    place = 2

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        norm, new = m.nodes["norm"], _aligned(m, graph)
        old = graph.constant_value(norm.inputs[2])
        if not isinstance(new, Value):
            assert new is not None
            assert old is not None
            new = b.constant(np.asarray(old + new), m["w"].hint)
        return b(norm.op, *norm.inputs[:2], new, **norm.attrs)


def _aligned(m: Match, graph: Graph) -> Array | Value | None:
    """What multiplies or is added, as the operand of the norm: of its last axes, or of its channels."""
    norm = m.nodes["norm"]
    if norm.name == "group_norm":
        return _on_channels(m["w"], norm.output.type, graph)
    return _fits(m["w"], norm.inputs[1].type.shape, graph)


def _on_channels(value: Value, like: TensorType, graph: Graph) -> Array | None:
    """A constant that has one number for each channel (axis 1), or one for all, as an array of the channels."""
    array = graph.constant_value(value)
    if array is None:
        return None
    full = array.reshape((1,) * (like.rank - array.ndim) + array.shape)
    if full.size not in (1, full.shape[1]):
        return None
    return np.broadcast_to(full.reshape(-1), static_dims(like.shape[1:2]))


# -- groups of channels ----------------------------------------------------------------------------------------------


class InstanceNorm(Rule):
    """layer_norm(x, 1, 0) over space, times a factor for each channel -> group_norm(x) with a group for each channel"""

    pattern = P("mul", P("layer_norm", "x", Const(1), Const(0), bind="norm"), Const(bind="w"))
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        norm = m.nodes["norm"]
        x = m["x"].type
        channels = norm.attrs["axis"] % x.rank == 2 and isinstance(x.shape[1], int) and x.shape[1] > 1
        fits = channels and norm.output.type == m.node.output.type and graph.use_count(norm.output) == 1
        return None if fits and _on_channels(m["w"], x, graph) is not None and m.constants["w"].size > 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, factors = m["x"], _on_channels(m["w"], m["x"].type, graph)
        assert factors is not None
        attrs = {"groups": x.type.shape[1], "eps": m.nodes["norm"].attrs["eps"]}
        return b("group_norm", x, b.constant(np.array(factors)), _channels(b, 0, x.type), **attrs)


class GroupNorm(Rule):
    """reshape(norm over all but two axes of reshape(x)) -> group_norm(x)"""

    pattern = P("reshape", P("layer_norm|group_norm", P("reshape", "x"), Const(1), Const(0), bind="norm"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        x, norm = m["x"].type, m.nodes["norm"]
        grouped = norm.output.type
        if norm.name == "layer_norm" and norm.attrs["axis"] % grouped.rank != 2:
            return Miss()
        groups, channels = grouped.shape[1], x.shape[1] if x.rank > 2 else None
        if x != m.node.output.type or not isinstance(groups, int) or not isinstance(channels, int):
            return Miss()
        in_groups = norm.name == "layer_norm" or norm.attrs["groups"] == groups
        same_images = x.shape[0] == grouped.shape[0] and channels % groups == 0 and groups < channels
        return None if in_groups and same_images else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, norm = m["x"], m.nodes["norm"]
        one, zero = _channels(b, 1, x.type), _channels(b, 0, x.type)
        return b("group_norm", x, one, zero, groups=norm.output.type.shape[1], eps=norm.attrs["eps"])


# -- length 1 --------------------------------------------------------------------------------------------------------


class UnitLength(Rule):
    """x / sqrt(sum(x²) + eps) -> rms_norm(x, 1 / sqrt(n)) with eps / n"""

    _total = P("sum", P("mul", "x", "x"), bind="squares")
    _inside = AnyOf(P("add", _total, Const(bind="eps")), _total)
    pattern = AnyOf(
        P("div", "x", P("sqrt", _inside)),
        P("mul", "x", P("rsqrt", _inside)),
        P("div", "x", P("clip", P("sqrt", _inside), bind="clip")),
    )
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        squares, x = m.nodes["squares"], m["x"].type
        axis, eps = trailing_axis(squares), _number(m, "eps")
        if m.node.output.type != x or axis is None or eps is None or not eps >= 0 or not _is_static(x.shape[axis:]):
            return Miss()
        return None if "clip" not in m.nodes or m.nodes["clip"].attrs["hi"] == np.inf else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, axis, eps = m["x"], trailing_axis(m.nodes["squares"]), _number(m, "eps")
        assert axis is not None
        assert eps is not None
        count = _count(x.type.shape[axis:])
        least = m.nodes["clip"].attrs["lo"] if "clip" in m.nodes else 0.0
        factors = filled(b, count**-0.5, x.type, axis)
        return b("rms_norm", x, factors, axis=axis - x.type.rank, eps=max(eps, least * abs(least)) / count)


def _count(shape: Shape) -> int:
    total: Dim = product(shape)
    assert isinstance(total, int)
    return total


RULES: tuple[Rule, ...] = (LayerNorm(), RmsNorm(), InstanceNorm(), GroupNorm(), NormScale(), NormOffset())
LOOSE_RULES: tuple[Rule, ...] = (UnitLength(),)

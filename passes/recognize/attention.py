"""Attention from its parts: products, a scale, masks, softmax, and keys and values that several heads share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value
from mlec.ir.types import Shape


@dataclass(frozen=True)
class _Scores:
    """How scores come about: ``product * scale``, masked.

    Attributes:
        product: of the queries and the transposed keys.
        mask: keeps where it is true, or is added; None without.
        inverted: the mask hides where it is true.
        fill: of hidden scores.
    """

    product: Node
    scale: float = 1.0
    mask: Value | None = None
    inverted: bool = False
    fill: float = -math.inf


def _read(value: Value, graph: Graph) -> _Scores | str | None:
    """What makes scores; why it is no attention, if there is a product in it; None if there is none."""
    node = graph.producer.get(value)
    if node is None:
        return None
    if node.name == "matmul":
        found: _Scores | str | None = _Scores(node)
    elif node.name in ("mul", "div"):
        found = _scaled(node, graph)
    elif node.name == "add":
        found = _shifted(node, graph)
    elif node.name == "where":
        found = _hidden(node, graph)
    else:
        return None
    if isinstance(found, _Scores) and graph.use_count(value) > 1:
        return "its scores are used by others as well"
    return found


def _scaled(node: Node, graph: Graph) -> _Scores | str | None:
    for x, factor in (node.inputs, node.inputs[::-1])[: 1 if node.name == "div" else 2]:
        number = _number(factor, graph)
        if number is None or x.type != node.output.type:
            continue
        found = _read(x, graph)
        if isinstance(found, _Scores) and found.mask is not None:
            return "it is scaled after the mask"
        if isinstance(found, _Scores):
            return replace(found, scale=found.scale * (1 / number if node.name == "div" else number))
        return found
    return None


def _shifted(node: Node, graph: Graph) -> _Scores | str | None:
    for x, mask in (node.inputs, node.inputs[::-1]):
        if x.type != node.output.type:
            continue
        found = _read(x, graph)
        if isinstance(found, _Scores):
            return "it has two masks" if found.mask is not None else replace(found, mask=mask)
        if found is not None:
            return found
    return None


def _hidden(node: Node, graph: Graph) -> _Scores | str | None:
    mask, *choices = node.inputs
    for inverted, (x, other) in ((False, choices), (True, choices[::-1])):
        fill = _number(other, graph)
        if fill is None or x.type != node.output.type:
            continue
        found = _read(x, graph)
        if isinstance(found, _Scores):
            if found.mask is not None:
                return "it has two masks"
            return replace(found, mask=mask, inverted=inverted, fill=fill)
        if found is not None:
            return found
    return None


def _number(value: Value, graph: Graph) -> float | None:
    """A constant of one element."""
    array = graph.constant_value(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind == "f" else None


class Attention(Rule):
    """softmax(mask(q kᵀ * scale)) v -> attention(q, k, v, mask)"""

    pattern = P("matmul", P("softmax", "scores", bind="softmax"), "v")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        scores, softmax = _read(m["scores"], graph), m.nodes["softmax"]
        if scores is None or softmax.attrs["axis"] % m["scores"].type.rank != m["scores"].type.rank - 1:
            return Miss()
        if isinstance(scores, str):
            return Miss(f"this is no attention: {scores}")
        q, k = scores.product.inputs
        if graph.use_count(softmax.output) > 1:
            return Miss("this is no attention: its weights are used by others as well")
        if any(graph.constant_value(value) is not None for value in (k, m["v"])):
            return Miss(
                "this is no attention: its keys or values are constant, and products with packed weights are faster"
            )
        if min(q.type.rank, k.type.rank, m["v"].type.rank) < 3:
            return Miss("this is no attention: without a batch or heads it would be one task")
        if not all(isinstance(d, int) for d in (q.type.shape[-1], m["v"].type.shape[-1])):
            return Miss("the depth of its heads is symbolic")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        scores = _read(m["scores"], graph)
        assert isinstance(scores, _Scores)
        (q, of_q), (turned, of_k) = (_factor(x, graph) for x in scores.product.inputs)
        scale = scores.scale * of_q * of_k
        masks = [] if scores.mask is None else [b("logical_not", scores.mask) if scores.inverted else scores.mask]
        return b("attention", q, _turned(b, turned, graph), m["v"], *masks, scale=scale, fill=scores.fill)


def _factor(value: Value, graph: Graph) -> tuple[Value, float]:
    """The value that a product with a number scales, and the number; the value itself, and 1, where there is none."""
    node = graph.producer.get(value)
    if node is not None and node.name in ("mul", "div") and graph.use_count(value) == 1:
        for x, factor in (node.inputs, node.inputs[::-1])[: 1 if node.name == "div" else 2]:
            number = _number(factor, graph)
            if number and x.type == value.type:
                return x, 1 / number if node.name == "div" else number
    return value, 1.0


def _turned(b: GraphBuilder, value: Value, graph: Graph) -> Value:
    """The transpose of the last two axes; where that is undone, what was transposed."""
    rank = value.type.rank
    perm = (*range(rank - 2), rank - 1, rank - 2)
    node = graph.producer.get(value)
    if node is not None and node.name == "transpose" and tuple(node.attrs["perm"]) == perm:
        return node.inputs[0]
    return b("transpose", value, perm=perm)


# -- heads that share keys and values --------------------------------------------------------------------------------


class SharedHeads(Rule):
    """attention(q, k and v repeated for each of g heads) -> attention(q in groups of g heads, k, v)"""

    pattern = P("attention")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        q, k, v, *masks = m.node.inputs
        spread = [_spread(x, graph) for x in (k, v)]
        if any(s is None for s in spread):
            return Miss()
        if len({s.output.type.shape[-3] for s in spread if s is not None}) != 1:
            return Miss("keys and values are repeated in different ways")
        fits = all(x.type.rank == m.node.output.type.rank and x.type.shape[:-2] == q.type.shape[:-2] for x in (k, v))
        if not fits or any(
            _grouped_mask(mask.type.shape, spread[0].output.type.shape) is None for mask in masks if spread[0]
        ):
            return Miss("its operands broadcast as well")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        q, k, v, *masks = m.node.inputs
        spread = [_spread(x, graph) for x in (k, v)]
        assert spread[0] is not None
        assert spread[1] is not None
        like = spread[0].output.type.shape
        grouped = b("reshape", q, shape=(*like[:-2], *q.type.shape[-2:]))
        parts = [b("reshape", mask, shape=_grouped_mask(mask.type.shape, like)) for mask in masks]
        result = b("attention", grouped, spread[0].inputs[0], spread[1].inputs[0], *parts, **m.node.attrs)
        return b("reshape", result, shape=m.node.output.type.shape)


class MergedHeads(Rule):
    """transpose(reshape(attention)) -> reshape(transpose(attention)), where the reshape merges groups of heads"""

    pattern = P("transpose", P("reshape", P("attention", bind="attention"), bind="merged"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        before, after = (m.nodes[name].output.type.shape for name in ("attention", "merged"))
        lone = all(graph.use_count(m.nodes[name].output) == 1 for name in ("attention", "merged"))
        heads = len(after) - 3
        one = (
            len(before) == len(after) + 1
            and heads >= 0
            and before[-2:] == after[-2:]
            and before[:heads] == after[:heads]
        )
        return None if lone and one else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        heads = m.nodes["merged"].output.type.rank - 3
        order: list[int] = []
        for axis in m.node.attrs["perm"]:
            order += [heads, heads + 1] if axis == heads else [axis + (axis > heads)]
        turned = b("transpose", m.nodes["attention"].output, perm=tuple(order))
        return b("reshape", turned, shape=m.node.output.type.shape)


def _spread(value: Value, graph: Graph) -> Node | None:
    """The node that repeats each head of ``[.., heads, 1, t, d]``, where a reshape makes ``[.., heads * g, t, d]`` of it."""
    reshape = graph.producer.get(value)
    node = graph.producer.get(reshape.inputs[0]) if reshape is not None and reshape.name == "reshape" else None
    if node is None or node.name != "broadcast_to" or graph.use_count(node.output) > 1:
        return None
    wide, narrow = node.output.type.shape, node.inputs[0].type.shape
    if len(wide) != len(narrow) or len(wide) != value.type.rank + 1:
        return None
    only_there = narrow[-3] == 1 and all(
        a == b for i, (a, b) in enumerate(zip(wide, narrow, strict=True)) if i != len(wide) - 3
    )
    same = wide[:-4] == value.type.shape[:-3] and wide[-2:] == value.type.shape[-2:]
    return node if only_there and same else None


def _grouped_mask(shape: Shape, like: Shape) -> Shape | None:
    """The shape of a mask where the heads of the scores are in groups, as ``like`` has them; None if they cannot be told apart."""
    if len(shape) <= 2:
        return shape
    if shape[-3] == 1:
        return (*shape[:-3], 1, 1, *shape[-2:])
    if shape[-3] == like[-4] * like[-3]:
        return (*shape[:-3], *like[-4:-2], *shape[-2:])
    return None


# -- masks that hide later positions ---------------------------------------------------------------------------------


class CausalMask(Rule):
    """attention(q, k, v, a constant mask that hides later positions) -> attention(q, k, v) with causal = true"""

    pattern = P("attention", "q", "k", "v", Const(bind="mask"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        mask = m.constants["mask"]
        hides = mask if mask.dtype == bool else np.where(mask == 0, 1, np.where(mask == -np.inf, 0, 2))
        later = hides.ndim >= 2 and bool(np.all(hides == np.tri(*hides.shape[-2:])))
        whole = later and hides.shape[-2:] == (m["q"].type.shape[-2], m["k"].type.shape[-2])
        return None if whole and not m.node.attrs["causal"] and m.node.attrs["fill"] == -math.inf else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("attention", m["q"], m["k"], m["v"], **{**m.node.attrs, "causal": True})


RULES: tuple[Rule, ...] = (Attention(), SharedHeads(), MergedHeads())
LOOSE_RULES: tuple[Rule, ...] = (CausalMask(),)

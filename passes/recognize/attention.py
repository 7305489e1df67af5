"""Attention from its parts: products, a scale, masks, softmax, and keys and values that several heads share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial, reduce

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value
from mlec.ir.op import Array
from mlec.ir.types import Shape


@dataclass(frozen=True)
class _Scores:
    """How scores come about: ``product * scale * factors``, capped, masked by what hides, then by what is added.

    Attributes:
        product: of the queries and the transposed keys; of the keys and the transposed queries where ``turned``.
        lead: leading axes that those of the product are split or joined to, if they are.
        factors: one number for each matrix, as those of heads.
        cap: they are ``cap * tanh(score / cap)``, if it is finite.
        hidden: masks that hide, each with whether it does so where it is true.
        fill: of hidden scores.
        added: masks that are added, each with a factor of its own.
    """

    product: Node
    turned: bool = False
    lead: Shape | None = None
    scale: float = 1.0
    factors: tuple[Array, ...] = ()
    cap: float = math.inf
    hidden: tuple[tuple[Value, bool], ...] = ()
    fill: float = -math.inf
    added: tuple[tuple[Value, float], ...] = ()

    @property
    def is_masked(self) -> bool:
        return bool(self.hidden or self.added)

    def scaled(self, factor: float) -> _Scores | str:
        """The same after a multiplication."""
        if math.isfinite(self.cap):
            return "its scores are scaled after they are capped"
        if self.hidden and self.added and math.isfinite(self.fill):  # where all is hidden, the sums have few digits
            return "its scores are scaled after a mask that hides and one that is added"
        added = tuple((mask, own * factor) for mask, own in self.added)
        return replace(self, scale=self.scale * factor, fill=self.fill * factor, added=added)


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
    elif node.name == "transpose":
        found = _turned_scores(node, graph)
    elif node.name == "reshape":
        found = _split(node, graph)
    else:
        return None
    if isinstance(found, _Scores) and graph.use_count(value) > 1:
        return "its scores are used by others as well"
    return found


def _turned_scores(node: Node, graph: Graph) -> _Scores | str | None:
    found = _read(node.inputs[0], graph) if tuple(node.attrs["perm"]) == _swapped(node.output.type.rank) else None
    if not isinstance(found, _Scores):
        return found
    return (
        "its scores are transposed after they are masked"
        if found.is_masked
        else replace(found, turned=not found.turned)
    )


def _split(node: Node, graph: Graph) -> _Scores | str | None:
    before, after = node.inputs[0].type.shape, node.output.type.shape
    found = _read(node.inputs[0], graph) if before[-2:] == after[-2:] and min(len(before), len(after)) > 2 else None
    if not isinstance(found, _Scores):
        return found
    pairs = list(zip(before[::-1], after[::-1], strict=False))
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))  # last axes that stay
    masks = [mask.type.shape for mask, _ in (*found.hidden, *found.added)]
    repeated = all(len(shape) <= len(after) and all(extent == 1 for extent in shape[:-same]) for shape in masks)
    if not repeated or found.factors:
        return "its heads are split or joined after they are masked or scaled"
    if any(value.type.shape[:-2] != found.product.output.type.shape[:-2] for value in found.product.inputs):
        return "its heads are split or joined after queries or keys are repeated"
    return replace(found, lead=after[:-2])


def _capped(node: Node, graph: Graph) -> _Scores | str | None:
    """``tanh(scores / cap) * cap``"""
    for x, factor in (node.inputs, node.inputs[::-1]):
        curve, cap = graph.producer.get(x), _number(factor, graph)
        if curve is None or curve.name != "tanh" or x.type != node.output.type or not cap:
            continue
        found = _read(curve.inputs[0], graph)
        if not isinstance(found, _Scores):
            return found
        if found.is_masked or math.isfinite(found.cap) or graph.use_count(x) > 1 or cap < 0:
            return "its scores are masked, capped or used before they are capped"
        return replace(found, scale=found.scale * cap, cap=cap)
    return None


def _scaled(node: Node, graph: Graph) -> _Scores | str | None:
    if node.name == "mul" and (capped := _capped(node, graph)) is not None:
        return capped
    for x, factor in (node.inputs, node.inputs[::-1])[: 1 if node.name == "div" else 2]:
        number, numbers = _number(factor, graph), _of_matrices(factor, graph)
        if x.type != node.output.type or (not number and numbers is None):
            continue
        found = _read(x, graph)
        if not isinstance(found, _Scores):
            return found
        if number:
            return found.scaled(1 / number if node.name == "div" else number)
        if found.is_masked or math.isfinite(found.cap):
            return "the scale of each head comes after the mask or the cap"
        assert numbers is not None
        return replace(found, factors=(*found.factors, 1 / numbers if node.name == "div" else numbers))
    return None


def _of_matrices(value: Value, graph: Graph) -> Array | None:
    """A constant of one number for each matrix, none of them zero."""
    array = graph.constant_value(value)
    if array is None or array.ndim < 2 or array.shape[-2:] != (1, 1) or array.dtype.kind != "f":
        return None
    return array if np.all(np.isfinite(array) & (array != 0)) else None


def _shifted(node: Node, graph: Graph) -> _Scores | str | None:
    for x, mask in (node.inputs, node.inputs[::-1]):
        if x.type != node.output.type:
            continue
        found = _read(x, graph)
        if isinstance(found, _Scores):
            return replace(found, added=(*found.added, (mask, 1.0)))
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
            if found.added or (found.hidden and fill != found.fill):
                return TWO_MASKS
            return replace(found, hidden=(*found.hidden, (mask, inverted)), fill=fill)
        if found is not None:
            return found
    return None


TWO_MASKS = "a mask hides after another one that is added, or by another number"


def _number(value: Value, graph: Graph) -> float | None:
    """A constant of one element."""
    array = graph.constant_value(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind == "f" else None


class Attention(Rule):
    """softmax(mask(q kᵀ * scale)) v -> attention(q, k, v, mask)"""

    pattern = P("matmul", P("softmax", "scores", bind="softmax"), "v")
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        apart, softmax = _apart(m["scores"], graph), m.nodes["softmax"]
        scores = _read(apart, graph)
        if scores is None or softmax.attrs["axis"] % m["scores"].type.rank != m["scores"].type.rank - 1:
            return Miss()
        if isinstance(scores, str):
            return Miss(f"this is no attention: {scores}")
        q, k = _operands(scores)
        if apart is not m["scores"] and m["v"].type.shape[:-2] != m["scores"].type.shape[:-2]:
            return Miss("this is no attention: its heads are joined in another way than those of its values")
        if graph.use_count(softmax.output) > 1:
            return Miss("this is no attention: its weights are used by others as well")
        if any(graph.constant_value(value) is not None for value in (k, m["v"])):
            return Miss(
                "this is no attention: its keys or values are constant, and products with packed weights are faster"
            )
        if min(q.type.rank, k.type.rank, m["v"].type.rank) < 3:
            return Miss("this is no attention: without a batch or heads it would be one task")
        depth = scores.product.inputs[0].type.shape[-1]
        if not all(isinstance(d, int) for d in (depth, m["v"].type.shape[-1])):
            return Miss("the depth of its heads is symbolic")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        apart, v = _apart(m["scores"], graph), m["v"]
        scores = _read(apart, graph)
        assert isinstance(scores, _Scores)
        if apart is not m["scores"]:
            v = b("reshape", v, shape=(*apart.type.shape[:-2], *v.type.shape[-2:]))
        (q, of_q), (k, of_k) = (_factor(b, x, graph) for x in _operands(scores))
        q, k = (_turned(b, q, graph), k) if scores.turned else (q, _turned(b, k, graph))
        if scores.lead is not None:
            q, k = (b("reshape", x, shape=(*scores.lead, *x.type.shape[-2:])) for x in (q, k))
        for numbers in scores.factors:
            q = b("mul", q, b.constant(numbers))
        scale, masks = scores.scale * of_q * of_k, _masks(b, scores)
        result = b("attention", q, k, v, *masks, scale=scale, fill=scores.fill, cap=scores.cap)
        return result if v is m["v"] else b("reshape", result, shape=m.node.output.type.shape)


def _apart(value: Value, graph: Graph) -> Value:
    """Scores before their leading axes are joined, as those of windows that had masks of their own; the scores themselves elsewhere."""
    node = graph.producer.get(value)
    if node is None or node.name != "reshape" or graph.use_count(value) > 1:
        return value
    (x,) = node.inputs
    return x if x.type.rank > 2 and x.type.shape[-2:] == value.type.shape[-2:] else value


def _operands(scores: _Scores) -> tuple[Value, Value]:
    """What of the product has the queries, and what has the keys; of a product of transposes the transpose is still to be taken."""
    first, second = scores.product.inputs
    return (second, first) if scores.turned else (first, second)


def _masks(b: GraphBuilder, scores: _Scores) -> list[Value]:
    """What hides as one mask, and what is added in its order: another one would round what a mask has all but hidden in another way."""
    kept = [b("logical_not", v) if hides else v for v, hides in scores.hidden]
    added = [mask if factor == 1 else b("mul", mask, factor) for mask, factor in scores.added]
    return [*([reduce(partial(b, "logical_and"), kept)] if kept else []), *added]


class TurnedWeights(Rule):
    """matmul(v, transpose(weights of attention)) -> transpose(matmul(weights, transpose(v)))"""

    pattern = P("matmul", "v", P("transpose", P("softmax", "scores", bind="softmax"), bind="turned"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        turned, rank = m.nodes["turned"], m["v"].type.rank
        swaps = tuple(turned.attrs["perm"]) == _swapped(turned.output.type.rank) and turned.output.type.rank == rank
        known = isinstance(_read(m["scores"], graph), _Scores) and graph.constant_value(m["v"]) is None
        lone = max(graph.use_count(m.nodes[name].output) for name in ("softmax", "turned")) == 1
        along = m.nodes["softmax"].attrs["axis"] % rank == rank - 1
        return None if swaps and known and lone and along and rank > 2 and _is_wide(m["scores"]) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        perm = _swapped(m["v"].type.rank)
        result = b("matmul", m.nodes["softmax"].output, b("transpose", m["v"], perm=perm))
        return b("transpose", result, perm=perm)


class SoftmaxOverKeys(Rule):
    """softmax(scores, axis = -2) -> transpose(softmax(transpose(scores))), where a product takes its columns as weights"""

    _softmax = P("softmax", "scores", bind="softmax")
    pattern = AnyOf(P("transpose", _softmax), _softmax)

    def check(self, m: Match, graph: Graph) -> Miss | None:
        softmax, rank = m.nodes["softmax"], m["scores"].type.rank
        along = rank > 2 and softmax.attrs["axis"] % rank == rank - 2 and graph.use_count(softmax.output) == 1
        if not along or not _is_wide(m["scores"]):
            return Miss()
        if m.node is softmax:
            users = graph.users.get(softmax.output, ())
            fits = any(user.name == "matmul" and user.inputs[1] is softmax.output for user in users)
        else:
            fits = tuple(m.node.attrs["perm"]) == _swapped(rank)
        if not fits:
            return Miss()
        scores = _read(m["scores"], graph)
        if scores is None:
            return Miss()
        if isinstance(scores, str):
            return Miss(f"this is no attention: {scores}")
        return Miss("this is no attention yet: its masks are those of transposed scores") if scores.is_masked else None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        perm = _swapped(m["scores"].type.rank)
        weights = b("softmax", b("transpose", m["scores"], perm=perm), axis=-1)
        return b("transpose", weights, perm=perm) if m.node is m.nodes["softmax"] else weights


def _is_wide(scores: Value) -> bool:
    """Whether scores have more than 16 bits, of which `Attention` would decline to make one op: turning them would serve nobody."""
    return scores.type.dtype.bits >= 32


def _swapped(rank: int) -> tuple[int, ...]:
    """The order of axes with the last two exchanged."""
    return (*range(rank - 2), rank - 1, rank - 2)


def _factor(b: GraphBuilder, value: Value, graph: Graph) -> tuple[Value, float]:
    """The value that a product with a number scales, and the number; the value itself, and 1, where there is none."""
    node = graph.producer.get(value)
    if node is None or graph.use_count(value) > 1:
        return value, 1.0
    if node.name == "transpose":
        inner, number = _factor(b, node.inputs[0], graph)
        return (value, 1.0) if number == 1 else (b("transpose", inner, perm=node.attrs["perm"]), number)
    if node.name in ("mul", "div"):
        for x, factor in (node.inputs, node.inputs[::-1])[: 1 if node.name == "div" else 2]:
            found = _number(factor, graph)
            if found and x.type == value.type:
                return x, 1 / found if node.name == "div" else found
    return value, 1.0


def _turned(b: GraphBuilder, value: Value, graph: Graph) -> Value:
    """The transpose of the last two axes; where that is undone, what was transposed."""
    perm = _swapped(value.type.rank)
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


RULES: tuple[Rule, ...] = (Attention(), SoftmaxOverKeys(), TurnedWeights(), SharedHeads(), MergedHeads())
LOOSE_RULES: tuple[Rule, ...] = (CausalMask(),)

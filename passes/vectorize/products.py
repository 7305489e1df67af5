"""What lanes do before and after products: columns of one wide product stay columns, and a sum of products becomes one product."""

from __future__ import annotations

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, P, Rule, Trait, Value
from mlec.ir.dim import static

BOUNDED = frozenset({"softmax", "sigmoid", "one_hot"})
"""Their results are numbers from 0 to 1, or NaN: what they weigh overflows no sooner before a product than after it."""


class ColumnsOfLanes(Rule):
    """f(reshape(x, [.., lanes, k]), constants) -> reshape(f(x, constants), [.., lanes, k]), where x is a product or what follows it"""

    pattern = P(Trait.ELEMENTWISE)

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _split_operand(m, graph) is not None else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        place = _split_operand(m, graph)
        assert place is not None
        shape = m.node.output.type.shape
        lanes = shape[-2:]

        def flat(value: Value) -> Value:
            if value.type.rank == 0:
                return value
            own = value.type.shape[-2:]
            whole = value if own == lanes else b("broadcast_to", value, shape=(*value.type.shape[:-2], *lanes))
            return b("reshape", whole, shape=(static(lanes[0]) * static(lanes[1]),))

        (x,) = graph.producer[m.node.inputs[place]].inputs
        operands = [x if i == place else flat(v) for i, v in enumerate(m.node.inputs)]
        return b("reshape", b(m.node.name, *operands, **m.node.attrs), shape=shape)


class SumOfProducts(Rule):
    """sum(matmul(x, w), over lanes in front) -> matmul(columns of all lanes of x, rows of all lanes of w)"""

    pattern = P("sum", P("matmul", "x", Const(bind="w"), bind="product"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        x, w = m["x"].type, m["w"].type
        lanes = x.shape[0]
        fits = _over_lanes(m) and w.rank == x.rank and w.shape[0] == lanes and set(w.shape[1:-2]) <= {1}
        return None if fits and graph.use_count(m.nodes["product"].output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, w = m["x"], m["w"]
        last = x.type.rank - 1
        lanes, k, n = static(x.type.shape[0]), static(x.type.shape[last]), static(w.type.shape[last])
        beside = b("transpose", x, perm=(*range(1, last), 0, last))
        wide = b("reshape", beside, shape=(*x.type.shape[1:last], lanes * k))
        return b("matmul", wide, b("reshape", w, shape=(lanes * k, n)))


class SumOfWeighted(Rule):
    """sum(matmul(x, w) * g, over lanes in front) -> sum(matmul(x * g, w), over lanes), where g has one number from 0 to 1 for each row"""

    pattern = P("sum", P("mul", P("matmul", "x", Const(bind="w"), bind="product"), "g", bind="weighted"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _over_lanes(m) and _weighs_rows(m, graph, m["x"]) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sum", b("matmul", b("mul", m["x"], m["g"]), m["w"]), axes=(0,))


class SumOfWeightedOffsets(Rule):
    """sum((matmul(x, w) + c) * g, over lanes in front) -> sum(matmul(x, w) * g, over lanes) + matmul(g of all lanes, c of all lanes)"""

    _product = P("matmul", "x", Const(), bind="product")
    pattern = P("sum", P("mul", P("add", _product, Const(bind="c"), bind="offset"), "g", bind="weighted"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        c, product = m["c"].type, m.nodes["product"].output.type
        own = c.rank == product.rank and c.shape == (product.shape[0], *(1,) * (product.rank - 2), product.shape[-1])
        return None if own and _over_lanes(m) and _weighs_rows(m, graph, m["x"]) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        g, c, product = m["g"], m["c"], m.nodes["product"].output
        last = g.type.rank - 1
        lanes = static(g.type.shape[0])
        beside = b("transpose", g, perm=(*range(1, last), 0, last))
        weights = b("reshape", beside, shape=(*g.type.shape[1:last], lanes))
        offsets = b("matmul", weights, b("reshape", c, shape=(lanes, static(c.type.shape[-1]))))
        return b("add", b("sum", b("mul", product, g), axes=(0,)), offsets)


PRODUCTS: tuple[Rule, ...] = (SumOfProducts(), SumOfWeighted(), SumOfWeightedOffsets(), ColumnsOfLanes())


def _split_operand(m: Match, graph: Graph) -> int | None:
    """The operand that is the columns of a product cut into lanes; None if there is none, or not all others are constants."""
    node = m.node
    others = [i for i, v in enumerate(node.inputs) if graph.constant_value(v) is None]
    if len(others) != 1 or len(node.outputs) != 1:
        return None
    cut = node.inputs[others[0]]
    reshape = graph.producer.get(cut)
    if (
        reshape is None
        or reshape.name != "reshape"
        or graph.use_count(cut) != 1
        or cut.type.shape != node.output.type.shape
    ):
        return None
    (x,) = reshape.inputs
    product = graph.producer.get(x)
    made = product is not None and (product.name == "matmul" or product.op.has(Trait.ELEMENTWISE))
    shape = cut.type.shape
    if not made or x.type.rank != cut.type.rank - 1 or x.type.shape[:-1] != shape[:-2] or graph.use_count(x) != 1:
        return None
    for i, value in enumerate(node.inputs):
        if i != others[0] and set(value.type.shape[:-2]) - {1}:
            return None  # it differs between the rows
    return others[0]


def _over_lanes(m: Match) -> bool:
    """Whether the matched sum is over axis 0 alone, of a product of at least three axes by weights for each of it."""
    product = m.nodes["product"].output.type
    attrs = m.node.attrs
    return (
        attrs["axes"] in ((0,), (-product.rank,))
        and not attrs["keepdims"]
        and product.rank >= 3
        and product.dtype.is_float
    )


def _weighs_rows(m: Match, graph: Graph, x: Value) -> bool:
    """Whether the matched factor has one number for each row of each lane, none above 1, and nothing else reads what is in between."""
    g = m["g"]
    inner = [m.nodes[name].output for name in ("product", "weighted", "offset") if name in m.nodes]
    alone = all(graph.use_count(v) == 1 for v in inner)
    return alone and g.type.shape == (*x.type.shape[:-1], 1) and _is_bounded(graph, g)


def _is_bounded(graph: Graph, value: Value) -> bool:
    node = graph.producer.get(value)
    while node is not None and (node.op.has(Trait.VIEW) or node.name in ("slice", "transpose")):
        node = graph.producer.get(node.inputs[0])
    return node is not None and node.name in BOUNDED

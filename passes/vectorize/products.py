"""What lanes do before and after products: columns of one wide product stay columns, and a sum of products becomes one product."""

from __future__ import annotations

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Trait, Value
from mlec.ir.dim import product, static
from mlec.ops.rows import MAX_COLUMNS, most_columns, rows_of

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


class RowsOfLanes(Rule):
    """matmul(x, w) -> reshape(matmul(rows of all lanes of x, w)), where it is narrow enough for a kernel with what follows"""

    pattern = P("matmul", "x", Const(bind="w"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        x, w = m["x"].type, m["w"].type
        most = most_columns(product(x.shape[:-1]))
        narrow = w.rank == 2 and static(w.shape[1]) <= most and static(w.shape[0]) <= MAX_COLUMNS
        users = graph.users.get(m.node.output, ())
        follows = graph.use_count(m.node.output) == 1 and any(_by_row(user, graph) for user in users)
        return None if x.rank > 2 and narrow and follows else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x = m["x"]
        rows = b("reshape", x, shape=(product(x.type.shape[:-1]), x.type.shape[-1]))
        return b("reshape", b("matmul", rows, m["w"]), shape=m.node.output.type.shape)


class ColumnsOfRows(Rule):
    """f(reshape(x, rows cut into lanes), constants) -> reshape(f(x, constants)), where f works on each row by itself"""

    pattern = AnyOf(P(Trait.ELEMENTWISE), P("softmax|log_softmax"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _cut_rows(m, graph) is not None else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        place = _cut_rows(m, graph)
        assert place is not None
        (x,) = graph.producer[m.node.inputs[place]].inputs
        operands = [x if i == place else v for i, v in enumerate(m.node.inputs)]
        attrs = {**m.node.attrs, "axis": 1} if _over_columns(m.node) else m.node.attrs
        return b("reshape", b(m.node.name, *operands, **attrs), shape=m.node.output.type.shape)


PRODUCTS: tuple[Rule, ...] = (
    SumOfProducts(), SumOfWeighted(), SumOfWeightedOffsets(), ColumnsOfLanes(), RowsOfLanes(), ColumnsOfRows(),
)  # fmt: skip


def _over_columns(node: Node) -> bool:
    """Whether it is a softmax over the last axis."""
    return (
        node.name in ("softmax", "log_softmax")
        and node.attrs["axis"] % node.output.type.rank == node.output.type.rank - 1
    )


def _by_row(node: Node, graph: Graph) -> bool:
    """Whether it does the same to each row of one operand, wherever that is."""
    others = [v for v in node.inputs if graph.constant_value(v) is None]
    same = all(v.type.rank <= 1 for v in node.inputs if graph.constant_value(v) is not None)
    return len(others) == 1 and same and (node.op.has(Trait.ELEMENTWISE) or _over_columns(node))


def _cut_rows(m: Match, graph: Graph) -> int | None:
    """The operand that is a matrix whose rows are cut into several axes; None if there is none, or rows do not stay apart."""
    if not _by_row(m.node, graph):
        return None
    place = next(i for i, v in enumerate(m.node.inputs) if graph.constant_value(v) is None)
    cut = m.node.inputs[place]
    reshape = graph.producer.get(cut)
    if reshape is None or reshape.name != "reshape" or graph.use_count(cut) != 1:
        return None
    (x,) = reshape.inputs
    made = graph.producer.get(x)
    by_row = made is not None and rows_of(made) is not None
    same = cut.type.shape == m.node.output.type.shape and x.type.shape[-1] == cut.type.shape[-1]
    return place if by_row and same and x.type.rank == 2 < cut.type.rank else None


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
    maker = graph.producer.get(x)
    made = maker is not None and (maker.name == "matmul" or maker.op.has(Trait.ELEMENTWISE))
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

"""One test for every op, present and future: it feeds on the samplers of the registry."""

from __future__ import annotations

import numpy as np
import pytest

import mlec.ops
from mlec.errors import TypeRuleError
from mlec.ir import (
    OPS,
    ConstantRef,
    DType,
    Graph,
    GraphBuilder,
    SymDim,
    TensorType,
    Trait,
    parse_graph,
    print_graph,
    run_graph,
    verify,
)
from mlec.ir.dim import evaluate
from mlec.ir.op import SYMBOLIC_EXTENT, AttrKind, Attrs, Case, OpDef
from tests.ops.special_values import special_case

assert mlec.ops.OPS is OPS
SAMPLES = 6
SAMPLED = [op for op in OPS.values() if op.name != "constant"]
N = SymDim.named("n")


def cases(op: OpDef) -> list[Case]:
    return [op.sample(np.random.default_rng(seed)) for seed in range(SAMPLES)]


def types_of(case: Case) -> list[TensorType]:
    return [TensorType(a.shape, DType.of(a)) for a in case.operands]


def symbolic(value: object) -> object:
    """Multiples of the marked extent become multiples of the symbol."""
    if isinstance(value, int) and not isinstance(value, bool) and value and value % SYMBOLIC_EXTENT == 0:
        return N * (value // SYMBOLIC_EXTENT)
    return tuple(symbolic(v) for v in value) if isinstance(value, tuple) else value


def symbolic_types(case: Case) -> list[TensorType]:
    return [TensorType(symbolic(t.shape), t.dtype) for t in types_of(case)]  # type: ignore[arg-type]


def symbolic_attrs(op: OpDef, attrs: Attrs) -> Attrs:
    dims = {a.name for a in op.attrs if a.kind.name in ("DIM", "DIMS")}
    return {k: symbolic(v) if k in dims else v for k, v in attrs.items()}


def one_op_graph(op: OpDef, case: Case) -> Graph:
    """The op alone. The last input, which nothing reads, gives the symbol its value."""
    b = GraphBuilder(f"one_{op.name}")
    inputs = [b.input(f"x{i}", t) for i, t in enumerate(symbolic_types(case))]
    b.input("batch", TensorType((N,), DType.BOOL))
    return b.finish(b.multi(op, *inputs, **symbolic_attrs(op, case.attrs)))


def inputs_of(case: Case) -> list[np.ndarray]:
    return [*case.operands, np.zeros(SYMBOLIC_EXTENT, bool)]


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
class TestEveryOp:
    def test_inferred_types_are_those_of_the_reference(self, op: OpDef) -> None:
        for case in cases(op):
            attrs = op.complete_attrs(case.attrs)
            results = op.evaluate(case.operands, attrs, {})
            stated = op.result_types(types_of(case), attrs)
            assert [(r.shape, DType.of(r)) for r in results] == [(t.shape, t.dtype) for t in stated]

    def test_samples_cover_the_values_of_attributes(self, op: OpDef) -> None:
        drawn = [op.complete_attrs(op.sample(np.random.default_rng(seed)).attrs) for seed in range(40)]
        for attr in op.attrs:
            possible = set(attr.choices) or ({False, True} if attr.kind is AttrKind.BOOL else set())
            assert possible <= {attrs[attr.name] for attrs in drawn if possible}, f"{op.name}: {attr.name}"

    def test_symbolic_inference_evaluates_to_concrete_inference(self, op: OpDef) -> None:
        for case in cases(op):
            attrs = op.complete_attrs(symbolic_attrs(op, case.attrs))
            stated = op.result_types(symbolic_types(case), attrs)
            concrete = op.result_types(types_of(case), op.complete_attrs(case.attrs))
            bound = [tuple(evaluate(d, {"n": SYMBOLIC_EXTENT}) for d in t.shape) for t in stated]
            assert bound == [t.shape for t in concrete]

    def test_text_form_round_trips_and_computes_the_same(self, op: OpDef) -> None:
        for case in cases(op):
            graph = one_op_graph(op, case)
            verify(graph)
            again = parse_graph(print_graph(graph))
            assert print_graph(again) == print_graph(graph)
            for a, b in zip(run_graph(graph, inputs_of(case)), run_graph(again, inputs_of(case)), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_cost_is_not_negative_and_grows_with_the_batch(self, op: OpDef) -> None:
        for case in cases(op):
            cost = one_op_graph(op, case).cost
            small, large = (
                [evaluate(d, {"n": n}) for d in (cost.flops, cost.bytes)]
                for n in (SYMBOLIC_EXTENT, 10 * SYMBOLIC_EXTENT)
            )
            assert 0 <= small[0] <= large[0]
            assert 0 < small[1] <= large[1]

    def test_no_operand_is_modified(self, op: OpDef) -> None:
        for case in cases(op):
            before = [a.copy() for a in case.operands]
            op.evaluate(case.operands, op.complete_attrs(case.attrs), {})
            for a, b in zip(before, case.operands, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_traits_hold(self, op: OpDef) -> None:
        for case in cases(op):
            check_traits(op, case)

    def test_laws_hold_for_special_values(self, op: OpDef) -> None:
        case = special_case(op, np.random.default_rng(0))
        if case is not None:
            with np.errstate(all="ignore"):
                check_traits(op, case, ordered=False)

    def test_an_unknown_attribute_is_refused(self, op: OpDef) -> None:
        with pytest.raises(TypeRuleError, match="no attribute 'surprise'"):
            op.complete_attrs({"surprise": 1})

    def test_too_few_operands_are_refused(self, op: OpDef) -> None:
        if op.min_operands:
            with pytest.raises(TypeRuleError, match="operands"):
                op.result_types([], op.complete_attrs(cases(op)[0].attrs))

    def test_has_a_line_of_documentation(self, op: OpDef) -> None:
        assert 2 < len(op.doc) < 160


def check_traits(op: OpDef, case: Case, ordered: bool = True) -> None:
    """``ordered``: whether the values are, which NaN is not."""
    attrs = op.complete_attrs(case.attrs)

    def run(*operands: np.ndarray) -> np.ndarray:
        return op.evaluate(operands, attrs, {})[0]

    first = run(*case.operands)
    if op.has(Trait.COMMUTATIVE):
        np.testing.assert_array_equal(first, run(*reversed(case.operands)))
    if op.has(Trait.IDEMPOTENT):
        np.testing.assert_array_equal(first, run(first))
    if op.has(Trait.INVOLUTION):
        np.testing.assert_array_equal(case.operands[0], run(first))
    if op.has(Trait.MONOTONE) and ordered:
        values = run(np.sort(case.operands[0].ravel()))
        slack = 4 * op.tolerance * np.spacing(np.abs(values[1:]))  # rounding may swap neighbours
        assert (np.diff(values) >= -slack).all()
    if op.has(Trait.ELEMENTWISE):
        shape = np.broadcast_shapes(*(a.shape for a in case.operands))
        for operand in case.operands:
            if operand.shape == shape:
                flipped = [np.flip(np.broadcast_to(a, shape)) for a in case.operands]
                np.testing.assert_allclose(first, np.flip(run(*flipped)), rtol=1e-6)
                break
    if op.has(Trait.VIEW):
        np.testing.assert_array_equal(np.sort(first.ravel()), np.sort(case.operands[0].ravel()))


def test_constants_round_trip_bit_for_bit() -> None:
    b = GraphBuilder("constants")
    x = b.input("x", TensorType((N, 2), DType.F32))
    weights = np.array([np.nan, -0.0], np.float32)
    graph = b.finish(
        [b("add", b("mul", x, -0.0), b.constant(weights, "w")), b("mul", x, 0.1), b.constant(float("nan"))]
    )
    again = parse_graph(print_graph(graph), graph.constants)
    assert print_graph(again) == print_graph(graph)
    assert again.digest == graph.digest
    assert again.constants["w"].tobytes() == weights.tobytes()
    assert any(isinstance(n.attrs["value"], ConstantRef) for n in again.nodes if n.is_constant)


@pytest.mark.parametrize(("mode", "before", "fits"), [("reflect", 3, True), ("reflect", 4, False), ("edge", 9, True)])
def test_a_reflection_is_shorter_than_its_axis(mode: str, before: int, fits: bool) -> None:
    pad = OPS["pad"]
    attrs = pad.complete_attrs({"before": (0, before), "after": (0, 0), "mode": mode})
    kind = TensorType((N, 4), DType.F32)
    if fits:
        assert pad.result_types([kind], attrs)[0].shape == (N, 4 + before)
    else:
        with pytest.raises(TypeRuleError, match="axis 1 of extent 4 is too short to pad by 4"):
            pad.result_types([kind], attrs)

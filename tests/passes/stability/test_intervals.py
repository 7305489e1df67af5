"""Intervals against the reference: every op of the registry, on its own samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

import mlec.ops
from mlec.ir import OPS, DType, GraphBuilder, TensorType, Value, run_graph, tensor
from mlec.ir.op import OpDef
from mlec.passes.stability.intervals import FULL, RULES, Interval, interval_of, value_intervals
from mlec.passes.stability.wide import WideGraph, wider

assert mlec.ops.OPS is OPS
SAMPLED = [op for op in OPS.values() if op.name not in ("constant", "fused")]


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
def test_every_result_lies_in_its_interval(op: OpDef) -> None:
    for seed in range(8):
        case = op.sample(np.random.default_rng(seed))
        b = GraphBuilder("one")
        inputs = [b.input(f"x{i}", TensorType(a.shape, DType.of(a))) for i, a in enumerate(case.operands)]
        outputs = b.multi(op, *inputs, **case.attrs)
        graph = b.finish(outputs)
        known = value_intervals(graph, {v: interval_of(a) for v, a in zip(inputs, case.operands, strict=True)})
        for value, array in zip(outputs, run_graph(graph, case.operands), strict=True):
            found = known[value]
            slack = 1e-2 * max(1.0, *(abs(end) for end in (found.lo, found.hi) if math.isfinite(end)), 1.0)
            numbers = array.astype(np.float64)
            numbers = numbers[np.isfinite(numbers)]
            assert not numbers.size or (found.lo - slack <= numbers.min() and numbers.max() <= found.hi + slack), (
                f"seed {seed}: {interval_of(array)} outside of {found}"
            )


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
def test_every_op_runs_in_a_wider_precision(op: OpDef) -> None:
    case = op.sample(np.random.default_rng(1))
    b = GraphBuilder("one")
    inputs = [b.input(f"x{i}", TensorType(a.shape, DType.of(a))) for i, a in enumerate(case.operands)]
    outputs = b.multi(op, *inputs, **case.attrs)
    graph = b.finish(outputs)
    for dtype in {np.dtype(np.longdouble), wider(graph)}:
        wide = WideGraph(graph, dtype).run(case.operands)
        for value, narrow, result in zip(outputs, run_graph(graph, case.operands), wide, strict=True):
            assert result.shape == narrow.shape
            assert (result.dtype == dtype) == value.type.dtype.is_float
            if (
                op.name not in ("floor", "ceil", "round", "trunc", "floordiv", "mod", "sign")
                and value.type.dtype.is_float
            ):
                expected = narrow.astype(np.float64)
                assert np.allclose(expected, result.astype(np.float64), rtol=0.02, atol=0.02, equal_nan=True)


def test_rules_are_of_ops_that_exist() -> None:
    assert set(RULES) <= set(OPS)


def test_an_op_without_a_rule_can_have_any_result() -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 3)))
    y = b("tan", x)
    assert value_intervals(b.finish([y]), {x: Interval(0.0, 1.0)})[y] == FULL


@pytest.mark.parametrize("shape", [("n", 6), (6, 6)])
@pytest.mark.parametrize("keepdims", [True, False])
def test_what_its_own_maximum_is_subtracted_from_is_not_positive(shape: tuple[int | str, ...], keepdims: bool) -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", shape))
    top = b("max", x, axes=(1,), keepdims=keepdims)
    shifted = b("sub", x, top if keepdims else b("reshape", top, shape=(shape[0], 1)))
    assert value_intervals(b.finish([shifted]), {x: Interval(-5.0, 5.0)})[shifted] == Interval(-10.0, 0.0)


def test_a_maximum_along_another_axis_is_no_bound() -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", (6, 6)))
    shifted = b("sub", x, b("max", x, axes=(1,)))  # of other rows than those it is subtracted from
    assert value_intervals(b.finish([shifted]), {x: Interval(-5.0, 5.0)})[shifted] == Interval(-10.0, 10.0)


def test_a_square_is_not_negative() -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 3)))
    square: Value = b("mul", x, x)
    root = b("sqrt", b("mean", square, axes=(1,)))
    known = value_intervals(b.finish([root]), {x: Interval(-3.0, 2.0)})
    assert known[square] == Interval(0.0, 9.0)
    assert known[root] == Interval(0.0, 3.0)

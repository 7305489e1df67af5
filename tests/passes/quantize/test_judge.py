"""How well a layer does on 8 bits, and whether it is certain to be faster: against the graphs themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from mlec.ir import DType, Graph, GraphBuilder, Value, run_graph, tensor
from mlec.ir.op import Array
from mlec.passes.quantize import QuantizeInt8
from mlec.passes.quantize.emit import emit
from mlec.passes.quantize.judge import MOST_ROWS, signal_to_noise
from mlec.passes.quantize.layers import find_layers
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.plans import Plan, plan_of
from mlec.passes.quantize.race import predicted
from mlec.passes.quantize.statistics import watch
from mlec.pipeline import PassContext, TargetFacts


def numbers(*shape: int) -> Array:
    """Normal numbers, the same for a shape whichever tests have run before."""
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def single(op: str, weights: Array, *shape: int, **attrs: Any) -> tuple[Graph, Plan]:
    """A graph of one layer with a bias, and its plan for normal inputs."""
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.F32, ("n", *shape)))
    bias = numbers(weights.shape[0], 1, 1) if op == "conv" else numbers(weights.shape[-1])
    graph = b.finish([b("add", b(op, x, b.constant(weights), **attrs), b.constant(bias))])
    (layer,) = find_layers(graph)[0]
    return graph, plan_of(layer, "int8", Affine.of(-3.0, 3.0))


def judged(plan: Plan, x: Array) -> float:
    def parts() -> Iterator[Mapping[Value, Array]]:
        yield {plan.layer.input: x}

    return signal_to_noise({plan.layer: [plan]}, {plan.layer.input: bool(np.isfinite(x).all())}, parts)[plan]


def measured(graph: Graph, plan: Plan, x: Array) -> float:
    """By the graph with the layer on 8 bits."""
    wanted, got = (run_graph(one, [x])[0].astype(np.float64) for one in (graph, emit(graph, [plan])))
    return float(10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2)))


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"pads": (1, 2, 0, 1)},
        {"strides": (2, 1), "pads": (1, 1, 1, 1)},
        {"dilations": (2, 3), "pads": (2, 3, 2, 3)},
        {"groups": 3, "pads": (1, 1, 1, 1)},
        {"groups": 6},
    ],
    ids=str,
)
def test_a_convolution_is_judged_by_its_windows(attrs: dict[str, Any]) -> None:
    graph, plan = single("conv", numbers(6, 6 // attrs.get("groups", 1), 3, 2), 6, 9, 8, **attrs)
    x = numbers(3, 6, 9, 8)
    assert judged(plan, x) == pytest.approx(measured(graph, plan, x), abs=1e-3)


def test_some_rows_tell_what_all_would() -> None:
    graph, plan = single("matmul", numbers(24, 40), 5, 24)
    # Numbers beyond the range would give a few rows most of the error, and which of them are drawn would decide.
    x = numbers(MOST_ROWS, 5, 24).clip(-3, 3)
    assert judged(plan, x) == pytest.approx(measured(graph, plan, x), abs=0.5)


def test_what_is_not_finite_is_seen_wherever_it_is() -> None:
    _, plan = single("matmul", numbers(4, 4), 4)
    x = numbers(1000 * MOST_ROWS, 4)
    x[-1, 0] = np.inf
    assert math.isnan(judged(plan, x))


def test_activations_are_computed_once_where_they_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plan = single("matmul", numbers(4, 4), 4)
    x = numbers(10, 4)
    for most, again in ((1 << 20, True), (0, False)):
        monkeypatch.setattr("mlec.passes.quantize.statistics.MOST_BYTES", most)
        value = plan.layer.output
        _, parts = watch(graph, [(value, -1)], [[x]], PassContext())
        first, second = (np.concatenate([part[value] for part in parts()]) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert (next(parts())[value] is next(parts())[value]) == again


def test_a_gain_is_predicted_where_it_is_certain() -> None:
    fast, slow = TargetFacts(byte_products=20.0), TargetFacts(byte_products=2.0)
    _, large = single("matmul", numbers(256, 256), 256)
    gain = predicted(large, 64, fast)
    assert gain is not None
    assert gain > 5
    assert predicted(large, 64, slow) is None
    assert predicted(large, 1, fast) is None, "the call of the kernel counts"
    _, narrow = single("conv", numbers(64, 1, 3, 3), 1, 64, 64)
    assert predicted(narrow, 64, fast) is None, "little of a step is used"
    _, grouped = single("conv", numbers(64, 32, 3, 3), 64, 32, 32, groups=2)
    assert predicted(grouped, 64, fast) is None


def test_only_windows_of_3_x_3_in_steps_of_one_may_save_products_in_float32() -> None:
    facts = TargetFacts(byte_products=4.0)
    for weights, attrs, certain in (
        ((64, 64, 3, 3), {}, False),
        ((64, 64, 3, 3), {"strides": (2, 2)}, True),
        ((64, 64, 3, 3), {"dilations": (2, 2)}, True),
        ((64, 64, 1, 1), {}, True),
        ((64, 64, 5, 5), {}, True),
    ):
        _, plan = single("conv", numbers(*weights), 64, 32, 32, **attrs)
        assert (predicted(plan, 64, facts) is not None) == certain, (weights, attrs)


def test_a_layer_of_certain_gain_is_not_timed() -> None:
    graph, _ = single("matmul", numbers(256, 256), 256)
    result = QuantizeInt8(calibration=numbers(64, 256)).run(graph, PassContext(TargetFacts(byte_products=20.0)))
    (finding,) = result.findings
    assert finding["decision"] == "int8"
    assert finding["int8_us"] is None
    assert finding["predicted_gain"] > 5
    assert "predicted" in finding["reason"]

"""The whole network within its budget: layers that ruin it, however well they do by themselves, go back to float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlec.ir import DType, Graph, GraphBuilder, run_graph, tensor, verify
from mlec.passes.quantize import QuantizeInt8
from mlec.passes.quantize.quantize import RUINS
from mlec.pipeline import PassContext, PassResult, Tolerance

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(200, 16)).astype(np.float32)


def weights(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)


def network(difference: float) -> Graph:
    """Scores of classes. The second layer has two halves that are the same but for a small part, which is all that the third one reads."""
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.F32, ("n", 16)))
    h = b("relu", b("matmul", x, b.constant(weights(16, 32))))
    half = weights(32, 24)
    twice = b("matmul", h, b.constant(np.concatenate([half, half + difference * weights(32, 24)], axis=1)))
    first, second = (b("slice", twice, axis=1, start=start, stop=start + 24) for start in (0, 24))
    left = b("mul", b("sub", second, first), b.constant(np.float32(1 / difference)))
    scores = b("matmul", b("relu", left), b.constant(4 * weights(24, 10)))
    return b.finish([scores])


def quantized(graph: Graph, **options: Any) -> PassResult:
    result = QuantizeInt8(calibration=ROWS, measure=False, **options).run(graph, PassContext())
    verify(result.graph)
    return result


def decisions(result: PassResult) -> list[str]:
    return [finding["decision"] for finding in result.findings]


def error(graph: Graph, other: Graph) -> float:
    wanted, got = run_graph(graph, [ROWS])[0], run_graph(other, [ROWS])[0]
    return float(np.sqrt(np.mean((wanted - got) ** 2) / np.mean(wanted**2)))


def test_a_network_that_stays_within_its_budget_is_left_alone() -> None:
    result = quantized(network(1.0))
    assert decisions(result) == ["int8"] * 3
    summary = result.summary
    assert (summary["layers"], summary["chosen"], summary["kept"], summary["rows"]) == (3, 3, 3, 200)
    assert 0 < summary["accuracy_loss"] < summary["max_accuracy_loss"] == 0.005
    assert summary["unguarded"] == {name: summary[name] for name in ("accuracy_loss", "changed_labels", "error")}
    assert all(finding["output_error"] is None for finding in result.findings)


def test_the_layer_that_ruins_it_goes_back_and_no_other() -> None:
    graph = network(0.01)
    result = quantized(graph)
    assert decisions(result) == ["int8", "float32", "int8"]
    first, ruining, last = result.findings
    assert ruining["sqnr_db"] > 35, "by itself it does well"
    assert ruining["reason"] == RUINS
    assert ruining["output_error"] > 0.2 > max(first["output_error"], last["output_error"])
    summary = result.summary
    assert (summary["chosen"], summary["kept"]) == (3, 2)
    assert summary["unguarded"]["accuracy_loss"] > 0.02
    assert summary["accuracy_loss"] <= 0.005
    assert error(graph, result.graph) == pytest.approx(summary["error"], rel=1e-3)
    (message,) = (remark.message for remark in result.remarks if RUINS in remark.message)
    assert "alone it moves the outputs by" in message


def test_no_loss_at_all_leaves_float32() -> None:
    graph = network(1.0)
    result = quantized(graph, tolerance=Tolerance())
    assert result.graph is graph
    assert decisions(result) == ["float32"] * 3
    assert result.summary["kept"] == 0


def test_a_budget_is_kept_whatever_it_is() -> None:
    graph = network(0.1)
    for budget in (1.0, 0.01, 0.001, 1e-4):
        result = quantized(graph, max_accuracy_loss=budget)
        assert result.summary["accuracy_loss"] <= budget
    assert result.summary["unguarded"]["accuracy_loss"] > 1e-4, "of what follows from the last one"


def test_of_outputs_that_are_no_scores_the_error_counts() -> None:
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.F32, ("n", 16)))
    h = b("relu", b("matmul", x, b.constant(weights(16, 64))))
    graph = b.finish([b("matmul", h, b.constant(weights(64, 1)))])
    free = quantized(graph)
    assert decisions(free) == ["int8"] * 2
    assert free.summary["accuracy_loss"] is None
    assert 1e-3 < free.summary["error"] < 0.1
    bounded = quantized(graph, max_error=free.summary["error"] * 0.9)
    assert "float32" in decisions(bounded)
    assert error(graph, bounded.graph) <= free.summary["error"] * 0.9


def test_the_tolerance_bounds_every_number() -> None:
    graph = network(1.0)
    wanted = run_graph(graph, [ROWS])[0]
    worst = np.abs(wanted - run_graph(quantized(graph).graph, [ROWS])[0]).max() / np.abs(wanted).max()
    result = quantized(graph, tolerance=Tolerance(rtol=float(worst) * 0.9))
    assert "float32" in decisions(result)
    assert np.abs(wanted - run_graph(result.graph, [ROWS])[0]).max() <= 0.9 * worst * np.abs(wanted).max()


def test_results_that_are_lost_are_beyond_every_budget() -> None:
    """A number of the first layer that is just below the bound of what is behind it is beyond it when it is rounded up."""
    b, w = GraphBuilder("net"), weights(16, 8)
    x = b.input("x", tensor(DType.F32, ("n", 16)))
    bound = b.constant(np.max(ROWS @ w, axis=0) * np.float32(1.0001))
    graph = b.finish([b("log", b("sub", bound, b("matmul", x, b.constant(w))))])
    result = quantized(graph, max_error=1e9, max_accuracy_loss=1.0, tolerance=Tolerance(rtol=1e9))
    assert np.isfinite(run_graph(graph, [ROWS])[0]).all()
    assert result.summary["unguarded"]["error"] is None
    assert np.isfinite(run_graph(result.graph, [ROWS])[0]).all()

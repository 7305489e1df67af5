"""The first seeds of each check; ``python -m tests.fuzz`` goes on from there."""

from __future__ import annotations

from inspect import isabstract
from pathlib import Path

import numpy as np
import pytest

from mlec import registry
from mlec.ir import DType, Graph, GraphBuilder, Rule, parse_graph, run_graph, tensor, verify
from mlec.ir.op import SYMBOLIC_EXTENT
from mlec.passes.canonicalize import Canonicalize
from mlec.passes.quantize import emit
from mlec.passes.recognize import norms, reductions
from mlec.pipeline import PassContext, PassResult
from mlec.tolerance import random_inputs
from tests.fuzz.checks import CHECKS, on_eight_bits
from tests.fuzz.compiled import Way, compiled
from tests.fuzz.graphs import SOURCES, Sample, random_sample
from tests.fuzz.rules import FILES, golden

AT_ONCE = 25
FOUND = sorted((Path(__file__).parent / "found").glob("*.mlet"))
"""The smallest graphs that showed defects, as the command writes them."""


@pytest.mark.parametrize(
    ("check", "start"),
    [("passes", i) for i in range(0, 500, AT_ONCE)]
    + [("twins", i) for i in range(500, 1000, AT_ONCE)]
    + [("rules", i) for i in range(1000, 1250, AT_ONCE)],
)
def test_random_graphs(check: str, start: int) -> None:
    for seed in range(start, start + AT_ONCE):
        defect = CHECKS[check](seed)
        assert defect is None, f"seed {seed}: {defect}"


@pytest.mark.parametrize("start", range(0, 500, AT_ONCE))
def test_compiled_graphs(start: int) -> None:
    for seed in range(start, start + AT_ONCE):
        defect = CHECKS["compiled"](seed)
        assert defect is None, f"seed {seed}: {defect}"


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_was_found_stays_mended(file: Path, level: str) -> None:
    graph = parse_graph(file.read_text())
    inputs = random_inputs(graph, np.random.default_rng(0), dict.fromkeys(graph.symbols, SYMBOLIC_EXTENT))
    defect = compiled(Sample(graph, inputs), Way(level, "", "cpu", 2, False, True, (SYMBOLIC_EXTENT, 1, 0, 33)))
    assert defect is None, str(defect)


def test_graphs_are_valid_connected_and_of_every_op() -> None:
    seen: set[str] = set()
    sizes = []
    for seed in range(250):
        sample = random_sample(seed)
        verify(sample.graph)
        assert all(np.isfinite(y).all() for y in run_graph(sample.graph, sample.inputs) if y.dtype.kind == "f")
        seen |= {node.name for node in sample.graph.nodes}
        reading = [v for node in sample.graph.compute_nodes for v in node.inputs]
        sizes.append(sum(v in sample.graph.producer for v in reading))
    assert seen >= set(SOURCES)
    assert np.mean(sizes) > 5


def test_every_rule_is_fuzzed() -> None:
    """Those of quantize-int8 are by `on_eight_bits`."""
    for name in registry.PASSES:
        registry.load("passes", name)
    applied: set[str] = set()
    for number in range(len(FILES)):
        graph, pipeline = golden(number)
        _, records = pipeline.run(graph)
        applied |= {remark.rule for record in records for remark in record.remarks if remark.kind == "applied"}
    ours = [kind for kind in _kinds(Rule) if kind.__module__.startswith("mlec.passes") and not isabstract(kind)]
    rules = {kind().name for kind in ours if not kind.__name__.startswith("_")}
    assert rules >= {"Attention", "FoldIntoWeights", "log-of-softmax"}
    assert rules - applied == {"Product", "Quotient"}


def _kinds(kind: type) -> set[type]:
    return {one for sub in kind.__subclasses__() for one in (sub, *_kinds(sub))}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result of tanh is off after canonicalize."""

    def wrong(self: Canonicalize, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for node in graph.nodes:
            b.keep(node)
            if node.name == "tanh":
                here = b.resolve(node.output)
                b.replace(here, b("mul", here, 1.5))
        return PassResult(b.finish(graph.outputs))

    monkeypatch.setattr(Canonicalize, "run", wrong)


@pytest.mark.usefixtures("planted")
def test_a_planted_defect_is_found_and_made_small() -> None:
    found = (CHECKS["twins"](seed) for seed in range(200))
    defect = next(defect for defect in found if defect is not None)
    reduced = defect.reduced()
    assert [node.name for node in reduced.compute_nodes] == ["tanh"]


def test_a_rounding_of_16_bits_that_a_rule_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (norms.LayerNorm, norms.RmsNorm, reductions.MergeSums):
        monkeypatch.setattr(rule, "rounds_once", False)
    for name in ("group_norm", "layer_norm", "rms_norm"):
        number = next(i for i, file in enumerate(FILES) if file.stem == name)
        seeds = range(number, number + 40 * len(FILES), len(FILES))  # variations of this graph
        defect = next((defect for defect in map(CHECKS["rules"], seeds) if defect), None)
        assert defect is not None, name
        assert "times its bound" in defect.text


@pytest.mark.usefixtures("planted")
def test_compiled_code_is_compared_with_the_reference() -> None:
    b = GraphBuilder("planted")
    x = b.input("x", tensor(DType.F32, ("n", 5)))
    sample = Sample(
        b.finish([b("softmax", x, axis=1), b("tanh", x)]), [np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5)]
    )
    assert compiled(sample, Way("O0", "", "cpu", 1, False, True, (1,))) is None
    defect = compiled(sample, Way("O1", "", "cpu", 1, False, True, (1,)))
    assert defect is not None
    assert "output 1" in defect.text
    assert [node.name for node in defect.reduced().compute_nodes] == ["tanh"]


def test_layers_on_eight_bits_are_compared_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    b = GraphBuilder("layers")
    x = b.input("x", tensor(DType.F32, ("n", 16)))
    w, v = (b.constant(rng.normal(size=(16, 16)).astype(np.float32)) for _ in range(2))
    graph = b.finish([b("matmul", b("relu", b("matmul", x, w)), v)])
    sample = Sample(graph, [rng.normal(size=(SYMBOLIC_EXTENT, 16)).astype(np.float32)])
    assert on_eight_bits(sample) is None
    right = emit.result_of
    monkeypatch.setattr(emit, "result_of", lambda b, *layer: b("mul", right(b, *layer), 1.1))
    defect = on_eight_bits(sample)
    assert defect is not None
    assert "its bound is" in defect.text

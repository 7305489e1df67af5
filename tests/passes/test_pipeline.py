from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import mlec
from mlec import registry
from mlec.errors import ParseError, PassError, ToleranceError, UsageError
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.passes.canonicalize import Canonicalize
from mlec.passes.dce import EliminateDeadCode
from mlec.passes.fold_constants import FoldConstants
from mlec.passes.fusion import FuseOperators
from mlec.passes.pipelines import named_pipeline
from mlec.pipeline import EXACT, Pass, PassContext, PassPipeline, PassResult, Tolerance, approx


def graph() -> Graph:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 3)))
    return b.finish([b("exp", b("mul", x, 2.0))])


@dataclass(frozen=True)
class WrongBy(Pass):
    """Adds a number to every output."""

    offset: float = 0.5
    name: ClassVar[str] = "wrong-by"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for node in graph.nodes:
            b.keep(node)
        return PassResult(b.finish([b("add", v, self.offset) for v in graph.outputs]))


@dataclass(frozen=True)
class Crashes(Pass):
    name: ClassVar[str] = "crashes"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        raise ZeroDivisionError("oops")


@dataclass(frozen=True)
class Invalid(Pass):
    name: ClassVar[str] = "invalid"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(Graph(graph.name, graph.inputs, graph.nodes[:-1], graph.outputs, graph.constants))


@pytest.mark.parametrize(
    "text", ["dce", "canonicalize,fuse{max_nodes = 3},dce", "fold-constants{max_growth = 2}", "layout{images = false}"]
)
def test_text_round_trips(text: str) -> None:
    assert str(PassPipeline.parse(text)) == text


def test_named_pipelines_splice_in() -> None:
    pipeline = PassPipeline.parse("O1,fuse")
    assert [p.name for p in pipeline] == [*(p.name for p in named_pipeline("O1")), "fuse"]
    assert len(named_pipeline("O0")) < len(named_pipeline("O1")) < len(named_pipeline("O2")) < len(named_pipeline("O3"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nonsense", UsageError, "nonsense"),
        ("fuse{size = 3}", UsageError, "no option 'size'"),
        ("fuse{max_nodes = many}", UsageError, "takes int"),
        ("fuse{max_nodes = 3", ParseError, "unbalanced"),
        ("fuse!", ParseError, "is not a pass"),
        ("O7", UsageError, "O7"),
    ],
)
def test_text_that_is_no_pipeline(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PassPipeline.parse(text)


def test_editing() -> None:
    pipeline = PassPipeline([Canonicalize(), FuseOperators()])
    names = [p.name for p in pipeline.insert(EliminateDeadCode(), after="canonicalize")]
    assert names == ["canonicalize", "dce", "fuse"]
    assert [p.name for p in pipeline.insert(EliminateDeadCode(), before="canonicalize")] == [
        "dce",
        "canonicalize",
        "fuse",
    ]
    assert str(pipeline.replace("fuse", FuseOperators(max_nodes=2))) == "canonicalize,fuse{max_nodes = 2}"
    assert str(pipeline.without("fuse")) == "canonicalize"
    assert str(PassPipeline([pipeline, EliminateDeadCode()])) == "canonicalize,fuse,dce"
    with pytest.raises(UsageError, match="no pass 'cse'"):
        pipeline.without("cse")
    with pytest.raises(UsageError, match="takes passes"):
        PassPipeline([FuseOperators])  # type: ignore[list-item]


def test_numeric_verification_names_the_guilty_pass() -> None:
    pipeline = PassPipeline([Canonicalize(), WrongBy(), EliminateDeadCode()], verify="numeric")
    with pytest.raises(ToleranceError, match=r"pass 2 of 3, wrong-by changed output 0"):
        pipeline.run(graph())
    PassPipeline([WrongBy()], verify="structure").run(graph())


@dataclass(frozen=True)
class Replaces(Pass):
    """Makes another function of every output."""

    function: Callable[[GraphBuilder, Value], Value]
    name: ClassVar[str] = "replaces"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for node in graph.nodes:
            b.keep(node)
        return PassResult(b.finish([self.function(b, v) for v in graph.outputs]))


@dataclass(frozen=True)
class ReplacesUpToZeros(Replaces):
    preserves: ClassVar[Tolerance] = Tolerance(signed_zeros=False)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda b, x: b("where", b("isnan", x), b.constant(np.zeros((), np.float32)), x), "with NaN"),
        (lambda b, x: b("clip", x, lo=-1e30, hi=1e30), "with infinities"),
        (
            lambda b, x: b("where", b("lt", b("abs", x), 1e-30), b.constant(np.zeros((), np.float32)), x),
            "with zeros and denormals",
        ),
        (lambda b, x: b("add", x, 0.0), "with zeros and denormals"),
    ],
    ids=["NaN", "infinity", "denormal", "sign of zero"],
)
def test_numeric_verification_tries_special_values(
    function: Callable[[GraphBuilder, Value], Value], inputs: str
) -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 40)))
    graph = b.finish([x])
    with pytest.raises(ToleranceError, match="changed output 0") as caught:
        PassPipeline([Replaces(function)], verify="numeric").run(graph)
    assert caught.value.notes[0].startswith(f"inputs: {inputs}")


def test_a_pass_may_declare_that_it_moves_zeros() -> None:
    b = GraphBuilder("g")
    graph = b.finish([b.input("x", tensor("f32", ("n", 40)))])
    PassPipeline([ReplacesUpToZeros(lambda b, x: b("add", x, 0.0))], verify="numeric").run(graph)


def test_how_arrays_lie_in_memory_changes_no_result() -> None:
    """BLAS adds up the terms of a transposed view in another order than those of the constant that it folds to."""
    rng = np.random.default_rng(0)
    b = GraphBuilder("g")
    value = b.input("x", tensor("f32", ("n", 64)))
    for width in (128, 10):
        weight = b.constant(rng.normal(size=(width, value.type.shape[1])).astype(np.float32))
        value = b("tanh", b("matmul", value, b("transpose", weight, perm=(1, 0))))
    total = b("sum", b("transpose", value, perm=(1, 0)), axes=(0,))
    graph, _ = PassPipeline([FoldConstants()], verify="numeric").run(b.finish([value, total]))
    assert sum(node.name == "transpose" for node in graph.nodes) == 1  # the one of no constant
    x = rng.normal(size=(5, 64)).astype(np.float32)
    for expected, got in zip(run_graph(graph, [x]), run_graph(graph, [np.asfortranarray(x)]), strict=True):
        np.testing.assert_array_equal(expected, got)


def test_a_failing_pass_is_named() -> None:
    with pytest.raises(PassError, match=r"pass 2 of 2, crashes failed: ZeroDivisionError: oops"):
        PassPipeline([Canonicalize(), Crashes()]).run(graph())
    with pytest.raises(PassError, match=r"pass 1 of 1, invalid: .* not valid after invalid"):
        PassPipeline([Invalid()]).run(graph())


def test_records_hold_the_graphs_before_and_after_every_pass() -> None:
    first = graph()
    last, records = PassPipeline([EliminateDeadCode(), FuseOperators()]).run(first)
    assert [(r.name, r.after is r.before) for r in records] == [("dce", True), ("fuse", False)]
    assert [r.before for r in records] == [first, records[0].after]
    assert records[-1].after is last


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "fits"),
    [
        ([1.0, -0.0], [1.0, 0.0], EXACT, True),
        ([1.0], [1.0 + 2**-20], EXACT, False),
        ([np.nan, np.inf], [np.nan, np.inf], EXACT, True),
        ([np.nan], [1.0], approx(1.0), False),
        ([1.0], [np.nan], approx(1.0), False),
        ([np.inf], [-np.inf], approx(1.0), False),
        ([1.0, 100.0], [1.001, 100.0], approx(1e-4), True),
        ([1.0, 100.0], [1.1, 100.0], approx(1e-4), False),
        ([], [], EXACT, True),
    ],
)
def test_tolerance(expected: list[float], actual: list[float], tolerance: Tolerance, fits: bool) -> None:
    assert (tolerance.excess(np.array(expected), np.array(actual)) <= 1) is fits


def test_tolerance_refuses_other_shapes_and_dtypes() -> None:
    assert approx(1.0).excess(np.zeros(3), np.zeros((3, 1))) == float("inf")
    assert approx(1.0).excess(np.zeros(3), np.zeros(3, np.float32)) == float("inf")
    assert approx(1.0).excess(np.zeros(3, np.int64), np.ones(3, np.int64)) == float("inf")


def test_every_pass_of_ours_is_a_public_name() -> None:
    classes = {registry.load("passes", name) for name in registry.PASSES}
    assert {getattr(mlec, cls.__name__, None) for cls in classes} == classes
    assert {cls.__name__ for cls in classes} <= set(mlec.__all__)

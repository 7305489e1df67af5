"""What looks on while a pipeline runs, passes of the user's own, and how a graph that a pass does wrong is made small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import mlec
from mlec import registry
from mlec.cli.optimizing import opt_command
from mlec.errors import ParseError, PassError, ToleranceError, UsageError, WriteError
from mlec.instruments import DumpGraphs, Instrument, TimePasses
from mlec.ir import Graph, GraphBuilder, Match, P, Rule, Value, extract, parse_graph, tensor, verify
from mlec.ir.extents import extents_near
from mlec.passes.dce import EliminateDeadCode
from mlec.passes.pipelines import named_pipeline
from mlec.pipeline import Pass, PassContext, PassPipeline, PassRecord, PassResult
from mlec.reduction import reduce_graph
from mlec.tolerance import approx


def long_graph() -> Graph:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 6)))
    unused = b.input("y", tensor("f32", ("n",)))
    weight = b.constant(np.linspace(-1, 1, 36, dtype=np.float32).reshape(6, 6), "w")
    value, other = x, b("exp", unused)
    for _ in range(12):
        value = b("add", b("sin", b("matmul", value, weight)), 0.5)
    value = b("tanh", b("mul", value, value))
    for _ in range(3):
        value = b("add", b("sigmoid", value), 1.0)
    return b.finish([other, value, b("neg", value)])


class WrongTanh(Rule):
    """tanh(x) -> sin(x)"""

    pattern = P("tanh", "x")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sin", m["x"])


@dataclass(frozen=True)
class WrongTanhs(Pass):
    name: ClassVar[str] = "wrong-tanhs"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        from mlec.ir import apply_rules

        return PassResult.of_edits(*apply_rules(graph, [WrongTanh()]))


def test_a_graph_that_a_pass_does_wrong_is_made_small() -> None:
    with pytest.raises(ToleranceError, match=r"pass 2 of 3, wrong-tanhs changed output 1") as caught:
        PassPipeline([EliminateDeadCode(), WrongTanhs(), EliminateDeadCode()], verify="numeric").run(long_graph())
    reduced = caught.value.reduced
    assert [node.name for node in reduced.nodes] == ["tanh"]
    assert len(reduced.inputs) == len(reduced.outputs) == 1
    assert not reduced.constants
    assert "tanh" in "\n".join(caught.value.notes)
    again = parse_graph(str(reduced))
    with pytest.raises(ToleranceError):
        PassPipeline([WrongTanhs()], verify="numeric").run(again)


@pytest.mark.parametrize("wanted", ["sigmoid", "exp", "matmul"])
def test_what_is_left_is_valid_and_still_fails(wanted: str) -> None:
    def fails(graph: Graph) -> bool:
        return any(node.name == wanted for node in graph.nodes)

    reduced = reduce_graph(long_graph(), fails)
    verify(reduced)
    assert [node.name for node in reduced.compute_nodes] == [wanted]
    assert not reduced.constants


def test_a_graph_that_cannot_be_made_smaller_stays_and_time_is_kept() -> None:
    graph = long_graph()
    assert reduce_graph(graph, lambda part: False) is graph
    assert reduce_graph(graph, lambda part: True, seconds=0) is graph

    def broken(part: Graph) -> bool:
        raise RuntimeError("a defect of the defect")

    assert reduce_graph(graph, broken) is graph


def test_graphs_are_run_within_the_limits_of_their_extents() -> None:
    """Of a loop over 6 rows, which fewer rows than that have no results for; and of what is left of it."""
    b = GraphBuilder("rows")
    x = b.input("x", tensor("f32", ("n", 4)))
    rows = [b("tanh", b("slice", b("mul", x, x), axis=0, start=i, stop=i + 1)) for i in range(6)]
    graph = b.finish([b("reshape", b("concat", *rows, axis=0), shape=(24,))])
    limited = graph.with_signature(msgspec.structs.replace(graph.signature, symbols={"n": (6, 9)}))
    PassPipeline([*named_pipeline("O2")], verify="numeric").run(limited)
    with pytest.raises(ToleranceError, match="wrong-tanhs changed output 0") as caught:
        PassPipeline([WrongTanhs()], verify="numeric").run(limited)
    assert caught.value.reduced is not None
    assert [node.name for node in caught.value.reduced.compute_nodes] == ["tanh"]


def test_a_part_of_a_graph_keeps_the_limits_of_its_extents() -> None:
    b = GraphBuilder("g")
    x, y = b.input("x", tensor("f32", ("n", 4))), b.input("y", tensor("f32", ("m", 4)))
    graph = b.finish([b("exp", x), b("exp", y)])
    graph = graph.with_signature(msgspec.structs.replace(graph.signature, symbols={"n": (6, 9), "m": (2, None)}))
    assert extract(graph, [graph.inputs[1]], [graph.outputs[1]], "part").signature.symbols == {"m": (2, None)}
    assert extents_near(graph, 1) == {"n": 6, "m": 2}
    assert extents_near(graph, 64) == {"n": 9, "m": 64}


def test_an_extent_keeps_the_input_that_tells_it() -> None:
    b = GraphBuilder("g")
    x, y = b.input("x", tensor("f32", ("n", 4))), b.input("y", tensor("f32", ("m",)))
    spread = b("broadcast_to", y, shape=("n", "m"))
    graph = b.finish([b("neg", spread), b("exp", x)])
    reduced = reduce_graph(graph, lambda part: any(node.name == "broadcast_to" for node in part.nodes))
    verify(reduced)
    assert [value.hint for value in reduced.inputs] == ["x", "y"]


class Journal(Instrument):
    """Writes down what it is told, and forbids one pass."""

    def __init__(self, forbidden: str = "") -> None:
        self.forbidden = forbidden
        self.lines: list[str] = []

    def should_run(self, step: Pass, graph: Graph) -> bool:
        return step.name != self.forbidden

    def before(self, step: Pass, graph: Graph) -> None:
        self.lines.append(f"before {step.name}")

    def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
        self.lines.append(f"after {step.name}: {record.changed}")


def test_instruments_see_every_pass_and_may_forbid_one() -> None:
    journal = Journal(forbidden="wrong-tanhs")
    pipeline = PassPipeline([WrongTanhs(), EliminateDeadCode()], instruments=[journal])
    graph, records = pipeline.without("wrong-tanhs").insert(WrongTanhs()).run(long_graph())
    assert journal.lines == ["before dce", "after dce: False"]
    assert [record.name for record in records] == ["dce"]
    assert graph.producer[graph.outputs[1]].name == "add"


def test_an_error_of_an_instrument_names_the_pass() -> None:
    class Refuses(Instrument):
        def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
            raise UsageError("too slow", hint="be quick")

    with pytest.raises(PassError, match=r"pass 1 of 1, dce: too slow"):
        PassPipeline([EliminateDeadCode()], instruments=[Refuses()]).run(long_graph())


def test_dumped_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    pipeline = named_pipeline("O2").watched(DumpGraphs(folder))
    _, records = pipeline.run(long_graph())
    changed = [f"{record.position:02d}-{record.name}.mlet" for record in records if record.changed]
    assert sorted(file.name for file in folder.iterdir()) == changed != []
    assert (folder / changed[-1]).read_text() == f"{records[-1].after}\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        named_pipeline("O2").watched(DumpGraphs(tmp_path / "file")).run(long_graph())


def test_a_failing_pass_leaves_what_it_was_given(tmp_path: Path) -> None:
    pipeline = PassPipeline([EliminateDeadCode(), WrongTanhs()], verify="numeric", instruments=[DumpGraphs(tmp_path)])
    with pytest.raises(ToleranceError) as caught:
        pipeline.run(long_graph())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["failed.mlet", "reduced.mlet"]
    assert (tmp_path / "failed.mlet").read_text() == f"{long_graph()}\n"
    again = parse_graph((tmp_path / "reduced.mlet").read_text())
    assert [node.name for node in again.nodes] == ["tanh"]
    assert caught.value.notes[-1] == f"in {tmp_path / 'failed.mlet'} and {tmp_path / 'reduced.mlet'}"


@pytest.mark.parametrize("taken", ["failed.mlet", "reduced.mlet"])
def test_a_failing_pass_is_told_of_even_where_no_dump_can_be_written(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    pipeline = PassPipeline([EliminateDeadCode(), WrongTanhs()], verify="numeric", instruments=[DumpGraphs(tmp_path)])
    with pytest.raises(ToleranceError) as caught:
        pipeline.run(long_graph())
    assert caught.value.notes[-1] == f"there is no dump of it: cannot write {tmp_path / taken}: Is a directory"


def test_times() -> None:
    times = TimePasses()
    _, records = PassPipeline.parse("canonicalize,dce,canonicalize").watched(times).run(long_graph())
    assert times.runs == {"canonicalize": 2, "dce": 1}
    assert sum(times.seconds.values()) == pytest.approx(sum(record.seconds for record in records))
    slowest = max(times.seconds, key=times.seconds.__getitem__)
    assert str(times).splitlines()[0].split()[1:] == ["ms", f"{times.runs[slowest]}x", slowest]


def test_instruments_and_numeric_checks_of_nested_pipelines_stay() -> None:
    journal = Journal()
    nested = PassPipeline([WrongTanhs()], verify="numeric", instruments=[journal])
    with pytest.raises(ToleranceError, match="pass 2 of 2"):
        PassPipeline([EliminateDeadCode(), nested], verify="off").run(long_graph())
    assert journal.lines == ["before dce", "after dce: False", "before wrong-tanhs"]
    assert PassPipeline([PassPipeline([EliminateDeadCode()])], verify="off").verify == "off"


@pytest.fixture
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_added", {})
    yield
    registry.table.cache_clear()


@pytest.mark.usefixtures("no_others")
def test_a_rule_becomes_a_pass_by_a_decorator() -> None:
    @mlec.register_pass(preserves=approx(1e-6))
    class LogOfExp(Rule):
        """log(exp(x)) -> x"""

        pattern = P("log", P("exp", "x"))

        def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
            return m["x"]

    b = GraphBuilder("g")
    graph = b.finish([b("log", b("exp", b.input("x", tensor("f32", ("n",)))))])
    after, report = mlec.optimize(graph, passes="default,log-of-exp")
    assert not after.nodes
    assert any(entry["name"] == "log-of-exp" and entry["applied"] for entry in report.to_dict()["passes"])
    names = [step.name for step in PassPipeline.parse("default,log-of-exp")]
    assert names.index("log-of-exp") < names.index("layout")
    assert str(PassPipeline.parse("log-of-exp")) == "log-of-exp"
    (step,) = PassPipeline.parse("log-of-exp")
    assert step.preserves == approx(1e-6)


@pytest.mark.usefixtures("no_others")
def test_the_command_writes_what_is_left_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlec.register_pass()(WrongTanhs)
    monkeypatch.chdir(tmp_path)
    text = "graph @g(%x: f32[n]) -> (f32[n]) { %a = exp(%x) : f32[n] %b = tanh(%a) : f32[n] return %b }"
    Path("long.mlet").write_text(text)
    for words, written in (([], "long.reduced.mlet"), (["--dump", "folder"], "folder/reduced.mlet")):
        done = CliRunner().invoke(
            opt_command, ["long.mlet", "--passes", "dce,wrong-tanhs", "--verify", "numeric", *words]
        )
        assert isinstance(done.exception, ToleranceError)
        assert Path(written).name in done.exception.notes[-1]
        assert [node.name for node in parse_graph(Path(written).read_text()).nodes] == ["tanh"]


@pytest.mark.usefixtures("no_others")
def test_a_pass_of_the_users_own_by_a_decorator() -> None:
    def declare() -> None:
        @mlec.register_pass()
        @dataclass(frozen=True)
        class Renames(Pass):
            """Calls the graph something."""

            to: str = "other"
            how: Literal["once", "twice", "a, b", True] = "once"
            name: ClassVar[str] = "renames"

            def run(self, graph: Graph, context: PassContext) -> PassResult:
                b = GraphBuilder(self.to)
                b.adopt_interface(graph)
                for node in graph.nodes:
                    b.keep(node)
                return PassResult(b.finish(graph.outputs))

    declare()
    declare()  # as a notebook does when a cell runs again
    graph, _ = PassPipeline.parse("renames{to = mine}").run(long_graph())
    assert graph.name == "mine"
    kind = registry.load("passes", "renames")
    for to in ("a, b", "}", "", 'say "no"', "a = b", "true", "\\", " x ", "*.txt", "a/b-c.d"):
        assert list(PassPipeline.parse(f"dce,{kind(to)},dce")) == [EliminateDeadCode(), kind(to), EliminateDeadCode()]
    assert str(PassPipeline.parse("renames{how = twice}")) == "renames{how = twice}"
    for how in ("a, b", True):
        assert list(PassPipeline.parse(str(PassPipeline([kind("to", how)])))) == [kind("to", how)]
    with pytest.raises(UsageError, match='option how takes once or twice or "a, b" or true, got'):
        PassPipeline.parse("renames{how = thrice}")
    assert "renames" in registry.names("passes")
    with pytest.raises(ParseError):
        PassPipeline.parse("renames{to = mine")


@pytest.mark.usefixtures("no_others")
def test_a_name_that_is_taken() -> None:
    with pytest.raises(UsageError, match="two passes are named 'dce'") as caught:

        @mlec.register_pass()
        class Dce(Rule):
            """neg(x) -> x"""

            pattern = P("neg", "x")

            def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
                return m["x"]

    assert caught.value.code == "E_PLUGIN_NAME"

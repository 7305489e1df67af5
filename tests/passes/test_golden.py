"""Golden tests: tests/golden/<pass>/<case>.mlet holds a graph, the passes to run, and the graph expected after them.

    // passes: canonicalize
    // constant @w: f32[3, 2]          (random elements, the same for each run)
    // missed: 1                       (number of missed remarks; 0 when not given)
    graph @before ...
    // -----
    graph @after ...

After each pass, the graphs before and after it are run against each other within the tolerance that the pass declares; then the text
is compared. ``pytest --update-golden`` writes the expected part anew, if all but the text holds: read the difference before you
commit it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mlec.errors import ToleranceError
from mlec.ir import Graph, GraphBuilder, Value, parse_graph, print_graph, verify
from mlec.ir.op import Array
from mlec.ir.pattern import Const, Match, P
from mlec.ir.rewrite import Rule
from mlec.passes.canonicalize import Canonicalize
from mlec.pipeline import PassContext, PassPipeline, TargetFacts

FOLDER = Path(__file__).parents[1] / "golden"
CASES = sorted(FOLDER.glob("*/*.mlet"))
SEPARATOR = "// -----\n"


def header(text: str, key: str) -> list[str]:
    return re.findall(rf"^// {key}: (.*)$", text, re.M)


def constants(text: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, dtype, dims in re.findall(r"^// constant @(\w+): (f32|f64)\[([\d, ]*)\]", text, re.M):
        shape = tuple(int(d) for d in dims.split(",") if d.strip())
        rng = np.random.default_rng(len(arrays))
        arrays[name] = np.abs(rng.normal(size=shape)).astype({"f32": np.float32, "f64": np.float64}[dtype]) + 0.5
    return arrays


def check_golden(path: Path, update: bool = False) -> None:
    """Everything that a file says; with ``update`` its expected part is written anew, once all else holds."""
    text = path.read_text()
    before_text, _, expected = text.partition(SEPARATOR)
    before = parse_graph(before_text[before_text.index("graph @") :], constants(text))
    verify(before)
    passes, context = header(text, "passes")[0], PassContext(TargetFacts(vector_bytes=32))
    after, records = PassPipeline.parse(passes).run(before, context)
    done = "\n".join(f"  {r.name}: {m.kind}: {m.rule or r.name}: {m.message}" for r in records for m in r.remarks)
    try:
        PassPipeline.parse(passes, verify="numeric").run(before, context)
    except ToleranceError as error:
        notes = "; ".join(error.notes)
        pytest.fail(f"{error.message} ({notes})\nwhat the passes did:\n{done}", pytrace=False)
    missed = sum(m.kind == "missed" for r in records for m in r.remarks)
    stated = int((header(text, "missed") or ["0"])[0])
    assert missed == stated, f"{passes}: {missed} missed remarks, `// missed:` of {path.name} says {stated}:\n{done}"
    printed = print_graph(after, locations=False)
    again = print_graph(PassPipeline.parse(passes).run(after, context)[0], locations=False)
    assert again == printed, f"{passes}: running the passes again changes the graph once more"
    if update:
        path.write_text(f"{before_text}{SEPARATOR}{printed}\n")
    else:
        assert printed == expected.strip(), (
            f"{passes}: its results are right, but the graph is another one than {path.name} has; if it is meant to be: "
            f"python -m pytest tests/passes/test_golden.py -k {path.stem} --update-golden\nwhat the passes did:\n{done}"
        )


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    check_golden(path, request.config.getoption("--update-golden"))


class HalfOfDouble(Rule):
    """mul(x, 2) -> x, which is wrong"""

    pattern = P("mul", "x", Const(2))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


def test_a_wrong_result_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "case.mlet"
    path.write_text(
        "// passes: canonicalize\ngraph @before(%x: f32[n]) -> (f32[n]) {\n  %two = constant {value = 2.0} : f32[]\n"
        "  %y = mul(%x, %two) : f32[n]\n  return %y\n}\n"
    )
    text = path.read_text()
    with pytest.raises(AssertionError, match="--update-golden"):
        check_golden(path)
    check_golden(path, update=True)
    check_golden(path)
    monkeypatch.setattr(Canonicalize, "rules", (HalfOfDouble(),))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)canonicalize changed output 0 .*HalfOfDouble"):
        check_golden(path, update=True)
    assert path.read_text().startswith(text)
    assert path.read_text().count("mul(") == 2


def test_there_are_cases_for_every_pass() -> None:
    from mlec.registry import PASSES

    assert {p.parent.name for p in CASES} >= set(PASSES)

"""Golden tests: tests/golden/<pass>/<case>.mlet holds a graph, the passes to run, and the graph expected after them.

    // passes: canonicalize
    // constant @w: f32[3, 2]          (random elements, the same for each run)
    // missed: 1                       (number of missed remarks; 0 when not given)
    graph @before ...
    // -----
    graph @after ...

The text is compared, and the two graphs are run against each other within the tolerance that the passes declare.
``pytest --update-golden`` writes the expected part anew: read the difference before you commit it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mlec.ir import parse_graph, print_graph, verify
from mlec.ir.op import Array
from mlec.pipeline import EXACT, PassContext, PassPipeline, TargetFacts
from mlec.tolerance import check_equal

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


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text()
    before_text, _, expected = text.partition(SEPARATOR)
    before = parse_graph(before_text[before_text.index("graph @") :], constants(text))
    verify(before)
    pipeline = PassPipeline.parse(header(text, "passes")[0])
    after, records = pipeline.run(before, PassContext(TargetFacts(vector_bytes=32)))
    if request.config.getoption("--update-golden"):
        expected = print_graph(after, locations=False)
        path.write_text(f"{before_text}{SEPARATOR}{expected}\n")
    assert print_graph(after, locations=False) == expected.strip()
    missed = sum(r.kind == "missed" for record in records for r in record.remarks)
    assert missed == int((header(text, "missed") or ["0"])[0])
    tolerance = EXACT
    for step in pipeline:
        tolerance = tolerance.then(step.preserves)
    check_equal(before, after, tolerance, str(path))
    again, _ = pipeline.run(after, PassContext(TargetFacts(vector_bytes=32)))
    assert print_graph(again, locations=False) == expected.strip(), "running the passes again changes nothing"


def test_there_are_cases_for_every_pass() -> None:
    from mlec.registry import PASSES

    assert {p.parent.name for p in CASES} >= set(PASSES)

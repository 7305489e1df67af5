"""What the report says of an unrolled loop: nodes before and after, and what the pass was measured to be worth."""

from __future__ import annotations

import numpy as np

import mlec
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.passes.pipelines import named_pipeline

STEPS, FEATURES = 6, 16


def assigned() -> Graph:
    """``for i in range(6): out[:, i] = exp(x[:, i])``: each turn writes all of ``out`` anew."""
    b = GraphBuilder("assigned")
    x = b.input("x", tensor("f32", (256, STEPS, FEATURES)))
    out = b("mul", x, 0.0)
    for i in range(STEPS):
        ends = [b("slice", out, axis=1, start=s, stop=e) for s, e in ((0, i), (i + 1, STEPS)) if s < e]
        new = b("exp", b("slice", x, axis=1, start=i, stop=i + 1))
        out = b("concat", *([new, *ends] if i == 0 else [ends[0], new, *ends[1:]]), axis=1)
    return b.finish([out])


def test_the_report_has_nodes_and_the_measured_gain_of_the_pass() -> None:
    inputs = np.ones((256, STEPS, FEATURES), np.float32)
    pipeline = named_pipeline("O2").without("fuse")
    report = mlec.compile(assigned(), inputs, passes=pipeline, measure_passes=True, progress=False).report
    entry = next(e for e in report.passes if e["name"] == "vectorize")
    before, after = entry["before"], entry["after"]
    assert before["nodes"] > 3 * STEPS > 4 > after["nodes"]
    assert entry["measured_gain"] == before["measured_seconds"] / after["measured_seconds"] > 1
    text = report.to_text()
    assert f"{STEPS} equal steps (exp) became one" in " ".join(text.split())
    told = text[text.index("pass vectorize:") :].split("\n\n")[0]
    assert "measured: saves" in told
    assert f"nodes: {before['nodes']} -> {after['nodes']}" in told

"""The report of one compilation: what was rewritten, what was not and why, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlec.errors import UsageError
from mlec.ir import Graph
from mlec.ir.dim import evaluate
from mlec.machine import Machine
from mlec.pipeline import NOMINAL_EXTENT, PassRecord, Remark


@dataclass
class OptimizationReport:
    """Everything that a compilation can say about itself, as plain data.

    Attributes:
        model: name, framework, kind.
        passes: one entry for each pass, in order.
        parity: errors against the source, by method.
        timing: predicted and measured seconds.
        memory: bytes.
        kernels: name, op, source location, strategy, flops and bytes of each.
        graphs: the text of the graph before and after, and their nodes and edges for the picture.
        quantization, stability: findings of the passes of those names.
        warnings: what the user should know.
    """

    model: dict[str, Any] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    graphs: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    quantization: list[dict[str, Any]] = field(default_factory=list)
    stability: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> OptimizationReport:
        """The inverse of `to_dict`; unknown keys (of a later version) are left out."""
        known = OptimizationReport.__dataclass_fields__
        return OptimizationReport(**{k: v for k, v in data.items() if k in known})

    def add_passes(self, records: Sequence[PassRecord], machine: Machine | None) -> None:
        """Appends what a pipeline did. With a machine, predicts what each pass is worth."""
        for record in records:
            before, after = graph_stats(record.before), graph_stats(record.after)
            gain = None
            if machine is not None:
                seconds = machine.graph_seconds(record.before), machine.graph_seconds(record.after)
                gain = seconds[0] / seconds[1] if seconds[1] else 1.0
            self.passes.append(
                {
                    "name": record.name,
                    "applied": [remark_dict(r) for r in record.remarks if r.kind == "applied"],
                    "missed": [remark_dict(r) for r in record.remarks if r.kind == "missed"],
                    "before": before,
                    "after": after,
                    "seconds": record.seconds,
                    "predicted_gain": gain,
                    "measured_gain": None,
                }
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; the keys are stable."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, default=str)

    def to_text(self) -> str:
        """A summary for a terminal."""
        from mlec.reporting.text import render_text

        return render_text(self)

    def to_html(self) -> str:
        """One self-contained page."""
        from mlec.reporting.html import render_html

        return render_html(self)

    def __str__(self) -> str:
        return self.to_text()

    def save(self, path: str | Path) -> None:
        """Writes .html, .json or .txt, by the ending.

        Raises:
            UsageError: for another ending.
        """
        target = Path(path)
        renderers = {".html": self.to_html, ".json": self.to_json, ".txt": self.to_text}
        if target.suffix not in renderers:
            raise UsageError(
                f"a report is written as {', '.join(renderers)}, not as {target.suffix or 'a file without ending'!r}"
            )
        target.write_text(renderers[target.suffix](), encoding="utf-8")


def graph_stats(graph: Graph, extent: int = NOMINAL_EXTENT) -> dict[str, int]:
    """Nodes, flops and bytes; symbolic dims count as ``extent``."""
    cost = graph.cost
    binding = dict.fromkeys(graph.symbols, extent)
    return {
        "nodes": len(graph.compute_nodes),
        "flops": evaluate(cost.flops, binding),
        "bytes": evaluate(cost.bytes, binding),
    }


def remark_dict(remark: Remark) -> dict[str, Any]:
    places = [str(leaf) for leaf in remark.loc.leaves]
    return {
        "message": remark.message,
        "rule": remark.rule,
        "location": places[0] if places else "",
        "locations": places,
    }


def graph_picture(graph: Graph) -> dict[str, Any]:
    """Nodes and edges for drawing: constants are left out, a fused node lists the ops of its body."""
    ids = {value: f"in{i}" for i, value in enumerate(graph.inputs)}
    nodes: list[dict[str, Any]] = [
        {"id": f"in{i}", "op": "input", "label": value.hint, "type": str(value.type), "location": ""}
        for i, value in enumerate(graph.inputs)
    ]
    edges: list[tuple[str, str]] = []
    for i, node in enumerate(graph.compute_nodes):
        body = node.attrs.get("body")
        inner = [n.name for n in body.compute_nodes] if isinstance(body, Graph) else []
        nodes.append(
            {
                "id": f"n{i}",
                "op": node.name,
                "label": " + ".join(inner) or node.name,
                "type": ", ".join(str(v.type) for v in node.outputs),
                "location": str(node.loc),
            }
        )
        edges += [(ids[v], f"n{i}") for v in node.inputs if v in ids]
        ids.update(dict.fromkeys(node.outputs, f"n{i}"))
    for i, value in enumerate(graph.outputs):
        nodes.append({"id": f"out{i}", "op": "output", "label": value.hint, "type": str(value.type), "location": ""})
        edges += [(ids[value], f"out{i}")] if value in ids else []
    return {"nodes": nodes, "edges": [list(e) for e in edges], "text": str(graph)}

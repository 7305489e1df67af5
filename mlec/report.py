"""The report of one compilation: what was rewritten, what was not and why, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlec.artifact.atomic import replace_file
from mlec.backends.base import KernelNote
from mlec.errors import UsageError
from mlec.ir import Graph, Node
from mlec.ir.dim import evaluate, evaluate_at, parse_dim
from mlec.ir.op import Trait
from mlec.measuring.cost_model import CostModel
from mlec.pipeline import NOMINAL_EXTENT, PassRecord, Remark, nominal
from mlec.runtime.program import KernelInfo

_MEASURED = ("timing", "profile", "tuning", "machine")
_TIMES = ("seconds", "_us", "_gain", "rewrites", "peak_bytes", "peak_apart_bytes")
"""How the names of measured numbers end."""

REPORT_ENDINGS = (".html", ".json", ".txt")


@dataclass
class OptimizationReport:
    """Everything that a compilation can say about itself, as plain data.

    Attributes:
        model: name, source (the frontend), kind, target.
        passes: one entry for each pass, in order.
        parity: errors against the source, by method.
        timing: predicted and measured seconds.
        memory: bytes.
        kernels: name, op, source location, strategy, width of its floats, flops and bytes of each.
        profile: what the kernels took on the measured inputs, beside what was predicted.
        tuning: what measuring schedules found, one entry for each distinct kernel that had a choice.
        graphs: the text of the graph before and after, and their nodes and edges for the picture.
        quantization, stability: findings of the passes of those names.
        accuracy: what 8 bits cost the outputs, and what they may cost.
        warnings: what the user should know.
    """

    model: dict[str, Any] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    graphs: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    quantization: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, Any] = field(default_factory=dict)
    stability: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> OptimizationReport:
        """The inverse of `to_dict`; unknown keys (of a later version) are left out."""
        known = OptimizationReport.__dataclass_fields__
        return OptimizationReport(**{k: v for k, v in data.items() if k in known})

    def add_passes(self, records: Sequence[PassRecord], model: CostModel | None) -> None:
        """Appends what a pipeline did. With a cost model, predicts what each pass is worth."""
        predicted: dict[Graph, float] = {}
        for record in records:
            before: dict[str, Any] = {**graph_stats(record.before)}
            after: dict[str, Any] = {**graph_stats(record.after)}
            gain = None
            if model is not None:
                for graph in {record.before, record.after} - predicted.keys():
                    predicted[graph] = model.graph_seconds(graph, nominal_binding(graph))
                gain = predicted[record.before] / predicted[record.after]
                before["predicted_seconds"] = predicted[record.before]
                after["predicted_seconds"] = predicted[record.after]
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
            if record.name == "quantize-int8":
                self.quantization += [dict(finding) for finding in record.findings]
                self.accuracy |= record.summary
            if record.name == "stability":
                from mlec.passes.stability.findings import warning_of  # loading a model needs no passes

                self.stability += [dict(finding) for finding in record.findings]
                self.warnings += filter(None, map(warning_of, record.findings))

    def add_kernels(
        self, kernels: Sequence[KernelInfo], notes: Mapping[str, KernelNote], predicted: Mapping[str, float]
    ) -> None:
        """Appends the kernels.

        Args:
            kernels: in the order in which they run.
            notes: by symbol, how the kernel was made.
            predicted: by symbol, the seconds that the cost model expects of a call at the nominal extent.
        """
        for kernel in kernels:
            note = notes.get(kernel.symbol) or KernelNote(kernel.symbol, kernel.op, "")
            flops, moved = (_nominal(work) for work in (kernel.flops, kernel.bytes))
            self.kernels.append(
                {
                    "symbol": kernel.symbol,
                    "op": kernel.op,
                    "location": kernel.location,
                    "strategy": note.strategy,
                    "bits": note.bits,
                    "weights_bytes": note.weights,
                    "flops": kernel.flops,
                    "bytes": kernel.bytes,
                    "nominal_flops": flops,
                    "nominal_bytes": moved,
                    "predicted_seconds": predicted.get(kernel.symbol),
                }
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; the keys are stable."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def without_times(self) -> dict[str, Any]:
        """`to_dict` less what was measured of time and memory, and what was predicted from such measurements of this machine."""
        kept = {name: value for name, value in self.to_dict().items() if name not in _MEASURED}
        return {name: _without_times(value) for name, value in kept.items()}

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
            WriteError: when the file cannot be written.
        """
        target = Path(path)
        check_report_name(target)
        render = {".html": self.to_html, ".json": self.to_json, ".txt": self.to_text}[target.suffix]
        content = render().encode()
        replace_file(target, len(content), lambda: [content])


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_times(v) for key, v in value.items() if not str(key).endswith(_TIMES)}
    return [_without_times(v) for v in value] if isinstance(value, (list, tuple)) else value


def check_report_name(path: Path) -> None:
    """Whether a report can be written under this name.

    Raises:
        UsageError: for an ending that is not .html, .json or .txt.
    """
    if path.suffix not in REPORT_ENDINGS:
        raise UsageError(
            f"{path}: a report is written as {', '.join(REPORT_ENDINGS)}", hint="choose one of these endings"
        )


def _nominal(work: int | str, extent: int = NOMINAL_EXTENT) -> int:
    """A number, or the text of an expression in the symbolic dims, each of which counts as ``extent``."""
    return evaluate_at(parse_dim(work), extent)


def nominal_binding(graph: Graph) -> dict[str, int]:
    """The extent of each symbol that estimates take."""
    return dict.fromkeys(graph.symbols, NOMINAL_EXTENT)


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
    """Nodes and edges for drawing: constants are left out, a fused node lists the ops of its body.

    Work is counted with symbolic dims at the nominal extent.
    """
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
                "locations": [str(leaf) for leaf in node.loc.leaves],
                **_node_work(node),
            }
        )
        edges += [(ids[v], f"n{i}") for v in node.inputs if v in ids]
        ids.update(dict.fromkeys(node.outputs, f"n{i}"))
    for i, value in enumerate(graph.outputs):
        nodes.append({"id": f"out{i}", "op": "output", "label": value.hint, "type": str(value.type), "location": ""})
        edges += [(ids[value], f"out{i}")] if value in ids else []
    return {"nodes": nodes, "edges": [list(e) for e in edges], "text": str(graph)}


def _node_work(node: Node) -> dict[str, int]:
    """Of a node by itself; a view of its operand moves nothing."""
    if node.op.has(Trait.VIEW):
        return {"flops": 0, "bytes": 0}
    cost = node.cost
    return {"flops": nominal(cost.flops), "bytes": nominal(cost.bytes)}

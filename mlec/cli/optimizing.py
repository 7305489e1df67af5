"""mlec opt: passes on a graph in text form."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mlec.cli.compiling import check_target
from mlec.cli.output import json_option, print_json
from mlec.wording import plural

if TYPE_CHECKING:
    from mlec.ir import Graph
    from mlec.pipeline import PassRecord, Verification

_PASSES = re.compile(r"^// passes: *(\S.*)$", re.M)
_CONSTANT = re.compile(r"=\s*constant\s*\{\s*value\s*=\s*@([\w.]+)\s*\}\s*:\s*(\w+)\[([\d,\s]*)\]")


@click.command("opt")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--passes",
    help="Pipeline, e.g. 'canonicalize,fuse'; by default the file's line `// passes: ...`, or else 'default'.",
)
@click.option(
    "--target",
    callback=check_target,
    help="Optimise for this target: what passes may know of it, and its backend's own default. [default: an ordinary CPU, O2]",
)
@click.option(
    "--remarks",
    type=click.Choice(["none", "applied", "missed", "all"]),
    default="none",
    show_default=True,
    help="Also print what the passes did, or did not do and why.",
)
@click.option(
    "--verify",
    "verification",
    type=click.Choice(["off", "structure", "numeric"]),
    default="structure",
    show_default=True,
    help="After each pass: nothing, the rules of the IR, or also the results of the reference interpreter.",
)
@click.option(
    "--dump",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the graph after each pass that changes it to this folder; and what a pass does wrong, if --verify finds that.",
)
@json_option
def opt_command(
    graph: Path,
    passes: str | None,
    target: str | None,
    remarks: str,
    verification: Verification,
    dump: Path | None,
    as_json: bool,
) -> None:
    """Run passes on GRAPH (.mlet text, or the graph of a .mle file) and print the result.

    Constants that the text names but does not hold get random elements, the same in each run. Of a golden test, the graph before
    `// -----` is read.
    """  # fmt: skip
    from mlec.errors import ToleranceError
    from mlec.instruments import DumpGraphs
    from mlec.passes.stability.findings import warning_of
    from mlec.pipeline import PassContext, PassPipeline

    before, text = _read_graph(graph)
    named = _PASSES.search(text)
    wanted = passes or (named.group(1) if named else "default")
    default, context = "default", PassContext()
    if target is not None:
        from mlec.api import passes_of

        backend, context = passes_of(target)
        default = backend.pipeline
    pipeline = PassPipeline.parse(default if wanted == "default" else wanted, verify=verification)
    try:
        after, records = pipeline.watched(*([DumpGraphs(dump)] if dump else [])).run(before, context)
    except ToleranceError as error:
        if dump is None and error.reduced is not None:
            path = DumpGraphs(Path()).write(f"{graph.stem}.reduced.mlet", error.reduced)
            error.notes = (*error.notes, f"in {path}")
        raise
    shown = ("applied", "missed") if remarks == "all" else (remarks,)
    if as_json:
        print_json(
            {"passes": [_record(record, shown) for record in records], "verified": verification, "graph": str(after)}
        )
        return
    for record in records:
        for remark in record.remarks:
            if remark.kind in shown:
                place = f"  [{remark.loc}]" if str(remark.loc) else ""
                click.echo(f"// {record.name}: {remark.kind}: {remark.message}{place}")
        for finding in record.findings:
            if warning := warning_of(finding):
                click.echo(f"// {record.name}: {finding['severity']}: {warning}")
    if verification == "numeric":
        changed = sum(record.before is not record.after for record in records)
        click.echo(
            f"// numeric: {plural(changed, 'pass', 'es')} of {len(records)} changed the graph; each time the reference interpreter "
            "gave the same results before and after, within the bound that the pass declares"
        )
    click.echo(str(after))


def _record(record: PassRecord, kinds: tuple[str, ...]) -> dict[str, Any]:
    from mlec.report import graph_stats, remark_dict

    return {
        "name": record.name,
        "seconds": record.seconds,
        "before": graph_stats(record.before),
        "after": graph_stats(record.after),
        "remarks": [{"kind": r.kind, **remark_dict(r)} for r in record.remarks if r.kind in kinds],
        "findings": list(record.findings),
    }


def _read_graph(path: Path) -> tuple[Graph, str]:
    """The graph, and the whole text it came from."""
    from mlec.artifact import Artifact
    from mlec.errors import ParseError
    from mlec.frontends.graph_files import decoded, parse_file
    from mlec.ir import parse_graph

    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for somebody to write to it
        raise ParseError(
            f"{path} is a directory, device or pipe", code="E_OPEN", hint="give the path of a .mlet or .mle file"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ParseError(f"cannot read {path}: {error.strerror}", code="E_OPEN", hint="check the path") from error
    if data.startswith(b"MLE\0"):
        artifact = Artifact.open(path)
        return parse_graph(artifact.graph, artifact.tensors), artifact.graph
    text = decoded(data, path)
    return parse_file(text, path, _random_constants(text)), text


def _random_constants(text: str) -> dict[str, Any]:
    from mlec.ir.dtype import DType

    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, dtype, dims in _CONSTANT.findall(text):
        if dtype in {d.value for d in DType}:
            shape = tuple(int(extent) for extent in dims.split(",") if extent.strip())
            # Away from zero: some of them may be variances.
            values = rng.uniform(0.5, 2.0, shape) if DType(dtype).is_float else rng.integers(0, 2, shape)
            found[name] = values.astype(DType(dtype).numpy)
    return found

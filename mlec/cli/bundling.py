"""mlec bundle: a model as a directory that runs without the compiler."""

from __future__ import annotations

from pathlib import Path

import click

from mlec.cli.compiling import PATH, beside
from mlec.cli.output import json_option, print_json, print_pairs, size_text


@click.command("bundle")
@click.argument("model", type=PATH)
@click.option(
    "-o", "--output", type=PATH, help="A directory that does not exist yet. [default: MODEL's name without .mle]"
)
@click.option(
    "--trust", default="auto", show_default=True, help="sha256:... names the code of MODEL, where no trusted key did."
)
@json_option
def bundle_command(model: Path, output: Path | None, trust: str, as_json: bool) -> None:
    """Write a directory with MODEL and what runs it, for machines without mlec: numpy and tvm-ffi are enough there."""
    from mlec.packaging.bundling import bundle

    result = bundle(model, output or beside(model, ""), trust=trust)
    if as_json:
        print_json({"path": result.path, "size_bytes": result.size_bytes, "requirements": result.requirements})
        return
    print_pairs(
        [
            ("bundle", f"{result.path}, {size_text(result.size_bytes)}"),
            ("there", f"pip install -r requirements.txt  ({' '.join(result.requirements)})"),
            ("run", f"python {Path(result.path).name}/model.py X.npy -o Y.npz; in Python: import model; model.load()"),
        ]
    )

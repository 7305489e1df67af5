"""mlec demo: real models, trained here, compiled, verified and timed."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlec.cli.compiling import PATH
from mlec.cli.output import json_option, print_json, print_table, size_text, time_text
from mlec.errors import MlecError
from mlec.wording import plural

if TYPE_CHECKING:
    from mlec.demo import Outcome


@click.command("demo")
@click.option(
    "-o", "--output", type=PATH, default=Path("demo-out"), show_default=True, help="Folder for the files made."
)
@click.option("--only", multiple=True, metavar="TEXT", help="Only models whose name holds this text; may be repeated.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of mlec and of the libraries."
)
@json_option
def demo_command(output: Path, only: tuple[str, ...], threads: int, as_json: bool) -> int:
    """Train models on data sets bundled with scikit-learn, compile them, verify them against their source, and time both."""
    # The libraries read it when they are imported; training small models with more threads takes longer, not shorter.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from mlec.artifact.atomic import check_replaceable
    from mlec.cli.files import make_folder
    from mlec.demo import BATCHES, chosen, run_demo

    recipes = chosen(only)
    make_folder(output)
    check_replaceable(output / "model.mle")
    outcomes: list[Outcome] = []
    for outcome in run_demo(output, threads, recipes):
        outcomes.append(outcome)
        click.echo(f"{outcome.recipe.name}: {_status(outcome)}", err=True)
    if as_json:
        print_json({"threads": threads, "folder": output, "models": [asdict(outcome) for outcome in outcomes]})
    else:
        times = [title for rows in BATCHES for title in (f"{plural(rows, 'row')}: source", "mlec", "ratio")]
        columns = ["model", "data", "file", "score", "labels differ", "max error", *times]
        print_table(columns, [_row(outcome) for outcome in outcomes], right=columns[2:])
        click.echo()
        for outcome in outcomes:
            if outcome.missing:
                click.echo(f"{outcome.recipe.name}: {outcome.missing}")
        click.echo(
            f"Score: accuracy, or R2 of a regressor, on rows not trained on. Error: relative to the largest value, on the same rows.\n"
            f"Times: medians of interleaved calls, {plural(threads, 'thread')} for mlec and for the libraries.\n"
            f"Files and reports (open the .html in a browser): {output}"
        )
    failed = [outcome.recipe.name for outcome in outcomes if outcome.error]
    if failed and not as_json:
        raise MlecError(f"not compiled: {', '.join(failed)}", code="E_DEMO", hint="this is a defect of mlec")
    return 1 if failed else 0


def _status(outcome: Outcome) -> str:
    found = outcome.measured
    if found is None:
        return outcome.missing or outcome.error
    return f"trained in {found.training_seconds:.1f} s, compiled and validated in {found.compile_seconds:.1f} s"


def _row(outcome: Outcome) -> list[str]:
    found = outcome.measured
    if found is None:
        return [outcome.recipe.name, outcome.recipe.data, "not here" if outcome.missing else "failed"]
    row = [
        outcome.recipe.name, outcome.recipe.data, size_text(found.size_bytes), f"{found.score:.3f}",
        f"{found.label_mismatches} of {found.rows}", f"{found.max_rel_error:.0e}",
    ]  # fmt: skip
    for times in found.times.values():
        row += [time_text(times["source"]), time_text(times["compiled"]), f"{times['source'] / times['compiled']:.1f}x"]
    return row

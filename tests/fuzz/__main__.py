"""Fuzzing for as long as one likes: ``python -m tests.fuzz passes --graphs 1000000``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from tests.fuzz.checks import CHECKS


@click.command()
@click.argument("check", type=click.Choice(list(CHECKS)))
@click.option("--graphs", default=1000, show_default=True, help="How many random graphs.")
@click.option("--start", default=1_000_000, show_default=True, help="The first seed; the tests take those from 0.")
@click.option("--minutes", default=float("inf"), help="Stop after so long.")
@click.option(
    "--out",
    default="fuzz-out",
    show_default=True,
    type=click.Path(path_type=Path),
    help="For graphs that show a defect.",
)
def main(check: str, graphs: int, start: int, minutes: float, out: Path) -> None:
    """Random graphs through CHECK; a defect is made small and written as text. Exits with 1 if there is any."""
    end = time.monotonic() + 60 * minutes
    defects = done = 0
    for seed in range(start, start + graphs):
        if time.monotonic() > end:
            break
        done += 1
        defect = CHECKS[check](seed)
        if defect is None:
            continue
        defects += 1
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{check}-{seed}.mlet"
        comment = "".join(f"// {line}\n" for line in (defect.pipeline, *defect.text.splitlines()))
        file.write_text(f"{comment}{defect.reduced()}\n")
        click.echo(f"seed {seed}: {defect.pipeline}: {defect.text.splitlines()[0]}; {file}")
    click.echo(f"{check}: {done} graphs, {defects} defects")
    raise SystemExit(1 if defects else 0)


if __name__ == "__main__":
    main()

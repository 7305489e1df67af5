"""``python -m tests.faults``: every scenario as often as it takes to be sure; the tests try each a few times."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.faults.scenarios import available


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(available())))
@click.option("--tries", type=int, help="How often to try. [default: of each scenario its own]")
def main(names: tuple[str, ...], tries: int | None) -> None:
    """Run the scenarios NAMES, or all. Exits with 1 if one shows a defect."""
    if len(names) == 1:
        scenario = available()[names[0]]
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            seen = scenario.run(Path(folder), tries or scenario.tries)
        click.echo(f"{names[0]}: {seen} ({time.monotonic() - start:.0f} s)")
        return
    failed = 0
    for name in names or available():
        # One process each: what the others left in memory does not count.
        more = [] if tries is None else ["--tries", str(tries)]
        failed += subprocess.run([sys.executable, "-m", "tests.faults", name, *more], check=False).returncode != 0
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

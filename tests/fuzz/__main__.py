"""Fuzzing for as long as one likes: ``python -m tests.fuzz passes --graphs 1000000``, ``python -m tests.fuzz files --mutants 1000000``."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.fuzz.checks import CHECKS

start_option = click.option(
    "--start", default=1_000_000, show_default=True, help="The first seed; the tests take those from 0."
)
minutes_option = click.option("--minutes", default=float("inf"), help="Stop after so long.")
out_option = click.option(
    "--out", default="fuzz-out", show_default=True, type=click.Path(path_type=Path), help="For what shows a defect."
)


@click.group()
def main() -> None:
    """Random graphs through the checks of graphs, and damaged files through both readers. Exits with 1 if there is any defect."""


def graph_command(check: str) -> click.Command:
    """The command that makes random graphs for one check."""

    @click.command(check)
    @click.option("--graphs", default=1000, show_default=True, help="How many random graphs.")
    @start_option
    @minutes_option
    @out_option
    def command(graphs: int, start: int, minutes: float, out: Path) -> None:
        """Random graphs; a defect is made small and written as text."""
        state = tempfile.TemporaryDirectory()  # so that no trace of models that were saved stays behind
        os.environ["XDG_STATE_HOME"] = state.name
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

    return command


@click.command("files")
@click.option("--mutants", default=100_000, show_default=True, help="How many files.")
@start_option
@minutes_option
@out_option
@click.option(
    "--guided", is_flag=True, help="Let atheris (pip install atheris) prefer what reaches new code of the reader."
)
def files_command(mutants: int, start: int, minutes: float, out: Path, guided: bool) -> None:
    """Damaged files through both readers; one that shows a defect is kept."""
    from tests.artifact.mutants import Readers, corpus, mutant

    files = list(corpus().values())
    readers = Readers()
    if guided:
        _guided(readers, files, mutants, minutes, out)
    end = time.monotonic() + 60 * minutes
    rng = random.Random(start)
    defects = done = 0
    while done < mutants and time.monotonic() < end:
        done += 1
        data = mutant(rng, rng.choice(files), files)
        try:
            difference = readers.differ(data)
        except Exception as error:
            difference = repr(error)
        if difference:
            defects += 1
            out.mkdir(parents=True, exist_ok=True)
            file = out / f"{start}-{done}.mle"
            file.write_bytes(data)
            click.echo(f"{file}: {difference}")
    click.echo(f"files: {done} mutants, {defects} defects")
    raise SystemExit(1 if defects else 0)


def _guided(readers: object, files: list[bytes], mutants: int, minutes: float, out: Path) -> None:
    """Never returns: the fuzzer ends the process."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["mlec.artifact"]):
        for name in [
            name for name in sys.modules if name.startswith("mlec.artifact") or name.startswith("tests.artifact")
        ]:
            del sys.modules[name]
        from tests.artifact.mutants import Readers, mutant

    readers = Readers()
    out.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(files):
        (out / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        if difference := readers.differ(data):
            raise AssertionError(difference)

    limit = [] if minutes == float("inf") else [f"-max_total_time={int(60 * minutes)}"]
    arguments = [sys.argv[0], str(out), f"-runs={mutants}", f"-artifact_prefix={out}/", "-max_len=100000", *limit]
    atheris.Setup(
        arguments, one, custom_mutator=lambda data, most, seed: mutant(random.Random(seed), data, files)[:most]
    )
    atheris.Fuzz()


for _check in CHECKS:
    main.add_command(graph_command(_check))
main.add_command(files_command)

if __name__ == "__main__":
    main()

"""``python -m bench.run``: times mlec beside its peers and prints ratios.

Each number of threads runs in a process of its own, with the environment variables set that the libraries read at their start.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.competitors import ALL
from bench.harness import Case, Timing, run_case
from bench.models import chosen
from bench.table import markdown, put_into, summary
from mlec.wording import plural

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TVM_NUM_THREADS",
    "LLEAVES_NUM_THREADS",
)


@click.command()
@click.option(
    "--group",
    multiple=True,
    help="sklearn, trees, networks (these by default), trees-full, trees-wide, networks-large, layers",
)
@click.option("--case", "names", multiple=True, help="name of a case in bench/models.py")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--only", multiple=True, help="competitors to run, besides mlec and source")
@click.option("--budget", default=15.0, show_default=True, help="minutes, after which no further case is begun")
@click.option("--kernels", is_flag=True, help="show our own kernels as parts of the machine's peaks, too")
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="write the timings here")
@click.option("--readme", is_flag=True, help="put the means into README.md and the table into bench/RESULTS.md")
@click.option("--in-process", is_flag=True, hidden=True)
def main(
    group: tuple[str, ...],
    names: tuple[str, ...],
    threads: str,
    only: tuple[str, ...],
    budget: float,
    kernels: bool,
    out: Path | None,
    readme: bool,
    in_process: bool,
) -> None:
    """Times mlec beside its peers."""
    try:
        cases = chosen(group, names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if unknown := set(only) - {c.name for c in ALL}:
        raise click.UsageError(f"no competitor {', '.join(unknown)}; there are {', '.join(c.name for c in ALL)}")
    counts = [int(count) for count in threads.split(",")]
    if in_process:
        warnings.filterwarnings("ignore")
        timings, skipped = _run(cases, counts[0], only, time.monotonic() + budget * 60)
        done = [case for name, case in cases.items() if name not in skipped]
        shares = _run_kernels(done, counts[0]) if kernels else ""
        click.echo(json.dumps([[t.to_dict() for t in timings], skipped, shares]))
        return
    chosen_flags = [part for name in cases for part in ("--case", name)] + [
        part for n in only for part in ("--only", n)
    ]
    timings, skipped, shares, end = [], [], [], time.monotonic() + budget * 60
    for i, count in enumerate(counts):
        left = max(0.0, end - time.monotonic()) / 60 / (len(counts) - i)
        flags = [*chosen_flags, "--budget", str(left), *(["--kernels"] if kernels else [])]
        entries, late, share = _subprocess(count, flags)
        timings += [Timing(**entry) for entry in entries]
        skipped += [f"{name} ({plural(count, 'thread')})" for name in late]
        shares += [share] if share else []
    table = "\n\n".join([markdown(timings, _title(), skipped), *shares])
    click.echo(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": _title(), "timings": [t.to_dict() for t in timings]}, indent=1))
    if readme:
        path = Path(__file__).parents[1] / "README.md"
        path.write_text(put_into(path.read_text(), summary(timings, _title(), skipped)))
        (Path(__file__).parent / "RESULTS.md").write_text(f"# Results\n\n{table}\n")


def _subprocess(threads: int, flags: list[str]) -> Any:
    """What a process of its own with this number of threads prints as its last line."""
    command = [sys.executable, "-m", "bench.run", "--in-process", "--threads", str(threads), *flags]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(
    cases: dict[str, Callable[[], Case]], threads: int, only: tuple[str, ...], end: float
) -> tuple[list[Timing], list[str]]:
    """The timings, and the names of the cases that were not begun by ``end``."""
    peers = [c for c in ALL if not only or c.name in (*only, "mlec", "source")]
    timings: list[Timing] = []
    skipped: list[str] = []
    for name, make in cases.items():
        if time.monotonic() < end:
            timings += run_case(make(), peers, threads, _log)
        else:
            skipped.append(name)
    return timings, skipped


def _run_kernels(cases: list[Callable[[], Case]], threads: int) -> str:
    from bench.kernels import kernel_table, time_kernels
    from bench.peak import measure

    peak = measure(threads)
    return kernel_table([t for make in cases for t in time_kernels(make(), threads, _log)], peak, threads)


def _log(text: str) -> None:
    click.echo(text, err=True)


def _title() -> str:
    from importlib.metadata import version

    import mlec
    from mlec.processor import described

    found = [
        f"{name} {version(name)}"
        for name in ("scikit-learn", "xgboost", "xgboost-cpu", "lightgbm", "torch", "onnxruntime", "openvino")
        if _installed(name)
    ]
    processor = next(described("model name"), platform.machine())
    machine = f"mlec {mlec.__version__} on {processor}, {os.cpu_count()} cores; {', '.join(found)}."
    return f"{machine} A ratio of 2x means that the peer takes twice as long."


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()

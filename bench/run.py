"""``python -m bench.run``: times mlec beside its peers and prints ratios.

Each number of threads runs in a process of its own, with the environment variables set that the libraries read at their start.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import click

from bench.harness import Timing, run_case
from bench.table import markdown, put_into, summary

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TVM_NUM_THREADS",
    "LLEAVES_NUM_THREADS",
)


@click.command()
@click.option("--group", multiple=True, help="sklearn, trees, networks; all by default")
@click.option("--case", "names", multiple=True, help="name of a function in bench/models.py")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--only", multiple=True, help="competitors to run, besides mlec and source")
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="write the timings here")
@click.option("--readme", is_flag=True, help="put the means into README.md and the table into bench/RESULTS.md")
@click.option("--in-process", is_flag=True, hidden=True)
def main(
    group: tuple[str, ...],
    names: tuple[str, ...],
    threads: str,
    only: tuple[str, ...],
    out: Path | None,
    readme: bool,
    in_process: bool,
) -> None:
    """Times mlec beside its peers."""
    if in_process:
        timings = _run(group, names, int(threads), only)
        click.echo(json.dumps([t.to_dict() for t in timings]))
        return
    timings = []
    for count in threads.split(","):
        timings += _subprocess(count, group, names, only)
    table = markdown(timings, _title())
    click.echo(table)
    for t in timings:
        if t.error:
            click.echo(f"failed: {t.case}, {t.competitor}: {t.error}", err=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": _title(), "timings": [t.to_dict() for t in timings]}, indent=1))
    if readme:
        path = Path(__file__).parents[1] / "README.md"
        path.write_text(put_into(path.read_text(), summary(timings, _title())))
        (Path(__file__).parent / "RESULTS.md").write_text(f"# Results\n\n{table}\n")


def _subprocess(threads: str, group: tuple[str, ...], names: tuple[str, ...], only: tuple[str, ...]) -> list[Timing]:
    command = [sys.executable, "-m", "bench.run", "--in-process", "--threads", threads]
    for flag, values in (("--group", group), ("--case", names), ("--only", only)):
        command += [part for value in values for part in (flag, value)]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Timing(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def _run(group: tuple[str, ...], names: tuple[str, ...], threads: int, only: tuple[str, ...]) -> list[Timing]:
    from bench.competitors import ALL
    from bench.models import CASES

    warnings.filterwarnings("ignore")
    peers = [c for c in ALL if not only or c.name in (*only, "mlec", "source")]
    timings: list[Timing] = []
    for name, make in CASES.items():
        if names and name not in names:
            continue
        case = make()
        if not group or case.group in group:
            timings += run_case(case, peers, threads, lambda text: click.echo(text, err=True))
    return timings


def _title() -> str:
    from importlib.metadata import version

    import mlec

    found = [
        f"{name} {version(name)}"
        for name in ("scikit-learn", "xgboost", "xgboost-cpu", "lightgbm", "torch", "onnxruntime", "openvino")
        if _installed(name)
    ]
    machine = f"mlec {mlec.__version__} on {_processor()}, {os.cpu_count()} cores; {', '.join(found)}."
    return f"{machine} A ratio of 2x means that the peer takes twice as long."


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


if __name__ == "__main__":
    main()

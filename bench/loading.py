"""``python -m bench.loading``: what it takes until a saved model answers, beside the libraries that models come from.

Cold: a fresh process, from its first line of Python to the first answer, with all imports and without the start of the interpreter.
Warm: loading once more where that was done before. All that is compared takes turns; a ratio of 2x means that the other takes twice as
long. Then a file with 1 GiB of weights, which several processes load, and what the models of the demo take on disk.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

import mlec
from bench.competitors import onnx_bytes
from bench.harness import Case, UnavailableError
from bench.models import chosen
from bench.run import THREAD_VARIABLES
from bench.table import geomean, seconds_text
from mlec.cli.output import print_table
from mlec.demo.recipes import RECIPES
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.measuring.timing import interleaved

MIB = 1 << 20
CASES = ("logistic_pipeline", "xgboost_d6", "mlp_784")
WIDTH = 4096
"""Of the square matrices in the file with large weights: 64 MiB each."""

BEGIN = """
import sys, time
begin = time.perf_counter()
import numpy as np
path, method, x = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
"""
END = """
seconds = {"all": time.perf_counter() - begin}
"""
REPORT = """
import json
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([seconds, 1024 * int(status["VmRSS"].split()[0])]), flush=True)
"""
FIRST_ANSWERS = {
    "mlec": """
import mlec
getattr(mlec.load(path), method)(x)
""",
    "ONNX Runtime": """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})
""",
    "XGBoost": """
import xgboost
xgboost.Booster(model_file=path).inplace_predict(x)
""",
    "joblib": """
import joblib
getattr(joblib.load(path), method)(x)
""",
    "torch": """
import torch
torch.export.load(path).module()(torch.from_numpy(x))
""",
}
"""What each library's users write, by its name; between `BEGIN` and `END`."""

PARTS = """
import sys, time
marks = [time.perf_counter()]
def mark():
    marks.append(time.perf_counter())
import numpy as np
mark()
path, method, x = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
mark()
from mlec.runtime.ffi import Interface
mark()
from mlec.runtime.library import load_library
load_library()
mark()
import mlec
from mlec.packaging.loading import load
mark()
model = load(path)
mark()
getattr(model, method)(x)
mark()
names = ["numpy", "", "runtime modules", "libraries", "other modules", "load", "first call"]
seconds = {name: end - begin for name, begin, end in zip(names, marks, marks[1:]) if name}
"""
"""The cold start of mlec in pieces."""

LARGE = """
import sys, time
import numpy as np, mlec
mlec.load(sys.argv[2])
marks = [time.perf_counter()]
model = mlec.load(sys.argv[1])
marks.append(time.perf_counter())
for _ in range(2):
    model.run([np.ones((1, int(sys.argv[3])), np.float32)])
    marks.append(time.perf_counter())
seconds = dict(zip(("load", "first", "second"), (end - begin for begin, end in zip(marks, marks[1:]))))
"""


@click.command()
@click.option("--rounds", default=10, show_default=True, help="fresh processes of each kind")
@click.option("--case", "names", multiple=True, help=f"of bench/models.py; by default {', '.join(CASES)}")
@click.option("--only", multiple=True, type=click.Choice(["cold", "warm", "large", "sizes"]), help="all by default")
@click.option("--gib", default=1.0, show_default=True, help="weights of the large file")
@click.option("--processes", default=3, show_default=True, help="that hold the large file at once")
def main(rounds: int, names: tuple[str, ...], only: tuple[str, ...], gib: float, processes: int) -> None:
    """Measures loading: seconds, memory, bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not only or {"cold", "warm"} & {*only}:
            saved = {case: _saved(make(), folder / case) for case, make in chosen((), names or CASES).items()}
            if not only or "cold" in only:
                _print_cold(saved, rounds, folder)
            if not only or "warm" in only:
                _print_warm(saved)
        if not only or "large" in only:
            _print_large(folder, gib, processes)
        if not only or "sizes" in only:
            _print_sizes(folder)


# -- small models --------------------------------------------------------------------------------------------------------


class _Saved:
    """A model in the files of all who load it.

    Attributes:
        case: the trained model.
        files: by the name of the library that loads it.
        method: to call.
        x: one row, as a file.
    """

    def __init__(self, case: Case, files: Mapping[str, Path], method: str, x: Path) -> None:
        self.case, self.files, self.method, self.x = case, files, method, x


def _saved(case: Case, folder: Path) -> _Saved:
    import joblib

    folder.mkdir()
    rows = case.inputs(4)
    files = {"mlec": folder / "model.mle"}
    example = tuple(rows) if case.framework == "torch" else None
    mlec.compile(case.model, example, validate=False, progress=False).save(files["mlec"])
    try:
        content = onnx_bytes(case)
        files["ONNX Runtime"] = folder / "model.onnx"
        files["ONNX Runtime"].write_bytes(content)
    except UnavailableError as error:
        click.echo(f"{case.name}: no ONNX Runtime: {error}", err=True)
    if case.framework == "xgboost":
        files["XGBoost"] = folder / "model.ubj"
        case.model.get_booster().save_model(files["XGBoost"])
    if case.framework == "torch":
        import torch

        files["torch"] = folder / "model.pt2"
        example = (torch.from_numpy(rows[0]),)
        torch.export.save(
            torch.export.export(case.model.eval(), example, dynamic_shapes=({0: torch.export.Dim("n")},)),
            files["torch"],
        )
    else:
        files["joblib"] = folder / "model.joblib"
        joblib.dump(case.model, files["joblib"])
    np.save(folder / "x.npy", rows[0][:1])
    return _Saved(case, files, case.method or "run", folder / "x.npy")


def _print_cold(saved: Mapping[str, _Saved], rounds: int, folder: Path) -> None:
    click.echo("Cold start: best and median of all processes; resident memory after the first answer.\n")
    lines, parts = [], []
    ratios: dict[str, list[float]] = {}
    for model in saved.values():
        codes = {name: BEGIN + FIRST_ANSWERS[name] + END for name in model.files} | {"parts": PARTS}
        files = {**model.files, "parts": model.files["mlec"]}
        found: dict[str, list[Any]] = {name: [] for name in codes}
        for turn in range(rounds + 1):
            for name, code in codes.items():
                words = (str(files[name]), model.method, str(model.x))
                answer = _fresh(code, words, folder)
                if turn:  # the first one writes the compiled modules, and fills the caches of files
                    found[name].append(answer)
        ours = median(seconds["all"] for seconds, _ in found["mlec"])
        for name in model.files:
            times = [seconds["all"] for seconds, _ in found[name]]
            memory = median(nbytes for _, nbytes in found[name])
            ratio = median(times) / ours
            ratios.setdefault(name, []).append(ratio)
            lines.append(
                [
                    model.case.name,
                    name,
                    f"{min(times) * 1e3:.0f} ms",
                    f"{median(times) * 1e3:.0f} ms",
                    f"{ratio:.2f}x",
                    f"{memory / MIB:.0f} MiB",
                ]
            )
        best = {part: min(seconds[part] for seconds, _ in found["parts"]) for part in found["parts"][0][0]}
        parts.append([model.case.name, *(f"{value * 1e3:.1f} ms" for value in best.values())])
    _print(["model", "by", "best", "median", "ratio", "memory"], lines)
    _print_means(ratios)
    click.echo("\nThe cold start of mlec in pieces, each at its best.\n")
    _print(["model", *best], parts)


def _print_warm(saved: Mapping[str, _Saved]) -> None:
    click.echo("\nLoading once more in one process, without a call.\n")
    lines = []
    ratios: dict[str, list[float]] = {}
    for model in saved.values():
        loaders = {name: _loader(name, path) for name, path in model.files.items()}
        times = interleaved(loaders, seconds=4.0, least=10)
        for name, found in times.items():
            ratio = min(found) / min(times["mlec"])
            ratios.setdefault(name, []).append(ratio)
            lines.append(
                [model.case.name, name, seconds_text(min(found)), seconds_text(median(found)), f"{ratio:.2f}x"]
            )
    _print(["model", "by", "best", "median", "ratio of the best"], lines)
    _print_means(ratios)


def _loader(name: str, path: Path) -> Callable[[], object]:
    if name == "mlec":
        return lambda: mlec.load(path)
    if name == "ONNX Runtime":
        import onnxruntime

        return lambda: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if name == "XGBoost":
        import xgboost

        return lambda: xgboost.Booster(model_file=path)
    if name == "torch":
        import torch

        return lambda: torch.export.load(path)
    import joblib

    return lambda: joblib.load(path)


# -- large weights -------------------------------------------------------------------------------------------------------


def _matrices(count: int) -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder("large")
    x = b.input("x", tensor("f32", ("n", WIDTH)))
    for _ in range(count):
        x = b("relu", b("matmul", x, b.constant(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / 64)))
    return b.finish([x])


def _print_large(folder: Path, gib: float, processes: int) -> None:
    path, small = folder / "large.mle", folder / "small.mle"
    mlec.compile(_matrices(max(1, round(gib * 1024 / 64))), validate=False, progress=False).save(path)
    b = GraphBuilder("small")
    mlec.compile(b.finish([b("relu", b.input("x", tensor("f32", ("n", 2))))]), validate=False, progress=False).save(
        small
    )
    os.sync()  # pages that wait to be written count as one's own
    size = path.stat().st_size
    click.echo(
        f"\nA file of {size / MIB:.0f} MiB, in {processes} processes at once that have loaded another one before.\n"
    )
    lines = []
    with ExitStack() as stack:
        running = []
        for _ in range(processes):
            process = stack.enter_context(
                _start(LARGE + REPORT + "sys.stdin.read()\n", (str(path), str(small), str(WIDTH)), folder)
            )
            assert process.stdout is not None
            running.append((process, json.loads(process.stdout.readline())[0]))
        for number, (process, seconds) in enumerate(running, 1):
            held = _pages(process.pid, path)
            lines.append(
                [number, *(f"{seconds[part] * 1e3:.1f} ms" for part in ("load", "first", "second"))]
                + [f"{held[kind] / MIB:.0f} MiB" for kind in ("Rss", "Pss", "Shared_Clean", "Anonymous")]
            )
        for process, _ in running:
            process.communicate()
    columns = ["process", "load", "first call: checks the weights", "second call"]
    _print([*columns, "pages of the file", "its part of them", "shared", "copied"], lines)
    path.unlink()


def _pages(pid: int, path: Path) -> dict[str, int]:
    """Bytes of a process that are pages of a file, by the names of ``/proc/PID/smaps``."""
    found = dict.fromkeys(("Rss", "Pss", "Shared_Clean", "Anonymous"), 0)
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name:  # the begin of a mapping
            inside = line.endswith(str(path))
        elif inside and name in found:
            found[name] += 1024 * int(rest.split()[0])
    return found


# -- sizes ---------------------------------------------------------------------------------------------------------------


def _print_sizes(folder: Path) -> None:
    """Of the files that the models of the demo make: by mlec, and by those who train them."""
    click.echo(
        "\nFiles in KiB; how much smaller ours is than that of joblib: both as they are saved by default (ours has graph and "
        "code by zlib), both compressed, only ours compressed.\n"
    )
    lines = []
    for recipe in RECIPES:
        trained = recipe.train()
        compiled = mlec.compile(trained.model, (trained.inputs,), validate=False, progress=False)
        sizes = [*_mlec_sizes(compiled, folder), *_joblib_sizes(trained.model), len(pickle.dumps(trained.model))]
        smaller = [f"{100 * (1 - sizes[ours] / sizes[other]):.0f} %" for ours, other in ((0, 2), (1, 3), (1, 2))]
        lines.append([recipe.name, recipe.data, *(f"{size / 1024:.0f}" for size in sizes), *smaller])
        click.echo(" ".join(map(str, lines[-1])), err=True)
    columns = ["mlec", "mlec zstd", "joblib", "joblib compress=3", "pickle"]
    _print(["model", "data", *columns, "by default", "compressed", "zstd than joblib"], lines)


def _mlec_sizes(compiled: Any, folder: Path) -> list[int]:
    sizes = []
    for compression in (None, "zstd"):
        compiled.save(folder / "model.mle", compression=compression)
        sizes.append((folder / "model.mle").stat().st_size)
    return sizes


def _joblib_sizes(model: Any) -> list[int]:
    import joblib

    sizes = []
    for compress in (0, 3):
        file = io.BytesIO()
        joblib.dump(model, file, compress=compress)
        sizes.append(len(file.getvalue()))
    return sizes


# -- processes and tables ------------------------------------------------------------------------------------------------


def _start(code: str, words: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """A fresh process, whose compiled modules lie in a folder of their own: as where a package was installed and used before."""
    environment = {k: v for k, v in os.environ.items() if k not in (*THREAD_VARIABLES, "PYTHONDONTWRITEBYTECODE")}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "modules")
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _fresh(code: str, words: Sequence[str], folder: Path) -> Any:
    """What a fresh process reports."""
    with _start(code + REPORT, words, folder) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise click.ClickException(f"a process failed: {code}")
    return json.loads(printed.splitlines()[-1])


def _print(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print_table(columns, rows, right=[column for column in columns if column not in ("model", "by", "data")])


def _print_means(ratios: Mapping[str, Sequence[float]]) -> None:
    means = [f"{name} {geomean(found):.2f}x" for name, found in ratios.items() if name != "mlec"]
    click.echo(f"geometric means: {', '.join(means)}")


if __name__ == "__main__":
    main()

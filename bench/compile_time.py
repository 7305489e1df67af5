"""``python -m bench.compile_time``: seconds and memory that compiling large models takes, each in a process of its own.

The process that trains saves the model to a file. Another one compiles that file as users do, validated, so that its peak of memory is that
of mlec alone, and one more compiles it without validation: a second compile in one process would find caches warm.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

MIB = 1 << 20


def _trees_500(folder: Path) -> Path:
    from xgboost import XGBRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 28)).astype(np.float32)
    y = np.sin(x[:, 0] * 2) * 3 + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=8000)
    options = {"learning_rate": 0.01, "subsample": 0.7, "max_bin": 64}
    return _saved(XGBRegressor(n_estimators=500, max_depth=8, **options).fit(x, y), folder)


def _trees_26000(folder: Path) -> Path:
    from bench.ensembles import half_a_million_leaves

    return _saved(half_a_million_leaves(), folder)


def _saved(model: Any, folder: Path) -> Path:
    path = folder / "model.ubj"
    model.get_booster().save_model(path)
    return path


def _resnet18(folder: Path) -> Path:
    import torch

    from bench.networks import ResNet18

    batch = torch.export.Dim("n", min=1, max=1 << 16)
    program = torch.export.export(ResNet18().eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: batch},))
    path = folder / "model.pt2"
    torch.export.save(program, path)
    return path


MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "trees_500": ("XGBoost 500 x d8, 28 features", _trees_500),
    "trees_26000": ("XGBoost 26,000 x d6, 16 features", _trees_26000),
    "resnet18": ("ResNet-18, 3 x 224 x 224", _resnet18),
}


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice(list(MODELS)), help="all by default")
@click.option("--compile", "path", type=click.Path(path_type=Path), default=None, hidden=True)
@click.option("--validate/--no-validate", default=True, hidden=True)
def main(names: tuple[str, ...], path: Path | None, validate: bool) -> None:
    """Measures compiling: seconds, and the peak of memory."""
    if path is not None:
        click.echo(json.dumps(_compile(path, validate)))
        return
    click.echo(
        "| model | file | import | compile | without validation | rows compared | peak memory | of it libraries | `.mle` |"
    )
    click.echo(f"|{'---|' * 9}")
    for name in names or MODELS:
        title, save = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            model = save(Path(folder))
            plain, full = (_measured(model, flag) for flag in ("--no-validate", "--validate"))
            size = model.stat().st_size
        click.echo(
            f"| {title} | {size / MIB:.1f} MiB | {full['import_seconds']:.2f} s | {full['seconds']:.2f} s | {plain['seconds']:.2f} s "
            f"| {full['rows']:,} | {full['peak'] / MIB:.0f} MiB | {full['libraries'] / MIB:.0f} MiB "
            f"| {full['written'] / MIB:.1f} MiB |"
        )


def _measured(model: Path, flag: str) -> Any:
    command = [sys.executable, "-m", "bench.compile_time", "--compile", str(model), flag]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def _compile(path: Path, validate: bool) -> dict[str, Any]:
    """Compiles a model file in this process."""
    start = time.perf_counter()
    import mlec

    example = (np.zeros((2, 3, 224, 224), np.float32),) if path.suffix == ".pt2" else None
    # What compiling loads besides: TVM, and the library that the model comes from.
    importlib.import_module("mlec.backends.tvm.backend")
    importlib.import_module("mlec.frontends.xgboost" if example is None else "torch")
    imported = time.perf_counter() - start
    libraries = _peak()
    start = time.perf_counter()
    compiled = mlec.compile(path, example, validate=validate, progress=False)
    seconds = time.perf_counter() - start
    peak = _peak()
    target = path.with_suffix(".mle")
    compiled.save(target)
    methods = compiled.report.parity.get("methods", {})
    return {
        "import_seconds": imported,
        "seconds": seconds,
        "rows": max((found["rows"] for found in methods.values()), default=0),
        "peak": peak,
        "libraries": libraries,
        "written": target.stat().st_size,
    }


def _peak() -> int:
    """Bytes of memory that this process held at most. (What ``getrusage`` tells begins with those of the process that started it.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()

"""``python -m bench.compile_time``: seconds and memory that compiling large models takes, each in a process of its own.

The process that trains saves the model to a file; another one compiles that file, so that its peak of memory is that of mlec alone.
"""

from __future__ import annotations

import importlib
import json
import resource
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


def _ensemble(trees: int, depth: int, features: int, rows: int, least: float) -> Callable[[Path], Path]:
    """Trains and saves an XGBoost model; ``least`` is the smallest weight of a leaf, which decides how many there are."""

    def save(folder: Path) -> Path:
        from xgboost import XGBRegressor

        rng = np.random.default_rng(0)
        x = rng.normal(size=(rows, features)).astype(np.float32)
        y = np.sin(x[:, 0] * 2) * 3 + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=rows)
        model = XGBRegressor(
            n_estimators=trees, max_depth=depth, learning_rate=0.01, subsample=0.7, min_child_weight=least, max_bin=64
        )
        path = folder / "model.ubj"
        model.fit(x, y).get_booster().save_model(path)
        return path

    return save


def _resnet18(folder: Path) -> Path:
    import torch

    from bench.networks import ResNet18

    batch = torch.export.Dim("n", min=1, max=1 << 16)
    program = torch.export.export(ResNet18().eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: batch},))
    path = folder / "model.pt2"
    torch.export.save(program, path)
    return path


MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "trees_500": ("XGBoost 500 x d8, 28 features", _ensemble(500, 8, 28, 8000, 1)),
    "trees_26000": ("XGBoost 26,000 x d6, 16 features", _ensemble(26_000, 6, 16, 1000, 12)),
    "resnet18": ("ResNet-18, 3 x 224 x 224", _resnet18),
}


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice(list(MODELS)), help="all by default")
@click.option("--compile", "path", type=click.Path(path_type=Path), default=None, hidden=True)
def main(names: tuple[str, ...], path: Path | None) -> None:
    """Measures compiling: seconds, and the peak of memory."""
    if path is not None:
        click.echo(json.dumps(_compile(path)))
        return
    click.echo("| model | file | import | compile | validate | peak memory | of it libraries | `.mle` |")
    click.echo(f"|{'---|' * 8}")
    for name in names or MODELS:
        title, save = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            model = save(Path(folder))
            done = subprocess.run(
                [sys.executable, "-m", "bench.compile_time", "--compile", str(model)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            m = json.loads(done.stdout.splitlines()[-1])
            size = model.stat().st_size
        click.echo(
            f"| {title} | {size / MIB:.1f} MiB | {m['import_seconds']:.2f} s | {m['seconds']:.2f} s | {m['validation_seconds']:.2f} s "
            f"| {m['peak'] / MIB:.0f} MiB | {m['libraries'] / MIB:.0f} MiB | {m['written'] / MIB:.1f} MiB |"
        )


def _compile(path: Path) -> dict[str, Any]:
    """Compiles a model file in this process, without and with validation."""
    start = time.perf_counter()
    import mlec

    example = (np.zeros((2, 3, 224, 224), np.float32),) if path.suffix == ".pt2" else None
    # What compiling loads besides: TVM, and the library that the model comes from.
    importlib.import_module("mlec.backends.tvm.backend")
    importlib.import_module("mlec.frontends.xgboost" if example is None else "torch")
    imported = time.perf_counter() - start
    libraries = _peak()
    start = time.perf_counter()
    compiled = mlec.compile(path, example, validate=False, progress=False)
    seconds = time.perf_counter() - start
    peak = _peak()
    target = path.with_suffix(".mle")
    compiled.save(target)
    start = time.perf_counter()
    mlec.compile(path, example, progress=False)
    return {
        "import_seconds": imported,
        "seconds": seconds,
        "validation_seconds": max(0.0, time.perf_counter() - start - seconds),
        "peak": peak,
        "libraries": libraries,
        "written": target.stat().st_size,
    }


def _peak() -> int:
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

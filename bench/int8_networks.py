"""``python -m bench.int8_networks``: whole networks on 8 bits beside themselves in float32: time, file, and how far results move.

The classifiers of the demo are trained here, and their accuracy on data that they have not seen counts. The networks of the bench have
random weights: of them only times, sizes and errors say something. Both precisions are timed in one process, in turn.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import mlec
from bench import networks
from mlec.cli.output import print_table
from mlec.timing import interleaved

CALIBRATION = 128


def _demo(name: str) -> Callable[[], tuple[Any, Any, Any]]:
    def make() -> tuple[Any, Any, Any]:
        found = getattr(importlib.import_module("mlec.demo.networks"), name)()
        return found.model, found.inputs, found.truth

    return make


def _random(make: Callable[[], Any], rows: int, *shape: int) -> Callable[[], tuple[Any, Any, Any]]:
    def made() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        return make().eval(), np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32), None

    return made


CASES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "digits-mlp": _demo("mlp"),
    "digits-resnet": _demo("resnet"),
    "digits-transformer": _demo("transformer"),
    "mlp": _random(lambda: networks.Mlp(784, 1024, 1024, 10), 256, 784),
    "resnet8": _random(networks.ResNet8, 64, 3, 32, 32),
    "resnet18": _random(networks.ResNet18, 8, 3, 224, 224),
}
"""By name: a network, its inputs, and what is true of them."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--threads", default=1, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="To time each batch.")
def main(names: tuple[str, ...], threads: int, seconds: float) -> None:
    rows = [_measured(name, CASES[name], threads, seconds) for name in names or CASES]
    columns = list(rows[0])
    print_table(columns, [[row[column] for column in columns] for row in rows], right=columns[1:])


def _measured(name: str, make: Callable[[], tuple[Any, Any, Any]], threads: int, seconds: float) -> dict[str, str]:
    network, x, truth = make()
    options: dict[str, Any] = {"num_threads": threads, "progress": False}
    plain = mlec.compile(network, x[:4], **options)
    eight = mlec.compile(network, x[:4], precision="int8", calibration=x[:CALIBRATION], **options)
    row = {"network": name}
    for batch in (1, len(x) if truth is None else 64):
        inputs = [x[:batch]]
        times = interleaved({"float": partial(plain.run, inputs), "int": partial(eight.run, inputs)}, seconds)
        row[f"speedup, {'1 row' if batch == 1 else 'batch'}"] = f"{min(times['float']) / min(times['int']):.2f}x"
    with tempfile.TemporaryDirectory() as folder:
        sizes = [os.path.getsize(m.save(Path(folder) / "m.mle").path) for m in (plain, eight)]
    wanted, got = (np.asarray(model.run([x])[0]) for model in (plain, eight))
    row |= {
        "smaller": f"{sizes[0] / sizes[1]:.2f}x",
        "error": f"{np.abs(wanted - got).max() / np.abs(wanted).max():.2%}",
        "same label": f"{np.mean(wanted.argmax(1) == got.argmax(1)):.2%}",
        "points lost": ""
        if truth is None
        else f"{100 * (np.mean(wanted.argmax(1) == truth) - np.mean(got.argmax(1) == truth)):.2f}",
        "layers in 8 bits": f"{sum(f['decision'] != 'float32' for f in eight.report.quantization)} of {len(eight.report.quantization)}",
    }
    return row


if __name__ == "__main__":
    main()

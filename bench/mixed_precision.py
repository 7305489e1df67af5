"""``python -m bench.mixed_precision``: whole networks on 16 bits beside themselves in float32 and peers on bf16: time, file, error.

The networks are those of `bench.int8_networks`. All are timed in one process, in turn; a ratio of 2x means that the other takes twice
as long as ours on bf16. The peers: the torch module converted to bfloat16, and OpenVINO asked for bf16. An error is the largest
difference from float32 of our own, relative to its largest result.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

import mlec
from bench.competitors import onnx_bytes
from bench.harness import Case
from bench.int8_networks import CASES, Array, Call
from mlec.cli.output import print_table
from mlec.measuring.timing import interleaved

PRECISIONS = ("fp16", "bf16")


@click.command()
@click.argument("names", nargs=-1)
@click.option("--threads", default=1, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="To time each batch.")
def main(names: tuple[str, ...], threads: int, seconds: float) -> None:
    torch.set_num_threads(threads)
    rows = [_measured(name, threads, seconds) for name in names or CASES]
    columns = list(rows[0])
    print_table(columns, [[row[column] for column in columns] for row in rows], right=columns[1:])
    for precision in PRECISIONS:
        errors = [float(row[f"{precision}, error"]) for row in rows]
        print(f"{precision}: median error {median(errors):.1e}, largest {max(errors):.1e}")


def _measured(name: str, threads: int, seconds: float) -> dict[str, str]:
    network, x, truth = CASES[name]()
    with tempfile.TemporaryDirectory() as folder:
        paths = {form: Path(folder) / f"{form}.mle" for form in ("float32", *PRECISIONS)}
        for form, path in paths.items():
            options: dict[str, Any] = {"precision": form} if form in PRECISIONS else {}
            mlec.compile(network, x[:4], progress=False, **options).save(path)
        models = {form: mlec.load(path, num_threads=threads) for form, path in paths.items()}
        sizes = {form: path.stat().st_size for form, path in paths.items()}
    peers = {"torch bf16": in_torch(network), "OpenVINO bf16": in_openvino(name, network, x, threads)}
    row = {"network": name}
    for batch in (1, len(x) if truth is None else 64):
        inputs = x[:batch]
        calls: dict[str, Call] = {form: partial(model.run, [inputs]) for form, model in models.items()}
        calls |= {peer: partial(call, inputs) for peer, call in peers.items()}
        least = {what: min(times) for what, times in interleaved(calls, seconds).items()}
        where = "1 row" if batch == 1 else "batch"
        row |= {f"{what}, {where}": f"{least[what] / least['bf16']:.2f}x" for what in least if what != "bf16"}
    wanted = np.asarray(models["float32"].run([x])[0])
    for form in PRECISIONS:
        got = np.asarray(models[form].run([x])[0])
        row |= {
            f"{form}, smaller": f"{sizes['float32'] / sizes[form]:.2f}x",
            f"{form}, error": f"{np.abs(wanted - got).max() / np.abs(wanted).max():.1e}",
            f"{form}, same label": f"{np.mean(wanted.argmax(1) == got.argmax(1)):.2%}",
        }
    return row


# -- peers -----------------------------------------------------------------------------------------------------------------


def in_torch(network: torch.nn.Module) -> Any:
    """Weights and activations of bfloat16; results in float32."""
    converted = copy.deepcopy(network).to(torch.bfloat16)

    def call(x: Array) -> Array:
        given = torch.from_numpy(x)
        with torch.inference_mode():
            result: Array = converted(given.to(torch.bfloat16) if given.is_floating_point() else given).float().numpy()
        return result

    return call


def in_openvino(name: str, network: torch.nn.Module, x: Array, threads: int) -> Any:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().read_model(onnx_bytes(Case(name, "bf16", "torch", network, lambda rows: [x[:rows]])))
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda inputs: request.infer([inputs], share_inputs=True, share_outputs=True)


if __name__ == "__main__":
    main()

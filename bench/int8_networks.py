"""``python -m bench.int8_networks``: whole networks on 8 bits beside themselves in float32 and peers on 8 bits: time, file, error.

The classifiers of the demo are trained here, and their accuracy on data that they have not seen counts. The networks of the bench have
random weights: of them only times, sizes and errors say something. All are timed in one process, in turn; a ratio of 2x means that the
other takes twice as long as ours on 8 bits. The peers run the network as ONNX Runtime's ``quantize_static`` makes it of the same
calibration data: weights by channel, the form in which OpenVINO reads it as well.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import mlec
from bench import networks
from bench.competitors import onnx_bytes
from bench.harness import Case
from mlec.cli.output import print_table
from mlec.ir import DType, Node
from mlec.measuring.timing import interleaved

CALIBRATION = 128
Array = np.ndarray[Any, Any]
Call = Callable[[], object]


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


def _encoder() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    return networks.Encoder().eval(), np.random.default_rng(0).integers(0, 1000, (64, 64)), None


CASES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "digits-mlp": _demo("mlp"),
    "digits-resnet": _demo("resnet"),
    "digits-transformer": _demo("transformer"),
    "mlp": _random(lambda: networks.Mlp(784, 1024, 1024, 10), 256, 784),
    "encoder": _encoder,
    "resnet8": _random(networks.ResNet8, 64, 3, 32, 32),
    "mobilenet-v2": _random(networks.MobileNetV2, 16, 3, 224, 224),
    "mobilenet-v3": _random(networks.MobileNetV3, 16, 3, 224, 224),
    "keywords": _random(networks.Keywords, 64, 40, 100),
    "resnet18": _random(networks.ResNet18, 8, 3, 224, 224),
}
"""By name: a network, its inputs, and what is true of them."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--threads", default=1, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="To time each batch.")
@click.option("--folder", type=click.Path(path_type=Path), help="Models are kept there, and taken from there.")
def main(names: tuple[str, ...], threads: int, seconds: float, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory() as other:
        rows = [_measured(name, threads, seconds, (folder or Path(other)) / name) for name in names or CASES]
    columns = list(rows[0])
    print_table(columns, [[row[column] for column in columns] for row in rows], right=columns[1:])


def _measured(name: str, threads: int, seconds: float, folder: Path) -> dict[str, str]:
    if not (folder / "x.npz").exists():
        _make(name, folder)
    data = np.load(folder / "x.npz")
    x, truth = data["x"], data["truth"]
    plain, eight = (mlec.load(folder / f"{form}.mle", num_threads=threads) for form in ("plain", "eight"))
    row = {"network": name}
    for batch in (1, 64 if truth.size else len(x)):
        inputs = x[:batch]
        calls: dict[str, Call] = {"float32": partial(plain.run, [inputs]), "int8": partial(eight.run, [inputs])}
        calls |= {peer: prepare(folder / "peer.onnx", inputs, threads) for peer, prepare in PEERS.items()}
        least = {what: min(times) for what, times in interleaved(calls, seconds).items()}
        where = "1 row" if batch == 1 else "batch"
        row |= {f"{what}, {where}": f"{least[what] / least['int8']:.2f}x" for what in least if what != "int8"}
    wanted, got = (np.asarray(model.run([x])[0]) for model in (plain, eight))
    sizes = [(folder / f"{form}.mle").stat().st_size for form in ("plain", "eight")]
    found = eight.report.quantization
    lost = 100 * (np.mean(wanted.argmax(1) == truth) - np.mean(got.argmax(1) == truth)) if truth.size else None
    return row | {
        "smaller": f"{sizes[0] / sizes[1]:.2f}x",
        "error": f"{np.abs(wanted - got).max() / np.abs(wanted).max():.2%}",
        "same label": f"{np.mean(wanted.argmax(1) == got.argmax(1)):.2%}",
        "points lost": "" if lost is None else f"{lost:.2f}",
        "layers in 8 bits": f"{sum(f['decision'] != 'float32' for f in found)} of {len(found)}",
        "images in 32": str(sum(_is_image_in_32(node) for node in eight.graph.compute_nodes)),
    }


def _is_image_in_32(node: Node) -> bool:
    """Whether a kernel hands an image of several pixels over in float32: one that left 8 bits, or never came to them."""
    return any(v.type.dtype is DType.F32 and v.type.rank == 4 and v.type.shape[1:3] != (1, 1) for v in node.outputs)


def _make(name: str, folder: Path) -> None:
    """Our two files, that of the peers, and the inputs."""
    network, x, truth = CASES[name]()
    folder.mkdir(parents=True, exist_ok=True)
    mlec.compile(network, x[:4], progress=False).save(folder / "plain.mle")
    eight = mlec.compile(network, x[:4], precision="int8", calibration=x[:CALIBRATION], progress=False)
    eight.save(folder / "eight.mle")
    case = Case(name, "int8", "torch", network, lambda rows: [x[:rows]])
    _quantized(onnx_bytes(case), x[:CALIBRATION], folder / "peer.onnx")
    np.savez(folder / "x.npz", x=x, truth=[] if truth is None else truth)


# -- peers -----------------------------------------------------------------------------------------------------------------


class _Reader:
    """Calibration data, as ONNX Runtime asks for it."""

    def __init__(self, name: str, x: Array) -> None:
        self.items: Iterator[dict[str, Array]] = ({name: x[i : i + 8]} for i in range(0, len(x), 8))

    def get_next(self) -> dict[str, Array] | None:
        return next(self.items, None)


def _quantized(model: bytes, x: Array, path: Path) -> None:
    """Writes the model with u8 activations and i8 weights by channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, ready = path.with_name("plain.onnx"), path.with_name("ready.onnx")
    plain.write_bytes(model)
    quant_pre_process(plain, ready)
    reader: Any = _Reader(onnx.load(ready).graph.input[0].name, x)
    quantize_static(
        ready, path, reader, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )  # fmt: skip


def in_onnxruntime(path: Path, x: Array, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x})


def in_openvino(path: Path, x: Array, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


PEERS: dict[str, Callable[[Path, Array, int], Call]] = {
    "ONNX Runtime int8": in_onnxruntime,
    "OpenVINO int8": in_openvino,
}

if __name__ == "__main__":
    main()

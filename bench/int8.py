"""``python -m bench.int8``: layers of 8 bits beside the same layers in ONNX Runtime and OpenVINO, and beside our own in float32.

A layer takes u8 and gives u8: a product or a convolution with i8 weights of one scale for each column, a bias, ReLU, and the way back
to u8. The peers get it as an ONNX model of QuantizeLinear and DequantizeLinear around the float layer, as quantisers write it. All are
timed in one process, in turn. Depthwise layers are bound by their epilogue, not by products.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import numpy.typing as npt

import mlec
from bench.harness import settle
from bench.peak import byte_products
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.int8 import has_amx
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import Graph, GraphBuilder, TensorType
from mlec.ir.dtype import DType
from mlec.processor import DISABLE
from mlec.runtime.executable import Executable
from mlec.target import Target

Array = npt.NDArray[Any]
Call = Callable[[], object]

SCALE, ZERO_POINT = 0.02, 3
ROUNDS = 12
LINE = 64


@dataclass(frozen=True)
class Layer:
    """One layer. Without a window: a product of ``x`` (rows, k); with one: a convolution over an image ``x`` (h, w, c).

    Attributes:
        outputs: columns or channels of the result.
        window, stride: of a convolution, with as much padding as keeps the extent (divided by the stride).
        groups: as many as channels, or one.
    """

    x: tuple[int, ...]
    outputs: int
    window: int = 0
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        x = "x".join(map(str, self.x))
        if not self.window:
            return f"{x} @ {self.x[-1]}x{self.outputs}"
        kind = "depthwise" if self.groups > 1 else f"to {self.outputs}"
        return f"{x}, {self.window}x{self.window} {kind}{f', stride {self.stride}' if self.stride > 1 else ''}"

    @property
    def pads(self) -> tuple[int, ...]:
        return ((self.window - 1) // 2,) * 4

    @property
    def w_shape(self) -> tuple[int, ...]:
        """``[k, n]`` or ``[kh, kw, c / groups, o]``."""
        if not self.window:
            return self.x[-1], self.outputs
        return self.window, self.window, self.x[-1] // self.groups, self.outputs

    @property
    def operations(self) -> int:
        positions = self.x[0] if not self.window else int(np.prod([-(-d // self.stride) for d in self.x[:2]]))
        return 2 * positions * int(np.prod(self.w_shape))


LAYERS = (
    Layer((1, 1024), 1024), Layer((8, 1024), 1024), Layer((128, 768), 768), Layer((128, 768), 3072), Layer((128, 3072), 768),
    Layer((512, 512), 512), Layer((256, 1024), 1024),
    Layer((224, 224, 3), 64, 7, 2), Layer((56, 56, 64), 64, 3), Layer((28, 28, 128), 128, 3), Layer((14, 14, 256), 256, 3),
    Layer((7, 7, 512), 512, 3), Layer((56, 56, 64), 128, 3, 2), Layer((56, 56, 64), 256, 1), Layer((56, 56, 256), 64, 1),
    Layer((14, 14, 256), 1024, 1), Layer((112, 112, 32), 64, 1),
    Layer((112, 112, 32), 32, 3, 1, 32), Layer((56, 56, 128), 128, 3, 1, 128), Layer((14, 14, 512), 512, 3, 1, 512),
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Of a layer: what each holds, and what its sums stand for."""

    w: Array
    scales: Array
    bias: Array
    out_scale: float

    @staticmethod
    def of(layer: Layer) -> Weights:
        rng = np.random.default_rng(0)
        w = rng.integers(-127, 128, layer.w_shape).astype(np.int8)
        scales = rng.uniform(0.5e-3, 1e-3, layer.outputs).astype(np.float32)
        bias = rng.normal(size=layer.outputs).astype(np.float32)
        terms = int(np.prod(layer.w_shape[:-1]))
        return Weights(w, scales, bias, float(np.float32(0.02 * terms**0.5)))


def our_graph(layer: Layer, weights: Weights, *, floats: bool = False) -> Graph:
    """The layer in 8 bits (an image has its channels last), or all of it in float32 (channels first)."""
    b = GraphBuilder("layer")
    attrs: dict[str, Any] = {"strides": (layer.stride,) * 2, "pads": layer.pads, "groups": layer.groups}
    if floats:
        w = weights.w * weights.scales
        if not layer.window:
            y = b("matmul", b.input("x", TensorType(layer.x, DType.F32)), b.constant(w))
            return b.finish([b("relu", b("add", y, b.constant(weights.bias)))])
        h, width, c = layer.x
        x = b.input("x", TensorType((1, c, h, width), DType.F32))
        y = b("conv", x, b.constant(np.ascontiguousarray(w.transpose(3, 2, 0, 1))), **attrs)
        return b.finish([b("relu", b("add", y, b.constant(weights.bias.reshape(-1, 1, 1))))])
    shape = (1, *layer.x) if layer.window else layer.x
    x, w = b.input("x", TensorType(shape, DType.U8)), b.constant(weights.w)
    op, more = ("conv_int8", attrs) if layer.window else ("matmul_int8", {})
    y = b(op, x, w, zero_point=ZERO_POINT, **more)
    y = b("mul", b("cast", y, dtype=DType.F32), b.constant(weights.scales * np.float32(SCALE)))
    y = b("relu", b("add", y, b.constant(weights.bias)))
    return b.finish([b("quantize", y, scale=weights.out_scale, zero_point=0, dtype=DType.U8)])


def ours(graph: Graph, x: Array, threads: int) -> tuple[Call, Array]:
    """A call, and what it gives."""
    module = TVMBackend().compile(mlec.optimize(graph)[0], Target())
    executable = Executable(module.program, module.objects, module.constants, num_threads=threads)
    out = executable.run([x])
    return lambda: executable.run([x], out), out[0]


def onnx_model(layer: Layer, weights: Weights) -> bytes:
    """The layer as quantisers for ONNX write it; images have their channels first."""
    from onnx import TensorProto, helper, numpy_helper

    made, nodes = [], []

    def known(name: str, value: Array) -> str:
        made.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [output], **attrs))
        return output

    scale, zero = known("x_scale", np.float32(SCALE)), known("x_zero", np.uint8(ZERO_POINT))
    x = node("DequantizeLinear", ["x", scale, zero], "x_f")
    window = bool(layer.window)
    w = weights.w.transpose(3, 2, 0, 1) if window else weights.w
    scales, zeros = known("w_scale", weights.scales), known("w_zero", np.zeros(layer.outputs, np.int8))
    w_f = node("DequantizeLinear", [known("w", w), scales, zeros], "w_f", axis=0 if window else 1)
    bias_scale = known("b_scale", weights.scales * np.float32(SCALE))
    bias = known("b", np.rint(weights.bias / (weights.scales * SCALE)).astype(np.int32))
    b_f = node(
        "DequantizeLinear", [bias, bias_scale, known("b_zero", np.zeros(layer.outputs, np.int32))], "b_f", axis=0
    )
    if window:
        y = node("Conv", [x, w_f, b_f], "y_f", strides=[layer.stride] * 2, pads=list(layer.pads), group=layer.groups)
    else:
        y = node("Gemm", [x, w_f, b_f], "y_f")
    y = node("Relu", [y], "y_r")
    node("QuantizeLinear", [y, known("y_scale", np.float32(weights.out_scale)), known("y_zero", np.uint8(0))], "y")
    shape = (1, layer.x[2], *layer.x[:2]) if window else layer.x
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)], made,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def in_onnxruntime(model: bytes, x: Array, threads: int) -> tuple[Call, Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x}), session.run(None, {"x": x})[0]


def in_openvino(model: bytes, x: Array, threads: int) -> tuple[Call, Array]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    (result,) = request.infer([x], share_inputs=True, share_outputs=True).values()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True), np.array(result)


@contextmanager
def without(features: str) -> Any:
    """Compiles as if this processor had none of these."""
    before = os.environ.get(DISABLE)
    os.environ[DISABLE] = ",".join(filter(None, (before, features)))
    try:
        yield
    finally:
        os.environ.pop(DISABLE)
        if before is not None:
            os.environ[DISABLE] = before


def aligned(x: Array) -> Array:
    """A copy at the start of a cache line, as the values inside of a network lie."""
    memory = np.empty(x.nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def compare(layer: Layer, threads: int) -> dict[str, float]:
    """Seconds of each: the shortest of many calls, in turn.

    Raises:
        AssertionError: a result is further from ours than one step in one element of a hundred, or two steps anywhere.
    """
    weights, rng = Weights.of(layer), np.random.default_rng(1)
    x = rng.integers(0, 256, (1, *layer.x) if layer.window else layer.x).astype(np.uint8)
    first = aligned(x.transpose(0, 3, 1, 2) if layer.window else x)
    x = aligned(x)
    calls, graph = {}, our_graph(layer, weights)
    calls["mlec int8"], wanted = ours(graph, x, threads)
    with without("amx_int8"):
        calls["mlec int8, no AMX"], other = ours(graph, x, threads)
    np.testing.assert_array_equal(other, wanted)
    calls["mlec fp32"], _ = ours(our_graph(layer, weights, floats=True), first.astype(np.float32), threads)
    model = onnx_model(layer, weights)
    for name, prepare in (("ONNX Runtime int8", in_onnxruntime), ("OpenVINO int8", in_openvino)):
        calls[name], theirs = prepare(model, first, threads)
        if layer.window:
            theirs = theirs.transpose(0, 2, 3, 1)
        apart = np.abs(theirs.astype(int) - wanted)
        assert apart.max() <= 1, (name, layer.name, apart.max())
        assert (apart > 0).mean() < 0.02, (name, layer.name)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            settle()
            repeats = max(3, min(200, int(2e-3 / best[name])))
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@click.command(help=__doc__)
@click.option("--threads", default=1, show_default=True)
@click.option("--only", default="", help="Layers whose name has this in it.")
def main(threads: int, only: str) -> None:
    peak = byte_products(threads, has_amx(TargetInfo.host()), False)
    click.echo(
        f"Threads: {threads}. Microseconds; in brackets how much longer than mlec int8. Peak: {peak / 1e9:.0f} GOP/s.\n"
    )
    for number, layer in enumerate(layer for layer in LAYERS if only in layer.name):
        best = compare(layer, threads)
        if not number:
            click.echo(f"| layer | {' | '.join(best)} | GOP/s | of peak |\n|{'---|' * (len(best) + 3)}")
        own = best["mlec int8"]
        figures = [f"{s * 1e6:.1f}" + (f" ({s / own:.2f}x)" if s is not own else "") for s in best.values()]
        rate = layer.operations / own
        click.echo(f"| {layer.name} | {' | '.join(figures)} | {rate / 1e9:.0f} | {rate / peak:.0%} |")


if __name__ == "__main__":
    main()

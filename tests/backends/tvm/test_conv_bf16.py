"""Convolutions of bf16 against torch in float64: by tiles, by vectors, and widened where a processor has neither."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.conv_bf16 import NarrowConv, conv_bf16
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.gemm_bf16 import has_tiles
from mlec.backends.tvm.kernels.int8 import Dots
from mlec.backends.tvm.kernels.vector import cast_to
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import GraphBuilder, TensorType
from mlec.ir.dtype import DType
from mlec.ops.conv import paired_weights
from mlec.ops.windows import from_blocked, to_blocked
from mlec.processor import needed_flags, what_is_missing
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, geometry

MULTIPLIES = has_tiles(HOST) or Dots.of_bf16(HOST) is not None
multiplied = pytest.mark.skipif(not MULTIPLIES, reason="the processor multiplies bf16 no faster than float32")

CASES = {
    # n, c, h, w, k, kernel, strides, pads, dilations, groups, in block, out block
    "3 x 3": (3, 64, 9, 21, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 32, 32),
    "three channels": (1, 3, 23, 17, 20, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1, 1, 4),
    "three in a block": (2, 3, 9, 17, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 3, 16),
    "small blocks": (2, 24, 10, 8, 72, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 8, 8),
    "pointwise": (2, 48, 16, 28, 40, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 16, 8),
    "strided pointwise": (1, 64, 15, 15, 96, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1, 32, 32),
    "dilated": (2, 32, 12, 11, 48, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1, 32, 16),
    "uneven": (1, 20, 9, 11, 44, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 1, 4, 4),
    "groups": (2, 128, 7, 9, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 32, 32),
    "one position": (2, 32, 3, 3, 64, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1, 32, 32),
}


def drawn(case):
    """Image, weights and result, in float32; one element of the image is NaN, and two are infinite."""
    n, c, h, w, k, kernel, strides, pads, dilations, groups, *_ = case
    rng = np.random.default_rng(c + k)
    x, weights = rng.normal(size=(n, c, h, w)), rng.normal(size=(k, c // groups, *kernel))
    x.flat[[0, x.size // 2, x.size - 1]] = np.inf, np.nan, -np.inf
    x, weights = (a.astype(ml_dtypes.bfloat16) for a in (x, weights))
    padded = np.pad(x.astype("float64"), [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    given = torch.from_numpy(padded), torch.from_numpy(weights.astype("float64"))
    return x, weights, torch.conv2d(*given, None, strides, 0, dilations, groups).numpy()


def known(case):
    _, c, _, _, k, kernel, strides, pads, dilations, groups, b, block = case
    shape = paired_weights(np.zeros((k, c // groups, *kernel), np.float32), b, groups).shape
    return NarrowConv(shape, b, k, block, geometry(strides, pads, dilations), groups)


def assert_close(got, want, terms):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * terms**0.5)


@multiplied
@pytest.mark.parametrize("name", CASES)
def test_convolution(name):
    """All rows by one task, and shared out; weights that come from far are asked for."""
    case = CASES[name]
    x, w, want = drawn(case)
    _, c, h, width, *_, groups, b, block = case
    conv, shape = known(case), (tirx.Var("n", "int64"), c // b, h, width, b)
    first = next(conv.schedules(shape, HOST))
    packed = conv.pack(paired_weights(w, b, groups))
    for schedule, far in ((first, 0), (replace(first, parts=2, channel_parts=2), 1 << 30)):
        run = compile_kernel(conv_bf16(shape, conv, HOST, schedule=schedule, program_weights=far))
        for n in (0, 1, len(x)):
            got = run(to_blocked(x[:n], b), packed, out=to_blocked(want[:n], block).shape)
            assert_close(from_blocked(got), want[:n], w[0].size)


@multiplied
def test_epilogue():
    """Factors and a residual on the sums, in float32; the result in bf16, rounded once."""
    case = CASES["pointwise"]
    x, w, sums = drawn(case)
    n, c, h, width, k, *_, b, block = case
    conv, shape, out = known(case), (n, c // b, h, width, b), (n, k // block, h, width, block)

    def apply(value, indices, extra):
        image, number, row, column, lanes = indices
        return value * extra[0][(number, lanes)] + cast_to("float32", extra[1][(image, number, row, column, lanes)])

    inputs = BufferSpec((k // block, block), "float32"), BufferSpec(out, "bfloat16")
    kernel = conv_bf16(shape, conv, HOST, Epilogue(inputs, apply, "bfloat16"))
    scale = np.linspace(1, 2, k, dtype="float32").reshape(k // block, block)
    added = np.random.default_rng(0).normal(size=out).astype(ml_dtypes.bfloat16)
    given = to_blocked(x, b), conv.pack(paired_weights(w, b, 1)), scale, added
    got = compile_kernel(kernel)(*given, out=out, dtype=ml_dtypes.bfloat16)
    want = to_blocked(sums, block) * scale[None, :, None, None] + added.astype("float64")
    np.testing.assert_allclose(got.astype("float32"), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("name", ["3 x 3", "three channels", "pointwise", "uneven", "groups"])
@pytest.mark.parametrize("cpu", ["", ":x86-64", ":x86-64-v3", ":cascadelake", ":cooperlake", ":znver4"])
def test_on_every_processor(name, cpu):
    """Also where nothing multiplies bf16, and for 16 lanes or fewer."""
    target, case = Target.parse(f"cpu{cpu}"), CASES[name]
    if cpu and (not HOST.triple.startswith("x86_64") or missing_on_this_machine(cpu[1:])):
        pytest.skip("another processor")
    x, w, want = drawn(case)
    _, c, h, width, k, _, strides, pads, dilations, groups, b, block = case
    g = GraphBuilder("g")
    image = g.input("x", TensorType((len(x), c // b, h, width, b), DType.BF16))
    window = {"strides": strides, "pads": pads, "dilations": dilations, "groups": groups}
    sums = g("conv2d_narrow", image, g.constant(paired_weights(w, b, groups)), outputs=k, block=block, **window)
    module = TVMBackend().compile(g.finish([g("add", sums, 1.0)]), target)
    (got,) = Executable(module.program, module.objects, module.constants, num_threads=1).run([to_blocked(x, b)])
    assert_close(from_blocked(got), want + 1, w[0].size)


def missing_on_this_machine(name):
    info = TargetInfo.for_cpu(name)
    return what_is_missing(needed_flags(info.triple, info.features))


@pytest.mark.parametrize(
    ("channels", "b", "kernel", "gathered", "step"),
    [(64, 32, 3, 0, 16), (16, 16, 1, 0, 8), (24, 8, 1, 24, 12), (3, 1, 7, 4, 14), (3, 1, 3, 4, 6), (17, 1, 3, 18, 9)],
)
def test_steps_are_whole_and_long(channels, b, kernel, gathered, step):
    """What lies beyond a segment may be NaN, which no weight of zero hides."""
    shape = paired_weights(np.zeros((16, channels, kernel, kernel), np.float32), b, 1).shape
    conv = NarrowConv(shape, b, 16, 16, geometry((1, 1), (0,) * 4), 1)
    packed = conv.weights
    assert (conv.gathered, packed.step) == (gathered, step)
    assert packed.quads == packed.read == packed.length / 2

"""Products, convolutions and pools of bytes against numpy, bit for bit: on every way a processor may compute them."""

from dataclasses import replace

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.conv_int8 import conv_int8, conv_packing, conv_schedules
from mlec.backends.tvm.kernels.depthwise_int8 import depthwise_int8, depthwise_schedules, pack_depthwise
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.gemm_int8 import Int8Schedule, gemm_int8
from mlec.backends.tvm.kernels.int8 import Dots, Packed, has_amx
from mlec.backends.tvm.kernels.pool_int8 import pool_int8
from mlec.backends.tvm.kernels.vector import cast_to
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import OPS, GraphBuilder, TensorType, run_graph
from mlec.ir.dtype import DType
from mlec.processor import needed_flags, what_is_missing
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, geometry

NAMED = ("x86-64", "x86-64-v3", "x86-64-v4", "alderlake", "cascadelake")
TARGETS = {"host": HOST, **{name: TargetInfo.for_cpu(name) for name in NAMED if HOST.triple.startswith("x86_64")}}
WAYS = [(name, amx) for name, target in TARGETS.items() for amx in (False, True) if not amx or has_amx(target)]
"""Processors that there are names for, and whether by AMX."""


@pytest.fixture(params=WAYS, ids=lambda way: way[0] + (" amx" if way[1] else ""))
def way(request):
    target = TARGETS[request.param[0]]
    if missing := what_is_missing(needed_flags(target.triple, target.features)):
        pytest.skip(missing)
    return target, request.param[1]


def on_all(cases, everywhere):
    """This processor with each case, the others with some: pairs, and their names."""
    pairs = [(way, case) for way in WAYS for case in cases if way[0] == "host" or case in everywhere]
    return pairs, [f"{name}{' amx' if amx else ''}-{case}" for (name, amx), case in pairs]


def values(shape, dtype, seed=0):
    """Random ones, extremes often among them."""
    rng, (low, high) = np.random.default_rng(seed), (0, 255) if dtype == "uint8" else (-128, 127)
    drawn = rng.integers(low, high + 1, shape)
    return np.where(rng.random(shape) < 0.3, rng.choice([low, high], shape), drawn).astype(dtype)


def reference(op, x, w, **attrs):
    return OPS[op].reference(x, w, **attrs)


def test_each_kind_of_processor_has_a_way_of_its_own():
    kinds = {name: (Dots.of(TargetInfo.for_cpu(name)).kind, Dots.of(TargetInfo.for_cpu(name)).lanes) for name in NAMED}
    assert kinds == {
        "x86-64": ("pairs", 4), "x86-64-v3": ("pairs", 8), "x86-64-v4": ("pairs", 16), "alderlake": ("vnni", 8),
        "cascadelake": ("vnni", 16),
    }  # fmt: skip
    arm = "aarch64-unknown-linux-gnu"
    assert Dots.of(TargetInfo.for_cpu("generic", arm)).kind == "widened"
    assert Dots.of(TargetInfo.for_cpu("neoverse-v1", arm)).kind == "usdot"


SIZES = ((64, 64), (10, 3), (100, 33), (1, 1), (33, 1000), (0, 5), (5, 0))
PRODUCTS, PRODUCT_NAMES = on_all(SIZES, SIZES[2:4])


@pytest.mark.parametrize(("way", "size"), PRODUCTS, ids=PRODUCT_NAMES, indirect=["way"])
def test_product_with_symbolic_rows(way, size):
    n, k = size
    target, amx = way
    packed, rows = Packed(1, n, 1, k), tirx.Var("m", "int64")
    schedule = replace(next(Int8Schedule.candidates(rows, packed, target)), amx=amx)
    run = compile_kernel(gemm_int8((rows,), packed, target, schedule=schedule), target)
    w = values((k, n), "int8", 1)
    for m, zero_point in zip((0, 1, 2, 5, 6, 16, 17, 33, 130), (0, 255, 128, 7, 0, 255, 3, 1, 77), strict=True):
        a = values((m, k), "uint8", m)
        got = run(a, packed.pack(w), packed.offsets(w, zero_point), out=(m, n), dtype="int32")
        np.testing.assert_array_equal(got, reference("matmul_int8", a, w, zero_point=zero_point))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 300, 64), (7, 50, 96), (300, 130, 68), (1000, 20, 12)])
def test_product_with_static_rows(way, m, n, k):
    target, amx = way
    packed = Packed(1, n, 1, k)
    schedule = replace(next(Int8Schedule.candidates(m, packed, target)), amx=amx and m >= 4, task_rows=64)
    kernel = gemm_int8((m,), packed, target, schedule=schedule, program_weights=1 << 30)
    run = compile_kernel(kernel, target)
    a, w = values((m, k), "uint8"), values((k, n), "int8", 1)
    got = run(a, packed.pack(w), packed.offsets(w, 9), out=(m, n), dtype="int32")
    np.testing.assert_array_equal(got, reference("matmul_int8", a, w, zero_point=9))


@pytest.mark.parametrize("symbolic", [True, False])
def test_threads_write_none_of_each_others_rows(way, symbolic):
    """Rows of 2 bytes are copied, to be read as 4: a tile that goes on beyond the rows of its task would find none there."""
    target, amx = way
    m, packed = 13500, Packed(1, 2, 1, 2)
    rows = tirx.Var("m", "int64") if symbolic else m
    schedule = replace(next(Int8Schedule.candidates(rows, packed, target)), amx=amx, rows=6)
    run = compile_kernel(gemm_int8((rows,), packed, target, schedule=schedule), target)
    a, w = values((m, 2), "uint8"), values((2, 2), "int8", 1)
    expected = reference("matmul_int8", a, w, zero_point=0)
    for _ in range(20):
        got = run(a, packed.pack(w), packed.offsets(w, 0), out=(m, 2), dtype="int32")
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("sign", [-128, 127])
def test_the_largest_sums_are_exact(way, sign):
    """255 * 127 twice is beyond 16 bits; and the sums of a long line come near the end of 32."""
    target, amx = way
    packed = Packed(1, 20, 1, 65000)
    schedule = replace(next(Int8Schedule.candidates(16, packed, target)), amx=amx)
    run = compile_kernel(gemm_int8((16,), packed, target, schedule=schedule), target)
    a, w = np.full((16, 65000), 255, "uint8"), np.full((65000, 20), sign, "int8")
    got = run(a, packed.pack(w), packed.offsets(w, 0), out=(16, 20), dtype="int32")
    np.testing.assert_array_equal(got, np.full((16, 20), 255 * sign * 65000))


def test_epilogue_of_a_product_knows_rows_and_columns(way):
    target, amx = way
    packed, m, n, k = Packed(1, 37, 1, 24), 35, 37, 24
    schedule = replace(next(Int8Schedule.candidates(m, packed, target)), amx=amx)

    def apply(value, indices, extra):
        return cast_to("float32", value) * extra[0][indices[-1]] + extra[1][indices]

    inputs = (BufferSpec((n,), "float32"), BufferSpec((5, 7, n), "float32"))
    kernel = gemm_int8((5, 7), packed, target, Epilogue(inputs, apply, "float32"), schedule=schedule)
    a, w = values((5, 7, k), "uint8"), values((k, n), "int8", 1)
    scale, added = np.linspace(0, 1, n, dtype="float32"), np.arange(m * n, dtype="float32").reshape(5, 7, n)
    got = compile_kernel(kernel, target)(a, packed.pack(w), packed.offsets(w, 3), scale, added, out=(5, 7, n))
    want = reference("matmul_int8", a, w, zero_point=3) * scale + added
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-3)


CONVOLUTIONS = {
    "3 x 3": ((2, 8, 9, 16), (3, 3, 16, 32), {"pads": (1, 1, 1, 1)}),
    "three channels": ((1, 23, 17, 3), (7, 7, 3, 20), {"strides": (2, 2), "pads": (3, 3, 3, 3)}),
    "one channel": ((1, 12, 40, 1), (5, 3, 1, 8), {"pads": (1, 0, 1, 2)}),
    "stride": ((1, 28, 28, 32), (3, 3, 32, 70), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
    "dilation": ((3, 7, 7, 24), (3, 3, 24, 33), {"pads": (2, 2, 2, 2), "dilations": (2, 2)}),
    "strided pointwise": ((2, 14, 14, 64), (1, 1, 64, 48), {"strides": (2, 2)}),
    "groups": ((2, 14, 14, 32), (3, 3, 8, 64), {"pads": (1, 0, 1, 2), "groups": 4}),
    "one row": ((1, 1, 30, 5), (1, 3, 5, 100), {"pads": (0, 1, 0, 1)}),
    "one position": ((2, 3, 3, 7), (3, 3, 7, 5), {}),
    "no result": ((1, 4, 4, 8), (3, 3, 8, 0), {}),
}


SOME = ("three channels", "dilation", "groups")
WINDOWS, WINDOW_NAMES = on_all(CONVOLUTIONS, SOME)


@pytest.mark.parametrize(("way", "name"), WINDOWS, ids=WINDOW_NAMES, indirect=["way"])
def test_convolution(way, name):
    (target, amx), (x_shape, w_shape, attrs) = way, CONVOLUTIONS[name]
    attrs = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "groups": 1, **attrs}
    g, groups = geometry(attrs["strides"], attrs["pads"], attrs["dilations"]), attrs["groups"]
    packed, x, w = conv_packing(w_shape, g, groups), values(x_shape, "uint8"), values(w_shape, "int8", 1)
    batch = tirx.Var("n", "int64")
    schedules = conv_schedules((batch, *x_shape[1:]), w_shape, g, packed, target)
    first = next((s for s in schedules if s.amx == amx), None)
    if first is None:
        pytest.skip("too little for a tile")
    for schedule, weights in ((first, 0), (replace(first, parts=2, channel_parts=2), 1 << 30)):
        kernel = conv_int8(
            (batch, *x_shape[1:]), w_shape, g, groups, 200, target, schedule=schedule, program_weights=weights
        )  # fmt: skip
        want = reference("conv_int8", x, w, zero_point=200, **attrs)
        got = compile_kernel(kernel, target)(
            x, packed.pack(w), packed.offsets(w, 200), out=want.shape, dtype="int32"
        )  # fmt: skip
        np.testing.assert_array_equal(got, want)


DEPTHWISE = {
    "3 x 3": ((2, 9, 20, 48), (3, 3, 1, 48), {"pads": (1, 1, 1, 1)}),
    "stride": ((1, 11, 13, 20), (3, 3, 1, 20), {"strides": (2, 2), "pads": (0, 1, 1, 1)}),
    "dilation": ((1, 9, 9, 16), (2, 3, 1, 16), {"dilations": (1, 2)}),
    "long": ((1, 8, 9, 37), (7, 5, 1, 37), {"pads": (3, 2, 3, 2)}),
}


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize("where", TARGETS)
def test_depthwise_convolution(name, where):
    target, (x_shape, w_shape, attrs) = TARGETS[where], DEPTHWISE[name]
    if missing := what_is_missing(needed_flags(target.triple, target.features)):
        pytest.skip(missing)
    attrs = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "groups": x_shape[3], **attrs}
    g = geometry(attrs["strides"], attrs["pads"], attrs["dilations"])
    x, w = values(x_shape, "uint8"), values(w_shape, "int8", 1)
    shape = (tirx.Var("n", "int64"), *x_shape[1:])
    first = next(depthwise_schedules(shape, w_shape, g, target))
    want = reference("conv_int8", x, w, zero_point=255, **attrs)
    offsets = Packed(1, w_shape[3], w_shape[0] * w_shape[1], 1).offsets(w, 255)
    for schedule in (first, replace(first, parts=2)):
        kernel = depthwise_int8(shape, w_shape, g, 255, target, schedule=schedule)
        got = compile_kernel(kernel, target)(x, pack_depthwise(w), offsets, out=want.shape, dtype="int32")
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("zero_point", [0, 255, 128, 7])
def test_quantize_equals_its_reference(zero_point):
    """At and around halves, beyond the bounds, infinities, and NaN of any kind."""
    b, scale = GraphBuilder("g"), 0.125
    x = np.concatenate([np.arange(-3000, 3000) / 16, [np.inf, -np.inf, 1e30, -1e30]]).astype(np.float32)
    x = np.concatenate([x, np.array([0x7F800001, 0x7FC00055, 0xFFFFFFFF], np.uint32).view(np.float32)])
    given = b.input("x", TensorType((len(x),), DType.F32))
    results = [b("quantize", given, scale=scale, zero_point=zero_point, dtype=DType.U8)]
    results.append(b("quantize", given, scale=scale, zero_point=zero_point - 128, dtype=DType.I8))
    results += [b("dequantize", q, scale=scale, zero_point=0) for q in results]
    graph = b.finish(results)
    module = TVMBackend().compile(graph, Target())
    got = Executable(module.program, module.objects, module.constants, num_threads=1).run([x])
    for ours, theirs in zip(got, run_graph(graph, [x]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("channels", [1, 3, 64, 100])
@pytest.mark.parametrize("where", TARGETS)
def test_sums_of_windows(where, channels):
    """Small windows over an edge, and one of the whole image; all of either extreme too."""
    target, batch = TARGETS[where], tirx.Var("n", "int64")
    if missing := what_is_missing(needed_flags(target.triple, target.features)):
        pytest.skip(missing)
    for kernel, strides, pads, space in (
        ((3, 2), (2, 1), (1, 0, 1, 1), (9, 8)),
        ((20, 30), (1, 1), (0,) * 4, (20, 30)),
    ):
        window = {"strides": strides, "pads": pads, "dilations": (1, 1)}
        g = geometry(strides, pads, (1, 1))
        for x in (values((3, *space, channels), "uint8"), np.full((1, *space, channels), 255, np.uint8)):
            want = OPS["sum_pool_int8"].reference(x, kernel=kernel, ceil_mode=False, zero_point=200, **window)
            kernel_of = pool_int8((batch, *space, channels), kernel, g, want.shape[1:3], target, 200)
            np.testing.assert_array_equal(compile_kernel(kernel_of, target)(x, out=want.shape, dtype="int32"), want)


@pytest.mark.parametrize("channels", [1, 3, 64, 100])
def test_largest_of_windows(channels):
    x = values((2, 9, 8, channels), "uint8")
    attrs = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1), "ceil_mode": True}
    want = OPS["max_pool_int8"].reference(x, **attrs)
    kernel = pool_int8(x.shape, (3, 3), geometry((2, 2), (1, 1, 1, 1), (1, 1)), want.shape[1:3], HOST)
    np.testing.assert_array_equal(compile_kernel(kernel)(x, out=want.shape, dtype="uint8"), want)

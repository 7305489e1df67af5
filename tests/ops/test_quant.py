"""What the ops on 8 bits mean, against their definitions written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.errors import TypeRuleError
from mlec.ir import OPS, GraphBuilder, TensorType, run_graph
from mlec.ir.dtype import DType
from mlec.ops.quant import LIMITS, MAX_TERMS, quantize
from mlec.runtime.executable import Executable
from mlec.target import Target

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1e-45, 0.5, 1.5, 2.5, -0.5], np.float32)


def by_definition(x: float, scale: float, zero_point: int, low: int, high: int) -> int:
    if math.isnan(x):
        return zero_point
    steps = np.float32(x) * np.float32(1 / scale)
    if math.isinf(steps):
        return high if steps > 0 else low
    return min(max(round(float(steps)) + zero_point, low), high)  # Python rounds half to even as well


@pytest.mark.parametrize("dtype", [DType.U8, DType.I8])
@pytest.mark.parametrize(("scale", "zero_point"), [(1.0, 0), (0.1, 7), (3e-5, 100)])
def test_every_number_becomes_the_nearest_that_there_is(dtype: DType, scale: float, zero_point: int) -> None:
    x = np.concatenate([SPECIAL, np.random.default_rng(0).uniform(-300, 300, 500).astype(np.float32) * scale])
    with np.errstate(all="ignore"):
        got = quantize(x, scale, zero_point, dtype)
        wanted = [by_definition(v, scale, zero_point, *LIMITS[dtype]) for v in x]
    np.testing.assert_array_equal(got, wanted)
    b = GraphBuilder()
    graph = b.finish(
        [b("quantize", b.input("x", TensorType(x.shape, DType.F32)), scale=scale, zero_point=zero_point, dtype=dtype)]
    )
    module = TVMBackend().compile(graph, Target())
    compiled = Executable(module.program, module.objects, module.constants, num_threads=1).run([x])[0]
    np.testing.assert_array_equal(compiled, got)


def test_a_convolution_of_8_bits_is_the_sum_over_its_windows() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (2, 5, 6, 4)).astype(np.uint8)
    w = rng.integers(-128, 128, (3, 2, 2, 6)).astype(np.int8)
    b = GraphBuilder()
    attrs = {"strides": (2, 1), "pads": (1, 0, 0, 1), "dilations": (1, 2), "groups": 2, "zero_point": 9}
    operands = [b.input("x", TensorType(x.shape, DType.U8)), b.input("w", TensorType(w.shape, DType.I8))]
    (got,) = run_graph(b.finish([b("conv_int8", *operands, **attrs)]), [x, w])
    for n, i, j, o in itertools.product(*map(range, got.shape)):
        total, group = 0, o // 3
        for p, q, c in itertools.product(range(3), range(2), range(2)):
            row, column = i * 2 - 1 + p, j + 2 * q
            if 0 <= row < 5 and column < 6:
                total += (int(x[n, row, column, group * 2 + c]) - 9) * int(w[p, q, c, o])
        assert got[n, i, j, o] == total


def test_sums_that_could_overflow_are_refused() -> None:
    def product_of(terms: int) -> TensorType:
        op = OPS["matmul_int8"]
        types = [TensorType((2, terms), DType.U8), TensorType((terms, 3), DType.I8)]
        return op.result_types(types, op.complete_attrs({}))[0]

    assert product_of(MAX_TERMS).dtype is DType.I32
    with pytest.raises(TypeRuleError, match="fit an i32"):
        product_of(MAX_TERMS + 1)
    extreme = OPS["matmul_int8"].evaluate(
        (np.zeros((1, MAX_TERMS), np.uint8), np.full((MAX_TERMS, 1), -128, np.int8)), {"zero_point": 255}, {}
    )
    assert extreme[0] == MAX_TERMS * 255 * 128


@pytest.mark.parametrize(
    "attrs", [{"scale": 0.0}, {"scale": -1.0}, {"scale": math.nan}, {"scale": 1.0, "zero_point": 256}]
)
def test_scales_and_zero_points_that_make_no_sense_are_refused(attrs: dict[str, float]) -> None:
    op = OPS["quantize"]
    with pytest.raises(TypeRuleError, match=r"scale|zero_point"):
        op.result_types([TensorType((3,), DType.F32)], op.complete_attrs(attrs))

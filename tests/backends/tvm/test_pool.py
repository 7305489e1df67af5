"""Pooling against torch: strides, pads, dilations, windows that hang over the end, both ways of counting, NaN."""

import numpy as np
import pytest
import torch

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.decompose import decompose
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.pool import pool
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import GraphBuilder, run_graph, tensor
from mlec.ir.interp import trace_graph
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, geometry

CASES = [
    # channels and space, kernel, strides, padding, dilations, ceil_mode
    ((4, 30), (3,), (2,), (1,), (1,), False),
    ((4, 8, 8), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((4, 17, 40), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((4, 7, 10), (3, 2), (2, 3), (1, 1), (1, 1), True),
    ((4, 12, 35), (3, 3), (1, 1), (1, 0), (2, 3), False),
    ((4, 5, 6, 7), (2, 3, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1), True),
    ((4, 2, 2), (2, 2), (1, 1), (1, 1), (3, 3), False),  # a window of nothing but padding
]


def sample(shape, specials):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    if specials and x.size:
        x.reshape(-1)[3::41], x.reshape(-1)[7::53] = np.nan, -np.inf
    return x


def blocks(x, block):
    n, c, *space = x.shape
    return np.ascontiguousarray(np.moveaxis(x.reshape(n, c // block, block, *space), 2, -1))


def plain(y):
    y = np.moveaxis(y, -1, 2)
    return y.reshape(y.shape[0], y.shape[1] * y.shape[2], *y.shape[3:])


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("count_include_pad", [None, True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pool(case, count_include_pad, blocked):
    (channels, *space), kernel, strides, padding, dilations, ceil_mode = case
    is_max, rank = count_include_pad is None, len(kernel)
    if not is_max and max(dilations) > 1:
        dilations = (1,) * rank
    function = getattr(torch.nn.functional, f"{'max' if is_max else 'avg'}_pool{rank}d")
    options = {"dilation": dilations} if is_max else {"count_include_pad": count_include_pad}

    def reference(x):
        return function(torch.from_numpy(x), kernel, strides, padding, ceil_mode=ceil_mode, **options).numpy()

    out = reference(sample((1, channels, *space), False)).shape[2:]
    shape = (channels // 2, *space, 2) if blocked else (channels, *space)
    func = pool(
        "max_pool" if is_max else "avg_pool", (tirx.Var("n", "int64"), *shape), kernel,
        geometry(strides, (*padding, *padding), dilations), out, bool(count_include_pad), "float32", HOST,
    )  # fmt: skip
    run = compile_kernel(func)
    for batch in (0, 1, 5):
        x = sample((batch, channels, *space), is_max)
        want = reference(x) if batch else np.zeros((0, channels, *out), "float32")
        given, shape = (blocks(x, 2), (batch, channels // 2, *out, 2)) if blocked else (x, want.shape)
        got = run(given, out=shape)
        got = plain(got) if blocked else got
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_epilogue_and_symbolic_length():
    n, t = tirx.Var("n", "int64"), tirx.Var("t", "int64")
    epilogue = Epilogue((BufferSpec((3,), "float32"),), lambda acc, where, extra: acc * extra[0][where[1]])
    func = pool("max_pool", (n, 3, t), (2,), geometry((2,)), (t // 2,), False, "float32", HOST, epilogue)
    run = compile_kernel(func)
    for length in (2, 7, 100):
        x, scale = sample((2, 3, length), False), np.array([1, 2, 3], "float32")
        want = torch.nn.functional.max_pool1d(torch.from_numpy(x), 2).numpy() * scale[:, None]
        np.testing.assert_allclose(run(x, scale, out=want.shape), want)


def test_of_bytes_windows_of_padding_alone_are_zero_where_they_are_decomposed():
    """Without a cast of what is no number, of which each processor makes something else."""
    b = GraphBuilder("pool")
    x = b.input("x", tensor("u8", (2, 2, 2, 3)))
    graph = b.finish([b("max_pool_int8", x, kernel=(1, 1), strides=(1, 1), pads=(2, 2, 2, 2))])
    numbers = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3) * 11
    decomposed = decompose(graph.compute_nodes[0])
    known = trace_graph(decomposed, [numbers])
    for node in decomposed.nodes:
        if node.name == "cast":
            assert np.isfinite(known[node.inputs[0]]).all()
    np.testing.assert_array_equal(known[decomposed.outputs[0]], run_graph(graph, [numbers])[0])


def test_windows_are_worth_threads_by_the_instructions_that_they_take():
    """A largest element that keeps NaN takes more than a sum."""
    window, target = geometry((1, 1), (1, 1, 1, 1)), TargetInfo.for_cpu("skylake-avx512", "x86_64-unknown-linux-gnu")
    for op, shared in (("max_pool", True), ("avg_pool", False)):
        func = pool(op, (1, 120, 28, 28), (3, 3), window, (28, 28), True, "float32", target)
        assert ("T.parallel" in func.script()) is shared

"""Every op's kernels on denormals, negative zeros, NaN and infinities, each apart, with all their loops shared by one to four threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest

from mlec.backends.base import CompiledModule
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import tvm
from mlec.backends.tvm.kernels.gemm_bf16 import has_tiles
from mlec.backends.tvm.kernels.int8 import Dots
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import OPS, DType, Graph, GraphBuilder, Node, TensorType, Trait, Value, run_graph, tensor
from mlec.ir.op import SYMBOLIC_EXTENT, Array, Case
from mlec.ops.linalg import pack_narrow
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.op_cases import check, families, graph_of
from tests.fuzz.kernels import quick

THREADS = (4, 3, 2)
"""Beside one. The pool of a thread stays as large as its first use made it."""

EXTENTS = (SYMBOLIC_EXTENT, 150)
"""Of the symbolic axis: as the samples have it, and so long that threads share it."""

SMALL = {"SERIAL_WORK": 64, "TASK_WORK": 16, "DISPATCH_NS": 1, "CHUNK": 16}
"""Constants of kernels by which threads share what little there is to do."""

MOVES = ("broadcast_to", "concat", "flip", "pad")
"""Beside those with the trait of a view or of indexing."""

SIGN_OF_ZERO_IS_FREE = ("maximum", "minimum", "mod", "floordiv", "relu", "sign")

FOURIER = ("fft", "rfft", "irfft")

WEIGHTS = {"conv_transpose": (1,), "depthwise2d_nchwc": (1,)}
"""Operands that some ways of computing multiply by zeros between and around the elements, and others by nothing."""

SALTS = {
    "denormal": (None, 0.4),
    "-0": (-0.0, 0.4),
    "nan": (np.nan, 0.05),
    "inf": (np.inf, 0.05),
    "-inf": (-np.inf, 0.05),
}
"""What is strewn, and among how many of the elements."""


def salted(array: Array, salt: str, rng: np.random.Generator) -> Array:
    """A copy of floats with one kind of extreme values here and there; other arrays as they are."""
    if not DType.of(array).is_float:
        return array
    value, part = SALTS[salt]
    chosen = rng.random(array.shape) < part
    if value is None:
        info = np.finfo(array.dtype) if array.dtype.kind == "f" else np.finfo(np.float32)
        value = rng.uniform(-1, 1, array.shape) * float(info.tiny)
    return np.where(chosen, value, array.astype(np.float64)).astype(array.dtype)


@contextmanager
def shared_by_threads() -> Iterator[None]:
    """Kernels compiled within are for four threads, and share what little there is to do."""
    four = replace(TargetInfo.host(), cores=4)
    with ExitStack() as stack:
        stack.enter_context(patch.object(TargetInfo, "host", lambda: four))
        for name, module in list(sys.modules.items()):
            for constant, value in SMALL.items():
                if name.startswith("mlec.backends.tvm.kernels.") and hasattr(module, constant):
                    stack.enter_context(patch.object(module, constant, value))
        yield


def spared(graph: Graph, value: Value, salt: str) -> bool:
    """Whether the input stays as it is."""
    return salt in ("nan", "inf", "-inf") and any(
        value in node.inputs and node.inputs.index(value) in WEIGHTS.get(node.name, ()) for node in graph.nodes
    )


def lengthened(array: Array, shape: Sequence[object], extent: int) -> Array:
    """The elements along symbolic axes again and again, up to so many."""
    for axis, length in enumerate(shape):
        if not isinstance(length, int):
            array = np.take(array, np.arange(extent) % array.shape[axis], axis)
    return array


def without_later_keys(case: Case) -> Array:
    """Causal attention whose queries are not even multiplied by zeros where they see nothing. See docs/numerics.md."""
    q, k, v = case.operands
    attrs = {**case.attrs, "causal": False}
    rows = [
        OPS["attention"].reference(q[..., i : i + 1, :], k[..., : i + 1, :], v[..., : i + 1, :], **attrs)
        for i in range(q.shape[-2])
    ]
    return np.concatenate(rows, -2)


def within_lines(case: Case, got: Array, wanted: Array) -> Array:
    """What a Fourier transform should give, where it makes of lines with NaN or infinities what it likes. See docs/numerics.md."""
    axis = case.attrs["axis"]
    odd = np.any([~np.isfinite(part).all(axis, keepdims=True) for part in case.operands if np.ndim(part)], axis=0)
    return np.where(odd[..., None] if case.attrs.get("pairs") else odd, got, wanted)


def check_elements(op: str, got: Array, wanted: Array, label: str) -> None:
    """Denormals to their last places and signs of zeros, of ops that move elements or compute each by itself."""
    if not DType.of(wanted).is_float or not (
        OPS[op].has(Trait.VIEW | Trait.INDEXING | Trait.ELEMENTWISE) or op in MOVES
    ):
        return
    ours, theirs = got.astype(np.float64), wanted.astype(np.float64)
    small = np.abs(theirs) < 1e-30
    last = np.spacing(np.zeros((), np.float64 if wanted.itemsize == 8 else np.float32)).astype(np.float64)
    bound = OPS[op].tolerance * DType.of(wanted).eps * np.abs(theirs[small]) + 2 * last
    assert (np.abs(ours[small] - theirs[small]) <= bound).all(), f"{op} ({label})"
    if op not in SIGN_OF_ZERO_IS_FREE:
        zeros = theirs == 0
        np.testing.assert_array_equal(np.signbit(ours[zeros]), np.signbit(theirs[zeros]), err_msg=f"{op} ({label})")


def compiled(graph: Graph) -> CompiledModule:
    with quick(), shared_by_threads():
        return TVMBackend().compile(graph, Target())


def results_of(module: CompiledModule, graph: Graph, calls: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """The results of each call by one thread; several threads, each number with calls of another salt, give the same bits."""
    executable = Executable(module.program, module.objects, module.constants, num_threads=1)

    def run(threads: int, some: Sequence[Sequence[Array]]) -> list[list[Array]]:
        executable.num_threads = threads
        results = [executable.run(list(arrays)) for arrays in some]
        assert tvm.get_global_func("runtime.NumThreads")() >= threads
        return results

    def run_all() -> list[list[Array]]:
        shared = {threads: run(threads, calls[threads :: len(SALTS)]) for threads in THREADS}
        alone = run(1, calls)
        for threads, found in shared.items():
            for results, expected in zip(found, alone[threads :: len(SALTS)], strict=True):
                for node, got, one in zip(producers(graph), results, expected, strict=True):
                    assert got.tobytes() == one.tobytes(), f"{node.name}: {threads} threads and one differ"
        return alone

    with ThreadPoolExecutor(1) as fresh:  # a thread with a pool of its own, of as many as it asks for first
        return fresh.submit(run_all).result()


def producers(graph: Graph) -> list[Node]:
    """What computes each output."""
    return [graph.producer[output] for output in graph.outputs]


def check_calls(module: CompiledModule, graph: Graph, arrays: Sequence[Array], extents: Sequence[int]) -> None:
    """Each kind of extreme values in the inputs, symbolic axes as long as each of the extents."""
    calls, labels = [], []
    for extent in extents:
        rng = np.random.default_rng(extent)
        for salt in SALTS:
            given = [
                a if spared(graph, v, salt) else salted(a, salt, rng) for a, v in zip(arrays, graph.inputs, strict=True)
            ]
            calls.append([lengthened(a, v.type.shape, extent) for a, v in zip(given, graph.inputs, strict=True)])
            labels.append(f"{salt}, {extent}")
    for label, given, results in zip(labels, calls, results_of(module, graph, calls), strict=True):
        with np.errstate(all="ignore"):
            values = dict(zip([*graph.inputs, *graph.outputs], [*given, *run_graph(graph, given)], strict=True))
        for node, output, got in zip(producers(graph), graph.outputs, results, strict=True):
            case, wanted = Case(tuple(values.get(v, ()) for v in node.inputs), node.attrs), values[output]
            if node.name == "attention" and node.attrs["causal"]:
                with np.errstate(all="ignore"):
                    wanted = np.where(np.isnan(wanted) & ~np.isnan(got), without_later_keys(case), wanted)
            if node.name in FOURIER:
                wanted = within_lines(case, got, wanted)
            check(node.name, got, wanted, case)
            check_elements(node.name, got, wanted, label)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("names", families(), ids=lambda names: f"{names[0]}-{names[-1]}")
def test_extreme_values(names: list[str], dynamic: bool) -> None:
    graph, arrays, _ = graph_of(names, dynamic, 1)
    check_calls(compiled(graph), graph, arrays, EXTENTS if dynamic else EXTENTS[:1])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows(b: GraphBuilder, *shape: int, dtype: str = "f32") -> Value:
    return b.input("x", tensor(dtype, ("n", *shape)))


def pointwise(b: GraphBuilder) -> Sequence[Value]:
    return [b("conv", rows(b, 16, 9, 11), b.constant(normal(33, 16, 1, 1)))]


def distances(b: GraphBuilder) -> Sequence[Value]:
    x, points = rows(b, 7), b.constant(normal(37, 7))
    metrics = ("sqeuclidean", "euclidean", "manhattan", "chebyshev", "minkowski")
    return [b("pairwise_distance", x, points, metric=metric, p=3.0) for metric in metrics]


def neighbours(b: GraphBuilder) -> Sequence[Value]:
    return b.multi("nearest", rows(b, 7), b.constant(normal(37, 7)), metric="sqeuclidean", k=5)


def recurrent(op: str, gates: int, states: int, biases: int) -> Callable[[GraphBuilder], Sequence[Value]]:
    def results(b: GraphBuilder) -> Sequence[Value]:
        x, units = rows(b, 5, 7), 21
        begin = [b.input(f"h{i}", tensor("f32", ("n", units))) for i in range(states)]
        weights = [b.constant(normal(gates * units, k, seed=k) / 4) for k in (7, units)]
        return b.multi(op, x, *begin, *weights, *(b.constant(normal(gates * units)) for _ in range(biases)))

    return results


def bf16_product(b: GraphBuilder) -> Sequence[Value]:
    weights = pack_narrow(normal(64, 40).astype(ml_dtypes.bfloat16), 32)
    return [b("matmul_narrow_packed", rows(b, 64, dtype="bf16"), b.constant(weights), n=40)]


def depthwise_bytes(b: GraphBuilder) -> Sequence[Value]:
    weights = (normal(3, 3, 1, 37) * 50).astype(np.int8)
    return [b("conv_int8", rows(b, 9, 8, 37, dtype="u8"), b.constant(weights), zero_point=7, pads=(1,) * 4, groups=37)]


def in_turn(b: GraphBuilder) -> Sequence[Value]:
    return [b("concat", rows(b, 3, 1), b.input("y", tensor("f32", ("n", 3, 1))), axis=-1)]


def by_what(target: TargetInfo) -> str:
    """What a processor multiplies bf16 with."""
    return "by AMX" if has_tiles(target) else "widened" if Dots.of_bf16(target) is None else "in vectors"


TEMPLATES: dict[str, tuple[Callable[[GraphBuilder], Sequence[Value]], str]] = {
    "pointwise": (pointwise, "product of weights and image"),
    "distances": (distances, "distances"),
    "neighbours": (neighbours, "smallest kept"),
    "lstm": (recurrent("lstm", 4, 2, 1), "tiles of sequences"),
    "gru": (recurrent("gru", 3, 1, 2), "tiles of sequences"),
    "rnn": (recurrent("rnn", 1, 1, 1), "tiles of sequences"),
    "product of bf16": (bf16_product, by_what(TargetInfo.host())),
    "depthwise on bytes": (depthwise_bytes, "depthwise convolution of bytes"),
    "in turn": (in_turn, "in turn"),
}
"""What no sample of an op comes to, and a part of what its report says. Winograd's sums have bounds of their own: `test_winograd`."""


def sample_of(kind: TensorType, rng: np.random.Generator) -> Array:
    shape = [extent if isinstance(extent, int) else SYMBOLIC_EXTENT for extent in kind.shape]
    drawn = rng.normal(size=shape) if kind.dtype.is_float else rng.integers(0, 256, shape)
    return drawn.astype(kind.dtype.numpy)


@pytest.mark.parametrize("name", TEMPLATES)
def test_extreme_values_of_templates_for_larger_operands(name: str) -> None:
    make, strategy = TEMPLATES[name]
    b = GraphBuilder("template")
    graph = b.finish(make(b))
    module, rng = compiled(graph), np.random.default_rng(1)
    assert all(strategy in note.strategy for note in module.notes), [note.strategy for note in module.notes]
    check_calls(module, graph, [sample_of(v.type, rng) for v in graph.inputs], EXTENTS)

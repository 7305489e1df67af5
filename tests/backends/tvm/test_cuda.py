"""The CUDA form without a device: its kernels' arithmetic run on the CPU, its device code compiled and looked into."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from mlec.backends.tvm import cuda, device_code
from mlec.backends.tvm.assembly import second_names
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import tvm
from mlec.backends.tvm.kernels.direct import Spread, spread_on_cpu
from mlec.backends.tvm.objects import to_objects
from mlec.backends.tvm.pipeline import RELAX_PASSES
from mlec.backends.tvm.relax_module import relax_module
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import LoweringError, TargetError
from mlec.ir import OPS, Graph, GraphBuilder, run_graph, tensor
from mlec.ir.op import Array
from mlec.ops.tree import OPERANDS, sample_ensemble
from mlec.runtime.program import Program
from mlec.runtime.vm import VirtualMachine
from mlec.target import Target
from tests.backends.tvm.op_cases import NAMES, OpTests


@pytest.fixture
def nvcc() -> None:
    if shutil.which("nvcc") is None or shutil.which("gcc") is None:
        pytest.skip("there is no nvcc, or no gcc for it")


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with NVRTC, also where nvcc is installed."""
    try:
        device_code.Nvrtc()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the packages of the extra `cuda` are not installed: {error}")
    monkeypatch.setattr(device_code.shutil, "which", lambda name: None)


class OnHost(cuda.CudaLowering):
    """The GPU's kernels, their tasks run by a loop instead of threads."""

    cell_scope = "global"

    @property
    def spread(self) -> Spread:
        return spread_on_cpu


def machine_on_host(graph: Graph) -> VirtualMachine:
    """The program that a GPU would get, for the host."""
    lowered = OnHost(graph, TargetInfo.host()).run()
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        passes = tvm.transform.Sequential(RELAX_PASSES)
        compiled = tvm.compile(relax_module(lowered), TargetInfo.host().tvm_target(), relax_pipeline=passes)
    objects = (*to_objects(compiled), *([second_names(lowered.aliases)] if lowered.aliases else []))
    program = Program("tvm", "cpu", constants=tuple(lowered.constants), kernels=lowered.kernels)
    return VirtualMachine(program, objects, lowered.constants, num_threads=1)


def run_on_host(graph: Graph, arrays: Sequence[Array]) -> Sequence[Array]:
    return machine_on_host(graph).run(list(arrays))


@pytest.fixture(scope="module")
def ops() -> OpTests:
    return OpTests(run_on_host, cases=1)


@pytest.mark.parametrize("name", NAMES)
def test_op_equals_its_reference(ops: OpTests, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_scheduled", lambda function, name: function)
    ops.check(name, dynamic=True)


@pytest.mark.parametrize("child", [7, 0], ids=["outside", "circle"])
def test_damaged_trees_are_refused(child: int) -> None:
    ints = {"feature": [0], "left": [child], "right": [-1], "category": [], "roots": [0], "output": [0]}
    arrays = {name: np.asarray(values, np.int32) for name, values in ints.items()} | {
        "threshold": np.zeros(1, np.float32), "flags": np.zeros(1, np.uint8), "categories": np.zeros((0, 0), np.int32),
        "values": np.zeros((1, 1), np.float32), "base": np.zeros(1, np.float32),
    }  # fmt: skip
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 2)))
    graph = b.finish([b("tree_ensemble", x, *(b.constant(arrays[k]) for k in OPERANDS.split()[1:]), compare="lt")])
    with pytest.raises(LoweringError) as caught:
        cuda.CudaLowering(graph, TargetInfo.host()).run()
    assert caught.value.code == "E_TREE_ARRAYS"


@pytest.mark.parametrize(
    ("trees", "splits", "dtype"), [(0, 0, "int32"), (0, 1, "int32"), (2, 0, "int32"), (2, 1, "int32"), (2, 1, "int8")]
)
def test_trees_of_few_arrays(trees: int, splits: int, dtype: str) -> None:
    """No trees, trees that are leaves, and arrays that are one constant: ``feature`` and ``output`` hold the same zeros."""
    count = trees * splits
    zeros, flags = np.zeros(trees, dtype), np.zeros(count, np.uint8)
    index, none = np.arange(trees, dtype=dtype), np.zeros(0, dtype)
    b = GraphBuilder()
    x = b.input("x", tensor("f64", ("n", 1)))
    shared = b.constant(zeros)
    arrays = {
        "feature": shared if splits else b.constant(none), "threshold": b.constant(np.arange(count) * 1.0),
        "left": b.constant(~index[:count]), "right": b.constant(~(index[:count] + trees)), "flags": b.constant(flags),
        "category": b.constant(none), "categories": b.constant(np.zeros((0, 0), np.int32)),
        "roots": b.constant(index if splits else ~index), "output": shared,
        "values": b.constant(np.arange(2.0 * trees).reshape(-1, 1)), "base": b.constant(np.asarray([0.5])),
    }  # fmt: skip
    graph = b.finish([b("tree_ensemble", x, *(arrays[k] for k in OPERANDS.split()[1:]))])
    rows = np.asarray([[-1.0], [0.0], [0.5], [2.0], [np.nan]])
    np.testing.assert_array_equal(run_on_host(graph, [rows]), run_graph(graph, [rows]))


def perceptron() -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 20)))
    h = b("tanh", b("add", b("matmul", x, b.constant(rng.normal(size=(20, 8)).astype(np.float32))), 1.0))
    return b.finish([b("softmax", h), b("argmax", h, axis=1)])


def convolutional() -> Graph:
    rng = np.random.default_rng(1)
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 3, 8, 8)))
    w, dense = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3, 3, 3), (64, 5)))
    h = b("max_pool", b("relu", b("conv", x, b.constant(w), pads=(1, 1, 1, 1))), kernel=(2, 2), strides=(2, 2))
    return b.finish([b("matmul", b("reshape", h, shape=("n", 64)), b.constant(dense))])


def forest() -> Graph:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    operands = sample_ensemble(np.random.default_rng(2), "float32")
    return b.finish([b("tree_ensemble", x, *map(b.constant, operands), compare="lt")])


def narrow(dtype: str) -> Graph:
    """A network in 16-bit floats."""
    b = GraphBuilder()
    x = b.input("x", tensor(dtype, ("n", 20)))
    w = b("cast", b.constant(np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)), dtype=dtype)
    return b.finish([b("softmax", b("tanh", b("matmul", x, w)))])


def fat_entries(code: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Kind, architecture and bytes of each part of the fat binary that is somewhere in the code."""
    base = code.index(b"\x50\xed\x55\xba")
    header, size = struct.unpack_from("<HQ", code, base + 6)
    position = base + header
    while position < base + header + size:
        kind, skip, length = struct.unpack_from("<H2xIQ", code, position)
        (arch,) = struct.unpack_from("<I", code, position + 28)
        yield {1: "ptx", 2: "cubin"}[kind], arch, code[position + skip : position + skip + length]
        position += skip + length


GRAPHS = [perceptron, convolutional, forest, functools.partial(narrow, "f16"), functools.partial(narrow, "bf16")]


@pytest.mark.parametrize("graph", GRAPHS, ids=["perceptron", "convolutional", "forest", "f16", "bf16"])
@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
def test_objects_hold_machine_code_for_each_architecture_and_ptx(
    graph: Callable[[], Graph], compiler: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(compiler)
    module = TVMBackend().compile(graph(), Target("cuda", ("sm_80", "sm_90", "sm_80")))
    facts = module.program.target
    assert module.program.device == "cuda"
    assert facts["archs"] == ["sm_80", "sm_90"]
    assert facts["ptx"] == "compute_90"
    assert re.fullmatch(compiler + r" \d+\.\d+", str(facts["compiler"]), re.I)
    code = b"".join(module.objects)
    assert b"__global__" not in code
    parts = sorted(fat_entries(code), key=lambda part: part[:2])
    assert [part[:2] for part in parts] == [("cubin", 80), ("cubin", 90), ("ptx", 90)]
    for _, _, elf in parts[:2]:
        assert elf[:4] == b"\x7fELF"
        assert all(f".text.{kernel.symbol}_kernel\0".encode() in elf for kernel in module.program.kernels)


def test_ptx_has_every_kernel_as_an_entry(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    compiler = device_code.device_compiler(["sm_80"])
    keep = dataclasses.replace(compiler, run=lambda source, archs, ptx: sources.append(source) or b"code")
    monkeypatch.setattr("mlec.backends.tvm.backend.device_compiler", lambda archs: keep)
    module = TVMBackend().compile(perceptron(), Target("cuda", ("sm_80",)))
    text = device_code.Nvrtc().code(sources[0], "compute_80").decode()
    assert re.search(r"^\.version \d", text, re.M)
    assert re.search(r"^\.target sm_80$", text, re.M)
    entries = set(re.findall(r"^\.visible \.entry (\w+)\(", text, re.M))
    assert {f"{kernel.symbol}_kernel" for kernel in module.program.kernels} <= entries


def test_default_architectures_and_portable_host_code(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []

    def keep(source: str) -> bytes:
        sources.append(source)
        return b"binary code"

    def compiler(archs: Sequence[str]) -> device_code.DeviceCompiler:
        return device_code.DeviceCompiler("a compiler", tuple(archs), lambda source, archs, ptx: keep(source))

    monkeypatch.setattr("mlec.backends.tvm.backend.device_compiler", compiler)
    module = TVMBackend().compile(perceptron(), Target("cuda"))
    assert module.program.target["archs"] == list(device_code.DEFAULT_ARCHS)
    assert len(sources) == 1
    assert all(f"{kernel.symbol}_kernel" in sources[0] for kernel in module.program.kernels)
    assert b"binary code" in module.objects[-1]


@pytest.mark.parametrize("found", [(), ("nvcc",)], ids=["nothing", "nvcc without gcc"])
def test_missing_compiler_is_named(found: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_code.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(TargetError, match="nvcc or NVRTC") as caught:
        TVMBackend().compile(perceptron(), Target("cuda"))
    assert caught.value.notes[0] == f"nvcc: {'gcc, which it needs, ' if found else ''}is not on the PATH"
    assert caught.value.notes[1].startswith("NVRTC: ")
    assert "pip install" in str(caught.value.hint)


def test_missing_headers_are_named(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import pathfinder

    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: None)
    with pytest.raises(TargetError, match="no headers of CUDA's cudart and cccl") as caught:
        TVMBackend().compile(perceptron(), Target("cuda"))
    assert "pip install" in str(caught.value.hint)


@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
def test_unknown_architecture_is_refused(compiler: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(compiler)
    with pytest.raises(TargetError, match="does not compile for sm_13"):
        TVMBackend().compile(perceptron(), Target("cuda", ("sm_13",)))


@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
def test_refused_code_is_shown(compiler: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(compiler)
    with pytest.raises(LoweringError, match="refused the generated code") as caught:
        device_code.device_compiler(["sm_80"])("__global__ void f() { search arch; }")
    assert caught.value.code == "E_LOWERING"
    assert any("search" in note for note in caught.value.notes)


def test_every_op_has_a_gpu_lowering() -> None:
    backend: Any = TVMBackend()
    assert [name for name in OPS if not backend.supports(name, "cuda")] == []

"""The CUDA form without a device: its kernels' arithmetic run on the CPU, its device code compiled and looked into."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.backends.tvm import cuda, device_code
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import tvm
from mlec.backends.tvm.kernels.direct import Spread, spread_on_cpu
from mlec.backends.tvm.objects import to_objects
from mlec.backends.tvm.pipeline import RELAX_PASSES
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import LoweringError, TargetError
from mlec.ir import OPS, Graph, GraphBuilder, run_graph, tensor
from mlec.ops.tree import OPERANDS
from mlec.runtime.executable import Executable
from mlec.runtime.program import Program
from mlec.target import Target
from tests.backends.tvm.op_cases import check, families, graph_of

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


class OnHost(cuda.CudaLowering):
    """The GPU's kernels, their tasks run by a loop instead of threads."""

    cell_scope = "global"

    @property
    def spread(self) -> Spread:
        return spread_on_cpu


@pytest.mark.parametrize("names", families(), ids=lambda names: f"{names[0]}..{names[-1]}")
def test_kernels_equal_the_reference(names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_scheduled", lambda function, name: function)
    graph, arrays, ops = graph_of(names, np.random.default_rng(3), dynamic=True, cases=1)
    lowered = OnHost(graph, TargetInfo.host()).run()
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        passes = tvm.transform.Sequential(RELAX_PASSES)
        compiled = tvm.compile(lowered.module, TargetInfo.host().tvm_target(), relax_pipeline=passes)
    program = Program("tvm", "cpu", constants=tuple(lowered.constants), kernels=lowered.kernels)
    executable = Executable(program, to_objects(compiled), lowered.constants, num_threads=1)
    for name, got, wanted in zip(ops, executable.run(arrays), run_graph(graph, arrays), strict=True):
        check(name, got, wanted)


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


def perceptron() -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 20)))
    h = b("tanh", b("add", b("matmul", x, b.constant(rng.normal(size=(20, 8)).astype(np.float32))), 1.0))
    return b.finish([b("softmax", h), b("argmax", h, axis=1)])


@needs_nvcc
def test_objects_hold_machine_code_for_each_architecture(tmp_path: Path) -> None:
    module = TVMBackend().compile(perceptron(), Target("cuda", ("sm_80", "sm_90")))
    assert module.program.device == "cuda"
    assert module.program.target["archs"] == ["sm_80", "sm_90"]
    code = b"".join(module.objects)
    assert b"__global__" not in code
    start = code.index(b"\x50\xed\x55\xba")  # a fat binary
    (tmp_path / "kernels.fatbin").write_bytes(code[start:])
    tool = shutil.which("cuobjdump")
    if tool is not None:
        listed = subprocess.run(
            [tool, "--list-elf", tmp_path / "kernels.fatbin"], capture_output=True, text=True, check=False
        ).stdout
        assert "sm_80" in listed
        assert "sm_90" in listed


def test_default_architectures_and_portable_host_code(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []

    def keep(source: str) -> bytes:
        sources.append(source)
        return b"binary code"

    monkeypatch.setattr(device_code, "device_compiler", lambda archs: keep)
    module = TVMBackend().compile(perceptron(), Target("cuda"))
    assert module.program.target["archs"] == list(device_code.DEFAULT_ARCHS)
    assert len(sources) == 1
    assert all(f"{kernel.symbol}_kernel" in sources[0] for kernel in module.program.kernels)
    assert b"binary code" in module.objects[-1]


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_code.shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "cuda", None)
    with pytest.raises(TargetError, match="nvcc or NVRTC") as caught:
        TVMBackend().compile(perceptron(), Target("cuda"))
    assert "pip install" in str(caught.value.hint)


@needs_nvcc
def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(TargetError, match="sm_13"):
        TVMBackend().compile(perceptron(), Target("cuda", ("sm_13",)))


def test_every_op_has_a_gpu_lowering() -> None:
    backend: Any = TVMBackend()
    assert [name for name in OPS if not backend.supports(name, "cuda")] == []

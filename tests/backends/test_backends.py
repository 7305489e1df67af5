"""Targets as text, what backends hand over, and the errors that they raise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlec
import mlec.ops  # fills the table
from mlec import registry
from mlec.backends.base import CompiledModule, CompileOptions
from mlec.backends.numpy.backend import Interpreted, NumpyBackend
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.registry import RULES, lowers
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import LoweringError, TargetError, UnsupportedOpError
from mlec.ir import OPS, Graph, GraphBuilder, Location, run_graph, tensor
from mlec.processor import needed_cpu_flags
from mlec.runtime.executable import Executable
from mlec.target import Target


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("cpu", Target()),
        ("cpu:x86-64-v3", Target("cpu", ("x86-64-v3",))),
        ("cpu:znver4,-avx512f", Target("cpu", ("znver4",), ("-avx512f",))),
        ("cuda", Target("cuda")),
        ("cuda:sm_80, sm_90", Target("cuda", ("sm_80", "sm_90"))),
        ({"kind": "llvm", "mcpu": "znver4", "mattr": ["+avx512vnni"]}, Target("cpu", ("znver4",), ("+avx512vnni",))),
        ({"kind": "cuda", "arch": "sm_90"}, Target("cuda", ("sm_90",))),
        ("cpu:x86-64-v3, x86-64-v4,x86-64-v3", Target("cpu", ("x86-64-v3", "x86-64-v4"))),
        ("cpu:portable,aarch64", Target("cpu", ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"))),
    ],
)
def test_targets(spec: object, wanted: Target) -> None:
    assert Target.parse(spec) == wanted  # type: ignore[arg-type]
    assert Target.parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tpu", "no target 'tpu'; there are: cpu, cuda"),
        ("cuda:volta", "not a CUDA architecture"),
        ("cpu:a,b,-avx512f", "go with one processor"),
        ("cuda:+x", "not a processor feature"),
        ({"kind": "cpu", "speed": 9}, "no key 'speed'"),
        (3, "got int"),
    ],
)
def test_wrong_targets(spec: object, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        Target.parse(spec)  # type: ignore[arg-type]
    assert caught.value.hint


def layer() -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder("layer")
    x = b.input("x", tensor("f32", ("n", 8)))
    with b.at(Location("model.py", 7, "head")):
        h = b("matmul", x, b.constant(rng.normal(size=(8, 4)).astype(np.float32), "weights"))
    return b.finish([b("relu", h)])


def test_numpy_backend_runs_the_graph_itself() -> None:
    backend, graph = NumpyBackend(), layer()
    module = backend.compile(graph, Target("numpy"))
    assert (module.program.backend, module.objects, list(module.constants)) == ("numpy", (), ["weights"])
    inputs = [np.ones((3, 8), np.float32)]
    np.testing.assert_array_equal(backend.executable(graph).run(inputs)[0], run_graph(graph, inputs)[0])
    assert all(backend.supports(op, "numpy") for op in OPS)
    for other in (Target("cuda"), Target(), Target("numpy", ("avx2",))):
        with pytest.raises(TargetError, match=f"does not serve the target {other}"):
            backend.compile(graph, other)


def test_kernels_tell_what_they_are() -> None:
    module = TVMBackend().compile(layer(), Target())
    product, activation = module.program.kernels
    assert (product.op, product.location, product.flops) == ("matmul", "model.py:7 (head)", "64*n")
    assert activation.op == "relu"
    assert [note.symbol for note in module.notes] == [kernel.symbol for kernel in module.program.kernels]
    assert "gemm" in module.notes[0].strategy
    assert module.signature == layer().signature


def test_code_for_another_processor_runs_here_too() -> None:
    """An older one of the same kind: narrower vectors, fewer registers."""
    target = Target.parse("cpu:x86-64-v3")
    try:
        module = TVMBackend().compile(layer(), target)
    except TargetError:
        pytest.skip("LLVM was built without x86")
    assert module.program.target["mcpu"] == "x86-64-v3"
    executable = Executable(module.program, module.objects, module.constants)
    for n in (1, 9):
        inputs = [np.random.default_rng(n).normal(size=(n, 8)).astype(np.float32)]
        np.testing.assert_allclose(executable.run(inputs)[0], run_graph(layer(), inputs)[0], rtol=1e-5, atol=1e-5)


def test_unknown_processor_is_named() -> None:
    with pytest.raises(TargetError, match="'x86-64-v9'") as caught:
        TVMBackend().compile(layer(), Target("cpu", ("x86-64-v9",)))
    assert "x86-64-v3" in str(caught.value.hint)


def test_op_without_lowering_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "relu")
    assert not TVMBackend().supports("relu", "cpu")
    with pytest.raises(UnsupportedOpError, match="no lowering of relu for cpu"):
        TVMBackend().compile(layer(), Target())


@pytest.mark.parametrize(
    ("op", "cpu", "cuda"),
    [
        ("exp", "loop, backends/tvm/scalar.py", "loop, backends/tvm/scalar.py"),
        ("pad", "loop, backends/tvm/lower_shape.py", "loop, backends/tvm/lower_shape.py"),
        ("concat", "template, backends/tvm/lower_shape.py", "template, backends/tvm/lower_shape.py"),
        ("matmul", "template with epilogue, backends/tvm/lower_linalg.py", "template, backends/tvm/cuda.py"),
        ("softmax", "template, backends/tvm/lower_nn.py", "decomposed, backends/tvm/decompose.py"),
        ("batch_norm", "decomposed, backends/tvm/decompose.py", "decomposed, backends/tvm/decompose.py"),
    ],
)
def test_the_table_says_how_an_op_is_lowered(op: str, cpu: str, cuda: str) -> None:
    assert (TVMBackend().how(op, "cpu"), TVMBackend().how(op, "cuda")) == (cpu, cuda)


def test_a_second_rule_of_a_form_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"exp has a scalar rule for cpu already, in backends/tvm/scalar\.py"):
        lowers("exp", form="scalar")(lambda x: x)


def test_targets_lead_to_the_backend_that_serves_them() -> None:
    wanted = {"cpu": TVMBackend, "cuda": TVMBackend, "numpy": NumpyBackend}
    assert {kind: type(registry.backend_of(kind)) for kind in registry.target_kinds()} == wanted


@pytest.mark.parametrize("passes", ["O0", "default"])
def test_the_numpy_target_from_compile_to_load(passes: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    compiled = mlec.compile(layer(), target="numpy", passes=passes)
    assert compiled.report.model["target"] == {"device": "cpu", "backend": "numpy", "kind": "numpy"}
    assert compiled.report.timing["measured"]["compiled_ms"] > 0
    compiled.save(tmp_path / "layer.mle")
    loaded = mlec.load(tmp_path / "layer.mle", trust="sha256:" + "0" * 64)  # there is no code to trust
    assert isinstance(loaded.executable, Interpreted)
    wanted = run_graph(layer(), [rows])[0]
    for model in (compiled, loaded):
        np.testing.assert_allclose(model.run([rows])[0], wanted, rtol=1e-6)
    assert loaded.benchmark([rows]).rows == 5


def test_progress_is_told() -> None:
    seen: list[str] = []
    TVMBackend().compile(
        layer(), Target(), CompileOptions(lambda stage, done, total: seen.append(f"{stage} {done}/{total}"))
    )
    assert seen[0] == "lower 0/3"
    assert seen[-1] == "build 1/1"


COMPILE = """
import hashlib
from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import parse_graph
from mlec.target import Target
graph = parse_graph("graph @g(%x: f32[n, 8]) -> (f32[n, 8]) { %e = exp(%x) : f32[n, 8] %y = relu(%e) : f32[n, 8] return %y }")
print([hashlib.sha256(data).hexdigest() for data in TVMBackend().compile(graph, Target()).objects])
"""


def test_equal_compilations_give_equal_code() -> None:
    """In fresh processes: TVM numbers names through the life of a process."""
    command = [sys.executable, "-c", COMPILE]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second != ""


def test_kernels_for_another_processor_are_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not TargetInfo.host().triple.startswith("x86_64"):
        pytest.skip("x86 has levels")
    program = compiled_for("cpu:x86-64-v3").program
    flags = needed_cpu_flags(program.device, program.target)
    monkeypatch.setattr("mlec.processor.host_flags", lambda: flags)
    for target, warned in (("cpu:x86-64", False), ("cpu:x86-64-v3", False), ("cpu:znver4", True)):
        report = mlec.compile(layer(), target=target).report
        assert bool(report.warnings) is warned
        assert ("measured" in report.timing) is not warned
    assert "avx512" in report.warnings[0]


def compiled_for(target: str) -> CompiledModule:
    return TVMBackend().compile(layer(), Target.parse(target))


def test_a_symbol_that_stands_in_expressions_only_is_refused() -> None:
    b = GraphBuilder("g")
    graph = b.finish([b("relu", b.input("x", tensor("f32", ("m + n", 2))))])
    with pytest.raises(LoweringError, match="no input has an axis of extent m") as caught:
        TVMBackend().compile(graph, Target())
    assert caught.value.hint

"""Programs for a GPU given tensors that lie on it: with the host standing in as the device, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlec
from mlec.backends.tvm import cuda
from mlec.backends.tvm.backend import GPU_ALIGNMENT, TVMBackend
from mlec.backends.tvm.compat import tvm
from mlec.backends.tvm.device_code import DEFAULT_ARCHS, DeviceCompiler, device_compiler
from mlec.backends.tvm.pipeline import RELAX_PASSES
from mlec.backends.tvm.relax_module import relax_module
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import InputError, RuntimeUnavailableError, TargetError, UsageError
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.runtime import CompiledModel, vm
from mlec.runtime.device import DEVICES, DeviceMemory, DLDevice, borrow, open_device
from mlec.target import Target
from tests.backends.tvm.test_cuda import OnHost, machine_on_host

torch = pytest.importorskip("torch")
HOST = DLDevice(1)


def network() -> Graph:
    """One hidden layer; gives the result twice, the input and a constant back, too."""
    rng = np.random.default_rng(0)
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 6)))
    w, v = (rng.normal(size=(6, 6)).astype(np.float32) for _ in range(2))
    y = b("tanh", b("matmul", b("tanh", b("matmul", x, b.constant(w))), b.constant(v)))
    return b.finish([y, y, x, b.constant(w)])


def addition() -> Graph:
    b = GraphBuilder()
    x, y = (b.input(name, tensor("f32", ("n", 6))) for name in "xy")
    return b.finish([b("add", x, y)])


def on_stand_in(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    """The graph's program for a GPU whose kernels, and whose memory, are the host's."""
    monkeypatch.setattr(cuda, "_scheduled", lambda function, name: function)
    memory = DeviceMemory(HOST, GPU_ALIGNMENT)
    monkeypatch.setattr(vm, "open_device", lambda *_: memory)
    return CompiledModel(graph.signature, machine_on_host(graph), device=HOST)


def expected(graph: Graph, *arrays: np.ndarray[Any, Any]) -> Sequence[Any]:
    return mlec.compile(graph, target="numpy").run(list(arrays))


def rows(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).normal(size=(n, 6)).astype(np.float32)


class TestStandIn:
    @pytest.mark.parametrize("n", [0, 1, 5, 64])
    def test_tensors_on_the_device_give_tensors_there(self, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        graph, fed, fetched, waited = network(), [], [], []
        model = on_stand_in(graph, monkeypatch)
        memory: Any = model.executable._memory  # type: ignore[attr-defined]
        monkeypatch.setattr(memory, "fetch", fetched.append)
        monkeypatch.setattr(memory, "_wait", lambda *stream: waited.append(stream))
        monkeypatch.setattr(model.executable, "_feed", lambda x: fed.append(memory.feed(x)) or fed[-1])
        x = torch.from_numpy(rows(n)).clone()  # torch aligns what it allocates
        results = model.run([x])
        assert not fetched
        assert len(waited) == 1  # on any stream, the results may be used at once
        assert all(type(y) is torch.Tensor for y in results)
        if n:
            assert fed[0].data_ptr() == x.data_ptr()
            assert len({y.data_ptr() for y in (x, *results)}) == 5
        for y, reference in zip(results, expected(graph, x.numpy()), strict=True):
            np.testing.assert_allclose(y.numpy(), reference, rtol=1e-5, atol=1e-6)

    def test_results_are_the_callers_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = on_stand_in(network(), monkeypatch)
        x = torch.from_numpy(rows(5))
        first = model.run([x])
        kept = [y.clone() for y in first]
        for y in model.run([x + 1]):
            y.zero_()
        assert all(torch.equal(y, k) for y, k in zip(first, kept, strict=True))
        assert torch.equal(model.run([x])[3], kept[3])  # the constant, which was not written to

    def test_gaps_and_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graph = network()
        model = on_stand_in(graph, monkeypatch)
        block = torch.from_numpy(rows(9).ravel())
        for x in (block[1:31].view(5, 6), block[:36].view(6, 6).T, block[:12].view(2, 6)[::2]):
            np.testing.assert_allclose(model.run(x)[0], expected(graph, x.numpy())[0], rtol=1e-5, atol=1e-6)

    def test_one_input_of_the_host_brings_results_to_the_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = on_stand_in(addition(), monkeypatch)
        x = torch.from_numpy(rows(5))
        (y,) = model.run([x, x.tolist()])
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(y, 2 * x.numpy())

    def test_out_is_written_in_host_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = on_stand_in(addition(), monkeypatch)
        x = torch.from_numpy(rows(5))
        out = np.empty((5, 6), np.float32)
        assert model.run([x, x], out=[out])[0] is out
        np.testing.assert_array_equal(out, 2 * x.numpy())

    def test_shapes_are_checked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = on_stand_in(addition(), monkeypatch)
        with pytest.raises(InputError, match=r"axis 0 must be n = 2 as elsewhere, not 3"):
            model.run([torch.ones(2, 6), torch.ones(3, 6)])

    def test_measuring(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = on_stand_in(network(), monkeypatch)
        x = torch.from_numpy(rows(5))
        assert model.benchmark([x], num_runs=3).p50 > 0
        assert model.profile([x], num_runs=2).kernels
        assert model.peak_memory_usage() > x.nbytes


def test_intermediate_values_share_planned_memory() -> None:
    """Also where extents are symbolic: a chain of any length needs two buffers beside its result."""
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 6)))
    w = b.constant(rows(6))
    for _ in range(8):
        x = b("tanh", b("matmul", x, w))
    lowered = OnHost(b.finish([x]), TargetInfo.host()).run()
    with TargetInfo.host().tvm_target():
        planned = tvm.transform.Sequential(RELAX_PASSES)(relax_module(lowered))
    text = planned["main"].script()
    assert text.count("alloc_tensor(") == len(lowered.kernels) > 3
    assert text.count("alloc_storage(") == 3


def test_the_program_says_which_alignment_its_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = DeviceCompiler("a compiler", ("sm_80",), lambda source, archs, ptx: b"binary code")
    monkeypatch.setattr("mlec.backends.tvm.backend.device_compiler", lambda archs: compiler)
    program = TVMBackend().compile(network(), Target("cuda")).program
    calls = cuda.CudaLowering(network(), TargetInfo.host()).run().calls
    assumed = {parameter.data_alignment for call in calls if call.function for parameter in call.function.params}
    assert max(assumed) == program.alignment


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    try:
        model = mlec.compile(addition(), target="cuda")
    except TargetError as error:
        pytest.skip(error.message)
    model.save(tmp_path / "m.mle")
    return tmp_path / "m.mle"


def test_loading_names_the_devices_it_can_run_on(model_file: Path) -> None:
    with pytest.raises(UsageError, match="models run on the first CUDA device, not on 'cuda:1'") as caught:
        mlec.load(model_file, device="cuda:1")
    assert "CUDA_VISIBLE_DEVICES=1" in str(caught.value.hint)
    with pytest.raises(UsageError, match="holds kernels for cuda, not for 'cpu'"):
        mlec.load(model_file, device="cpu")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_loading_without_a_driver_says_what_is_missing(model_file: Path, device: str) -> None:
    try:
        open_device("cuda")
    except RuntimeUnavailableError as error:
        if "no CUDA driver" not in error.message:
            pytest.skip(error.message)
    else:
        pytest.skip("there is a CUDA device")
    with pytest.raises(
        RuntimeUnavailableError, match="compiled for CUDA, and this machine has no CUDA driver"
    ) as caught:
        mlec.load(model_file, device=device)
    assert caught.value.hint == 'install the NVIDIA driver, or compile the model with target="cpu"'


@pytest.fixture
def gpu() -> None:
    try:
        open_device("cuda")
        device_compiler(DEFAULT_ARCHS)
    except (RuntimeUnavailableError, TargetError) as error:
        pytest.skip(f"this machine cannot compile and run programs for CUDA: {error.message}")
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
class TestOnGPU:
    @pytest.mark.parametrize("loaded", [False, True])
    def test_round_trip_without_the_host(self, loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        graph = network()
        model = mlec.compile(graph, target="cuda")
        if loaded:
            model.save(tmp_path / "m.mle")
            model = mlec.load(tmp_path / "m.mle")
        monkeypatch.setattr(DeviceMemory, "fetch", None)  # a host copy would fail
        x = torch.from_numpy(rows(64)).cuda()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)  # what the kernels must wait for
            doubled = x * 2
            results = model.run([doubled])
        assert all(y.device == x.device for y in results)
        assert len({y.data_ptr() for y in (doubled, *results)}) == 5
        reference = expected(graph, 2 * x.cpu().numpy())
        for y, want in zip(results, reference, strict=True):
            np.testing.assert_allclose(y.cpu().numpy(), want, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()
        for y, want in zip(model.run([2 * x.cpu().numpy()]), results, strict=True):
            assert type(y) is np.ndarray
            np.testing.assert_array_equal(y, want.cpu().numpy())

    def test_tensors_are_read_where_they_lie(self) -> None:
        memory = open_device("cuda", GPU_ALIGNMENT)
        x = torch.from_numpy(rows(8)).cuda()
        assert memory.feed(borrow(x, "x", DEVICES["cuda"])).data_ptr() == x.data_ptr()

    def test_gaps_and_addresses(self) -> None:
        graph = network()
        model = mlec.compile(graph, target="cuda")
        block = torch.from_numpy(rows(9).ravel()).cuda()
        for x in (block[1:31].view(5, 6), block[:36].view(6, 6).T, block[:0].view(0, 6)):
            want = expected(graph, x.cpu().numpy())[0]
            np.testing.assert_allclose(model.run(x)[0].cpu(), want, rtol=1e-4, atol=1e-5)

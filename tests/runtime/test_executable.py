"""Linking in memory and running: results, memory, threads, errors."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest

from mlec.errors import MlecError, RuntimeUnavailableError, UsageError
from mlec.runtime import Executable, Program, open_program
from mlec.runtime.threads import effective_cpu_count
from tests.runtime.conftest import program_of

Make = Callable[..., Executable]
Objects = dict[str, tuple[bytes, ...]]
ROOT = Path(__file__).parents[2]
rng = np.random.default_rng(1)


def rows(n: int) -> np.ndarray:
    return rng.standard_normal((n, 8)).astype(np.float32)


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + 4
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("n", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: x[::-1].copy()[::-1],
        misaligned,
        read_only,
    ],
    ids=["plain", "fortran", "strided", "reversed", "misaligned", "read-only"],
)
def test_every_layout_gives_the_same_result(
    make_executable: Make, weight: np.ndarray, n: int, layout: Callable
) -> None:
    x = rows(n)
    h, y = make_executable().run([layout(x)])
    np.testing.assert_allclose(h, x @ weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, np.maximum(x @ weight, 0), rtol=1e-5, atol=1e-6)
    assert h.dtype == y.dtype == np.float32
    assert h.shape == (n, 4)


def test_outputs_belong_to_the_caller(make_executable: Make, weight: np.ndarray) -> None:
    executable = make_executable("aliases")
    x = rows(3)
    kept = x.copy()
    outputs = executable.run([x])
    assert [output.shape for output in outputs] == [(3, 8), (8, 4), (3, 4), (3, 4), (12,)]
    np.testing.assert_array_equal(outputs[0], x)
    np.testing.assert_array_equal(outputs[1], weight)
    np.testing.assert_array_equal(outputs[4], outputs[2].ravel())
    first = [output.copy() for output in outputs]
    for output in outputs:
        output[...] = -1
    np.testing.assert_array_equal(x, kept)
    for again, before in zip(executable.run([x]), first, strict=True):
        np.testing.assert_array_equal(again, before)


def test_results_are_written_to_arrays_of_the_caller(make_executable: Make, weight: np.ndarray) -> None:
    executable = make_executable()
    x = rows(5)
    h, y = (np.full((5, 4), np.nan, np.float32) for _ in range(2))
    results = executable.run([x], [h, y])
    assert results[0] is h
    assert results[1] is y
    np.testing.assert_allclose(h, x @ weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, np.maximum(h, 0))
    assert executable.run([x], [None, y])[1] is y


def test_arrays_that_kernels_cannot_write_to_are_left_alone(make_executable: Make) -> None:
    executable = make_executable()
    x = rows(5)
    expected = executable.run([x])
    big = np.full((5, 8), 7, np.float32)
    for unfit in (
        np.full((5, 3), 7, np.float32),
        np.full((5, 4), 7.0),
        np.full((4, 5), 7, np.float32).T,
        big[:, ::2],
        read_only(np.full((5, 4), 7, np.float32)),
        misaligned(np.full((5, 4), 7, np.float32)),
    ):
        results = executable.run([x], [unfit, None])
        assert results[0] is not unfit
        assert (unfit == 7).all()
        np.testing.assert_array_equal(results[0], expected[0])
    one = np.empty((5, 4), np.float32)
    results = executable.run([x], [one, one])
    assert results[0] is one
    assert results[1] is not one
    np.testing.assert_array_equal(results[1], expected[1])
    line = np.arange(1.0, 9, dtype=np.float32)
    kept = line.copy()
    (result,) = make_executable("chain").run([line], [line])
    assert result is not line
    np.testing.assert_array_equal(line, kept)
    np.testing.assert_allclose(result, kept * 8.0**7, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_one_array_takes_the_short_way_to_the_same_results(make_executable: Make, n: int) -> None:
    executable = make_executable()
    x, other = rows(n), rows(n)
    assert executable.run_single(x) is None, "nothing of this shape came before"
    expected = [executable.run([array]) for array in (x, other)]
    for array, results in zip((x, other), expected, strict=True):
        for result, right in zip(executable.run_single(array) or (), results, strict=True):
            np.testing.assert_array_equal(result, right)
    h = np.full((n, 4), np.nan, np.float32)
    first, second = executable.run_single(x, [h]) or (None, None)
    assert first is h
    assert second is not h
    np.testing.assert_array_equal(h, expected[0][0])


def test_what_is_not_plain_does_not_take_the_short_way(make_executable: Make) -> None:
    executable = make_executable()
    x = rows(4)
    executable.run([x])
    for unfit in (np.asfortranarray(x), x[:, ::-1], x.astype(np.float64), x.astype(">f4"), x[:3], misaligned(x)):
        assert executable.run_single(unfit) is None
    memory = np.empty((8, 4), np.float32)
    whole = np.zeros(64, np.float32)
    table, inside = whole[:32].reshape(4, 8), whole[8:24].reshape(4, 4)
    for unfit in (memory, memory.astype(np.float64)[:4], memory[::2], read_only(memory[4:].copy()), inside, [0.0] * 4):
        assert executable.run_single(table, [unfit]) is None
    assert executable.run_single(table, [memory[:4], memory[2:6]]) is None
    assert executable.run_single(table, [memory[:4], memory[4:]]) is not None
    assert make_executable("aliases").run_single(x) is None, "outputs that no kernel writes are copied"


def test_the_short_way_leaves_no_memory_behind(make_executable: Make) -> None:
    executable = make_executable()
    executable.run([rows(1)])
    executable.run([rows(100_000)])
    held = executable._idle[0].arena.nbytes
    taken = [executable.run_single(x) or executable.run([x]) for x in [rows(1)] * 1000]
    assert len(taken) == 1000
    assert len(executable._idle) == 1
    assert executable._idle[0].arena.nbytes <= held


def test_the_short_way_of_a_failing_and_of_a_closed_program(make_executable: Make) -> None:
    executable = make_executable("chain")
    fine, fatal = np.ones(2, np.float32), np.ones(13, np.float32)
    executable.run([fine])
    with pytest.raises(MlecError, match="thirteen"):
        executable.run([fatal])
    executable.run([fine])
    executable._idle[0].frame(((13,),))
    with pytest.raises(MlecError, match=r"the compiled program failed: .*thirteen"):
        executable.run_single(fatal)
    executable.run([fine])
    assert executable.run_single(fine) is not None
    executable.close()
    assert executable.run_single(fine) is None


def test_outputs_survive_later_runs_and_the_model(make_executable: Make, weight: np.ndarray) -> None:
    executable = make_executable()
    x = rows(5)
    h, _ = executable.run([x])
    for _ in range(10):
        executable.run([rows(5)])
    executable.close()
    del executable
    gc.collect()
    np.testing.assert_allclose(h, x @ weight, rtol=1e-5, atol=1e-6)


def test_bfloat16_and_bool_pass_through(make_executable: Make) -> None:
    x = np.array([1.0, -2.5, np.nan], ml_dtypes.bfloat16)
    b = np.array([True, False, True])
    got_x, got_b = make_executable("bits").run([x, b])
    assert got_x.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got_x.view(np.uint16), x.view(np.uint16))
    assert got_b.dtype == bool
    np.testing.assert_array_equal(got_b, b)


def test_a_failing_kernel_is_our_error_and_does_no_harm(make_executable: Make) -> None:
    executable = make_executable("chain")
    with pytest.raises(MlecError, match=r"the compiled program failed: .*thirteen") as caught:
        executable.run([np.ones(13, np.float32)])
    assert caught.value.code == "E_RUN"
    assert caught.value.notes == ("in kernel scale_0, made of scale at net.py:0",)
    np.testing.assert_array_equal(executable.run([np.ones(2, np.float32)])[0], [128, 128])


@pytest.mark.parametrize(
    "inputs",
    [
        [np.zeros((2, 9), np.float32)],
        [np.zeros((2, 8, 1), np.float32)],
        [np.zeros((2, 8))],
        [np.zeros((2, 8), ">f4")],
        [np.zeros((2, 8), np.float32)] * 2,
        [],
        [np.broadcast_to(np.float32(0), (1 << 44, 8))],
    ],
    ids=["extent", "rank", "dtype", "byte order", "too many", "none", "size"],
)
def test_inputs_the_program_does_not_take_are_refused(make_executable: Make, inputs: list[np.ndarray]) -> None:
    executable = make_executable()
    with pytest.raises(MlecError) as caught:
        executable.run(inputs)
    assert caught.value.code in ("E_RUN", "E_NO_MEMORY")
    assert executable.run([np.zeros((2, 8), np.float32)])[0].shape == (2, 4)


def test_intermediate_values_share_memory(make_executable: Make) -> None:
    executable = make_executable("chain")
    x = np.ones(1024, np.float32)
    # Of six intermediate values two are alive at a time.
    assert executable.activation_nbytes([x]) == 2 * 4096 + 4096
    assert executable.run([np.ones(2, np.float32)])[0].tolist() == [128, 128]


def test_memory_of_a_large_call_is_given_back(make_executable: Make) -> None:
    executable = make_executable("chain")
    large, small = np.ones(1 << 22, np.float32), np.ones(2, np.float32)
    executable.run([small])
    tracemalloc.start()  # what is allocated; the C library may keep pages of what was freed
    try:
        executable.run([large])
        held = tracemalloc.get_traced_memory()[0]
        for _ in range(600):
            executable.run([small])
        assert held - tracemalloc.get_traced_memory()[0] > 16 << 20  # one intermediate value has 16 MB
    finally:
        tracemalloc.stop()


def test_many_shapes(make_executable: Make) -> None:
    executable = make_executable("chain")
    sizes = [*range(1, 60), *range(60, 0, -1), *rng.permutation(60).tolist() * 4]
    for n in sizes:
        if n != 13:
            x = np.ones(100 * n, np.float32)
            (result,) = executable.run([x])
            np.testing.assert_allclose(result, float(100 * n) ** 7, rtol=1e-5)
            (context,) = executable._idle
            assert all(frame.arena_nbytes <= context.arena.nbytes for frame in context.frames.values())


def test_sixteen_threads(make_executable: Make, weight: np.ndarray) -> None:
    executable = make_executable()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        try:
            for _ in range(200):
                x = own.standard_normal((own.integers(0, 40), 8)).astype(np.float32)
                h, y = executable.run([x])
                np.testing.assert_allclose(h, x @ weight, rtol=1e-4, atol=1e-5)
                np.testing.assert_array_equal(y, np.maximum(h, 0))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_memory_stays_flat(make_executable: Make) -> None:
    executable = make_executable()
    x = rows(512)
    process = psutil.Process()

    def grow(runs: int) -> int:
        before = process.memory_info().rss
        for _ in range(runs):
            executable.run([x])
        return int(process.memory_info().rss - before)

    grow(200)
    # One leaked output of a run would be 8 KiB, 16 MiB in all.
    assert grow(2000) < 2 << 20


def test_models_are_dropped(make_executable: Make) -> None:
    process = psutil.Process()

    def cycle(count: int) -> int:
        before = process.memory_info().rss
        for _ in range(count):
            executable = make_executable()
            executable.run([rows(16)])
            executable.close()
        gc.collect()
        return int(process.memory_info().rss - before)

    cycle(10)
    files = process.num_fds()
    assert cycle(50) < 8 << 20
    assert process.num_fds() == files


def test_a_dropped_model_is_freed_at_once(make_executable: Make) -> None:
    executable = make_executable()
    executable.run([rows(16)])
    freed = weakref.ref(executable)
    gc.disable()
    try:
        del executable
        assert freed() is None
    finally:
        gc.enable()


def test_callers_leave_no_threads_behind(make_executable: Make) -> None:
    executable = make_executable(num_threads=2)
    executable.run([rows(64)])
    process = psutil.Process()
    before = process.num_threads()
    for _ in range(20):
        caller = threading.Thread(target=executable.run, args=([rows(64)],))
        caller.start()
        caller.join()
    deadline = time.monotonic() + 10
    while process.num_threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.num_threads() <= before


def test_models_are_loaded_and_dropped_in_many_threads_at_once(make_executable: Make, weight: np.ndarray) -> None:
    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        for _ in range(10):
            executable = make_executable(num_threads=1 + seed % 2)
            x = own.standard_normal((100, 8)).astype(np.float32)
            np.testing.assert_allclose(executable.run([x])[0], x @ weight, rtol=1e-4, atol=1e-5)
            executable.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


FIRST_LOADS = """
from concurrent.futures import ThreadPoolExecutor
from mlec.runtime.library import load_library
with ThreadPoolExecutor(16) as pool:
    assert len({id(library) for library in pool.map(lambda _: load_library(), range(64))}) == 1
"""


def test_first_load_by_many_threads_at_once() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FIRST_LOADS], env=environment, check=True)


@pytest.mark.skipif(effective_cpu_count() < 2, reason="needs two CPUs")
def test_forked_child_goes_on_without_the_threads_of_its_parent(make_executable: Make) -> None:
    executable = make_executable("chain")
    x = [np.ones(1 << 22, np.float32)]
    wanted = executable.run(x)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        in_a_thread = ThreadPoolExecutor(1).submit(executable.run, x).result()[0]
        same = np.array_equal(executable.run(x)[0], wanted) and np.array_equal(in_a_thread, wanted)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(executable.run(x)[0], wanted)


def test_memory_of_callers_that_are_gone_is_given_back(make_executable: Make) -> None:
    executable = make_executable("chain")
    large, small = np.ones(1 << 22, np.float32), np.ones(2, np.float32)
    executable.run([small])
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(executable.run, [[large]] * 8))
        for _ in range(1200):
            executable.run([small])
        assert tracemalloc.get_traced_memory()[0] < 8 << 20  # one intermediate value has 16 MB
    finally:
        tracemalloc.stop()


def test_closed(make_executable: Make) -> None:
    executable = make_executable()
    executable.close()
    with pytest.raises(UsageError, match="closed"):
        executable.run([rows(1)])


@pytest.mark.skipif(effective_cpu_count() < 2, reason="needs two CPUs")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_parallel_kernels_use_the_threads_asked_for(make_executable: Make, num_threads: int) -> None:
    def threads_at_work() -> int:
        (found,) = make_executable("threads", num_threads).run([])
        return len(set(found.tolist()))

    with ThreadPoolExecutor(1) as caller:  # a pool belongs to the thread that calls
        assert caller.submit(threads_at_work).result() == num_threads


def test_thread_count_can_change_between_models(make_executable: Make, weight: np.ndarray) -> None:
    x = rows(100)
    for num_threads in (1, 2, 1, 2):
        h, _ = make_executable(num_threads=num_threads).run([x])
        np.testing.assert_allclose(h, x @ weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, -1, True, "2", 1.5])
def test_bad_number_of_threads(make_executable: Make, count: object) -> None:
    with pytest.raises(UsageError, match="num_threads must be"):
        make_executable(num_threads=count)


def test_number_of_threads_is_limited_to_the_cpus(make_executable: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mlec")
    assert make_executable(num_threads=10_000).num_threads == effective_cpu_count()
    assert [record.name for record in caplog.records] == ["mlec"]
    assert "num_threads=10000" in caplog.text
    assert make_executable(num_threads=np.int64(1)).num_threads == 1


def test_constants_are_checked(objects: Objects, weight: np.ndarray) -> None:
    with pytest.raises(UsageError, match="needs the constants w"):
        Executable(program_of("main"), objects["main"], {})
    for wrong in (weight.astype(np.float64), weight.T):
        with pytest.raises(UsageError, match=r"the constant w must be float32 of shape \(8, 4\), got"):
            Executable(program_of("main"), objects["main"], {"w": wrong})


@pytest.mark.parametrize("damage", ["not an object", "cut", "no kernel"])
def test_damaged_objects_are_refused(objects: Objects, weight: np.ndarray, damage: str) -> None:
    kernels, driver = objects["main"]
    bad = {"not an object": (b"\x00" * 64, driver), "cut": (kernels[:500], driver), "no kernel": (driver,)}[damage]
    with pytest.raises(RuntimeUnavailableError, match="could not be linked"):
        Executable(program_of("main"), bad, {"w": weight})


def test_kernel_times_and_memory(make_executable: Make) -> None:
    executable = make_executable(num_threads=1)
    x = rows(4096)
    times = executable.time_kernels([x], repeats=3)
    assert set(times) == {"matmul", "relu"}
    assert all(calls == 1 for calls, _ in times.values())
    assert times["matmul"][1] > times["relu"][1] > 0  # 8 multiplications for each value against one comparison
    assert executable.activation_nbytes([x]) == 2 * 4096 * 4 * 4
    assert executable.weights_nbytes == 8 * 4 * 4


def test_cuda_without_a_driver_says_so(objects: Objects, weight: np.ndarray) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a CUDA driver")
    with pytest.raises(RuntimeUnavailableError, match="no CUDA driver") as caught:
        open_program(Program(backend="tvm", device="cuda", constants=("w",)), objects["main"], {"w": weight})
    assert caught.value.hint


LEAN = """
import sys, pickle, numpy as np
from mlec.runtime import CompiledModel, open_program
from mlec.signature import Signature, TensorSpec
program, objects = pickle.loads(open(sys.argv[1], "rb").read())
executable = open_program(program, objects, {"w": np.ones((8, 4), "f")})
signature = Signature((TensorSpec("x", "f32", ("n", 8)),), (TensorSpec("h", "f32", ("n", 4)),) * 2)
assert CompiledModel(signature, executable).run([np.ones((2, 8))])[0].tolist() == [[8.0] * 4] * 2
heavy = {"torch", "sklearn", "xgboost", "lightgbm", "pandas", "polars", "tvm", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture
def program_file(objects: Objects, tmp_path: Path) -> Path:
    """A program and its objects, pickled."""
    path = tmp_path / "program.pkl"
    path.write_bytes(pickle.dumps((program_of("main"), objects["main"])))
    return path


def test_running_imports_no_framework(program_file: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": str(program_file.parent)}
    subprocess.run([sys.executable, "-c", LEAN, str(program_file)], env=environment, check=True)


def test_torch_still_works_after_the_runtime(program_file: Path) -> None:
    pytest.importorskip("torch")
    code = LEAN + "import torch; assert torch.ones(2).sum().item() == 2\n"
    code += "assert CompiledModel(signature, executable).run([torch.ones(2, 8)])[0].tolist() == [[8.0] * 4] * 2\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(program_file)], env=environment, check=True)


@pytest.mark.parametrize("by_llvm", [False, True])
def test_tvm_ffi_is_whole_for_those_who_import_it_after_the_runtime(program_file: Path, by_llvm: bool) -> None:
    """What LLVM has linked is called through the extension module of tvm-ffi, which is that of the package then."""
    code = (
        ("import mlec.runtime.library as library\nlibrary.link_in_memory = lambda objects, find: None\n" * by_llvm)
        + LEAN
        + f"""
assert "tvm_ffi" not in sys.modules and "importlib.metadata" not in sys.modules
assert any("tvm_ffi/core" in line for line in open("/proc/self/maps")) == {by_llvm}
import tvm_ffi, tvm_ffi_orcjit
assert tvm_ffi.core is sys.modules["tvm_ffi.core"] and isinstance(executable._linked.call, tvm_ffi.Function) == {by_llvm}
assert isinstance(tvm_ffi_orcjit.default_session(), tvm_ffi.Object)
assert tvm_ffi.convert([1, "two"])[1] == "two" and tvm_ffi.from_dlpack(np.ones(3)).shape == (3,)
assert executable.run([np.ones((2, 8), "f")])[0].tolist() == [[8.0] * 4] * 2
"""
    )
    subprocess.run(
        [sys.executable, "-c", code, str(program_file)], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )


def test_a_kernel_that_fails_says_why_without_the_package_of_tvm_ffi(objects: Objects, tmp_path: Path) -> None:
    path = tmp_path / "program.pkl"
    path.write_bytes(pickle.dumps((program_of("chain"), objects["chain"])))
    code = """
import sys, pickle, numpy as np
from mlec.runtime import open_program
executable = open_program(*pickle.loads(open(sys.argv[1], "rb").read()), {})
try:
    executable.run([np.ones(13, "f")])
except Exception as error:
    print(type(error).__name__, "tvm_ffi" in sys.modules, error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert re.match(r"MlecError False the compiled program failed: .*thirteen", done.stdout), done.stdout


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from mlec.runtime.library import find_library

    with pytest.raises(RuntimeUnavailableError, match="tvm is not installed") as caught:
        find_library("tvm_runtime")
    assert caught.value.hint == "install it: pip install apache-tvm"

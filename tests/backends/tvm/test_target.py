"""Facts about CPUs, kernels for other CPUs than the host, and independence of the number of threads."""

import re

import numpy as np
import pytest

from mlec.backends.tvm.backend import _processors, cpu_info
from mlec.backends.tvm.compat import IRModule, tirx, tvm
from mlec.backends.tvm.kernels.conv_blocked import conv2d_nchwc
from mlec.backends.tvm.kernels.depthwise import depthwise_nchwc
from mlec.backends.tvm.kernels.gemm import column_block, gemm, pack_gemm
from mlec.backends.tvm.kernels.matmul import matmul
from mlec.backends.tvm.kernels.winograd import WinogradSchedule, conv2d_winograd, pack_winograd
from mlec.backends.tvm.objects import to_object
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import TargetError
from mlec.ops.conv import blocked_weights
from mlec.processor import DISABLE, UNCHECKED, X86_FLAGS, needed_flags, what_is_missing
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, geometry


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    ("mcpu", "triple", "bits", "registers", "fma"),
    [
        ("znver5", "x86_64-linux-gnu", 512, 32, True),
        ("haswell", "x86_64-linux-gnu", 256, 16, True),
        ("nehalem", "x86_64-linux-gnu", 128, 16, False),
        ("neoverse-n1", "aarch64-linux-gnu", 128, 32, True),
    ],
)
def test_vector_unit_of_known_cpus(mcpu, triple, bits, registers, fma):
    info = TargetInfo.for_cpu(mcpu, triple)
    assert (info.vector_bits, info.vector_registers, info.fma) == (bits, registers, fma)
    assert info.lanes(32) == bits // 32


def test_hidden_features_are_taken_back():
    info = TargetInfo.for_cpu("znver5", "x86_64-linux-gnu", ("-avx512f",))
    assert info.vector_bits == 256
    assert "-avx512f" in str(info.tvm_target())


def test_host():
    assert HOST.cores >= 1
    assert HOST.l1_bytes < HOST.l2_bytes
    assert HOST.mcpu in str(HOST.tvm_target())


def test_code_made_here_runs_here_where_the_system_lists_nothing(monkeypatch):
    monkeypatch.setattr("mlec.processor._listed_flags", list)
    info = TargetInfo.host()
    assert what_is_missing(needed_flags(info.triple, info.features)) == ""
    assert info.mcpu == HOST.mcpu


@pytest.mark.parametrize("mcpu", ["haswell", "nehalem"])
def test_kernels_for_smaller_vectors_are_right(mcpu):
    if not HOST.triple.startswith("x86_64") or "avx2" not in HOST.features:
        pytest.skip("runs code for x86 with AVX2")
    info = TargetInfo.for_cpu(mcpu)
    n = tirx.Var("n", "int64")
    block = column_block(50, "float32", info)
    w = normal((30, 50), 1)
    run = compile_kernel(gemm((n,), 50, 30, "float32", block, info), info)
    for rows in (1, 5, 40):
        a = normal((rows, 30))
        np.testing.assert_allclose(run(a, pack_gemm(w, block), out=(rows, 50)), a @ w, rtol=1e-4, atol=1e-4)
    a, b = normal((2, 9, 20)), normal((2, 20, 33), 1)
    run = compile_kernel(matmul((n,), (n,), 9, 33, 20, "float32", info), info)
    np.testing.assert_allclose(run(a, b, out=(2, 9, 33)), a @ b, rtol=1e-4, atol=1e-4)
    x, kernel = normal((1, 1, 9, 9, 8)), normal((16, 8, 3, 3), 1)
    func = conv2d_nchwc(x.shape, (2, 1, 3, 8, 3, 8), geometry((1, 1), (1,) * 4), "float32", info)
    got = compile_kernel(func, info)(x, blocked_weights(kernel, 8, 8), out=(1, 2, 9, 9, 8))
    host = conv2d_nchwc(x.shape, (2, 1, 3, 8, 3, 8), geometry((1, 1), (1,) * 4), "float32", HOST)
    want = compile_kernel(host)(x, blocked_weights(kernel, 8, 8), out=(1, 2, 9, 9, 8))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_code_for_another_architecture_is_generated():
    info = TargetInfo.for_cpu("neoverse-n1", "aarch64-linux-gnu")
    func = gemm((tirx.Var("n", "int64"),), 64, 64, "float32", 8, info, name="product")
    module = compile_for_cpu(IRModule({"product": func}), info.tvm_target())
    assert "fmla" in module.inspect_source("asm")


def test_results_do_not_depend_on_the_number_of_threads():
    configure = tvm.get_global_func("runtime.config_threadpool")
    a, w = normal((300, 400)), pack_gemm(normal((400, 500), 1), 32)
    product = compile_kernel(gemm((300,), 500, 400, "float32", 32, HOST))
    x, kernel = normal((3, 4, 30, 30, 16)), normal((4, 4, 3, 16, 3, 16), 1)
    shape, pads = (3, 4, 30, 30, 16), (1,) * 4
    direct = compile_kernel(conv2d_nchwc(x.shape, kernel.shape, geometry((1, 1), pads), "float32", HOST))
    schedule = next(WinogradSchedule.candidates((30, 30), kernel.shape, HOST))
    winograd = compile_kernel(conv2d_winograd(x.shape, kernel.shape, pads, HOST, schedule=schedule))
    depthwise = compile_kernel(depthwise_nchwc(x.shape, (4, 3, 3, 16), geometry((1, 1), pads), "float32", HOST))
    results = []
    try:
        for threads in (1, 2, 3, 4):
            configure(1, threads)
            images = (
                direct(x, kernel, out=shape),
                winograd(x, pack_winograd(kernel, schedule.outputs), out=shape),
                depthwise(x, kernel[:, 0, :, 0], out=shape),
            )
            results.append((product(a, w, out=(300, 500)), *images))
    finally:
        configure(1, 0)
    for one, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


INERT = """
    64bit 64bit-mode adx aes amx-avx512 amx-complex amx-fp16 amx-fp8 amx-movrs amx-tf32 cldemote clflushopt clwb clzero cmov cmpccxadd
    crc32 cx8 enqcmd ermsb fsgsbase fsrm fxsr hreset invpcid kl lwp mmx movdir64b movdiri mwaitx nopl pclmul pconfig pku prefetchi
    ptwrite rdpid rdpru rdrnd rdseed serialize sha sha512 shstk sm3 sm4 sse sse2 tsxldtrk uintr usermsr waitpkg wbnoinvd widekl x87
    xsave xsavec xsaveopt xsaves
"""
"""What x86-64 has had from the start, and what code uses only where an intrinsic asks for it."""

TUNING = re.compile(
    r"(allow|fast|faster|slow|prefer|false-deps|no-bypass|idiv[lq]|lea|pad|sbb|tuning|use)-.*|(macro|branch)fusion|vzeroupper|branch-hint"
)


@pytest.mark.parametrize("cpu", sorted(_processors("x86_64-unknown-linux-gnu")))
def test_no_code_uses_what_nobody_checks(cpu):
    """Every feature of every processor is looked for before code runs, or never used, or no instruction at all."""
    features = TargetInfo.for_cpu(cpu, "x86_64-unknown-linux-gnu").features
    unknown = [name for name in features - set(X86_FLAGS) - set(INERT.split()) if not TUNING.fullmatch(name)]
    assert unknown == []
    assert not features & set(UNCHECKED)


def test_code_for_aarch64_uses_neon():
    info = cpu_info(Target.parse("cpu:aarch64"))
    func = gemm((tirx.Var("n", "int64"),), 64, 64, "float32", 8, info, name="product")
    module = compile_for_cpu(IRModule({"product": func}), info.tvm_target())
    assert re.search(r"\bfmla\s+v\d+\.4s", module.inspect_source("asm"))
    assert to_object(module)[18:20] == b"\xb7\0"  # EM_AARCH64


@pytest.mark.parametrize(("cpu", "register"), [("x86-64-v2", "xmm"), ("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")])
def test_each_level_has_vectors_of_its_own(cpu, register):
    info = TargetInfo.for_cpu(cpu, "x86_64-unknown-linux-gnu")
    func = gemm((tirx.Var("n", "int64"),), 64, 64, "float32", column_block(64, "float32", info), info, name="product")
    used = set(
        re.findall(
            r"%([xyz]mm)\d", compile_for_cpu(IRModule({"product": func}), info.tvm_target()).inspect_source("asm")
        )
    )
    assert max(used) == register


def test_what_a_level_does_not_tell_is_assumed_low():
    info = TargetInfo.for_cpu("x86-64-v3", "x86_64-unknown-linux-gnu")
    assert (info.l1_bytes, info.l2_bytes) == (32 << 10, 256 << 10)
    assert info.cores > 2


def test_a_hidden_feature_hides_what_needs_it(monkeypatch):
    if "avx512f" not in HOST.features:
        pytest.skip("there is nothing to hide")
    monkeypatch.setenv(DISABLE, "avx512f")
    assert not {name for name in TargetInfo.host().features if name.startswith("avx512")}
    monkeypatch.setenv(DISABLE, "amx_tile")
    assert not {name for name in TargetInfo.host().features if name.startswith("amx")}, "they need tiles"
    monkeypatch.setenv(DISABLE, "sse4_2")
    assert TargetInfo.host().vector_bits == 128


@pytest.mark.parametrize("spec", ["cpu:x86-64-v3,-avx9", "cpu:x86-64-v3,+avx5l2f", "cpu:aarch64,+neom"])
def test_a_feature_that_no_processor_has_is_refused(spec, capfd):
    with pytest.raises(TargetError, match=r"that LLVM knows has the feature '(avx9|avx5l2f|neom)'") as caught:
        cpu_info(Target.parse(spec))
    assert {"avx9": "avx", "avx5l2f": "avx512f", "neom": "neon"}[spec.rpartition(",")[2][1:]] in caught.value.hint
    assert not any(capfd.readouterr())


def test_a_feature_that_one_processor_has_is_known():
    assert "avx512fp16" in cpu_info(Target.parse("cpu:x86-64-v4,+avx512fp16")).features

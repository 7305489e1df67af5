"""The TVM backend: graph -> kernels and the sequence of their calls -> object files."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial

from mlec.backends.base import Backend, CompiledModule, CompileOptions
from mlec.backends.tvm import cuda, peak
from mlec.backends.tvm.assembly import second_names
from mlec.backends.tvm.compat import llvm, tvm
from mlec.backends.tvm.device_code import DEFAULT_ARCHS, compile_for_cuda, device_compiler, pack_device_code
from mlec.backends.tvm.driver import driver
from mlec.backends.tvm.kernels.gemm_bf16 import bf16_products, has_tiles, least_rows
from mlec.backends.tvm.kernels.int8 import byte_products
from mlec.backends.tvm.kernels.tile import PARAMETER_ALIGNMENT
from mlec.backends.tvm.kernels.winograd import beats_bf16
from mlec.backends.tvm.lowering import Lowered, Lowering
from mlec.backends.tvm.objects import to_objects
from mlec.backends.tvm.pipeline import ObjectsForCPU
from mlec.backends.tvm.registry import lowering_of
from mlec.backends.tvm.relax_module import relax_module
from mlec.backends.tvm.sequence import Extents, call_sequence
from mlec.backends.tvm.target import TargetInfo, architecture_of, features_of, host_triple
from mlec.capabilities import TARGETS
from mlec.errors import TargetError
from mlec.ir.graph import Graph
from mlec.pipeline import TargetFacts
from mlec.processor import needed_flags, what_is_missing
from mlec.runtime.library import use_threads
from mlec.runtime.program import Program
from mlec.target import Target

from mlec.backends.tvm import (  # noqa: F401  isort: skip  (they register their lowerings)
    fourier_products, lower_elementwise, lower_fourier, lower_fused, lower_linalg, lower_nn, lower_quant, lower_reduce, lower_shape,
    lower_tree,
)  # fmt: skip

GPU_ALIGNMENT = 64
"""Bytes that the schedules of GPU kernels take the address of every operand to be a multiple of: TVM's default."""

GPU_REGISTERS = 255
"""That one thread can use."""


class TVMBackend(Backend):
    """Compiles for CPUs through LLVM, for NVIDIA GPUs through CUDA source.

    The object files hold the kernels (a GPU's as binary code inside) and what calls them: for a CPU a small native function, which
    the program's call sequence steers; for a GPU bytecode of TVM's virtual machine.
    """

    name = "tvm"
    targets: Mapping[str, str] = TARGETS["tvm"]

    def how(self, op: str, kind: str = "cpu") -> str:
        """How the op is lowered for a kind of target, and in which file; empty where it is not."""
        entry = lowering_of(op, "cuda" if kind == "cuda" else "cpu")
        return "" if entry is None else str(entry)

    def facts(self, target: Target) -> TargetFacts:
        """The width of a CPU's vectors, its L2 and how fast it multiplies bytes; row programs, and products that widen weights as they read
        them, are for CPUs only.

        Raises:
            TargetError: for a CPU that LLVM does not know.
        """
        if target.kind == "cuda":
            return TargetFacts(vector_registers=GPU_REGISTERS, row_programs=False, cache_bytes=sys.maxsize)
        info = cpu_info(target)
        return TargetFacts(
            info.vector_bits // 8,
            info.vector_registers,
            cache_bytes=info.l2_bytes,
            byte_products=byte_products(info),
            bf16_products=bf16_products(info),
            bf16_rows=least_rows if has_tiles(info) else TargetFacts.bf16_rows,
            bf16_tiles=has_tiles(info),
            winograd=partial(beats_bf16, target=info),
        )

    def check_tunable(self, target: Target) -> None:
        """Whether the kernels of a target run on the processor of this machine.

        Raises:
            TargetError: they don't: they can't be measured here.
        """
        if target.kind == "cuda":
            raise TargetError(
                "tune measures kernels for processors, not for GPUs",
                hint='leave tune at 0, or compile for target="cpu"',
            )
        info = cpu_info(target)
        if missing := what_is_missing(needed_flags(info.triple, info.features)):
            raise TargetError(
                f"tune measures kernels for {target} on this machine: {missing}",
                hint='leave tune at 0, tune where the model will run, or compile for target="cpu"',
            )

    def multiply_adds(self, bits: int, threads: int) -> float:
        """What the processor of this machine computes, measured."""
        use_threads(threads)
        return peak.rate(peak.multiply_adds(f"float{bits}", threads), f"float{bits}")

    def compile(self, graph: Graph, target: Target, options: CompileOptions | None = None) -> CompiledModule:
        """Compiles a verified graph.

        Raises:
            UnsupportedOpError: for an op without a lowering; names the node.
            TargetError: for a CPU that LLVM does not know, or when no CUDA compiler is installed.
        """
        options = options or CompileOptions()
        begin = time.perf_counter()
        generate = _for_cuda if target.kind == "cuda" else _for_cpu
        lowered, objects, program = generate(graph, target, options)
        options.report("build", 1, 1)
        seconds = time.perf_counter() - begin
        return CompiledModule(
            program, objects, lowered.constants, graph.signature, lowered.notes, seconds, lowered.tuned
        )


def _for_cpu(graph: Graph, target: Target, options: CompileOptions) -> tuple[Lowered, tuple[bytes, ...], Program]:
    """Kernels, and the native function that calls them in the order of the program's sequence."""
    info = cpu_info(target)
    with ObjectsForCPU(info.tvm_target(), at_once=options.tuning is None) as objects:  # tuning measures
        lowered = Lowering(graph, info, options, objects.add).run()
        options.report("build", 0, 1)
        sequence = call_sequence(lowered)
        files = (*objects.finish(), driver(sequence.codes, info.triple))
    program = Program(
        "tvm",
        "cpu",
        constants=tuple(lowered.parameters),
        kernels=lowered.kernels,
        target={"kind": "cpu", "triple": info.triple, "mcpu": info.mcpu, "features": sorted(info.features)},
        alignment=PARAMETER_ALIGNMENT,
        sequence=sequence,
        scratch=_scratch(lowered),
    )
    return lowered, files, program


def _scratch(lowered: Lowered) -> int | tuple[int | str, ...]:
    """What the program says of the memory that its kernels take for themselves."""
    taken = {call.scratch for call in lowered.calls}
    most = max((nbytes for nbytes in taken if isinstance(nbytes, int)), default=0)
    text = Extents(lowered.inputs).text
    symbolic = sorted(text(nbytes) for nbytes in taken if isinstance(nbytes, str))
    return (most, *symbolic) if symbolic else most


def _for_cuda(graph: Graph, target: Target, options: CompileOptions) -> tuple[Lowered, tuple[bytes, ...], Program]:
    """Kernels as binary code for the devices, and bytecode of TVM's virtual machine, which launches them."""
    info, compiler = _portable_cpu(), device_compiler(target.archs or DEFAULT_ARCHS)
    lowered = cuda.CudaLowering(graph, info, options).run()
    options.report("build", 0, 1)
    executable = compile_for_cuda(relax_module(lowered), info.tvm_target(), compiler.archs)
    objects = to_objects(executable, pack_device_code(compiler))
    if lowered.aliases:
        objects = (*objects, second_names(lowered.aliases))
    facts: dict[str, str | int | list[str]] = {
        "kind": "cuda", "archs": list(compiler.archs), "ptx": compiler.ptx, "compiler": compiler.name, "triple": info.triple,
    }  # fmt: skip
    program = Program(
        "tvm",
        "cuda",
        constants=tuple(lowered.parameters),
        kernels=lowered.kernels,
        target=facts,
        alignment=GPU_ALIGNMENT,
    )
    return lowered, objects, program


ARCHITECTURES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
"""The architectures that processors are named of, and how LLVM calls a Linux system of each."""


def cpu_info(target: Target) -> TargetInfo:
    """The facts of a cpu target that names at most one processor.

    Raises:
        TargetError: LLVM does not know the processor, or no processor of its architecture has a feature that is named.
    """
    if not target.arch:
        return TargetInfo.host()
    host = host_triple()
    triples = [host, *(triple for name, triple in ARCHITECTURES.items() if name != architecture_of(host))]
    for triple in triples:
        if target.arch == architecture_of(triple) and target.arch == "aarch64":
            _check_features(target.features, triple)
            return TargetInfo.for_cpu("generic", triple, target.features)
        if target.arch in _processors(triple):
            _check_features(target.features, triple)
            return TargetInfo.for_cpu(target.arch, triple, target.features)
    known = sorted({name for triple in triples for name in _processors(triple)})
    near = [name for name in known if name[:3] == target.arch[:3]][:8] or [
        name for name in ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "skylake", "znver4", "neoverse-n1") if name in known
    ]  # fmt: skip
    raise TargetError(
        f"LLVM does not know the processor {target.arch!r}", hint=f"it knows, among others, {', '.join(near)}"
    )


def _check_features(named: Sequence[str], triple: str) -> None:
    """Of one that it does not know, LLVM itself says so on the standard error stream and goes on."""
    for word in named:
        if word[1:] not in (known := _known_features(triple)):
            near = get_close_matches(word[1:], sorted(known), 6, 0.5) or sorted(known)[:6]
            raise TargetError(
                f"no processor of {architecture_of(triple)} that LLVM knows has the feature {word[1:]!r}",
                hint=f"near it are {', '.join(near)}; a + before its name adds one, a - takes it away",
            )


@cache
def _known_features(triple: str) -> frozenset[str]:
    """LLVM's names of what any processor of an architecture has."""
    return frozenset().union(*(features_of(triple, name) for name in _processors(triple)))


@cache
def _processors(triple: str) -> frozenset[str]:
    """LLVM's names of an architecture's processors; of x86 those of 64 bits."""
    names = frozenset(
        str(name) for name in llvm.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm", "mtriple": triple}))
    )
    if architecture_of(triple) != "x86_64":
        return names
    return frozenset(name for name in names if "64bit" in TargetInfo.for_cpu(name, triple).features)


def _portable_cpu() -> TargetInfo:
    """What host code that only launches GPU kernels is compiled for: any processor of this machine's kind."""
    host = TargetInfo.host()
    return TargetInfo.for_cpu("x86-64" if host.triple.startswith("x86_64") else "generic", host.triple)

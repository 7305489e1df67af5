"""What the kernel templates must know of the processor they are generated for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mlec.backends.tvm.compat import Target, llvm
from mlec.target import X86_FLAGS


@dataclass(frozen=True)
class TargetInfo:
    """Facts about one CPU. Sizes in bytes, registers in bits; templates derive every tile size from these.

    ``attributes`` are corrections to what LLVM assumes of ``mcpu`` (``-avx512f``: a hypervisor hides it).
    """

    triple: str
    mcpu: str
    vector_bits: int
    vector_registers: int
    fma: bool
    features: frozenset[str] = field(repr=False)
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    l3_bytes: int = 8 << 20
    cores: int = 1
    attributes: tuple[str, ...] = ()

    def lanes(self, dtype_bits: int) -> int:
        """Elements of ``dtype_bits`` bits in one vector register."""
        return max(1, self.vector_bits // dtype_bits)

    def tvm_target(self) -> Target:
        """The same as TVM's ``Target`` (host code included)."""
        config = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu, "num-cores": self.cores}
        if self.attributes:
            config["mattr"] = list(self.attributes)
        return Target(config)

    @classmethod
    def for_cpu(
        cls, mcpu: str, triple: str | None = None, attributes: tuple[str, ...] = (), cores: int = 1
    ) -> TargetInfo:
        """Facts LLVM knows about ``mcpu``; cache sizes are the class defaults (they differ within one LLVM name)."""
        triple = triple or _host_triple()
        target = Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu, "mattr": list(attributes)})
        features = frozenset(str(name) for name in llvm.llvm_get_cpu_features(target))
        bits, registers, fma = _vector_unit(triple, features)
        return cls(triple, mcpu, bits, registers, fma, features, cores=cores, attributes=attributes)

    @classmethod
    @cache
    def host(cls) -> TargetInfo:
        """The machine this runs on: LLVM's name for it, less what the operating system does not offer."""
        triple, mcpu = _host_triple(), str(llvm.llvm_get_system_cpu())
        named = cls.for_cpu(mcpu, triple)
        flags = _linux_cpu_flags()
        hidden = [f"-{name}" for name, flag in X86_FLAGS.items() if name in named.features and flag not in flags]
        added = [f"+{name}" for name, flag in X86_FLAGS.items() if name not in named.features and flag in flags]
        info = cls.for_cpu(mcpu, triple, tuple(hidden + added) if flags else ())
        sizes = _linux_cache_sizes()
        return cls(
            triple,
            mcpu,
            info.vector_bits,
            info.vector_registers,
            info.fma,
            info.features,
            l1_bytes=sizes.get(1, info.l1_bytes),
            l2_bytes=sizes.get(2, info.l2_bytes),
            l3_bytes=sizes.get(3, info.l3_bytes),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            attributes=info.attributes,
        )


def _host_triple() -> str:
    return str(llvm.llvm_get_system_triple())


def _vector_unit(triple: str, features: frozenset[str]) -> tuple[int, int, bool]:
    """Bits per vector register, number of registers, fused multiply-add."""
    if triple.startswith(("aarch64", "arm64")):
        return 128, 32, True
    if "avx512f" in features and "avx512vl" in features:
        return 512, 32, True
    return (256 if "avx2" in features else 128), 16, "fma" in features


def _linux_cpu_flags() -> frozenset[str]:
    """Flags of the first processor in /proc/cpuinfo; empty where there is none (then LLVM's list is believed)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def _linux_cache_sizes() -> dict[int, int]:
    """Bytes of the data or unified cache per level, as the kernel reports them for the first processor."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[int(level)] = int(size[:-1]) << 10
    return sizes

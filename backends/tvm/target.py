"""What the kernel templates must know of the processor they are generated for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from mlec.backends.tvm.compat import Target, llvm
from mlec.processor import FLAGS, UNCHECKED, host_flags

UNKNOWN_CORES = 16
"""For a processor that may have any number: work is cut into so many pieces that 16 threads have some, and one is not held up."""


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
    l2_bytes: int = 256 << 10
    l3_bytes: int = 8 << 20
    cores: int = UNKNOWN_CORES
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
        cls, mcpu: str, triple: str | None = None, attributes: tuple[str, ...] = (), cores: int = UNKNOWN_CORES
    ) -> TargetInfo:
        """Facts LLVM knows about ``mcpu``. What differs within one name is what all but the oldest have at least."""
        triple = triple or host_triple()
        features = features_of(triple, mcpu, attributes)
        unchecked = tuple(f"-{name}" for name in UNCHECKED if name in features)
        if unchecked:
            attributes = (*attributes, *unchecked)
            features = features_of(triple, mcpu, attributes)
        bits, registers, fma = _vector_unit(triple, features)
        l2_bytes = (1 << 20) if bits >= 512 else (512 << 10) if architecture_of(triple) == "aarch64" else (256 << 10)
        return cls(
            triple, mcpu, bits, registers, fma, features, l2_bytes=l2_bytes, cores=cores, attributes=attributes
        )  # fmt: skip

    @classmethod
    def host(cls) -> TargetInfo:
        """The machine this runs on: LLVM's name for it, less what the operating system does not offer."""
        return cls._host(host_flags())

    @classmethod
    @cache
    def _host(cls, flags: frozenset[str]) -> TargetInfo:
        triple, mcpu = host_triple(), str(llvm.llvm_get_system_cpu())
        named = features_of(triple, mcpu, ())
        known = FLAGS.get(architecture_of(triple), {})
        added = [f"+{name}" for name, flag in known.items() if name not in named and flag in flags]
        with_added = features_of(triple, mcpu, tuple(added))  # and with what these need
        hidden = [f"-{name}" for name, flag in known.items() if name in with_added and flag not in flags]
        info = cls.for_cpu(mcpu, triple, (*added, *hidden))  # what is hidden takes along what needs it
        sizes = _linux_cache_sizes()
        return replace(
            info,
            l1_bytes=sizes.get(1, info.l1_bytes),
            l2_bytes=sizes.get(2, info.l2_bytes),
            l3_bytes=sizes.get(3, info.l3_bytes),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        )


def features_of(triple: str, mcpu: str, attributes: tuple[str, ...] = ()) -> frozenset[str]:
    """LLVM's names of what a processor has, and of how it is tuned for."""
    target = Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu, "mattr": list(attributes)})
    return frozenset(str(name) for name in llvm.llvm_get_cpu_features(target))


def architecture_of(triple: str) -> str:
    return triple.partition("-")[0]


def host_triple() -> str:
    return str(llvm.llvm_get_system_triple())


def _vector_unit(triple: str, features: frozenset[str]) -> tuple[int, int, bool]:
    """Bits per vector register, number of registers, fused multiply-add."""
    if architecture_of(triple) in ("aarch64", "arm64"):
        return 128, 32, True
    if "avx512f" in features and "avx512vl" in features:
        return 512, 32, True
    return (256 if "avx2" in features else 128), 16, "fma" in features


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

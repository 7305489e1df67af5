"""Instruction sets of processors: what this machine's has, and what code that LLVM makes for a processor needs.

They are named as Linux names them in /proc/cpuinfo, where one that the operating system keeps from programs is missing.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache

from mlec.errors import UsageError

DISABLE = "MLEC_DISABLE_CPU_FEATURES"
"""Environment variable: instruction sets, separated by commas, that count as if this processor did not have them."""

X86_FLAGS: Mapping[str, str] = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "movbe": "movbe",
    "lzcnt": "abm",
    "prfchw": "3dnowprefetch",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "tbm": "tbm",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "avxvnni": "avx_vnni",
    "avxifma": "avx_ifma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512ifma": "avx512ifma",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "gfni": "gfni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}

ARM_FLAGS: Mapping[str, str] = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "crc": "crc32",
    "lse": "atomics",
    "lse2": "uscat",
    "lse128": "lse128",
    "rdm": "asimdrdm",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "rcpc": "lrcpc",
    "rcpc-immo": "ilrcpc",
    "rcpc3": "lrcpc3",
    "jsconv": "jscvt",
    "complxnum": "fcma",
    "flagm": "flagm",
    "altnzcv": "flagm2",
    "fptoint": "frint",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "aes": "aes",
    "sha2": "sha2",
    "sha3": "sha3",
    "sm4": "sm4",
    "sve": "sve",
    "sve2": "sve2",
    "sve2p1": "sve2p1",
    "f32mm": "svef32mm",
    "f64mm": "svef64mm",
    "mops": "mops",
    "cssc": "cssc",
    "faminmax": "faminmax",
    "lut": "lut",
}

FLAGS: Mapping[str, Mapping[str, str]] = {"x86_64": X86_FLAGS, "aarch64": ARM_FLAGS}
"""By architecture, the extensions that LLVM may use without being asked: its name for each, and that of Linux."""

UNCHECKED = (
    "avxneconvert", "avxvnniint8", "avxvnniint16", "avx10.1", "avx10.2", "movrs",
    "egpr", "ndd", "nf", "ccmp", "cf", "zu", "ppx", "push2pop2",
)  # fmt: skip
"""Extensions of x86 that Linux does not list, so that nobody could tell whether a processor has them: no code uses them."""

_BASE: Mapping[str, tuple[str, ...]] = {"aarch64": ("fp", "asimd")}
"""Of the extensions above, what every processor of an architecture has that runs Linux: nothing else is certain where none are listed."""

_OTHER_NAMES = {"arm64": "aarch64", "AMD64": "x86_64"}


def host_flags() -> frozenset[str]:
    """Instruction sets of this processor and its architecture, less what `DISABLE` names.

    Raises:
        UsageError: `DISABLE` names something that is no instruction set.
    """
    return _less(platform.machine(), tuple(_listed_flags()), os.environ.get(DISABLE, ""))


@cache
def _less(machine: str, listed: tuple[str, ...], disabling: str) -> frozenset[str]:
    """`host_flags`, of what the system says and `DISABLE` holds."""
    machine = _OTHER_NAMES.get(machine, machine)
    present = {machine, *_BASE.get(machine, ()), *listed}
    disabled = {name.strip() for name in disabling.split(",") if name.strip()}
    known = present | {flag for table in FLAGS.values() for flag in table.values()}
    if unknown := sorted(disabled - known):
        raise UsageError(
            f"the environment variable {DISABLE} names {unknown[0]!r}, which is no instruction set",
            hint="it takes names from /proc/cpuinfo, such as avx512f,avx2",
        )
    return frozenset(present - disabled)


def described(*names: str) -> Iterator[str]:
    """What /proc/cpuinfo says of its processors under these names, in its order; nothing where there is no such file."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in names:
                yield value.strip()


@cache
def _cpuinfo_flags() -> tuple[str, ...]:
    return tuple(next(described("flags", "Features"), "").split())


def _listed_flags() -> Sequence[str]:
    """Those of the first processor, less AMX where this process may not use it; none where nothing is known."""
    listed = _cpuinfo_flags()
    return listed if "amx_tile" not in listed or _may_use_tiles() else [f for f in listed if not f.startswith("amx_")]


@cache
def _may_use_tiles() -> bool:
    """Asks Linux for the registers of AMX, which a process gets only then: its first instruction of AMX would be illegal otherwise.

    Threads and forked children have the permission with it. Refused by systems that do not know the call.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0
    except (OSError, AttributeError):
        return False


def needed_flags(triple: str, features: Iterable[str]) -> frozenset[str]:
    """What a processor must have to run code for a triple that uses some of LLVM's features, named as in `host_flags`."""
    architecture = triple.partition("-")[0]
    names = FLAGS.get(architecture, {})
    return frozenset(names[name] for name in features if name in names) | {architecture}


NOTABLE = (
    "avx", "avx2", "fma", "avx512f", "avx512vnni", "avxvnni", "avx512bf16", "avx512fp16", "amx-int8", "amx-bf16",
    "neon", "dotprod", "i8mm", "fullfp16", "bf16", "sve", "sve2",
)  # fmt: skip
"""Of the extensions, those that decide how fast a model runs."""


def notable(features: Iterable[str]) -> list[str]:
    """Of LLVM's features of a processor, those that decide how fast a model runs, without what a later one includes."""
    given = set(features)
    found = [name for name in NOTABLE if name in given]
    included = {"avx"} if "avx2" in given else set()
    included |= {"avx", "avx2", "fma"} if "avx512f" in given else set()
    return [name for name in found if name not in included]


def what_is_missing(needed: Iterable[str]) -> str:
    """In words, what this processor lacks of ``needed``; empty if it can run the code."""
    host = host_flags()
    missing = sorted(set(needed) - host)
    for architecture in FLAGS:
        if architecture in missing:
            own = next((name for name in FLAGS if name in host), platform.machine())
            return f"this processor is {own}, not {architecture}"
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"this processor lacks {', '.join(missing[:8])}{more}" if missing else ""


def best_of(needed: Sequence[Collection[str]]) -> int | None:
    """Position of the code that suits this processor best: of what it can run, what needs most, the first among equals.

    Args:
        needed: what a processor must have for each.
    """
    able = [position for position, flags in enumerate(needed) if not what_is_missing(flags)]
    return max(able, key=lambda position: len(needed[position]), default=None)


def processor_name(target: Mapping[str, object]) -> str:
    """What the facts of a compiled program's target call its processor, as a target names it."""
    name = str(target.get("mcpu", ""))
    return str(target.get("triple", "")).partition("-")[0] if name in ("", "generic") else name


def needed_cpu_flags(device: str, target: Mapping[str, object]) -> frozenset[str]:
    """What a processor must have to run kernels, named as in `host_flags`; nothing for those of another device.

    Args:
        device: that the kernels run on.
        target: that they were compiled for, with LLVM's ``triple`` and ``features``.
    """
    triple, features = target.get("triple"), target.get("features")
    if device != "cpu" or not isinstance(triple, str):
        return frozenset()
    return needed_flags(triple, features if isinstance(features, list) else ())

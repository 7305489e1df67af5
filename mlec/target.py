"""Compile targets as users write them: ``"cpu"``, ``"cpu:x86-64-v3"``, ``"cuda:sm_80,sm_90"``, ``"numpy"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlec import registry
from mlec.errors import TargetError

X86_FLAGS = {
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "lzcnt": "abm",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "avxvnni": "avx_vnni",
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
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "gfni": "gfni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}
"""Extensions of x86 that kernels may use, by LLVM's name: the name that Linux gives them in /proc/cpuinfo."""


@dataclass(frozen=True)
class Target:
    """What to compile for. Says nothing about whether it exists on this machine.

    Attributes:
        kind: where the model will run; decides the backend (`registry.backend_of`).
        archs: cpu: the processor by LLVM's name (``"x86-64-v3"``, ``"znver4"``), or none for the machine that compiles.
            cuda: one or more ``"sm_90"``; none means the architectures that `mlec` ships code for by default.
            Other kinds: as their backend says.
        features: cpu: corrections to what that processor has, as ``"+avx512vnni"`` or ``"-avx512f"``.
    """

    kind: str = "cpu"
    archs: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        registry.check_kind(self.kind)
        if self.kind == "cpu" and len(self.archs) > 1:
            raise TargetError(
                f"a cpu target names one processor, got {', '.join(self.archs)}", hint=registry.target_hint()
            )
        for arch in self.archs:
            if self.kind == "cuda" and not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
                raise TargetError(
                    f"{arch!r} is not a CUDA architecture: expected e.g. sm_80 or sm_90", hint=registry.target_hint()
                )
        for feature in self.features:
            if self.kind == "cuda" or not re.fullmatch(r"[+-][\w.-]+", feature):
                raise TargetError(
                    f"{feature!r} is not a processor feature: expected e.g. +avx512vnni", hint=registry.target_hint()
                )

    @property
    def arch(self) -> str:
        """The processor of a cpu target; empty for the machine that compiles."""
        return self.archs[0] if self.archs else ""

    @staticmethod
    def parse(spec: str | Mapping[str, Any] | Target) -> Target:
        """Reads ``"kind"``, ``"kind:arch,arch"``, ``"cpu:arch,+feature,-feature"`` or a mapping as TVM writes targets.

        A mapping has ``kind`` ("cpu", "llvm" or "cuda") and optionally ``arch`` (text or list), ``mcpu``, ``mattr``.

        Raises:
            TargetError: listing what exists.
        """
        if isinstance(spec, Target):
            return spec
        if isinstance(spec, str):
            kind, _, rest = spec.strip().partition(":")
            words = [word.strip() for word in rest.split(",") if word.strip()]
        elif isinstance(spec, Mapping):
            known = {"kind", "arch", "mcpu", "mattr"}
            if unknown := sorted(set(spec) - known):
                raise TargetError(
                    f"a target mapping has no key {unknown[0]!r}", hint=f"its keys are {', '.join(sorted(known))}"
                )
            kind = str(spec.get("kind", ""))
            words = [word for key in ("arch", "mcpu", "mattr") for word in _listed(spec.get(key, ()))]
        else:
            raise TargetError(f"a target is text or a mapping, got {type(spec).__name__}", hint=registry.target_hint())
        kind = "cpu" if kind == "llvm" else kind
        archs = tuple(word for word in words if word[0] not in "+-")
        features = tuple(word for word in words if word[0] in "+-")
        return Target(kind, archs, features)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.kind, ",".join((*self.archs, *self.features)))))


def _listed(value: object) -> list[str]:
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, (list, tuple)):
        return [str(word) for word in value]
    raise TargetError(
        f"expected text or a list of texts in a target mapping, got {value!r}", hint=registry.target_hint()
    )

"""Compile targets as users write them: ``"cpu"``, ``"cpu:x86-64-v3,x86-64-v4"``, ``"cuda:sm_80,sm_90"``, ``"numpy"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlec import registry
from mlec.errors import TargetError

PORTABLE = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
"""What ``"cpu:portable"`` stands for: every x86-64 processor made since 2009, each level with code of its own."""


@dataclass(frozen=True)
class Target:
    """What to compile for. Says nothing about whether it exists on this machine.

    Attributes:
        kind: where the model will run; decides the backend (`registry.backend_of`).
        archs: cpu: processors by LLVM's name (``"x86-64-v3"``, ``"znver4"``; ``"aarch64"``: any of that architecture), each of which gets
            code of its own; none for the machine that compiles.
            cuda: one or more ``"sm_90"``; none means the architectures that `mlec` ships code for by default.
            Other kinds: as their backend says.
        features: cpu: corrections to what the one processor has, as ``"+avx512vnni"`` or ``"-avx512f"``.
    """

    kind: str = "cpu"
    archs: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        registry.check_kind(self.kind)
        if self.kind == "cpu" and len(self.archs) > 1 and self.features:
            raise TargetError(
                f"corrections such as {self.features[0]} go with one processor, got {', '.join(self.archs)}",
                hint="leave them out, or name a processor that has what you want",
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
        """The processor of a cpu target that names no more than one; empty for the machine that compiles."""
        return self.archs[0] if self.archs else ""

    @property
    def variants(self) -> tuple[Target, ...]:
        """What gets code of its own: of a cpu target each processor, else the target itself."""
        if self.kind != "cpu" or len(self.archs) < 2:
            return (self,)
        return tuple(Target(self.kind, (arch,)) for arch in self.archs)

    @staticmethod
    def parse(spec: str | Mapping[str, Any] | Target) -> Target:
        """Reads ``"kind"``, ``"kind:arch,arch"``, ``"cpu:arch,+feature,-feature"`` or a mapping as TVM writes targets.

        The processor ``portable`` stands for `PORTABLE`.

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
        named = [word for word in words if word[0] not in "+-"]
        if kind == "cpu":
            named = [arch for word in named for arch in (PORTABLE if word == "portable" else (word,))]
        archs = tuple(dict.fromkeys(named))
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

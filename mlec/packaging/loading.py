"""Loads a .mle file. Imports what runs it, and what compiles graphs only where that is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mlec.artifact import Artifact, ModelMetadata, TrustDigest, check_signed, decide, read_model
from mlec.artifact.trust import WAYS_OUT, named_trust, not_native
from mlec.errors import UsageError
from mlec.processor import best_of, processor_name, what_is_missing
from mlec.runtime import CompiledModel, Program, logs, open_program
from mlec.runtime.device import DEVICES
from mlec.runtime.library import runtime_abi

if TYPE_CHECKING:
    from pathlib import Path

    from mlec.artifact import SaveResult
    from mlec.ir import Graph
    from mlec.ir.op import Array
    from mlec.report import OptimizationReport

CHECKED_AT_ONCE: Final = 16 << 20
"""Bytes of the largest files whose weights are read and checked when they are loaded: that takes two CPUs some 10 ms."""


def load(
    path: str | os.PathLike[str], device: str = "auto", num_threads: int | None = None, trust: str | TrustDigest = "auto",
    encryption_key: Any = None, *, require_signature: bool = False, require_native: bool = False,
    metrics: bool = False,
) -> CompiledModel:  # fmt: skip
    """Loads a ``.mle`` file; needs neither the training framework nor, for kernels that may run here, the compiler.

    Weights are mapped, and shared with other processes that load the file. Everything is checked before it is used: weights of files
    above 16 MiB by the first call, which is the first to read them, anything else here.

    Args:
        path: the file.
        device: ``"auto"``: the one it was compiled for, of CUDA devices the first.
        num_threads: threads of one call; all usable CPUs by default.
        trust: ``"auto"`` runs the file's machine code if a trusted key signed it or this user built it, and otherwise compiles its
            graph here; ``"sha256:..."`` (or a `TrustDigest`) runs the code of exactly that digest.
        encryption_key: of an encrypted file, as `CompiledModel.save` takes it; by default that in the environment variable ``MLEC_KEY``.
        require_signature: refuse a file that no trusted key signed (``E_UNSIGNED``), whoever built it.
        require_native: refuse a file whose own machine code may not run here (``E_UNTRUSTED_NATIVE``) instead of compiling its graph.
        metrics: count calls, rows, errors and latencies, which takes about a microsecond a call; ``model.metrics()`` gives them, as a
            dict or as text for Prometheus, see `mlec.runtime.metrics.Metrics`.

    Raises:
        ArtifactError: for a file that is damaged, of another version, or not to be trusted.
        RuntimeUnavailableError: ``E_NO_VARIANT``: none of its code may run here, and no compiler is installed.
        UsageError: for a path that is none, or another argument that makes no sense.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            f"load takes the path of a .mle file, got {type(path).__name__}", hint='mlec.load("model.mle")'
        )
    path = os.fspath(path)
    wanted = named_trust(trust)
    artifact = Artifact.open(path, key=encryption_key, verify="fast" if _is_large(path) else "once", wait=False)
    if require_signature:
        check_signed(artifact)
    model = read_model(artifact)
    program = model.program
    _check_device(device, program, path)
    chosen, refused = variant_here(model)
    reason = _why_not_as_it_is(artifact, program, wanted) or (refused if chosen is None else "")

    def graph() -> Graph:
        from mlec.packaging.recompiling import graph_of

        return graph_of(artifact, model.signature)

    def report() -> OptimizationReport:
        from mlec.report import OptimizationReport

        return OptimizationReport.from_dict(model.read_report())

    def save(target: Path, **options: Any) -> SaveResult:
        from mlec.packaging.packing import save_again

        return save_again(target, artifact, options)

    executable: Any
    if chosen is not None and not reason:
        program = model.programs[chosen]
        objects = tuple(blob.data for blob in artifact.kernels if blob.target == chosen)
        check = partial(artifact.check_tensors, program.constants)
        executable = executable_for(program, objects, artifact.unchecked_tensors(), num_threads, graph, check)
        logs.info("mlec", "%s: runs the kernels for %s", path, processor_name(program.target) or program.device)
    else:
        from mlec.packaging.recompiling import compiled_here

        foreign = chosen is not None and bool(artifact.kernels)
        instead = WAYS_OUT if foreign else "compile the model again for this processor"
        if require_native:
            raise not_native(path, reason, instead)
        program, executable = compiled_here(artifact, model, path, num_threads, reason, instead)
    artifact.settle()  # other CPUs hashed the weights meanwhile
    about = {k: v for k, v in artifact.metadata.items() if k not in ("signature", "program", "variants", "report")}
    about["target"] = dict(program.target)
    device_type = DEVICES.get(program.device)
    kind: Callable[..., CompiledModel] = CompiledModel
    if metrics:
        from mlec.runtime.metrics import WatchedModel

        kind = partial(WatchedModel, name=os.path.splitext(os.path.basename(path))[0])
    return kind(model.signature, executable, about, graph=graph, report=report, saver=save, device=device_type)


def _is_large(path: str) -> bool:
    """Whether the weights can be large, so that they are checked when the first call reads them."""
    try:
        return os.stat(path).st_size > CHECKED_AT_ONCE
    except (OSError, ValueError):
        return False  # opening it says why


def _check_device(device: str, program: Program, path: str) -> None:
    """Refuses a device that is not the one that a file's kernels are for."""
    kind, _, index = str(device).partition(":")
    if kind == "cuda" and index.isdigit():
        if int(index):
            raise UsageError(
                f"models run on the first CUDA device, not on {device!r}",
                hint=f"make it the first one: start the process with CUDA_VISIBLE_DEVICES={index}",
            )
        device = kind
    if device not in ("auto", program.device):
        raise UsageError(
            f"{path} holds kernels for {program.device}, not for {device!r}",
            hint=f"compile the model again with target={device!r}, or load with device='auto'",
        )


def variant_here(model: ModelMetadata) -> tuple[int | None, str]:
    """Which of a file's programs suits this processor and the runtime here best, and where there is none, why."""
    needed = model.needed_cpu_flags
    chosen = best_of(needed)
    if chosen is not None:
        fault = _abi_fault(model, chosen)
        return (None, fault) if fault else (chosen, "")
    reasons = [
        f"{processor_name(program.target)}: {what_is_missing(flags)}"
        for program, flags in zip(model.programs, needed, strict=False)
    ]
    return None, f"this processor runs none of its kernels ({'; '.join(reasons)})"


def _abi_fault(model: ModelMetadata, chosen: int) -> str:
    """Why the runtime here does not fit the code of a variant; empty if it does, or the file does not say."""
    made_for = model.targets[chosen].get("abi", "") if chosen < len(model.targets) else ""
    if not made_for or made_for == runtime_abi():
        return ""
    return f"its kernels were made for {made_for}, here is {runtime_abi()}"


def _why_not_as_it_is(artifact: Artifact, program: Program, trust: str | TrustDigest) -> str:
    """Why the file's kernels, or without any its backend, must not run the model here; empty when they may."""
    if not artifact.kernels:
        from mlec import registry
        from mlec.backends.base import Interpreter

        backend = program.backend
        if backend not in registry.target_forms():
            return f"its backend {backend!r} is not installed"
        if isinstance(registry.load("backends", backend)(), Interpreter):
            return ""
        return "it holds no kernels"
    decision = decide(artifact, trust)
    return "" if decision.native else decision.reason


def executable_for(
    program: Program,
    objects: tuple[bytes, ...],
    tensors: Mapping[str, Array],
    num_threads: int | None,
    graph: Callable[[], Graph],
    check: Callable[[], None] | None = None,
) -> Any:
    """What runs a program: its object files, or, of a backend that makes none, the backend on the graph.

    Args:
        check: what is called before anything reads the tensors.
    """
    if objects:
        return open_program(program, objects, tensors, num_threads, check)
    from mlec import registry

    return registry.load("backends", program.backend)().executable(graph(), num_threads)

"""Between a compiled module and the .mle file."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from mlec import registry
from mlec.artifact import (
    Artifact,
    KernelBlob,
    ModelMetadata,
    SaveResult,
    TrustDigest,
    decide,
    read_model,
    record_built,
    write,
)
from mlec.backends.base import CompiledModule, CompileOptions, Interpreter
from mlec.capabilities import refuse_reserved
from mlec.errors import CorruptedFileError, LoweringError, MlecError, UsageError
from mlec.ir import Graph, parse_graph, print_graph
from mlec.ir.op import Array
from mlec.report import OptimizationReport
from mlec.runtime import CompiledModel, Program, open_program
from mlec.runtime.device import DEVICES
from mlec.signature import Signature
from mlec.target import X86_FLAGS, Target

RELOCATABLE_OBJECT = 6
logger = logging.getLogger("mlec")


def pack(
    path: Path,
    graph: Graph,
    module: CompiledModule,
    report: OptimizationReport,
    metadata: Mapping[str, Any],
    user: Mapping[str, Any] | None,
) -> SaveResult:
    """Writes a compiled model, and remembers that this user built it."""
    tensors: dict[str, Array] = dict(graph.constants)
    for name, array in module.constants.items():
        if tensors.setdefault(name, array) is not array:
            raise LoweringError(f"the backend gives another tensor under the name of the constant {name!r}")
    document = {
        **metadata,
        "signature": msgspec.to_builtins(graph.signature),
        "program": msgspec.to_builtins(module.program),
        "report": msgspec.to_builtins(report.to_dict()),
        "user": _user_metadata(user),
        "targets": [{**module.program.target, "cpu_flags": sorted(needed_cpu_flags(module.program))}],
    }
    blobs = [KernelBlob(RELOCATABLE_OBJECT, 0, data) for data in module.objects]
    saved = write(path, metadata=document, graph=print_graph(graph), tensors=tensors, kernels=blobs)
    record_built(saved.code_id)
    return saved


def unpack(path: Path, *, num_threads: int | None, trust: str | TrustDigest, device: str) -> CompiledModel:
    """Loads a file: its own kernels where they may run here, else the graph compiled on this machine."""
    artifact = Artifact.open(path)
    model = read_model(artifact)
    signature, program = model.signature, model.program
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
    runs_on = program.device
    reason = _why_not_as_it_is(artifact, model, trust)
    if reason is None:
        objects = tuple(blob.data for blob in artifact.kernels)
        executable = _executable(
            program, objects, artifact.tensors, num_threads, graph=lambda: _graph(artifact, signature)
        )
    else:
        logger.warning("%s: %s; the graph is compiled on this machine instead", path, reason)
        graph, target = _graph(artifact, signature), _target_here(program)
        module = registry.backend_of(target.kind).compile(graph, target, CompileOptions())
        executable = executable_of(module, graph, num_threads)
        runs_on = module.program.device
    return CompiledModel(
        signature,
        executable,
        {k: v for k, v in artifact.metadata.items() if k not in ("signature", "program", "report")},
        graph=lambda: _graph(artifact, signature),
        report=lambda: OptimizationReport.from_dict(model.report),
        saver=lambda target, **options: _save_again(target, artifact, options),
        device=DEVICES.get(runs_on),
    )


def executable_of(module: CompiledModule, graph: Graph, num_threads: int | None = None) -> Any:
    """Something that runs a module that was just compiled."""
    return _executable(module.program, module.objects, module.constants, num_threads, graph=lambda: graph)


def _executable(
    program: Program, objects: tuple[bytes, ...], tensors: Mapping[str, Array], num_threads: int | None, graph: Any
) -> Any:
    if objects:
        return open_program(program, objects, tensors, num_threads)
    return registry.load("backends", program.backend)().executable(graph(), num_threads)


def _target_here(program: Program) -> Target:
    """What to compile a file's graph for when the file cannot run as it is."""
    kind = str(program.target.get("kind", program.device))
    return Target(kind) if kind in registry.target_kinds() else Target()


def _graph(artifact: Artifact, signature: Signature) -> Graph:
    try:
        graph = parse_graph(artifact.graph, artifact.tensors)
    except MlecError as error:
        error.loc = f"{artifact.path}, {error.loc}" if error.loc else artifact.path
        raise
    own, claimed = (
        [[(t.dtype, t.shape) for t in specs] for specs in (s.inputs, s.outputs)] for s in (graph.signature, signature)
    )
    if own != claimed:
        raise CorruptedFileError(
            f"{artifact.path}: the signature in the metadata is not that of the graph", code="E_METADATA",
            hint="compile the model again",
        )  # fmt: skip
    return graph.with_signature(signature)


def _why_not_as_it_is(artifact: Artifact, model: ModelMetadata, trust: str | TrustDigest) -> str | None:
    """Why the file's kernels, or without any its backend, must not or cannot run the model here; None when they can."""
    if not artifact.kernels:
        backend = model.program.backend
        if backend not in registry.target_forms():
            return f"its backend {backend!r} is not installed"
        if isinstance(registry.load("backends", backend)(), Interpreter):
            return None
        return "it holds no kernels"
    decision = decide(artifact, trust)  # type: ignore[arg-type]
    if not decision.native:
        return decision.reason
    missing = sorted(model.needed_cpu_flags - host_cpu_flags())
    if missing:
        return f"its kernels need {', '.join(missing[:5])}, which this processor does not have"
    return None


def host_cpu_flags() -> frozenset[str]:
    """Instruction sets of this processor as the system names them; plus its architecture."""
    flags = {platform.machine()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() in ("flags", "Features"):
                flags.update(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    return frozenset(flags)


def needed_cpu_flags(program: Program) -> frozenset[str]:
    """What a processor must have to run the kernels, named as in `host_cpu_flags`."""
    architecture = str(program.target.get("triple", "")).partition("-")[0]
    if program.device != "cpu" or not architecture:
        return frozenset()
    if architecture != "x86_64":  # whose extensions LLVM and Linux name too differently: all that this machine has
        return frozenset(f for f in host_cpu_flags() if f.startswith(("asimd", "sve"))) | {architecture}
    features = program.target.get("features")
    used = features if isinstance(features, list) else ()
    return frozenset(X86_FLAGS[name] for name in used if name in X86_FLAGS) | {architecture}


def _user_metadata(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f"metadata takes a mapping, got {type(given).__name__}", hint='for example metadata={"author": "me"}'
        )
    return dict(given or {})


def _save_again(path: Path, artifact: Artifact, options: Mapping[str, Any]) -> SaveResult:
    """Writes a loaded model to another file; metadata given now is added to what it has."""
    refuse_reserved(options)
    user = {**read_model(artifact).user, **_user_metadata(options.get("metadata"))}
    metadata = {**artifact.metadata, "user": user}
    saved = write(path, metadata=metadata, graph=artifact.graph, tensors=artifact.tensors, kernels=artifact.kernels)
    if decide(artifact, "auto").native:
        record_built(saved.code_id)
    return saved

"""Between a compiled module and the .mle file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mlec import code_cache, registry
from mlec.artifact import (
    Artifact,
    KernelBlob,
    ModelMetadata,
    TrustDigest,
    check_signed,
    decide,
    is_built_here,
    read_model,
    record_built,
)
from mlec.artifact.trust import WAYS_OUT, not_native
from mlec.backends.base import Backend, CompiledModule, CompileOptions, Interpreter
from mlec.errors import CorruptedFileError, LoweringError, MlecError, RuntimeUnavailableError, TargetError, UsageError
from mlec.ir import Graph, parse_graph, print_graph
from mlec.ir.op import Array
from mlec.processor import best_of, needed_flags, processor_name, what_is_missing
from mlec.report import OptimizationReport
from mlec.runtime import CompiledModel, Program, open_program
from mlec.runtime.device import DEVICES
from mlec.runtime.library import runtime_abi
from mlec.signature import Signature
from mlec.target import Target
from mlec.tuning import Tuning

if TYPE_CHECKING:
    from mlec.artifact import SaveResult

RELOCATABLE_OBJECT = 6
logger = logging.getLogger("mlec")


def pack(
    path: Path,
    graph: Graph,
    modules: Sequence[CompiledModule],
    report: OptimizationReport,
    metadata: Mapping[str, Any],
    options: Mapping[str, Any],
) -> SaveResult:
    """Writes a compiled model, and remembers that this user built it.

    Args:
        path: the file.
        graph: what ``modules[0]`` was compiled from.
        modules: the model compiled for each of its targets.
        report, metadata: of the model.
        options: the arguments of ``save``.
    """
    from mlec.artifact import Storage, write  # what runs a model writes none

    storage = Storage.of(options)
    tensors, programs = _stored(graph, modules)
    document = {
        **metadata,
        "signature": msgspec.to_builtins(graph.signature),
        "program": msgspec.to_builtins(programs[0]),
        "report": msgspec.to_builtins(report.to_dict()),
        "user": _user_metadata(options.get("metadata")),
        "targets": [
            {**p.target, "cpu_flags": sorted(needed_cpu_flags(p)), **({"abi": runtime_abi()} if m.objects else {})}
            for p, m in zip(programs, modules, strict=True)
        ],
    }
    if len(programs) > 1:
        document |= {"variants": msgspec.to_builtins(programs[1:]), "critical": ["variants"]}
    blobs = [KernelBlob(RELOCATABLE_OBJECT, i, data) for i, module in enumerate(modules) for data in module.objects]
    saved = write(path, metadata=document, graph=print_graph(graph), tensors=tensors, kernels=blobs, storage=storage)
    record_built(saved.code_id)
    return saved


def _stored(graph: Graph, modules: Sequence[CompiledModule]) -> tuple[dict[str, Array], list[Program]]:
    """Every tensor once, however many programs read it, and the programs with the names that it has there."""
    tensors: dict[str, Array] = dict(graph.constants)
    for name, array in modules[0].constants.items():
        if tensors.setdefault(name, array) is not array:
            raise LoweringError(
                f"the backend gives another tensor under the name of the constant {name!r}",
                hint="let the backend name what it changed anew",
            )
    programs = [modules[0].program]
    names = {_content(array): name for name, array in tensors.items()} if len(modules) > 1 else {}
    for module in modules[1:]:
        constants = []
        for name in module.program.constants:
            array = module.constants[name]
            content = _content(array)
            if content not in names:
                free, number = name, 0
                while free in tensors:
                    number += 1
                    free = f"{name}~{number}"
                tensors[free], names[content] = array, free
            constants.append(names[content])
        programs.append(msgspec.structs.replace(module.program, constants=tuple(constants)))
    return tensors, programs


def _content(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    """Equal for equal tensors, bit for bit."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.dtype.name, array.shape, hashlib.sha256(data.data).digest()


def unpack(
    path: Path,
    *,
    num_threads: int | None,
    trust: str | TrustDigest,
    device: str,
    key: Any = None,
    require_signature: bool = False,
    require_native: bool = False,
) -> CompiledModel:
    """Loads a file: its own kernels where they may run here, else the graph compiled on this machine. Arguments as for `mlec.load`."""
    artifact = Artifact.open(path, key=key)
    if require_signature:
        check_signed(artifact)
    model = read_model(artifact)
    signature, program = model.signature, model.program
    chosen, refused = variant_here(model)
    if chosen is not None and (refused := _abi_fault(model, chosen)):
        chosen = None
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
    reason = _why_not_as_it_is(artifact, program, trust) or (refused if chosen is None else "")
    if chosen is not None and not reason:
        program = model.programs[chosen]
        objects = tuple(blob.data for blob in artifact.kernels if blob.target == chosen)
        executable = _executable(
            program, objects, artifact.tensors, num_threads, graph=lambda: _graph(artifact, signature)
        )
        logger.info("%s: runs the kernels for %s", path, processor_name(program.target) or runs_on)
    else:
        foreign = chosen is not None and bool(artifact.kernels)
        instead = WAYS_OUT if foreign else "compile the model again for this processor"
        if require_native:
            raise not_native(path, reason, instead)
        program, executable = _compiled_here(artifact, model, path, num_threads, reason, instead)
        runs_on = program.device
    return CompiledModel(
        signature,
        executable,
        {k: v for k, v in artifact.metadata.items() if k not in ("signature", "program", "report")},
        graph=lambda: _graph(artifact, signature),
        report=lambda: OptimizationReport.from_dict(model.report),
        saver=lambda target, **options: _save_again(target, artifact, options),
        device=DEVICES.get(runs_on),
    )


def _compiled_here(
    artifact: Artifact, model: ModelMetadata, path: Path, num_threads: int | None, reason: str, instead: str
) -> tuple[Program, Any]:
    """The program that this machine makes of a file's graph, or made of it before, and what runs it.

    Args:
        artifact, model, path: the file.
        num_threads: of one call.
        reason: why its own program does not run.
        instead: what one can do about that, beside installing a compiler.
    """
    target = _target_here(model.program)
    # Kernels that were tuned keep their schedules where this machine, or its like, is the one that measured them: what is known of
    # that can change from one time to the next.
    tuned = bool(model.report.get("tuning"))
    entry = None if tuned else code_cache.entry_for(artifact, target)
    if entry is not None and (found := code_cache.find(entry, artifact)):
        logger.warning("%s: %s; the graph is compiled on this machine instead, as it was before", path, reason)
        program, objects, tensors = found
        return program, open_program(program, objects, tensors, num_threads)
    backend = _compiler_here(target, path, reason, instead)
    logger.warning("%s: %s; the graph is compiled on this machine instead", path, reason)
    graph = _graph(artifact, model.signature)
    module = backend.compile(graph, target, CompileOptions(tuning=Tuning(trials=0) if tuned else None))
    executable = executable_of(module, graph, num_threads)
    if entry is not None and module.objects:
        code_cache.keep(entry, graph, module)
    return module.program, executable


def executable_of(module: CompiledModule, graph: Graph, num_threads: int | None = None) -> Any:
    """Something that runs a module that was just compiled.

    Raises:
        TargetError: this processor cannot.
    """
    if missing := what_is_missing(needed_cpu_flags(module.program)):
        raise TargetError(
            f"the model was compiled for {processor_name(module.program.target)} and cannot run here: {missing}",
            hint='save it and load it on such a machine, or compile with target="cpu"',
        )
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


def _compiler_here(target: Target, path: Path, reason: str, instead: str) -> Backend:
    """The backend that compiles a file's graph here, because of ``reason``.

    Raises:
        RuntimeUnavailableError: ``E_NO_VARIANT``: it is not installed; the hint says what to do ``instead`` of installing it.
    """
    try:
        backend: Backend = registry.backend_of(target.kind)
    except (MlecError, ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"{path} cannot run here: {reason}; and its graph cannot be compiled here: {error}",
            code="E_NO_VARIANT",
            hint=f"install the compiler (pip install apache-tvm); or {instead}",
        ) from error
    return backend


def variant_here(model: ModelMetadata) -> tuple[int | None, str]:
    """Which of a file's programs suits this processor best, and where there is none, why."""
    needed = model.needed_cpu_flags
    chosen = best_of(needed)
    if chosen is not None:
        return chosen, ""
    reasons = [
        f"{processor_name(program.target)}: {what_is_missing(flags)}"
        for program, flags in zip(model.programs, needed, strict=False)
    ]
    return None, f"this processor runs none of its kernels ({'; '.join(reasons)})"


def _abi_fault(model: ModelMetadata, chosen: int) -> str:
    """Why the runtime here does not fit the code of a variant; empty if it does, or the file does not say."""
    made_for = model.targets[chosen].get("abi", "") if chosen < len(model.targets) else ""
    return "" if made_for in ("", runtime_abi()) else f"its kernels were made for {made_for}, here is {runtime_abi()}"


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


def _why_not_as_it_is(artifact: Artifact, program: Program, trust: str | TrustDigest) -> str:
    """Why the file's kernels, or without any its backend, must not run the model here; empty when they may."""
    if not artifact.kernels:
        backend = program.backend
        if backend not in registry.target_forms():
            return f"its backend {backend!r} is not installed"
        if isinstance(registry.load("backends", backend)(), Interpreter):
            return ""
        return "it holds no kernels"
    decision = decide(artifact, trust)  # type: ignore[arg-type]
    return "" if decision.native else decision.reason


def needed_cpu_flags(program: Program) -> frozenset[str]:
    """What a processor must have to run the kernels, named as in `mlec.processor.host_flags`."""
    triple, features = program.target.get("triple"), program.target.get("features")
    if program.device != "cpu" or not isinstance(triple, str):
        return frozenset()
    return needed_flags(triple, features if isinstance(features, list) else ())


def _user_metadata(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f"metadata takes a mapping, got {type(given).__name__}", hint='for example metadata={"author": "me"}'
        )
    return dict(given or {})


def _save_again(path: Path, artifact: Artifact, options: Mapping[str, Any]) -> SaveResult:
    """Writes a loaded model to another file; metadata given now is added to what it has."""
    from mlec.artifact import Storage, write

    user = {**read_model(artifact).user, **_user_metadata(options.get("metadata"))}
    metadata = {**artifact.metadata, "user": user}
    saved = write(
        path, metadata=metadata, graph=artifact.graph, tensors=artifact.tensors, kernels=artifact.kernels,
        storage=Storage.of(options),
    )  # fmt: skip
    if decide(artifact).native and is_built_here(artifact.code_id):
        record_built(saved.code_id)
    return saved

"""The graph of a .mle file compiled on the machine that loads it, where the code in the file may not or cannot run."""

from __future__ import annotations

import logging
from typing import Any

from mlec import registry
from mlec.artifact import Artifact, ModelMetadata
from mlec.backends.base import Backend, CompiledModule, CompileOptions
from mlec.errors import CorruptedFileError, MlecError, RuntimeUnavailableError, TargetError
from mlec.ir import Graph, parse_graph
from mlec.measuring.tuning import Tuning
from mlec.packaging import code_cache
from mlec.packaging.loading import executable_for
from mlec.packaging.single_copies import unpacked
from mlec.processor import needed_cpu_flags, processor_name, what_is_missing
from mlec.runtime import Program, open_program
from mlec.signature import Signature
from mlec.target import Target

logger = logging.getLogger("mlec")


def compiled_here(
    artifact: Artifact, model: ModelMetadata, path: str, num_threads: int | None, reason: str, instead: str
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
    tuned = bool(model.read_report().get("tuning"))
    entry = None if tuned else code_cache.entry_for(artifact, target)
    if entry is not None and (found := code_cache.find(entry, artifact)):
        logger.warning("%s: %s; the graph is compiled on this machine instead, as it was before", path, reason)
        program, objects, tensors = found
        return program, open_program(program, objects, tensors, num_threads)
    backend = _compiler_here(target, path, reason, instead)
    logger.warning("%s: %s; the graph is compiled on this machine instead", path, reason)
    graph = graph_of(artifact, model.signature)
    try:
        module = backend.compile(graph, target, CompileOptions(tuning=Tuning(trials=0) if tuned else None))
    except MemoryError as error:
        raise MlecError(
            f"there is not enough memory to compile the graph of {path}: {error}", code="E_NO_MEMORY",
            hint="end other programs, or load it on a machine with more memory",
        ) from error  # fmt: skip
    artifact.check_unchanged()  # compiling took a while, and the constants of the module lie in the file
    executable = executable_of(module, graph, num_threads)
    if entry is not None and module.objects:
        code_cache.keep(entry, artifact, graph, module)
    return module.program, executable


def executable_of(module: CompiledModule, graph: Graph, num_threads: int | None = None) -> Any:
    """Something that runs a module that was just compiled.

    Raises:
        TargetError: this processor cannot.
    """
    if missing := what_is_missing(needed_cpu_flags(module.program.device, module.program.target)):
        raise TargetError(
            f"the model was compiled for {processor_name(module.program.target)} and cannot run here: {missing}",
            hint='save it and load it on such a machine, or compile with target="cpu"',
        )
    return executable_for(module.program, module.objects, module.constants, num_threads, graph=lambda: graph)


def _target_here(program: Program) -> Target:
    """What to compile a file's graph for when the file cannot run as it is."""
    kind = str(program.target.get("kind", program.device))
    return Target(kind) if kind in registry.target_kinds() else Target()


def _compiler_here(target: Target, path: str, reason: str, instead: str) -> Backend:
    """The backend that compiles a file's graph here, because of ``reason``.

    Raises:
        RuntimeUnavailableError: ``E_NO_VARIANT``: it is not installed; the hint says what to do ``instead`` of installing it.
    """
    try:
        backend: Backend = registry.backend_of(target.kind)
    except (MlecError, ImportError, OSError, RuntimeError) as error:
        why = error.message if isinstance(error, MlecError) else error
        raise RuntimeUnavailableError(
            f"{path} cannot run here: {reason}; and its graph cannot be compiled here: {why}",
            code="E_NO_VARIANT",
            hint=f"install the compiler (pip install apache-tvm); or {instead}",
        ) from error
    return backend


def graph_of(artifact: Artifact, signature: Signature) -> Graph:
    """The graph in a file.

    Raises:
        ParseError: it is none.
        CorruptedFileError: ``E_METADATA``: its signature is another one than the metadata says.
    """
    try:
        graph = unpacked(parse_graph(artifact.graph, artifact.tensors), artifact.tensors)
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

"""Writes compiled models, and loaded ones, to .mle files."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from mlec.artifact import RELOCATABLE, Artifact, KernelBlob, decide, is_built_here, read_model, record_built
from mlec.artifact.model import packed
from mlec.backends.base import CompiledModule
from mlec.errors import UsageError
from mlec.ir import Graph, print_graph
from mlec.ir.op import Array
from mlec.packaging.single_copies import with_single_copies
from mlec.processor import needed_cpu_flags
from mlec.report import OptimizationReport
from mlec.runtime import Program
from mlec.runtime.library import runtime_abi

if TYPE_CHECKING:
    from mlec.artifact import SaveResult

_HEAD: Final = 256
"""Elements of a tensor that are looked at first."""
_LOOKED_AT: Final = 32
"""Object files that are compared with the one before: so many take as long as compressing it."""
_PIECE: Final = 1 << 20
"""Bytes that are compared at a time."""


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
    tensors, programs = stored(graph, modules)
    read = {name for program in programs for name in program.constants}
    slim, tensors = with_single_copies(graph, tensors, read)
    document = {
        **{key: value for key, value in metadata.items() if key != "target"},  # the program says it
        "signature": msgspec.to_builtins(graph.signature),
        "program": packed(programs[0], "program"),
        "report": packed(_kept(report, options), "report"),
        "user": _user_metadata(options.get("metadata")),
        "targets": [
            {
                **{
                    key: value for key, value in p.target.items() if key != "features"
                },  # LLVM's names of the flags, and more
                "cpu_flags": sorted(needed_cpu_flags(p.device, p.target)),
                **({"abi": runtime_abi()} if m.objects else {}),
            }
            for p, m in zip(programs, modules, strict=True)
        ],
    }
    if len(programs) > 1:
        document |= {"variants": packed(programs[1:], "variants"), "critical": ["variants"]}
    blobs = [KernelBlob(RELOCATABLE, i, data) for i, module in enumerate(modules) for data in _in_order(module.objects)]
    saved = write(path, metadata=document, graph=print_graph(slim), tensors=tensors, kernels=blobs, storage=storage)
    record_built(saved.code_id)
    return saved


def _kept(report: OptimizationReport, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report, given the arguments of ``save``."""
    return report.without_times() if options.get("reproducible") else report.to_dict()


def stored(graph: Graph, modules: Sequence[CompiledModule]) -> tuple[dict[str, Array], list[Program]]:
    """Every tensor once, whoever reads it, and the programs with the names that their constants have there."""
    tensors: dict[str, Array] = dict(graph.constants)
    alike: dict[Hashable, list[str]] = {}
    for name, array in tensors.items():
        alike.setdefault(_first_look(array), []).append(name)

    def name_of(array: Array, wanted: str) -> str:
        names = alike.setdefault(_first_look(array), [])
        for name in names:
            if _are_equal(tensors[name], array):
                return name
        free, number = wanted, 0
        while free in tensors:
            number += 1
            free = f"{wanted}_{number}"
        tensors[free] = array
        names.append(free)
        return free

    programs = []
    for module in modules:
        constants = tuple(name_of(module.constants[name], name) for name in module.program.constants)
        programs.append(msgspec.structs.replace(module.program, constants=constants))
    return tensors, programs


def _first_look(array: Array) -> Hashable:
    """Equal for equal tensors, and seldom for others. Little of them is read: there can be gigabytes of weights."""
    return array.dtype.name, array.shape, array.flat[:_HEAD].tobytes()


def _are_equal(a: Array, b: Array) -> bool:
    """Bit for bit, of tensors of one form."""
    if a is b:
        return True
    a, b = _bytes_of(a), _bytes_of(b)
    return all(np.array_equal(a[i : i + _PIECE], b[i : i + _PIECE]) for i in range(0, len(a), _PIECE))


def _bytes_of(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _in_order(objects: Sequence[bytes]) -> list[bytes]:
    """Object files, each before the one, of some that follow, that has most in common with it: compression sees no further back than 32 KB.
    The last one, which calls the others, stays the last."""
    if len(objects) < 4:
        return list(objects)
    *left, last = objects
    ordered, pieces = [left.pop(0)], {data: _pieces_of(data) for data in objects}
    while left:
        before = pieces[ordered[-1]]
        common = [
            np.isin(pieces[data], before, assume_unique=True).sum() / max(1, len(pieces[data]))
            for data in left[:_LOOKED_AT]
        ]
        ordered.append(left.pop(int(np.argmax(common))))
    return [*ordered, last]


def _pieces_of(data: bytes) -> Array:
    """Some of the runs of 8 bytes in it, one in 32, chosen by what they are."""
    runs = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(np.frombuffer(data + bytes(8), np.uint8), 8))
    numbers = runs.view(np.uint64).reshape(-1)
    return np.unique(numbers[numbers % 32 == 0])


def _user_metadata(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(
            f"metadata takes a mapping, got {type(given).__name__}", hint='for example metadata={"author": "me"}'
        )
    return dict(given or {})


def save_again(path: Path, artifact: Artifact, options: Mapping[str, Any]) -> SaveResult:
    """Writes a loaded model to another file; metadata given now is added to what it has."""
    from mlec.artifact import Storage, write

    user = {**read_model(artifact).user, **_user_metadata(options.get("metadata"))}
    metadata = {**artifact.metadata, "user": user}
    if options.get("reproducible"):
        from mlec.report import OptimizationReport

        report = OptimizationReport.from_dict(read_model(artifact).read_report())
        metadata["report"] = packed(_kept(report, options), "report")
    saved = write(
        path, metadata=metadata, graph=artifact.graph, tensors=artifact.tensors, kernels=artifact.kernels,
        storage=Storage.of(options),
    )  # fmt: skip
    if decide(artifact).native and is_built_here(artifact.code_id):
        record_built(saved.code_id)
    return saved

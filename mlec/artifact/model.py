"""The metadata that `mlec` itself keeps in a file, beside the keys that the format owns (`mlec.artifact.metadata`).

A file may come from anybody, so these keys are read through one schema: whatever does not have its form is a clear error, not a
surprise where it is used.
"""

# Annotations are not postponed here: msgspec would compile the text of each when the first file is loaded, which takes 1 ms.

import binascii
import contextlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import field

from mlec.artifact import json_safe, limits
from mlec.artifact.reader import Artifact
from mlec.artifact.weights import DTYPES
from mlec.errors import CorruptedFileError, MlecError, UsageError
from mlec.runtime.dims import evaluate
from mlec.runtime.program import Program
from mlec.signature import Coding, ColumnFeed, FrameSpec, Labels, MethodSpec, Signature, TableSpec

_MOST: Final = limits.SECTION_BYTES["metadata"]
"""Bytes that a packed entry holds at most."""


class ModelMetadata(msgspec.Struct, frozen=True):
    """What a file says of the model in it.

    Attributes:
        signature: inputs, outputs, methods.
        program: the compiled graph without its code and weights, as its first target has it.
        variants: the same for each further target.
        name: of the model.
        source: which frontend read it.
        report: what `read_report` reads.
        user: what the user added.
        targets: what the kernels were compiled for.
    """

    signature: Signature
    program: Program
    variants: list[Program] = field(default_factory=list)
    name: str = ""
    source: str = ""
    report: str | dict[str, Any] = field(default_factory=dict)
    user: dict[str, Any] = field(default_factory=dict)
    targets: list[dict[str, str | int | list[str]]] = field(default_factory=list)

    @property
    def programs(self) -> tuple[Program, ...]:
        """One for each target, in their order; without kernels there may be no targets."""
        return (self.program, *self.variants)

    @property
    def needed_cpu_flags(self) -> tuple[frozenset[str], ...]:
        """For each program what a processor must have to run its kernels."""
        given = [target.get("cpu_flags") for target in self.targets[: len(self.programs)]] or [None]
        return tuple(frozenset(flags) if isinstance(flags, list) else frozenset() for flags in given)

    def read_report(self) -> dict[str, Any]:
        """The report as `OptimizationReport.to_dict` gives it; `mlec.reporting.schema` looks into it.

        It would be most of the metadata and is no part of running a model, so it is stored compressed, and read when it is asked for.
        Earlier versions stored it as it is.

        Raises:
            CorruptedFileError: ``E_REPORT``, or of the codes of JSON: it is none.
        """
        if isinstance(self.report, dict):
            return self.report
        try:
            found = _unpacked(self.report, "the report")
        except ValueError as error:
            raise _no_report(str(error)) from None
        if not isinstance(found, dict):
            raise _no_report(f"expected an object, got {type(found).__name__}")
        return found


def packed(entry: Any, what: str) -> str:
    """An entry of the metadata that takes much room, as files store it: JSON by zlib, in base64."""
    plain = json_safe.dump(msgspec.to_builtins(entry), what=what, max_bytes=_MOST)
    return binascii.b2a_base64(zlib.compress(plain), newline=False).decode()


def _unpacked(text: str, what: str) -> Any:
    """The inverse.

    Raises:
        ValueError: it is no such text.
        CorruptedFileError: of the codes of JSON.
    """
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(binascii.a2b_base64(text, strict_mode=True), _MOST)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not stream.eof or stream.unused_data:
        raise ValueError(f"expected one stream of at most {_MOST} bytes")
    return json_safe.parse(plain, what=what, max_bytes=_MOST)


def with_entries_unpacked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a file with what is packed, as far as it is sound, as it was: to be shown."""
    shown = dict(metadata)
    for key in ("program", "variants", "report"):
        if isinstance(shown.get(key), str):
            with contextlib.suppress(MlecError, ValueError):
                found = _unpacked(shown[key], key)
                shown[key] = found if isinstance(found, list if key == "variants" else dict) else shown[key]
    return shown


def _no_report(why: str) -> CorruptedFileError:
    return CorruptedFileError(
        f"this is not a report: {why}", code="E_REPORT", hint="compile the model again to get a new one"
    )


def read_model(artifact: Artifact) -> ModelMetadata:
    """The metadata of a model.

    Raises:
        CorruptedFileError: ``E_METADATA``, naming the key: the file was not made by `mlec`, or by another version of it.
    """
    stored = dict(artifact.metadata)
    try:
        for key in ("program", "variants"):  # earlier versions stored them as they are
            if isinstance(stored.get(key), str):
                stored[key] = _unpacked(stored[key], f"the entry `{key}` of the metadata")
        found = msgspec.convert(stored, ModelMetadata)
    except ValueError as error:  # such as those of msgspec
        raise _no_model(artifact, str(error)) from None
    for fault in (*_faults(found.signature), *_program_faults(found), *_kernel_faults(found, artifact)):
        raise _no_model(artifact, fault)
    return found


def _no_model(artifact: Artifact, why: str) -> CorruptedFileError:
    return CorruptedFileError(
        f"{artifact.path}: the metadata does not describe a model: {why}"[:400], code="E_METADATA",
        hint="the file is sound, but not made by this version of mlec; `mlec inspect --json` shows all that is in it",
    )  # fmt: skip


# -- what the types of a signature do not say ------------------------------------------------------------------------


def _faults(signature: Signature) -> Iterator[str]:
    """What contradicts itself, in words."""
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype not in DTYPES:
            yield f"{spec.name!r} has the unknown element type {spec.dtype[:40]!r}"
        if len(spec.shape) > limits.RANK or not all(map(_is_dim, spec.shape)):
            yield f"{spec.name!r} has a shape that is none"
    for name, (least, most) in signature.symbols.items():
        if least < 0 or (most is not None and most < least):
            yield f"the bounds of the dim {name!r} contradict each other"
    if signature.table is not None:
        yield from _table_faults(signature.table, len(signature.inputs))
    names = [method.name for method in signature.methods]
    if len(set(names)) < len(names) or not set(signature.run) <= set(names):
        yield "the methods that run() calls are not among the methods, or two have one name"
    for method in signature.methods:
        yield from _method_faults(method, len(signature.outputs))
        if method.frame is not None and not _frame_fits(method, method.frame, signature):
            yield f"the DataFrame of the method {method.name!r} does not fit its output"


def _program_faults(model: ModelMetadata) -> Iterator[str]:
    if model.variants and len(model.targets) != len(model.programs):
        yield f"{len(model.programs)} programs for {len(model.targets)} targets"
    if len({program.device for program in model.programs}) > 1:
        yield "programs for several devices"
    for program in model.programs:
        yield from _sequence_faults(program, model.signature)


def _kernel_faults(model: ModelMetadata, artifact: Artifact) -> Iterator[str]:
    if artifact.kernels and {blob.target for blob in artifact.kernels} != set(range(len(model.programs))):
        yield f"the kernels are not those of {len(model.programs)} programs"


def _sequence_faults(program: Program, signature: Signature) -> Iterator[str]:
    sequence = program.sequence
    if sequence is None:
        return
    for what, specs, numbers in (
        ("inputs", signature.inputs, range(sequence.inputs)),
        ("outputs", signature.outputs, sequence.outputs),
    ):
        if [spec.dtype for spec in specs] != [sequence.buffers[number].dtype for number in numbers]:
            yield f"the {what} of the program are not those of the signature"


def _is_dim(dim: int | str) -> bool:
    try:
        value = evaluate(dim, {}) if isinstance(dim, int) or len(dim) <= limits.NAME_BYTES else -1
    except UsageError:
        return False
    return value is None or 0 <= value <= limits.DIM


def _table_faults(table: TableSpec, inputs: int) -> Iterator[str]:
    if not 0 <= table.n_features <= limits.FEATURES:
        yield f"a table of {table.n_features} columns, between 0 and {limits.FEATURES} are possible"
    if len(table.feeds) != inputs:
        yield f"{len(table.feeds)} parts of the table for {inputs} inputs"
    if table.feature_names is not None and len(table.feature_names) != table.n_features:
        yield f"{len(table.feature_names)} names for {table.n_features} columns"
    for feed in table.feeds:
        if not all(0 <= column < table.n_features for column in feed.columns):
            yield "a column outside of the table"
        if not _codings_fit(feed):
            yield "codings that do not fit their columns"


def _codings_fit(feed: ColumnFeed) -> bool:
    def fits(coding: Coding) -> bool:
        others = (coding.unknown, coding.missing, coding.none, coding.nan)
        if not all(code is None or abs(code) < 2**31 for code in (*(coding.codes or ()), *others)):
            return False
        return coding.codes is None or len(coding.codes) == len(coding.categories)

    return len(feed.codings) in (0, len(feed.columns)) and all(map(fits, feed.codings))


def _method_faults(method: MethodSpec, outputs: int) -> Iterator[str]:
    if not method.outputs or not all(0 <= position < outputs for position in method.outputs):
        yield f"the method {method.name!r} returns outputs that do not exist"
    if len(method.labels) not in (0, len(method.outputs)):
        yield f"the method {method.name!r} has labels for other than its outputs"
    if method.dtype is not None and _label_dtype(method.dtype) is None:
        yield f"the method {method.name!r} returns the unknown type {method.dtype[:40]!r}"
    if not all(labels is None or _labels_fit(labels) for labels in method.labels):
        yield f"the labels of the method {method.name!r} are not of their type"


def _frame_fits(method: MethodSpec, frame: FrameSpec, signature: Signature) -> bool:
    if (
        len(method.outputs) != 1
        or method.labels
        or method.as_list
        or not 0 <= method.outputs[0] < len(signature.outputs)
    ):
        return False
    width = len(frame.columns)
    if signature.outputs[method.outputs[0]].shape[1:] != (width,) or len(frame.passed) > width:
        return False
    if frame.dtypes is not None and (len(frame.dtypes) != width or any(_label_dtype(d) is None for d in frame.dtypes)):
        return False
    table = signature.table
    known: set[object] = set() if table is None else {None, *range(table.n_features), *(table.feature_names or ())}
    return all(place in known for place in frame.passed)


def _labels_fit(labels: Labels) -> bool:
    dtype = _label_dtype(labels.dtype)
    if dtype is None:
        return False
    try:
        np.empty(len(labels.values), dtype)[:] = [
            np.nan if value is None and dtype.kind == "f" else value for value in labels.values
        ]
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _label_dtype(text: str) -> np.dtype[Any] | None:
    """The dtype of that name if labels can have it: numbers, booleans, text of bounded length, objects."""
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, SyntaxError):
        return None
    return dtype if dtype.kind in "biufUO" and dtype.itemsize <= limits.LABEL_BYTES else None

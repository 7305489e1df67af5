"""What can be taken out of a damaged .mle file: each part that a checksum or digest still proves right, and nothing else.

The format has one valid layout, so the sections can be found without the header: the metadata lies behind it and is JSON, the graph
at the next multiple of 64, and says what the weights are. Machine code is left where it is: the graph can be compiled again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from mlec.artifact import compression, sections, weights
from mlec.artifact import header as headers
from mlec.artifact import metadata as documents
from mlec.artifact.header import ALIGNMENT, Header, Section
from mlec.artifact.reader import read_whole
from mlec.artifact.sections import align_up
from mlec.errors import ArtifactError, CorruptedFileError, MlecError

_LONGEST_TEXT: Final = 512 << 20


@dataclass
class Recovered:
    """The parts of a file that are intact.

    Attributes:
        metadata, graph: None if they are not.
        tensors: those that are, by name.
        lost: what is not, in words.
        complete: metadata, graph and every tensor are intact: the model is, without its machine code.
    """

    metadata: dict[str, Any] | None = None
    graph: str | None = None
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.metadata is not None and self.graph is not None and not any("tensor" in name for name in self.lost)


def recover(path: str | os.PathLike[str]) -> Recovered:
    """Look for what is intact in a file, whatever happened to the rest of it.

    Raises:
        ArtifactError: the file cannot be read; ``E_NOTHING_INTACT``: nothing of it is intact, or it is encrypted: what is authenticated
            in chunks is either whole or not to be used, and `Artifact.open` says which.
    """
    data = read_whole(path)
    found = Recovered()
    try:
        header: Header | None = headers.unpack(bytes(data[: headers.SIZE]))
    except MlecError:
        header = None
        found.lost.append("header")
    if header is not None and header.aead_alg:
        raise _nothing(path, "it is encrypted, and parts of encrypted sections cannot be told from changed ones")
    metadata, start, proven = _metadata(data, header)
    graph = _section(data, header, "graph", start)
    digests = metadata.get("digests") if isinstance(metadata, dict) else None
    claimed = digests.get("graph") if isinstance(digests, dict) else None
    index: list[weights.TensorEntry] = []
    end = 0
    for candidate in _candidates(graph, header):
        if _proves(header, "graph", candidate) or sections.hash_section("graph", candidate).root().hex() == claimed:
            proven = proven or header is None  # they agree about 32 bytes that nobody hits by accident
            try:
                document = documents.parse_graph(_plain(candidate))
                weights.check_index(
                    document.tensors,
                    max((entry.end for entry in document.tensors), default=0),
                    compressed=any(entry.codec == "zstd" for entry in document.tensors),
                )
            except MlecError:
                break
            found.graph, index, end = document.ir, document.tensors, start + len(candidate)
            break
    found.metadata = metadata if proven else None
    found.lost += [name for name in ("metadata", "graph") if getattr(found, name) is None]
    if found.graph is not None:
        _tensors(found, index, _section(data, header, "weights", align_up(end, ALIGNMENT["weights"])))
    else:
        found.lost.append("every tensor: the graph says what they are")
    if found.metadata is None and found.graph is None:
        raise _nothing(path, "no part of it agrees with a checksum")
    return found


def _metadata(data: memoryview, header: Header | None) -> tuple[dict[str, Any] | None, int, bool]:
    """The metadata, where the graph starts, and whether a checksum proves it."""
    if header is not None:
        section = header.sections["metadata"]
        stored = bytes(data[section.offset : section.end])
    else:
        try:
            text = bytes(data[headers.SIZE : headers.SIZE + _LONGEST_TEXT]).decode("utf-8", "surrogateescape")
            stored = text[: json.JSONDecoder().raw_decode(text)[1]].encode("utf-8", "surrogateescape")
        except (ValueError, RecursionError):
            return None, 0, False
        section = Section("metadata", headers.SIZE, len(stored))
    described = header or Header({name: Section(name) for name in headers.SECTIONS}, 0)
    start = header.sections["graph"].offset if header else align_up(section.end, ALIGNMENT["graph"])
    try:
        value, _ = documents.parse_metadata(stored, described)
    except MlecError:
        return None, start, False
    return value, start, header is not None and _proves(header, "metadata", stored)


def _section(data: memoryview, header: Header | None, name: str, start: int) -> memoryview:
    """The bytes of a section; without a header all that lie from ``start`` on."""
    if header is None:
        return data[start:] if start else data[:0]
    section = header.sections[name]
    return data[section.offset : section.end]


def _candidates(stored: memoryview, header: Header | None) -> list[bytes]:
    """What the graph section may be: its end is known, or it is where the document ends that starts there."""
    if header is not None:
        return [bytes(stored)]
    data = bytes(stored[:_LONGEST_TEXT])
    try:
        text = data.decode("utf-8", "surrogateescape")
        return [text[: json.JSONDecoder().raw_decode(text)[1]].encode("utf-8", "surrogateescape")]
    except (ValueError, RecursionError):
        frame = compression.first_frame(data)
        return [frame] if frame else []


def _plain(stored: bytes) -> bytes | bytearray:
    return compression.decode_section(stored, name="graph") if stored[:1] != b"{" else stored


def _proves(header: Header | None, name: str, stored: bytes) -> bool:
    return header is not None and bool(stored) and sections.hash_section(name, stored).crc == header.sections[name].crc


def _tensors(found: Recovered, index: list[weights.TensorEntry], stored: memoryview) -> None:
    """Those whose own checksums are right."""
    section = weights.aligned_empty(len(stored))
    section.data[:] = stored
    arrays = weights.Tensors(index, weights.read_only(section))
    for entry in index:
        try:
            found.tensors[entry.name] = arrays[entry.name]
        except (MlecError, ValueError):
            found.lost.append(f"tensor {entry.name}")


def _nothing(path: str | os.PathLike[str], why: str) -> ArtifactError:
    return CorruptedFileError(
        f"nothing can be recovered from {os.fsdecode(path)}: {why}", code="E_NOTHING_INTACT",
        hint="fetch the file again, or compile the model again",
    )  # fmt: skip

"""What can be taken out of a damaged .mle file: each part that a checksum or digest still proves right, and nothing else.

The format has one valid layout, so the sections can be found without the header: the metadata lies behind it and is JSON, the graph
at the next multiple of 64, and says what the weights are. Machine code is left where it is: the graph can be compiled again.

Of an encrypted file those chunks are intact that are authentic. They prove the metadata as well, and what the header says of the sections.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mlec.artifact import header as headers
from mlec.artifact import metadata as documents
from mlec.artifact import packed_sections, sections, weights
from mlec.artifact.header import ALIGNMENT, Header, Section
from mlec.artifact.reader import read_whole
from mlec.artifact.sections import align_up
from mlec.errors import ArtifactError, CorruptedFileError, MlecError

if TYPE_CHECKING:
    from mlec.artifact.encryption import EncryptionKey, Lock

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_LONGEST_TEXT: Final = 512 << 20
_METADATA_CRC: Final = 92
"""Where in the header the checksum of the metadata lies."""


@dataclass
class Recovered:
    """The parts of a file that are intact.

    Attributes:
        metadata, graph: None if they are not.
        tensors: those that are, by name.
        lost: what is not, in words.
        key: what the file was encrypted with; None of any other file.
        complete: metadata, graph and every tensor are intact: the model is, without its machine code.
    """

    metadata: dict[str, Any] | None = None
    graph: str | None = None
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    key: EncryptionKey | None = None

    @property
    def complete(self) -> bool:
        return self.metadata is not None and self.graph is not None and not any("tensor" in name for name in self.lost)


def recover(path: str | os.PathLike[str], key: EncryptionKey | None = None) -> Recovered:
    """Look for what is intact in a file, whatever happened to the rest of it.

    Args:
        path: the file.
        key: of an encrypted file; by default as for `Artifact.open`.

    Raises:
        ArtifactError: the file cannot be read; ``E_NOTHING_INTACT``: nothing of it is intact.
        SecurityError: ``E_KEY_MISSING``, ``E_KEY_WRONG``: it is encrypted, and not with the key that was given.
        RuntimeUnavailableError: ``E_NO_ZSTD``, ``E_NO_CRYPTOGRAPHY``: the library that decodes it is missing.
    """
    data = read_whole(path)
    found = Recovered()
    try:
        header: Header | None = headers.unpack(bytes(data[: headers.SIZE]))
    except MlecError:
        header = None
        found.lost.append("header")
    sealed = header or _header_as_it_stands(data)
    if sealed is not None and sealed.aead_alg:
        _encrypted(found, data, sealed, key)
    else:
        _not_encrypted(found, data, header)
    if found.metadata is None and found.graph is None:
        raise CorruptedFileError(
            f"nothing can be recovered from {os.fsdecode(path)}: no part of it agrees with a checksum",
            code="E_NOTHING_INTACT",
            hint="fetch the file again, or compile the model again",
        )
    return found


def _not_encrypted(found: Recovered, data: memoryview, header: Header | None) -> None:
    metadata, start, proven = _metadata(data, header)
    digests = metadata.get("digests") if isinstance(metadata, dict) else None
    claimed = digests.get("graph") if isinstance(digests, dict) else None
    graph, end = None, 0
    for candidate in _candidates(_section(data, header, "graph", start), header):
        # Nobody hits the 32 bytes of the digest by accident, whatever else of the metadata is damaged.
        if _proves(header, "graph", candidate) or sections.SectionHash.of("graph", candidate).root().hex() == claimed:
            graph, end = candidate, start + len(candidate)
            break
    found.metadata = metadata if proven else None
    stored = _section(data, header, "weights", align_up(end, ALIGNMENT["weights"]))
    section = weights.aligned_empty(len(stored) if graph else 0)
    section.data[:] = stored[: len(section)]
    _graph_and_tensors(found, graph, section)


def _graph_and_tensors(found: Recovered, graph: bytes | None, section: _Bytes) -> None:
    """Take out the graph, and each tensor whose own checksums are right.

    Args:
        found: gets them.
        graph: the bytes of its section, before they were encrypted; None if they are lost.
        section: those of the weights, right or not, and as many as there are.
    """
    index: list[weights.TensorEntry] = []
    if graph:
        with contextlib.suppress(ArtifactError):
            document = documents.parse_graph(_plain(graph))
            weights.check_index(
                document.tensors,
                max((entry.end for entry in document.tensors), default=0),
                compressed=any(entry.codec == "zstd" for entry in document.tensors),
            )
            found.graph, index = document.ir, document.tensors
    found.lost += [name for name in ("metadata", "graph") if getattr(found, name) is None]
    if found.graph is None:
        found.lost.append("every tensor: the graph says what they are")
    arrays = weights.Tensors(index, weights.read_only(section))
    for entry in index:
        try:
            found.tensors[entry.name] = arrays[entry.name]
        except (ArtifactError, ValueError):
            found.lost.append(f"tensor {entry.name}")


def _header_as_it_stands(data: memoryview) -> Header | None:
    """What a header with a wrong checksum says of an encrypted file: what matters of it is authentic if anything is."""
    body = headers.MAGIC + bytes(data[4 : headers.SIZE - 4])
    try:
        header = headers.unpack(body + zlib.crc32(body).to_bytes(4, "little"))
    except MlecError:
        return None
    metadata, _, _ = _metadata(data, header)
    return header if metadata is not None and "encryption" in metadata else None


def _encrypted(found: Recovered, data: memoryview, header: Header, key: EncryptionKey | None) -> None:
    """What is authentic of an encrypted file. One such chunk proves the metadata, of which the keys are made, and the header with it."""
    from mlec.artifact.encryption import CIPHERS, EncryptionKey, Lock, associated_data

    key = EncryptionKey.needed(key)
    found.key = replace(key, cipher=CIPHERS[header.aead_alg])
    where = header.sections["metadata"]
    stored = bytes(data[where.offset : where.end])
    try:
        metadata, owned = documents.parse_metadata(stored, header)
        stated, described = documents.parse_encryption(metadata, stored, owned)
    except MlecError:
        return
    lock = Lock(key, bytes.fromhex(stated.salt), header.aead_alg)
    proven = _proves(header, "metadata", stored)
    if proven:
        lock.check(stated.check)
    associated = associated_data(header, described)

    def opened(name: str) -> tuple[_Bytes, int, int]:
        return _opened(found, data, header.sections[name], lock, associated)

    graph, intact, lost = opened("graph")
    section, more, _ = opened("weights")
    if proven:
        found.metadata = metadata
    elif intact or more:  # they are authentic together with all of it but the digests
        found.metadata = {name: value for name, value in metadata.items() if name != "digests"}
    _graph_and_tensors(found, None if lost else graph.tobytes(), section)


def _opened(
    found: Recovered, data: memoryview, where: Section, lock: Lock, associated: Callable[[str], bytes]
) -> tuple[_Bytes, int, int]:
    """The bytes of a section before they were encrypted, with zeros for lost chunks; how many chunks are authentic; how many are lost."""
    from mlec.artifact.encryption import CHUNK, sealed_size

    stored, step = data[where.offset : where.end], sealed_size(CHUNK)
    section = weights.aligned_empty(len(stored))
    section[:] = 0
    intact = lost = length = 0
    for number, chunk in enumerate(lock.chunks(where.name, stored, where.size, associated)):
        if chunk is None:
            at = where.offset + number * step
            found.lost.append(f"bytes {at} to {min(at + step, where.end)} of the file, in the {where.name}")
            lost += 1
        else:
            section[number * CHUNK : number * CHUNK + len(chunk)] = np.frombuffer(chunk, np.uint8)
            intact += 1
            length = number * CHUNK + len(chunk)
    if len(stored) < where.size:
        found.lost.append(f"bytes {where.offset + len(stored)} to {where.end} of the file, which was cut")
        lost += 1
    return section[:length], intact, lost


def _metadata(data: memoryview, header: Header | None) -> tuple[dict[str, Any] | None, int, bool]:
    """The metadata, where the graph starts, and whether a checksum proves it: that in the header, however damaged this is elsewhere."""
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
    crc = int.from_bytes(data[_METADATA_CRC : _METADATA_CRC + 4], "little")
    return value, start, zlib.crc32(stored) == crc


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
        packed = packed_sections.first(data, name="graph")
        return [packed] if packed else []


def _plain(stored: bytes) -> bytes | bytearray:
    return packed_sections.decode(stored, packed_sections.codec_of(stored), name="graph")


def _proves(header: Header | None, name: str, stored: bytes) -> bool:
    return (
        header is not None and bool(stored) and sections.SectionHash.of(name, stored).crc == header.sections[name].crc
    )

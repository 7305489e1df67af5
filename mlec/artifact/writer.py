"""Writing .mle files: lay out, hash, describe, then replace the target atomically.

The same input gives the same bytes: nothing in the file depends on the time, the machine or the user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.artifact import kernels as kernel_table
from mlec.artifact import metadata as documents
from mlec.artifact import weights
from mlec.artifact.atomic import replace_file
from mlec.artifact.header import SECTIONS, Flag, Header, Section
from mlec.artifact.kernels import KernelBlob
from mlec.artifact.limits import SECTION_BYTES
from mlec.artifact.sections import SectionHash, code_id, hash_section, place
from mlec.errors import UsageError


@dataclass(frozen=True)
class SaveResult:
    """What was written.

    Attributes:
        path: real path of the file.
        size_bytes: its length.
        sections: length of each section in bytes, 0 for absent ones.
        code_id: identity of the code in the file, 64 hexadecimal digits (see `mlec.artifact.trust`).
    """

    path: str
    size_bytes: int
    sections: dict[str, int]
    code_id: str


def write(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    graph: str,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    kernels: Sequence[KernelBlob] = (),
) -> SaveResult:
    """Write a .mle file.

    Args:
        path: target; an existing regular file is replaced atomically, symbolic links are followed.
        metadata: JSON values. The keys ``format``, ``mlec_version`` and ``digests`` are set by the writer; ``targets`` lists what the
            kernels were compiled for, ``critical`` the features without which a reader must refuse the file.
        graph: text of the IR, stored as it is.
        tensors: the weights by name, stored in this order; any strides and byte order.
        kernels: machine code; ``target`` indexes ``metadata["targets"]``.

    Raises:
        UsageError: something that the format cannot hold.
        WriteError: the file could not be written; an existing one is unchanged.
    """
    targets = metadata.get("targets", [])
    if not isinstance(targets, list | tuple):
        raise UsageError(
            f"metadata['targets'] must be a list, not {type(targets).__name__}",
            code="E_USAGE_JSON",
            hint="give one entry for each target that kernels were compiled for",
        )

    entries, payloads, weights_size = weights.plan(tensors)
    weights_hash = SectionHash("weights", weights_size)
    for chunk in weights.chunks(entries, payloads):
        weights_hash.update(chunk)
    graph_bytes = documents.dump_graph(graph, entries)
    graph_hash = hash_section("graph", graph_bytes)
    kernel_bytes = kernel_table.build(kernels, len(targets), graph_hash.root())
    kernel_hash = hash_section("kernels", kernel_bytes)
    digests = documents.Digests(
        graph=graph_hash.root().hex(),
        weights=weights_hash.root().hex() if weights_size else None,
        kernels=kernel_hash.root().hex() if kernel_bytes else None,
    )
    metadata_bytes = documents.dump_metadata(dict(metadata), digests)
    metadata_hash = hash_section("metadata", metadata_bytes)

    sizes = {
        "metadata": len(metadata_bytes),
        "graph": len(graph_bytes),
        "weights": weights_size,
        "kernels": len(kernel_bytes),
        "signature": 0,
    }
    crcs = {
        "metadata": metadata_hash.crc,
        "graph": graph_hash.crc,
        "weights": weights_hash.crc,
        "kernels": kernel_hash.crc,
        "signature": 0,
    }
    for name, size in sizes.items():
        if size > SECTION_BYTES[name]:
            raise UsageError(
                f"the {name} section would have {size} bytes, a .mle file holds at most {SECTION_BYTES[name]}",
                code="E_USAGE_SIZE",
                hint="split the model",
            )
    placed = place(sizes)
    file_size = max(offset + size for offset, size in placed.values())
    header = Header(
        sections={name: Section(name, *placed[name], crcs[name]) for name in SECTIONS},
        file_size=file_size,
        flags=int(Flag.KERNELS) if kernel_bytes else 0,
        minor=documents.minor_version(metadata),
    )

    def content() -> Iterator[bytes | memoryview]:
        yield header.pack()
        end = len(header.pack())
        parts = {"metadata": [metadata_bytes], "graph": [graph_bytes], "kernels": [kernel_bytes]}
        for section in header.sections.values():
            if section.size:
                yield bytes(section.offset - end)
                yield from weights.chunks(entries, payloads) if section.name == "weights" else parts[section.name]
                end = section.end

    return SaveResult(
        path=replace_file(path, file_size, content),
        size_bytes=file_size,
        sections=sizes,
        code_id=code_id(metadata_hash.root(), graph_hash.root(), kernel_hash.root() if kernel_bytes else None),
    )

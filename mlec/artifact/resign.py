"""Signing a file that is there already. Only header and signature change: nothing is decoded, and the code identity stays."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mlec.artifact.header import SECTIONS
from mlec.artifact.reader import StoredFile
from mlec.artifact.signing import Signer
from mlec.artifact.writer import Plain, SaveResult, Stored, finish


def sign(path: str | os.PathLike[str], signer: Signer, output: str | os.PathLike[str] | None = None) -> SaveResult:
    """Sign a file; another signature that it has is replaced.

    Args:
        path: a sound file; all of its bytes are checked first.
        signer: the key. Without a model name among its attributes, that in the metadata is signed.
        output: where to write the signed file; by default it replaces the other.

    Raises:
        ArtifactError: the file does not open, see `Artifact.open`; or the new one cannot be written.
        UsageError: attributes that cannot be stored.
    """
    file = StoredFile.read(path)
    header, name = file.header, file.metadata.get("name", "")
    data: Mapping[str, bytes | bytearray | memoryview] = {**file.sections, "weights": file.weights.data}
    stored = {
        name: Stored(section.size, Plain.of(data[name]).chunks, section.crc, bytes.fromhex(file.digests[name] or ""))
        for name, section in header.sections.items()
        if name != SECTIONS[-1] and section.size
    }
    signer = signer.with_defaults(model_name=name if isinstance(name, str) else "")
    return finish(path if output is None else output, header, stored, signer)

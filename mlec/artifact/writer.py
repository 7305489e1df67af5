"""Writing .mle files: lay out, hash, describe, then replace the target atomically.

The same input gives the same bytes: nothing in the file depends on the time, the machine or the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec.structs import replace

from mlec.artifact import kernels as kernel_table
from mlec.artifact import metadata as documents
from mlec.artifact import packed_sections, weights
from mlec.artifact.atomic import replace_file
from mlec.artifact.header import REQUIRED_FLAGS, SECTIONS, SIG_ED25519, SIZE, ZSTD, Header, Section, pack_codecs
from mlec.artifact.kernels import KernelBlob
from mlec.artifact.limits import SECTION_BYTES
from mlec.artifact.sections import SectionHash, code_id, place
from mlec.errors import UsageError

if TYPE_CHECKING:
    from mlec.artifact.encryption import EncryptionKey, Lock
    from mlec.artifact.signing import Signer


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


COMPRESSIONS: Final = ("zstd",)
"""What ``compression`` can be, beside None."""


@dataclass(frozen=True)
class Storage:
    """How a file is stored.

    Attributes:
        compression: None: graph and kernels by zlib where that saves at least an eighth; tensors stay as they are and can be mapped.
            ``"zstd"`` compresses graph, kernels and each tensor where that saves as much; the other tensors can still be mapped. The
            metadata stays readable.
        signer: the key that vouches for the file, if any.
        key: encrypts graph, weights and kernels, if given. Then the same input does not give the same bytes. The metadata stays readable.
    """

    compression: str | None = None
    signer: Signer | None = None
    key: EncryptionKey | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Storage:
        """From the arguments of ``save``, of which others than these are left alone.

        Raises:
            UsageError: an argument that makes no sense, or ``E_KEY_FILE``: a file that is no key.
            SecurityError: ``E_KEY_MODE``: others can read the key.
            RuntimeUnavailableError: a library that is missing.
        """
        compression = options.get("compression")
        if compression is not None and compression not in COMPRESSIONS:
            raise UsageError(
                f"compression takes None or {', '.join(map(repr, COMPRESSIONS))}, got {compression!r}",
                hint="compression='zstd'",
            )
        signer, key = options.get("sign_key"), options.get("encryption_key")
        if signer is not None:
            from mlec.artifact.signing import Signer

            signer = Signer.of(signer)
        if key is not None:
            from mlec.artifact.encryption import EncryptionKey

            key = EncryptionKey.of(key)
        return cls(compression, signer, key)


def write(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any],
    graph: str,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    kernels: Sequence[KernelBlob] = (),
    storage: Storage | None = None,
) -> SaveResult:
    """Write a .mle file.

    Args:
        path: target; an existing regular file is replaced atomically, symbolic links are followed.
        metadata: JSON values. The keys ``format``, ``mlec_version`` and ``digests`` are set by the writer; ``targets`` lists what the
            kernels were compiled for, ``critical`` the features without which a reader must refuse the file.
        graph: text of the IR, stored as it is.
        tensors: the weights by name, stored in this order; any strides and byte order.
        kernels: machine code; ``target`` indexes ``metadata["targets"]``.
        storage: how; as it is by default.

    Raises:
        UsageError: something that the format cannot hold.
        WriteError: the file could not be written; an existing one is unchanged.
        RuntimeUnavailableError: ``E_NO_ZSTD``: the library for it is missing.
    """
    storage = storage or Storage()
    targets = metadata.get("targets", [])
    if not isinstance(targets, list | tuple):
        raise UsageError(
            f"metadata['targets'] must be a list, not {type(targets).__name__}",
            code="E_USAGE_JSON",
            hint="give one entry for each target that kernels were compiled for",
        )

    compress = storage.compression is not None
    entries, payloads, weights_size = weights.plan(tensors, compress=compress)
    graph_bytes = documents.dump_graph(graph, entries)
    kernel_bytes = kernel_table.build(kernels, len(targets), SectionHash.of("graph", graph_bytes).root())
    codecs = {"weights": ZSTD if any(entry.codec == "zstd" for entry in entries) else 0}
    plain: dict[str, Plain] = {"weights": Plain(weights_size, lambda: weights.chunks(entries, payloads))}
    for name, data in (("graph", graph_bytes), ("kernels", kernel_bytes)):
        check_size(name, len(data))
        codecs[name], packed = packed_sections.encode(data, zstd=compress)
        plain[name] = Plain.of(packed)
    for name, part in plain.items():
        check_size(name, part.size)

    blank = Header(
        {},
        0,
        minor=documents.minor_version(metadata),
        codecs=pack_codecs(codecs),
        aead_alg=storage.key.number if storage.key else 0,
    )
    encryption = None
    if storage.key:
        from mlec.artifact.encryption import Lock

        lock = Lock.new(storage.key)
        encryption = lock.metadata
        plain = _encrypted(plain, lock, blank, lambda digests: documents.dump_metadata(metadata, digests, encryption))
    stored = {name: Stored.hashed(name, part) for name, part in plain.items()}
    digests = _digests({name: part.root for name, part in stored.items() if part.size})
    stored["metadata"] = Stored.hashed("metadata", Plain.of(documents.dump_metadata(metadata, digests, encryption)))
    name = metadata.get("name", "")
    signer = storage.signer and storage.signer.with_defaults(model_name=name if isinstance(name, str) else "")
    return finish(path, blank, stored, signer)


def _digests(roots: Mapping[str, bytes]) -> documents.Digests:
    """The digests of present sections from their roots."""
    texts = {name: root.hex() for name, root in roots.items()}
    return documents.Digests(graph=texts["graph"], weights=texts.get("weights"), kernels=texts.get("kernels"))


def _encrypted(
    plain: Mapping[str, Plain], lock: Lock, blank: Header, metadata: Callable[[documents.Digests | None], bytes]
) -> dict[str, Plain]:
    """The sections encrypted, bound to where they will lie and to the metadata without the digests."""
    from mlec.artifact.encryption import associated_data, sealed_size

    sizes = {name: sealed_size(part.size) for name, part in plain.items()}
    sizes["metadata"] = len(metadata(_digests({name: bytes(32) for name, size in sizes.items() if size})))
    placed = place(sizes)
    header = replace(blank, sections={name: Section(name, *placed[name]) for name in SECTIONS})
    associated = associated_data(replace(header, flags=header.expected_flags), metadata(None))

    def sealed(name: str, part: Plain) -> Plain:
        # Once and for all: were it done again for writing, an array that changed in between would be encrypted with the same nonces.
        chunks = list(lock.seal(name, part.size, part.chunks(), associated))
        return Plain(sizes[name], lambda: chunks)

    return {name: sealed(name, part) for name, part in plain.items()}


def check_size(name: str, size: int) -> None:
    """Refuses a section above its cap.

    Raises:
        UsageError: ``E_USAGE_SIZE``.
    """
    if size > SECTION_BYTES[name]:
        raise UsageError(
            f"the {name} section would have {size} bytes, a .mle file holds at most {SECTION_BYTES[name]}",
            code="E_USAGE_SIZE",
            hint="split the model",
        )


@dataclass(frozen=True)
class Plain:
    """The bytes of a section: their number, and they themselves in pieces, as often as asked for."""

    size: int
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Plain:
        """Bytes that are in memory as a whole."""
        view = memoryview(data)
        return cls(view.nbytes, lambda: [view])


@dataclass(frozen=True)
class Stored(Plain):
    """A section as it lies in the file, with its CRC-32 and digest root."""

    crc: int
    root: bytes

    @classmethod
    def hashed(cls, name: str, part: Plain) -> Stored:
        """The bytes of a section, looked at once."""
        digest = SectionHash(name, part.size)
        for chunk in part.chunks():
            digest.update(chunk)
        return cls(part.size, part.chunks, digest.crc, digest.root())


def finish(
    path: str | os.PathLike[str], blank: Header, stored: Mapping[str, Stored], signer: Signer | None
) -> SaveResult:
    """Lay the sections out, describe them in the header, and replace the target.

    Args:
        path: as in `write`.
        blank: version, codecs and algorithms; the other fields are computed.
        stored: the sections but the signature; an absent one is missing or empty.
        signer: signs the file, if given.
    """
    sizes = {name: stored[name].size if name in stored else 0 for name in SECTIONS}
    sizes["signature"] = signer.section_size() if signer else 0
    for name, size in sizes.items():
        check_size(name, size)
    placed = place(sizes)
    header = replace(
        blank,
        sections={
            name: Section(name, *placed[name], stored[name].crc if sizes[name] and name in stored else 0)
            for name in SECTIONS
        },
        file_size=max(offset + size for offset, size in placed.values()),
        sig_alg=SIG_ED25519 if signer else 0,
    )
    header = replace(header, flags=header.flags & ~REQUIRED_FLAGS | header.expected_flags)
    if signer:
        section = Stored.hashed("signature", Plain.of(signer.sign(header, stored["metadata"].root)))
        stored = {**stored, "signature": section}
        described = replace(header.sections["signature"], crc=section.crc)
        header = replace(header, sections={**header.sections, "signature": described})

    def content() -> Iterator[bytes | memoryview]:
        yield header.pack()
        end = SIZE
        for name, section in header.sections.items():
            if section.size:
                yield bytes(section.offset - end)
                yield from stored[name].chunks()
                end = section.end

    kernels_root = stored["kernels"].root if sizes["kernels"] else None
    return SaveResult(
        path=replace_file(path, header.file_size, content),
        size_bytes=header.file_size,
        sections=sizes,
        code_id=code_id(stored["metadata"].root, stored["graph"].root, kernels_root),
    )

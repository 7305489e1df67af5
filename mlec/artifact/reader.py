"""Opening .mle files. Bytes are checked before they are used, and nothing in the file is ever executed here.

Metadata, graph and kernels are copied to private memory before they are hashed, so what was checked is what is used.
Weights are mapped and shared where nobody but this user and the administrator can change the file; else (or when asked for) they are
copied first and checked in the copy, so what was checked is what is used (the positions that kernels index with, above all).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from mlec.artifact import compression, json_safe, limits, packed_sections, sections, weights
from mlec.artifact import header as headers
from mlec.artifact import kernels as kernel_table
from mlec.artifact import metadata as documents
from mlec.artifact.header import Header
from mlec.artifact.kernels import KernelBlob
from mlec.artifact.mapped import MappedFile, changed
from mlec.artifact.sections import BegunHash, SectionHash
from mlec.errors import (
    ArtifactError,
    CorruptedFileError,
    RuntimeUnavailableError,
    SecurityError,
    UsageError,
    VersionMismatchError,
)

if TYPE_CHECKING:
    from mlec.artifact.encryption import EncryptionKey
    from mlec.artifact.keyring import Keyring
    from mlec.artifact.signing import Signature

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Verify = Literal["fast", "once", "full"]
"""What of the weights is checked when a file is opened, see `Artifact.open`."""

_DAMAGED_HINT = "fetch or compile the file again; `mlec recover` takes out of it what is intact"


class Artifact:
    """An open .mle file; a context manager.

    Attributes:
        path: real path of the file.
        header: the checked header.
        metadata: the whole metadata.
        graph: text of the IR; this package does not look into it.
        tensors: the weights by name, see `mlec.artifact.weights.Tensors`.
        kernels: machine code, private copies. Never run it without asking `mlec.artifact.decide`.
        code_id: identity of metadata, graph and kernels, 64 hexadecimal digits.
        digests: digest roots of the sections in hexadecimal, None for absent ones.
        signature: who signed it; None for a file without signature.
        writable_by_others: the file, or the directory it lies in, can be changed by other users.
    """

    def __init__(
        self,
        *,
        path: str,
        header: Header,
        metadata: dict[str, Any],
        graph: str,
        tensors: weights.Tensors,
        kernels: tuple[KernelBlob, ...],
        code_id: str,
        digests: Mapping[str, str | None],
        signature: Signature | None,
        writable_by_others: bool,
        mapping: MappedFile | None,
        unsettled: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.header = header
        self.metadata = metadata
        self.graph = graph
        self.kernels = kernels
        self.code_id = code_id
        self.digests = digests
        self.signature = signature
        self.writable_by_others = writable_by_others
        self._tensors: weights.Tensors | None = tensors
        self._mapping = mapping
        self._unsettled = unsettled

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        copy_weights: bool = False,
        verify: Verify = "full",
        follow_symlinks: bool = True,
        keyring: Keyring | None = None,
        key: EncryptionKey | bytes | str | os.PathLike[str] | None = None,
        wait: bool = True,
    ) -> Artifact:
        """Open and check a file.

        Args:
            path: the file.
            copy_weights: hold the weights in private memory instead of mapping the file. Needed where the file may
                be truncated while it is open, which kills a process that reads a mapped page. Files that other users
                can write to, or own, are always copied.
            verify: ``"full"`` makes all checks of the format now. ``"once"`` looks at no byte of the weights twice: where the digest of the
                section is right, neither its CRC-32 nor the checksums of single tensors that are stored as they are. ``"fast"`` checks
                each tensor when it is first asked for, and everything else now.
            follow_symlinks: False refuses a path whose last part is a symbolic link.
            keyring: the keys to verify a signature with; by default those of this user and this machine.
            key: of an encrypted file, or the file that holds it; by default that of the environment variable ``MLEC_KEY``.
            wait: False, with ``"once"``, may return while other CPUs are still at work on the weights: `settle` waits for what they find.

        Raises:
            CorruptedFileError: the bytes break the format, with the code of the broken rule.
            SecurityError: ``E_SIGNATURE``: a key of the keyring is said to have signed the file, and did not; ``E_KEY_MISSING``,
                ``E_KEY_WRONG``: the file is encrypted, and not with the key that was given.
            VersionMismatchError: a version or feature that this reader does not know.
            ArtifactError: the file cannot be opened.
        """
        stored = StoredFile.read(
            path, copy_weights=copy_weights, verify=verify, follow_symlinks=follow_symlinks, keyring=keyring
        )
        if key is not None:
            from mlec.artifact.encryption import EncryptionKey

            key = EncryptionKey.of(key)
        with _named(path):
            artifact = _decode(stored, verify, key)
        if wait:
            artifact.settle()
        return artifact

    def settle(self) -> None:
        """Find out about the weights, where `open` did not wait for that.

        Raises:
            CorruptedFileError: with the code of the broken rule.
        """
        if self._unsettled is not None:
            with _named(self.path):
                self._unsettled()
            self._unsettled = None

    @property
    def tensors(self) -> weights.Tensors:
        """The weights by name, which are checked first: read-only, 64-byte aligned arrays that keep the file's memory alive."""
        self.settle()
        self.check_unchanged()
        return self._open_tensors

    def unchecked_tensors(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """The same, of which those that share the file's memory must not be read before `settle` or `check_tensors`."""
        self.check_unchanged()
        return self._open_tensors.unchecked()

    @property
    def _open_tensors(self) -> weights.Tensors:
        if self._tensors is None:
            raise UsageError(f"{self.path} is closed", code="E_CLOSED", hint="open it again")
        return self._tensors

    def check_unchanged(self) -> None:
        """Make sure that the weights are what they were when the file was opened, before anything new is made of them.

        Copies are. Of a mapped file that was written to since, every tensor is checked again; so a new date alone does no harm.

        Raises:
            CorruptedFileError: ``E_CHANGED``.
        """
        with _named(self.path):
            if self._mapping is None or (written := self._mapping.written()) is None:
                return
            try:
                self._open_tensors.check_all()
            except CorruptedFileError as error:
                raise changed(f"the file was written to while it was open: {error.message}") from error
            self._mapping.accept(written)

    def check_tensors(self, names: Iterable[str]) -> None:
        """Compare the checksums of tensors, where that has not been done; large ones side by side.

        Raises:
            CorruptedFileError: with the code of the broken rule.
        """
        with _named(self.path):
            self.tensors.check(names)

    def close(self) -> None:
        """Give the weights back. Arrays that were handed out stay valid: they keep the map alive themselves."""
        self._tensors = None
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.close()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Artifact({self.path!r}, code_id={self.code_id[:12]}...)"

    def describe(self) -> dict[str, Any]:
        """Everything in the file but the weights, the kernels and the graph text, ready for JSON."""
        return {
            "path": self.path,
            "size_bytes": self.header.file_size,
            "format": self.header.version,
            "flags": [flag.name for flag in headers.Flag if self.header.flags & flag],
            "code_id": self.code_id,
            "signature": self.signature.describe() if self.signature else None,
            "digests": dict(self.digests),
            "sections": {
                name: {"offset": section.offset, "size": section.size, "crc32": f"{section.crc:08x}"}
                for name, section in self.header.sections.items()
            },
            "tensors": [
                msgspec.structs.asdict(entry) | {"shape": list(entry.shape)} for entry in self._open_tensors.entries
            ],
            "kernels": [
                {
                    "kind": kernel.kind,
                    "kind_name": kernel_table.KINDS[kernel.kind],
                    "target": kernel.target,
                    "size": len(kernel.data),
                    "sha256": kernel.sha256,
                }
                for kernel in self.kernels
            ],
            "metadata": self.metadata,
            "writable_by_others": self.writable_by_others,
        }


class StoredFile(msgspec.Struct, frozen=True):
    """A file whose layout, checksums, digests and signature are checked, and of which nothing is decoded.

    Attributes:
        path: real path.
        header: the checked header.
        sections: the stored bytes of metadata, graph, kernels and signature, private copies; empty for absent ones.
        weights: the stored bytes of the weights.
        hashes: of the sections whose bytes were looked at.
        begun: the hash of the weights, where `settle` is to finish it.
        metadata, owned: the whole metadata, and what the format owns of it.
        digests: digest roots in hexadecimal, None for absent sections.
        signature: None for a file without one.
        writable_by_others: see `Artifact`.
        mapping: what ``weights`` lies in, if they are mapped.
    """

    path: str
    header: Header
    sections: Mapping[str, bytearray]
    weights: _Bytes
    hashes: Mapping[str, SectionHash]
    begun: BegunHash | None
    metadata: dict[str, Any]
    owned: documents.Owned
    digests: Mapping[str, str | None]
    signature: Signature | None
    writable_by_others: bool
    mapping: MappedFile | None

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        copy_weights: bool = False,
        verify: Verify = "full",
        follow_symlinks: bool = True,
        keyring: Keyring | None = None,
    ) -> StoredFile:
        """Open and check a file; arguments and errors as for `Artifact.open`."""
        if verify not in ("fast", "once", "full"):
            raise UsageError(
                f"verify must be 'fast', 'once' or 'full', not {verify!r}", hint="'fast' leaves out the weights"
            )
        with _named(path):
            return _read_stored(os.fsdecode(path), copy_weights, verify, follow_symlinks, keyring)

    def settle(self) -> None:
        """Compare the digest of the weights, with ``verify="once"``.

        Raises:
            CorruptedFileError: with the code of the broken rule.
        """
        if self.begun is None:
            return
        found = self.begun.finish()
        if found.root().hex() == self.digests["weights"]:
            return
        found.crc = zlib.crc32(self.weights.data)  # it tells an accident from what somebody did
        hashes = {**self.hashes, "weights": found}
        _check_crcs(self.header, hashes, self.sections["graph"], self.weights)
        _check_digests(self.header, self.owned.digests, hashes)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about the file say which one it is."""
    try:
        yield
    except ArtifactError as error:
        error.loc = error.loc or os.fsdecode(path)
        raise


def _read_stored(
    path: str, copy_weights: bool, verify: Verify, follow_symlinks: bool, keyring: Keyring | None
) -> StoredFile:
    if sys.byteorder != "little":
        raise ArtifactError(
            "this machine stores numbers in big-endian order; .mle files are little endian",
            code="E_BYTE_ORDER",
            hint="run the model on a little-endian machine",
        )
    file, info = _open_file(path, follow_symlinks)
    with file:
        head = _read(file, 0, min(headers.SIZE, info.st_size))
        try:
            header = headers.unpack(head)
        except VersionMismatchError as error:
            error.notes += _who_reads(_writer(file, head))
            raise
        headers.check_file_size(header, info.st_size)
        sections.check_layout(header)
        for start, end in sections.paddings(header):
            sections.check_zero(_read(file, start, end - start), start)
        real_path = _real_path(file, path)
        shared = _writable_by_others(real_path, info)

        stored = {
            name: _read(file, section.offset, section.size)
            for name, section in header.sections.items()
            if name != "weights"
        }
        foreign = info.st_uid not in (os.geteuid(), 0)  # its owner can always change it
        section, mapping = _load_weights(file, info, header, copy_weights or shared or foreign)

    begun = None
    if verify != "fast" and section.size:
        begun = BegunHash("weights", section.data, checksum=verify == "full")
    hashes = {name: SectionHash.of(name, data) for name, data in stored.items() if data}
    if verify == "full" and begun is not None:
        hashes["weights"], begun = begun.finish(), None
    _check_crcs(header, hashes, stored["graph"], section)
    signature = None
    if stored["signature"]:
        from mlec.artifact import signing  # few files are signed

        signature = signing.check(stored["signature"], keyring, header, hashes["metadata"].root())
    metadata, owned = documents.parse_metadata(stored["metadata"], header)
    return StoredFile(
        path=real_path,
        header=header,
        sections=stored,
        weights=section,
        hashes=hashes,
        begun=begun,
        metadata=metadata,
        owned=owned,
        digests=_check_digests(header, owned.digests, hashes),
        signature=signature,
        writable_by_others=shared,
        mapping=mapping,
    )


def _writer(file: io.FileIO, head: bytearray) -> str:
    """The version that wrote a file whose header is of no known form, if its metadata is where it is in files of ours; else empty."""
    where = headers.metadata_section(head)
    if where.size > limits.SECTION_BYTES["metadata"]:
        return ""
    try:
        text = _read(file, where.offset, where.size)
        metadata = json_safe.parse(text, what="metadata", max_bytes=where.size) if zlib.crc32(text) == where.crc else {}
        return str(metadata["mlec_version"])
    except (ArtifactError, OSError, OverflowError, KeyError, TypeError):
        return ""


def _who_reads(writer: str) -> tuple[str, ...]:
    """What an error about an unknown version says of the one that wrote the file."""
    return (f"by what it says, mlec {' '.join(writer[:40].split())} wrote it, and reads it",) if writer else ()


def _decode(file: StoredFile, verify: Verify, key: EncryptionKey | None) -> Artifact:
    try:
        return _decode_known(file, verify, key)
    except VersionMismatchError as error:
        error.notes += _who_reads(file.owned.mlec_version)
        raise


def _decode_known(file: StoredFile, verify: Verify, key: EncryptionKey | None) -> Artifact:
    header, roots = file.header, {name: digest.root() for name, digest in file.hashes.items() if name != "weights"}
    opened, section, mapping = file.sections, file.weights, file.mapping
    if header.aead_alg:
        file.settle()
        opened, section, mapping = *_decrypted(file, key), None
    plain = {name: _decoded(header, name, opened[name]) for name in ("graph", "kernels")}
    document = documents.parse_graph(plain["graph"])
    weights.check_index(document.tensors, section.size, compressed=header.codec("weights") != 0)
    tensors = weights.Tensors(document.tensors, section)
    if verify == "full":
        tensors.check_all()

    def settle() -> None:
        file.settle()
        tensors.check_all(section_is_right=True)

    kernels: tuple[KernelBlob, ...] = ()
    if plain["kernels"]:
        # Code is bound to the graph itself, however that is stored.
        as_it_is = plain["graph"] is file.sections["graph"]
        bound_to = roots["graph"] if as_it_is else SectionHash.of("graph", plain["graph"]).root()
        kernels = kernel_table.parse(plain["kernels"], len(file.owned.targets), bound_to)
    return Artifact(
        path=file.path,
        header=header,
        metadata=file.metadata,
        graph=document.ir,
        tensors=tensors,
        kernels=kernels,
        code_id=sections.code_id(roots["metadata"], roots["graph"], roots.get("kernels")),
        digests=file.digests,
        signature=file.signature,
        writable_by_others=file.writable_by_others,
        mapping=mapping,
        unsettled=settle if verify == "once" else None,
    )


def _decrypted(file: StoredFile, key: EncryptionKey | None) -> tuple[dict[str, bytearray], _Bytes]:
    """Graph and kernels, and the weights, in private memory."""
    from mlec.artifact.encryption import ENCRYPTED, EncryptionKey, Lock, associated_data, plain_size

    stated, described = documents.parse_encryption(file.metadata, file.sections["metadata"], file.owned)
    lock = Lock(EncryptionKey.needed(key), bytes.fromhex(stated.salt), file.header.aead_alg)
    lock.check(stated.check)
    sizes = {name: plain_size(name, file.header.sections[name].size) for name in ENCRYPTED}
    associated = associated_data(file.header, described)
    opened = {}
    for name in ("graph", "kernels"):
        opened[name] = compression.allocate(sizes[name], what=f"the {name} section")
        lock.open(name, memoryview(file.sections[name]), memoryview(opened[name]), associated)
    compression.check_memory(sizes["weights"], what="the weights")
    section = weights.aligned_empty(sizes["weights"])
    lock.open("weights", file.weights.data, section.data, associated)
    return opened, weights.read_only(section)


def _decoded(header: Header, name: str, stored: bytearray) -> bytes | bytearray:
    """A section that is stored as a whole, as it was before it was compressed."""
    return packed_sections.decode(stored, header.codec(name), name=name)


def _open_file(path: str, follow_symlinks: bool) -> tuple[io.FileIO, os.stat_result]:
    """Open once; everything later goes through this descriptor."""
    # O_NONBLOCK: opening a pipe must not wait for somebody to write to it.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_symlinks else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ELOOP and not follow_symlinks:
            raise SecurityError(
                "the path is a symbolic link", code="E_SYMLINK", hint="give the path of the file itself"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ArtifactError(f"cannot open the file: {reason}", code="E_OPEN", hint="check the path") from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise ArtifactError("not a regular file", code="E_NOT_A_FILE", hint="give the path of a .mle file")
    return io.FileIO(fd), info


def read_whole(path: str | os.PathLike[str]) -> memoryview:
    """All bytes of a regular file, of which nothing is checked.

    Raises:
        ArtifactError: it cannot be opened or read, or there is no memory for it.
    """
    with _named(path):
        file, info = _open_file(os.fsdecode(path), follow_symlinks=True)
        with file:
            return memoryview(_read(file, 0, info.st_size))


def _read(file: io.FileIO, offset: int, size: int) -> bytearray:
    buffer = compression.allocate(size, what="a section")
    _read_into(file, offset, memoryview(buffer))
    return buffer


def _read_into(file: io.FileIO, offset: int, rest: memoryview) -> None:
    file.seek(offset)
    while rest:
        try:
            count = file.readinto(rest)
        except OSError as error:
            raise ArtifactError(
                f"cannot read the file: {error.strerror}", code="E_READ", hint="check the disk"
            ) from error
        if not count:
            raise _shrunk()
        rest = rest[count:]


def _shrunk() -> CorruptedFileError:
    return changed("the file became shorter while it was read")


def _real_path(file: io.FileIO, path: str) -> str:
    """Where the open file lies; links in its path may lead elsewhere by now."""
    try:
        return os.readlink(f"/proc/self/fd/{file.fileno()}")
    except OSError:  # /proc is not there
        return os.path.realpath(path)


def _writable_by_others(real_path: str, info: os.stat_result) -> bool:
    """Whether another user could change the file's bytes or put another file in its place."""
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    try:
        parent = os.stat(os.path.dirname(real_path))
    except OSError:
        return True
    # Group-writable directories are the default of systems with a private group for each user: they don't count.
    return bool(parent.st_mode & stat.S_IWOTH) and not parent.st_mode & stat.S_ISVTX


def _load_weights(
    file: io.FileIO, info: os.stat_result, header: Header, copy: bool
) -> tuple[_Bytes, MappedFile | None]:
    where = header.sections["weights"]
    if where.size and not copy:
        try:
            mapping = MappedFile(file.fileno(), info)
            return mapping.bytes_at(where.offset, where.size), mapping
        except ValueError:
            raise _shrunk() from None
        except OSError:
            pass  # A file system without maps: the weights are copied.
    compression.check_memory(where.size, what="the weights")
    section = weights.aligned_empty(where.size)
    _read_into(file, where.offset, section.data)
    return weights.read_only(section), None


def _check_crcs(
    header: Header,
    hashes: Mapping[str, SectionHash],
    graph: bytearray,
    section: _Bytes,
) -> None:
    """Compare all checksums first, so that the error can say what of the file is still good."""
    looked_at = {name: section.crc for name, section in header.sections.items() if name in hashes}
    damaged = [name for name, crc in looked_at.items() if hashes[name].crc != crc]
    if not damaged:
        return
    intact = [name for name in looked_at if name not in damaged]
    notes = [f"intact: {', '.join(intact) or 'nothing'}"]
    if damaged == ["weights"]:
        notes += _damaged_tensors(header, graph, section)
    raise CorruptedFileError(
        f"the file is damaged: wrong checksum in section {', '.join(damaged)}",
        code=f"E_CRC_{damaged[0].upper()}",
        hint=_DAMAGED_HINT,
        notes=tuple(notes),
    )


def _damaged_tensors(header: Header, graph: bytearray, section: _Bytes) -> list[str]:
    if header.aead_alg:
        return []  # without its key, nobody knows which bytes are whose
    try:
        index = documents.parse_graph(_decoded(header, "graph", graph)).tensors
        weights.check_index(index, section.size, compressed=header.codec("weights") != 0)
        names = weights.Tensors(index, section).damaged()
    except (ArtifactError, RuntimeUnavailableError):
        return []
    if not names:
        return ["every tensor is intact, the padding between them is not"]
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return [f"damaged tensors ({len(names)} of {len(index)}): {shown}"]


def _check_digests(
    header: Header, claimed: documents.Digests, hashes: Mapping[str, SectionHash]
) -> dict[str, str | None]:
    claims = {"graph": claimed.graph, "weights": claimed.weights, "kernels": claimed.kernels}
    for name, claim in claims.items():
        present = header.sections[name].size > 0
        if present != (claim is not None):
            raise CorruptedFileError(
                f"the metadata {'lacks' if present else 'holds'} a digest of section {name}, "
                f"which is {'present' if present else 'absent'}",
                code="E_DIGEST_MISSING",
            )
    for name, claim in claims.items():
        if name in hashes and hashes[name].root().hex() != claim:
            raise CorruptedFileError(
                f"section {name} was changed: its digest is not the one in the metadata",
                code=f"E_DIGEST_{name.upper()}",
                hint=_DAMAGED_HINT,
            )
    return {"metadata": hashes["metadata"].root().hex(), **claims}

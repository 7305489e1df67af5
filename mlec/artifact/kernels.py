"""The kernels section: a table of binary blobs, each bound by its digest to the graph it was made from.

Layout: ``"MLEK"``, u32 number of kernels, one 96-byte entry each, then the blobs, each at the first multiple of 64
bytes, zero bytes between them. Nothing here loads or executes a blob.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from mlec.artifact import limits
from mlec.artifact.sections import align_up, check_zero
from mlec.errors import CorruptedFileError, UsageError

RELOCATABLE: Final = 6
"""The kind of what this version compiles."""
KINDS: Final = {
    1: "ELF shared object", 2: "PE", 3: "Mach-O", 4: "cubin/fatbin", 5: "PTX", RELOCATABLE: "relocatable object",
}  # fmt: skip
"""What a kernel blob can be, by number."""

_MAGIC: Final = b"MLEK"
_HEAD: Final = struct.Struct("<4sI")
_ENTRY: Final = struct.Struct("<IIQQ32s32sQ")
_ALIGNMENT: Final = 64


class KernelBlob(msgspec.Struct, frozen=True):
    """Machine code of one target.

    Attributes:
        kind: what ``data`` is, see `KINDS`.
        target: position in ``metadata["targets"]``.
        data: the bytes, in private memory.
    """

    kind: int
    target: int
    data: bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of ``data`` in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def build(kernels: Sequence[KernelBlob], targets: int, graph_root: bytes) -> bytes:
    """The bytes of the kernels section; empty when there is no kernel.

    Args:
        kernels: at most 4096, none of them empty.
        targets: length of ``metadata["targets"]``.
        graph_root: 32-byte digest root of the graph that the kernels compute.
    """
    if not kernels:
        return b""
    if len(kernels) > limits.KERNELS:
        raise UsageError(
            f"{len(kernels)} kernels, a .mle file holds at most {limits.KERNELS}",
            code="E_USAGE_KERNEL",
            hint="split the model",
        )
    entries, blobs = bytearray(), bytearray()
    base = _HEAD.size + _ENTRY.size * len(kernels)
    for position, kernel in enumerate(kernels):
        if kernel.kind not in KINDS or not 0 <= kernel.target < targets or not kernel.data:
            raise UsageError(
                f"kernel {position} cannot be stored: kind {kernel.kind} (known: 1 to {max(KINDS)}), target "
                f"{kernel.target} of {targets}, {len(kernel.data)} bytes",
                code="E_USAGE_KERNEL",
                hint="kinds are those of mlec.artifact.KINDS, targets index metadata['targets']",
            )
        off = align_up(base + len(blobs), _ALIGNMENT)
        blobs += bytes(off - base - len(blobs)) + kernel.data
        digest = hashlib.sha256(kernel.data).digest()
        entries += _ENTRY.pack(kernel.kind, kernel.target, off, len(kernel.data), digest, graph_root, 0)
    return _HEAD.pack(_MAGIC, len(kernels)) + entries + blobs


def parse(section: bytes | bytearray, targets: int, graph_root: bytes) -> tuple[KernelBlob, ...]:
    """Check the section and take the blobs out of it.

    Raises:
        CorruptedFileError: with the code of the broken rule.
    """
    if len(section) < _HEAD.size or section[:4] != _MAGIC:
        raise CorruptedFileError("the kernels section does not start with 'MLEK'", code="E_KERNEL_MAGIC")
    count = _HEAD.unpack_from(section)[1]
    end = _HEAD.size + _ENTRY.size * count
    if not 1 <= count <= limits.KERNELS or end > len(section):
        raise CorruptedFileError(
            f"the kernels table says {count} entries; 1 to {limits.KERNELS} that fit its {len(section)} bytes expected",
            code="E_KERNEL_COUNT",
        )
    kernels = []
    for position in range(count):

        def broken(code: str, why: str, position: int = position) -> CorruptedFileError:
            return CorruptedFileError(f"kernel {position}: {why}", code=code)

        kind, target, off, size, digest, bound_to, reserved = _ENTRY.unpack_from(
            section, _HEAD.size + _ENTRY.size * position
        )
        if kind not in KINDS:
            raise broken("E_KERNEL_KIND", f"unknown kind {kind}")
        if target >= targets:
            raise broken("E_KERNEL_TARGET", f"target {target}, the metadata lists {targets}")
        if reserved:
            raise broken("E_KERNEL_RESERVED", "the reserved field is not zero")
        if size == 0 or off + size > len(section):
            raise broken("E_KERNEL_BOUNDS", f"offset {off}, size {size}, the section has {len(section)} bytes")
        if off != align_up(end, _ALIGNMENT):
            raise broken("E_KERNEL_PLACEMENT", f"it must start at {align_up(end, _ALIGNMENT)}, it starts at {off}")
        check_zero(section[end:off], end, code="E_KERNEL_PADDING")
        data = bytes(memoryview(section)[off : off + size])
        if hashlib.sha256(data).digest() != digest:
            raise broken("E_KERNEL_DIGEST", "its bytes do not have the SHA-256 of the table")
        if bound_to != graph_root:
            raise broken("E_KERNEL_GRAPH", "it was made for another graph")
        kernels.append(KernelBlob(kind, target, data))
        end = off + size
    if end != len(section):
        raise CorruptedFileError(
            f"the last kernel ends at byte {end} of the kernels section, the section at {len(section)}",
            code="E_KERNEL_END",
        )
    return tuple(kernels)

"""The weights section: element types, the tensor index, and views into the mapped file.

Tensors lie one after another in the order of the index, C order, little endian, each at the first multiple of 64
bytes, with zero bytes between them. `Tensors` hands them out as read-only NumPy arrays that share the file's memory.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from mlec.artifact import limits
from mlec.artifact.sections import align_up, check_zero
from mlec.errors import ArtifactError, CorruptedFileError, UsageError, VersionMismatchError

ALIGNMENT: Final = 64
"""Alignment of each tensor in bytes."""

_NUMPY_NAMES: Final = {
    "f64": "<f8",
    "f32": "<f4",
    "f16": "<f2",
    "i64": "<i8",
    "i32": "<i4",
    "i16": "<i2",
    "i8": "|i1",
    "u8": "|u1",
    "u16": "<u2",
    "u32": "<u4",
    "bool": "|b1",
}
_ITEM_SIZE: Final = {name: int(text[2:]) for name, text in _NUMPY_NAMES.items()} | {"bf16": 2}

DTYPES: Final = tuple(_ITEM_SIZE)
"""Names of the element types that a tensor can have. ``bool`` takes one byte, 0 or 1."""

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_UInt = Annotated[int, msgspec.Meta(ge=0)]


class TensorEntry(msgspec.Struct, frozen=True):
    """One entry of the tensor index.

    Attributes:
        name: unique; 1 to 512 bytes of printable UTF-8 in normal form C.
        dtype: one of `DTYPES`.
        shape: length of each axis; empty for a scalar.
        off: position in the weights section in bytes, a multiple of 64.
        size: stored bytes.
        codec: how they are stored: ``"raw"``.
        raw: bytes of the tensor itself, prod(shape) * item size.
        crc32: CRC-32 of the tensor's bytes.
        sha256: SHA-256 of the tensor's bytes, 64 lower-case hexadecimal digits.
    """

    name: str
    dtype: str
    shape: tuple[_UInt, ...]
    off: _UInt
    size: _UInt
    codec: str
    raw: _UInt
    crc32: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}\\Z")]

    @property
    def end(self) -> int:
        """Position of the first byte after the tensor."""
        return self.off + self.size


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The little-endian NumPy dtype of one of `DTYPES`."""
    if name == "bf16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(_NUMPY_NAMES[name])


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The name that the format gives to a NumPy dtype of any byte order, or None."""
    if dtype.name == "bfloat16":
        return "bf16"
    text = dtype.newbyteorder("<").str
    return next((name for name, known in _NUMPY_NAMES.items() if known == text), None)


def name_fault(name: str) -> str | None:
    """Why a text cannot be the name of a tensor, or None."""
    # Printable excludes control characters, direction overrides, surrogates and unusual spaces.
    if not name.isprintable():
        return "it holds characters that are not printable"
    if not 1 <= len(name.encode("utf-8")) <= limits.NAME_BYTES:
        return f"it must take 1 to {limits.NAME_BYTES} bytes of UTF-8"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode normal form C"
    return None


def check_index(entries: Sequence[TensorEntry], section_size: int) -> None:
    """Every entry is well formed, and together they fill the weights section without holes.

    Raises:
        CorruptedFileError: with the code of the broken rule.
        VersionMismatchError: a tensor is stored in a way that this reader does not know.
    """
    if len(entries) > limits.TENSORS:
        raise CorruptedFileError(
            f"the index holds {len(entries)} tensors, the limit is {limits.TENSORS}", code="E_TENSOR_COUNT"
        )
    names: set[str] = set()
    end = 0
    for position, entry in enumerate(entries):

        def broken(code: str, why: str, position: int = position, entry: TensorEntry = entry) -> CorruptedFileError:
            return CorruptedFileError(f"tensor {entry.name[:80]!r} (index entry {position}): {why}", code=code)

        if fault := name_fault(entry.name):
            raise broken("E_TENSOR_NAME", f"the name is not allowed: {fault}")
        if entry.name in names:
            raise broken("E_TENSOR_DUPLICATE", "another tensor has the same name")
        names.add(entry.name)
        if entry.dtype not in _ITEM_SIZE:
            raise broken("E_TENSOR_DTYPE", f"unknown dtype {entry.dtype[:40]!r}, known are {', '.join(DTYPES)}")
        if len(entry.shape) > limits.RANK or any(dim > limits.DIM for dim in entry.shape):
            raise broken("E_TENSOR_SHAPE", f"more than {limits.RANK} axes, or an axis longer than {limits.DIM}")
        if entry.codec != "raw":
            raise VersionMismatchError(
                f"tensor {entry.name[:80]!r} is stored with codec {entry.codec[:40]!r}; "
                "this version of mlec reads 'raw' only",
                code="E_TENSOR_CODEC",
                hint="read it with a newer mlec, or save the model without compression",
            )
        # math.prod is exact; a product in 64 bits would wrap around.
        needed = math.prod(entry.shape) * _ITEM_SIZE[entry.dtype]
        if entry.raw != needed:
            raise broken("E_TENSOR_RAW", f"shape and dtype need {needed} bytes, the entry says raw = {entry.raw}")
        if entry.size != entry.raw:
            raise broken("E_TENSOR_SIZE", f"a raw tensor takes raw = {entry.raw} bytes, the entry says {entry.size}")
        if entry.off != align_up(end, ALIGNMENT):
            raise broken("E_TENSOR_PLACEMENT", f"it must start at {align_up(end, ALIGNMENT)}, it starts at {entry.off}")
        end = entry.end
        if end > section_size:
            raise broken("E_TENSOR_BOUNDS", f"it ends at {end}, the weights section at {section_size}")
    if end != section_size:
        raise CorruptedFileError(
            f"the last tensor ends at byte {end} of the weights section, the section at {section_size}",
            code="E_WEIGHTS_END",
        )


def plan(tensors: Mapping[str, np.ndarray[Any, Any]]) -> tuple[list[TensorEntry], list[memoryview], int]:
    """Lay out tensors for writing, in the order of the mapping.

    Returns:
        the index, the bytes of each tensor (in C order and little endian; copied only where the array is not), and
        the size of the weights section.

    Raises:
        UsageError: a name or dtype that the format does not hold, or too many tensors.
    """
    if len(tensors) > limits.TENSORS:
        raise UsageError(
            f"{len(tensors)} tensors, a .mle file holds at most {limits.TENSORS}",
            code="E_USAGE_TENSOR",
            hint="merge tensors, or split the model",
        )
    entries: list[TensorEntry] = []
    payloads: list[memoryview] = []
    end = 0
    for name, array in tensors.items():
        if fault := name_fault(name):
            raise UsageError(
                f"tensor name {name[:80]!r} cannot be stored: {fault}",
                code="E_USAGE_TENSOR",
                hint="name the tensor otherwise",
            )
        dtype = dtype_name(array.dtype)
        if dtype is None:
            raise UsageError(
                f"tensor {name!r} has dtype {array.dtype}, a .mle file holds {', '.join(DTYPES)}",
                code="E_USAGE_TENSOR",
                hint="convert it first",
            )
        contiguous = np.asarray(array, dtype=numpy_dtype(dtype), order="C")
        data = contiguous.reshape(-1).view(np.uint8).data
        off = align_up(end, ALIGNMENT)
        entries.append(
            TensorEntry(
                name=name,
                dtype=dtype,
                shape=contiguous.shape,
                off=off,
                size=data.nbytes,
                codec="raw",
                raw=data.nbytes,
                crc32=zlib.crc32(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
        payloads.append(data)
        end = off + data.nbytes
    return entries, payloads, end


def chunks(entries: Sequence[TensorEntry], payloads: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of the weights section in pieces: padding and tensors."""
    end = 0
    for entry, payload in zip(entries, payloads, strict=True):
        yield bytes(entry.off - end)
        yield payload
        end = entry.end


class Tensors(Mapping[str, np.ndarray[Any, Any]]):
    """The tensors of an open file by name, as read-only arrays that share its memory and keep it alive.

    A tensor's own checksums are compared when it is first asked for, unless `check_all` has done so before.

    Args:
        entries: a checked index.
        section: the bytes of the weights section (mapped, or a private copy), 64-byte aligned.
    """

    def __init__(self, entries: Sequence[TensorEntry], section: _Bytes) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._section = section
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        entry = self._entries[name]
        if name not in self._checked:
            self._check(entry, self._bytes(entry))
            self._checked.add(name)
        return self._bytes(entry).view(numpy_dtype(entry.dtype)).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} tensors, {self._section.nbytes} bytes)"

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The index, in the order of the file."""
        return tuple(self._entries.values())

    def check_all(self) -> None:
        """Check the padding and every tensor's checksums.

        Raises:
            CorruptedFileError: names the tensor.
        """
        end = 0
        for entry in self._entries.values():
            check_zero(self._section[end : entry.off].tobytes(), end, code="E_WEIGHTS_PADDING")
            self._check(entry, self._bytes(entry))
            end = entry.end
        self._checked.update(self._entries)

    def damaged(self) -> list[str]:
        """Names of the tensors whose checksum is wrong."""
        return [name for name, entry in self._entries.items() if zlib.crc32(self._bytes(entry).data) != entry.crc32]

    def _bytes(self, entry: TensorEntry) -> _Bytes:
        return self._section[entry.off : entry.end]

    @staticmethod
    def _check(entry: TensorEntry, data: _Bytes) -> None:
        what = f"tensor {entry.name[:80]!r}"
        hint = "fetch or compile the file again"
        if zlib.crc32(data.data) != entry.crc32:
            raise CorruptedFileError(f"{what} is damaged: wrong checksum", code="E_TENSOR_CRC", hint=hint)
        if hashlib.sha256(data.data).hexdigest() != entry.sha256:
            raise CorruptedFileError(f"{what} was changed: wrong SHA-256", code="E_TENSOR_DIGEST", hint=hint)
        if entry.dtype == "bool" and data.size and int(data.max()) > 1:
            raise CorruptedFileError(f"{what} holds bytes that are neither 0 nor 1", code="E_TENSOR_BOOL", hint=hint)


def aligned_empty(nbytes: int) -> _Bytes:
    """Uninitialised private memory whose address is a multiple of 64.

    Raises:
        ArtifactError: there is not enough memory.
    """
    try:
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    except MemoryError:
        raise ArtifactError(
            f"not enough memory for {nbytes} bytes of weights",
            code="E_NO_MEMORY",
            hint="open the file without copying its weights",
        ) from None
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]


def read_only(data: _Bytes) -> _Bytes:
    """The same memory as an array that cannot be made writable again."""
    return np.asarray(data.data.toreadonly())

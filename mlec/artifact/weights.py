"""The weights section: element types, the tensor index, and views into the mapped file.

Tensors lie one after another in the order of the index, C order, little endian, each at the first multiple of 64
bytes, with zero bytes between them. `Tensors` hands them out as read-only NumPy arrays; those that are not compressed share the
file's memory.
"""

# Annotations are not postponed here: msgspec would compile the text of each when the first file is loaded, which takes 1 ms.

import hashlib
import math
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from mlec.artifact import compression, limits
from mlec.artifact.header import NEWER
from mlec.artifact.sections import align_up, check_zero
from mlec.errors import ArtifactError, CorruptedFileError, UsageError, VersionMismatchError
from mlec.runtime.threads import side_by_side

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

HALVES: Final = ("f16", "bf16")
"""Codecs of f32 tensors whose numbers are all numbers of 16 bits, and stored so."""
CODECS: Final = ("raw", "zstd", *HALVES)
"""How a tensor's bytes can be stored."""
MIN_HALVED: Final = 4096
"""Elements of a tensor from which on half the bytes are worth a copy when it is read."""
_PIECE: Final = 1 << 20
"""Bytes of 16-bit numbers that are widened at a time."""
_LARGE: Final = 16 << 20
"""Bytes of tensors from which on threads are worth starting to check them."""

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
        codec: how they are stored: one of `CODECS`.
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
    if not name.isascii() and not _is_composed(name):
        return "it is not in Unicode normal form C"
    return None


def _is_composed(text: str) -> bool:
    import unicodedata

    return unicodedata.is_normalized("NFC", text)


def check_index(entries: Sequence[TensorEntry], section_size: int, *, compressed: bool) -> None:
    """Every entry is well formed, and together they fill the weights section without holes. Nothing is decoded for that.

    Args:
        entries: the index.
        section_size: bytes of the weights section.
        compressed: what the header says: whether any of the tensors is.

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
        if entry.codec not in CODECS:
            raise VersionMismatchError(
                f"tensor {entry.name[:80]!r} is stored with codec {entry.codec[:40]!r}; "
                f"this version of mlec reads {' and '.join(CODECS)}",
                code="E_TENSOR_CODEC",
                hint=NEWER,
            )
        # math.prod is exact; a product in 64 bits would wrap around.
        needed = math.prod(entry.shape) * _ITEM_SIZE[entry.dtype]
        if entry.raw != needed:
            raise broken("E_TENSOR_RAW", f"shape and dtype need {needed} bytes, the entry says raw = {entry.raw}")
        if entry.codec == "raw" and entry.size != entry.raw:
            raise broken("E_TENSOR_SIZE", f"a raw tensor takes raw = {entry.raw} bytes, the entry says {entry.size}")
        if entry.codec in HALVES and (entry.dtype != "f32" or 2 * entry.size != entry.raw):
            raise broken(
                "E_TENSOR_SIZE", f"f32 in 16 bits takes half of raw = {entry.raw} bytes, the entry says {entry.size}"
            )
        if entry.codec == "zstd" and not compression.plausible(entry.size, entry.raw):
            raise broken("E_TENSOR_RATIO", f"{entry.size} bytes cannot hold {entry.raw}")
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
    decoded = [entry.raw for entry in entries if entry.codec != "raw"]
    frames = sum(entry.codec == "zstd" for entry in entries)
    if bool(frames) != compressed:
        raise CorruptedFileError(
            f"{frames} tensors are compressed, the header says {'some' if compressed else 'none'}",
            code="E_CODEC_WEIGHTS",
        )
    if sum(decoded) > limits.DECODED_WEIGHTS:
        raise CorruptedFileError(
            f"the compressed tensors hold {sum(decoded)} bytes, the limit is {limits.DECODED_WEIGHTS}",
            code="E_TENSOR_TOTAL",
        )


def plan(
    tensors: Mapping[str, np.ndarray[Any, Any]], *, compress: bool = False
) -> tuple[list[TensorEntry], list[memoryview], int]:
    """Lay out tensors for writing, in the order of the mapping.

    Args:
        tensors: the weights by name.
        compress: store as a zstd frame what that makes clearly smaller; the others stay as they are, to be mapped. Large tensors of f32
            whose numbers are all f16 or bf16 are stored in 16 bits in any case.

    Returns:
        the index, the stored bytes of each tensor (in C order and little endian; copied only where the array is not), and
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
        codec, stored = "raw", data
        if halved := _in_halves(contiguous):
            codec, stored = halved
        frame = compression.encode(data) if compress and data.nbytes else None
        if frame is not None and len(frame) < stored.nbytes:
            codec, stored = "zstd", memoryview(frame)
        off = align_up(end, ALIGNMENT)
        entries.append(
            TensorEntry(
                name=name,
                dtype=dtype,
                shape=contiguous.shape,
                off=off,
                size=stored.nbytes,
                codec=codec,
                raw=data.nbytes,
                crc32=zlib.crc32(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
        payloads.append(stored)
        end = off + stored.nbytes
    return entries, payloads, end


def _in_halves(array: np.ndarray[Any, Any]) -> tuple[str, memoryview] | None:
    """The codec and the bytes of an array of f32 whose numbers are all numbers of 16 bits, bit for bit; None of any other."""
    if array.dtype != np.float32 or array.size < MIN_HALVED:
        return None
    words = array.reshape(-1).view(np.uint32)
    if not (words & 0xFFFF).any():
        return "bf16", (words >> 16).astype("<u2").view(np.uint8).data
    with np.errstate(over="ignore"):
        half = array.reshape(-1).astype("<f2")
    if np.array_equal(half.astype(np.float32).view(np.uint32), words):
        return "f16", half.view(np.uint8).data
    return None


def _widened(data: _Bytes, codec: str) -> Iterator[memoryview]:
    """The bytes of f32 that are stored in 16 bits, piece by piece."""
    for start in range(0, data.size, _PIECE):
        part = data[start : start + _PIECE]
        if codec == "bf16":
            yield (part.view("<u2").astype("<u4") << 16).view(np.uint8).data
        else:
            yield part.view("<f2").astype("<f4").view(np.uint8).data


def chunks(entries: Sequence[TensorEntry], payloads: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of the weights section in pieces: padding and tensors."""
    end = 0
    for entry, payload in zip(entries, payloads, strict=True):
        yield bytes(entry.off - end)
        yield payload
        end = entry.end


class Tensors(Mapping[str, np.ndarray[Any, Any]]):
    """The tensors of an open file by name, as read-only arrays.

    Those stored as they are share the file's memory and keep it alive. Others are decoded when they are asked for, into
    memory that lasts as long as somebody uses it. A tensor's own checksums are compared when it is first asked for, unless
    `check_all` has done so before.

    Args:
        entries: a checked index.
        section: the bytes of the weights section (mapped, or a private copy), 64-byte aligned.
    """

    def __init__(self, entries: Sequence[TensorEntry], section: _Bytes) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._section = section
        self._checked: set[str] = set()
        self._decoded: weakref.WeakValueDictionary[str, np.ndarray[Any, Any]] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        entry = self._entries[name]
        array = self._decoded.get(name)
        if array is not None:
            return array
        data = self._stored(entry) if entry.codec == "raw" else self._decode(entry)
        if name not in self._checked:
            _check(entry, [data.data])
            self._checked.add(name)
        array = data.view(numpy_dtype(entry.dtype)).reshape(entry.shape)
        if entry.codec != "raw":
            self._decoded[name] = array
        return array

    def unchecked(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """The same tensors; those that share the file's memory are handed out before their checksums are compared."""
        return _Unchecked(self)

    def where_it_lies(self, name: str) -> np.ndarray[Any, Any] | None:
        """The tensor in the file's memory, of which nothing is read; None if it is decoded for use."""
        entry = self._entries[name]
        lies = entry.codec == "raw"
        return self._stored(entry).view(numpy_dtype(entry.dtype)).reshape(entry.shape) if lies else None

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without a look at the tensor

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

    def check(self, names: Iterable[str]) -> None:
        """Compare the checksums of tensors, where that has not been done; those of large ones on every usable CPU.

        Raises:
            CorruptedFileError: with the code of the broken rule.
        """
        left = [name for name in dict.fromkeys(names) if name not in self._checked]
        if sum(self._entries[name].size for name in left) < _LARGE:
            for name in left:
                self[name]
            return
        side_by_side([partial(self.__getitem__, name) for name in left])

    def check_all(self, *, section_is_right: bool = False) -> None:
        """Check the padding and every tensor's checksums. Compressed ones are decoded piece by piece, and not kept.

        Args:
            section_is_right: its digest was compared: tensors that lie in it as they are, or were checked when they were decoded, need no
                other.

        Raises:
            CorruptedFileError: names the tensor.
        """
        end = 0
        for entry in self._entries.values():
            check_zero(self._section[end : entry.off].tobytes(), end, code="E_WEIGHTS_PADDING")
            as_it_is = entry.codec == "raw" and entry.dtype != "bool"
            if not (section_is_right and (as_it_is or entry.name in self._checked)):
                _check(entry, self._pieces(entry))
            end = entry.end
        self._checked.update(self._entries)

    def damaged(self) -> list[str]:
        """Names of the tensors whose checksum is wrong, or that cannot be decoded."""
        return [name for name, entry in self._entries.items() if not self._is_intact(entry)]

    def _is_intact(self, entry: TensorEntry) -> bool:
        crc = 0
        try:
            for piece in self._pieces(entry):
                crc = zlib.crc32(piece, crc)
        except CorruptedFileError:
            return False
        return crc == entry.crc32

    def _stored(self, entry: TensorEntry) -> _Bytes:
        return self._section[entry.off : entry.end]

    def _pieces(self, entry: TensorEntry) -> Iterable[bytes | memoryview]:
        """The tensor's own bytes."""
        stored = self._stored(entry).data
        if entry.codec == "raw":
            return [stored]
        if entry.codec in HALVES:
            return _widened(self._stored(entry), entry.codec)
        return compression.pieces(stored, entry.raw, what=f"tensor {entry.name[:80]!r}", code="E_TENSOR_ZSTD")

    def _decode(self, entry: TensorEntry) -> _Bytes:
        compression.check_memory(entry.raw, what=f"tensor {entry.name[:80]!r}")
        data = aligned_empty(entry.raw)
        compression.fill(data.data, self._pieces(entry))
        return read_only(data)


class _Unchecked(Mapping[str, np.ndarray[Any, Any]]):
    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        array = self._tensors.where_it_lies(name)
        return self._tensors[name] if array is None else array

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check(entry: TensorEntry, pieces: Iterable[bytes | memoryview]) -> None:
    """Compare the checksums of a tensor's own bytes.

    Raises:
        CorruptedFileError: with the code of the broken rule.
    """
    crc, digest, most = 0, hashlib.sha256(), 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        digest.update(piece)
        if entry.dtype == "bool" and len(piece):
            most = max(most, int(np.frombuffer(piece, np.uint8).max()))
    what = f"tensor {entry.name[:80]!r}"
    hint = "fetch or compile the file again"
    if crc != entry.crc32:
        raise CorruptedFileError(f"{what} is damaged: wrong checksum", code="E_TENSOR_CRC", hint=hint)
    if digest.hexdigest() != entry.sha256:
        raise CorruptedFileError(f"{what} was changed: wrong SHA-256", code="E_TENSOR_DIGEST", hint=hint)
    if most > 1:
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

"""Encrypted sections: graph, weights and kernels under keys that one master key gives. Metadata and signature stay readable.

A section is cut into chunks of 1 MiB; each is encrypted and authenticated together with its number, whether it is the last, and what
header and metadata say of the file. Chunks cannot be changed, moved, left out or repeated, nor put into another file or section.
Every file has a random salt, and so keys of its own: encrypting the same model twice gives different files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from mlec.artifact.header import SECTIONS, Flag, Header
from mlec.artifact.sections import SECTION_ID
from mlec.artifact.signing import no_library, read_secret
from mlec.errors import CorruptedFileError, SecurityError, UsageError

CIPHERS: Final = {1: "AES-256-GCM", 2: "ChaCha20-Poly1305"}
"""Names of the ciphers by their number in the header."""
ENCRYPTED: Final = SECTIONS[1:4]
"""The sections that are encrypted."""
VARIABLE: Final = "MLEC_KEY"
"""Name of the environment variable that holds a key in base64."""

CHUNK: Final = 1 << 20
_TAG: Final = 16
_KEY_BYTES: Final = 32
_SALT_BYTES: Final = 32
_CHECK_BYTES: Final = 16
_DOMAIN: Final = b"mle:aad:v1\0"


@dataclass(frozen=True)
class EncryptionKey:
    """A master key.

    Attributes:
        secret: its 32 bytes; in no text of this object.
        cipher: what files are encrypted with, one of `CIPHERS`; those that are read say so themselves.
    """

    secret: bytes = field(repr=False)
    cipher: str = CIPHERS[1]

    def __post_init__(self) -> None:
        if not isinstance(self.secret, bytes) or len(self.secret) != _KEY_BYTES:
            raise UsageError(
                f"an encryption key is {_KEY_BYTES} bytes, got {type(self.secret).__name__} of {len(self.secret)}",
                code="E_KEY_FILE",
                hint="`mlec keygen --encryption` makes keys",
            )
        if self.cipher not in CIPHERS.values():
            raise UsageError(f"unknown cipher {self.cipher!r}", hint=f"one of {', '.join(CIPHERS.values())}")

    @property
    def number(self) -> int:
        """The cipher as the header has it."""
        return next(number for number, name in CIPHERS.items() if name == self.cipher)

    @classmethod
    def of(cls, given: EncryptionKey | bytes | str | os.PathLike[str]) -> EncryptionKey:
        """A key as users give it: itself, its 32 bytes, or the path of a file with it (as it is, or in base64).

        Raises:
            UsageError: ``E_KEY_FILE``: it is none.
            SecurityError: ``E_KEY_MODE``: others can read the file.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, bytes):
            return cls(given)
        if not isinstance(given, (str, os.PathLike)):
            raise UsageError(
                f"encryption_key takes 32 bytes or the path of a key file, got {type(given).__name__}",
                code="E_KEY_FILE",
                hint="`mlec keygen --encryption` makes keys",
            )
        data = read_secret(given)
        return cls(data if len(data) == _KEY_BYTES else _from_base64(data, os.fsdecode(given)))

    @classmethod
    def here(cls) -> EncryptionKey | None:
        """The key for files that are opened without one: that of `use_key`, or of the environment variable `VARIABLE`.

        Raises:
            UsageError: ``E_KEY_FILE``: the variable holds no key.
        """
        text = os.environ.get(VARIABLE)
        return _ambient.get() or (cls(_from_base64(text.encode(), VARIABLE)) if text else None)

    @classmethod
    def needed(cls, given: EncryptionKey | None) -> EncryptionKey:
        """The key that an encrypted file is opened with: the given one, or else that of `here`.

        Raises:
            SecurityError: ``E_KEY_MISSING``: there is none.
            UsageError: as `here`.
        """
        key = given or cls.here()
        if key is None:
            raise SecurityError(
                "the file is encrypted: its graph, weights and code cannot be read without its key",
                code="E_KEY_MISSING",
                hint=f"encryption_key=..., --key-file FILE, or the environment variable {VARIABLE}, gives it",
            )
        return key

    def text(self) -> str:
        """The secret as key files and the environment variable hold it."""
        return base64.b64encode(self.secret).decode()


_ambient: ContextVar[EncryptionKey | None] = ContextVar("encryption key", default=None)


def use_key(key: EncryptionKey | None) -> None:
    """Open files with this key from now on, where none is given; with None that of the environment counts again."""
    _ambient.set(key)


def _from_base64(data: bytes, where: str) -> bytes:
    try:
        secret = base64.b64decode(data.strip(), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) != _KEY_BYTES:
        raise UsageError(
            f"{where} holds no encryption key: 32 bytes, or those in base64", code="E_KEY_FILE",
            hint="`mlec keygen --encryption` makes keys",
        )  # fmt: skip
    return secret


@dataclass(frozen=True)
class Lock:
    """The keys of one file.

    Attributes:
        key: the master key.
        salt: 32 random bytes of the file.
        number: of the cipher.
    """

    key: EncryptionKey
    salt: bytes
    number: int

    @classmethod
    def new(cls, key: EncryptionKey) -> Lock:
        """For a new file."""
        return cls(key, secrets.token_bytes(_SALT_BYTES), key.number)

    @property
    def metadata(self) -> dict[str, str]:
        """What the metadata says of it under ``encryption``."""
        return {"salt": self.salt.hex(), "check": self._derive(b"mle:v1:check", _CHECK_BYTES).hex()}

    def check(self, claimed: str) -> None:
        """Compare the master key with the one that the file was encrypted with.

        Raises:
            SecurityError: ``E_KEY_WRONG``.
        """
        if not hmac.compare_digest(self.metadata["check"], claimed):
            raise SecurityError(
                "the file was encrypted with another key",
                code="E_KEY_WRONG",
                hint="give the key that it was saved with",
            )

    def seal(
        self, name: str, size: int, pieces: Iterable[bytes | memoryview], associated: Callable[[str], bytes]
    ) -> Iterator[bytes]:
        """The encrypted chunks of a section whose ``size`` bytes come in pieces."""
        cipher, data, left, number, chunk = self._cipher(name), associated(name), size, 0, bytearray()
        for piece in pieces:
            view = memoryview(piece)
            while view:
                taken = view[: CHUNK - len(chunk)]
                chunk += taken
                view = view[len(taken) :]
                if len(chunk) == min(CHUNK, left):
                    left -= len(chunk)
                    yield cipher.encrypt(_nonce(number, last=not left), bytes(chunk), data)
                    number += 1
                    chunk.clear()

    def open(self, name: str, stored: memoryview, memory: memoryview, associated: Callable[[str], bytes]) -> None:
        """Decrypt a section into memory of `plain_size` bytes. What is there after an error is not to be used.

        Raises:
            CorruptedFileError: ``E_AEAD_TAG``: a chunk is not what was encrypted with this key for this place of this file.
        """
        for number, chunk in enumerate(self.chunks(name, stored, len(stored), associated)):
            if chunk is None:
                raise CorruptedFileError(
                    f"the {name} section was changed: what lies at byte {number * (CHUNK + _TAG)} of it was not encrypted for that place",
                    code="E_AEAD_TAG",
                )
            memory[number * CHUNK : number * CHUNK + len(chunk)] = chunk

    def chunks(
        self, name: str, stored: memoryview, size: int, associated: Callable[[str], bytes]
    ) -> Iterator[bytes | None]:
        """The chunks of a section as they were before, in their order; None for one that is not authentic.

        Args:
            name: of the section.
            stored: its bytes, or those of them that there are.
            size: how many there were.
            associated: see `associated_data`.
        """
        from cryptography.exceptions import InvalidTag

        cipher, data = self._cipher(name), associated(name)
        for number, start in enumerate(range(0, len(stored), CHUNK + _TAG)):
            end = start + CHUNK + _TAG
            try:
                yield cipher.decrypt(_nonce(number, last=end >= size), stored[start:end], data)
            except InvalidTag:
                yield None

    def _cipher(self, name: str) -> Any:
        key = self._derive(b"mle:v1:enc:" + bytes([SECTION_ID[name]]), _KEY_BYTES)
        try:
            from cryptography.hazmat.primitives.ciphers import aead
        except ImportError as error:
            raise no_library(error) from error
        return aead.AESGCM(key) if CIPHERS[self.number].startswith("AES") else aead.ChaCha20Poly1305(key)

    def _derive(self, info: bytes, length: int) -> bytes:
        try:
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise no_library(error) from error
        return HKDF(SHA256(), length, self.salt, info).derive(self.key.secret)


def _nonce(number: int, *, last: bool) -> bytes:
    return bytes(7) + struct.pack("<IB", number, last)


def sealed_size(size: int) -> int:
    """Stored bytes of a section of ``size`` bytes."""
    return size + _TAG * -(-size // CHUNK)


def plain_size(name: str, stored: int) -> int:
    """Bytes that an encrypted section of ``stored`` bytes holds.

    Raises:
        CorruptedFileError: ``E_AEAD_SIZE``: no section has such a size.
    """
    chunks = -(-stored // (CHUNK + _TAG))
    size = stored - _TAG * chunks
    if stored and (size <= 0 or sealed_size(size) != stored):
        raise CorruptedFileError(
            f"the {name} section has {stored} bytes, which no encrypted section has", code="E_AEAD_SIZE"
        )
    return size


def associated_data(header: Header, described: bytes) -> Callable[[str], bytes]:
    """What the chunks of a section, by its name, are authenticated together with.

    Args:
        header: of the file; checksums and signature do not matter.
        described: the bytes of the metadata without its digests, which depend on the chunks.
    """
    entries = b"".join(
        struct.pack("<QQ", header.sections[name].offset, header.sections[name].size) for name in SECTIONS[:4]
    )
    return lambda name: b"".join(
        (
            _DOMAIN,
            struct.pack("<II", header.major | header.minor << 16, header.flags & ~int(Flag.SIGNED)),
            entries,
            bytes([header.digest_alg, header.aead_alg, header.codecs, SECTION_ID[name]]),
            hashlib.sha256(described).digest(),
        )
    )

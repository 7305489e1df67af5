"""Ed25519 signatures: who vouches for the code in a file.

The signature covers the header (with its own checksum and that of the header set to 0), the digest root of the metadata, and a few
attributes. The metadata holds the roots of all other sections, and padding is zero: no byte of the file is free. The file names its key by
an identity only; the key itself comes from the keyring of whoever reads it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from mlec.artifact import json_safe, limits
from mlec.artifact.header import DIGEST_SHA256_TREE, SIG_ED25519, Header
from mlec.artifact.keyring import Keyring, TrustedKey
from mlec.artifact.small_files import read_small
from mlec.errors import CorruptedFileError, RuntimeUnavailableError, SecurityError, UsageError

PASSWORD: Final = "MLEC_KEY_PASSWORD"
"""Name of the environment variable that holds the password of secret keys."""

_DOMAIN: Final = b"mle:artifact:v1\0"
_MAGIC: Final = b"MLES"
_BLOCK: Final = struct.Struct("<4sHH32s64sI")
_BLOCK_VERSION: Final = 1
_KEY_FILE_BYTES: Final = 1 << 14


class Attributes(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a signer says of a file; shown only once the signature was verified.

    Attributes:
        signer: a name for people; the key is what counts.
        created: when it was signed, as the signer wrote it. Left out by default: the same input gives the same file.
        model_name: the name of the model; a key can be trusted for some names only.
        model_version: of the model.
    """

    signer: str = ""
    created: str = ""
    model_name: str = ""
    model_version: str = ""


@dataclass(frozen=True)
class Signature:
    """The signature of an open file. A wrong one is an error when the file is opened: this one is right, or its key is not known.

    Attributes:
        key_id: identity of the key that signed, 64 hexadecimal digits.
        key: that key, as the keyring has it; None if it is not there, and the signature could not be verified.
        revoked: the keyring says that the key is not to be trusted any more.
        attributes: what the signer says; empty unless verified.
    """

    key_id: str
    key: TrustedKey | None
    revoked: bool
    attributes: Attributes

    def fault(self, now: datetime | None = None, scope: str | None = "kernels") -> str:
        """Why the signature does not let machine code run; empty if it does.

        Args:
            now: the time, by default that of this machine.
            scope: what the key must be trusted for; None: whatever it is.
        """
        if self.revoked:
            return f"signed by a key that was revoked ({self.key_id[:16]}...)"
        if self.key is None:
            return f"signed by an unknown key ({self.key_id[:16]}...)"
        fault = self.key.fault(self.attributes.model_name, now or datetime.now(UTC), scope)
        return fault and f"signed by {self.key.label}, a key that {fault}"

    def describe(self) -> dict[str, Any]:
        """The facts, ready for JSON."""
        return {
            "key_id": self.key_id,
            "verified": self.key is not None,
            "label": self.key.label if self.key else None,
            "keyring": self.key.path if self.key else None,
            "revoked": self.revoked,
            "attributes": msgspec.to_builtins(self.attributes),
            "fault": self.fault(),
        }


@dataclass(frozen=True)
class Block:
    """The signature section as it was read."""

    key_id: bytes
    signature: bytes
    attributes: bytes


@dataclass(frozen=True)
class Signer:
    """A private key, and what it vouches for.

    Attributes:
        private: the 32 bytes of the key; in no text of this object.
        attributes: what is signed beside the file.
    """

    private: bytes = field(repr=False)
    attributes: Attributes = field(default_factory=Attributes)

    @classmethod
    def of(cls, given: Signer | str | os.PathLike[str]) -> Signer:
        """A key as users give it: itself, or the path of a file with it."""
        return given if isinstance(given, cls) else cls.read(given)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: str | os.PathLike[str], ask: Callable[[], str] | None = None) -> Signer:
        """The key in a file: PEM, PKCS #8.

        Args:
            path: the file.
            ask: gives the password of a key that has one; by default it is that of the environment variable `PASSWORD`.

        Raises:
            SecurityError: ``E_KEY_MODE``: others can read the file; ``E_KEY_PASSWORD``: the password is wrong.
            UsageError: ``E_KEY_FILE``: it cannot be read, or holds no such key; ``E_KEY_PASSWORD``: no password is given.
        """
        data = read_secret(path)
        ed25519, serialization = _library("asymmetric.ed25519"), _library("serialization")
        password = _password(path, ask) if b"ENCRYPTED PRIVATE KEY" in data else None
        try:
            key = serialization.load_pem_private_key(data, password)
        except (ValueError, TypeError) as error:
            if password is not None and "password" in str(error).lower():
                raise SecurityError(
                    f"the password is not that of {os.fsdecode(path)}", code="E_KEY_PASSWORD", hint="try again"
                ) from None
            raise _no_key(path, f"it is no PEM file of a private key: {error}") from None
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise _no_key(path, f"it holds a key of another kind: {type(key).__name__}")
        return cls(key.private_bytes_raw())

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        ed25519 = _library("asymmetric.ed25519")
        public: bytes = ed25519.Ed25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()
        return public

    @property
    def key_id(self) -> str:
        """Identity of the key, 64 hexadecimal digits."""
        return key_id(self.public).hex()

    def with_defaults(self, **known: str) -> Signer:
        """The same key; attributes that are empty are taken from ``known``."""
        given = msgspec.structs.asdict(self.attributes)
        return replace(self, attributes=Attributes(**{name: given[name] or known.get(name, "") for name in given}))

    def sign(self, header: Header, metadata_root: bytes) -> bytes:
        """The signature section of a file whose header is complete but for the checksums of this section and of itself."""
        ed25519 = _library("asymmetric.ed25519")
        attributes = self.attribute_bytes()
        key = key_id(self.public)
        message = _message(header, metadata_root, key, attributes)
        signature = ed25519.Ed25519PrivateKey.from_private_bytes(self.private).sign(message)
        return _BLOCK.pack(_MAGIC, _BLOCK_VERSION, SIG_ED25519, key, signature, len(attributes)) + attributes

    def attribute_bytes(self) -> bytes:
        """The attributes as they are signed.

        Raises:
            UsageError: ``E_USAGE_JSON``: too long, or text that JSON cannot hold.
        """
        value = msgspec.to_builtins(self.attributes)
        return json_safe.dump(value, what="attributes of the signature", max_bytes=limits.ATTRIBUTE_BYTES)

    def section_size(self) -> int:
        """Bytes of the signature section."""
        return _BLOCK.size + len(self.attribute_bytes())


def key_id(public: bytes) -> bytes:
    """The 32-byte identity of a public key."""
    return hashlib.sha256(public).digest()


def parse_block(section: bytes | bytearray) -> Block:
    """Check the form of a signature section.

    Raises:
        CorruptedFileError: ``E_SIGNATURE_BLOCK``.
    """
    if len(section) >= _BLOCK.size:
        magic, version, algorithm, key, signature, length = _BLOCK.unpack_from(section)
        if (magic, version, algorithm) == (_MAGIC, _BLOCK_VERSION, SIG_ED25519) and (
            length <= limits.ATTRIBUTE_BYTES and len(section) == _BLOCK.size + length
        ):
            return Block(key, signature, bytes(section[_BLOCK.size :]))
    raise CorruptedFileError("the signature section does not have the form of one", code="E_SIGNATURE_BLOCK")


def check(section: bytes | bytearray, keyring: Keyring | None, header: Header, metadata_root: bytes) -> Signature:
    """Verify a file's signature with the key that the keyring has for it.

    Args:
        section: the signature section.
        keyring: of whoever reads the file; by default that of this user and this machine.
        header: of the file.
        metadata_root: 32-byte digest root of the metadata.

    Raises:
        SecurityError: ``E_SIGNATURE``: the signature is wrong.
        CorruptedFileError: ``E_SIGNATURE_BLOCK``; or the attributes have another form: codes of JSON, or ``E_SIGNATURE_ATTRIBUTES``.
        RuntimeUnavailableError: ``E_NO_CRYPTOGRAPHY``.
    """
    block = parse_block(section)
    keyring = Keyring.load() if keyring is None else keyring
    name = block.key_id.hex()
    key, revoked = keyring.find(name), name in keyring.revoked
    if key is None:
        return Signature(name, None, revoked, Attributes())
    ed25519 = _library("asymmetric.ed25519")
    from cryptography.exceptions import InvalidSignature

    message = _message(header, metadata_root, block.key_id, block.attributes)
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(key.public).verify(block.signature, message)
    except InvalidSignature:
        raise SecurityError(
            f"the signature is wrong: {key.label} (key {name[:16]}...) did not sign this file as it is now",
            code="E_SIGNATURE",
            hint="the file was changed after it was signed: fetch it again; nothing makes such a file load",
        ) from None
    value = json_safe.parse(block.attributes, what="attributes of the signature", max_bytes=limits.ATTRIBUTE_BYTES)
    try:
        attributes = msgspec.convert(value, Attributes, strict=True)
    except msgspec.ValidationError as error:
        raise CorruptedFileError(
            f"the attributes of the signature do not have the form of such: {error}"[:400],
            code="E_SIGNATURE_ATTRIBUTES",
        ) from None
    return Signature(name, key, revoked, attributes)


def _message(header: Header, metadata_root: bytes, key: bytes, attributes: bytes) -> bytes:
    sections = dict(header.sections)
    sections["signature"] = msgspec.structs.replace(sections["signature"], crc=0)
    signed = msgspec.structs.replace(header, sections=sections).pack()[:-4] + bytes(4)
    algorithms = struct.pack("<HH", SIG_ED25519, DIGEST_SHA256_TREE)
    return _DOMAIN + algorithms + key + signed + metadata_root + struct.pack("<I", len(attributes)) + attributes


# -- keys in files -----------------------------------------------------------------------------------------------------


def generate(password: str = "") -> tuple[bytes, bytes]:
    """A new key: the PEM text of the private one, protected by the password if there is one, and the 32 bytes of the public one."""
    ed25519, serialization = _library("asymmetric.ed25519"), _library("serialization")
    key = ed25519.Ed25519PrivateKey.generate()
    protection = (
        serialization.BestAvailableEncryption(os.fsencode(password)) if password else serialization.NoEncryption()
    )
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    return pem, key.public_key().public_bytes_raw()


def _password(path: str | os.PathLike[str], ask: Callable[[], str] | None) -> bytes:
    password = os.environ.get(PASSWORD) or (ask() if ask else "")
    if not password:
        raise UsageError(
            f"{os.fsdecode(path)} is protected by a password", code="E_KEY_PASSWORD",
            hint=f"the environment variable {PASSWORD} gives it; `mlec sign` asks for it on a terminal",
        )  # fmt: skip
    return os.fsencode(password)


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """A small file that nobody but its owner can read.

    Raises:
        SecurityError: ``E_KEY_MODE``.
        UsageError: ``E_KEY_FILE``.
    """
    try:
        info, data = read_small(path, _KEY_FILE_BYTES)
    except (OSError, ValueError, TypeError) as error:
        raise _no_key(path, getattr(error, "strerror", None) or str(error)) from None
    if info.st_mode & 0o077:
        raise SecurityError(
            f"{os.fsdecode(path)} holds a secret key, and other users may read or write it",
            code="E_KEY_MODE",
            hint=f"chmod 600 {os.fsdecode(path)}; if others can have read it, make a new key",
        )
    return data


def _no_key(path: object, why: str) -> UsageError:
    return UsageError(
        f"{path} cannot be used as a key: {why}",
        code="E_KEY_FILE",
        hint="`mlec keygen` makes keys to sign with, `mlec keygen --encryption` one to encrypt with",
    )


def _library(name: str) -> Any:
    """A module of the library that does the cryptography; what only reads and writes keys takes longer to import than all the rest."""
    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.{name}")
    except ImportError as error:
        raise no_library(error) from error


def no_library(error: ImportError) -> RuntimeUnavailableError:
    """That the library is missing."""
    return RuntimeUnavailableError(
        f"signed and encrypted .mle files need the library cryptography, which cannot be imported: {error}",
        code="E_NO_CRYPTOGRAPHY",
        hint="pip install cryptography",
    )

"""Reading saved estimators: pickles (pickle, joblib) with permission only, and skops files."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlec.errors import FrontendError, UntrustedPickleError
from mlec.frontends.base import LowerOptions

LIBRARIES = (b"sklearn", b"xgboost", b"lightgbm")
"""Libraries whose estimators a pickle may hold; torch's pickles are another frontend's."""

DECOMPRESSORS: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    (b"\x78", zlib.decompressobj),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ", lzma.LZMADecompressor),
    (b"]\x00\x00", lzma.LZMADecompressor),
)
"""What the compressed files of joblib begin with."""

SKOPS_SCHEMA = "schema.json"


def sniff(head: bytes, path: Path) -> bool:
    """Whether these first bytes are of a pickled estimator, or the file is a skops archive."""
    if head.startswith(b"PK\x03\x04"):
        return _is_skops(path)
    plain = _plain(head)
    return plain[:1] == b"\x80" and plain[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and any(name in plain for name in LIBRARIES)


def load(path: Path, options: LowerOptions) -> Any:
    """The object in the file."""
    if zipfile.is_zipfile(path):
        return _load_skops(path)
    allow_pickle(path, options)
    import joblib

    try:
        return joblib.load(path)
    except Exception as error:
        raise FrontendError(
            f"{path}: the pickle could not be read: {type(error).__name__}: {error}",
            hint="load it with the library versions that it was saved with",
        ) from error


def allow_pickle(path: Path, options: LowerOptions) -> None:
    """Raises unless the user allows executing this file."""
    trust = options.trust_pickle
    if trust is True:
        return
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    if isinstance(trust, str) and trust == digest:
        return
    raise UntrustedPickleError(
        f"{path} is a pickle: reading it would execute code that the file contains",
        hint=f"if you know where it comes from, pass trust_pickle=True (or trust_pickle={digest!r} for this file alone)",
    )


def _plain(head: bytes) -> bytes:
    """The first bytes after decompression."""
    for magic, decompressor in DECOMPRESSORS:
        if head.startswith(magic):
            try:
                return bytes(decompressor().decompress(head))
            except (zlib.error, OSError, EOFError, lzma.LZMAError):
                return b""
    return head


def _is_skops(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return SKOPS_SCHEMA in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _load_skops(path: Path) -> Any:
    try:
        from skops import io
    except ImportError as error:
        raise FrontendError(f"{path} is a skops file, and skops is not installed", hint="pip install skops") from error
    try:
        unknown = io.get_untrusted_types(file=path)
        refused = [name for name in unknown if name.partition(".")[0] not in TRUSTED_PACKAGES]
        if refused:
            raise FrontendError(
                f"{path} holds types that are not trusted: {', '.join(refused)}",
                hint="load it yourself with skops.io.load(path, trusted=[...]) and compile the object",
            )
        return io.load(path, trusted=unknown)
    except FrontendError:
        raise
    except Exception as error:
        raise FrontendError(f"{path}: the skops file could not be read: {error}") from error


TRUSTED_PACKAGES = frozenset({"sklearn", "numpy", "scipy", "xgboost", "lightgbm"})
"""Packages whose types a skops file may hold."""

"""Reading saved estimators: pickles (pickle, joblib) with permission only, and skops files (`skops_files`)."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlec.errors import FrontendError, UntrustedPickleError
from mlec.frontends.archives import entry_names
from mlec.frontends.base import LowerOptions
from mlec.frontends.pickles import digest, is_trusted
from mlec.frontends.sklearn.skops_files import SCHEMA, load_skops

LIBRARIES = (b"sklearn", b"xgboost", b"lightgbm")
"""Libraries whose estimators a pickle may hold; torch's pickles are another frontend's."""

ZIP = b"PK\3\4"
HEAD_BYTES = 1 << 16
"""That are looked at of what a compressed file holds."""
DICTIONARY_BYTES = 1 << 28
"""That a compressed file may have kept for it."""

DECOMPRESSORS: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    (b"\x78", zlib.decompressobj),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ", lambda: lzma.LZMADecompressor(memlimit=DICTIONARY_BYTES)),
    (b"]\x00\x00", lambda: lzma.LZMADecompressor(memlimit=DICTIONARY_BYTES)),
)
"""What the compressed files of joblib begin with."""


def sniff(head: bytes, path: Path) -> bool:
    """Whether these first bytes are of a pickled estimator, or the file is a skops archive."""
    if head.startswith(ZIP):
        return SCHEMA in entry_names(path)
    plain = _plain(head)
    return (
        plain[:1] == b"\x80"
        and plain[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        and any(name in plain for name in LIBRARIES)
    )


def load(path: Path, options: LowerOptions) -> Any:
    """The object in the file, which is read once: what is compared with a digest must be what is executed."""
    data = path.read_bytes()
    if data.startswith(ZIP):
        return load_skops(path, data, options)
    if not is_trusted(path, data, options.trust_pickle):
        raise UntrustedPickleError(
            f"{path} is a pickle: reading it would execute code that the file contains",
            hint=f"if you know where it comes from, pass trust_pickle=True (or trust_pickle={digest(data)!r} for this file alone)",
        )
    import joblib

    try:
        return joblib.load(io.BytesIO(data))
    except Exception as error:
        raise _unreadable(path, error) from error


def _plain(head: bytes) -> bytes:
    """The first bytes after decompression."""
    for magic, decompressor in DECOMPRESSORS:
        if head.startswith(magic):
            try:
                return bytes(decompressor().decompress(head, HEAD_BYTES))
            except (zlib.error, OSError, EOFError, lzma.LZMAError):
                return b""
    return head


def _unreadable(path: Path, error: Exception) -> FrontendError:
    return FrontendError(
        f"{path}: the model could not be read: {type(error).__name__}: {error}",
        hint="a class of it was defined in the script that saved it: define it in a module of its own, in this folder or on PYTHONPATH, "
        "and save the model again"
        if "__main__' " in str(error)
        else "load it with the library versions that it was saved with",
    )

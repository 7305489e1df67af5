"""Permission to execute a pickle: for any file, or for the one of a digest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from mlec.errors import UntrustedPickleError, UsageError


def digest(data: bytes) -> str:
    """What names a file that is to be trusted: ``"sha256:..."``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_trust(trust: bool | str) -> None:
    """Refuses what is neither a permission nor a digest.

    Raises:
        UsageError: saying what it takes.
    """
    if isinstance(trust, str) and not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", trust):
        raise UsageError(
            f"trust_pickle takes True or 'sha256:<64 digits>', got {trust[:100]!r}",
            hint="True allows any file, the digest of sha256sum that one alone",
        )


def is_trusted(path: Path, data: bytes, trust: bool | str) -> bool:
    """Whether the user allows executing these bytes. What is asked about must be what is executed: the file is read once.

    Raises:
        UntrustedPickleError: the user allows another file only.
        UsageError: as for `check_trust`.
    """
    check_trust(trust)
    if isinstance(trust, str) and trust.lower() != (found := digest(data)):
        raise UntrustedPickleError(
            f"{path} is not the file that you trust: it is {found}, not {trust.lower()}",
            hint="if this file is to be trusted too, give its digest",
        )
    return bool(trust)

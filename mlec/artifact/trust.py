"""Whether the machine code in a .mle file may run.

A file is data unless something proves where its code comes from: a key of the keyring signed it, it was built by this user (the
local ledger), or the user named its code identity. Without proof the kernels are ignored and the graph is compiled locally. A wrong
signature never gets here: such a file does not open.

The ledger is a directory ``$XDG_STATE_HOME/mlec/built`` with one file for each code identity that this user compiled;
the file holds an HMAC under a random key that only this user can read, so a planted file proves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mlec.artifact.user_folders import user_folder
from mlec.errors import SecurityError, UsageError
from mlec.runtime import logs

if TYPE_CHECKING:
    from pathlib import Path

    from mlec.artifact.reader import Artifact

WAYS_OUT: Final = (
    "trust the key that signed the file (`mlec trust add KEY.pub`), or name its code: trust=TrustDigest('sha256:...'), "
    "as `mlec inspect` shows it"
)
"""What a user can do where machine code is not trusted, beside compiling."""

_CODE_ID: Final = re.compile(r"[0-9a-f]{64}")
_KEY_BYTES: Final = 32
_DOMAIN: Final = b"mle:built:v1\0"


class TrustDigest(msgspec.Struct, frozen=True):
    """The user's word that the code with this identity may run.

    A digest and not a switch: it cannot leak to other files through a script or the environment.

    Args:
        digest: ``"sha256:"`` and the 64 hexadecimal digits of `Artifact.code_id`.
    """

    digest: str

    def __post_init__(self) -> None:
        prefix, _, code = self.digest.partition(":") if isinstance(self.digest, str) else ("", "", "")
        if prefix != "sha256" or not _CODE_ID.fullmatch(code):
            raise UsageError(
                f"{self.digest!r} is not a trust digest",
                code="E_USAGE_TRUST",
                hint="give sha256: and 64 hexadecimal digits, as `mlec inspect` shows them for the file",
            )

    @property
    def code_id(self) -> str:
        """The 64 hexadecimal digits."""
        return self.digest.partition(":")[2]


class TrustDecision(NamedTuple):
    """May the embedded kernels run, and why (not)?"""

    native: bool
    reason: str


def named_trust(given: str | TrustDigest) -> str | TrustDigest:
    """The trust that a user names, where a text that begins with ``sha256:`` is a `TrustDigest`."""
    return TrustDigest(given) if isinstance(given, str) and given.startswith("sha256:") else given


def decide(artifact: Artifact, trust: str | TrustDigest = "auto") -> TrustDecision:
    """Decide about the kernels of an open file. The one place where this is decided; executes nothing.

    Args:
        artifact: the file.
        trust: ``"auto"``: what a trusted key signed, or this user built; `TrustDigest`: the code with that identity.

    Raises:
        UsageError: ``trust`` is something else.
        SecurityError: ``E_TRUST_DIGEST``: the file does not hold the code that the user trusts.
    """
    decision = _decide(artifact, trust)
    logs.info(__name__, "%s: kernels %s: %s", artifact.path, "run" if decision.native else "ignored", decision.reason)
    return decision


def _decide(artifact: Artifact, trust: object) -> TrustDecision:
    if isinstance(trust, TrustDigest):
        if trust.code_id != artifact.code_id:
            raise SecurityError(
                f"the code in {artifact.path} is not the one you trust: expected sha256:{trust.code_id}, "
                f"found sha256:{artifact.code_id}",
                code="E_TRUST_DIGEST",
                hint="compare where the file comes from; without a digest it runs compiled locally",
            )
    elif trust != "auto":
        raise UsageError(
            f"trust must be 'auto' or a TrustDigest, not {trust!r}",
            code="E_USAGE_TRUST",
            hint="trust='auto' runs what a trusted key signed and what you built; TrustDigest('sha256:...') names the code of one file",
        )
    if not artifact.kernels:
        return TrustDecision(False, "the file carries no kernels")
    if isinstance(trust, TrustDigest):
        logs.warning(__name__, "%s: running its machine code because you trust %s", artifact.path, trust.digest)
        return TrustDecision(True, "you trust its code identity")
    signature = artifact.signature
    fault = "unsigned" if signature is None else signature.fault()
    if signature is not None and signature.key is not None and not fault:
        return TrustDecision(True, f"signed by {signature.key.label} (key {signature.key_id[:16]}...)")
    if not is_built_here(artifact.code_id):
        return TrustDecision(False, f"{fault}, and not built by this user on this machine")
    if artifact.writable_by_others:
        return TrustDecision(False, "other users can write to the file or its directory")
    return TrustDecision(True, "built by this user on this machine")


def not_native(path: str | os.PathLike[str], reason: str, hint: str = WAYS_OUT) -> SecurityError:
    """The error for a file whose own machine code must run and may not."""
    return SecurityError(
        f"the machine code in {os.fsdecode(path)} does not run here: {reason}", code="E_UNTRUSTED_NATIVE", hint=hint
    )


def check_signed(artifact: Artifact) -> None:
    """Refuse a file that nobody vouches for.

    Raises:
        SecurityError: ``E_UNSIGNED``: no key of the keyring signed it, or the one that did does not count for it.
    """
    signature = artifact.signature
    fault = "it is not signed" if signature is None else signature.fault(scope=None)
    if fault:
        raise SecurityError(
            f"{artifact.path} needs the signature of a key that is trusted here: {fault}",
            code="E_UNSIGNED",
            hint="fetch it from whoever signs it; `mlec trust add KEY.pub` trusts a key, `mlec inspect` shows who signed",
        )


def record_built(code_id: str) -> bool:
    """Remember that this user built the code with this identity.

    Returns:
        False when the ledger cannot be written (no home, read-only home). That is no error: the model then is
        compiled again where it is loaded.
    """
    _check_code_id(code_id)
    state = state_directory()
    if state is None:
        return False
    try:
        (state / "built").mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_key(state / "key")
        key = _read_private(state / "key")
        if key is None or len(key) != _KEY_BYTES:
            return False
        _write_private(state / "built" / code_id, _proof(key, code_id), replace=True)
    except OSError as error:
        logs.info(__name__, "the ledger of built models cannot be written: %s", error)
        return False
    return True


def is_built_here(code_id: str) -> bool:
    """Whether the ledger proves that this user built the code with this identity."""
    _check_code_id(code_id)
    state = _state()
    if state is None:
        return False
    key = _read_private(f"{state}/key")
    proof = _read_private(f"{state}/built/{code_id}")
    if key is None or proof is None or len(key) != _KEY_BYTES:
        return False
    return hmac.compare_digest(proof, _proof(key, code_id))


def _check_code_id(code_id: str) -> None:
    # The identity becomes a file name.
    if not isinstance(code_id, str) or not _CODE_ID.fullmatch(code_id):
        raise UsageError(
            f"{code_id!r} is not a code identity of 64 hexadecimal digits",
            code="E_USAGE_TRUST",
            hint="`mlec inspect model.mle` shows it as code id",
        )


def state_directory() -> Path | None:
    """Where this user's mlec keeps what it learns: ``$XDG_STATE_HOME/mlec``; None where there is no home."""
    from pathlib import Path  # loading a model makes none: it takes longer than all the rest here

    state = _state()
    return None if state is None else Path(state)


def _state() -> str | None:
    return user_folder("XDG_STATE_HOME", ".local/state")


def _proof(key: bytes, code_id: str) -> bytes:
    return hmac.digest(key, _DOMAIN + code_id.encode(), hashlib.sha256)


def _make_key(path: Path) -> None:
    if not path.exists():
        _write_private(path, os.urandom(_KEY_BYTES), replace=False)


def _write_private(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file of mode 0600 that appears whole. Without ``replace`` an existing file wins."""
    import tempfile  # looking at the ledger writes none

    fd, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        if replace:
            os.replace(temporary, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _read_private(path: str | Path) -> bytes | None:
    """Content of a small file, if it is this user's and nobody else can read or write it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            return None
        return os.read(fd, _KEY_BYTES + 1)
    finally:
        os.close(fd)

"""Changes the user's keyring. What loads a model only reads it (`mlec.artifact.keyring`)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlec.artifact.keyring import SYSTEM, Keyring, TrustedKey, is_entry, keys_in, revoked_in, user_directory
from mlec.errors import UsageError, WriteError


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """What the system refuses in between is that the keyring cannot be written."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"the keyring in {user_directory()} cannot be written: {error.strerror or error}",
            hint="free some space, or set XDG_CONFIG_HOME to a directory that this user may write to",
        ) from error


@_writing()
def add(key: TrustedKey) -> Path:
    """Put a key into the user's keyring.

    Returns:
        The new file.

    Raises:
        UsageError: there is no home, or the key is there already, or was revoked.
        WriteError: the keyring cannot be written; so do `remove` and `revoke`.
    """
    home = _home()
    known = next((found for found in keys_in(str(home)) if found.public == key.public), None)
    if known is not None:
        raise UsageError(
            f"the key is trusted already, as {known.label} in {known.path}",
            hint=f"`mlec trust remove {known.label}` first, to trust it in another way",
        )
    if key.key_id in Keyring.load().revoked:
        raise UsageError(
            "the key was revoked, and counts nowhere",
            hint=f"where that is a mistake, take its line out of revoked_keys in {home}, or in {SYSTEM}, first",
        )
    folder = home / "trusted_keys.d"
    for directory in (home, folder):  # the mode counts for the last part of a path only
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{key.label}-{key.key_id[:16]}.pub"
    _replace(path, key.line() + "\n")
    return path


@_writing()
def remove(key: TrustedKey) -> None:
    """Take a key out of the user's keyring."""
    path = Path(key.path)
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not is_entry(line) or TrustedKey.parse(line).public != key.public]
    if any(map(is_entry, kept)):
        _replace(path, "\n".join(kept) + "\n")
    else:
        path.unlink()


@_writing()
def revoke(key_id: str) -> Path:
    """Note that a key counts no more, wherever it is trusted.

    Returns:
        The file that says so.
    """
    home = _home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    known = sorted({*revoked_in(str(home)), key_id})
    _replace(home / "revoked_keys", "".join(f"{name}\n" for name in known))
    return home / "revoked_keys"


def _home() -> Path:
    home = user_directory()
    if home is None:
        raise UsageError("there is no home directory for a keyring", hint="set XDG_CONFIG_HOME")
    return Path(home)


def _replace(path: Path, text: str) -> None:
    """Write a file that appears whole, and that only this user can write to."""
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(fd, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise

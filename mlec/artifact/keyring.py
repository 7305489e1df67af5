"""The keys whose signatures this user trusts.

Each is a line ``mle-ed25519 KEY LABEL [names=GLOB] [scope=kernels,data] [not-before=DATE] [not-after=DATE]`` of a ``.pub`` file in
``$XDG_CONFIG_HOME/mlec/trusted_keys.d`` or ``/etc/mlec/trusted_keys.d``; KEY is the public key in base64. Beside these directories, files
``revoked_keys`` list the identities of keys that count no more. Of several lines with the same key the first counts, the user's own before
those of the machine. What another user could have written is an error, not a key.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from mlec.artifact.small_files import read_small
from mlec.artifact.user_folders import user_folder
from mlec.errors import SecurityError

SYSTEM: Final = "/etc/mlec"
"""Where the administrator puts keys for all users."""
SCOPES: Final = ("kernels", "data")
"""What a key can be trusted for: machine code, or no more than to say where a file comes from."""

_KIND: Final = "mle-ed25519"
_LABEL: Final = re.compile(r"[\w.@+-]{1,64}", re.ASCII)
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")
_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class TrustedKey:
    """One key of the keyring.

    Attributes:
        public: its 32 bytes.
        label: the user's name for it.
        names: pattern of the model names that it may sign, as in a shell; all by default.
        scope: some of `SCOPES`.
        not_before, not_after: when it is valid; None for no limit.
        path: the file that it stands in.
    """

    public: bytes
    label: str
    names: str = "*"
    scope: tuple[str, ...] = SCOPES
    not_before: datetime | None = None
    not_after: datetime | None = None
    path: str = ""

    @property
    def key_id(self) -> str:
        """Its identity: SHA-256 of the public key, 64 hexadecimal digits."""
        return hashlib.sha256(self.public).hexdigest()

    @classmethod
    def parse(cls, line: str, path: str = "") -> TrustedKey:
        """A line of a keyring file.

        Raises:
            ValueError: it has another form; says which.
        """
        kind, *words = line.split()
        if kind != _KIND or len(words) < 2:
            raise ValueError(f"it must read {_KIND} KEY LABEL ...")
        public = base64.b64decode(words[0], validate=True)
        if len(public) != 32:
            raise ValueError(f"a key has 32 bytes, not {len(public)}")
        if not _LABEL.fullmatch(words[1]):
            raise ValueError(f"the label {words[1]!r} must be 1 to 64 letters, digits or any of . _ @ + -")
        options = {}
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name not in ("names", "scope", "not-before", "not-after") or not value or name in options:
                raise ValueError(f"{word!r} is none of its options, or comes twice")
            options[name] = value
        scope = tuple(options.get("scope", ",".join(SCOPES)).split(","))
        if not set(scope) <= set(SCOPES):
            raise ValueError(f"the scope must be of {', '.join(SCOPES)}")
        return cls(
            public, words[1], options.get("names", "*"), scope, _time(options.get("not-before"), timedelta()),
            _time(options.get("not-after"), timedelta(days=1)), path,
        )  # fmt: skip

    def line(self) -> str:
        """The line that `parse` reads."""
        words = [_KIND, base64.b64encode(self.public).decode(), self.label]
        words += [f"names={self.names}"] * (self.names != "*") + [f"scope={','.join(self.scope)}"] * (
            self.scope != SCOPES
        )
        for name, time in (("not-before", self.not_before), ("not-after", self.not_after)):
            words += [f"{name}={time.isoformat()}"] if time else []
        return " ".join(words)

    def fault(self, model_name: str, now: datetime, scope: str | None) -> str:
        """Why the key does not vouch for a model with that name, or for its ``scope`` if given; empty if it does."""
        if scope is not None and scope not in self.scope:
            return f"is trusted for {', '.join(self.scope)} only"
        if self.not_before is not None and now < self.not_before:
            return f"is not valid before {self.not_before.isoformat()}"
        if self.not_after is not None and now >= self.not_after:
            return f"expired on {self.not_after.isoformat()}"
        if not fnmatch.fnmatchcase(model_name, self.names):
            return f"is trusted for models named {self.names} only, this one is named {model_name!r:.80}"
        return ""


@dataclass(frozen=True)
class Keyring:
    """All keys and revocations that count for this user."""

    keys: tuple[TrustedKey, ...] = ()
    revoked: frozenset[str] = frozenset()

    @classmethod
    def load(cls) -> Keyring:
        """That of this user and this machine.

        Raises:
            SecurityError: ``E_KEYRING``: another user could have written it, or a line does not read; nothing is skipped, as that may
                be what revokes a key.
        """
        keys: list[TrustedKey] = []
        revoked: set[str] = set()
        for home in filter(None, (user_directory(), SYSTEM)):
            if (info := _state(home)) is None:
                continue
            _check_private(home, info)
            keys += keys_in(home)
            revoked.update(revoked_in(home))
        return cls(tuple(keys), frozenset(revoked))

    def find(self, key_id: str) -> TrustedKey | None:
        """The first key with that identity."""
        return next((key for key in self.keys if key.key_id == key_id), None)


def user_directory() -> str | None:
    """Where this user's settings lie: ``$XDG_CONFIG_HOME/mlec``; None where there is no home."""
    return user_folder("XDG_CONFIG_HOME", ".config")


def keys_in(home: str) -> Iterator[TrustedKey]:
    """The keys that a directory of settings has."""
    folder = f"{home}/trusted_keys.d"
    if (info := _state(folder)) is None:
        return
    _check_private(folder, info)
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pub"))
    except OSError as error:
        raise _unreadable(folder, error) from None
    for name in names:
        path = f"{folder}/{name}"
        for number, line in _entries(path):
            try:
                key = TrustedKey.parse(line, path)
            except ValueError as error:
                raise _unsafe(path, f"line {number} does not read: {error}") from None
            yield key


def revoked_in(home: str) -> Iterator[str]:
    """The identities of keys that a directory of settings says not to trust."""
    path = f"{home}/revoked_keys"
    for number, line in _entries(path):
        if not _KEY_ID.fullmatch(line):
            raise _unsafe(path, f"line {number} is not the identity of a key, 64 hexadecimal digits")
        yield line


def _entries(path: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is no comment."""
    try:
        info, data = read_small(path, _FILE_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from None
    _check_private(path, info)
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise _unsafe(path, "it is no text in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if is_entry(line):
            yield number, line.strip()


def is_entry(line: str) -> bool:
    """Whether a line says something to us."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _state(directory: str) -> os.stat_result | None:
    """What the system says of a directory; None if there is none."""
    try:
        return os.stat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(directory, error) from None


def _unreadable(path: str, error: OSError) -> SecurityError:
    return _unsafe(
        path,
        f"it cannot be read: {error.strerror}",
        "let this user read it, or set XDG_CONFIG_HOME to where this user's keyring is: no signature counts before that",
    )


def _check_private(path: str, info: os.stat_result) -> None:
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unsafe(path, "other users can write to it", f"chmod go-w {path}, after a look at what is in it")
    if info.st_uid not in (os.geteuid(), 0):
        raise _unsafe(path, "it belongs to another user", "keys must be this user's, or the administrator's")


def _unsafe(path: str, why: str, hint: str = "mend or remove it: no signature counts before that") -> SecurityError:
    return SecurityError(f"the keyring cannot be trusted: {path}: {why}", code="E_KEYRING", hint=hint)


def _time(text: str | None, whole_day: timedelta) -> datetime | None:
    """A date (with ``whole_day`` added) or a time; of a time without a zone, UTC counts.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    try:
        return time + (whole_day if len(text) <= 10 else timedelta())
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)  # no day follows the last one that there is

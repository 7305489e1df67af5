"""What was measured on this machine, in small files below the user's state directory.

The name of a file is a digest of all that the measurement depends on. It appears whole. One that cannot be read, or says anything else than
is expected, counts as none and is written anew.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from mlec.artifact.atomic import replace_file
from mlec.errors import WriteError

logger = logging.getLogger("mlec")

LONGEST = 1 << 16
"""Bytes of a file; what is longer is none of ours."""

T = TypeVar("T", bound=msgspec.Struct)


class StateFiles(Generic[T]):
    """Measurements by the text of what they depend on.

    Args:
        folder: where the files lie; None remembers nothing.
        kind: what they hold; its fields say what a file may say.
    """

    def __init__(self, folder: Path | None, kind: type[T]) -> None:
        self.folder = folder
        self._kind = kind

    def recall(self, key: str) -> T | None:
        """What is known under a key; None for nothing, and for a file that is damaged."""
        if self.folder is None:
            return None
        try:
            with self._path(key).open("rb") as file:
                return msgspec.json.decode(file.read(LONGEST), type=self._kind)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            logger.debug("no measurement: %s", error)
            return None

    def keep(self, key: str, found: T) -> None:
        """Remembers a measurement. That it cannot be written is no error: it will be made again."""
        if self.folder is None:
            return
        content = msgspec.json.encode(found)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path(key), len(content), lambda: [content])
        except (OSError, WriteError) as error:
            logger.info("a measurement cannot be kept: %s", error)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

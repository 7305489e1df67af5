"""Imports of other packages without what those would import in turn, for the sake of time."""

from __future__ import annotations

import sys
from _thread import get_ident  # `threading` takes as long to import as what is hidden for its time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class Hidden:
    """Import finder that makes one package look uninstalled, to the thread that entered the ``with`` block only."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.thread = get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == self.package and get_ident() == self.thread:
            raise ModuleNotFoundError(f"{name} is hidden during this import", name=name)
        return None

    # Another thread may be walking the list of finders, and would skip one if it shrank under it: the list is replaced.

    def __enter__(self) -> None:
        sys.meta_path = [self, *sys.meta_path]

    def __exit__(self, *exception: object) -> None:
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]

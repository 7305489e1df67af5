"""Graphs in text form (``.mlet``) as model files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mlec.errors import IRError, ParseError
from mlec.ir import Graph, parse_graph
from mlec.ir.op import Array

SEPARATOR = "\n// -----"
"""Ends the graph of a file; a golden test has the graph after the passes below it."""

_BEGINS = re.compile(rb"(?:\s+|//[^\n]*\n)*+graph\s*@")


def is_graph(head: bytes) -> bool:
    """Whether a file with these first bytes holds a graph."""
    return _BEGINS.match(head) is not None


def decoded(data: bytes, path: Path) -> str:
    """The text of a file.

    Raises:
        ParseError: it is none.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ParseError(f"{path} is not text", hint="give a .mlet or .mle file") from error


def parse_file(text: str, path: Path, constants: Mapping[str, Array] | None = None) -> Graph:
    """The first graph of the text of a file.

    Raises:
        IRError: with the path where there is no better place. ``E_CONSTANT``: the text names an array that ``constants`` lacks.
    """
    try:
        return parse_graph(text.partition(SEPARATOR)[0], constants)
    except IRError as error:
        error.loc = error.loc or path
        if error.code == "E_CONSTANT" and constants is None:
            error.hint = (
                "text holds constants of one number only: build the graph in Python, where weights are arrays, "
                "and give it to mlec.compile; `mlec opt` puts random numbers for them"
            )
        raise

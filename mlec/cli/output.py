"""What commands print: tables and text for people, one JSON document for programs, errors on stderr."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from mlec.errors import MlecError
from mlec.wording import visible

WIDTH = 120
"""Columns of a table where the output is no terminal."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table as wide as the terminal, or else `WIDTH`: cells are wrapped, nothing is cut.

    The columns named in ``right`` are aligned to the right, and the cells that a row lacks are empty.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(visible(str(cell)) for cell in row))
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    console = Console(width=width, highlight=False, emoji=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Facts by name; a fact of several lines keeps its indent, an empty one is left out."""
    for name, fact in pairs:
        lines = visible(str(fact)).splitlines()
        for i, line in enumerate(lines):
            click.echo(f"{name if not i else '':<10} {line}".rstrip())


def print_json(document: Any) -> None:
    """Strict JSON: a NaN or infinity, which JSON lacks, becomes null."""
    click.echo(json.dumps(plain(document), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def print_error(error: MlecError) -> None:
    label = click.style(f"error[{error.code}]:", fg="red", bold=True)
    click.echo(f"{label} {error.render()}", err=True)


_OPTIONS = (
    (r"trust_pickle=True", "--trust-pickle"),
    (r"trust_pickle='(sha256:\w+)'", r"--trust-pickle \1"),
    (r"model_class='([^']*)'", r"--model-class \1"),
    (r"example_inputs=(?:\([^)]*\)|\w+)", "--example FILE"),
    (r"dynamic_batch=False", "--fixed-batch"),
    (r"validate=False", "--no-validate"),
    (r"precision='(\w+)'", r"--precision \1"),
    (r"trust=TrustDigest\('(sha256:[^']*)'\)", r"--trust \1"),
    (r"\btarget=[\"'](\w+)[\"']", r"--target \1"),
)
_SHAPE = re.compile(r"input_shapes=\{[\"'](\w+)[\"']: [(\[]([^)\]]*)[)\]]\}")


def as_options(hint: str) -> str:
    """A hint of the library, with options of the command line where it names arguments of functions."""
    hint = _SHAPE.sub(lambda m: f"--input-shape {m[1]}={re.sub('[^A-Za-z0-9_,*+-]', '', m[2])}", hint)
    for argument, option in _OPTIONS:
        hint = re.sub(argument, option, hint)
    return hint


def size_text(size: float) -> str:
    """Bytes for people: ``"1.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def time_text(milliseconds: float) -> str:
    """A duration for people: ``"12.3 us"``."""
    return f"{milliseconds * 1000:.1f} us" if milliseconds < 1 else f"{milliseconds:.2f} ms"

"""Arrays and tables in files: what `mlec run` reads and writes."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlec.artifact.atomic import replace_file
from mlec.cli.output import plain
from mlec.errors import InputError, UsageError, WriteError
from mlec.wording import plural

Array = NDArray[Any]

READABLE = ".npy, .npz, .csv, .parquet"


def read_inputs(path: Path) -> Any:
    """Inputs of a model.

    Returns:
        ``.npy``: the array. ``.npz``: a mapping from names to arrays, or a list where they were saved without names. ``.csv``,
        ``.parquet``: a DataFrame; a CSV whose first row holds numbers only has no header, and one whose first row holds some is refused
        where the second has its numbers in the same columns.

    Raises:
        InputError: for a file that is missing, of another kind, or not what its ending says.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _read_numpy, ".npz": _read_numpy, ".csv": _read_csv, ".parquet": _read_parquet,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: inputs are read from {READABLE}", code="E_INPUT_FILE", hint="convert the file")
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for somebody to write to it
        raise InputError(f"{path} is a directory, device or pipe", code="E_INPUT_FILE", hint="give the path of a file")
    try:
        if path.stat().st_size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, more than the memory of this machine",
                code="E_INPUT_FILE",
                hint="split the file; a damaged file may only seem large",
            )
        return reader(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise InputError(f"cannot read {path}: {reason}", code="E_INPUT_FILE", hint="check the path") from error


def examples(path: Path | None) -> tuple[Any, ...] | dict[str, Any] | None:
    """Example inputs for compiling: one entry for each input, or by name, those with dotted names nested."""
    if path is None:
        return None
    found = read_inputs(path)
    if isinstance(found, dict):
        from mlec.frontends.example_inputs import nested

        return nested(found)
    return tuple(found) if isinstance(found, list) else (found,)


def _read_numpy(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(6)
    if head and not head.startswith((b"\x93NUMPY"[: len(head)], b"PK")):  # numpy takes anything else for a pickle
        raise InputError(
            f"{path} is no file of numpy arrays: it starts with {head[:4].hex(' ')}", code="E_INPUT_FILE",
            hint="save the inputs with numpy.save or numpy.savez",
        )  # fmt: skip
    try:
        # Pickles inside would be executed.
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            arrays: dict[str, Array] = {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if not path.stat().st_size:
            raise InputError(f"{path} is empty", code="E_INPUT_FILE", hint="save the inputs again") from error
        pickled = "pickle" in str(error)
        raise InputError(
            f"{path} holds no plain numpy arrays: {error}", code="E_INPUT_FILE",
            hint="arrays of Python objects are not read, since they are pickles: save text as .csv or .parquet" if pickled
            else "the file is damaged or cut off: save it again with numpy.save or numpy.savez",
        ) from error  # fmt: skip
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"{path} is an archive of other things than numpy arrays, such as {name!r}", code="E_INPUT_FILE",
                hint="save the inputs with numpy.savez",
            )  # fmt: skip
    unnamed = all(name == f"arr_{i}" for i, name in enumerate(arrays))
    return list(arrays.values()) if unnamed else arrays


def _read_csv(path: Path) -> Any:
    pandas = _pandas()
    try:
        header = None if _has_no_header(path) else "infer"
        return pandas.read_csv(path, header=header, index_col=False, encoding="utf-8-sig")
    except (ValueError, csv.Error) as error:  # a parser's or a decoder's error
        raise InputError(
            f"{path} is not a CSV file: {error}", code="E_INPUT_FILE",
            hint="save the table as UTF-8 text, with a header and with commas between the cells",
        ) from error  # fmt: skip


def _has_no_header(path: Path) -> bool:
    """Whether the first row holds numbers only.

    Raises:
        InputError: the cells are separated by something else than commas, two columns have one name (pandas would rename the second), or
            not every row has as many cells as the first (pandas would shift or fill it without a word).
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        first = next(rows, [])
        no_header = bool(first) and all(map(_is_number, first))
        if len(first) > 1 and not first[-1].strip():
            raise InputError(
                f"{path}, line 1: the last of its {len(first)} columns has no name", code="E_INPUT_FILE",
                hint="remove the commas at the ends of the lines, or name the column",
            )  # fmt: skip
        twice = [] if no_header else [name for i, name in enumerate(first) if name in first[:i]]
        if twice:
            raise InputError(
                f"{path}, line 1: the column {twice[0]!r} occurs twice", code="E_INPUT_FILE", hint="give each column a name of its own"
            )  # fmt: skip
        start, blank = rows.line_num + 1, 0
        for position, row in enumerate(rows):
            if not position:
                _check_separator(path, ",".join(first), ",".join(row))
                _check_header(path, first, row)
            if not row or (len(row) == 1 and row[0].isspace()):
                blank = blank or start  # at the end of the file it is no row
            elif blank or len(row) != len(first):
                line, found = (blank, 0) if blank else (start, len(row))
                wanted = f"{plural(len(first), 'cell')}, as in {'the first row' if no_header else 'the header'}"
                raise InputError(
                    f"{path}, line {line}: expected {wanted}, got {found}", code="E_INPUT_FILE",
                    hint="each row needs one cell for each column, empty where the value is missing; text with commas needs quotes",
                )  # fmt: skip
            start = rows.line_num + 1
    return no_header


def _check_header(path: Path, first: list[str], second: list[str]) -> None:
    """Refuses a first row that reads like the second: its numbers and words stand in the same columns, so it is no header."""
    numbers = [_is_number(cell) for cell in first]
    if any(numbers) and not all(numbers) and numbers == [_is_number(cell) for cell in second]:
        raise InputError(
            f"{path}, line 1: expected the names of the columns, got what looks like a row of them: {','.join(first)[:60]}",
            code="E_INPUT_FILE",
            hint="put a row of names first; where these are the names, save the table as .parquet",
        )


def _check_separator(path: Path, first: str, second: str) -> None:
    """Refuses a table whose header and first row have another separator, the same number of times."""
    for name, separator in (("semicolons", ";"), ("tabs", "\t"), ("bars", "|")):
        if separator in first and first.count(separator) == second.count(separator):
            raise InputError(
                f"{path}: the cells are separated by {name}, expected commas", code="E_INPUT_FILE",
                hint="save the table again with commas between the cells, and points in the numbers",
            )  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> Any:
    pandas = _pandas()
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory")
    try:
        return pandas.read_parquet(path)
    except ImportError as error:
        raise _missing("pyarrow") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not a Parquet file: {error}", code="E_INPUT_FILE", hint="check the file"
        ) from error


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise _missing("pandas") from error
    return pandas


def _missing(package: str) -> UsageError:
    return UsageError(
        f"this file needs the package {package!r}", code="E_MISSING_PACKAGE",
        hint=f"pip install {package}, or save the inputs as .npy",
    )  # fmt: skip


def make_folder(path: Path) -> None:
    """Makes a folder for files, and those that it is in, where they are not there yet.

    Raises:
        WriteError: something else has its name, or it may not be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        exists = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file has this name, or one that it lies in" if exists else getattr(error, "strerror", "") or error
        raise WriteError(
            f"cannot make the folder {path}: {reason}", code="E_WRITE_FOLDER", hint="name another folder"
        ) from error


def write_outputs(path: Path, outputs: Mapping[str, Array]) -> None:
    """Writes results by the ending of the path; the file appears only once it is complete.

    Raises:
        UsageError: for an ending that cannot hold these results.
        WriteError: when the file cannot be written.
    """
    content = writer_for(path)(path, outputs)
    replace_file(path, len(content), lambda: [content])


def writer_for(path: Path) -> Callable[[Path, Mapping[str, Array]], bytes]:
    """What turns results into the content of a file of this ending.

    Raises:
        UsageError: for an ending that is not known.
    """
    writers = {".npy": _npy, ".npz": _npz, ".csv": _csv, ".json": _json}
    if path.suffix.lower() not in writers:
        raise UsageError(f"{path}: results are written as {', '.join(writers)}", hint="choose one of these endings")
    return writers[path.suffix.lower()]


def _npy(path: Path, outputs: Mapping[str, Array]) -> bytes:
    if len(outputs) != 1:
        raise UsageError(
            f"{path}: the results are {plural(len(outputs), 'array')} ({', '.join(outputs)}), a .npy file holds one",
            hint="write .npz, or choose one with --method",
        )
    buffer = io.BytesIO()
    np.save(buffer, _without_objects(next(iter(outputs.values()))), allow_pickle=False)
    return buffer.getvalue()


def _npz(path: Path, outputs: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: _without_objects(array) for name, array in outputs.items()})
    return buffer.getvalue()


def _csv(path: Path, outputs: Mapping[str, Array]) -> bytes:
    columns: dict[str, list[Any]] = {}
    for name, array in outputs.items():
        if array.ndim not in (1, 2):
            raise UsageError(
                f"{path}: {name} has {array.ndim} dimensions, a table holds 1 or 2", hint="write .npz or .json"
            )
        if array.ndim == 1:
            columns[name] = array.tolist()
        else:
            columns |= {f"{name}_{i}": column.tolist() for i, column in enumerate(array.T)}
    if len({len(column) for column in columns.values()}) > 1:
        raise UsageError(f"{path}: the results differ in their number of rows", hint="write .npz or .json")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _json(path: Path, outputs: Mapping[str, Array]) -> bytes:
    return json.dumps(plain(outputs), allow_nan=False).encode()


def _without_objects(array: Array) -> Array:
    """Labels kept as Python objects become text, which files can hold without a pickle."""
    return array.astype(str) if array.dtype == object else array

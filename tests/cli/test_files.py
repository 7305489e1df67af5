"""Files of inputs: what is read, and what is refused rather than read wrongly."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlec.cli.files import read_inputs
from mlec.errors import FrontendError, InputError, UsageError
from mlec.frontends.base import LowerOptions
from mlec.frontends.example_inputs import for_model, nested
from mlec.frontends.select import load_model_file


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a,b\n1,2,\n3,4,\n", "line 2: expected 2 cells, as in the header, got 3"),
        ("a,b\n1,2\n3\n", "line 3: expected 2 cells, as in the header, got 1"),
        ("a,b\n0,1,2\n", "line 2: expected 2 cells, as in the header, got 3"),
        ('a,b\n"two\nlines",2\n3\n', "line 4: expected 2 cells"),
        ("1,2\n3,4,5\n", "line 2: expected 2 cells, as in the first row, got 3"),
        ("a,b,\n1,2,\n", "line 1: the last of its 3 columns has no name"),
        ("a\n1\n\n2\n", "line 3: expected 1 cell, as in the header, got 0"),
        ("a,b,a\n1,2,3\n", "line 1: the column 'a' occurs twice"),
    ],
)
def test_a_row_that_does_not_fit_the_header_is_refused(tmp_path: Path, text: str, fact: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_inputs(path)
    assert caught.value.code == "E_INPUT_FILE"
    assert caught.value.message.startswith(f"{path}, {fact}")


@pytest.mark.parametrize("text", ["a;b\n1;2\n", "a;b\n1,5;2,5\n", "1,5;2\n1,5;2\n", "a\tb\n1\t2\n", "a|b\n1|2\n"])
def test_other_separators_than_commas_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"separated by (semicolons|tabs|bars), expected commas"):
        read_inputs(path)
    path.write_text("a;b,c\n1,x;y;z\n")
    assert read_inputs(path).columns.tolist() == ["a;b", "c"], "as text they mean nothing"


def test_a_first_row_that_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("3,male,22.5\n1,female,38\n")
    with pytest.raises(InputError, match=r"line 1: expected the names of the columns, .*: 3,male,22\.5"):
        read_inputs(path)
    path.write_text("sex,2019,2020\nmale,1,2\n")
    with pytest.raises(InputError, match="parquet"):
        read_inputs(path)
    path.write_text("age,2019,2020\n30,1,2\n")
    assert read_inputs(path).columns.tolist() == ["age", "2019", "2020"], "no number in the first column: a header"


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(InputError, match="pipe"):
        read_inputs(tmp_path / "x.csv")
    with pytest.raises(FrontendError, match="pipe"):
        load_model_file(tmp_path / "x.csv", LowerOptions())


def test_text_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(InputError, match="utf-8") as caught:
        read_inputs(path)
    assert "UTF-8" in str(caught.value.hint)


def test_tables_that_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ufeffa,b\r\n1,\r\n"x, y",2\r\n\r\n', encoding="utf-8")
    table = read_inputs(path)
    assert table.columns.tolist() == ["a", "b"]
    assert table["a"].tolist() == ["1", "x, y"]
    assert table["b"].isna().tolist() == [True, False]
    path.write_text("1,2\n3,4")
    np.testing.assert_array_equal(read_inputs(path), [[1, 2], [3, 4]])


def test_hints_of_arrays_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        read_inputs(path)
    np.save(path, np.zeros(100))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cut off"):
        read_inputs(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="since they are pickles"):
        read_inputs(path)
    path.write_bytes(b"\x7fELF\2\1\1" + bytes(100))
    with pytest.raises(InputError, match="it starts with 7f 45 4c 46"):
        read_inputs(path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    with pytest.raises(InputError, match=r"other things than numpy arrays, such as 'notes\.txt'"):
        read_inputs(tmp_path / "x.npz")


def test_names_of_examples_tell_the_arguments(tmp_path: Path) -> None:
    class Model:
        def forward(self, x: object, extra: object, scale: object = None, shift: object = None) -> None: ...

    np.savez(tmp_path / "x.npz", **{"extra.mask": np.ones(1), "x": np.zeros(2), "extra.w": np.ones(3)})
    given = nested(read_inputs(tmp_path / "x.npz"))
    x, extra = for_model(given, Model())
    assert (x.shape, list(extra)) == ((2,), ["mask", "w"])
    assert [value is None for value in for_model({**given, "shift": x}, Model())] == [False, False, True, False]
    assert for_model({"a": 1, "b": 2}, Model()) == (1, 2), "names of no parameter: by order"
    with pytest.raises(UsageError, match=r"missing extra; unexpected y; expected x, extra") as caught:
        for_model({"x": 1, "y": 2}, Model())
    assert caught.value.code == "E_EXAMPLE_NAME"
    with pytest.raises(UsageError, match="also what it is a part or the whole of"):
        nested({"x": 1, "x.a": 2})

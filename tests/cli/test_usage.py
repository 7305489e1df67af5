"""Arguments of the functions that make no sense: a clear error says what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mlec
from mlec.errors import MlecError
from mlec.runtime import CompiledModel


def _class() -> object:
    from sklearn.linear_model import Ridge

    return mlec.compile(Ridge)


def _unknown_input() -> object:
    import torch

    return mlec.lower(torch.nn.Linear(4, 2), input_shapes={"z": ("n", 4)})


def _absent_class(tmp_path: Any) -> object:
    import torch

    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    return mlec.lower(str(tmp_path / "w.pt"), model_class="no_such_module:Net")


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (lambda: mlec.optimize(3), "E_USAGE", "optimize takes a mlec.Graph, got int"),
        (lambda: CompiledModel.save(object.__new__(CompiledModel), None), "E_USAGE", "save takes the path of a file, got NoneType"),
        (_class, "E_UNSUPPORTED_MODEL", "hint: pass an instance, fitted"),
        (_unknown_input, "E_INPUT_NAME", "hint: for example input_shapes={'input': ('n', 8)}"),
    ],
)  # fmt: skip
def test_the_error_says_what_to_give(call: Callable[[], object], code: str, words: str) -> None:
    with pytest.raises(MlecError) as caught:
        call()
    assert caught.value.code == code
    assert words in str(caught.value)


def test_examples_in_a_list_of_rows() -> None:
    from sklearn.linear_model import Ridge

    rows = [[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]]
    source = Ridge().fit(rows, [0.0, 1.0, 2.0])
    compiled = mlec.compile(source, rows)
    assert compiled.report.timing["measured"]["rows"] == 3
    assert compiled.predict(rows) == pytest.approx(source.predict(rows))


def test_a_class_that_cannot_be_imported(tmp_path: Any) -> None:
    with pytest.raises(MlecError, match="PYTHONPATH"):
        _absent_class(tmp_path)


def test_an_unknown_processor_gets_the_names_of_some() -> None:
    from mlec.backends.tvm.backend import cpu_info
    from mlec.target import Target

    with pytest.raises(MlecError, match=r"x86-64-v2, x86-64-v3, x86-64-v4"):
        cpu_info(Target.parse("cpu:foo"))

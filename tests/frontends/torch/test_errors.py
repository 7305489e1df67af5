"""What the torch frontend refuses, and what it says then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import mlec
from mlec.errors import UnsupportedModelError, UnsupportedOpError, UsageError
from mlec.frontends.base import LowerOptions
from tests.frontends.torch.common import FRONTEND, compare, lower
from tests.frontends.torch.networks import MLP, Recurrent

X = torch.randn(3, 4)


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.bessel_j0(x)  # the first line that cannot be lowered
        z = torch.digamma(x)
        return y + z


def test_all_unsupported_ops_are_listed_with_their_lines() -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        lower(Unsupported(), X)
    text = str(caught.value)
    assert caught.value.code == "E_UNSUPPORTED_OP"
    assert text.startswith("2 operations of Unsupported cannot be lowered")
    assert "bessel_j0" in text
    assert "digamma" in text
    line = Unsupported.forward.__code__.co_firstlineno + 1
    assert f"test_errors.py:{line}" in text
    assert f"test_errors.py:{line + 1}" in text


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "random": (lambda x: x + torch.rand(4), "random"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), "dropout is active"),
    "mask_index": (lambda x: x[x > 0], "depends on the values"),
    "nonzero": (lambda x: x.nonzero(), "depends on the values"),
    "pool_indices": (lambda x: F.max_pool1d(x[:, None], 2, return_indices=True), "result 1 is used"),
    "integer_power": (lambda x: x.long() ** x.long(), "integer powers"),
    "inverse": (lambda x: torch.linalg.inv(x @ x.mT), "linalg_inv"),
    "part_of_an_op": (lambda x: torch.special.erfcx(x), "erfcx"),
    "size_output": (lambda x: (x, x.shape[0]), "is a size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises((UnsupportedOpError, UnsupportedModelError)) as caught:
        lower(function, X)
    assert message in str(caught.value)
    assert caught.value.hint


def test_what_cannot_be_captured_is_told_with_its_line() -> None:
    class Categories(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(x.long())

    with pytest.raises(UnsupportedModelError) as caught:
        lower(Categories(), X.abs())
    assert caught.value.code == "E_EXPORT"
    assert f"test_errors.py:{Categories.forward.__code__.co_firstlineno + 1}" in str(caught.value)


def test_packed_sequences_are_refused_with_what_to_do() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 5, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.cell(packed)[1][0]

    with pytest.raises(UnsupportedOpError) as caught:
        lower(Packed(), torch.randn(3, 6, 4), torch.tensor([2, 6, 1]))
    assert "pick the last output" in (caught.value.hint or "")
    assert f"test_errors.py:{Packed.forward.__code__.co_firstlineno + 1}" in str(caught.value)


def test_state_changes_are_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return x * self.steps

    with pytest.raises(UnsupportedModelError, match="buffer 'steps'") as caught:
        lower(Counter(), X)
    assert caught.value.code == "E_MUTATION"


def test_writing_into_an_input_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'x'"):
        lower(lambda x: x.add_(1) * 2, X)


def test_programs_exported_for_training_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    program = torch.export.export(module, (X,))
    with pytest.raises(UnsupportedModelError, match="running_mean") as caught:
        FRONTEND.lower(program, LowerOptions())
    assert "eval()" in (caught.value.hint or "")


def test_models_that_fix_their_batch_size() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lower(lambda x: x.reshape(3, 2, 2), X)
    assert caught.value.code == "E_DYNAMIC_BATCH"
    assert "dynamic_batch=False" in (caught.value.hint or "")
    assert lower(lambda x: x.reshape(3, 2, 2), X, dynamic_batch=False).outputs[0].type.shape == (3, 2, 2)


def test_batch_on_another_axis_is_hinted() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lower(Recurrent(nn.LSTM, batch_first=False), torch.randn(7, 2, 6))
    assert 'input_shapes={"x": (7, "n", 6,)}' in (caught.value.hint or "")


def test_a_named_axis_that_torch_fixes() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lower(Recurrent(nn.LSTM), torch.randn(2, 7, 6), input_shapes={"x": ("n", "time", 6)})
    assert caught.value.message.startswith("input 'x', axis 1: input_shapes names this axis")
    assert "7 alone" in caught.value.message
    assert "write 7 in input_shapes" in (caught.value.hint or "")


def test_control_flow_on_values() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lower(lambda x: x if x.sum() > 0 else -x, X)
    assert caught.value.code == "E_EXPORT"
    assert "control flow" in (caught.value.hint or "")


def test_torch_writes_nothing_of_its_own_about_a_failure(tmp_path: Path) -> None:
    script = (
        "import torch, mlec\n"
        "class Branch(torch.nn.Module):\n"
        "    def forward(self, x): return x if x.sum() > 0 else -x\n"
        "for module in (Branch(), torch.nn.Linear(5, 2)):\n"
        "    try: mlec.lower(module, torch.zeros(2, 4))\n"
        "    except mlec.MlecError as error: print(error.code)\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert done.stdout.split() == ["E_EXPORT", "E_EXAMPLE_FAILS"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "E_EXAMPLE_NEEDED"),
        ({"example_inputs": (X, X)}, "E_EXAMPLE_COUNT"),
        ({"example_inputs": (3,)}, "E_EXAMPLE_TYPE"),
        ({"example_inputs": (torch.randn(2, 16),), "input_shapes": {"y": ("n", 16)}}, "E_INPUT_NAME"),
        ({"example_inputs": (torch.randn(2, 16),), "input_shapes": {"x": ("n", 17)}}, "E_INPUT_SHAPE"),
        ({"example_inputs": (torch.randn(2, 16),), "input_shapes": {"x": ("n",)}}, "E_INPUT_SHAPE"),
        ({"example_inputs": (torch.randn(2, 16),), "input_shapes": {"x": ("2*n", 16)}}, "E_INPUT_SHAPE"),
        ({"input_shapes": [("n", 16), ("n", 16)]}, "E_INPUT_COUNT"),
    ],
)
def test_wrong_examples(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        FRONTEND.lower(MLP(), LowerOptions(**options))
    assert caught.value.code == code


def test_programs_keep_their_fixed_sizes() -> None:
    program = torch.export.export(MLP().eval(), (torch.randn(3, 16),))
    with pytest.raises(UsageError, match="dynamic_shapes"):
        FRONTEND.lower(program, LowerOptions(input_shapes={"x": ("n", 16)}))


def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(nn.Linear(4, 2))
    assert FRONTEND.accepts(scripted)
    with pytest.raises(UnsupportedModelError, match="TorchScript"):
        FRONTEND.lower(scripted, LowerOptions(example_inputs=(X,)))


@pytest.mark.parametrize("thing", [np.zeros(3), torch.zeros(3), "model.pt", object(), nn.Module])
def test_other_objects_are_not_accepted(thing: object) -> None:
    assert not FRONTEND.accepts(thing)


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, self.centres)


@pytest.mark.parametrize("rows", [2, 40])
def test_distances_take_any_batch(rows: int) -> None:
    module = Distances()
    graph = lower(module, torch.randn(rows, 4))
    assert graph.signature.symbols == {"n": (0, None)}
    for batch in (1, 25, 26):
        compare(graph, FRONTEND.oracle(module)["run"], [torch.randn(batch, 4)], 1e-4)


def test_a_model_that_branches_on_the_batch_says_for_which_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] < 100 else x + 1

    compiled = mlec.compile(Branching(), torch.ones(2, 4))
    (note,) = [w for w in compiled.report.warnings if "Branching" in w]
    assert "takes n from 0 to 99 only" in note
    assert note in caplog.text
    with pytest.raises(mlec.InputError, match="at most 99, got 100") as caught:
        compiled.run([torch.ones(100, 4)])
    assert "with bounds or examples for others" in (caught.value.hint or "")
    np.testing.assert_array_equal(mlec.compile(Branching(), torch.ones(200, 4)).run([torch.ones(101, 4)])[0], 2.0)


def test_an_input_that_does_not_follow_the_batch_is_told() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return x + sum(w[i] for i in range(w.shape[0]))

    options = LowerOptions(example_inputs=(torch.ones(2, 3), torch.ones(2, 3)))
    FRONTEND.lower(Fixed(), options)
    assert [note for note in options.notes if "'w' is fixed at 2" in note]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)
        self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.head((self.table(ids) * weights).sum(1))


@pytest.mark.parametrize(
    ("examples", "said", "scope"),
    [
        ((torch.ones(2, 4), torch.ones(2, 4, 1)), "input 'ids' must be int64, got float32", "table"),
        ((torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, 1).double()), "input 'weights' must be float32, got float64", "head.0"),
    ],
)  # fmt: skip
def test_example_inputs_of_another_type_are_named(examples: Any, said: str, scope: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        lower(Words(), *examples)
    assert caught.value.code == "E_EXAMPLE_DTYPE"
    assert caught.value.loc is not None
    assert caught.value.loc.scope == scope
    assert caught.value.loc.file.endswith("test_errors.py")


def test_integers_for_a_network_of_floats() -> None:
    with pytest.raises(UsageError, match=r"input '(x|input)' must be float32, got int64") as caught:
        lower(nn.Sequential(nn.Linear(8, 2)), torch.ones(2, 8, dtype=torch.int64))
    assert "as float32" in (caught.value.hint or "")


def test_examples_that_the_model_does_not_run_on() -> None:
    with pytest.raises(
        UsageError, match="MLP itself fails on the example inputs: RuntimeError: mat1 and mat2"
    ) as caught:
        lower(MLP(), torch.ones(2, 99))
    assert caught.value.code == "E_EXAMPLE_FAILS"


def test_a_module_in_training_mode_is_compiled_as_in_eval() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    x = torch.ones(2, 4)
    compiled = mlec.compile(module, x)
    assert module.training
    assert [w for w in compiled.report.warnings if "training mode" in w and "as in eval()" in w]
    module.eval()
    torch.testing.assert_close(torch.from_numpy(compiled(x)[0]), module(x).detach())
    assert not [w for w in mlec.compile(module, x).report.warnings if "training mode" in w]

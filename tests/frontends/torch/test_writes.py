"""Ops that write to places which an index names, and bags of embeddings: from networks in the wild."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import mlec
from tests.frontends.torch.common import FRONTEND, Function, compare, lower

TABLE = torch.randn(6, 3)


def assigned(x: Tensor, place: Any, value: float | Tensor) -> Tensor:
    y = x.clone()
    y[place] = value
    return y


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "source": lambda x, i: x.scatter(1, i, x[:, :4] * 2),
    "value": lambda x, i: x.scatter(-1, i, 3.0),
    "inner_axis": lambda x, i: torch.zeros(x.shape[0], 6, 2).scatter(1, i[:, :2, None].expand(-1, -1, 2), x[:, :4].reshape(-1, 2, 2)),
    "added": lambda x, i: x.scatter_add(1, i, x[:, 2:]),
    "in_place": lambda x, i: torch.zeros_like(x).scatter_(1, i, 1.0),
    "largest": lambda x, i: x.scatter_reduce(1, i, x[:, 2:], "amax"),
    "mean": lambda x, i: x.scatter_reduce(1, i, x[:, 2:], "mean"),
    "alone": lambda x, i: x.scatter_reduce(1, i, x[:, 2:], "prod", include_self=False),
    "reduced": lambda x, i: x.scatter(1, i, x[:, 2:], reduce="add"),
    "not_a_number": lambda x, i: x.scatter_add(1, i[:, :2], x[:, :2].log()),
    "index_add": lambda x, i: torch.zeros(x.shape[0], 3).index_add(1, torch.tensor([0, 1, 2, 0, 1, 2]), x),
    "mask": lambda x, i: assigned(x, x > 0, 0.5),
    "row_mask": lambda x, i: assigned(x, x[:, 0] > 0, 0.5),
    "columns": lambda x, i: assigned(x, (slice(None), torch.tensor([1, -1])), 7.0),
    "known_columns": lambda x, i: assigned(x, (slice(None), torch.tensor([4, -6, 2])), x[:, :3].exp()),
    "known_run": lambda x, i: assigned(x, (slice(None), torch.tensor([2, 3])), x[:, :1].exp()),
    "known_permutation": lambda x, i: assigned(x, (slice(None), torch.tensor([3, 1, 5, 0, 2, 4])), x.exp()),
    "known_rows_of_rows": lambda x, i: assigned(x.reshape(-1, 3, 2), (slice(None), torch.tensor([2, 0, 2])), x.reshape(-1, 3, 2) * 3),
    "copied": lambda x, i: x.index_copy(1, torch.tensor([5, 0]), x[:, 1:3] * 2),
    "every_second": lambda x, i: assigned(x, (slice(None), slice(None, None, 2)), 7.0),
    "steps_to_an_end": lambda x, i: assigned(x, (slice(None), slice(-5, 4, 2)), x[:, 4:]),
    "bag_mean": lambda x, i: F.embedding_bag(i, TABLE),
    "bag_max": lambda x, i: F.embedding_bag(i, TABLE, mode="max"),
    "bag_weights": lambda x, i: F.embedding_bag(i, TABLE, mode="sum", per_sample_weights=x[:, :4]),
    "bag_padding": lambda x, i: F.embedding_bag(i, TABLE, padding_idx=-5),
    "bag_max_padding": lambda x, i: F.embedding_bag(i, TABLE, mode="max", padding_idx=1),
}  # fmt: skip


def batch(n: int) -> list[Tensor]:
    torch.manual_seed(n)
    return [torch.randn(n, 6), torch.randint(0, 6, (n, 4))]


@pytest.mark.parametrize("name", CASES)
def test_writes(name: str) -> None:
    graph = lower(CASES[name], *batch(2))
    run = FRONTEND.oracle(Function(CASES[name], 2))["run"]
    for n in (1, 2, 5, 33):  # with 33 rows, some write twice to one place: the last entry wins
        compare(graph, run, batch(n))


@pytest.mark.parametrize(
    "name", ["columns", "known_columns", "known_run", "known_permutation", "known_rows_of_rows", "copied"]
)
def test_places_that_are_known_are_not_compared(name: str) -> None:
    assert not {node.name for node in lower(CASES[name], *batch(2)).nodes} & {"one_hot", "take_along_axis", "max"}


def test_an_index_beyond_the_places_is_refused_as_by_torch() -> None:
    compiled = mlec.compile(Function(CASES["value"], 2), tuple(batch(2)))
    with pytest.raises(mlec.InputError, match="picks entries 0 to 5, got 6"):
        compiled.run([np.zeros((1, 6)), np.array([[0, 1, 2, 6]])])


@pytest.mark.parametrize("read", [lambda i: TABLE[i], lambda i: TABLE.t()[torch.tensor([2]), i.int()]])
def test_an_index_that_may_count_from_the_end_is_within_the_axis(
    read: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    mlec.compile(Function(read, 1), (torch.tensor([0, 1]),), validate=False).save(tmp_path / "model.mle")
    model = mlec.load(tmp_path / "model.mle")
    ends = torch.tensor([-6, 5])
    np.testing.assert_array_equal(model.run([ends])[0], read(ends))
    for beyond in (-7, 6):
        with pytest.raises(mlec.InputError, match=f"picks entries -6 to 5, got {beyond}"):
            model.run([np.array([0, beyond])])


def test_an_index_that_may_count_from_the_end_only_in_one_place() -> None:
    model = mlec.compile(
        Function(lambda i: TABLE[i] + F.embedding(i, TABLE[:4]), 1), (torch.tensor([0, 1]),), validate=False
    )
    with pytest.raises(mlec.InputError, match="picks entries 0 to 3, got -1"):
        model.run([np.array([-1])])


BAGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda i, ends: F.embedding_bag(i, TABLE, ends, mode="sum"),
    "mean": lambda i, ends: F.embedding_bag(i, TABLE, ends),
    "max": lambda i, ends: F.embedding_bag(i, TABLE, ends, mode="max"),
    "padding": lambda i, ends: F.embedding_bag(i, TABLE, ends, padding_idx=1),
    "weights": lambda i, ends: F.embedding_bag(i, TABLE, ends, mode="sum", per_sample_weights=i * 0.5),
    "last": lambda i, ends: F.embedding_bag(i, TABLE, ends, include_last_offset=True),
}


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_several_lengths(name: str) -> None:
    function = Function(BAGS[name], 2)
    graph = lower(function, torch.arange(5), torch.tensor([0, 2, 2, 5]), input_shapes=[("m",), ("n",)])
    for offsets in ([0, 2, 2, 4, 7], [0, 7]):
        compare(graph, FRONTEND.oracle(function)["run"], [torch.tensor([0, 1, 1, 5, 3, 2, 4]), torch.tensor(offsets)])


@pytest.mark.parametrize("name", ["sum", "mean", "padding", "weights", "last"])
def test_bags_of_exported_programs(name: str) -> None:
    dynamic = {0: torch.export.Dim.DYNAMIC}
    examples = torch.arange(5), torch.tensor([0, 2, 2, 5])
    program = torch.export.export(Function(BAGS[name], 2), examples, dynamic_shapes=(dynamic, dynamic))
    graph, run = lower(program), FRONTEND.oracle(Function(BAGS[name], 2))["run"]
    compare(graph, run, [torch.tensor([0, 1, 1, 5, 3, 2, 4]), torch.tensor([0, 2, 2, 4, 7])])


def test_random_numbers_that_a_model_does_not_take_are_no_failure() -> None:
    """No length is 0; the examples are compared all the same."""
    last = Function(lambda x, length: x.gather(1, length[:, None] - 1), 2)
    compiled = mlec.compile(last, (torch.randn(4, 6), torch.tensor([1, 6, 2, 3])), target="numpy")
    assert compiled.report.parity["methods"]["run"]["rows"] == 4


def test_several_arguments_in_one() -> None:
    class Joined(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return torch.cat(parts, 1)

    ones = np.ones((2, 3), np.float32)
    compiled = mlec.compile(Joined(), (ones, 2 * ones))
    assert [spec.name for spec in compiled.signature.inputs] == ["parts_0", "parts_1"]
    np.testing.assert_array_equal(compiled(ones, 2 * ones)[0], np.concatenate([ones, 2 * ones], 1))

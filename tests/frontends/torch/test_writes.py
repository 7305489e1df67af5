"""Ops that write to places which an index names, and bags of embeddings: from networks in the wild."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import mlec
from mlec.errors import UnsupportedOpError
from tests.frontends.torch.common import FRONTEND, Function, compare, lower

TABLE = torch.randn(6, 3)


def assigned(x: Tensor, place: Any, value: float) -> Tensor:
    y = x.clone()
    y[place] = value
    return y


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "source": lambda x, i: x.scatter(1, i, x[:, :4] * 2),
    "value": lambda x, i: x.scatter(-1, i, 3.0),
    "inner_axis": lambda x, i: torch.zeros(x.shape[0], 6, 2).scatter(1, i[:, :2, None].expand(-1, -1, 2), x[:, :4].reshape(-1, 2, 2)),
    "added": lambda x, i: x.scatter_add(1, i, x[:, 2:]),
    "in_place": lambda x, i: torch.zeros_like(x).scatter_(1, i, 1.0),
    "index_add": lambda x, i: torch.zeros(x.shape[0], 3).index_add(1, torch.tensor([0, 1, 2, 0, 1, 2]), x),
    "mask": lambda x, i: assigned(x, x > 0, 0.5),
    "row_mask": lambda x, i: assigned(x, x[:, 0] > 0, 0.5),
    "columns": lambda x, i: assigned(x, (slice(None), torch.tensor([1, -1])), 7.0),
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


def test_an_index_beyond_the_places_is_refused_as_by_torch() -> None:
    compiled = mlec.compile(Function(CASES["value"], 2), tuple(batch(2)))
    with pytest.raises(mlec.InputError, match="picks entries 0 to 5, got 6"):
        compiled.run([np.zeros((1, 6)), np.array([[0, 1, 2, 6]])])


def test_bags_of_several_lengths_are_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="embedding_bag"):
        lower(
            lambda x: F.embedding_bag(x, TABLE, torch.tensor([0, 2])), torch.tensor([1, 2, 3, 4]), dynamic_batch=False
        )


def test_several_arguments_in_one() -> None:
    class Joined(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return torch.cat(parts, 1)

    ones = np.ones((2, 3), np.float32)
    compiled = mlec.compile(Joined(), (ones, 2 * ones))
    assert [spec.name for spec in compiled.signature.inputs] == ["parts_0", "parts_1"]
    np.testing.assert_array_equal(compiled(ones, 2 * ones)[0], np.concatenate([ones, 2 * ones], 1))

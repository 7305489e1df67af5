"""``python -m bench.batch_sizes``: one artifact for any number of rows beside one compiled for each number, and what a call costs, in time
and in memory.

A ratio below 1 means that the artifact for any number of rows takes longer than the one for that number alone. The least call is that of
a model that does next to nothing: all of it is the way from Python to the kernel and back.
"""  # fmt: skip

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np

import mlec
from bench.competitors import Mlec, shipped
from bench.harness import Case, Competitor, Predict, run_case
from bench.models import CASES
from bench.table import geomean
from bench.vectorize import best
from mlec.ir import GraphBuilder, tensor

USUAL = (
    "logistic_pipeline", "pca_logistic", "random_forest", "xgboost_d6", "lightgbm_31", "mlp_784", "resnet8", "depthwise_cnn", "lstm",
    "encoder", "autoencoder",
)  # fmt: skip
SIZES = (1, 2, 8, 64)
"""Beside those that the case names."""


class Fixed(Competitor):
    """Compiled for one number of rows."""

    name = "fixed"

    def prepare(self, case: Case, threads: int) -> Predict:
        (rows,) = case.batches
        return shipped(case, threads, tuple(case.inputs(rows)), dynamic_batch=False)


@dataclass
class Ready(Competitor):
    """Compiled before."""

    predict: Predict
    name = "any"

    def prepare(self, case: Case, threads: int) -> Predict:
        return self.predict


def batch_sizes(case: Case, threads: int) -> list[float]:
    """Prints a line for each number of rows.

    Returns:
        How many times longer the artifact for one number of rows takes, for each.
    """
    ready = Ready(Mlec().prepare(case, threads))
    ratios = []
    for rows in sorted({*SIZES, *case.batches}):
        seconds = {t.competitor: t.p50 for t in run_case(replace(case, batches=(rows,)), [ready, Fixed()], threads)}
        ratios.append(seconds["fixed"] / seconds["any"])
        print(f"| {case.name} | {rows} | {threads} | {seconds['any'] * 1e6:.1f} us | {ratios[-1]:.2f}x |", flush=True)
    return ratios


def least_call() -> str:
    """Microseconds of a model that adds 1 to one number."""
    b = GraphBuilder("least")
    x = b.input("x", tensor("f32", ("n", 1)))
    model = mlec.compile(b.finish([b("add", x, 1.0)]), num_threads=1, progress=False)
    row, place = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    calls: dict[str, Predict] = {
        "run([x])": lambda inputs: model.run(inputs),
        "run([x], out=[y])": lambda inputs: model.run(inputs, out=[place]),
    }
    return ", ".join(f"{name} {best(functools.partial(call, [row]), 1.0):.2f} us" for name, call in calls.items())


def memory(case: Case) -> str:
    """Bytes that a call keeps intermediate values in, beside the largest set of them that is alive at once."""
    example: tuple[Any, ...] = tuple(case.inputs(1))
    model = mlec.compile(case.model, example, validate=False, progress=False)
    model.run(list(example))
    usage = model.memory_usage()
    arena, live = usage["arena"], usage["live"]
    return (
        f"{case.name}, 1 row: weights {usage['weights'] / 1e6:.1f} MB, and for intermediate values {arena / 1e6:.2f} MB, "
        f"{arena / live:.2f}x the most that are alive at once"
    )


@click.command()
@click.argument("names", nargs=-1)
@click.option("--threads", default="1,2", show_default=True)
def main(names: Sequence[str], threads: str) -> None:
    """Times the cases NAMES of bench/models.py, by default some of each kind."""
    if unknown := set(names) - set(CASES):
        raise click.UsageError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print(f"The least call: {least_call()}")
    print(memory(CASES["resnet18"][1]()))
    print("\n| model | rows | threads | any number of rows | compiled for this number |\n|---|---|---|---|---|")
    ratios = [
        ratio
        for name in names or USUAL
        for count in map(int, threads.split(","))
        for ratio in batch_sizes(CASES[name][1](), count)
    ]
    print(f"\nGeometric mean {geomean(ratios):.2f}x, worst {min(ratios):.2f}x")


if __name__ == "__main__":
    main()

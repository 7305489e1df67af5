"""``python -m bench.cost_model``: what the cost model predicts beside what is measured, of each model, and the median errors.

Its rates (`mlec.measuring.cost_model.RATES`) were fitted on the models in `FITTED`, on one processor; of the others it has seen nothing.
These come first.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

import mlec
from bench.harness import Case
from bench.models import CASES, chosen
from mlec import registry
from mlec.measuring.cost_model import CostModel
from mlec.measuring.machine import this_machine
from mlec.packaging.recompiling import executable_of
from mlec.runtime import CompiledModel
from mlec.target import Target
from mlec.wording import plural

FITTED = frozenset(
    {
        "svc_rbf", "mlp_classifier", "neighbours", "polynomial_ridge", "pca_logistic", "logistic_pipeline", "features_logistic",
        "imputer_ridge", "random_forest", "xgboost_d6", "mlp_784", "resnet8", "resnet18", "depthwise_cnn", "lstm", "encoder",
        "mobilenet_v2",
    }
)  # fmt: skip
"""Cases that the rates were fitted on."""

LARGE = frozenset(
    {
        "xgboost_26000", "xgboost_500_d8_28", "xgboost_1000_d6_8", "xgboost_classes", "xgboost_100_d8_968", "xgboost_100_d8_2000",
        "lightgbm_31_full",
    }
)  # fmt: skip
"""Cases that take long to train, or are much like another one: last."""

SECONDS = 0.15
PATIENCE = 1.5
FEWEST, ENOUGH = 3, 10
"""How long a model is called at each batch size, longer for fewer than `ENOUGH` calls, and how often at least: the least time of a call
counts, as whatever else the machine does only adds to it."""


@dataclass(frozen=True)
class Prediction:
    """One model at one batch size, on so many threads; seconds of a call."""

    case: str
    fitted: bool
    batch: int
    threads: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured; positive where the model is too slow."""
        return self.predicted / self.measured - 1


def predictions(name: str, case: Case, threads: Sequence[int]) -> Iterator[Prediction]:
    """Compiles a case, and times it at each of its batch sizes with each number of threads."""
    example = tuple(case.inputs(4)) if case.framework == "torch" else None
    graph, _ = mlec.optimize(mlec.lower(case.model, example))
    module = registry.backend_of("cpu").compile(graph, Target.parse("cpu"))
    for count in threads:
        compiled = CompiledModel(graph.signature, executable_of(module, graph, count))
        model = CostModel(this_machine(), count)
        for batch in case.batches:
            inputs = case.inputs(batch)
            predicted, _ = model.module_seconds(module, dict.fromkeys(graph.symbols, batch), inputs)
            measured = _least(partial(compiled.run, inputs), count)
            yield Prediction(name, name in FITTED, batch, count, predicted, measured)


def _least(action: Callable[[], object], threads: int) -> float:
    """Seconds of a call; with one thread those of its processor, where that had other work as well."""
    action()
    seconds: list[float] = []
    begin = now = time.perf_counter()
    while len(seconds) < FEWEST or now - begin < (SECONDS if len(seconds) >= ENOUGH else PATIENCE):
        worked = time.thread_time()
        start = time.perf_counter()
        action()
        now = time.perf_counter()
        seconds.append(now - start if threads > 1 else min(now - start, time.thread_time() - worked))
    return min(seconds)


def line(p: Prediction) -> str:
    """A line of the table."""
    name = f"{p.case}{' (fitted)' if p.fitted else ''}"
    return f"| {name} | {p.batch} | {p.threads} | {1e6 * p.predicted:.1f} us | {1e6 * p.measured:.1f} us | {p.error:+.0%} |"


def summary(found: Sequence[Prediction]) -> list[str]:
    """The median errors for each number of threads, and how many are beyond a quarter and a half."""
    lines = []
    for threads in sorted({p.threads for p in found}):
        for words, fitted in (("models held out", False), ("models that the rates were fitted on", True)):
            errors = [abs(p.error) for p in found if p.threads == threads and p.fitted is fitted]
            if errors:
                quarter, half = (sum(error > bound for error in errors) for bound in (0.25, 0.5))
                median = f"{statistics.median(errors):.0%} of {plural(len(errors), 'prediction')}"
                lines.append(
                    f"Median error with {plural(threads, 'thread')}, {words}: {median}, {quarter:,} of them off by more than 25%, "
                    f"{half:,} by more than 50%."
                )
    return lines


@click.command()
@click.option("--group", multiple=True, help="as of bench.run; all by default")
@click.option("--case", "names", multiple=True, help="name of a case in bench/models.py")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--budget", default=5.0, show_default=True, help="minutes, after which no further case is begun")
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="write the predictions here")
def main(group: tuple[str, ...], names: tuple[str, ...], threads: str, budget: float, out: Path | None) -> None:
    """Compares predicted and measured times."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for training, before any library is imported
    try:
        cases = chosen(group or tuple({of for of, _ in CASES.values()}), names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    counts = [int(count) for count in threads.split(",")]
    this_machine()  # is measured alone
    end = time.monotonic() + 60 * budget
    found: list[Prediction] = []
    late: list[str] = []
    click.echo("| model | batch | threads | predicted | measured | error |\n|---|---|---|---|---|---|")
    for name in sorted(cases, key=lambda name: (name in FITTED, name in LARGE)):
        if time.monotonic() > end:
            late.append(name)
            continue
        for prediction in predictions(name, cases[name](), counts):
            click.echo(line(prediction))
            found.append(prediction)
    click.echo("\n" + "\n".join(summary(found)))
    if (load := os.getloadavg()[0] - max(counts)) > 0.5:
        click.echo(f"The machine had {load:.0f} other tasks to run: times of several threads say little.")
    if late:
        click.echo(f"Not begun within {budget:g} minutes: {', '.join(late)}.")
    if out is not None:
        out.write_text(json.dumps([asdict(p) for p in found], indent=1))


if __name__ == "__main__":
    main()

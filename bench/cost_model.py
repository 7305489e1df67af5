"""``python -m bench.cost_model``: what the cost model predicts beside what is measured, of each model, and the median error.

Its rates (`mlec.measuring.cost_model.RATES`) were fitted on the models in `FITTED`, on one processor; of the others it has seen nothing.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

import mlec
from bench.harness import Case
from bench.models import chosen
from mlec import registry
from mlec.measuring.cost_model import CostModel
from mlec.measuring.machine import this_machine
from mlec.packaging.recompiling import executable_of
from mlec.runtime import CompiledModel
from mlec.target import Target

FITTED = frozenset(
    {
        "svc_rbf", "mlp_classifier", "neighbours", "polynomial_ridge", "pca_logistic", "logistic_pipeline", "features_logistic",
        "imputer_ridge", "random_forest", "xgboost_d6", "mlp_784", "resnet8", "resnet18", "depthwise_cnn", "lstm", "encoder",
        "mobilenet_v2",
    }
)  # fmt: skip
"""Cases that the rates were fitted on."""

SECONDS = 0.4
FEWEST = 5
"""How long, and how often at least, a model is called at each batch size: the least time of a call counts."""


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


def predictions(name: str, case: Case, threads: int) -> list[Prediction]:
    """Compiles a case, and times it at each of its batch sizes."""
    example = tuple(case.inputs(4)) if case.framework == "torch" else None
    graph, _ = mlec.optimize(mlec.lower(case.model, example))
    module = registry.backend_of("cpu").compile(graph, Target.parse("cpu"))
    compiled = CompiledModel(graph.signature, executable_of(module, graph, threads))
    model = CostModel(this_machine(), threads)
    found = []
    for batch in case.batches:
        inputs = case.inputs(batch)
        binding = dict.fromkeys(graph.symbols, batch)
        predicted, _ = model.module_seconds(module, binding)
        found.append(Prediction(name, name in FITTED, batch, threads, predicted, _least(lambda: compiled.run(inputs))))  # noqa: B023
    return found


def _least(action: Callable[[], object]) -> float:
    action()
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(seconds) < FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def table(found: Sequence[Prediction]) -> str:
    """A line for each prediction, then the median errors."""
    lines = ["| model | batch | threads | predicted | measured | error |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {p.case}{' (fitted)' if p.fitted else ''} | {p.batch} | {p.threads} | {1e6 * p.predicted:.1f} us | {1e6 * p.measured:.1f} us "
        f"| {p.error:+.0%} |"
        for p in found
    ]
    for words, part in (
        ("models that the rates were fitted on", [p for p in found if p.fitted]),
        ("models held out", [p for p in found if not p.fitted]),
    ):
        if part:
            errors = [abs(p.error) for p in part]
            lines += ["", f"Median error, {words}: {statistics.median(errors):.0%} of {len(part)} predictions."]
    return "\n".join(lines)


@click.command()
@click.option("--group", multiple=True, help="as of bench.run")
@click.option("--case", "names", multiple=True, help="name of a case in bench/models.py")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="write the predictions here")
def main(group: tuple[str, ...], names: tuple[str, ...], threads: int, out: Path | None) -> None:
    """Compares predicted and measured times."""
    warnings.filterwarnings("ignore")
    try:
        cases = chosen(group, names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found: list[Prediction] = []
    for name, make in cases.items():
        click.echo(name, err=True)
        found += predictions(name, make(), threads)
    click.echo(table(found))
    if out is not None:
        out.write_text(json.dumps([asdict(p) for p in found], indent=1))


if __name__ == "__main__":
    main()

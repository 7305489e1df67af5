"""Takes one recipe after the other through the whole path: train, compile, save, load, verify, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from mlec.api import compile
from mlec.demo.recipes import RECIPES, Recipe, Trained
from mlec.errors import MlecError
from mlec.frontends.select import frontend_for
from mlec.frontends.source_threads import limited_threads
from mlec.measuring.timing import interleaved
from mlec.packaging.loading import load
from mlec.runtime import CompiledModel
from mlec.validation.differential import compare, default_tolerance

BATCHES = (1, 1024)


@dataclass(frozen=True)
class Measured:
    """What was found out about one model.

    Attributes:
        training_seconds: of the source model.
        compile_seconds: validation included; without what the report measures besides.
        size_bytes: of the ``.mle`` file.
        score: of the compiled model: accuracy, or the coefficient of determination.
        rows: compared with the source, by the loaded file.
        label_mismatches: labels that differ from the source's.
        max_rel_error: largest difference of a number, relative to the largest number.
        excess: largest difference in units of the bound; at most 1.
        times: for each batch, milliseconds of one call of ``"source"`` and ``"compiled"``.
    """

    training_seconds: float
    compile_seconds: float
    size_bytes: int
    score: float
    rows: int
    label_mismatches: int
    max_rel_error: float
    excess: float
    times: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe: a measurement, or how to install what it needs, or why it failed."""

    recipe: Recipe
    measured: Measured | None = None
    missing: str = ""
    error: str = ""


def run_demo(folder: Path, threads: int = 1, recipes: Sequence[Recipe] = RECIPES) -> Iterator[Outcome]:
    """Runs recipes in order.

    Args:
        folder: where the ``.mle`` files and reports go.
        threads: of one call, for the libraries and for mlec.
        recipes: which.

    Yields:
        One outcome for each recipe, when it is done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in recipes:
        try:
            yield Outcome(recipe, _measure(recipe, folder, threads))
        except ModuleNotFoundError as absent:
            yield Outcome(recipe, missing=f"{absent.name} is not installed: pip install 'mlec[{recipe.library}]'")
        except MlecError as error:
            yield Outcome(recipe, error=error.render())
        except Exception as defect:  # the other models are worth seeing all the same
            yield Outcome(recipe, error=f"{type(defect).__name__}: {defect}")


def _measure(recipe: Recipe, folder: Path, threads: int) -> Measured:
    start = time.perf_counter()
    trained = recipe.train()
    trained_at = time.perf_counter()
    compiled = compile(trained.model, (trained.inputs,), num_threads=threads, measure_passes="total")
    stages = compiled.report.timing["stages"]
    file = folder / f"{recipe.name.replace(' ', '-')}.mle"
    saved = compiled.save(file)
    compiled.report.save(file.with_suffix(".html"))
    with load(file, num_threads=threads) as loaded, limited_threads(threads):
        oracle = frontend_for(trained.model).oracle(trained.model)
        found = compare(loaded, oracle, [trained.inputs], default_tolerance(compiled.graph))
        return Measured(
            training_seconds=trained_at - start,
            compile_seconds=sum(stages.values()) - stages.get("measure", 0.0),
            size_bytes=saved.size_bytes,
            score=_score(loaded, trained),
            rows=len(trained.inputs),
            label_mismatches=sum(c.label_mismatches for c in found),
            max_rel_error=max(c.max_rel_error for c in found),
            excess=max(c.excess for c in found),
            times={rows: _times(loaded, trained, rows) for rows in BATCHES},
        )


def _score(model: CompiledModel, trained: Trained) -> float:
    """Accuracy of classes, or the coefficient of determination of numbers."""
    if model.signature.kind == "regressor":
        rest = np.square(trained.truth - model.predict(trained.inputs)).sum()
        return float(1 - rest / np.square(trained.truth - trained.truth.mean()).sum())
    labels = model.predict(trained.inputs) if trained.method else model.run([trained.inputs])[0].argmax(axis=1)
    return float(np.mean(labels == trained.truth))


def _times(model: CompiledModel, trained: Trained, rows: int) -> dict[str, float]:
    """Medians of interleaved calls, in milliseconds."""
    index = np.arange(rows) % len(trained.inputs)
    inputs = trained.inputs[index] if isinstance(trained.inputs, np.ndarray) else trained.inputs.iloc[index]
    if trained.method:
        ours, source = getattr(model, trained.method), getattr(trained.model, trained.method)
        actions: dict[str, Callable[[], object]] = {"source": lambda: source(inputs), "compiled": lambda: ours(inputs)}
    else:
        import torch

        tensor = torch.from_numpy(inputs)

        def network() -> object:
            with torch.inference_mode():
                return trained.model(tensor)

        actions = {"source": network, "compiled": lambda: model.run([inputs])}
    return {name: median(taken) * 1e3 for name, taken in interleaved(actions, seconds=0.6).items()}

"""Compiled code against the reference in float64, each graph in one of the many ways to compile and run it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlec
from mlec.errors import MlecError, UnsupportedOpError
from mlec.ir import Graph, run_graph
from mlec.ir.dim import evaluate
from mlec.ir.op import SYMBOLIC_EXTENT, Array
from mlec.passes.canonicalize import Canonicalize
from mlec.passes.pipelines import named_pipeline
from mlec.passes.precision import MixedPrecision
from mlec.passes.quantize import QuantizeInt8
from mlec.pipeline import Pass, PassContext, PassPipeline
from mlec.processor import needed_cpu_flags, what_is_missing
from tests.fuzz.defect import Defect
from tests.fuzz.exact import run_in_double, run_rounded
from tests.fuzz.graphs import Sample, random_small_sample
from tests.fuzz.kernels import quick

LEVELS = ("O0", "O1", "O2", "O2", "O2", "O3", "O3", "O3")
TARGETS = ("cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:x86-64-v4")
FEW_ROWS, MANY_ROWS = (0, 1, 2, 16, 33), 1500
ROUNDINGS = 16
"""Units of the coarsest type's eps that any result may move by, in parts of the output's scale."""
NOISE = 8
"""Times what a few roundings in inputs and operands move a result by: so much may other roundings move it."""
MEANINGLESS = 0.05
"""An output that roundings move by so much of its scale tells nothing."""


@dataclass(frozen=True)
class Way:
    """How a graph is compiled and run.

    Attributes:
        level, without: the pipeline, less the pass of that name.
        target: as users write it.
        num_threads: of one call; what is loaded from a file takes the other number of 1 and 2.
        saved: it also runs from a file.
        quick: machine code without LLVM's optimisations, which take three quarters of the time to compile.
        rows: batch sizes.
    """

    level: str
    without: str
    target: str
    num_threads: int
    saved: bool
    quick: bool
    rows: tuple[int, ...]

    @property
    def pipeline(self) -> PassPipeline:
        off = {"", self.without} if self.without == "stability" or self.saved else {self.without, "stability"}
        return PassPipeline(
            [step for step in named_pipeline(self.level) if step.name not in off]
        )  # stability changes nothing, slowly

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Way:
        level = str(rng.choice(LEVELS))
        names = sorted({step.name for step in named_pipeline(level)})
        without = str(rng.choice(names)) if rng.random() < 0.3 else ""
        target = str(rng.choice(TARGETS)) if rng.random() < 0.3 else "cpu"
        rows = SYMBOLIC_EXTENT, MANY_ROWS if rng.random() < 0.1 else int(rng.choice(FEW_ROWS))
        saved, quick = bool(rng.random() < 0.15), bool(rng.random() < 0.95)
        return cls(level, without, target, int(rng.integers(1, 3)), saved, quick, rows)


def check_compiled(seed: int) -> Defect | None:
    """A small graph, or what a pass for a lower precision makes of it, compiled in a way drawn from the seed."""
    rng = np.random.default_rng([seed, 3])
    sample = random_small_sample(seed)
    lowering: dict[int, Pass] = {
        0: QuantizeInt8(calibration=[sample.inputs]),
        1: MixedPrecision(dtype="fp16", min_weights=1),
        2: MixedPrecision(dtype="bf16", min_weights=1),
    }
    if (lower := lowering.get(int(rng.integers(12)))) is not None:
        steps = PassPipeline([Canonicalize(), lower])
        try:
            sample = Sample(steps.run(sample.graph, PassContext())[0], sample.inputs)
        except MlecError as error:
            return Defect(str(error), str(steps), sample.graph)
    return compiled(sample, Way.drawn(rng))


def compiled(sample: Sample, way: Way) -> Defect | None:
    """What is wrong with a graph that is compiled in one way."""
    cases = [case for n in way.rows if (case := Case.of(sample, n)) is not None]
    found = ""
    try:
        with quick() if way.quick else nullcontext():
            model = mlec.compile(
                sample.graph, passes=way.pipeline, target=way.target, validate=False, progress=False,
                num_threads=way.num_threads,
            )  # fmt: skip
        device, target = "cpu", model.metadata["target"]
        if what_is_missing(needed_cpu_flags(device, target)):
            return None
        for case in cases:
            found = found or case.difference(model.run(case.inputs))
        if way.saved and not found:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.mle"
                model.save(path)
                loaded = mlec.load(path, num_threads=3 - way.num_threads)
                for case in cases:
                    found = found or case.difference(loaded.run(case.inputs))
            found = found and f"loaded: {found}"
    except UnsupportedOpError:
        return None
    except Exception as error:  # whatever a defective compiler raises
        found = f"{type(error).__name__}: {error}"
    return Defect(found, str(way), sample.graph, lambda other: compiled(other, way)) if found else None


@dataclass(frozen=True)
class Case:
    """Inputs, what they give, of which types, and how far each output may be from it; infinitely far where roundings decide what it is."""

    inputs: list[Array]
    expected: list[Array]
    dtypes: list[np.dtype[Any]]
    bounds: list[float]

    @classmethod
    def of(cls, sample: Sample, rows: int) -> Case | None:
        """None where the reference has no numbers for so many rows."""
        graph, inputs = sample.graph, with_rows(sample.graph, sample.inputs, rows)
        rng = np.random.default_rng(0)
        step = 4 * sample.coarsest
        try:
            with warnings.catch_warnings(
                action="ignore", category=RuntimeWarning
            ):  # means of nothing, infinity less itself
                own, exact = run_graph(graph, inputs), run_in_double(graph, inputs)
                moved = [run_graph(graph, [_nudged(x, step, rng) for x in inputs]) for _ in range(2)]
                moved += [run_rounded(graph, inputs, rng) for _ in range(2)]
                bounds = [
                    _bound(a, b, others, sample.coarsest) for a, b, *others in zip(own, exact, *moved, strict=True)
                ]  # fmt: skip
        except (ValueError, IndexError, ZeroDivisionError):  # the largest of no numbers
            return None
        return cls(inputs, exact, [a.dtype for a in own], bounds)

    def difference(self, got: Sequence[Array]) -> str:
        """What is wrong, in words."""
        for i, (wanted, dtype, found, bound) in enumerate(
            zip(self.expected, self.dtypes, got, self.bounds, strict=True)
        ):
            if (dtype, wanted.shape) != (found.dtype, found.shape):
                return f"output {i} is {found.dtype}{found.shape} in place of {dtype}{wanted.shape}"
            if np.isfinite(bound):
                numbers = found.astype(np.float64)
                moved = np.max(np.abs(numbers - wanted.astype(np.float64)), initial=0.0)
                if not moved <= bound:
                    return f"output {i} of {len(self.inputs[-1])} rows moved by {moved:.3g}, its bound is {bound:.3g}"
        return ""


def _bound(own: Array, exact: Array, moved: Sequence[Array], eps: float) -> float:
    """How far an output may be from what it is in float64."""
    if own.dtype.kind not in "fV":
        return 0.0 if all(np.array_equal(own, other) for other in (exact, *moved)) else np.inf
    numbers = own.astype(np.float64)
    noise = max(np.max(np.abs(other.astype(np.float64) - numbers), initial=0.0) for other in (exact, *moved))
    scale = np.max(np.abs(exact), initial=0.0)
    if not np.isfinite(noise) or noise > MEANINGLESS * max(scale, eps):
        return np.inf
    return float(NOISE * noise + ROUNDINGS * eps * max(scale, 1e-3))


def _nudged(x: Array, step: float, rng: np.random.Generator) -> Array:
    return (x * (1 + step * rng.choice([-1, 1], x.shape))).astype(x.dtype) if x.dtype.kind in "fV" else x


def with_rows(graph: Graph, inputs: Sequence[Array], rows: int) -> list[Array]:
    """The inputs for another number of rows: the same rows again and again."""
    binding = dict.fromkeys(graph.symbols, rows)
    changed = []
    for value, array in zip(graph.inputs, inputs, strict=True):
        for axis, dim in enumerate(value.type.shape):
            extent = evaluate(dim, binding)
            if extent != array.shape[axis]:
                array = np.take(array, np.arange(extent) % array.shape[axis], axis)
        changed.append(np.array(array, order="C"))
    return changed

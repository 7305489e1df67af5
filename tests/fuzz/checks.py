"""What must hold of any graph: passes keep what they declare, in any order; twins compute the same; compiled code agrees.

Each check draws everything from one seed and returns a `Defect`, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mlec import registry
from mlec.errors import MlecError
from mlec.ir import run_graph
from mlec.ir.op import Array
from mlec.passes.pipelines import named_pipeline
from mlec.passes.quantize import QuantizeInt8
from mlec.passes.quantize.layers import find_layers
from mlec.passes.recognize import Recognize
from mlec.passes.stability import CheckNumerics
from mlec.pipeline import Pass, PassContext, PassPipeline, TargetFacts
from mlec.tolerance import EXACT, Tolerance
from tests.fuzz.compiled import check_compiled
from tests.fuzz.defect import Defect
from tests.fuzz.eight_bits import bounds_on_eight_bits
from tests.fuzz.exact import beyond, run_rounded_once
from tests.fuzz.graphs import Sample, random_sample, random_small_sample
from tests.fuzz.narrow import sometimes_narrow
from tests.fuzz.rules import random_rule_sample
from tests.fuzz.twins import twin

OURS = tuple(name for name in registry.PASSES if name != "quantize-int8")
"""The passes whose results stay near on any inputs."""
LEVELS = ("O0", "O1", "O2", "O3")
ANYTHING = Tolerance(rtol=1e30, atol=1e30, signed_zeros=False, specials=False)
ROUNDINGS = 512
"""Units of the coarsest type's eps that results may move by where sums are taken in another order."""


def check_passes(seed: int) -> Defect | None:
    """A pass by itself, a named pipeline, and passes in an order that nobody thought of."""
    sample, rng = random_sample(seed), np.random.default_rng([seed, 1])
    sample = sometimes_narrow(sample, np.random.default_rng([seed, 7]), 0.1)
    every = [registry.load("passes", name)() for name in OURS]
    alone = PassPipeline([every[seed % len(every)]])
    named = _without_search(LEVELS[seed % len(LEVELS)])
    shuffled: list[Pass] = [every[i] for i in rng.integers(len(every), size=8)]
    context = _random_context(rng)
    for pipeline in (alone, named, PassPipeline(shuffled)):
        if defect := _optimised(sample, pipeline, context):
            return defect
    return on_eight_bits(sample) or on_eight_bits(random_small_sample(seed))


def check_rules(seed: int) -> Defect | None:
    """What rules apply to, in the passes that have them, with others before and after."""
    (sample, own), rng = random_rule_sample(seed), np.random.default_rng([seed, 6])
    sample = sometimes_narrow(sample, np.random.default_rng([seed, 7]), 0.3)
    every = [
        *(registry.load("passes", name)() for name in OURS),
        Recognize(specials=False),
        CheckNumerics(stabilize=True),
    ]
    others = [every[i] for i in rng.integers(len(every), size=int(rng.choice([0, 2, 6])))]
    place = int(rng.integers(len(others) + 1))
    return _optimised(sample, PassPipeline([*others[:place], own, *others[place:]]), _random_context(rng))


def on_eight_bits(sample: Sample) -> Defect | None:
    """On 8 bits results stay within the pass's bound on the calibration data; left to itself, as near as rounding errors bring them."""
    if not find_layers(sample.graph)[0]:
        return None
    guarded = QuantizeInt8(calibration=[sample.inputs])
    alone = replace(guarded, method="minmax", balance=0.0, max_error=np.inf, max_accuracy_loss=1.0, tolerance=ANYTHING)
    for step in (guarded, alone):
        expected = run_graph(sample.graph, sample.inputs)
        try:
            optimised, _ = PassPipeline([step]).run(sample.graph, PassContext())
            got = run_graph(optimised, sample.inputs)
            if step is guarded:
                found = _difference(expected, got, step.preserves)
            else:
                found = beyond(bounds_on_eight_bits(sample.graph, sample.inputs), expected, got)
        except MlecError as error:
            found = str(error)
        if found:
            return Defect(found, str(step), sample.graph, on_eight_bits)
    return None


def _random_context(rng: np.random.Generator) -> PassContext:
    return PassContext(TargetFacts(vector_bytes=int(rng.choice([16, 32, 64])), row_programs=bool(rng.random() < 0.5)))


def check_twins(seed: int) -> Defect | None:
    """A graph that is spelled in another way gives the same results after the passes."""
    sample, rng = random_sample(seed), np.random.default_rng([seed, 2])
    sample = sometimes_narrow(sample, np.random.default_rng([seed, 7]), 0.1)
    other = Sample(twin(sample.graph, rng), sample.inputs)
    expected = run_graph(sample.graph, sample.inputs)
    if found := _difference(expected, run_graph(other.graph, other.inputs), EXACT):
        return Defect(f"the twin is none: {found}", "none", other.graph)
    return _optimised(other, _without_search("O2"), PassContext())


def _without_search(level: str) -> PassPipeline:
    """A named pipeline less the pass that changes nothing and takes its time to look for inputs."""
    pipeline = named_pipeline(level)
    return pipeline.without("stability") if any(step.name == "stability" for step in pipeline) else pipeline


def _optimised(sample: Sample, pipeline: PassPipeline, context: PassContext) -> Defect | None:
    tolerance = EXACT
    for step in pipeline:
        tolerance = tolerance.then(step.preserves)
    narrow = sample.is_narrow
    tolerance = tolerance.on(sample.graph)
    if not tolerance.is_exact:
        if not sample.is_stable():
            return None
        if not narrow:
            tolerance = tolerance.then(Tolerance(rtol=ROUNDINGS * sample.coarsest, atol=ROUNDINGS * sample.coarsest))
    run = run_rounded_once if narrow else run_graph  # so that the order of sums does not hide what 16 bits show
    try:
        optimised, _ = pipeline.run(sample.graph, context)
        found = _difference(run(sample.graph, sample.inputs), run(optimised, sample.inputs), tolerance)
    except MlecError as error:
        found = str(error)
    if not found:
        return None
    return Defect(found, str(pipeline), sample.graph, lambda other: _optimised(other, pipeline, context))


def _difference(expected: Sequence[Array], got: Sequence[Array], tolerance: Tolerance) -> str:
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"output {i} is {b.dtype}{b.shape} in place of {a.dtype}{a.shape}"
        if (excess := tolerance.excess(a, b)) > 1:
            return f"output {i} moved by {excess:.3g} times its bound"
        if tolerance.moves_zeros(a, b):
            return f"a zero of output {i} changed its sign"
    return ""


CHECKS: dict[str, Callable[[int], Defect | None]] = {
    "passes": check_passes,
    "rules": check_rules,
    "twins": check_twins,
    "compiled": check_compiled,
}

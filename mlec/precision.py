"""From the precision that a user asks for to the passes that bring it about, and to the inputs that they are calibrated with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from mlec.errors import UsageError
from mlec.frontends.example_inputs import for_signature
from mlec.ir import Graph
from mlec.ir.op import Array
from mlec.pipeline import Pass, PassPipeline
from mlec.runtime.edge import Edge
from mlec.signature import Signature
from mlec.tolerance import Tolerance
from mlec.wording import plural

PASSES = {
    "int8": "quantize-int8",
    "fp16": "mixed-precision{dtype = fp16}",
    "bf16": "mixed-precision{dtype = bf16}",
}
"""By precision, the pass that brings a network to it. The others need none."""
INSIDE_KERNELS = ("layout", "fuse")
"""What such a pass must precede."""


def in_precision(pipeline: PassPipeline, precision: str) -> PassPipeline:
    """The pipeline with the pass that the precision needs, unless it is there."""
    if precision not in PASSES:
        return pipeline
    wanted = _pass_of(precision)
    if any(step.name == wanted.name for step in pipeline):
        return pipeline
    before = next((step.name for step in pipeline if step.name in INSIDE_KERNELS), None)
    return pipeline.insert(wanted, before=before)


@cache
def _pass_of(precision: str) -> Pass:
    return PassPipeline.parse(PASSES[precision]).passes[0]


def _brings_to(step: Pass, precision: str) -> bool:
    """Whether a pass is the one of a precision; its other options may differ."""
    wanted = _pass_of(precision)
    return step.name == wanted.name and getattr(step, "dtype", None) == getattr(wanted, "dtype", None)


def precision_of(pipeline: PassPipeline, asked: str) -> str:
    """The precision that the passes bring a network to, which a user may name instead of asking for a precision.

    Raises:
        UsageError: another one was asked for.
    """
    found = {precision for precision in PASSES if any(_brings_to(step, precision) for step in pipeline)}
    if asked != "fp32" and found - {asked}:
        raise UsageError(
            f"precision {asked!r} with passes for {', '.join(sorted(found))}",
            hint=f"leave out {', '.join(PASSES[name] for name in sorted(found - {asked}))}, or ask for its precision",
        )
    return next(iter(found), asked)


def check_network(graph: Graph, precision: str) -> None:
    """Refuses to bring anything but a network to a lower precision.

    Raises:
        UsageError: ``E_NOT_OFFERED``, for an estimator.
    """
    if precision not in PASSES or graph.signature.kind == "network":
        return
    trees = any(node.name == "tree_ensemble" for node in graph.nodes)
    reason = (
        "the splits of a tree ensemble are compared as whole numbers already, and its sums are kept as the library has them"
        if trees
        else "it computes in float64 as its library does, and its labels would not stay the same"
    )
    raise UsageError(
        f"precision {precision!r} is for networks, and this is a {graph.signature.kind}: {reason}",
        code="E_NOT_OFFERED",
        hint="compile it with precision='fp32'",
    )


Batches = list[list[Array]]


def bounded(pipeline: PassPipeline, budget: float | None, tolerance: Tolerance | None) -> PassPipeline:
    """The pipeline with what the user allows the pass that rounds most to cost.

    Raises:
        UsageError: a budget that is no part of the whole, or no pass that takes one.
    """
    if budget is not None and (
        isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1
    ):
        raise UsageError(
            f"accuracy_budget takes a part between 0 and 1, got {budget!r}", hint="0.005 is half a point of accuracy"
        )
    bounding = [step for step in pipeline if hasattr(step, "max_accuracy_loss")]
    if budget is not None and not bounding:
        raise UsageError("accuracy_budget is for int8", hint="leave it out, or compile with precision='int8'")
    for step in bounding:
        given = {"max_accuracy_loss": float(budget), "max_error": float(budget)} if budget is not None else {}
        changed: Any = replace(step, **given, **({"tolerance": tolerance} if tolerance is not None else {}))
        pipeline = pipeline.replace(step.name, changed)
    return pipeline


def calibrated(
    pipeline: PassPipeline, signature: Signature, calibration: Any, examples: Sequence[Any] | None
) -> tuple[PassPipeline, Batches, list[str]]:
    """The pipeline with inputs for the passes that measure numbers on some: those given, those that a pass has, or the examples.

    Returns:
        The pipeline, these inputs (none where no pass needs any), and warnings.

    Raises:
        UsageError: there are none, or some for a pipeline that needs none.
        InputError: they do not fit the model.
    """
    needing = [step for step in pipeline if hasattr(step, "calibration")]
    observing = [step for step in pipeline if hasattr(step, "examples")]
    if calibration is not None and not (needing or observing):
        hint = "leave calibration out, or compile with precision='int8'"
        raise UsageError("calibration is for precisions below float32", hint=hint)
    batches: Batches = []
    warnings: list[str] = []
    for step in observing:
        seen: Any = calibration if calibration is not None else step.examples
        if seen is not None:
            batches = read_batches(signature, seen)
        shown = batches if seen is not None or examples is None else [Edge(signature).read(list(examples))]
        observer: Any = replace(step, **{"examples": shown})
        pipeline = pipeline.replace(step.name, observer)
    for step in needing:
        given: Any = calibration if calibration is not None else step.calibration
        if given is None and examples is None:
            raise UsageError(
                "int8 needs inputs to calibrate with: the ranges of the numbers inside the network are measured on them",
                hint="pass calibration (--calibration), some hundred inputs as the model will see them",
            )
        if given is None:
            batches = [Edge(signature).read(list(examples or ()))]
            rows = len(batches[0][0]) if batches[0] and batches[0][0].ndim else 1
            warnings.append(
                f"int8 was calibrated with the examples, {plural(rows, 'row')}: calibration (--calibration) takes inputs of "
                "its own, some hundred as the model will see them"
            )
        else:
            batches = read_batches(signature, given)
        changed: Any = replace(step, **{"calibration": batches})
        pipeline = pipeline.replace(step.name, changed)
    return pipeline, batches, warnings


def read_batches(signature: Signature, data: Any) -> Batches:
    """Calibration data as graph inputs.

    Args:
        signature: of the model.
        data: one array or tensor; a tuple with one for each input; a mapping from the names of the inputs; or any other iterable of such,
            as a data loader is. What follows the inputs in a tuple of a loader, such as labels, is left away.

    Raises:
        InputError: it does not fit the model.
        UsageError: there is nothing in it.
    """
    edge = Edge(signature)
    count = len(signature.inputs)

    def one(item: Any) -> list[Array]:
        if isinstance(item, Mapping):
            item = for_signature(item, signature)
        if isinstance(item, (tuple, list)) and not _is_numbers(item):
            item = list(item)[:count]
        arrays = [np.ascontiguousarray(array) for array in edge.read(item)]
        edge.bind(arrays)  # whether their shapes fit
        return arrays

    single = hasattr(data, "__array__") or isinstance(data, (tuple, Mapping)) or _is_numbers(data)
    if isinstance(data, list) and len(data) == count > 1 and all(hasattr(item, "__array__") for item in data):
        single = True
    if not single and not isinstance(data, Iterable):
        raise UsageError(
            f"calibration takes inputs of the model, got {type(data).__name__}",
            hint="an array, a tuple of arrays, or an iterable of these, as a data loader is",
        )
    batches = [one(data)] if single else [one(item) for item in data]
    if not batches or not all(array.size for batch in batches for array in batch):
        raise UsageError("the calibration data is empty", hint="pass some hundred inputs as the model will see them")
    return batches


def _is_numbers(item: Any) -> bool:
    """A list of rows, such as [[1.0, 2.0]]."""
    return isinstance(item, list) and bool(item) and isinstance(item[0], (list, int, float))

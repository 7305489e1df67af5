"""The public functions: compile, load, lower, optimize, and the names of the original export workflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

import mlec.ops  # noqa: F401  (fills the op table)
from mlec import registry
from mlec.backends.base import Backend, CompiledModule, CompileOptions, refuse_unsupported
from mlec.capabilities import check_precision
from mlec.errors import MlecError, UsageError
from mlec.frontends.base import Frontend, InputShapes, LowerOptions, Oracle
from mlec.frontends.example_inputs import for_model, for_signature
from mlec.frontends.select import frontend_for, load_model_file
from mlec.frontends.source_process import SourceProcess
from mlec.ir import Graph
from mlec.ir.dtype import DType
from mlec.ir.extents import with_extents
from mlec.measuring.ablation import Bench, measure_rewrites, measure_whole
from mlec.measuring.cost_model import CostModel
from mlec.measuring.machine import this_machine
from mlec.measuring.observation import observe
from mlec.measuring.race import race
from mlec.measuring.trials import HostTrials
from mlec.measuring.tuning import Tuning
from mlec.packaging.loading import load
from mlec.packaging.packing import pack
from mlec.packaging.recompiling import executable_of
from mlec.pipeline import NOMINAL_EXTENT, Pass, PassContext, PassPipeline, PassRecord, Tolerance
from mlec.precision import Batches, bounded, calibrated, check_network, in_precision, precision_of
from mlec.processor import best_of, described, needed_cpu_flags, what_is_missing
from mlec.progress import progress_bar
from mlec.ranges import ranges_of
from mlec.report import OptimizationReport, graph_picture, graph_stats
from mlec.runtime import CompiledModel, Executable
from mlec.runtime.device import DEVICES
from mlec.runtime.nested import Nesting
from mlec.runtime.threads import checked_num_threads
from mlec.target import Target
from mlec.validation.agreement import LOWERED, measured
from mlec.validation.answers import SourceAnswers, ask_beside
from mlec.validation.differential import compare, default_tolerance
from mlec.validation.differential import validate as validate_model
from mlec.validation.probes import probe_inputs

if TYPE_CHECKING:
    from mlec.artifact import SaveResult


@dataclass(frozen=True)
class _Source:
    """A model together with what lowers it and its example inputs; ``model`` is None for a graph given as such."""

    graph: Graph
    frontend: Frontend | None
    model: Any
    name: str
    examples: tuple[Any, ...] | None

    @cached_property
    def oracle(self) -> Oracle:
        """The functions of the source; none of a graph, or where its library is not installed."""
        return {} if self.frontend is None else self.frontend.oracle(self.model)

    @cached_property
    def given(self) -> list[Any] | None:
        """The examples; without any, inputs made here, if they can be made."""
        inputs = self.examples or probe_inputs(self.graph)
        return None if inputs is None else list(inputs)

    @cached_property
    def answers(self) -> Callable[[], SourceAnswers]:
        """What the compiled model is compared with; a source in another process begins to answer when this is first looked at."""
        return ask_beside(self.graph, self.oracle, self.examples)


@dataclass(frozen=True)
class _Variant:
    """The model compiled for one target: the graph after the passes, what those did, and the code."""

    target: Target
    graph: Graph
    records: Sequence[PassRecord]
    module: CompiledModule

    @property
    def missing(self) -> str:
        """In words, what this processor lacks to run it; empty if it can."""
        return what_is_missing(needed_cpu_flags(self.module.program.device, self.module.program.target))


def compile(
    model: Any,
    example_inputs: Any = None,
    *,
    input_shapes: InputShapes | None = None,
    target: str | Mapping[str, Any] | Target = "cpu",
    precision: str = "fp32",
    dynamic_batch: bool = True,
    passes: str | PassPipeline | Sequence[Pass] = "default",
    calibration: Any = None,
    tolerance: Tolerance | None = None,
    tune: int = 0,
    validate: bool = True,
    progress: bool | None = None,
    trust_pickle: bool | str = False,
    model_class: str | None = None,
    num_threads: int | None = None,
    measure_passes: bool | Literal["total"] = False,
    stabilize: bool = False,
    input_ranges: Mapping[str, tuple[float, float]] | Literal["examples"] | None = None,
    accuracy_budget: float | None = None,
) -> CompiledModel:
    """Compiles a trained model.

    Args:
        model: a scikit-learn estimator or Pipeline, an XGBoost or LightGBM model, a torch module, graph module or exported program,
            a `Graph`, or the path of a file of one.
        example_inputs: a tuple of arrays or tensors, or one array, or a mapping from the names of the inputs; needed where the model
            doesn't tell its input shapes.
        input_shapes: ``{"x": ("n", 128)}`` or ``[("n", 128)]``; a string names a symbolic dim.
        target: ``"cpu"``, ``"cpu:x86-64-v3,x86-64-v4"`` (code for each; the best that the processor has runs), ``"cpu:portable"``,
            ``"cuda"``, ``"cuda:sm_90"``, ``"numpy"`` (the reference interpreter), a mapping as TVM writes targets, or a `Target`; its
            kind decides the backend.
        precision: ``"fp32"`` (as the source computes), ``"fp64"``, or of a network ``"int8"``: 8 bits where that keeps the results, see
            docs/quantization.md, ``"fp16"`` or ``"bf16"``: weights in 16 bits, see docs/precision.md.
        dynamic_batch: any number of rows; otherwise the number in the examples.
        passes: ``"O0"`` .. ``"O3"``, ``"default"`` (the `pipeline` of the backend, mostly O2), the text of a pipeline, a
            `PassPipeline`, or a list of passes.
        calibration: inputs to measure the ranges of numbers on, for int8: an array, a tuple with one for each input, a mapping from their
            names, or an iterable of such; by default the examples.
        tolerance: the bound that validation must hold; the documented bound by default.
        tune: for each distinct kernel, how many schedules to measure on this machine beside the cost model's; one that is clearly faster
            takes its place. Measured at 1 row, 64 and as many as the examples have (without examples at 1, 64 and 1024), less those
            that take a kernel too long. What was found is remembered, see `mlec.measuring.tuning`.
        validate: run source and compiled model on the examples and on probing inputs; a difference beyond the bound is an error.
        progress: None shows a bar on a terminal.
        trust_pickle: allow executing a pickle-based file; ``"sha256:..."`` allows that one file.
        model_class: ``"package.module:Class"`` of a state dict.
        num_threads: threads of one call; all usable CPUs by default.
        measure_passes: also measure what each pass is worth, by compiling the graph before and after it, and each rule of a pass, by
            running the pass without it (slow); ``"total"``: what all of them are worth together, by compiling the graph as it came, unless
            generating code takes long.
        stabilize: put stable spellings in the place of formulas that lose the result, such as a softmax that overflows. Results may then be
            numbers where the source has none.
        input_ranges: smallest and largest number that inputs can hold, by name, for the findings on numerical stability: what cannot
            happen in them is none. ``"examples"``: as in the examples. Of others, floats up to 1000 are assumed, of the examples' signs.
        accuracy_budget: how much int8 may cost on the calibration data: of scores of classes, the part of the rows by which accuracy may be
            expected to fall (by default 0.005, half a point); of other outputs, the root mean square of the errors relative to that of
            the results (by default 0.1). Layers go back to float32 until that holds, and the tolerance.

    Returns:
        The compiled model, with its report.

    Raises:
        MlecError: see the subclasses in `mlec.errors`.
    """
    _check_options(precision, tune, tolerance)
    wanted = Target.parse(target)
    if tune:
        for one in wanted.variants:
            registry.backend_of(one.kind).check_tunable(one)
    options = LowerOptions(None, input_shapes, dynamic_batch, trust_pickle, model_class)
    with progress_bar(progress, "compile") as advance:
        advance("import", 0, 4)
        source = _lower(model, example_inputs, options)
        _check_doubles(source.graph, precision)
        examples = source.examples
        advance("optimise", 1, 4)
        machine = this_machine()
        backend = registry.backend_of(wanted.kind)
        pipeline = in_precision(_pipeline(passes, backend), precision)
        precision = precision_of(pipeline, precision)
        check_network(source.graph, precision)
        if validate and not tune and precision not in LOWERED:  # tuning measures, and wants no company
            _ = source.answers  # the library of a file works in a process of its own, beside this one
        pipeline = bounded(pipeline, accuracy_budget, tolerance)
        pipeline, batches, notes = calibrated(pipeline, source.graph.signature, calibration, examples)
        if stabilize:
            pipeline = _stabilizing(pipeline)
        given, seen = ranges_of(source.graph.signature, examples, input_ranges)

        def context_for(one: Target) -> PassContext:
            trials = None if one.kind == "numpy" else HostTrials(one, num_threads)
            return PassContext(backend.facts(one), precision, given, seen, trials)

        def options_for(graph: Graph) -> CompileOptions:
            advance("generate", 2, 4)
            return CompileOptions(advance, _tuning(tune, graph, examples, num_threads))

        variants = _best_first(
            [_build(source.graph, pipeline, context_for(one), one, options_for) for one in wanted.variants]
        )
        first = variants[0]
        report = OptimizationReport(
            model={"name": source.name, "source": source.frontend.name if source.frontend else "graph"}
        )
        report.model["precision"] = precision
        report.warnings += [*options.notes, *notes]
        model = CostModel(machine, num_threads)
        report.add_passes(first.records, model)
        advance("validate", 3, 4)
        compiled = _assemble(source, variants, report, num_threads)
        _fill(report, source.graph, variants, model)
        report.warnings += [f"not validated or timed for {v.target}: {v.missing}" for v in variants if v.missing]
        if first.module.program.device == "cpu" and not first.missing:
            others = {
                v.target: CompiledModel(v.graph.signature, executable_of(v.module, v.graph, num_threads))
                for v in variants[1:] if not v.missing
            }  # fmt: skip
            inputs = _run_and_check(compiled, others, source, tolerance, report, batches) if validate else None
            if inputs is not None:
                observe(report, compiled, inputs, first.module, model)
            affordable = measure_passes is True or first.module.seconds < AFFORDABLE_SECONDS
            if measure_passes and affordable and (shown := inputs or source.given):
                advance("measure", 3, 4)
                bench = Bench(shown, first.target, model)
                if measure_passes is True:
                    measure_rewrites(report, first.records, context_for(first.target), bench)
                else:
                    measure_whole(report, source.graph, first.graph, bench)
        advance("done", 4, 4)
        report.timing["stages"] = advance.seconds
    return compiled


def lower(
    model: Any, example_inputs: Any = None, *, input_shapes: InputShapes | None = None, dynamic_batch: bool = True,
    trust_pickle: bool | str = False, model_class: str | None = None,
) -> Graph:  # fmt: skip
    """The model as a graph, before any pass; arguments as for `compile`."""
    options = LowerOptions(None, input_shapes, dynamic_batch, trust_pickle, model_class)
    return _lower(model, example_inputs, options).graph


def optimize(
    graph: Graph,
    passes: str | PassPipeline | Sequence[Pass] = "default",
    *,
    target: str | Mapping[str, Any] | Target = "cpu",
) -> tuple[Graph, OptimizationReport]:
    """Runs passes on a graph: those that `compile` runs for the target, unless others are given.

    Returns:
        The new graph and what was done.

    Raises:
        UsageError: for what is no graph.
    """
    if not isinstance(graph, Graph):
        raise UsageError(
            f"optimize takes a mlec.Graph, got {type(graph).__name__}",
            hint="mlec.lower(model) makes one of a model; mlec.compile runs the passes itself",
        )
    machine = this_machine()
    backend, context = passes_of(target)
    optimized, records = _pipeline(passes, backend).run(graph, context)
    report = OptimizationReport(model={"name": graph.name, "source": "graph"}, machine=machine.to_dict())
    report.add_passes(records, CostModel(machine))
    report.graphs = {"before": graph_picture(graph), "after": graph_picture(optimized)}
    return optimized, report


# -- the names of the original workflow ----------------------------------------------------------------------------------


def export_model(
    model: Any, output_path: str | os.PathLike[str], input_shape: Sequence[int] | None = None, *, example_inputs: Any = None,
    compression: str | None = None, quantization: str | None = None, metadata: Mapping[str, Any] | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Compiles and saves in one call; errors are returned, not raised.

    Args:
        model: as for `compile`.
        output_path: the ``.mle`` file.
        input_shape: shape of the one input, batch included; the batch stays free.
        example_inputs: as for `compile`.
        compression, quantization: None or ``"none"``, or the name of a scheme.
        metadata: kept in the file.
        options: further arguments of `compile`, and ``sign_key`` and ``encryption_key`` as `CompiledModel.save` takes them.

    Returns:
        ``success``, ``path``, ``size_bytes``, ``report``; with ``error`` and ``hint`` when it failed.
    """
    precision = {None: "fp32", "none": "fp32"}.get(quantization, quantization or "fp32")
    shapes: InputShapes | None = None if input_shape is None else [["n", *list(input_shape)[1:]]]
    keys: dict[str, Any] = {name: options.pop(name) for name in ("sign_key", "encryption_key") if name in options}
    saving: dict[str, Any] = {"compression": None if compression == "none" else compression, **keys}
    from mlec.artifact import Storage

    try:
        Storage.of(saving)  # before the long work
        compiled = compile(model, example_inputs, input_shapes=shapes, precision=precision, **options)
        saved: SaveResult = compiled.save(output_path, metadata=metadata, **saving)
    except MlecError as error:
        return {
            "success": False,
            "path": None,
            "size_bytes": 0,
            "report": None,
            "error": error.message,
            "code": error.code,
            "hint": error.hint,
        }
    return {"success": True, "path": saved.path, "size_bytes": saved.size_bytes, "report": compiled.report.to_dict()}


def load_model(path: str | os.PathLike[str], **options: Any) -> CompiledModel:
    """`load` under its original name."""
    return load(path, **options)


def validate_export(
    original: Any, path: str | os.PathLike[str], inputs: Any, *, tolerance: Tolerance | None = None
) -> dict[str, Any]:
    """Compares a saved model with its source on the inputs given, by default to the documented parity bound.

    Returns:
        ``passed``, ``max_abs_error``, ``max_rel_error``, ``mean_abs_error``, ``label_mismatches``, ``shapes_match``, ``tolerance`` and, by
        method, the comparisons behind them.
    """
    oracle = frontend_for(original).oracle(original)
    compiled = load(path)
    bound = tolerance or LOWERED.get(compiled.report.model.get("precision")) or default_tolerance(compiled.graph)
    found = compare(compiled, oracle, list(_examples(inputs, original) or ()), bound)
    return {
        "passed": all(c.excess <= 1 for c in found),
        "max_abs_error": max((c.max_abs_error for c in found), default=0.0),
        "max_rel_error": max((c.max_rel_error for c in found), default=0.0),
        "mean_abs_error": max((c.mean_abs_error for c in found), default=0.0),
        "label_mismatches": sum(c.label_mismatches for c in found),
        "shapes_match": all(np.isfinite(c.excess) for c in found),
        "tolerance": {"rtol": bound.rtol, "atol": bound.atol},
        "methods": {c.method: asdict(c) for c in found},
    }


# -- steps ---------------------------------------------------------------------------------------------------------------


def _check_options(precision: str, tune: int, tolerance: object) -> None:
    check_precision(precision)
    if isinstance(tune, bool) or not isinstance(tune, int) or tune < 0:
        raise UsageError(
            f"tune takes a whole number of trials for each kernel, got {tune!r}",
            hint="0 takes the schedules of the cost models; 16 is a good start",
        )
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise UsageError(
            f"tolerance takes a mlec.Tolerance, got {tolerance!r}",
            hint="for example mlec.Tolerance(rtol=1e-3, atol=1e-6)",
        )


def _check_doubles(graph: Graph, precision: str) -> None:
    """Refuses to promise float64 for a network that computes in less; estimators compute as their source does."""
    if precision != "fp64" or graph.signature.kind != "network":
        return
    kinds = {value.type.dtype for node in graph.nodes for value in node.outputs}
    if narrow := sorted(str(kind) for kind in kinds & {DType.F32, DType.F16, DType.BF16}):
        raise UsageError(
            f"precision='fp64' for a network that computes in {', '.join(narrow)}",
            code="E_NOT_OFFERED",
            hint="convert the module before compiling it: module.double()",
        )


def _examples(inputs: Any, model: object) -> tuple[Any, ...] | None:
    """One entry for each input; of a mapping by the names that the model has for them, or else in its order."""
    if inputs is None:
        return None
    if isinstance(inputs, (tuple, list)) and not _is_table_literal(inputs):
        return tuple(inputs)
    if isinstance(inputs, Mapping) and not hasattr(inputs, "columns"):
        return for_model(inputs, model)
    return (inputs,)


def _is_table_literal(inputs: Sequence[Any]) -> bool:
    """A list of rows, such as [[1.0, 2.0]]."""
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], (list, int, float, str))


def _lower(model: Any, example_inputs: Any, options: LowerOptions) -> _Source:
    name = model.name if isinstance(model, Graph) else type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        name = path.stem.encode(errors="replace").decode()  # of bytes that are no text, what a file can hold
        frontend, model = load_model_file(path, options)
    else:
        frontend = None if isinstance(model, Graph) else frontend_for(model)
    if frontend is None:
        examples = _examples(example_inputs, None)
        return _Source(model.with_signature(model.signature), None, None, name, examples)
    examples = _examples(example_inputs, model)
    graph = frontend.lower(model, replace(options, example_inputs=examples))
    if graph.signature.table is not None and not options.dynamic_batch:
        graph = _for_the_rows_of(examples, graph)
    if isinstance(example_inputs, Mapping) and not hasattr(model, "forward"):  # only the graph tells the names
        examples = for_signature(example_inputs, graph.signature)
    return _Source(graph.with_signature(graph.signature), frontend, model, name, examples)


def _for_the_rows_of(examples: tuple[Any, ...] | None, graph: Graph) -> Graph:
    """The graph of an estimator for as many rows as the example has."""
    if not examples or not len(examples[0]):
        raise UsageError(
            "a fixed batch has as many rows as the example, and there are none",
            hint="pass example_inputs, or leave dynamic_batch=False away to take any number of rows",
        )
    return with_extents(graph, {"n": len(examples[0])})


def passes_of(target: str | Mapping[str, Any] | Target) -> tuple[Backend, PassContext]:
    """What compiles for one target, with its default pipeline, and what the passes may know of it.

    Raises:
        UsageError: the target is several processors.
    """
    wanted = Target.parse(target)
    if len(wanted.variants) > 1:
        raise UsageError(f"the passes run for one processor, got {wanted}", hint=f"for example {wanted.variants[-1]}")
    backend = registry.backend_of(wanted.kind)
    return backend, PassContext(backend.facts(wanted))


def _pipeline(passes: str | PassPipeline | Sequence[Pass], backend: Backend) -> PassPipeline:
    if isinstance(passes, PassPipeline):
        return passes
    if isinstance(passes, str):
        return PassPipeline.parse(backend.pipeline if passes == "default" else passes)
    if not isinstance(passes, (list, tuple)):
        raise UsageError(
            f"passes takes a name, a text, a PassPipeline or a list of passes, got {passes!r}",
            hint='for example passes="O2"',
        )
    return PassPipeline(passes)


def _stabilizing(pipeline: PassPipeline) -> PassPipeline:
    """The pipeline with stable rewrites: where it looks for them, or else first of all."""
    from mlec.passes.stability import CheckNumerics  # loading a model needs no passes

    if not any(isinstance(step, CheckNumerics) for step in pipeline):
        pipeline = PassPipeline([CheckNumerics(), *pipeline], pipeline.verify, pipeline.instruments)
    steps = [replace(step, stabilize=True) if isinstance(step, CheckNumerics) else step for step in pipeline]
    return PassPipeline(steps, pipeline.verify, pipeline.instruments)


TUNED_ROWS = (1, 64, 1024)
"""Rows at which kernels are tuned where no examples tell of others."""


def _tuning(trials: int, graph: Graph, examples: tuple[Any, ...] | None, num_threads: int | None) -> Tuning | None:
    """How much to tune, and at which extents of the graph's symbolic dims: few rows, many, and what the examples have."""
    if not trials:
        return None
    given: dict[str, int] = {}
    for value, example in zip(graph.inputs, examples or (), strict=False):
        given |= {str(dim): size for dim, size in zip(value.type.shape, np.shape(example), strict=False)}
    symbols = sorted(graph.symbols)
    rows = {str(value.type.shape[0]) for value in graph.inputs if value.type.shape}
    if all(symbol in given for symbol in symbols):
        shown = {symbol: given[symbol] for symbol in symbols}
        extents = [{s: n if s in rows else size for s, size in shown.items()} for n in TUNED_ROWS[:2]] + [shown]
    else:
        extents = [dict.fromkeys(symbols, n) for n in TUNED_ROWS]
    limits = graph.signature.symbols
    for binding in extents:
        for symbol, (least, most) in limits.items():
            if symbol in binding:
                binding[symbol] = max(least, binding[symbol] if most is None else min(binding[symbol], most))
    distinct = {tuple(binding.items()): binding for binding in extents}
    return Tuning(trials, tuple(distinct.values()), checked_num_threads(num_threads))


def _build(
    graph: Graph,
    pipeline: PassPipeline,
    context: PassContext,
    target: Target,
    options_for: Callable[[Graph], CompileOptions],
) -> _Variant:
    backend = registry.backend_of(target.kind)
    optimized, records = pipeline.run(graph, context)
    refuse_unsupported(optimized, backend, target.kind)
    options = options_for(optimized)
    module = None
    if isinstance(context.trials, HostTrials) and options.tuning is None:
        module = context.trials.module(optimized, target)
    return _Variant(target, optimized, records, module or backend.compile(optimized, target, options))


def _best_first(variants: list[_Variant]) -> list[_Variant]:
    """In front the one that this processor runs best, or else the most demanding: graph, report and timing are about that one."""
    needed = [needed_cpu_flags(variant.module.program.device, variant.module.program.target) for variant in variants]
    best = best_of(needed)
    first = variants[max(range(len(needed)), key=lambda i: len(needed[i])) if best is None else best]
    return [first, *(variant for variant in variants if variant is not first)]


def _assemble(
    source: _Source, variants: Sequence[_Variant], report: OptimizationReport, num_threads: int | None
) -> CompiledModel:
    optimized, module = variants[0].graph, variants[0].module
    metadata = {
        "name": source.name,
        "source": source.frontend.name if source.frontend else "graph",
        "target": dict(module.program.target),
    }

    def save(path: Path, **options: Any) -> SaveResult:
        return pack(path, optimized, [v.module for v in variants], report, metadata, options)

    opened = executable_of if module.program.device == "cpu" and not variants[0].missing else _OnUse
    executable: Any = opened(module, optimized, num_threads)
    return CompiledModel(
        optimized.signature, executable, metadata, graph=lambda: optimized, report=lambda: report, saver=save,
        device=DEVICES.get(module.program.device),
    )  # fmt: skip


class _OnUse:
    """Opens the device, or finds that the processor is another one, when the model is first run: compiling needs neither."""

    def __init__(self, module: CompiledModule, graph: Graph, num_threads: int | None) -> None:
        self._what = (module, graph, num_threads)

    @cached_property
    def _executable(self) -> Any:
        return executable_of(*self._what)

    def run(self, inputs: list[Any], out: Any = None) -> Any:
        return self._executable.run(inputs) if out is None else self._executable.run(inputs, out)

    def run_single(self, x: Any, out: Any = ()) -> None:
        """Leaves it to `run`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._executable, name)


AFFORDABLE_SECONDS = 10.0
"""Code that took longer to generate is not generated again only to tell what the passes are worth."""
PREDICTED_ROWS = (1, NOMINAL_EXTENT, 1024)


def _fill(report: OptimizationReport, before: Graph, variants: Sequence[_Variant], model: CostModel) -> None:
    after, module = variants[0].graph, variants[0].module
    if len(variants) > 1:
        report.model["variants"] = [str(variant.target) for variant in variants]
    report.model |= {
        "kind": after.signature.kind,
        "target": {"device": module.program.device, "backend": module.program.backend, **module.program.target},
    }
    if variants[0].target.kind == "cpu" and not variants[0].target.arch and (name := next(described("model name"), "")):
        report.model["processor"] = name
    predicted = {n: model.module_seconds(module, dict.fromkeys(after.symbols, n)) for n in PREDICTED_ROWS}
    notes = {note.symbol: note for note in module.notes}
    report.add_kernels(module.program.kernels, notes, predicted[NOMINAL_EXTENT][1])
    report.tuning = [
        {
            "symbol": kernel.symbol, "op": kernel.op, "location": kernel.location, "remembered": kernel.remembered,
            **msgspec.to_builtins(kernel.finding),
        }
        for kernel in module.tuned
    ]  # fmt: skip
    report.graphs = {"before": graph_picture(before), "after": graph_picture(after)}
    report.machine = model.machine.to_dict()
    report.timing = {
        "compile_seconds": sum(variant.module.seconds for variant in variants),
        "predicted_seconds": {str(n): seconds for n, (seconds, kernels) in predicted.items() if kernels},
    }
    report.memory = {
        "weights_bytes": sum(a.nbytes for a in module.constants.values()),
        "code_bytes": sum(map(len, module.objects)),
        "before": graph_stats(before),
        "after": graph_stats(after),
    }


def _comparison(
    source: _Source, tolerance: Tolerance | None, report: OptimizationReport, calibration: Batches
) -> Callable[[CompiledModel], dict[str, Any]]:
    """What compares a compiled model with the source; of a lower precision on the examples and the calibration data."""
    precision = report.model["precision"]
    if precision in LOWERED:
        flat = Nesting([spec.name for spec in source.graph.signature.inputs]).is_flat
        batches = [*([source.given] if source.given else []), *(calibration if flat else [])]
        return lambda model: measured(model, source.oracle, batches, tolerance or LOWERED[precision])
    bound = tolerance or default_tolerance(source.graph)
    if any(finding["applied"] for finding in report.stability):
        bound = replace(bound, specials=False)  # where the source lost the result, there is nothing to compare with
    return lambda model: validate_model(model, source.answers(), bound)


def _run_and_check(
    compiled: CompiledModel, others: Mapping[Target, CompiledModel], source: _Source, tolerance: Tolerance | None,
    report: OptimizationReport, calibration: Batches,
) -> list[Any] | None:  # fmt: skip
    """Compares all variants with the source, and times the first: on the inputs that are returned, if there are any."""
    oracle = source.oracle
    if oracle:
        check = _comparison(source, tolerance, report, calibration)
        report.parity = check(compiled)
        for target, other in others.items():
            try:
                found = check(other)
            except MlecError as error:
                error.notes = (*error.notes, f"compiled for {target}")
                raise
            report.parity["methods"] = {
                name: max(worst, found["methods"].get(name, worst), key=lambda comparison: comparison["excess"])
                for name, worst in report.parity["methods"].items()
            }
    elif source.frontend is not None:
        report.warnings.append(f"not compared with its source: install {source.frontend.name} to compare")
    timed = source.given if report.model["precision"] in LOWERED else source.answers().timed
    if not timed:
        return None
    held_back = isinstance(oracle, SourceProcess) and not oracle.timed
    report.timing["measured"] = _timing(compiled, timed, {} if held_back else oracle)
    usage = compiled.memory_usage()
    report.memory |= {f"{what}_bytes": usage[what] for what in ("peak", "arena", "live", "peak_apart") if what in usage}
    return timed


def _timing(compiled: CompiledModel, inputs: list[Any], oracle: Oracle) -> dict[str, Any]:
    """Milliseconds a call of the compiled model and of its source, in turn, on the same inputs: the least of many."""
    argument: Any = inputs if compiled.signature.table is None else inputs[0]
    shape = np.shape(inputs[0])
    names = list(compiled.signature.run) or ["run"]

    def source() -> float | None:
        if isinstance(oracle, SourceProcess):  # what it takes there: the way there says nothing
            return sum(oracle.seconds(name, argument) for name in names)
        for name in names:
            oracle[name](argument)
        return None

    def ours() -> None:
        compiled.run(inputs)

    actions = {"compiled": ours} | ({"source": source} if all(n in oracle for n in names) else {})
    threads = getattr(compiled.executable, "num_threads", None)
    hold = partial(setattr, compiled.executable, "num_threads") if isinstance(compiled.executable, Executable) else None
    found = race(actions, threads, oracle, hold=hold)
    result: dict[str, Any] = {
        "rows": int(shape[0]) if shape else 1,
        "compiled_ms": found.spreads["compiled"]["min"],
        "threads": found.threads,
        "all_threads_ms": found.least * 1e3,
        "processor_time": found.processor_time,
    }
    if "source" in actions:
        result |= {"source_ms": found.spreads["source"]["min"], "source_threads": found.source_threads}
        result |= {"speedup": result["source_ms"] / result["compiled_ms"]}
    return result | {"spread": found.spreads, "disturbance": found.disturbance}

"""mlec run, verify, bench: what executes a .mle file. No training framework is imported unless --against names a model of one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mlec.cli.compiling import (
    PATH,
    allow_own_modules,
    check_outputs,
    is_count,
    parity_lines,
    threads_text,
    trust_pickle_option,
)
from mlec.cli.inspecting import input_text, signature_text
from mlec.cli.output import json_option, print_json, print_pairs, print_table, size_text, time_text
from mlec.wording import plural

if TYPE_CHECKING:
    from mlec.frontends.base import Frontend, Oracle
    from mlec.runtime import CompiledModel
    from mlec.signature import Signature

CHECKED_BYTES = 2_000_000_000
"""Of a larger file, the weights are checked on request only: reading them can take a minute."""

trust_option = click.option(
    "--trust", metavar="sha256:...", help="Run the machine code with this identity although it was not built here."
)


def policy_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that make of what may run a condition; the command gets them as keyword arguments for `mlec.load`."""
    native = click.option("--require-native", is_flag=True, help="Refuse a model whose own code may not run here.")
    return click.option("--require-signature", is_flag=True, help="Refuse a model that no trusted key signed.")(
        native(command)
    )


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of one call. [default: every usable CPU]"
)
against_option = click.option("--against", type=PATH, help="The source model's file, to compare with.")
model_class_option = click.option(
    "--model-class", metavar="pkg.mod:Class", help="The class whose state dict the source's file holds."
)


@click.command("run")
@click.argument("model", type=PATH)
@click.argument("inputs", metavar="INPUT", type=PATH)
@click.option("-o", "--output", type=PATH, help="File for the results: .npy, .npz, .csv or .json.")
@click.option("--method", help="Method of the source to call, e.g. predict_proba. [default: its main ones]")
@threads_option
@trust_option
@policy_options
@json_option
def run_command(
    model: Path,
    inputs: Path,
    output: Path | None,
    method: str | None,
    threads: int | None,
    trust: str | None,
    as_json: bool,
    **policy: bool,
) -> None:
    """Run MODEL (.mle) on INPUT (.npy, .npz, .csv, .parquet).

    An .npz file holds one array for each input, by name or in order. A CSV file has a header, unless its first row holds numbers only.
    """
    from mlec.artifact.atomic import check_replaceable
    from mlec.cli.files import read_inputs, write_outputs, writer_for

    check_outputs([output], {"the model itself": model, "the input itself": inputs})
    if output is not None:
        writer_for(output)
        check_replaceable(output)
    values = read_inputs(inputs)
    with _load(model, threads, trust, policy) as compiled:
        results = _results(compiled, values, method)
    if output is not None:
        write_outputs(output, results)
    if as_json:
        print_json(
            {
                "outputs": [
                    {"name": name, "dtype": str(array.dtype), "shape": array.shape, "data": array}
                    for name, array in results.items()
                ]
            }
        )
    elif output is None:
        for name, array in results.items():
            click.echo(f"{name}  {array.dtype}{list(array.shape)}")
            click.echo(np.array2string(array, threshold=200))


def _load(path: Path, threads: int | None, trust: str | None, policy: dict[str, bool]) -> CompiledModel:
    import mlec

    wanted = "auto" if trust is None else mlec.TrustDigest(trust)
    return mlec.load(
        path, num_threads=threads, trust=wanted, require_signature=policy["require_signature"], require_native=policy["require_native"]
    )  # fmt: skip


def _results(model: CompiledModel, values: Any, method: str | None) -> dict[str, Any]:
    """The results by name; a method that returns several arrays numbers them."""
    signature = model.signature
    if method is None and not signature.run:
        return dict(zip((spec.name for spec in signature.outputs), model.run(values), strict=True))
    names = [method] if method is not None else list(signature.run)
    if method is not None:
        found = model.source_method(method)(values)
        parts = [found if isinstance(found, list) else [np.asarray(found)]]  # a transformer may return a DataFrame
    else:
        flat = iter(model.run(values))
        parts = [[next(flat) for _ in range(_count(signature.method(name)))] for name in names]
    return {
        name if len(part) == 1 else f"{name}_{i}": array
        for name, part in zip(names, parts, strict=True)
        for i, array in enumerate(part)
    }


def _count(method: Any) -> int:
    """Arrays that a method returns."""
    return 1 if method.stack else len(method.outputs)


@click.command("verify")
@click.argument("model", type=PATH)
@against_option
@click.option("--inputs", type=PATH, help="Compare on these inputs too (.npy .npz .csv .parquet); needs --against.")
@click.option("--full", is_flag=True, help=f"Check the weights of a file above {size_text(CHECKED_BYTES)} as well.")
@trust_pickle_option
@model_class_option
@trust_option
@policy_options
@json_option
def verify_command(
    model: Path, against: Path | None, inputs: Path | None, full: bool, trust_pickle: bool | str, model_class: str | None,
    trust: str | None, as_json: bool, **policy: bool,
) -> None:  # fmt: skip
    """Check that MODEL (.mle) is intact, whose code it holds, and that it computes what its source computes.

    With --against, the model is run beside its source on rows made to find differences, and on --inputs. Without, the parity
    that was recorded when it was compiled is shown.
    """
    if inputs is not None and against is None:
        raise click.UsageError("--inputs needs --against: the source model to compare with")
    from mlec.artifact import Artifact, TrustDigest, check_signed, decide, read_model
    from mlec.artifact.trust import not_native
    from mlec.cli.files import examples
    from mlec.report import OptimizationReport
    from mlec.reporting.schema import typed

    given = examples(inputs)
    checked = full or not os.path.isfile(model) or model.stat().st_size <= CHECKED_BYTES
    with Artifact.open(model, verify="full" if checked else "fast") as artifact:
        decision = decide(artifact, "auto" if trust is None else TrustDigest(trust))
        if policy["require_signature"]:
            check_signed(artifact)
        if policy["require_native"] and not decision.native:
            raise not_native(artifact.path, decision.reason)
        facts = {
            "path": artifact.path,
            "integrity": "every byte checked"
            if checked
            else "header, metadata, graph and kernels checked; WEIGHTS NOT CHECKED: --full checks them",
            "weights_checked": checked,
            "signature": signature_text(artifact.signature),
            "code": decision.reason,
            "code_id": f"sha256:{artifact.code_id}",
        }
        report = OptimizationReport.from_dict(read_model(artifact).read_report())
        typed(report)  # whether it is one
    parity = report.parity
    if against is not None:
        from mlec.errors import MlecError, UsageError
        from mlec.frontends.example_inputs import for_model, for_signature
        from mlec.validation.agreement import LOWERED, verified
        from mlec.validation.answers import ask
        from mlec.validation.differential import default_tolerance, validate

        frontend, source = _source(against, trust_pickle, model_class)
        oracle = _oracle(against, frontend, source)
        with _load(model, None, trust, policy) as compiled:
            if isinstance(given, dict):
                by_name = hasattr(source, "forward")
                given = for_model(given, source) if by_name else for_signature(given, compiled.signature)
            offered = {method.name for method in compiled.signature.methods} or {"run"}
            if not offered & set(oracle):
                raise UsageError(
                    f"{against} is not the source of {model}: it has the methods {', '.join(oracle)}, the compiled model "
                    f"{', '.join(sorted(offered))}",
                    code="E_SOURCE_FAILS",
                    hint=f"name the file that {model} was compiled from",
                )
            if given is not None:
                compiled.run(list(given))  # inputs that it does not take say nothing of the source
            try:
                if report.model.get("precision") in LOWERED:
                    parity = verified(compiled, oracle, given, parity)
                else:
                    answers = ask(compiled.graph, oracle, given)
                    parity = validate(compiled, answers, default_tolerance(compiled.graph))
            except MlecError as error:
                differs = _difference(compiled.signature, frontend, source, given)
                if not differs and error.code not in ("E_PARITY", "E_SOURCE_FAILS"):
                    raise
                if differs:
                    error.message, error.notes = f"{against} is not the source of {model}: {differs}", ()
                elif error.code == "E_SOURCE_FAILS":
                    error.notes = (error.message, *error.notes)
                    error.message = f"{against} does not take what {model} takes: {input_text(compiled.signature)}"
                error.hint = (
                    f"if {against} was trained or changed since, compile it again; otherwise name the intact file that {model} "
                    "was compiled from"
                )
                raise
    if as_json:
        print_json({**facts, "against": against, "parity": parity})
        return
    print_pairs(
        [
            ("file", facts["path"]), ("integrity", facts["integrity"]), ("signature", facts["signature"]), ("code", facts["code"]),
            ("", facts["code_id"]), ("parity", f"with {against}:" if against else "as recorded when it was compiled:"),
            *(("", line) for line in parity_lines(parity) or ["nothing"]),
        ]
    )  # fmt: skip


def _difference(ours: Signature, frontend: Frontend, source: Any, given: tuple[Any, ...] | None) -> str:
    """What another table the source takes than the compiled model, or other methods it has; empty where they agree or it is not known."""
    from mlec.errors import MlecError
    from mlec.frontends.base import LowerOptions

    if ours.table is None:
        return ""
    try:
        theirs = frontend.lower(source, LowerOptions(given)).signature
    except MlecError:
        return ""
    if theirs.table is None:
        return f"it takes tensors, the compiled model a table of {plural(ours.table.n_features, 'feature')}"
    for what, one, other in (
        ("takes {}", plural(theirs.table.n_features, "feature"), plural(ours.table.n_features, "feature")),
        ("takes the columns {}", theirs.table.feature_names, ours.table.feature_names),
        ("has the methods {}", tuple(m.name for m in theirs.methods), tuple(m.name for m in ours.methods)),
    ):
        if one != other:
            shown, wanted = (
                ", ".join(v) if isinstance(v, tuple) else "without names" if v is None else v for v in (one, other)
            )
            return f"it {what.format(shown)}, the compiled model {wanted}"
    return ""


def _source(path: Path, trust_pickle: bool | str, model_class: str | None) -> tuple[Frontend, Any]:
    """The source model, with what reads it."""
    from mlec.errors import UsageError
    from mlec.frontends.base import LowerOptions
    from mlec.frontends.select import load_model_file

    allow_own_modules(trust_pickle, model_class)
    frontend, model = load_model_file(path, LowerOptions(trust_pickle=trust_pickle, model_class=model_class))
    if frontend is None:
        raise UsageError(
            f"{path} is a graph: there is no library that could run it beside the compiled model",
            code="E_NO_SOURCE",
            hint="compile it with target numpy, the reference interpreter, and compare what `mlec run` gives",
        )
    return frontend, model


def _oracle(path: Path, frontend: Frontend, model: Any) -> Oracle:
    """The source model's own functions."""
    from mlec.errors import UsageError

    oracle = frontend.oracle(model)
    if not oracle:
        raise UsageError(
            f"{path} needs its library to run beside the compiled model",
            code="E_NO_SOURCE",
            hint=f"pip install 'mlec[{frontend.name}]'",
        )
    return oracle


SHOWN = ("min", "p50", "p95")
"""Of the times of one call; the ratio of two models is that of their minima."""


def _a_number(context: click.Context, option: click.Parameter, value: float) -> float:
    if math.isnan(value):  # which every range contains
        raise click.BadParameter("nan is no number.", context, option)
    return value


@click.command("bench")
@click.argument("model", type=PATH)
@click.option("--batch", "batches", default="1,64,4096", show_default=True, metavar="N,N", help="Numbers of rows.")
@against_option
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    callback=_a_number,
    default=1.0,
    show_default=True,
    help="Time to spend on each batch.",
)
@threads_option
@trust_pickle_option
@model_class_option
@trust_option
@policy_options
@json_option
def bench_command(
    model: Path, batches: str, against: Path | None, seconds: float, threads: int | None, trust_pickle: bool | str, model_class: str | None,
    trust: str | None, as_json: bool, **policy: bool,
) -> None:  # fmt: skip
    """Time MODEL (.mle), and its source with it, on random inputs; runs are interleaved, the speedup is the ratio of the minima."""
    rows = [int(word) for word in batches.split(",") if is_count(word.strip())]
    if not rows or len(rows) != len(batches.split(",")) or not all(rows):
        raise click.BadParameter(f"{batches!r} does not read 1,64,4096: numbers from 1", param_hint="--batch")
    from mlec.errors import UsageError
    from mlec.frontends.source_process import SourceProcess
    from mlec.measuring.race import race
    from mlec.runtime.measure import BenchmarkResult
    from mlec.validation.probes import batch_inputs

    results: list[dict[str, Any]] = []
    source_threads = None
    with _load(model, threads, trust, policy) as compiled:
        oracle = None if against is None else _oracle(against, *_source(against, trust_pickle, model_class))
        if isinstance(oracle, SourceProcess) and not oracle.timed:
            raise UsageError(
                f"{against} runs in a process of its own, with few threads: its times would say nothing",
                code="E_NO_SOURCE",
                hint="compare with the pickled estimator",
            )
        num_threads = getattr(compiled.executable, "num_threads", None)
        for count in rows:
            inputs = batch_inputs(compiled.graph, count)
            found = race(_actions(compiled, oracle, inputs), num_threads, oracle, seconds)
            taken = {
                name: BenchmarkResult.of(
                    values, count, num_threads if name == "compiled" else found.source_threads
                ).to_dict()
                for name, values in found.seconds.items()
            }
            results.append({"rows": count, **taken, "disturbance": found.disturbance})
            if oracle is not None:
                source_threads = found.source_threads
                results[-1]["speedup"] = found.spreads["source"]["min"] / found.spreads["compiled"]["min"]
    if as_json:
        threads_of = {"threads": num_threads, "source_threads": source_threads}
        print_json({"model": model, "against": against, **threads_of, "batches": results})
        return
    click.echo(f"{model}{threads_text(num_threads, source_threads, oracle is not None)}, one call:")
    columns = ["rows", *SHOWN, "rows/s"]
    columns += [*(f"source {name}" for name in SHOWN), "speedup"] if oracle is not None else []
    print_table(columns, [_bench_row(result) for result in results], right=columns)
    for result in results:
        if result["disturbance"]:
            click.echo(f"{plural(result['rows'], 'row')}: {result['disturbance']}")


def _actions(compiled: CompiledModel, oracle: Oracle | None, inputs: list[Any]) -> dict[str, Callable[[], object]]:
    """What to time: one call of the model, and the calls of its source that give the same results."""
    from mlec.frontends.source_process import SourceProcess

    argument = inputs if compiled.signature.table is None else inputs[0]
    actions: dict[str, Callable[[], object]] = {"compiled": lambda: compiled.run(argument)}
    names = compiled.signature.run or ("run",)
    if isinstance(oracle, SourceProcess):
        process = oracle
        actions["source"] = lambda: sum(process.seconds(name, argument) for name in names)
    elif oracle is not None:
        functions = [oracle[name] for name in names]
        actions["source"] = lambda: [function(argument) for function in functions]
    return actions


def _bench_row(result: dict[str, Any]) -> list[str]:
    ours, source = result["compiled"], result.get("source")
    row = [str(result["rows"]), *(time_text(ours[name]) for name in SHOWN), f"{ours['throughput']:,.0f}"]
    return row + ([*(time_text(source[name]) for name in SHOWN), f"{result['speedup']:.1f}x"] if source else [])

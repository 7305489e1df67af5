"""mlec compile: from a model file to a .mle file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlec.capabilities import COMPILABLE_FILES, PRECISIONS, TARGETS
from mlec.cli.output import json_option, print_json, print_pairs, size_text, time_text
from mlec.cli.signing import read_signer
from mlec.wording import plural

if TYPE_CHECKING:
    from mlec.artifact import SaveResult
    from mlec.report import OptimizationReport

PATH = click.Path(path_type=Path)


COMPILE_HELP = f"""Compile MODEL to a .mle file.

MODEL is a file of one of these kinds; its content decides which. Pickles need --trust-pickle, a state dict needs --model-class.

\b
{chr(10).join(f"  {name}: {files}" for name, files in COMPILABLE_FILES.items())}
"""
TARGET_HELP = f"{', '.join(form for forms in TARGETS.values() for form in forms)} ...: see `mlec targets`."
PRECISION_HELP = "; ".join(f"{name}: {meaning}" for name, meaning in PRECISIONS.items()) + "."


def check_target(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuses, as wrong usage, a target that does not read; whether this machine can compile for it is another question."""
    from mlec.errors import TargetError, UsageError
    from mlec.target import Target

    try:
        if value is not None:
            Target.parse(value)
    except TargetError as error:
        raise UsageError(error.message, hint=error.hint) from error
    return value


ANY_PICKLE = "any"
"""Stands after ``--trust-pickle=`` where the user names no digest."""


def with_value(words: Sequence[str]) -> list[str]:
    """The words of a command line, each ``--trust-pickle`` with its value: a digest that follows, or `ANY_PICKLE`.

    The value may be left out, and click would take any word that follows for it.
    """
    made: list[str] = []
    for word in words:
        if made and made[-1] == "--trust-pickle" and "--" not in made:
            digest = word.startswith("sha256:")
            made[-1] += f"={word if digest else ANY_PICKLE}"
            if digest:
                continue
        made.append(word)
    return made


def _check_trust(context: click.Context, option: click.Parameter, value: str | None) -> bool | str:
    from mlec.frontends.pickles import check_trust

    if value is None or value == ANY_PICKLE:
        return value is not None
    check_trust(value)
    return value


trust_pickle_option = click.option(
    "--trust-pickle", is_flag=False, flag_value=ANY_PICKLE, metavar="[sha256:...]", callback=_check_trust,
    help="Allow a pickled model to execute its code; with a digest, that file alone.",
)  # fmt: skip


@click.command("compile", help=COMPILE_HELP)
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, help="The .mle file to write. [default: MODEL's name with .mle]")
@click.option("--target", default="cpu", show_default=True, callback=check_target, help=TARGET_HELP)
@click.option("--precision", default="fp32", show_default=True, help=PRECISION_HELP)
@click.option(
    "--input-shape",
    "shapes",
    multiple=True,
    metavar="NAME=n,3,224,224",
    help="Shape of one input; a word is a dim that stays free.",
)
@click.option(
    "--example",
    type=PATH,
    help="Example inputs (.npz .npy .csv .parquet): their shapes count, and they are used for validation.",
)
@click.option("--calibration", type=PATH, help="Inputs to calibrate int8 with.")
@click.option(
    "--accuracy-budget", type=click.FloatRange(0, 1), metavar="PART",
    help="What int8 may cost: part of accuracy, or an error of outputs without classes. [default: 0.005, and 0.1]",
)  # fmt: skip
@click.option(
    "--passes", default="default", show_default=True, help="O0 .. O3, default, or passes: 'canonicalize,fuse'."
)
@click.option(
    "--tune", type=click.IntRange(min=0), default=0, show_default=True, help="Schedules to measure for each kernel."
)
@click.option("--compress", type=click.Choice(["zstd"]), help="Compress weights as well, and graph and code harder.")
@click.option("--sign", type=PATH, help="Secret key to sign the file with: see `mlec keygen`.")
@click.option("--encrypt-key-file", type=PATH, help="Encrypt the file with the key in this one.")
@click.option(
    "--cipher", type=click.Choice(["AES-256-GCM", "ChaCha20-Poly1305"], case_sensitive=False),
    help="What to encrypt with. [default: AES-256-GCM]",
)  # fmt: skip
@click.option("--report", type=PATH, help="Also write the report: .html, .json or .txt.")
@click.option("--reproducible", is_flag=True, help="Leave times out of the file: so it has the same bytes each time.")
@trust_pickle_option
@click.option("--model-class", metavar="pkg.mod:Class", help="The class whose state dict the file holds.")
@click.option("--fixed-batch", is_flag=True, help="Compile for the number of rows in the example only.")
@click.option("--no-validate", is_flag=True, help="Do not compare the compiled model with its source.")
@click.option(
    "--measure-passes", is_flag=True, help="Measure what each pass and rule is worth (compiles once for each)."
)
@click.option(
    "--stabilize", is_flag=True, help="Rewrite formulas that lose the result, such as a softmax that overflows."
)
@click.option(
    "--input-range",
    "ranges",
    multiple=True,
    metavar="NAME=0,255",
    help="Numbers that one input can hold, for warnings on numerical stability; 'examples': those of the examples.",
)
@json_option
def compile_command(
    model: Path, output: Path | None, target: str, precision: str, shapes: Sequence[str], example: Path | None, calibration: Path | None,
    passes: str, tune: int, compress: str | None, sign: Path | None, encrypt_key_file: Path | None, cipher: str | None, report: Path | None,
    reproducible: bool, trust_pickle: bool | str, model_class: str | None, fixed_batch: bool, no_validate: bool, measure_passes: bool,
    stabilize: bool, ranges: Sequence[str], accuracy_budget: float | None, as_json: bool,
) -> None:  # fmt: skip
    output = output or beside(model, ".mle")
    input_shapes = dict(map(_input_shape, shapes)) or None
    inputs = {
        "the model itself": model,
        "the --example": example,
        "the --calibration": calibration,
        "the --sign key": sign,
    }
    check_outputs((output, report), inputs | {"the --encrypt-key-file": encrypt_key_file})

    import mlec
    from mlec.artifact import EncryptionKey, Storage
    from mlec.artifact.atomic import check_replaceable
    from mlec.cli.files import examples
    from mlec.report import check_report_name

    # Whatever can go wrong at the end is found before the long work.
    saving: dict[str, Any] = {"compression": compress, "reproducible": reproducible}
    if sign is not None:
        saving["sign_key"] = read_signer(sign)
    if encrypt_key_file is not None:
        key = EncryptionKey.of(encrypt_key_file)
        saving["encryption_key"] = replace(key, cipher=cipher or key.cipher)
    elif cipher is not None:
        raise click.UsageError("--cipher goes with --encrypt-key-file")
    Storage.of(saving)
    if report is not None:
        check_report_name(report)
    for path in filter(None, (output, report)):
        check_replaceable(path)
    allow_own_modules(trust_pickle, model_class)

    compiled = mlec.compile(
        str(model), examples(example), input_shapes=input_shapes, target=target, precision=precision,
        dynamic_batch=not fixed_batch, passes=passes, calibration=examples(calibration), tune=tune, validate=not no_validate,
        trust_pickle=trust_pickle, model_class=model_class, measure_passes=measure_passes or ("total" if report is not None else False),
        stabilize=stabilize, accuracy_budget=accuracy_budget,
        input_ranges="examples" if "examples" in ranges else dict(map(_input_range, ranges)) or None,
    )  # fmt: skip
    saved = compiled.save(output, **saving)
    if report is not None:
        compiled.report.save(report)
    if as_json:
        print_json(
            {
                "path": saved.path, "size_bytes": saved.size_bytes, "sections": saved.sections, "code_id": saved.code_id,
                "report": compiled.report.to_dict(),
            }
        )  # fmt: skip
    else:
        print_pairs(_summary(saved, compiled.report, report, _why_not_compared(compiled.report, no_validate)))


def beside(model: Path, ending: str) -> Path:
    """The path of the model with another ending.

    Raises:
        click.BadParameter: it has no name.
    """
    if not model.name:
        raise click.BadParameter(f"{str(model)!r} names no file", param_hint="MODEL")
    return model.with_suffix(ending)


def check_outputs(outputs: Sequence[Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Refuses to write over a file that is read, or one file twice.

    Raises:
        click.UsageError: naming it.
    """
    written = [Path(os.path.realpath(path)) for path in outputs if path is not None]
    for at, path in enumerate(written):
        for what, read in inputs.items():
            if read is not None and (path == Path(os.path.realpath(read)) or _same_file(path, read)):
                raise click.UsageError(f"the output {path} is {what}: name another file")
        if path in written[:at]:
            raise click.UsageError(f"two outputs are to be {path}: name another file")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def is_count(word: str) -> bool:
    """Whether a word is a whole number, of no more digits than Python converts."""
    return word.isdecimal() and len(word) < sys.int_info.default_max_str_digits


def _input_shape(text: str) -> tuple[str, tuple[int | str, ...]]:
    name, found, dims = text.partition("=")
    words = [word.strip() for word in dims.strip("[]() ").split(",") if word.strip()]
    if not found or not name.strip() or not all(is_count(word) or word.isidentifier() for word in words):
        raise click.BadParameter(f"{text[:200]!r} does not read NAME=n,3,224,224", param_hint="--input-shape")
    return name.strip(), tuple(int(word) if is_count(word) else word for word in words)


def _input_range(text: str) -> tuple[str, tuple[float, float]]:
    name, _, bounds = text.partition("=")
    try:
        least, most = map(float, bounds.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} does not read NAME=0,255", param_hint="--input-range") from None
    return name.strip(), (least, most)


def allow_own_modules(trust_pickle: bool | str, model_class: str | None) -> None:
    """Lets the user's own classes be imported from the current directory, as `python -m` does; only where code was asked for."""
    if trust_pickle or model_class:
        sys.path.insert(0, os.getcwd())


def _why_not_compared(report: OptimizationReport, no_validate: bool) -> str:
    device = report.model["target"]["device"]
    if no_validate:
        return "as --no-validate says"
    if report.model["source"] == "graph":
        return "a graph has no library that runs it"
    if device != "cpu":
        return f"compiling runs nothing on {device}; where there is one, `mlec verify FILE --against MODEL` compares"
    return "see the warning"


def _summary(
    saved: SaveResult, report: OptimizationReport, written: Path | None, why_not: str
) -> list[tuple[str, object]]:
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in saved.sections.items() if size)
    return [
        ("wrote", f"{saved.path}  {size_text(saved.size_bytes)} ({parts})"),
        ("report", written or ""),
        ("model", f"{report.model['name']} (from {report.model['source']})"),
        ("variants", ", ".join(report.model.get("variants", ()))),
        ("graph", _graph_line(report)),
        ("took", _stages_line(report.timing)),
        ("tuning", _tuning_line(report)),
        ("8 bits", _accuracy_line(report)),
        ("parity", "\n".join(parity_lines(report.parity)) or f"not compared with the source: {why_not}"),
        ("speed", _speed_line(report.timing)),
        ("warning", "\n".join(report.warnings)),
    ]


def _tuning_line(report: OptimizationReport) -> str:
    from mlec.reporting.schema import typed
    from mlec.reporting.summary import tuning_counts

    return tuning_counts(typed(report).tuning) if report.tuning else ""


def _accuracy_line(report: OptimizationReport) -> str:
    from mlec.reporting.schema import typed
    from mlec.reporting.summary import accuracy_fact

    fact = accuracy_fact(typed(report))
    return f"{fact.value}; {fact.detail}" if fact else ""


def _graph_line(report: OptimizationReport) -> str:
    before, after = report.memory["before"]["nodes"], report.memory["after"]["nodes"]
    return f"{plural(before, 'node')} before the passes, {after} after; {plural(len(report.kernels), 'kernel')}"


def _stages_line(timing: dict[str, Any]) -> str:
    parts = [f"{name} {seconds:.1f} s" for name, seconds in timing["stages"].items()]
    return f"{sum(timing['stages'].values()):.1f} s: {', '.join(parts)}"


def parity_lines(parity: dict[str, Any]) -> list[str]:
    """One line for each method that was compared with the source."""
    lines = []
    for name, found in parity.get("methods", {}).items():
        tied = f" ({found['ties']} at ties)" if found["ties"] else ""
        if found["label_mismatches"] or found["max_abs_error"] == 0.0:
            lines.append(f"{name}: {found['label_mismatches']} of {plural(found['rows'], 'row')} differ{tied}")
        else:
            lines.append(
                f"{name}: largest error {found['max_abs_error']:.2g}, relative {found['max_rel_error']:.2g}, "
                f"{found['excess']:.2g} of the bound; {plural(found['rows'], 'row')}"
            )
    return lines


def _speed_line(timing: dict[str, Any]) -> str:
    measured = timing.get("measured")
    if not measured:
        return ""
    line = f"{time_text(measured['compiled_ms'])} for {plural(measured['rows'], 'row')}"
    if "source_ms" in measured:
        line += f"; the source takes {time_text(measured['source_ms'])}: {measured['speedup']:.1f}x"
    line += threads_text(measured.get("threads"), measured.get("source_threads"), "source_ms" in measured)
    if found := measured.get("spread"):
        line += " (minima)\n" + "; ".join(f"{name} {_spread_text(times)}" for name, times in found.items())
    if measured.get("processor_time"):
        line += "\nthe machine was busy: with one thread, in time on a processor"
    return line + (f"\n{measured['disturbance']}" if measured.get("disturbance") else "")


def threads_text(ours: int | None, source: int | None, both: bool) -> str:
    """With how many threads a model was timed, and its source, if that was timed too."""
    if ours is None:
        return ""
    return f", {plural(ours, 'thread')}" + (
        f"{' each' if source else ', the source as many as it takes'}" if both else ""
    )


def _spread_text(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {time_text(times[name])}" for name in ("min", "p50", "p95"))

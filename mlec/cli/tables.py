"""mlec passes, ops, targets, frontends: what this installation can do."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import click

from mlec.capabilities import MODEL_FILES, MODELS, PRECISIONS
from mlec.cli.output import json_option, print_json, print_pairs, print_table


@click.command("passes")
@json_option
def passes_command(as_json: bool) -> None:
    """List the passes, their options, and the pipelines made of them."""
    from mlec import registry
    from mlec.passes.pipelines import named_pipeline

    passes: list[dict[str, Any]] = []
    for name in registry.names("passes"):
        kind = registry.load("passes", name)
        options = {field.name: field.default for field in dataclasses.fields(kind)}
        passes.append(
            {"name": name, "preserves": str(kind.preserves), "options": options, "summary": _first_line(kind)}
        )
    pipelines = {name: str(named_pipeline(name)) for name in ("O0", "O1", "O2", "O3", "default")}
    if as_json:
        print_json({"passes": passes, "pipelines": pipelines})
        return
    print_table(
        ("pass", "preserves", "options", "what it does"),
        [(p["name"], p["preserves"], _options_text(p["options"]), p["summary"]) for p in passes],
    )
    click.echo()
    print_table(("pipeline", "passes"), [(name, text.replace(",", ", ")) for name, text in pipelines.items()])


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} = {str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()
    )


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


@click.command("ops")
@click.argument("op", required=False)
@json_option
def ops_command(op: str | None, as_json: bool) -> None:
    """List the ops of the IR, and how each is compiled for each kind of target.

    With OP, for example matmul: that one alone, with its operands and attributes, and the files that compile it.
    """
    import mlec.ops  # noqa: F401  (fills the op table)
    from mlec import registry
    from mlec.errors import MlecError
    from mlec.ir.op import OPS, lookup

    failed: dict[str, None] = {}  # of other packages

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MlecError as error:
            failed[error.message] = None

    for name in registry.names("ops"):
        attempt(partial(lookup, name))
    backends = {name: registry.load("backends", name)() for name in registry.target_forms()}
    serving = [(name, kind) for kind, found in registry.target_kinds().items() for name in found]
    ops: list[dict[str, Any]] = []
    for record in OPS.values():
        how = {
            name: {k: attempt(partial(backends[name].how, record.name, k)) or "" for n, k in serving if n == name}
            for name in backends
        }
        ops.append(
            {
                "name": record.name,
                "operands": [o.name + ("?" if o.optional else "*" if o.variadic else "") for o in record.operands],
                "attributes": [a.name for a in record.attrs],
                "backends": {name: {"supported": all(texts.values()), "how": texts} for name, texts in how.items()},
                "summary": record.doc,
            }
        )
    columns = [kind if kind == name else f"{name}: {kind}" for name, kind in serving]
    if op is not None:
        _one_op(op, ops, dict(zip(columns, serving, strict=True)), as_json)
        return
    if as_json:
        print_json({"ops": ops, "left_out": list(failed)})
        return
    rows = [
        (found["name"], *(_short(found["backends"][name]["how"][kind]) for name, kind in serving), found["summary"])
        for found in ops
    ]
    print_table(("op", *columns, "meaning"), rows)
    click.echo("\n`mlec ops NAME` shows one op in full")
    for column, (name, kind) in zip(columns, serving, strict=True):
        click.echo(f"{column}: {sum(bool(found['backends'][name]['how'][kind]) for found in ops)} of {len(ops)} ops")
    for message in failed:
        click.echo(f"left out: {message}")


def _short(how: str) -> str:
    """How an op is compiled, without the file that does it."""
    return how.partition(",")[0] or "no"


def _one_op(name: str, ops: list[dict[str, Any]], columns: dict[str, tuple[str, str]], as_json: bool) -> None:
    """One op in full.

    Args:
        columns: by title, a backend and a kind of target that it compiles for.
    """
    from mlec.errors import UsageError

    found = next((op for op in ops if op["name"] == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [op["name"] for op in ops])
        raise UsageError(
            f"there is no op {name!r}", hint=f"there are: {', '.join(near)}" if near else "`mlec ops` lists them"
        )
    if as_json:
        print_json(found)
        return
    print_pairs(
        [
            ("op", name), ("meaning", found["summary"]), ("operands", ", ".join(found["operands"])),
            ("attributes", ", ".join(found["attributes"])),
            *((title, found["backends"][name]["how"][kind] or "no") for title, (name, kind) in columns.items()),
        ]
    )  # fmt: skip


@click.command("targets")
@json_option
def targets_command(as_json: bool) -> None:
    """List what models can be compiled for, by which backend, what of it is on this machine, and the precisions."""
    from mlec import registry

    rows = [
        {"target": form, "backend": backend, "here": _here(form), "meaning": meaning}
        for backend, forms in registry.target_forms().items()
        for form, meaning in forms.items()
    ]
    precisions = [{"precision": name, "meaning": meaning} for name, meaning in PRECISIONS.items()]
    if as_json:
        print_json({"targets": rows, "precisions": precisions})
        return
    print_table(("target", "backend", "on this machine", "meaning"), [tuple(row.values()) for row in rows])
    click.echo()
    print_table(("precision", "meaning"), [(p["precision"], p["meaning"]) for p in precisions])


def _here(form: str) -> str:
    """Whether models compiled for a target can run on this machine."""
    kind, _, arch = form.partition(":")
    if kind == "cuda":
        return _cuda_here()
    if kind != "cpu":
        return "yes"
    from mlec.processor import host_flags
    from mlec.runtime.threads import effective_cpu_count

    if arch:
        return _cpu_here(form)
    flags = host_flags()
    known = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "avx2", "fma", "asimd", "sve")
    vectors = " ".join(name for name in known if name in flags) or "baseline instructions"
    return f"yes: {effective_cpu_count()} CPUs, {vectors}"


_SIGNS = {
    "x86-64-v2": ("x86_64", "sse4_2", "popcnt"),
    "x86-64-v3": ("x86_64", "avx2", "fma", "bmi2"),
    "x86-64-v4": ("x86_64", "avx512f", "avx512bw", "avx512vl"),
    "aarch64": ("aarch64", "asimd"),
}
"""By what a processor shows that it belongs to a level; asking LLVM for all that the level has would take two seconds."""


def _cpu_here(form: str) -> str:
    """Whether this processor runs what a target's processors run; of several, which."""
    from mlec.processor import what_is_missing
    from mlec.target import Target

    archs = Target.parse(form).archs
    able = [arch for arch in archs if not what_is_missing(_SIGNS[arch])]
    if not able:
        return f"compile only: {what_is_missing(_SIGNS[archs[0]])}"
    return "yes" if len(archs) == 1 else f"yes: runs {able[-1]}"


@cache
def _cuda_here() -> str:
    from mlec.errors import MlecError
    from mlec.runtime.device import open_device

    try:
        open_device("cuda")
    except MlecError:
        return "compile only: no device or no driver"
    return "yes"


@click.command("frontends")
@click.argument("frontend", required=False)
@json_option
def frontends_command(frontend: str | None, as_json: bool) -> None:
    """List the kinds of models that can be compiled, and whether their packages are installed.

    With FRONTEND, for example sklearn: that one alone, and each class of models that it knows.
    """
    from mlec import registry
    from mlec.errors import MlecError

    rows: list[dict[str, Any]] = []
    for name, where in registry.table("frontends").items():
        row = {"name": name, "where": where, "installed": True, "files": MODEL_FILES.get(name, "")}
        try:
            kind = registry.load("frontends", name)
            row["summary"] = MODELS.get(name) or _first_line(kind)
            # Our own are named after the package that they need, and import it only when they are used.
            if name in registry.FRONTENDS and not _is_installed(name):
                row |= {"installed": False, "summary": f"pip install 'mlec[{name}]'"}
        except MlecError as error:
            row |= {"installed": False, "summary": error.hint or error.message}
        rows.append(row)
    if frontend is not None:
        _one_frontend(frontend, rows, as_json)
        return
    if as_json:
        print_json({"frontends": rows})
        return
    print_table(
        ("frontend", "installed", "models", "files"),
        [(r["name"], "yes" if r["installed"] else "no", r["summary"], r["files"]) for r in rows],
    )
    click.echo("\n`mlec frontends NAME` lists the classes of models that one knows")


def _one_frontend(name: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    from mlec import registry
    from mlec.errors import UsageError

    row = next((row for row in rows if row["name"] == name), None)
    if row is None:
        known = ", ".join(r["name"] for r in rows)
        raise UsageError(f"there is no frontend {name!r}", hint=f"there are: {known}")
    supported = getattr(registry.load("frontends", name)(), "supported", None) if row["installed"] else None
    classes = supported() if supported is not None else []
    if as_json:
        print_json({**row, "supported": classes})
        return
    print_pairs([("frontend", name), ("models", row["summary"]), ("files", row["files"]), ("from", row["where"])])
    for found in classes:
        click.echo(found)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification
        return False

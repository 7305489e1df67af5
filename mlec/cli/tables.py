"""mlec passes, ops, targets, frontends: what this installation can do."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from typing import Any

import click

from mlec.cli.output import json_option, print_json, print_table


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
    print_table(("pipeline", "passes"), pipelines.items())


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} = {str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()
    )


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


@click.command("ops")
@json_option
def ops_command(as_json: bool) -> None:
    """List the ops of the IR, and which backend compiles each."""
    import mlec.ops  # noqa: F401  (fills the op table)
    from mlec import registry
    from mlec.ir.op import OPS

    backends = {name: registry.load("backends", name)() for name in registry.names("backends")}
    ops: list[dict[str, Any]] = [
        {
            "name": op.name,
            "operands": [o.name + ("?" if o.optional else "*" if o.variadic else "") for o in op.operands],
            "attributes": [a.name for a in op.attrs],
            "backends": {
                name: {"supported": b.supports(op.name), "reason": b.unsupported.get(op.name, "")}
                for name, b in backends.items()
            },
            "summary": op.doc,
        }
        for op in OPS.values()
    ]
    if as_json:
        print_json({"ops": ops})
        return
    rows = [
        (
            f"{op['name']}({', '.join(op['operands'])})" + (f" {{{', '.join(op['attributes'])}}}" if op["attributes"] else ""),
            *("yes" if b["supported"] else f"no: {b['reason']}" for b in op["backends"].values()),
            op["summary"],
        )
        for op in ops
    ]  # fmt: skip
    print_table(("op", *backends, "meaning"), rows)
    for name in backends:
        click.echo(f"{name}: {sum(op['backends'][name]['supported'] for op in ops)} of {len(ops)} ops")


@click.command("targets")
@json_option
def targets_command(as_json: bool) -> None:
    """List what models can be compiled for, and what of it is on this machine."""
    from mlec.errors import MlecError
    from mlec.packing import host_cpu_flags
    from mlec.runtime.device import open_device
    from mlec.runtime.threads import effective_cpu_count

    flags = host_cpu_flags()
    known = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "avx2", "fma", "asimd", "sve")
    vectors = " ".join(name for name in known if name in flags) or "baseline instructions"
    try:
        open_device("cuda")
        cuda = "yes"
    except MlecError:
        cuda = "compile only: no device or no driver"
    rows = [
        ("cpu", f"yes: {effective_cpu_count()} CPUs, {vectors}", "the processor of the machine that compiles"),
        (
            "cpu:x86-64-v3",
            "yes" if {"avx2", "fma"} <= flags else "compile only",
            "a level, or a processor by LLVM's name; corrections such as ,-avx512f may follow",
        ),
        ("cuda", cuda, "NVIDIA GPUs of the common architectures"),
        ("cuda:sm_80,sm_90", cuda, "NVIDIA GPUs of the architectures named"),
    ]
    if as_json:
        print_json({"targets": [dict(zip(("target", "here", "meaning"), row, strict=True)) for row in rows]})
        return
    print_table(("target", "on this machine", "meaning"), rows)


@click.command("frontends")
@json_option
def frontends_command(as_json: bool) -> None:
    """List the kinds of models that can be compiled, and whether their packages are installed."""
    from mlec import registry
    from mlec.errors import MlecError

    rows: list[dict[str, Any]] = []
    for name, where in registry.table("frontends").items():
        row = {"name": name, "where": where, "installed": True}
        try:
            row["summary"] = _first_line(registry.load("frontends", name))
            # Our own are named after the package that they need, and import it only when they are used.
            if name in registry.FRONTENDS and not _is_installed(name):
                row |= {"installed": False, "summary": f"pip install 'mlec[{name}]'"}
        except MlecError as error:
            row |= {"installed": False, "summary": error.hint or error.message}
        rows.append(row)
    if as_json:
        print_json({"frontends": rows})
        return
    print_table(
        ("frontend", "installed", "models"),
        [(r["name"], "yes" if r["installed"] else "no", r["summary"]) for r in rows],
    )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification
        return False

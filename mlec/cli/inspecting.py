"""mlec inspect, mlec report: what is in a .mle file. Nothing in the file is executed, and neither TVM nor a framework is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlec.cli.output import json_option, print_json, print_pairs, print_table, size_text
from mlec.wording import plural, visible

if TYPE_CHECKING:
    from mlec.artifact import Artifact, ModelMetadata, TrustDecision
    from mlec.artifact import Signature as FileSignature
    from mlec.report import OptimizationReport
    from mlec.signature import Signature


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--graph", is_flag=True, help="Print the text of the graph.")
@click.option(
    "--kernels",
    is_flag=True,
    help="Print the kernels: op, place in the source, work, and the machine code that holds them.",
)
@json_option
def inspect_command(model: Path, graph: bool, kernels: bool, as_json: bool) -> None:
    """Show what is in MODEL (.mle), without executing anything of it."""
    from mlec.artifact import Artifact, decide
    from mlec.artifact.model import with_entries_unpacked
    from mlec.errors import SecurityError

    try:
        opened = Artifact.open(model, verify="fast")
    except SecurityError as error:
        if error.code != "E_KEY_MISSING" or graph or kernels:
            raise
        _print_locked(model, as_json)
        return
    with opened as artifact:
        if as_json:
            decision = decide(artifact)
            document = {
                **artifact.describe(), "metadata": with_entries_unpacked(artifact.metadata), "native": decision.native,
                "trust": decision.reason, "variants": _variants(artifact),
            }  # fmt: skip
            print_json(document | ({"graph": artifact.graph} if graph else {}))
            return
        if not (graph or kernels):
            print_pairs(_facts(artifact, decide(artifact)))
        if kernels:
            _print_kernels(artifact)
        if graph:
            click.echo(visible(artifact.graph))


@click.command("recover")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for what is found.")
@json_option
def recover_command(model: Path, output: Path, as_json: bool) -> None:
    """Take out of a damaged MODEL (.mle) what its checksums prove intact: metadata.json, graph.mlet, weights.npz.

    Where all of these are, model.mle as well: the model without its machine code, which is compiled where it is loaded. Of an encrypted
    MODEL, given its key, what is authentic is intact; model.mle is encrypted again, the other files are not, and only you may read them.
    """
    import contextlib
    import json
    import os

    from mlec.artifact import Storage, write
    from mlec.artifact.atomic import replace_file
    from mlec.artifact.model import with_entries_unpacked
    from mlec.artifact.recovery import recover
    from mlec.cli.files import make_folder

    found = recover(model)
    files: dict[str, bytes] = {}
    if found.metadata is not None:
        files["metadata.json"] = json.dumps(
            with_entries_unpacked(found.metadata), ensure_ascii=False, indent=1
        ).encode()
    if found.graph is not None:
        files["graph.mlet"] = found.graph.encode()
    if found.tensors:
        files["weights.npz"] = _npz(found.tensors)
    with contextlib.ExitStack() as stack:
        if found.key is not None:
            stack.callback(os.umask, os.umask(0o077))
        make_folder(output)
        for name, data in files.items():
            replace_file(output / name, len(data), lambda data=data: [data])  # type: ignore[misc]
        if found.complete and found.metadata is not None and found.graph is not None:
            write(
                output / "model.mle", metadata=found.metadata, graph=found.graph, tensors=found.tensors,
                storage=Storage(key=found.key),
            )  # fmt: skip
            files["model.mle"] = b""
    written = [str(output / name) for name in files]
    if as_json:
        print_json({"written": written, "tensors": len(found.tensors), "lost": found.lost})
        return
    shown = [*found.lost[:20], *([f"and {len(found.lost) - 20} more"] if len(found.lost) > 20 else [])]
    intact = plural(len(found.tensors), "tensor")
    print_pairs([("written", "\n".join(written)), ("intact", intact), ("lost", "\n".join(shown) or "nothing")])


def _npz(tensors: Mapping[str, Any]) -> bytes:
    """The tensors as a .npz, bfloat16 as float32. (``np.savez`` takes names as keywords, and has some of its own.)"""
    import io
    import zipfile

    import numpy as np

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in tensors.items():
            plain = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, plain, allow_pickle=False)
    return buffer.getvalue()


def _print_locked(path: Path, as_json: bool) -> None:
    """What can be read of an encrypted file without its key."""
    from mlec.artifact.encryption import CIPHERS
    from mlec.artifact.model import with_entries_unpacked
    from mlec.artifact.reader import StoredFile

    file = StoredFile.read(path, verify="fast")
    cipher = CIPHERS[file.header.aead_alg]
    sizes = {name: section.size for name, section in file.header.sections.items() if section.size}
    if as_json:
        signature = file.signature.describe() if file.signature else None
        facts = {"path": file.path, "size_bytes": file.header.file_size, "encrypted": cipher, "sections": sizes}
        print_json({**facts, "signature": signature, "metadata": with_entries_unpacked(file.metadata)})
        return
    print_pairs(
        [
            ("file", f"{file.path}  {size_text(file.header.file_size)}, format {file.header.version}"),
            (
                "model",
                f"{file.metadata.get('name', '')} (from {file.metadata.get('source', '')}, mlec {file.owned.mlec_version})",
            ),
            ("sections", ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())),
            ("encrypted", f"{cipher}: graph, weights and code need the key: --key-file FILE, or MLEC_KEY"),
            ("signature", signature_text(file.signature)),
        ]
    )


def _facts(artifact: Artifact, trust: TrustDecision) -> list[tuple[str, object]]:
    from mlec.artifact import read_model
    from mlec.artifact.encryption import CIPHERS

    model = read_model(artifact)
    program = model.program
    header = artifact.header
    sections = {name: section.size for name, section in header.sections.items() if section.size}
    how = [f"compressed with {name}" for name in header.compressions] + [
        f"encrypted with {CIPHERS.get(header.aead_alg)}"
    ] * bool(header.aead_alg)
    return [
        ("file", f"{artifact.path}  {size_text(artifact.header.file_size)}, format {artifact.header.version}"),
        ("model", f"{model.name} (from {model.source}, mlec {artifact.metadata['mlec_version']})"),
        *_interface(model.signature),
        ("target", "\n".join(_processor(variant.target) for variant in model.programs)),
        ("sections", ", ".join(f"{name} {size_text(size)}" for name, size in sections.items())),
        ("stored", ", ".join(how)),
        ("weights", plural(len(artifact.tensors), "tensor")),
        ("kernels", f"{len(program.kernels)} in {plural(len(artifact.kernels), 'object file')}{_several(model)}"),
        ("not here", _why_not_here(model)),
        ("signature", signature_text(artifact.signature)),
        (
            "trust",
            f"{'its code runs here' if trust.native else 'its graph is compiled where it is loaded'}: {trust.reason}",
        ),
        ("code id", f"sha256:{artifact.code_id}"),
        ("metadata", "\n".join(f"{key} = {value}" for key, value in model.user.items())),
    ]


def signature_text(signature: FileSignature | None) -> str:
    """Who signed a file, and what they say of it."""
    if signature is None:
        return "none"
    if signature.key is None:
        return f"by the key {signature.key_id}, which is not in the keyring: it proves nothing here (`mlec trust add KEY.pub`)"
    said = "".join(f"\n{name.replace('_', ' ')}: {value}" for name, value in signature.describe()["attributes"].items())
    return f"verified: by {signature.key.label}, key {signature.key_id}{said}"


def _interface(signature: Signature) -> list[tuple[str, object]]:
    outputs = "\n".join(f"{s.name}: {s.dtype}[{_joined(s.shape)}]" for s in signature.outputs)
    methods = ", ".join(method.name for method in signature.methods)
    return [("kind", signature.kind), ("inputs", input_text(signature)), ("outputs", outputs), ("methods", methods)]


def input_text(signature: Signature) -> str:
    table = signature.table
    if table is None:
        return "\n".join(f"{s.name}: {s.dtype}[{_joined(s.shape)}]" for s in signature.inputs)
    text = f"a table of {plural(table.n_features, 'column')}"
    if table.feature_names is not None:
        shown = ", ".join(table.feature_names[:8])
        text += f": {shown}{', ...' if len(table.feature_names) > 8 else ''}"
    accepted = {"finite": "finite numbers only", "nan": "NaN is a missing value", "any": "any number"}
    return f"{text} ({accepted[table.numbers]})"


def _several(model: ModelMetadata) -> str:
    return f" of {len(model.programs)} variants: `--kernels` says which one runs here" if model.variants else ""


def _why_not_here(model: ModelMetadata) -> str:
    """What keeps code for CPUs from running here, whoever made it; empty if nothing does."""
    from mlec.packaging.loading import variant_here

    return variant_here(model)[1] if model.program.device == "cpu" else ""


def _variants(artifact: Artifact) -> list[dict[str, Any]]:
    """What the kernels were compiled for, and which of them this processor would run."""
    from mlec.artifact import read_model
    from mlec.errors import CorruptedFileError
    from mlec.packaging.loading import variant_here
    from mlec.processor import processor_name, what_is_missing

    try:
        model = read_model(artifact)
    except CorruptedFileError:  # a sound file that another program made
        return []
    if model.program.device != "cpu":
        return []
    chosen, refused = variant_here(model)
    found = []
    for number, (program, needed) in enumerate(zip(model.programs, model.needed_cpu_flags, strict=False)):
        name = processor_name(program.target) or program.backend
        missing = what_is_missing(needed) or ("" if chosen is not None else refused)
        found.append({"target": name, "needs": sorted(needed), "missing": missing, "runs_here": number == chosen})
    return found


def _processor(target: Mapping[str, object]) -> str:
    """What a program was compiled for, with the instruction sets that it uses: LLVM's name may be that of a like processor."""
    from mlec.processor import notable

    features = target.get("features")
    sets = notable(map(str, features)) if isinstance(features, list) else []
    return _target(target) + (f"\nuses {', '.join(sets)}" if sets else "")


def _target(target: Mapping[str, object]) -> str:
    """What was compiled for, without the dozens of features that a processor's name implies."""
    return " ".join(f"{key}={_joined(value)}" for key, value in target.items() if key not in ("features", "cpu_flags"))


def _joined(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _print_kernels(artifact: Artifact) -> None:
    from mlec.artifact import KINDS, read_model
    from mlec.reporting.schema import typed

    model = read_model(artifact)
    strategies = {kernel.symbol: kernel.strategy for kernel in typed(_report(artifact)).kernels}
    print_table(
        ("kernel", "op", "flops", "bytes", "how", "from"),
        [(k.symbol, k.op, k.flops, k.bytes, strategies.get(k.symbol, ""), k.location) for k in model.program.kernels],
    )
    click.echo()
    if model.variants:
        _print_variants(artifact)
    rows = [
        (
            KINDS[blob.kind], size_text(len(blob.data)),
            _target(model.targets[blob.target]),
            f"{blob.sha256[:16]}...",
        )
        for blob in artifact.kernels
    ]  # fmt: skip
    print_table(("machine code", "size", "target", "sha256"), rows, right=("size",))


def _print_variants(artifact: Artifact) -> None:
    found = _variants(artifact)
    best = next((variant["target"] for variant in found if variant["runs_here"]), "none")
    rows = []
    for number, variant in enumerate(found):
        size = sum(len(blob.data) for blob in artifact.kernels if blob.target == number)
        here = (
            f"no: {variant['missing']}" if variant["missing"] else f"could run, but {best} uses more of this processor"
        )
        rows.append(
            (
                variant["target"],
                size_text(size),
                "yes: the best that this processor runs" if variant["runs_here"] else here,
            )
        )
    print_table(("variant", "code", "here"), rows, right=("code",))
    click.echo(f"the kernels listed above are those for {found[0]['target']}\n")


def _report(artifact: Artifact) -> OptimizationReport:
    from mlec.artifact import read_model
    from mlec.report import OptimizationReport

    return OptimizationReport.from_dict(read_model(artifact).read_report())


@click.command("report")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write: .html, .json or .txt.")
@json_option
def report_command(model: Path, output: Path | None, as_json: bool) -> None:
    """Show what compiling MODEL (.mle) did: passes, kernels, parity with the source, speed."""
    from mlec.artifact import Artifact
    from mlec.cli.compiling import check_outputs

    check_outputs([output], {"the model itself": model})
    with Artifact.open(model, verify="fast") as artifact:
        report = _report(artifact)
    if output is not None:
        report.save(output)
    if as_json:
        print_json(report.to_dict())
    elif output is None:
        from mlec.reporting.text import print_report

        print_report(report)

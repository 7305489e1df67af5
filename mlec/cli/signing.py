"""mlec keygen, sign, trust: keys, signatures, and whose code may run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlec.cli.output import json_option, print_json, print_pairs, print_table, size_text

if TYPE_CHECKING:
    from mlec.artifact import Signer, TrustedKey

PATH = click.Path(path_type=Path)


@click.command("keygen")
@click.argument("output", type=PATH)
@click.option("--label", help="A name for the key. [default: OUTPUT's name]")
@click.option("--encryption", is_flag=True, help="Make a key to encrypt with: OUTPUT.key alone.")
@click.option(
    "--password", is_flag=True, help="Protect the key to sign with by a password. [asked for, or MLEC_KEY_PASSWORD]"
)
@json_option
def keygen_command(output: Path, label: str | None, encryption: bool, password: bool, as_json: bool) -> None:
    """Make a key to sign with: OUTPUT.key, which is secret, and OUTPUT.pub, which those who are to trust it get."""
    if encryption:
        if password:
            raise click.UsageError("--password goes with keys to sign with: an encryption key has none")
        _encryption_key(_beside(output, ".key"), as_json)
        return
    from mlec.artifact import TrustedKey
    from mlec.artifact.signing import PASSWORD, generate
    from mlec.errors import UsageError

    secret, public = (_beside(output, ending) for ending in (".key", ".pub"))
    given = (os.environ.get(PASSWORD) or _asked("Password of the key", confirm=True)) if password else ""
    pem, raw = generate(given)
    key = TrustedKey(raw, label or secret.stem)
    try:
        TrustedKey.parse(key.line())
    except ValueError as error:
        raise UsageError(
            f"{key.label!r} cannot be the label of a key: {error}", hint="give another one: --label"
        ) from None
    for path in (secret, public):
        _check_new(path)
    _create(secret, pem, 0o600)
    _create(public, (key.line() + "\n").encode(), 0o644)
    if as_json:
        print_json({"secret": secret, "public": public, "key_id": key.key_id, "label": key.label})
        return
    print_pairs(
        [
            ("secret", f"{secret}  keep it to yourself: `mlec sign MODEL --key {secret}`"),
            ("public", f"{public}  for those who trust you: `mlec trust add {public}`"),
            ("key id", key.key_id),
        ]
    )


def read_signer(path: Path) -> Signer:
    """The key in a file; its password, if it has one, is asked for."""
    from mlec.artifact import Signer

    return Signer.read(path, lambda: _asked(f"Password of {path}"))


def _asked(question: str, confirm: bool = False) -> str:
    """What the user types, unseen; nothing where there is no terminal to ask on."""
    if not sys.stdin.isatty():
        if confirm:
            raise click.UsageError("there is no terminal to ask for the password: MLEC_KEY_PASSWORD gives it")
        return ""
    return str(click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True))


def _beside(output: Path, ending: str) -> Path:
    """OUTPUT with an ending; ``team.key`` is taken as ``team``."""
    if not output.name:
        raise click.BadParameter(f"{str(output)!r} names no file", param_hint="OUTPUT")
    return output.with_name(output.name.removesuffix(".key") + ending)


def _encryption_key(path: Path, as_json: bool) -> None:
    import secrets

    from mlec.artifact import EncryptionKey

    _check_new(path)
    _create(path, EncryptionKey(secrets.token_bytes(32)).text().encode() + b"\n", 0o600)
    if as_json:
        print_json({"secret": path})
        return
    print_pairs([("secret", f"{path}  for `mlec compile --encrypt-key-file`, and --key-file of what opens the model")])


def _check_new(path: Path) -> None:
    """Whether a file of this name can be made: it must not be there yet."""
    from mlec.artifact.atomic import check_replaceable
    from mlec.errors import UsageError

    if os.path.exists(path):
        raise UsageError(
            f"{path} is there already", code="E_KEY_EXISTS", hint="keys are never replaced: name another file"
        )
    check_replaceable(path)


def _create(path: Path, data: bytes, mode: int) -> None:
    """Writes a file that must not be there yet."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)


@click.command("sign")
@click.argument("model", type=PATH)
@click.option("--key", required=True, type=PATH, help="The secret key, as `mlec keygen` makes it.")
@click.option("-o", "--output", type=PATH, help="The signed file. [default: MODEL itself]")
@click.option("--signer", default="", help="Who signs, as others are to read it.")
@click.option("--created", default="", help="When, as others are to read it; nothing by default.")
@click.option("--model-name", default="", help="The name that is signed. [default: that in MODEL]")
@click.option("--model-version", default="", help="The version that is signed.")
@json_option
def sign_command(
    model: Path, key: Path, output: Path | None, signer: str, created: str, model_name: str, model_version: str, as_json: bool
) -> None:  # fmt: skip
    """Sign MODEL (.mle): where the key is trusted, its machine code runs. A signature that it has is replaced."""
    from dataclasses import replace

    from mlec.artifact import Attributes, sign

    attributes = Attributes(signer, created, model_name, model_version)
    found = replace(read_signer(key), attributes=attributes)
    saved = sign(model, found, output)
    if as_json:
        print_json(
            {"path": saved.path, "size_bytes": saved.size_bytes, "key_id": found.key_id, "code_id": saved.code_id}
        )
        return
    print_pairs(
        [
            ("signed", f"{saved.path}  {size_text(saved.size_bytes)}"),
            ("key id", found.key_id),
            ("code id", f"sha256:{saved.code_id}"),
        ]
    )


@click.group("trust")
def trust_command() -> None:
    """Whose signatures count here: the keyring of this user, and that of this machine."""


@trust_command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the trusted keys, and those that were revoked."""
    from mlec.artifact import Keyring

    keyring = Keyring.load()
    if as_json:
        print_json({"keys": [_facts(key, keyring.revoked) for key in keyring.keys], "revoked": sorted(keyring.revoked)})
        return
    if not keyring.keys:
        click.echo("no key is trusted: `mlec trust add KEY.pub`")
    else:
        rows = [_row(_facts(key, keyring.revoked)) for key in keyring.keys]
        print_table(("label", "key id", "for models", "for", "valid", "in"), rows)
    for key_id in sorted(keyring.revoked - {key.key_id for key in keyring.keys}):
        click.echo(f"revoked: {key_id}")


def _facts(key: TrustedKey, revoked: frozenset[str]) -> dict[str, Any]:
    return {
        "label": key.label,
        "key_id": key.key_id,
        "names": key.names,
        "scope": list(key.scope),
        "not_before": key.not_before and key.not_before.isoformat(),
        "not_after": key.not_after and key.not_after.isoformat(),
        "revoked": key.key_id in revoked,
        "path": key.path,
    }


def _row(facts: dict[str, Any]) -> list[object]:
    limits = [f"{word} {facts[name]}" for word, name in (("from", "not_before"), ("until", "not_after")) if facts[name]]
    valid = "REVOKED" if facts["revoked"] else " ".join(limits) or "always"
    return [facts["label"], facts["key_id"][:16], facts["names"], ", ".join(facts["scope"]), valid, facts["path"]]


@trust_command.command("add")
@click.argument("key", type=PATH)
@click.option("--label", help="Your name for the key. [default: that in the file]")
@click.option("--names", metavar="GLOB", help="Trust it for models with such names only.")
@click.option("--scope", help="kernels,data: run machine code; data: only say where a file comes from.")
@click.option("--not-before", metavar="DATE", help="Trust it from then on.")
@click.option("--not-after", metavar="DATE", help="Trust it until the end of that day.")
@json_option
def add_command(
    key: Path, label: str | None, names: str | None, scope: str | None, not_before: str | None, not_after: str | None, as_json: bool
) -> None:  # fmt: skip
    """Trust the key in the file KEY (.pub)."""
    from mlec.artifact import TrustedKey, keyring_changes
    from mlec.errors import UsageError

    lines = [line for line in _text(key).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(lines) != 1:
        raise UsageError(
            f"{key} holds {len(lines)} keys, one expected",
            code="E_KEY_FILE",
            hint="give a .pub file as `mlec keygen` makes it",
        )
    given = {"names": names, "scope": scope, "not-before": not_before, "not-after": not_after}
    kind, _, rest = lines[0].partition(" ")
    words = rest.split()
    if label is not None and len(words) > 1:
        words[1] = label
    words = [word for word in words if given.get(word.partition("=")[0]) is None]
    words += [f"{name}={value}" for name, value in given.items() if value is not None]
    try:
        found = TrustedKey.parse(" ".join([kind, *words]))
    except ValueError as error:
        raise UsageError(
            f"{key} cannot be trusted in this way: {error}",
            code="E_KEY_FILE",
            hint="give a .pub file as `mlec keygen` makes it",
        ) from None
    path = keyring_changes.add(found)
    if as_json:
        print_json(_facts(found, frozenset()) | {"path": path})
        return
    print_pairs(
        [("trusted", f"{found.label}, for {' and '.join(found.scope)}"), ("key id", found.key_id), ("in", path)]
    )


def _text(path: Path) -> str:
    from mlec.artifact.small_files import read_small
    from mlec.errors import UsageError

    try:
        return read_small(path, 1 << 16)[1].decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # else it begins with a number and ends with the path
        raise UsageError(
            f"{path} cannot be read as a key: {reason}", code="E_KEY_FILE", hint="check the path"
        ) from None


@trust_command.command("remove")
@click.argument("key")
@click.option("--revoke", is_flag=True, help="Also note that it counts no more, even where the machine trusts it.")
@json_option
def remove_command(key: str, revoke: bool, as_json: bool) -> None:
    """Trust KEY no more: its label, or 8 or more digits of its key id."""
    from mlec.artifact import Keyring, keyring, keyring_changes
    from mlec.errors import UsageError

    known = Keyring.load().keys
    found = [one for one in known if key in (one.label, one.key_id) or (len(key) >= 8 and one.key_id.startswith(key))]
    if len({one.key_id for one in found}) != 1:
        names = ", ".join(f"{one.label} ({one.key_id[:16]})" for one in known)
        raise UsageError(
            f"{len(found) or 'no'} keys are named {key!r}; trusted are: {names or 'none'}",
            hint="`mlec trust list` shows them",
        )
    own = [one for one in found if not Path(one.path).is_relative_to(keyring.SYSTEM)]
    if not own and not revoke:
        raise UsageError(
            f"{found[0].label} is trusted by the machine, in {found[0].path}",
            hint="--revoke makes it count no more for this user",
        )
    for one in own:
        keyring_changes.remove(one)
    noted = keyring_changes.revoke(found[0].key_id) if revoke else None
    if as_json:
        print_json({"key_id": found[0].key_id, "removed": [one.path for one in own], "revoked": revoke})
        return
    print_pairs(
        [("removed", "\n".join(one.path for one in own)), ("revoked", noted or ""), ("key id", found[0].key_id)]
    )

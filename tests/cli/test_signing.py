"""mlec keygen, sign, trust; and what inspect, verify and run make of signed and encrypted files."""

from __future__ import annotations

import stat
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done, Iris, Run

Command = Callable[..., Done]


@pytest.fixture
def other(mlec: Run, tmp_path: Path) -> Command:
    """Another user: no keyring, no ledger, none of the models is theirs."""
    env = {"XDG_STATE_HOME": str(tmp_path / "other"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    return lambda *words: mlec(*words, cwd=tmp_path, env=env)


@pytest.fixture
def key(mlec: Run, tmp_path: Path) -> Path:
    done = mlec("keygen", tmp_path / "acme")
    assert done.code == 0, done.err
    return tmp_path / "acme.key"


def test_a_signed_model_runs_where_its_key_is_trusted(
    other: Command, mlec: Run, iris: Iris, key: Path, tmp_path: Path
) -> None:
    model, results = tmp_path / "m.mle", tmp_path / "out.csv"
    signed = mlec("sign", iris.mle, "--key", key, "-o", model, "--signer", "ACME Inc", "--model-version", "7", "--json")
    assert signed.document()["code_id"] == mlec("inspect", iris.mle, "--json").document()["code_id"]
    unknown = other("inspect", model)
    for part in ("not in the keyring", "compiled where it is loaded", "unknown key", signed.document()["key_id"]):
        assert part in unknown.out
    assert "ACME" not in unknown.out
    assert "the graph is compiled on this machine instead" in other("run", model, iris.csv, "-o", results).err

    assert other("trust", "add", tmp_path / "acme.pub", "--names", "*", "--scope", "kernels,data").code == 0
    for part in ("verified: by acme", "signer: ACME Inc", "model version: 7", "its code runs here: signed by acme"):
        assert part in other("inspect", model).out
    document = other("inspect", model, "--json").document()
    assert (document["native"], document["signature"]["attributes"]["signer"]) == (True, "ACME Inc")
    assert other("verify", model, "--json").document()["signature"].startswith("verified: by acme")
    ran = other("run", model, iris.csv, "-o", results)
    assert (ran.code, ran.err) == (0, "")

    data = bytearray(model.read_bytes())
    at = data.index(b"MLES") + 50
    data[at] ^= 1
    data[108:112] = zlib.crc32(data[at - 50 :]).to_bytes(4, "little")
    data[124:128] = zlib.crc32(data[:124]).to_bytes(4, "little")
    model.write_bytes(data)
    for words in (
        ("inspect", model),
        ("run", model, iris.csv, "--trust", f"sha256:{document['code_id']}"),
        ("verify", model),
    ):
        other(*words).error("E_SIGNATURE")


def test_compiling_signs(other: Command, mlec: Run, iris: Iris, key: Path, tmp_path: Path) -> None:
    how = ("--no-validate", "--compress", "zstd", "--reproducible", "--sign", key)
    words = ("compile", iris.pickle, "--trust-pickle", *how)
    done = mlec(*words, "-o", tmp_path / "m.mle")
    assert done.code == 0, done.err
    assert "compressed with zstd" in mlec("inspect", tmp_path / "m.mle").out
    assert not mlec("report", tmp_path / "m.mle", "--json").document().get("timing")
    other("trust", "add", tmp_path / "acme.pub")
    assert "its code runs here: signed by acme" in other("inspect", tmp_path / "m.mle").out
    for odd in (iris.csv, tmp_path / "missing"):
        refused = mlec("compile", iris.pickle, "--trust-pickle", "-o", tmp_path / "n.mle", "--sign", odd)
        assert refused.code == 1
        assert "E_KEY_" in refused.err
    assert not (tmp_path / "n.mle").exists()


def test_keygen(mlec: Run, key: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    text = (tmp_path / "acme.pub").read_text()
    assert text.startswith("mle-ed25519 ")
    assert text.endswith(" acme\n")
    before = key.read_bytes()
    mlec("keygen", tmp_path / "acme").error("E_KEY_EXISTS")
    assert key.read_bytes() == before
    mlec("keygen", tmp_path / "odd", "--label", "two words").error("E_USAGE")
    assert not (tmp_path / "odd.key").exists()
    done = mlec("keygen", tmp_path / "b", "--label", "team@acme", "--json").document()
    assert done["label"] == "team@acme"
    assert "BEGIN" not in str(done)


def test_a_key_with_a_password(mlec: Run, tmp_path: Path, iris: Iris) -> None:
    secret = {"MLEC_KEY_PASSWORD": "secret"}
    assert mlec("keygen", tmp_path / "k", "--password", env=secret).code == 0
    assert "ENCRYPTED" in (tmp_path / "k.key").read_text()
    words = ("sign", iris.mle, "--key", tmp_path / "k.key", "-o", tmp_path / "m.mle")
    assert mlec(*words, env=secret).code == 0
    mlec(*words, env={"MLEC_KEY_PASSWORD": "other"}).error("E_KEY_PASSWORD")
    mlec(*words).error("E_KEY_PASSWORD")  # there is no terminal to ask on
    assert mlec("keygen", tmp_path / "n", "--password").code == 2
    assert not (tmp_path / "n.key").exists()


def test_policies(other: Command, key: Path, iris: Iris, tmp_path: Path) -> None:
    for words in (("verify", iris.mle), ("run", iris.mle, iris.csv)):
        other(*words, "--require-signature").error("E_UNSIGNED")
        refused = other(*words, "--require-native")
        refused.error("E_UNTRUSTED_NATIVE")
        assert "`mlec trust add KEY.pub`), or name its code: --trust sha256:..., as" in refused.err


def test_the_keyring(other: Command, key: Path, tmp_path: Path) -> None:
    assert "no key is trusted" in other("trust", "list").out
    public = tmp_path / "acme.pub"
    added = other(
        "trust",
        "add",
        public,
        "--label",
        "supplier",
        "--names",
        "iris-*",
        "--scope",
        "data",
        "--not-after",
        "2027-01-31",
        "--json",
    )
    key_id = added.document()["key_id"]
    (listed,) = other("trust", "list", "--json").document()["keys"]
    assert {name: listed[name] for name in ("label", "names", "scope", "not_after", "revoked")} == {
        "label": "supplier", "names": "iris-*", "scope": ["data"], "not_after": "2027-02-01T00:00:00+00:00", "revoked": False,
    }  # fmt: skip
    assert "supplier" in other("trust", "list").out
    assert "already, as supplier" in other("trust", "add", public).error("E_USAGE")
    other("trust", "remove", "nobody").error("E_USAGE")
    assert other("trust", "remove", key_id[:12], "--revoke").code == 0
    assert f"revoked: {key_id}" in other("trust", "list").out
    assert other("trust", "list", "--json").document() == {"keys": [], "revoked": [key_id]}


@pytest.mark.parametrize("words", [("--scope", "all"), ("--not-after", "soon"), ("--names", "a b"), ("--label", "a b")])
def test_keys_that_cannot_be_trusted_in_this_way(
    other: Command, key: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    other("trust", "add", tmp_path / "acme.pub", *words).error("E_KEY_FILE")
    assert not (tmp_path / "config").exists()


def test_files_that_are_no_keys(other: Command, iris: Iris, key: Path, tmp_path: Path) -> None:
    for odd in (key, iris.mle, tmp_path / "missing", tmp_path):
        assert other("trust", "add", odd).error("E_KEY_FILE").count(str(odd)) == 1
    key.chmod(0o644)
    other("sign", iris.mle, "--key", key, "-o", tmp_path / "m.mle").error("E_KEY_MODE")
    assert not (tmp_path / "m.mle").exists()


def test_encrypted_models(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    key, model = tmp_path / "secret.key", tmp_path / "m.mle"
    done = mlec("keygen", tmp_path / "secret", "--encryption")
    assert done.code == 0, done.err
    assert key.read_text().strip() not in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["secret.key"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    words = ("compile", iris.pickle, "--trust-pickle", "--no-validate", "--encrypt-key-file", key, "-o", model)
    assert mlec(*words).code == 0
    assert "--key-file" in mlec("run", model, iris.csv).error("E_KEY_MISSING")
    done = mlec("run", model, iris.csv, "--key-file", key)
    assert (done.code, done.err) == (0, "")
    assert mlec("run", model, iris.csv, env={"MLEC_KEY": key.read_text()}).out == done.out
    for command in (
        ("report", model),
        ("opt", model, "--passes", "dce"),
        ("bench", model, "--batch", "1", "--seconds", "0.01"),
    ):
        assert mlec(*command, "--key-file", key).code == 0
    locked = mlec("inspect", model)
    for part in ("AES-256-GCM", "need the key", "signature  none", "iris"):
        assert part in locked.out, locked.out
    assert mlec("inspect", model, "--json").document()["encrypted"] == "AES-256-GCM"
    mlec("inspect", model, "--graph").error("E_KEY_MISSING")
    opened = mlec("inspect", model, "--key-file", key)
    assert "encrypted with AES-256-GCM" in opened.out
    assert "built by this user" in opened.out
    assert mlec("sign", model, "--key", _signing_key(mlec, tmp_path)).code == 0, "needs no key to decrypt"
    assert "not in the keyring" in mlec("inspect", model).out
    assert mlec(*words[:-1], tmp_path / "c.mle", "--cipher", "chacha20-poly1305").code == 0
    assert mlec("inspect", tmp_path / "c.mle", "--json").document()["encrypted"] == "ChaCha20-Poly1305"
    key.write_bytes(bytes(32))
    mlec("verify", model, "--key-file", key).error("E_KEY_WRONG")
    key.write_text("x")
    mlec("verify", model, "--key-file", key).error("E_KEY_FILE")


def _signing_key(mlec: Run, folder: Path) -> Path:
    assert mlec("keygen", folder / "acme").code == 0
    return folder / "acme.key"

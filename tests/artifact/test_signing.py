"""Signatures: who signed is who is said to, nothing of a signed file can be changed, and keys count only as the keyring says."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import mlec
from mlec.artifact import (
    Artifact,
    Attributes,
    KernelBlob,
    Keyring,
    Signer,
    Storage,
    TrustDigest,
    TrustedKey,
    decide,
    keyring,
    keyring_changes,
    record_built,
    sign,
    write,
)
from mlec.artifact.signing import generate
from mlec.errors import ArtifactError, MlecError, RuntimeUnavailableError, SecurityError, UsageError, WriteError
from tests.artifact.conftest import made
from tests.artifact.surgery import Parts, join, seal, split
from tests.artifact.surgery import sign as sign_again

GOLDEN = Path(__file__).parents[1] / "artifacts" / "signed.mle"
SIGNER = Signer(bytes(range(32)), Attributes(signer="ACME", model_version="1.2"))
KEY = TrustedKey(SIGNER.public, "acme", path="acme.pub")
OTHER = Signer(bytes(32))
TRUSTING = Keyring((KEY,))
CONTENT: dict[str, Any] = {
    "metadata": {"targets": ["cpu"], "name": "m"}, "graph": "g", "tensors": {"w": np.arange(3, dtype=np.uint8)},
    "kernels": [KernelBlob(6, 0, b"code")],
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The keyring and the ledger of the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(keyring, "SYSTEM", str(tmp_path / "etc"))
    return tmp_path / "config" / "mlec"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("signed"), Storage(signer=SIGNER), **CONTENT)


@pytest.fixture
def parts(signed: bytes) -> Parts:
    """The signed file taken apart; it is signed again when it is joined."""
    parts = split(signed)
    parts.private = SIGNER.private
    return parts


Load = Callable[..., Artifact]


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(MlecError) as caught:
        action()
    return caught.value.code


# -- what a signature proves -------------------------------------------------------------------------------------------


def test_a_trusted_key_lets_code_run(signed: bytes, load: Load) -> None:
    artifact = load(signed, keyring=TRUSTING)
    assert artifact.signature is not None
    assert artifact.signature.key == KEY
    assert artifact.signature.attributes == Attributes("ACME", "", "m", "1.2")
    decision = decide(artifact)
    assert decision.native
    assert decision.reason.startswith("signed by acme (key ")
    assert artifact.describe()["signature"]["verified"] is True


def test_files_that_others_can_write_run_if_they_are_signed(signed: bytes, load: Load, tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(signed)
    path.chmod(0o666)
    with Artifact.open(path, keyring=TRUSTING) as artifact:
        assert artifact.writable_by_others
        assert decide(artifact).native


def test_an_unknown_key_proves_nothing(signed: bytes, load: Load) -> None:
    for known in (Keyring(), Keyring((TrustedKey(OTHER.public, "other"),))):
        artifact = load(signed, keyring=known)
        assert artifact.signature is not None
        assert artifact.signature.attributes == Attributes(), "nothing is shown that was not verified"
        decision = decide(artifact)
        assert not decision.native
        assert SIGNER.key_id[:16] in decision.reason
        assert decide(artifact, TrustDigest(f"sha256:{artifact.code_id}")).native


def test_a_stripped_signature_proves_nothing(parts: Parts, load: Load) -> None:
    parts.private = None
    artifact = load(join(parts), keyring=TRUSTING)
    assert artifact.signature is None
    assert not decide(artifact).native


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scope": ("data",)}, "data only"),
        ({"names": "n*"}, "models named n*"),
        ({"not_before": datetime(2999, 1, 1, tzinfo=UTC)}, "not valid before 2999"),
        ({"not_after": datetime(2001, 1, 1, tzinfo=UTC)}, "expired on 2001"),
    ],
)
def test_a_key_counts_as_the_keyring_says(signed: bytes, load: Load, change: dict[str, Any], why: str) -> None:
    artifact = load(signed, keyring=Keyring((replace(KEY, **change),)))
    decision = decide(artifact)
    assert not decision.native
    assert why in decision.reason
    assert artifact.signature is not None
    assert artifact.signature.attributes.signer == "ACME", "who signed is known all the same"


def test_validity_is_exact(signed: bytes, load: Load) -> None:
    key = TrustedKey.parse(f"{KEY.line()} not-before=2026-01-02 not-after=2026-03-04")
    signature = load(signed, keyring=Keyring((key,))).signature
    assert signature is not None
    for day, valid in (
        ("2026-01-01T23:59:59", False),
        ("2026-01-02", True),
        ("2026-03-04T23:59:59", True),
        ("2026-03-05", False),
    ):
        assert (signature.fault(datetime.fromisoformat(day).replace(tzinfo=UTC)) == "") is valid


def test_the_last_day_that_there_is_has_no_next_one(signed: bytes, load: Load) -> None:
    key = TrustedKey.parse(f"{KEY.line()} not-before=0001-01-01T00:00:00+14:00 not-after=9999-12-31")
    assert decide(load(signed, keyring=Keyring((key,)))).native
    assert TrustedKey.parse(key.line()) == key


def test_a_revoked_key_counts_nowhere(signed: bytes, load: Load) -> None:
    for keys in ((KEY,), ()):
        decision = decide(load(signed, keyring=Keyring(keys, frozenset([KEY.key_id]))))
        assert not decision.native
        assert "revoked" in decision.reason


def test_what_this_user_built_runs_whoever_signed_it(signed: bytes, load: Load) -> None:
    artifact = load(signed, keyring=Keyring())
    record_built(artifact.code_id)
    assert decide(artifact).native


# -- what is signed ----------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_file(signed: bytes, tmp_path: Path) -> None:
    assert made(tmp_path, Storage(signer=SIGNER), **CONTENT) == signed


def test_the_other_implementation_agrees(signed: bytes, parts: Parts) -> None:
    assert join(parts) == signed
    assert parts.attributes == b'{"model_name":"m","model_version":"1.2","signer":"ACME"}'


def test_the_golden_file_stays_readable() -> None:
    with Artifact.open(GOLDEN, keyring=TRUSTING) as artifact:
        assert decide(artifact).native
        assert artifact.tensors["w"].tolist() == [0, 1, 2]


def test_signing_later_changes_nothing_else(signed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    plain = write(path, **CONTENT)
    assert sign(path, SIGNER).code_id == plain.code_id
    assert path.read_bytes() == signed
    sign(path, OTHER, tmp_path / "n.mle")
    assert path.read_bytes() == signed
    assert not decide(Artifact.open(tmp_path / "n.mle", keyring=TRUSTING)).native
    sign(tmp_path / "n.mle", SIGNER)
    assert (tmp_path / "n.mle").read_bytes() == signed, "a file has one signature"


def test_compressed_files_and_flags_of_the_future_are_signed_as_they_are(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "m.mle"
    parts = split(made(tmp_path, Storage("zstd"), **CONTENT | {"graph": "text " * 99}))
    parts.header |= {"version": 1 | 7 << 16, "flags": 3 | 1 << 20}
    parts.metadata |= {"format": "1.7"}
    path.write_bytes(join(parts))
    sign(path, SIGNER)
    artifact = load(path.read_bytes(), keyring=TRUSTING)
    assert decide(artifact).native
    assert (artifact.header.flags, artifact.header.version) == (3 | 8 | 1 << 20, "1.7")


def test_a_damaged_file_is_not_signed(signed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    broken = bytearray(made(tmp_path, **CONTENT))
    broken[4096] ^= 1
    path.write_bytes(broken)
    assert code_of(lambda: sign(path, SIGNER)) == "E_CRC_WEIGHTS"
    assert path.read_bytes() == broken


# -- nothing can be changed ----------------------------------------------------------------------------------------------


def repaired(data: bytearray) -> bytes:
    """The file with all checksums of header and sections computed again."""
    import struct
    import zlib

    fields = struct.unpack_from("<10Q", data, 12)
    for i in range(5):
        offset, size = fields[2 * i : 2 * i + 2]
        if 128 <= offset <= offset + size <= len(data) and not 92 + 4 * i <= repaired.at < 96 + 4 * i:
            struct.pack_into("<I", data, 92 + 4 * i, zlib.crc32(data[offset : offset + size]) if size else 0)
    if not 124 <= repaired.at < 128:
        struct.pack_into("<I", data, 124, zlib.crc32(data[:124]))
    return bytes(data)


def test_no_bit_is_free(signed: bytes, load: Load, tmp_path: Path) -> None:
    """Every bit of the content, with checksums repaired: an error, or, where the key's identity is changed, an unknown key."""
    import struct

    fields = struct.unpack_from("<10Q", signed, 12)
    spans = [(0, 128)] + [(fields[i], fields[i] + fields[i + 1]) for i in range(0, 10, 2)]
    key = fields[8] + 8
    bits = [(at, bit) for start, end in spans for at in range(start, end) for bit in range(8)]
    unknown, codes = [], set()
    for at, bit in bits:
        data = bytearray(signed)
        data[at] ^= 1 << bit
        repaired.at = at
        try:
            with load(repaired(data), keyring=TRUSTING) as artifact:
                assert not decide(artifact).native, (at, bit)
                unknown.append((at, bit))
        except ArtifactError as error:
            codes.add(error.code)
    assert len(bits) > 5000
    assert "E_SIGNATURE" in codes
    assert all(code.startswith("E_") for code in codes)
    assert unknown == [(at, bit) for at in range(key, key + 32) for bit in range(8)]


def test_padding_cannot_be_changed(signed: bytes, load: Load) -> None:
    data = bytearray(signed)
    at = data.index(bytes(64), 512)
    data[at] = 1
    assert code_of(lambda: load(bytes(data), keyring=TRUSTING)) == "E_PADDING"


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.metadata.update(name="n"),
        lambda parts: parts.graph.update(ir="h"),
        lambda parts: parts.weights.__setitem__(0, 9) or parts.seal_tensors(),
        lambda parts: setattr(parts.kernels[0], "data", b"evil"),
        lambda parts: parts.header.update(version=1 | 1 << 16) or parts.metadata.update(format="1.1"),
        lambda parts: parts.header.update(flags=9 | 1 << 16),
        lambda parts: parts.kernels.clear(),
        lambda parts: parts.frames.update(graph=None),
        lambda parts: setattr(parts, "metadata_bytes", b"this is no JSON"),
    ],
)
def test_a_signature_of_another_file_is_an_error(
    parts: Parts, signed: bytes, load: Load, change: Callable[[Parts], object]
) -> None:
    """It is found before any of the metadata is parsed."""
    parts.signature_bytes = signed[-108 - len(parts.attributes) :]
    load(join(parts), keyring=TRUSTING).close()
    change(parts)
    with pytest.raises(SecurityError, match="acme") as caught:
        load(join(parts), keyring=TRUSTING)
    assert caught.value.code == "E_SIGNATURE"
    assert "broken.mle" in caught.value.render()


def test_no_trust_makes_a_wrong_signature_right(
    parts: Parts, signed: bytes, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that the user names the code, nor that it is in the ledger."""
    keyring_changes.add(KEY)
    parts.signature_bytes = signed[-108 - len(parts.attributes) :]
    parts.metadata["name"] = "n"
    (tmp_path / "m.mle").write_bytes(join(parts))
    with Artifact.open(tmp_path / "m.mle", keyring=Keyring()) as artifact:
        code_id = artifact.code_id
    assert record_built(code_id)
    for trust in ("auto", f"sha256:{code_id}"):
        assert code_of(lambda trust=trust: mlec.load(tmp_path / "m.mle", trust=trust)) == "E_SIGNATURE"


BLOCK = b"MLES\1\0\1\0" + bytes(32 + 64)


@pytest.mark.parametrize(
    "block",
    [
        b"x", BLOCK, BLOCK + b"\1\0\0\0", BLOCK + b"\0\0\0\0{}", BLOCK + b"\2\0\0\0{}}", b"MLEX" + BLOCK[4:] + bytes(4),
        b"MLES\2\0" + BLOCK[6:] + bytes(4), b"MLES\1\0\0\0" + BLOCK[8:] + bytes(4), b"MLES\1\0\2\0" + BLOCK[8:] + bytes(4),
        BLOCK + b"\1\0\1\0" + bytes((1 << 16) + 1), BLOCK + b"\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_the_form_of_the_section(parts: Parts, load: Load, block: bytes) -> None:
    parts.signature_bytes = block
    assert code_of(lambda: load(join(parts), keyring=TRUSTING)) == "E_SIGNATURE_BLOCK"


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        (b"[]", "E_SIGNATURE_ATTRIBUTES"),
        (b'{"signer":3}', "E_SIGNATURE_ATTRIBUTES"),
        (b'{"signer":"a","signer":"b"}', "E_JSON_DUPLICATE"),
        (b"", "E_JSON_SYNTAX"),
    ],
)
def test_attributes_that_are_none(parts: Parts, load: Load, attributes: bytes, code: str) -> None:
    """Signed they may be: what they say is used as little as possible, and only in its form."""
    parts.attributes = attributes
    assert code_of(lambda: load(join(parts), keyring=TRUSTING)) == code


def test_unknown_attributes_are_ignored(parts: Parts, load: Load) -> None:
    parts.attributes = b'{"novelty":[1],"signer":"a"}'
    assert decide(load(join(parts), keyring=TRUSTING)).native


def test_a_signature_with_another_algorithm_in_it_is_wrong(parts: Parts, load: Load) -> None:
    """The numbers of the algorithms are signed, too."""
    data = join(parts)
    names = ["magic", "version", "flags", *(f"{i}" for i in range(10)), *(f"crc{i}" for i in range(4)), "crc.signature"]
    import struct

    header = dict(
        zip(
            [*names, "size", "digest", "sig", "aead", "codecs"],
            struct.unpack("<4sII10QIIIIIQ4B", data[:124]),
            strict=True,
        )
    )
    from tests.artifact.surgery import root

    metadata = data[128 : 128 + header["1"]]
    assert (
        sign_again(SIGNER.private, header, root("metadata", metadata), parts.attributes)
        == data[-108 - len(parts.attributes) :]
    )
    changed = sign_again(SIGNER.private, header | {"digest": 2}, root("metadata", metadata), parts.attributes)
    body = data[128 : -len(changed)] + changed
    import zlib

    header["crc.signature"] = zlib.crc32(changed)
    assert code_of(lambda: load(seal(header) + body, keyring=TRUSTING)) == "E_SIGNATURE"


# -- keys ----------------------------------------------------------------------------------------------------------------


def test_keys_in_files(tmp_path: Path) -> None:
    path = tmp_path / "k.key"
    pem, public = generate()
    path.write_bytes(pem)
    path.chmod(0o600)
    signer = Signer.read(path)
    assert signer.public == public
    assert repr(signer.private) not in repr(signer)
    assert signer.private.hex() not in repr(signer)
    assert Storage.of({"sign_key": path}).signer == Storage.of({"sign_key": signer}).signer
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        assert code_of(lambda: Signer.read(path)) == "E_KEY_MODE"


def test_keys_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.key"
    pem, public = generate("a secret é")
    path.write_bytes(pem)
    path.chmod(0o600)
    monkeypatch.delenv("MLEC_KEY_PASSWORD", raising=False)
    assert Signer.read(path, lambda: "a secret é").public == public
    with pytest.raises(UsageError, match="protected by a password") as missing:
        Signer.read(path)
    with pytest.raises(SecurityError, match="not that of") as wrong:
        Signer.read(path, lambda: "another")
    assert missing.value.code == wrong.value.code == "E_KEY_PASSWORD"
    monkeypatch.setenv("MLEC_KEY_PASSWORD", "a secret é")
    assert Storage.of({"sign_key": path}).signer == Signer.read(path)
    assert "a secret" not in repr(Signer.read(path)) + wrong.value.render()


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    odd = {
        "empty": b"", "text": b"key", "long": b"x" * 20_000,
        "public": private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
        "cut": private.private_bytes(pem, pkcs8, serialization.NoEncryption())[:-50],
        "other": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, serialization.NoEncryption()),
    }  # fmt: skip
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
        assert code_of(lambda name=name: Signer.read(tmp_path / name)) == "E_KEY_FILE"
    for path in (tmp_path, tmp_path / "missing", "/dev/null", "a\0b", b"k\xff", 3.5):
        assert code_of(lambda path=path: Storage.of({"sign_key": path})) == "E_KEY_FILE"


def test_attributes_that_cannot_be_stored(tmp_path: Path) -> None:
    for odd in ("\0", "\ud800", "x" * (1 << 16)):
        signer = replace(SIGNER, attributes=Attributes(signer=odd))
        assert code_of(lambda signer=signer: made(tmp_path, Storage(signer=signer), **CONTENT)) == "E_USAGE_JSON"


# -- the keyring ---------------------------------------------------------------------------------------------------------


def test_a_keyring_file(home: Path, signed: bytes, load: Load, tmp_path: Path) -> None:
    assert Keyring.load() == Keyring()
    path = keyring_changes.add(KEY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert Keyring.load().keys == (replace(KEY, path=str(path)),)
    assert decide(load(signed)).native, "the user's keyring is what counts by default"
    with pytest.raises(UsageError, match="already, as acme"):
        keyring_changes.add(replace(KEY, label="again"))
    keyring_changes.revoke(KEY.key_id)
    keyring_changes.revoke("ab" * 32)
    assert Keyring.load().revoked == {KEY.key_id, "ab" * 32}
    assert not decide(load(signed)).native
    keyring_changes.remove(Keyring.load().keys[0])
    assert not path.exists()
    with pytest.raises(UsageError, match="was revoked"):
        keyring_changes.add(KEY)
    assert not Keyring.load().keys


def test_where_no_keyring_can_be_and_where_none_can_be_read(
    tmp_path: Path, signed: bytes, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null")
    assert Keyring.load() == Keyring()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ("x" * 300)))
    with pytest.raises(SecurityError, match="cannot be read: File name too long") as caught:
        load(signed)
    assert caught.value.code == "E_KEYRING"
    assert "XDG_CONFIG_HOME" in str(caught.value.hint)


def test_a_keyring_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    keyring_changes.add(KEY)
    before = Keyring.load()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    monkeypatch.setattr(Path, "unlink", full)
    actions: list[Callable[[], object]] = [
        lambda: keyring_changes.add(TrustedKey(OTHER.public, "other")),
        lambda: keyring_changes.remove(before.keys[0]),
        lambda: keyring_changes.revoke(KEY.key_id),
    ]
    for action in actions:
        with pytest.raises(WriteError, match=r"keyring in .* cannot be written: No space left") as caught:
            action()
        assert "XDG_CONFIG_HOME" in str(caught.value.hint)
    assert Keyring.load() == before


def test_removing_keeps_the_other_lines(home: Path) -> None:
    path = home / "trusted_keys.d" / "all.pub"
    path.parent.mkdir(parents=True)
    other = TrustedKey(OTHER.public, "other")
    path.write_text(f"# ours\n\n{KEY.line()}\n  {other.line()}  \n")
    first, _ = Keyring.load().keys
    keyring_changes.remove(first)
    assert path.read_text() == f"# ours\n\n  {other.line()}  \n"


def test_the_users_line_counts_before_that_of_the_machine(home: Path, tmp_path: Path) -> None:
    system = tmp_path / "etc" / "trusted_keys.d"
    system.mkdir(parents=True)
    (system / "all.pub").write_text(KEY.line() + "\n")
    assert Keyring.load().find(KEY.key_id) == replace(KEY, path=str(system / "all.pub"))
    keyring_changes.add(replace(KEY, scope=("data",)))
    found = Keyring.load().find(KEY.key_id)
    assert found is not None
    assert found.scope == ("data",)
    (tmp_path / "etc" / "revoked_keys").write_text(f"# gone\n{KEY.key_id}\n")
    assert Keyring.load().revoked == {KEY.key_id}


@pytest.mark.parametrize("mode", [0o620, 0o602])
@pytest.mark.parametrize("what", ["trusted_keys.d/k.pub", "trusted_keys.d", "revoked_keys", "."])
def test_what_others_can_write_is_an_error(home: Path, signed: bytes, load: Load, what: str, mode: int) -> None:
    (home / "trusted_keys.d").mkdir(parents=True)
    (home / "trusted_keys.d" / "k.pub").write_text(KEY.line())
    (home / "revoked_keys").write_text("")
    load(signed).close()
    path = home / what
    path.chmod(mode | (0o100 if path.is_dir() else 0))
    with pytest.raises(SecurityError, match="other users can write") as caught:
        load(signed)
    assert caught.value.code == "E_KEYRING"
    path.chmod(0o755)


GOOD = KEY.line()


@pytest.mark.parametrize(
    "line",
    [
        "mle-ed25519", "ssh-ed25519 " + GOOD[12:], GOOD.replace("=", "!"), "mle-ed25519 AAAA label", GOOD.rpartition(" ")[0],
        GOOD[:-4] + "a/b", GOOD + " scope=all", GOOD + " scope=", GOOD + " not-after=soon", GOOD + " unknown=1",
        GOOD + " names=a names=b", "\xff", GOOD + " not-after=9999-99-99",
    ],
)  # fmt: skip
def test_lines_that_do_not_read_are_errors(home: Path, line: str) -> None:
    (home / "trusted_keys.d").mkdir(parents=True)
    (home / "trusted_keys.d" / "k.pub").write_text(f"\n{line}\n", encoding="latin-1")
    with pytest.raises(SecurityError, match=r"k\.pub") as caught:
        Keyring.load()
    assert caught.value.code == "E_KEYRING"


def test_files_that_are_no_keyring(home: Path) -> None:
    (home / "trusted_keys.d").mkdir(parents=True)
    odd = home / "trusted_keys.d" / "k.pub"
    odd.mkdir()
    assert code_of(Keyring.load) == "E_KEYRING"
    odd.rmdir()
    os.mkfifo(odd)
    assert code_of(Keyring.load) == "E_KEYRING"
    odd.unlink()
    odd.write_text("#" * (2 << 20))
    assert code_of(Keyring.load) == "E_KEYRING"
    odd.write_text("")
    (home / "revoked_keys").write_text("abc")
    assert code_of(Keyring.load) == "E_KEYRING"


def test_lines_are_written_as_they_are_read() -> None:
    key = TrustedKey.parse(f"{GOOD} names=iris-* scope=data not-before=2026-01-02T03:04:05+01:00 not-after=2026-05-06")
    assert TrustedKey.parse(key.line()) == key
    assert (key.names, key.scope) == ("iris-*", ("data",))


# -- the library -----------------------------------------------------------------------------------------------------------


def test_without_the_library_the_error_names_it(
    signed: bytes, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    assert not decide(load(signed, keyring=Keyring())).native, "an unknown key needs none"
    for action in (lambda: load(signed, keyring=TRUSTING), lambda: made(tmp_path, Storage(signer=SIGNER))):
        with pytest.raises(RuntimeUnavailableError, match="cryptography") as caught:
            action()
        assert caught.value.code == "E_NO_CRYPTOGRAPHY"


def test_files_without_a_signature_need_neither_library_nor_keyring(tmp_path: Path) -> None:
    made(tmp_path, **CONTENT)
    code = (
        f"import sys, mlec.artifact as a; a.decide(a.Artifact.open({str(tmp_path / 'm.mle')!r})); "
        "print([m for m in ('cryptography', 'backports', 'mlec.artifact.signing', 'mlec.artifact.encryption') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

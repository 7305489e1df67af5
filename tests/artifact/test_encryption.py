"""Encrypted files: nothing but the metadata can be read without the key, and nothing of them can be changed, moved or left out."""

from __future__ import annotations

import base64
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.artifact import (
    Artifact,
    EncryptionKey,
    KernelBlob,
    Keyring,
    Signer,
    Storage,
    TrustedKey,
    decide,
    encryption,
    sign,
)
from mlec.errors import MlecError, RuntimeUnavailableError, UsageError
from tests.artifact.conftest import made
from tests.artifact.mutants import second_opinion
from tests.artifact.surgery import Parts, join, split

GOLDEN = Path(__file__).parents[1] / "artifacts"
MASTER = bytes(range(100, 132))
KEYS = {name: EncryptionKey(MASTER, name) for name in ("AES-256-GCM", "ChaCha20-Poly1305")}
GOLDEN_FILES = {"aes_gcm.mle": "AES-256-GCM", "chacha20.mle": "ChaCha20-Poly1305"}
SECRET = b"this must not be readable"
CONTENT: dict[str, Any] = {
    "metadata": {"targets": ["cpu"], "name": "m"}, "graph": f"graph {SECRET.decode()}" * 9, "tensors": {
        "w": np.arange(900, dtype=np.int32), "mask": np.array([True, False]), "secret": np.frombuffer(SECRET, np.uint8),
    },
    "kernels": [KernelBlob(6, 0, SECRET * 5)],
}  # fmt: skip
Load = Callable[..., Artifact]


@pytest.fixture(params=list(KEYS))
def key(request: pytest.FixtureRequest) -> EncryptionKey:
    return KEYS[request.param]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("sealed"), Storage(key=KEYS["AES-256-GCM"]), **CONTENT)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three chunks of weights, the last one short."""
    tensors = {"w": np.arange(300_000, dtype=np.int64)}
    return made(tmp_path_factory.mktemp("large"), Storage(key=KEYS["AES-256-GCM"]), **CONTENT | {"tensors": tensors})


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(MlecError) as caught:
        action()
    return caught.value.code


def check_content(artifact: Artifact) -> None:
    assert artifact.graph == CONTENT["graph"]
    assert list(artifact.kernels) == CONTENT["kernels"]
    for name, array in CONTENT["tensors"].items():
        read = artifact.tensors[name]
        np.testing.assert_array_equal(read, array)
        assert read.flags.writeable is False
        assert read.ctypes.data % 64 == 0


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("verify", ["full", "fast"])
def test_what_is_written_is_what_is_read(
    key: EncryptionKey, compression: str | None, verify: str, tmp_path: Path, load: Load
) -> None:
    data = made(tmp_path, Storage(compression, key=key), **CONTENT)
    assert SECRET not in data
    artifact = load(data, key=EncryptionKey(MASTER), verify=verify)
    check_content(artifact)
    assert "ENCRYPTED" in artifact.describe()["flags"]
    assert join(split(data, MASTER)) == data, "the other implementation agrees"
    assert split(data, MASTER).graph["ir"] == CONTENT["graph"]


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_golden_files_stay_readable(name: str) -> None:
    with Artifact.open(GOLDEN / name, key=EncryptionKey(MASTER)) as artifact:
        check_content(artifact)
        assert encryption.CIPHERS[artifact.header.aead_alg] == GOLDEN_FILES[name]


def test_large_sections_are_cut_into_chunks(large: bytes, load: Load) -> None:
    artifact = load(large, key=EncryptionKey(MASTER))
    np.testing.assert_array_equal(artifact.tensors["w"], np.arange(300_000))
    assert artifact.header.sections["weights"].size == 2_400_000 + 3 * 16
    assert join(split(large, MASTER)) == large


def test_every_file_has_keys_of_its_own(sealed: bytes, tmp_path: Path) -> None:
    again = made(tmp_path, Storage(key=KEYS["AES-256-GCM"]), **CONTENT)
    assert len(again) == len(sealed)
    assert split(again, MASTER).metadata["encryption"] != split(sealed, MASTER).metadata["encryption"]


def test_a_file_that_is_saved_without_a_key_says_nothing_of_encryption(
    sealed: bytes, load: Load, tmp_path: Path
) -> None:
    artifact = load(sealed, key=EncryptionKey(MASTER))
    data = made(tmp_path, metadata=artifact.metadata, graph=artifact.graph, tensors=artifact.tensors, kernels=[])
    assert "encryption" not in split(data).metadata
    load(data).close()


def test_signing_needs_no_key_and_signatures_are_verified_without_one(sealed: bytes, tmp_path: Path) -> None:
    path, signer = tmp_path / "m.mle", Signer(bytes(32))
    path.write_bytes(sealed)
    sign(path, signer)
    keyring = Keyring((TrustedKey(signer.public, "acme"),))
    with Artifact.open(path, keyring=keyring, key=EncryptionKey(MASTER)) as artifact:
        check_content(artifact)
        assert decide(artifact).native
    data = bytearray(path.read_bytes())
    data[-10] ^= 1  # in the attributes
    parts = split(bytes(data), MASTER)
    parts.signature_bytes = bytes(data[-108 - len(parts.attributes) :])
    assert code_of(lambda: (path.write_bytes(join(parts)), Artifact.open(path, keyring=keyring))) == "E_SIGNATURE"


# -- keys ----------------------------------------------------------------------------------------------------------------


def test_without_the_key(sealed: bytes, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLEC_KEY", raising=False)
    assert code_of(lambda: load(sealed)) == "E_KEY_MISSING"
    assert code_of(lambda: load(sealed, key=EncryptionKey(bytes(32)))) == "E_KEY_WRONG"
    monkeypatch.setenv("MLEC_KEY", EncryptionKey(MASTER).text())
    check_content(load(sealed))
    for odd in ("x", base64.b64encode(bytes(31)).decode(), "é"):
        monkeypatch.setenv("MLEC_KEY", odd)
        with pytest.raises(UsageError, match="MLEC_KEY") as caught:
            load(sealed)
        assert caught.value.code == "E_KEY_FILE"


def test_keys_as_they_are_given(tmp_path: Path) -> None:
    path = tmp_path / "k"
    for content in (MASTER, base64.b64encode(MASTER) + b"\n"):
        path.write_bytes(content)
        path.chmod(0o600)
        for given in (path, str(path), MASTER, EncryptionKey(MASTER)):
            assert Storage.of({"encryption_key": given}).key == EncryptionKey(MASTER)
    path.chmod(0o640)
    assert code_of(lambda: EncryptionKey.of(path)) == "E_KEY_MODE"
    path.chmod(0o600)
    for content in (b"", MASTER[1:], b"\xff" * 44, base64.b64encode(MASTER)[:-4]):
        path.write_bytes(content)
        assert code_of(lambda: EncryptionKey.of(path)) == "E_KEY_FILE"
    for odd in (MASTER[1:], 3, tmp_path / "missing", tmp_path, bytearray(MASTER)):
        assert code_of(lambda odd=odd: EncryptionKey.of(odd)) == "E_KEY_FILE"
    assert code_of(lambda: EncryptionKey(MASTER, "rot13")) == "E_USAGE"


def test_the_key_is_in_no_text(sealed: bytes, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    key = EncryptionKey(MASTER)
    shown = [repr(key), str(key), repr(Storage(key=key)), repr(encryption.Lock.new(key)), repr(load(sealed, key=key))]
    with caplog.at_level(logging.DEBUG), pytest.raises(MlecError) as caught:
        load(sealed, key=EncryptionKey(MASTER[::-1]))
    shown += [caplog.text, caught.value.render(), *traceback.format_exception(caught.value)]
    for text in shown:
        for secret in (MASTER, MASTER[::-1]):
            for form in (repr(secret), secret.hex(), base64.b64encode(secret).decode()):
                assert form not in text


# -- what is refused -------------------------------------------------------------------------------------------------------


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def tampered(name: str, change: Callable[[bytes], bytes]) -> Callable[[Parts], None]:
    return lambda parts: parts.tampered.update({name: change})


CHUNK = (1 << 20) + 16
BROKEN: list[tuple[str, Callable[[Parts], object]]] = [
    ("E_AEAD_TAG", tampered("graph", flipped(0))),
    ("E_AEAD_TAG", tampered("graph", flipped(-1 + 16))),
    ("E_AEAD_TAG", tampered("kernels", flipped(9))),
    ("E_AEAD_TAG", tampered("weights", flipped(CHUNK + 5))),
    ("E_AEAD_TAG", tampered("weights", lambda data: data[CHUNK : 2 * CHUNK] + data[:CHUNK] + data[2 * CHUNK :])),  # swapped
    ("E_AEAD_TAG", tampered("weights", lambda data: data[:CHUNK] * 2 + data[2 * CHUNK :])),  # repeated
    ("E_AEAD_TAG", tampered("weights", lambda data: data[CHUNK:])),  # the first one left out
    ("E_AEAD_TAG", tampered("weights", lambda data: data[: 2 * CHUNK])),  # the last one left out
    ("E_AEAD_TAG", tampered("weights", lambda data: data[:-1])),
    ("E_AEAD_TAG", tampered("weights", lambda data: data + data[-100:])),
    ("E_AEAD_SIZE", tampered("weights", lambda data: data[: CHUNK + 16])),
    ("E_AEAD_SIZE", tampered("weights", lambda data: data[: CHUNK + 1])),
    ("E_AEAD_SIZE", tampered("kernels", lambda data: data[:16])),
    ("E_KEY_WRONG", lambda parts: parts.metadata["encryption"].update(check="0" * 32)),
    ("E_ENCRYPTION_METADATA", lambda parts: parts.metadata["encryption"].update(check="0" * 31)),
    ("E_ENCRYPTION_METADATA", lambda parts: with_metadata(parts, lambda text: text.replace(b'"salt":"', b'"salt":"x'))),
    ("E_ENCRYPTION_METADATA", lambda parts: with_metadata(parts, lambda text: text.replace(b'"digests":{', b'"digests": {'))),
    ("E_ENCRYPTION_METADATA", lambda parts: with_metadata(parts, lambda text: text.replace(b'"encryption"', b'"otherwise!"'))),
    ("E_KEY_WRONG", lambda parts: with_metadata(parts, other_salt)),
    ("E_AEAD_TAG", lambda parts: with_metadata(parts, lambda text: text.replace(b'"name":"m"', b'"name":"n"'))),
    ("E_AEAD_TAG", lambda parts: with_metadata(parts, lambda text: text.replace(b'"name":"m"', b'"name": "m"'))),
    ("E_AEAD_TAG", lambda parts: parts.header.update({"aead_alg": 2})),
    ("E_AEAD_TAG", lambda parts: parts.header.update({"flags": 1 | 4 | 1 << 16})),
    ("E_AEAD_TAG", lambda parts: parts.header.update({"flags": 1 | 2 | 4, "codecs": 4})),
    ("E_FLAG_MISMATCH", lambda parts: parts.header.update({"aead_alg": 0})),
    ("E_AEAD_ALG", lambda parts: parts.header.update({"aead_alg": 3})),
]  # fmt: skip


def with_metadata(parts: Parts, change: Callable[[bytes], bytes]) -> None:
    """Change the metadata of the finished file; what is encrypted stays what it was."""
    data = join(parts)
    size = int.from_bytes(data[20:28], "little")
    parts.metadata_bytes = change(data[128 : 128 + size])
    assert parts.metadata_bytes != data[128 : 128 + size]


def other_salt(text: bytes) -> bytes:
    at = text.index(b'"salt":"') + 8
    return text[:at] + (b"1" if text[at : at + 1] == b"0" else b"0") + text[at + 1 :]


@pytest.mark.parametrize(("code", "change"), BROKEN, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BROKEN)])
def test_broken_rule(large: bytes, load: Load, code: str, change: Callable[[Parts], object]) -> None:
    parts = split(large, MASTER)
    change(parts)
    data = join(parts)
    for verify in ("full", "fast"):
        assert code_of(lambda verify=verify: load(data, key=EncryptionKey(MASTER), verify=verify)) == code
    assert second_opinion(data) == code


def test_nothing_that_was_decrypted_is_in_an_error(sealed: bytes, load: Load) -> None:
    """The last chunk is wrong, those before it were decrypted."""
    parts = split(sealed, MASTER)
    parts.tampered["kernels"] = flipped(3)
    with pytest.raises(MlecError) as caught:
        load(join(parts), key=EncryptionKey(MASTER))
    text = "".join([caught.value.render(), repr(caught.value.to_dict()), *traceback.format_exception(caught.value)])
    assert caught.value.code == "E_AEAD_TAG"
    assert SECRET.decode() not in text
    assert caught.value.__cause__ is None


def test_chunks_of_another_file_are_refused(large: bytes, load: Load, tmp_path: Path) -> None:
    """Encrypted with the same master key, and of the same size."""
    tensors = {"w": np.arange(300_000, dtype=np.int64)[::-1]}
    other = made(tmp_path, Storage(key=KEYS["AES-256-GCM"]), **CONTENT | {"tensors": tensors})
    parts = split(large, MASTER)
    offset, size = (int.from_bytes(other[at : at + 8], "little") for at in (44, 52))
    parts.tampered["weights"] = lambda data: other[offset : offset + size]
    assert code_of(lambda: load(join(parts), key=EncryptionKey(MASTER))) == "E_AEAD_TAG"


def test_what_is_in_an_encrypted_file_is_checked_as_well(sealed: bytes, load: Load) -> None:
    for code, change in (
        ("E_GRAPH_SCHEMA", lambda parts: parts.graph.pop("ir")),
        ("E_TENSOR_CRC", lambda parts: parts.tensor("w").update(crc32=1)),
        ("E_KERNEL_KIND", lambda parts: parts.kernels[0].fields.update(kind=9)),
        ("E_WEIGHTS_END", lambda parts: parts.weights.extend(bytes(64))),
    ):
        parts = split(sealed, MASTER)
        change(parts)
        assert code_of(lambda parts=parts: load(join(parts), key=EncryptionKey(MASTER))) == code


def test_without_the_library_the_error_names_it(
    sealed: bytes, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.kdf.hkdf", None)
    for action in (
        lambda: load(sealed, key=EncryptionKey(MASTER)),
        lambda: made(tmp_path, Storage(key=EncryptionKey(MASTER)), **CONTENT),
    ):
        with pytest.raises(RuntimeUnavailableError, match="cryptography"):
            action()

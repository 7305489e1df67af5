"""Machine code runs only after proof: the local ledger, or a digest that the user gives."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.artifact import (
    Artifact,
    KernelBlob,
    TrustDecision,
    TrustDigest,
    decide,
    is_built_here,
    record_built,
    trust,
    write,
)
from mlec.errors import SecurityError, UsageError

CODE = "ab" * 32


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mlec"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(tmp_path / "m.mle")
    return tmp_path / "m.mle"


def save(path: Path, *, graph: str = "g", kernel: bytes = b"code", weight: float = 1.0, name: str = "m") -> str:
    saved = write(
        path,
        metadata={"targets": ["cpu"], "name": name},
        graph=graph,
        tensors={"w": np.array([weight])},
        kernels=[KernelBlob(6, 0, kernel)] if kernel else [],
    )
    return saved.code_id


def native(path: Path, how: Any = "auto") -> bool:
    with Artifact.open(path) as artifact:
        decision = decide(artifact, how)
    assert isinstance(decision, TrustDecision)
    assert decision.reason
    return decision.native


def test_unknown_code_does_not_run(model: Path) -> None:
    assert native(model) is False


def test_code_built_here_runs(model: Path) -> None:
    with Artifact.open(model) as artifact:
        assert record_built(artifact.code_id) is True
    assert native(model) is True


def test_files_without_kernels_have_nothing_to_run(tmp_path: Path) -> None:
    code = save(tmp_path / "portable.mle", kernel=b"")
    record_built(code)
    assert native(tmp_path / "portable.mle") is False
    assert native(tmp_path / "portable.mle", TrustDigest(f"sha256:{code}")) is False


def test_any_other_content_is_other_code(tmp_path: Path) -> None:
    record_built(save(tmp_path / "m.mle"))
    changes: list[dict[str, Any]] = [{"graph": "h"}, {"kernel": b"evil"}, {"weight": 2.0}, {"name": "n"}]
    for change in changes:
        save(tmp_path / "other.mle", **change)
        assert native(tmp_path / "other.mle") is False
    save(tmp_path / "other.mle")
    assert native(tmp_path / "other.mle") is True


def test_a_digest_trusts_one_file(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Artifact.open(model) as artifact:
        digest = TrustDigest(f"sha256:{artifact.code_id}")
    with caplog.at_level(logging.WARNING):
        assert native(model, digest) is True
    assert digest.digest in caplog.text
    save(tmp_path / "other.mle", graph="h")
    for kernel in (b"code", b""):
        save(tmp_path / "other.mle", graph="h", kernel=kernel)
        with pytest.raises(SecurityError) as caught:
            native(tmp_path / "other.mle", digest)
        assert caught.value.code == "E_TRUST_DIGEST"


@pytest.mark.parametrize("how", [True, False, None, 1, "yes", "always", "", "sha256:" + CODE, b"auto"])
def test_trust_is_no_switch(model: Path, how: Any) -> None:
    with pytest.raises(UsageError) as caught:
        native(model, how)
    assert caught.value.code == "E_USAGE_TRUST"


@pytest.mark.parametrize(
    "text", ["", CODE, "sha256:", "sha256:" + CODE[1:], "sha256:" + CODE.upper(), "md5:" + CODE, 3]
)
def test_malformed_digests(text: Any) -> None:
    with pytest.raises(UsageError):
        TrustDigest(text)


@pytest.mark.parametrize("code", ["", "../../x", CODE + "\n", CODE.upper(), "sha256:" + CODE, None])
def test_only_code_identities_reach_the_file_system(code: Any, state: Path) -> None:
    for function in (record_built, is_built_here):
        with pytest.raises(UsageError):
            function(code)
    assert not state.exists()


def test_the_ledger_is_private(state: Path) -> None:
    assert record_built(CODE)
    assert record_built(CODE)
    files = {path.relative_to(state).as_posix(): path for path in state.rglob("*") if path.is_file()}
    assert set(files) == {"key", f"built/{CODE}"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert stat.S_IMODE((state / "built").stat().st_mode) == 0o700


def test_planted_entries_prove_nothing(state: Path) -> None:
    record_built("cd" * 32)
    entry = state / "built" / CODE
    for planted in (b"", b"\0" * 32, (state / "built" / ("cd" * 32)).read_bytes()):
        entry.write_bytes(planted)
        entry.chmod(0o600)
        assert is_built_here(CODE) is False
    entry.unlink()
    entry.symlink_to(state / "built" / ("cd" * 32))
    assert is_built_here("cd" * 32) is True
    assert is_built_here(CODE) is False


def test_another_key_proves_nothing(state: Path) -> None:
    record_built(CODE)
    assert is_built_here(CODE) is True
    (state / "key").write_bytes(bytes(32))
    assert is_built_here(CODE) is False


@pytest.mark.parametrize("name", ["key", f"built/{CODE}"])
def test_files_that_others_can_touch_are_not_believed(state: Path, name: str) -> None:
    record_built(CODE)
    for mode in (0o660, 0o604, 0o644):
        (state / name).chmod(mode)
        assert is_built_here(CODE) is False
    (state / name).chmod(0o600)
    assert is_built_here(CODE) is True


def test_a_key_of_a_wrong_length_is_not_used(state: Path) -> None:
    record_built(CODE)
    for length in (0, 31, 33):
        (state / "key").write_bytes(bytes(length))
        assert is_built_here(CODE) is False
        assert record_built(CODE) is False


@pytest.mark.parametrize("home", ["/proc/nothing", "/dev/null"])
def test_a_ledger_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", home)
    assert record_built(CODE) is False
    assert is_built_here(CODE) is False


def test_where_the_ledger_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert trust.state_directory() == tmp_path / "home" / ".local" / "state" / "mlec"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert record_built(CODE)
    assert (tmp_path / "home" / ".local" / "state" / "mlec" / "built" / CODE).exists()


def test_files_that_others_can_write_do_not_run_on_the_ledger_alone(model: Path) -> None:
    with Artifact.open(model) as artifact:
        code = artifact.code_id
    record_built(code)
    for mode in (0o664, 0o646):
        model.chmod(mode)
        assert native(model) is False
        assert native(model, TrustDigest(f"sha256:{code}")) is True
    model.chmod(0o644)
    model.parent.chmod(0o777)
    assert native(model) is False
    model.parent.chmod(0o1777)
    assert native(model) is True

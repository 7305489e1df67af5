"""Files with code for several processors: what their parts must agree about."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact, TrustDigest, read_model
from mlec.artifact.model import with_entries_unpacked
from mlec.cli import main
from mlec.errors import CorruptedFileError, MlecError, VersionMismatchError
from mlec.ir import GraphBuilder, tensor
from mlec.runtime.library import runtime_abi
from tests.artifact.surgery import Kernel, Parts, join, split


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sum for two processors, made by the compiler."""
    path = tmp_path_factory.mktemp("two") / "m.mle"
    b = GraphBuilder()
    graph = b.finish([b("add", b.input("x", tensor("f32", ("n", 3))), b.constant(np.ones(3, np.float32)))])
    mlec.compile(graph, target="cpu:x86-64,x86-64-v2", validate=False, progress=False).save(path)
    return path.read_bytes()


def test_the_other_implementation_agrees(two: bytes) -> None:
    parts = split(two)
    assert join(parts) == two
    assert parts.header == {"version": 1 | 1 << 16}
    assert (parts.metadata["format"], parts.metadata["critical"]) == ("1.1", ["variants"])
    assert len(with_entries_unpacked(parts.metadata)["variants"]) == 1
    assert [kernel.target for kernel in parts.kernels] == [0, 0, 1, 1]


def leave_out_a_target(parts: Parts) -> None:
    parts.kernels = [kernel for kernel in parts.kernels if not kernel.target]


def add_a_target(parts: Parts) -> None:
    parts.metadata["targets"].append(parts.metadata["targets"][0])


def add_code_for_it(parts: Parts) -> None:
    add_a_target(parts)
    parts.kernels.append(Kernel(6, 2, b"code"))


def another_device(parts: Parts) -> None:
    parts.metadata["variants"] = with_entries_unpacked(parts.metadata)["variants"]
    parts.metadata["variants"][0]["device"] = "cuda"


def another_dtype(parts: Parts) -> None:
    parts.metadata["variants"] = with_entries_unpacked(parts.metadata)["variants"]
    parts.metadata["variants"][0]["sequence"]["buffers"][0]["dtype"] = "i32"


def no_program(parts: Parts) -> None:
    parts.metadata["variants"] = [None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (leave_out_a_target, "the kernels are not those of 2 programs"),
        (add_a_target, "2 programs for 3 targets"),
        (add_code_for_it, "2 programs for 3 targets"),
        (another_device, "several devices"),
        (another_dtype, "the inputs of the program are not those of the signature"),
        (no_program, "variants"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_contradicts_itself_is_refused(
    two: bytes, tmp_path: Path, change: Callable[[Parts], None], says: str
) -> None:
    parts = split(two)
    change(parts)
    (tmp_path / "m.mle").write_bytes(join(parts))
    with Artifact.open(tmp_path / "m.mle") as artifact, pytest.raises(CorruptedFileError, match=says) as caught:
        read_model(artifact)
    assert caught.value.code == "E_METADATA"
    with pytest.raises(MlecError, match=says):
        mlec.load(tmp_path / "m.mle")


def test_code_of_several_targets_is_not_linked_together(two: bytes, tmp_path: Path) -> None:
    """Without the list of variants, the kernels of the second target belong to nobody."""
    parts = split(two)
    parts.metadata["critical"] = []
    del parts.metadata["variants"]
    (tmp_path / "m.mle").write_bytes(join(parts))
    with pytest.raises(CorruptedFileError, match="the kernels are not those of 1 programs"):
        mlec.load(tmp_path / "m.mle")


def test_a_feature_beside_variants_is_refused(two: bytes, tmp_path: Path) -> None:
    parts = split(two)
    parts.metadata["critical"] = ["variants", "sparse-weights"]
    (tmp_path / "m.mle").write_bytes(join(parts))
    with pytest.raises(VersionMismatchError, match=r"does not know: sparse-weights\n") as caught:
        Artifact.open(tmp_path / "m.mle")
    assert caught.value.code == "E_CRITICAL"


def test_changed_flags_are_not_trusted(two: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What code needs is part of its identity: taking a flag away does not make this user's code run elsewhere."""
    parts = split(two)
    for target in parts.metadata["targets"]:
        target["cpu_flags"] = []
    (tmp_path / "m.mle").write_bytes(join(parts))
    with mlec.load(tmp_path / "m.mle") as model:
        np.testing.assert_array_equal(model.run([np.zeros((2, 3), np.float32)])[0], np.ones((2, 3)))
    assert "not built by this user" in caplog.text


def test_code_for_another_runtime_is_compiled_again(
    two: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even code that is trusted: it would call what is not there."""
    parts = split(two)
    assert {target["abi"] for target in parts.metadata["targets"]} == {runtime_abi()}
    for target in parts.metadata["targets"]:
        target["abi"] = "tvm-ffi 9.9"
    (tmp_path / "m.mle").write_bytes(join(parts))
    caplog.set_level(logging.WARNING, "mlec")
    with Artifact.open(tmp_path / "m.mle") as artifact:
        trust = TrustDigest(f"sha256:{artifact.code_id}")
    np.testing.assert_array_equal(mlec.load(tmp_path / "m.mle", trust=trust).run([np.ones((2, 3), np.float32)])[0], 2.0)
    assert f"made for tvm-ffi 9.9, here is {runtime_abi()}" in caplog.text
    capsys.readouterr()
    for option in ([], ["--kernels"]):
        assert main(["inspect", str(tmp_path / "m.mle"), *option]) == 0
        assert "made for tvm-ffi 9.9" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "m.mle"), "--json"]) == 0
    assert not any(variant["runs_here"] for variant in json.loads(capsys.readouterr().out)["variants"])

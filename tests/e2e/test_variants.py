"""Code for several processors in one file: which of it runs where, that all of it is right, and what happens where none fits."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import mlec
from mlec.artifact import Artifact, read_model, write
from mlec.cli import main
from mlec.errors import RuntimeUnavailableError, TargetError, UsageError
from mlec.processor import DISABLE, host_flags
from mlec.target import PORTABLE

pytestmark = pytest.mark.skipif("avx512vl" not in host_flags(), reason="runs every level of x86-64")

FORCED = {"x86-64-v4": "", "x86-64-v3": "avx512f", "x86-64-v2": "avx512f,avx2,fma"}
"""By level, what the processor must lack for that level to be the best."""

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 12))
Y = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 40, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@dataclass
class Case:
    """A model, rows for it, the method that is compared, and how far results may lie apart, relative to their scale."""

    model: Any
    inputs: Any
    method: str
    tolerance: float

    def wanted(self) -> np.ndarray[Any, Any]:
        if isinstance(self.model, nn.Module):
            with torch.no_grad():
                return self.model(*self.inputs).numpy()
        return np.asarray(getattr(self.model, self.method)(self.inputs))

    def got(self, model: mlec.CompiledModel) -> np.ndarray[Any, Any]:
        if isinstance(self.model, nn.Module):
            return np.asarray(model.run([x.numpy() for x in self.inputs])[0])
        return np.asarray(getattr(model, self.method)(self.inputs))


def pipeline() -> Case:
    return Case(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y), X, "predict_proba", 1e-9)


def forest() -> Case:
    return Case(RandomForestClassifier(20, random_state=0).fit(X, Y), X.astype(np.float32), "predict_proba", 1e-6)


def convolutions() -> Case:
    torch.manual_seed(0)
    return Case(Convolutions().eval(), (torch.randn(3, 3, 21, 22),), "run", 1e-4)


def transformer() -> Case:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, activation="gelu")
    return Case(layer.eval(), (torch.randn(2, 9, 48),), "run", 1e-4)


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x, norm="ortho").abs() + torch.fft.fft(x).abs()[:, :513]


def spectrum() -> Case:
    """Whose passes, and so the tables that they read, depend on the number of registers."""
    return Case(Spectrum().eval(), (torch.randn(33, 1024),), "", 1e-6)


CASES: Mapping[str, Callable[[], Case]] = {
    "pipeline": pipeline, "forest": forest, "convolutions": convolutions, "transformer": transformer, "spectrum": spectrum,
}  # fmt: skip


@dataclass
class Saved:
    """A case compiled for all levels."""

    case: Case
    compiled: mlec.CompiledModel
    path: Path


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    case = CASES[request.param]()
    path = tmp_path_factory.mktemp("variants") / "m.mle"
    compiled = mlec.compile(case.model, case.inputs, target="cpu:portable", progress=False)
    compiled.save(path)
    return Saved(case, compiled, path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    case, path = pipeline(), tmp_path_factory.mktemp("small") / "m.mle"
    compiled = mlec.compile(case.model, case.inputs, target="cpu:x86-64-v3,x86-64-v4", progress=False, validate=False)
    compiled.save(path)
    return Saved(case, compiled, path)


def level_of(model: mlec.CompiledModel) -> str:
    return str(model.executable.program.target["mcpu"])


@pytest.mark.parametrize("level", PORTABLE)
def test_every_level_gives_the_results_of_the_source(saved: Saved, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, FORCED[level])
    with mlec.load(saved.path) as model:
        assert level_of(model) == level
        wanted = saved.case.wanted()
        np.testing.assert_allclose(
            saved.case.got(model), wanted, rtol=0, atol=saved.case.tolerance * np.abs(wanted).max()
        )


def disassembled(blob: bytes, folder: Path) -> str:
    """What binutils or LLVM read in an object file."""
    found = next(filter(None, map(shutil.which, ("llvm-objdump", "objdump"))), None)
    if found is None:
        pytest.skip("no disassembler")
    (folder / "code.o").write_bytes(blob)
    return subprocess.run([found, "-d", folder / "code.o"], capture_output=True, text=True, check=True).stdout


BEYOND = {
    "x86-64-v2": r"%[yz]mm|\sv(mov|add|mul|fm|pxor|xorp|gather|broadcast)|%k[1-7]",
    "x86-64-v3": r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2\d|3[01])",
}
"""What the code of a level must not have: wider registers, those that it lacks, instructions in the later encoding."""


def test_no_level_uses_what_it_lacks(saved: Saved, tmp_path: Path) -> None:
    widest = {"x86-64-v2": "%xmm", "x86-64-v3": "%ymm", "x86-64-v4": "%zmm"}
    with Artifact.open(saved.path) as artifact:
        programs = read_model(artifact).programs
        for number, program in enumerate(programs):
            level = str(program.target["mcpu"])
            code = "".join(disassembled(blob.data, tmp_path) for blob in artifact.kernels if blob.target == number)
            assert widest[level] in code
            assert level not in BEYOND or not re.search(BEYOND[level], code)


def test_each_level_has_kernels_of_its_own_kind(saved: Saved) -> None:
    with Artifact.open(saved.path) as artifact:
        model = read_model(artifact)
        code = [{blob.sha256 for blob in artifact.kernels if blob.target == i} for i in range(len(PORTABLE))]
        assert all(own - set.union(*code[:i], *code[i + 1 :]) for i, own in enumerate(code))
        needed = {str(p.target["mcpu"]): flags for p, flags in zip(model.programs, model.needed_cpu_flags, strict=True)}
    assert [str(program.target["mcpu"]) for program in model.programs] == ["x86-64-v4", "x86-64-v2", "x86-64-v3"]
    assert needed["x86-64-v2"] < needed["x86-64-v3"] < needed["x86-64-v4"]
    assert "avx" not in needed["x86-64-v2"]
    assert "avx512f" not in needed["x86-64-v3"]


def test_equal_weights_are_stored_once(saved: Saved) -> None:
    with Artifact.open(saved.path) as artifact:
        names = [set(program.constants) for program in read_model(artifact).programs]
        read = [artifact.tensors[name] for name in set.union(*names[1:])]
    contents = {(a.dtype.name, a.shape, a.tobytes()) for a in read}
    assert len(contents) == len(read)
    assert set.intersection(*names), "no weights in common"


def test_what_is_compiled_is_what_is_loaded(saved: Saved) -> None:
    assert level_of(saved.compiled) == "x86-64-v4"
    assert saved.compiled.report.model["variants"] == ["cpu:x86-64-v4", "cpu:x86-64-v2", "cpu:x86-64-v3"]
    assert not saved.compiled.report.warnings
    with mlec.load(saved.path) as model:
        np.testing.assert_array_equal(saved.case.got(model), saved.case.got(saved.compiled))


def test_a_wrong_variant_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that run here are compared with the source, not only the one that is returned."""
    seen: list[str] = []

    def refuse(compiled: mlec.CompiledModel, *given: Any) -> dict[str, Any]:
        seen.append(level_of(compiled))
        if seen[-1] == "x86-64-v3":
            raise mlec.errors.ToleranceError("the compiled model differs", code="E_PARITY", hint="none")
        return {"methods": {}}

    monkeypatch.setattr("mlec.api.validate_model", refuse)
    with pytest.raises(mlec.errors.ToleranceError) as caught:
        mlec.compile(pipeline().model, X, target="cpu:x86-64-v3,x86-64-v4", progress=False)
    assert seen == ["x86-64-v4", "x86-64-v3"]
    assert caught.value.notes == ("compiled for cpu:x86-64-v3",)


def test_saved_again(small: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlec.load(small.path).save(tmp_path / "again.mle", metadata={"author": "me"})
    monkeypatch.setenv(DISABLE, "avx512f")
    again = mlec.load(tmp_path / "again.mle")
    assert level_of(again) == "x86-64-v3"
    np.testing.assert_allclose(small.case.got(again), small.case.wanted(), rtol=1e-9)
    with Artifact.open(tmp_path / "again.mle") as artifact:
        assert (artifact.header.version, artifact.metadata["critical"]) == ("1.1", ["variants"])


def test_one_target_needs_no_new_format(tmp_path: Path) -> None:
    mlec.compile(pipeline().model, X, target="cpu:x86-64-v3", progress=False, validate=False).save(tmp_path / "m.mle")
    with Artifact.open(tmp_path / "m.mle") as artifact:
        assert (artifact.header.version, artifact.metadata["critical"]) == ("1.0", [])
        assert "variants" not in artifact.metadata


# -- where no variant fits -----------------------------------------------------------------------------------------------


def needing(small: Saved, path: Path, flag: str) -> Path:
    """The same file, but every variant needs one more feature of the processor; this user built it."""
    with Artifact.open(small.path) as artifact:
        metadata = dict(artifact.metadata)
        metadata["targets"] = [{**t, "cpu_flags": [*t["cpu_flags"], flag]} for t in metadata["targets"]]
        saved = write(path, metadata=metadata, graph=artifact.graph, tensors=artifact.tensors, kernels=artifact.kernels)
    assert mlec.artifact.record_built(saved.code_id)
    return path


def test_a_feature_that_no_processor_has_is_never_run(
    small: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mlec")
    path = needing(small, tmp_path / "m.mle", "avx4096")
    with mlec.load(path) as model:
        assert level_of(model) not in PORTABLE
        np.testing.assert_allclose(small.case.got(model), small.case.wanted(), rtol=1e-9)
    assert "x86-64-v4: this processor lacks avx4096" in caplog.text

    def no_compiler(kind: str) -> None:
        raise UsageError("'tvm' needs the package 'tvm'", code="E_MISSING_PACKAGE", hint="install it")

    monkeypatch.setattr("mlec.registry.backend_of", no_compiler)
    mlec.load(path).close()  # what was compiled before needs no compiler
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeUnavailableError, match=r"lacks avx4096.*needs the package 'tvm'") as caught:
        mlec.load(path)
    assert caught.value.code == "E_NO_VARIANT"
    assert str(caught.value.hint).endswith("compile the model again for this processor")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(RuntimeUnavailableError, match="not built by this user") as caught:
        mlec.load(small.path)
    assert "TrustDigest" in str(caught.value.hint)


def test_compiled_for_more_than_this_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "avx512f")
    compiled = mlec.compile(pipeline().model, X, target="cpu:x86-64-v4", progress=False)
    assert compiled.report.warnings == ["not validated or timed for cpu:x86-64-v4: this processor lacks avx512f"]
    with pytest.raises(TargetError, match="compiled for x86-64-v4 and cannot run here: this processor lacks avx512f"):
        compiled.predict(X)


def test_only_instruction_sets_can_be_disabled(small: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "avx512f,sse9")
    with pytest.raises(UsageError, match="names 'sse9'"):
        mlec.load(small.path)


def test_passes_run_for_one_processor() -> None:
    graph = mlec.lower(pipeline().model, X)
    with pytest.raises(UsageError, match="one processor") as caught:
        mlec.optimize(graph, target="cpu:portable")
    assert caught.value.hint == "for example cpu:x86-64-v4"


# -- another architecture ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    case, path = pipeline(), tmp_path_factory.mktemp("foreign") / "m.mle"
    compiled = mlec.compile(case.model, case.inputs, target="cpu:aarch64", progress=False)
    compiled.save(path)
    return Saved(case, compiled, path)


def test_objects_for_another_architecture(foreign: Saved) -> None:
    with Artifact.open(foreign.path) as artifact:
        assert {"aarch64", "asimd"} <= read_model(artifact).needed_cpu_flags[0]
        for blob in artifact.kernels:
            assert blob.data[:6] == b"\x7fELF\x02\x01"
            assert int.from_bytes(blob.data[18:20], "little") == 183  # EM_AARCH64


def test_code_for_aarch64_uses_neon(foreign: Saved, tmp_path: Path) -> None:
    with Artifact.open(foreign.path) as artifact:
        code = disassembled(artifact.kernels[0].data, tmp_path)
    if "unknown architecture" in code or "ret" not in code:
        pytest.skip("the disassembler does not know the architecture")
    assert re.search(r"fmla\S*\s+v\d+\.(4s|2d)", code)


def test_a_file_for_another_architecture_is_compiled_again(foreign: Saved, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mlec")
    with pytest.raises(TargetError, match="this processor is x86_64, not aarch64"):
        foreign.compiled.predict(X)
    with mlec.load(foreign.path) as model:
        np.testing.assert_allclose(foreign.case.got(model), foreign.case.wanted(), rtol=1e-9)
    assert "aarch64: this processor is x86_64, not aarch64" in caplog.text


def test_both_architectures_in_one_file(tmp_path: Path) -> None:
    case = pipeline()
    mlec.compile(case.model, X, target="cpu:aarch64,x86-64-v3", progress=False).save(tmp_path / "m.mle")
    with mlec.load(tmp_path / "m.mle") as model:
        assert level_of(model) == "x86-64-v3"
        np.testing.assert_allclose(case.got(model), case.wanted(), rtol=1e-9)


# -- on the command line -------------------------------------------------------------------------------------------------


def test_inspect_says_which_one_runs(
    small: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(small.path), "--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "yes: the best that this processor runs" in shown
    assert "could run, but x86-64-v4 uses more of this processor" in shown
    monkeypatch.setenv(DISABLE, "avx512f")
    assert main(["inspect", str(small.path), "--kernels"]) == 0
    assert "no: this processor lacks avx512f" in capsys.readouterr().out
    assert main(["inspect", str(small.path)]) == 0
    assert "of 2 variants" in capsys.readouterr().out


def test_targets_say_which_one_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(DISABLE, "avx512f")
    assert main(["targets", "--json"]) == 0
    here = {row["target"]: row["here"] for row in json.loads(capsys.readouterr().out)["targets"]}
    assert here["cpu:portable"] == "yes: runs x86-64-v3"
    assert here["cpu:x86-64-v3"] == "yes"
    assert here["cpu:aarch64"] == "compile only: this processor is x86_64, not aarch64"


def test_compile_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(pipeline().model))
    np.save(tmp_path / "x.npy", X)
    words = ["compile", str(tmp_path / "m.pkl"), "--trust-pickle", "--target", "cpu:x86-64-v3,x86-64-v4"]
    assert main(words) == 0
    assert "cpu:x86-64-v4, cpu:x86-64-v3" in capsys.readouterr().out
    monkeypatch.setenv(DISABLE, "avx512f")
    assert main(["run", str(tmp_path / "m.mle"), str(tmp_path / "x.npy"), "-o", str(tmp_path / "p.npz")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "p.npz")["predict_proba"], pipeline().wanted(), rtol=1e-9)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "m.mle"), "--json"]) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert [(v["target"], v["missing"], v["runs_here"]) for v in variants] == [
        ("x86-64-v4", "this processor lacks avx512f", False), ("x86-64-v3", "", True),
    ]  # fmt: skip

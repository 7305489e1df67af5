"""Files of torch: what is read, and what is refused before anything in it is executed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlec.errors import FrontendError, UnsupportedModelError, UntrustedPickleError, UsageError
from mlec.frontends.base import LowerOptions
from tests.frontends.torch.common import FRONTEND, compare
from tests.frontends.torch.networks import MLP

MLP_CLASS = "tests.frontends.torch.networks:MLP"
X = torch.randn(4, 16)


def sniff(path: Path) -> bool:
    return FRONTEND.sniff(path.read_bytes()[:65536], path)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.fixture
def program_file(tmp_path: Path, model: nn.Module) -> Path:
    path = tmp_path / "model.anything"
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    with path.open("wb") as file:
        torch.export.save(program, file)
    return path


def test_exported_programs(program_file: Path, model: nn.Module) -> None:
    assert sniff(program_file)
    program = FRONTEND.load(program_file, LowerOptions())
    graph = FRONTEND.lower(program, LowerOptions())
    assert graph.signature.inputs[0].shape == ("n", 16)
    compare(graph, FRONTEND.oracle(model)["run"], [X])
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def rewritten(
    path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], extra: dict[str, bytes] | None = None
) -> Path:
    """A copy of an archive with entries changed, dropped or added."""
    copy = path.with_name("changed")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for entry in source.infolist():
            kept = change(entry.filename, source.read(entry))
            if kept is not None:
                target.writestr(*kept)
        for name, content in (extra or {}).items():
            target.writestr(name, content)
    return copy


def same(name: str, content: bytes) -> tuple[str, bytes]:
    return name, content


def root_of(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()[0].split("/")[0]


@pytest.mark.parametrize(
    "entry",
    [
        "data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/code.so", "data/weights/model.pt",
        "data/constants/model.pt",
    ],
)  # fmt: skip
def test_archives_with_parts_to_execute(program_file: Path, entry: str) -> None:
    changed = rewritten(program_file, same, {f"{root_of(program_file)}/{entry}": b"x"})
    with pytest.raises(UnsupportedModelError) as caught:
        FRONTEND.load(changed, LowerOptions(trust_pickle=True))
    assert caught.value.code == "E_FILE_EXECUTES"


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a\\..\\b", "c:evil"])
def test_archives_with_bad_paths(program_file: Path, name: str) -> None:
    with pytest.raises(FrontendError, match="leaves the archive"):
        FRONTEND.load(rewritten(program_file, same, {name: b"x"}), LowerOptions())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_an_entry_twice(program_file: Path) -> None:
    with pytest.raises(FrontendError, match="twice"):
        FRONTEND.load(
            rewritten(program_file, same, {f"{root_of(program_file)}/models/model.json": b"{}"}), LowerOptions()
        )


def test_archives_that_unpack_to_far_too_much(program_file: Path) -> None:
    copy = rewritten(program_file, same)
    with zipfile.ZipFile(copy, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{root_of(program_file)}/data/zeros", bytes(10_000_000))
    with pytest.raises(FrontendError, match="that is no model"):
        FRONTEND.load(copy, LowerOptions())


def edited(path: Path, ending: str, edit: Callable[[Any], None]) -> Path:
    """A copy with one JSON entry edited."""

    def change(name: str, content: bytes) -> tuple[str, bytes]:
        if not name.endswith(ending):
            return name, content
        document = json.loads(content)
        edit(document)
        return name, json.dumps(document).encode()

    return rewritten(path, change)


def test_programs_that_call_anything_else(program_file: Path) -> None:
    def edit(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"

    with pytest.raises(UnsupportedModelError, match=r"torch\.os\.system") as caught:
        FRONTEND.load(edited(program_file, "models/model.json", edit), LowerOptions())
    assert caught.value.code == "E_FILE_EXECUTES"


def test_programs_with_pickled_tensors(program_file: Path) -> None:
    def edit(document: Any) -> None:
        next(iter(document["config"].values()))["use_pickle"] = True

    with pytest.raises(UnsupportedModelError, match="pickled tensor"):
        FRONTEND.load(edited(program_file, "weights_config.json", edit), LowerOptions())


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_sample_inputs_are_never_executed(program_file: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)

    def change(name: str, content: bytes) -> tuple[str, bytes]:
        return name, buffer.getvalue() if "sample_inputs" in name else content

    with contextlib.suppress(FrontendError):
        FRONTEND.load(rewritten(program_file, change), LowerOptions())
    assert not mark.exists()


def test_state_dicts(tmp_path: Path, model: nn.Module) -> None:
    for content in (model.state_dict(), {"state_dict": model.state_dict(), "epoch": 3}):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        assert sniff(path)
        loaded = FRONTEND.load(path, LowerOptions(model_class=MLP_CLASS))
        graph = FRONTEND.lower(loaded, LowerOptions(example_inputs=(X,)))
        compare(graph, FRONTEND.oracle(model)["run"], [X])


def test_state_dicts_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Linear(3, 3).state_dict(), path)
    with pytest.raises(FrontendError, match="do not fit") as caught:
        FRONTEND.load(path, LowerOptions(model_class=MLP_CLASS))
    assert "layers.0.weight" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "no_colon",
        "no.such.module:Class",
        "tests.frontends.torch.networks:Nothing",
        "tests.frontends.torch.networks:InvertedResidual",
        "pathlib:Path",
    ],
)
def test_wrong_model_classes(tmp_path: Path, model: nn.Module, name: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(UsageError):
        FRONTEND.load(path, LowerOptions(model_class=name))


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_modules_need_trust(tmp_path: Path, model: nn.Module, old_format: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(model, path, _use_new_zipfile_serialization=not old_format)
    assert sniff(path)
    with pytest.raises(UntrustedPickleError) as caught:
        FRONTEND.load(path, LowerOptions())
    assert "trust_pickle" in (caught.value.hint or "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for trust in (True, f"sha256:{digest}"):
        loaded = FRONTEND.load(path, LowerOptions(trust_pickle=trust))
        np.testing.assert_array_equal(
            FRONTEND.oracle(loaded)["run"]([X.numpy()]), FRONTEND.oracle(model)["run"]([X.numpy()])
        )
    with pytest.raises(UntrustedPickleError, match="not the file"):
        FRONTEND.load(path, LowerOptions(trust_pickle="sha256:" + "0" * 64))
    with pytest.raises(UsageError):
        FRONTEND.load(path, LowerOptions(trust_pickle="yes"))


@pytest.mark.parametrize("model_class", [None, MLP_CLASS])
def test_untrusted_pickles_are_never_executed(tmp_path: Path, model_class: str | None) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "executed"
    torch.save(Evil(mark), path)
    with pytest.raises(UntrustedPickleError):
        FRONTEND.load(path, LowerOptions(model_class=model_class))
    assert not mark.exists()


def test_trusted_pickles_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "tensor.pt"
    torch.save(X, path)
    with pytest.raises(FrontendError, match="holds a Tensor"):
        FRONTEND.load(path, LowerOptions(trust_pickle=True))


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Linear(3, 3)).save(str(path))
    assert sniff(path)
    with pytest.raises(UnsupportedModelError) as caught:
        FRONTEND.load(path, LowerOptions(trust_pickle=True))
    assert caught.value.code == "E_TORCHSCRIPT"


def test_other_files_are_not_taken(tmp_path: Path) -> None:
    archive = tmp_path / "arrays.npz"
    np.savez(archive, x=np.zeros(3))
    text = tmp_path / "model.pt"
    text.write_text("hello")
    assert not sniff(archive)
    assert not sniff(text)
    with pytest.raises(FrontendError):
        FRONTEND.load(text, LowerOptions())


def test_damaged_archives(program_file: Path) -> None:
    def change(name: str, content: bytes) -> tuple[str, bytes]:
        return name, b"not json" if name.endswith("models/model.json") else content

    with pytest.raises(FrontendError, match="not JSON"):
        FRONTEND.load(rewritten(program_file, change), LowerOptions())


def test_the_frontend_itself_does_not_import_torch() -> None:
    code = "import sys, mlec.frontends.fx as fx; fx.TorchFrontend().accepts(3); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

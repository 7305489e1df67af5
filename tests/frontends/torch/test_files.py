"""Files of torch: what is read, and what is refused before anything in it is executed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
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
from mlec.frontends.program_files import WeightsFile
from mlec.frontends.torch_archive import check_program_archive
from mlec.frontends.torch_files import open_weights
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


def test_any_ending_without_a_warning(program_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    FRONTEND.load(program_file, LowerOptions())
    assert not caplog.records


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


def check(path: Path) -> None:
    with path.open("rb") as file:
        check_program_archive(file, path)


def same(name: str, content: bytes) -> tuple[str, bytes]:
    return name, content


def root_of(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()[0].split("/")[0]


@pytest.mark.parametrize(
    "entry",
    [
        "data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/code.so", "data/weights/model.pt",
        "data/constants/model.pt", "data/constants/opaque_obj_0/x", "data/constants/Custom_obj_0/x/y", "models/modelABCDE",
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


def first_size(document: Any) -> dict[str, Any]:
    """The symbolic size of the program's input."""
    sizes = document["graph_module"]["graph"]["tensor_values"]
    return next(size["as_expr"] for value in sizes.values() for size in value["sizes"] if "as_expr" in size)


def with_size(document: Any, code: str) -> None:
    first_size(document)["expr_str"] = code


def with_name(document: Any, code: str) -> None:
    """In the place of an input's name, as a default value of a generated function's parameter."""
    name = document["graph_module"]["graph"]["inputs"][-1]["as_tensor"]
    name["name"] += f"={code}"


def with_parameter(document: Any, code: str) -> None:
    document["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = f'x"+{code}+"'


def with_argument(document: Any, code: str) -> None:
    document["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={code}"]


def with_spec(document: Any, code: str) -> None:
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace('"null"', json.dumps(json.dumps([f"x={code}"])), 1)


@pytest.mark.parametrize("place", [with_size, with_name, with_parameter, with_argument, with_spec])
def test_code_in_programs_is_never_executed(
    program_file: Path, tmp_path: Path, place: Callable[[Any, str], None]
) -> None:
    mark = tmp_path / "executed"
    changed = edited(
        program_file, "models/model.json", lambda d: place(d, f"__import__('pathlib').Path('{mark}').touch()")
    )
    with pytest.raises(UnsupportedModelError, match="would execute") as caught:
        FRONTEND.load(changed, LowerOptions())
    assert caught.value.code == "E_FILE_EXECUTES"
    assert not mark.exists()


@pytest.mark.parametrize("name", ["metadata", "custom", "as_string", "as_strings", "guards_code", "stack_trace"])
def test_tensors_are_not_taken_for_what_is_never_code(program_file: Path, tmp_path: Path, name: str) -> None:
    """A tensor can have the name of a field whose texts may read as they like."""
    mark = tmp_path / "executed"
    changed = edited(
        program_file, "models/model.json", lambda d: with_size(d, f"__import__('pathlib').Path('{mark}').touch()")
    )
    with zipfile.ZipFile(changed) as archive:
        document = json.loads(archive.read(f"{root_of(changed)}/models/model.json"))
    tensor = document["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"]
    renamed = json.loads(json.dumps(document).replace(json.dumps(tensor), json.dumps(name)))
    assert name in renamed["graph_module"]["graph"]["tensor_values"]
    changed = edited(program_file, "models/model.json", lambda d: (d.clear(), d.update(renamed)))
    with pytest.raises(UnsupportedModelError, match="expr_str") as caught:
        FRONTEND.load(changed, LowerOptions())
    assert caught.value.code == "E_FILE_EXECUTES"
    assert not mark.exists()


def test_what_is_checked_is_what_torch_reads(program_file: Path, tmp_path: Path, model: nn.Module) -> None:
    """Of two lists of entries, zipfile reads the one before the end, and torch the one that the end names."""
    mark = tmp_path / "executed"
    hostile = edited(
        program_file, "models/model.json", lambda d: with_size(d, f"__import__('pathlib').Path('{mark}').touch()")
    )
    bad, bad_list = _taken_apart(hostile)
    good, good_list = _taken_apart(rewritten(program_file, same))
    assert len(bad_list) == len(good_list)
    first, entries = len(bad) + len(bad_list), len(zipfile.ZipFile(program_file).namelist())
    moved = _moved(
        good_list, first - (len(bad_list) + len(good))
    )  # zipfile adds how far the list is from where it is said to be
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries, entries, len(good_list), len(bad), 0)
    path = tmp_path / "two.pt2"
    path.write_bytes(bad + bad_list + good + moved + end)
    graph = FRONTEND.lower(FRONTEND.load(path, LowerOptions()), LowerOptions())
    compare(graph, FRONTEND.oracle(model)["run"], [X])
    assert not mark.exists()


def _taken_apart(path: Path) -> tuple[bytes, bytes]:
    """The entries of a small archive, and the list of them."""
    data = path.read_bytes()
    size, start = struct.unpack_from("<LL", data, len(data) - 22 + 12)
    return data[:start], data[start : start + size]


def _moved(listed: bytes, by: int) -> bytes:
    """A list of entries that lie so many bytes further on."""
    moved, at = bytearray(listed), 0
    while at < len(moved):
        (offset,) = struct.unpack_from("<L", moved, at + 42)
        struct.pack_into("<L", moved, at + 42, (offset + by) % (1 << 32))
        at += 46 + sum(struct.unpack_from("<3H", moved, at + 28))
    return bytes(moved)


@pytest.mark.parametrize("size", ["Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))", "2*s0 + 1", "s0//2"])
def test_sizes_as_torch_writes_them(program_file: Path, size: str) -> None:
    check(edited(program_file, "models/model.json", lambda d: with_size(d, size)))


@pytest.mark.parametrize(
    "size", ["s0.__class__", "sympify('f(1)')", "Add('f(1)')", "Symbol('a b')", "[s0 for s0 in y]", "s0["]
)
def test_sizes_that_torch_would_evaluate(program_file: Path, size: str) -> None:
    with pytest.raises(UnsupportedModelError, match="expr_str"):
        check(edited(program_file, "models/model.json", lambda d: with_size(d, size)))


def test_entries_that_differ_in_case(program_file: Path) -> None:
    extra = {f"{root_of(program_file)}/models/MODEL.JSON": b"{}"}
    with pytest.raises(FrontendError, match="twice"):
        FRONTEND.load(rewritten(program_file, same, extra), LowerOptions())


@pytest.mark.parametrize("yes", [True, 1, "true"])
def test_programs_with_pickled_tensors(program_file: Path, yes: object) -> None:
    def edit(document: Any) -> None:
        next(iter(document["config"].values()))["use_pickle"] = yes

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


def test_state_dicts_of_the_old_format_are_read_elsewhere(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    weights = WeightsFile.open(path)
    found = weights.read()
    assert weights.process._process.pid != os.getpid()
    assert list(found) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_weights_that_want_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(1).expand(1 << 44)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(FrontendError, match=r"torch itself fails on weights\.pth: .*memory") as caught:
        WeightsFile.open(path).read()
    assert caught.value.code == "E_SOURCE_FAILS"


@pytest.mark.parametrize(
    "content", [[X], {"a": 3}, {1: X}, X, {"model": {"a": "text"}}], ids=lambda content: type(content).__name__
)
def test_data_that_is_no_state_dict(content: Any) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    with pytest.raises(FrontendError, match="it holds no state dict") as caught:
        open_weights(file)
    assert caught.value.code == "E_FILE"


def test_archives_of_weights_are_looked_at_first(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlec.frontends.program_files.SourceProcess", None)  # is not reached
    path = tmp_path / "weights.pth"
    for name, code in (("../x", "E_FILE_PATH"), ("archive/DATA.pkl", "E_FILE_TWICE"), ("zeros", "E_FILE_SIZE")):
        torch.save(model.state_dict(), path)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(
                name if code != "E_FILE_TWICE" else f"{root_of(path)}/DATA.pkl",
                bytes(1 << 24) if name == "zeros" else b"",
            )
        with pytest.raises(FrontendError) as caught:
            FRONTEND.load(path, LowerOptions(model_class=MLP_CLASS))
        assert caught.value.code == code


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
    for options in (LowerOptions(), LowerOptions(trust_pickle=True), LowerOptions(model_class=MLP_CLASS)):
        with pytest.raises(UnsupportedModelError) as caught:
            FRONTEND.load(path, options)
        assert caught.value.code == "E_TORCHSCRIPT"
        assert "torch.export.save" in str(caught.value.hint)


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

"""Files of torch.export.save, which torch reads in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mlec
from mlec.errors import FrontendError, UnsupportedOpError, UsageError
from mlec.frontends import source_process
from mlec.frontends.base import LowerOptions
from mlec.frontends.program_files import ProgramFile
from mlec.frontends.source_process import SourceProcess
from mlec.ir import print_graph
from tests.frontends.torch.common import FRONTEND

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two names of one weight, half precision, an empty tensor, dicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.zeros(0, 6))

    def forward(self, x: torch.Tensor, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        y = self.second(torch.relu(self.first(x))) * self.scale.float()
        return {"y": torch.cat([y, self.get_buffer("nothing")]), "sum": y.sum(-1) + extra["shift"]}


class Cube(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T


def saved(path: Path, module: nn.Module, *inputs: Any, **options: Any) -> torch.export.ExportedProgram:
    program = torch.export.export(module.eval(), inputs, **options)
    torch.export.save(program, path)
    return program


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "cube.pt2"
    saved(path, Cube(), X, dynamic_shapes=({0: torch.export.Dim("batch")},))
    return path


@pytest.fixture
def loaded(cube: Path) -> ProgramFile:
    model = FRONTEND.load(cube, LowerOptions())
    assert isinstance(model, ProgramFile)
    return model


def test_a_file_gives_the_graph_and_the_answers_of_its_program(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "extra": {"shift": {0: batch}}}
    inputs: list[Any] = [X, {"shift": torch.arange(4.0)}]
    program = saved(path, Net(), *inputs, dynamic_shapes=shapes)
    model = FRONTEND.load(path, LowerOptions())
    options = LowerOptions(input_shapes={"x": ("rows", 6)})
    graph, wanted = FRONTEND.lower(model, options), FRONTEND.lower(program, options)
    assert print_graph(graph) == print_graph(wanted)
    assert graph.signature == wanted.signature
    assert graph.constants.keys() == wanted.constants.keys()
    for name, array in wanted.constants.items():
        assert graph.constants[name].dtype == array.dtype
        assert graph.constants[name].tobytes() == array.tobytes()
    answers = FRONTEND.oracle(model)["run"](inputs)
    for ours, theirs in zip(answers, FRONTEND.oracle(program)["run"](inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_compiling_a_file_imports_no_torch_here(cube: Path) -> None:
    code = (
        "import sys, numpy as np, mlec\n"
        f"report = mlec.compile({str(cube)!r}, np.ones((4, 6), 'f4'), progress=False).report\n"
        "assert report.parity['methods']['run']['excess'] <= 1, report.parity\n"
        "assert report.timing['measured']['speedup'] > 0, report.timing\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_of_ours_come_through_as_they_are(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = torch.linalg.svd(x)[0]
            return vectors

    path = tmp_path / "svd.pt2"
    program = saved(path, Sorted(), X)
    errors = []
    for model in (program, FRONTEND.load(path, LowerOptions())):
        with pytest.raises(UnsupportedOpError) as caught:
            FRONTEND.lower(model, LowerOptions())
        errors.append(caught.value)
    assert errors[0].to_dict() == errors[1].to_dict()


def test_wrong_shapes_are_refused_as_for_a_program(loaded: ProgramFile) -> None:
    with pytest.raises(UsageError, match="the model takes") as caught:
        FRONTEND.lower(loaded, LowerOptions(input_shapes={"x": (7, 7)}))
    assert caught.value.code == "E_INPUT_SHAPE"


def test_inputs_that_the_program_refuses_do_not_end_its_process(loaded: ProgramFile) -> None:
    run = FRONTEND.oracle(loaded)["run"]
    with pytest.raises(UsageError, match="run: RuntimeError") as caught:
        run([np.ones((3,), "f4")])
    assert caught.value.code == "E_SOURCE_FAILS"
    (answer,) = run([X.numpy()])
    np.testing.assert_allclose(answer, X @ X.T, rtol=1e-6)


def test_a_crash_is_a_clear_error_and_nothing_is_tried_again(loaded: ProgramFile) -> None:
    os.kill(loaded.process._process.pid, signal.SIGSEGV)
    for _ in range(2):
        with pytest.raises(FrontendError, match=r"torch itself fails on cube\.pt2: its process died of SIGSEGV"):
            FRONTEND.lower(loaded, LowerOptions())
    with pytest.raises(FrontendError, match="SIGSEGV"):
        FRONTEND.oracle(loaded)["run"]([X.numpy()])


def test_a_program_that_hangs_is_a_clear_error(loaded: ProgramFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_process, "LOWER_SECONDS", 0.2)
    os.kill(loaded.process._process.pid, signal.SIGSTOP)
    with pytest.raises(FrontendError, match=r"took more than 0\.2 s") as caught:
        FRONTEND.lower(loaded, LowerOptions())
    assert caught.value.code == "E_SOURCE_FAILS"


def test_a_program_that_wants_too_much_memory_is_a_clear_error(loaded: ProgramFile) -> None:
    run = FRONTEND.oracle(loaded)["run"]
    with pytest.raises(UsageError, match="can't allocate memory"):
        run([np.ones((200_000, 6), "f4")])
    assert run([X.numpy()])[0].shape == (4, 4)


def test_limits_of_the_process(loaded: ProgramFile) -> None:
    limits = Path(f"/proc/{loaded.process._process.pid}/limits").read_text()
    for name in ("Max address space", "Max cpu time", "Max open files", "Max file size", "Max core file size"):
        (line,) = (line for line in limits.splitlines() if line.startswith(name))
        assert line.removeprefix(name).split()[1] != "unlimited", line
    assert not [file for file in os.listdir(f"/proc/{os.getpid()}/fd") if _is_copy(file)]


def test_the_process_has_no_secrets_and_leaves_nothing(cube: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLEC_KEY", "MLEC_KEY_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    process = FRONTEND.load(cube, LowerOptions()).process
    state = Path(f"/proc/{process._process.pid}")
    environment = dict(line.split("=", 1) for line in (state / "environ").read_text().split("\0") if line)
    assert "secret" not in environment.values()
    assert "NoNewPrivs:\t1" in (state / "status").read_text()
    folder = Path(environment["TMPDIR"])
    assert folder.stat().st_mode & 0o777 == 0o700
    process.close()
    assert not folder.exists()


def _is_copy(descriptor: str) -> bool:
    try:
        return "memfd:model" in os.readlink(f"/proc/{os.getpid()}/fd/{descriptor}")
    except OSError:
        return False


def answering(body: bytes, monkeypatch: pytest.MonkeyPatch) -> SourceProcess:
    """A process that answers its first question so, whatever it is, and ends."""
    code = (
        "import sys; asked = sys.stdin.buffer; asked.read(int.from_bytes(asked.read(8), 'little'));"
        f"sys.stdout.buffer.write({body!r})"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda arguments, **options: start([sys.executable, "-c", code], **options)
    )
    return SourceProcess("torch", "program", b"", ("run",), "m.pt2")


def framed(head: str, rest: bytes = b"") -> bytes:
    return len(head).to_bytes(8, "little") + head.encode() + rest


@pytest.mark.parametrize(
    "body",
    [
        b"\xff" * 8, framed("{"), framed("[" * 10_000), framed('{"arrays": [["|O", [1]]]}', bytes(8)),
        framed('{"arrays": [["<f4", [1099511627776]]]}'), framed('{"arrays": [["<f4", [-1, -1]]]}'), framed('{"arrays": [["?!", [1]]]}'),
        framed('{"arrays": [["<f4", [2]]]}', b"1234"), framed('{"graph": "graph @m(", "constants": {}}'),
        framed('{"graph": "", "constants": {"w": 0}}'), framed('{"error": {"class": "os", "message": 3}}'),
    ],
)  # fmt: skip
def test_a_process_that_lies_is_a_clear_error(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    process = answering(body, monkeypatch)
    with pytest.raises(FrontendError, match=r"torch itself fails on m\.pt2") as caught:
        process.lower(LowerOptions())
    assert caught.value.code == "E_SOURCE_FAILS"
    process.close()


def test_a_file_is_compiled_as_its_module(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    net = nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)).eval()
    saved(path, net, X, dynamic_shapes=({0: torch.export.Dim("b")},))
    compiled = mlec.compile(path, X, progress=False)
    np.testing.assert_allclose(compiled.run([X])[0], net(X).detach(), rtol=1e-5)
    assert compiled.report.parity["methods"]["run"]["excess"] <= 1

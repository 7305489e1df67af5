"""mlec compile: what it writes, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Done, Iris, Run


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_summary_and_the_files(iris: Iris) -> None:
    assert listing(iris.mle.parent) == ["iris.csv", "iris.html", "iris.mle", "iris.pkl"], (
        "OUT is MODEL's name with .mle"
    )
    assert str(iris.mle) in iris.compiled.out
    assert "predict_proba: largest error" in iris.compiled.out
    assert "iris.html" in iris.compiled.out
    assert re.search(
        r"^took       [\d.]+ s: import [\d.]+ s, .*build [\d.]+ s, validate [\d.]+ s, measure [\d.]+ s$",
        iris.compiled.out,
        re.M,
    )
    assert "1 kernel\n" in iris.compiled.out
    assert iris.compiled.err == "", "no progress bar where there is no terminal"
    assert "</html>" in (iris.mle.parent / "iris.html").read_text()


def test_an_exported_program_needs_nothing_more(mlec: Run, tmp_path: Path) -> None:
    import torch

    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(5, 4)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)), tmp_path / "net.pt")
    done = mlec("compile", tmp_path / "net.pt", "-o", tmp_path / "out.mle", "--passes", "O3", "--json")
    assert done.code == 0, done.err
    written = done.document()
    assert written["path"] == str(tmp_path / "out.mle")
    assert written["size_bytes"] == (tmp_path / "out.mle").stat().st_size
    assert written["report"]["parity"]["methods"]["run"]["excess"] <= 1
    np.save(tmp_path / "x.npy", np.vstack([x.numpy()] * 2))
    assert mlec("run", tmp_path / "out.mle", tmp_path / "x.npy", "-o", tmp_path / "y.npy").code == 0
    y = np.load(tmp_path / "y.npy")
    np.testing.assert_allclose(y[:5], network(x).detach().numpy(), rtol=1e-4, atol=1e-6)
    assert y.shape == (10, 3)


def test_a_module_with_given_shapes(mlec: Run, tmp_path: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(4, 2), tmp_path / "module.pt")
    mlec("compile", tmp_path / "module.pt").error("E_UNTRUSTED_PICKLE")
    done = mlec("compile", tmp_path / "module.pt", "--trust-pickle", "--input-shape", "input=n,4", "--json")
    assert done.code == 0, done.err
    assert mlec("inspect", tmp_path / "module.mle", "--json").document()["metadata"]["signature"]["inputs"][0][
        "shape"
    ] == ["n", 4]


NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 3)
        self.b = torch.nn.Linear(2, 3)

    def forward(self, x, y):
        return torch.relu(self.a(x) + self.b(y)), self.a(x)
"""


def test_a_state_dict_with_its_class_and_examples(mlec: Run, tmp_path: Path) -> None:
    import torch

    (tmp_path / "own_networks.py").write_text(NETWORK)
    weights = {
        "a.weight": torch.ones(3, 4),
        "a.bias": torch.zeros(3),
        "b.weight": torch.ones(3, 2),
        "b.bias": torch.zeros(3),
    }
    torch.save(weights, tmp_path / "net.pt")
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32), y=np.ones((2, 2), np.float32))
    assert "--model-class" in mlec("compile", "net.pt", cwd=tmp_path).error("E_UNTRUSTED_PICKLE")
    source = ("--model-class", "own_networks:Net")
    needed = mlec("compile", "net.pt", *source, cwd=tmp_path).error("E_EXAMPLE_NEEDED")
    assert "--example" in needed
    assert "--input-shape x=n,3,224,224" in needed
    done = mlec("compile", "net.pt", *source, "--example", "x.npz", cwd=tmp_path)
    assert done.code == 0, done.err
    outputs = mlec("run", "net.mle", "x.npz", "--json", cwd=tmp_path).document()["outputs"]
    assert [out["data"] for out in outputs] == [[[6.0] * 3] * 2, [[4.0] * 3] * 2]
    done = mlec("verify", "net.mle", "--against", "net.pt", *source, "--inputs", "x.npz", cwd=tmp_path)
    assert done.code == 0, done.err
    assert re.search(r"run: (largest error .* of the bound; |0 of )\d+ rows", done.out)
    done = mlec("bench", "net.mle", "--against", "net.pt", *source, "--batch", "1,5", "--seconds", "0.05", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "speedup" in done.out


ESTIMATOR = """
import pickle
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

class Same(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X
"""

NESTED = """
import torch

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(4, 3)

    def forward(self, x, extra):
        return self.l(torch.where(extra["mask"], x, extra["w"]))
"""


def test_examples_of_a_module_that_takes_a_dict(mlec: Run, tmp_path: Path) -> None:
    import torch

    (tmp_path / "nested_network.py").write_text(NESTED)
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "linear.pt")
    torch.save({"l.weight": torch.ones(3, 4), "l.bias": torch.zeros(3)}, tmp_path / "two.pt")
    arrays = {
        "extra.w": np.ones((2, 4), np.float32),
        "extra.mask": np.zeros((2, 4), bool),
        "x": np.zeros((2, 4), np.float32),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    source = ("--model-class", "nested_network:Two", "--example", "x.npz")
    done = mlec("compile", "two.pt", *source, "--target", "numpy", cwd=tmp_path)
    assert done.code == 0, done.err
    outputs = mlec("run", "two.mle", "x.npz", "--json", cwd=tmp_path).document()["outputs"]
    assert outputs[0]["data"] == [[4.0] * 3] * 2
    unfit = mlec("compile", "linear.pt", *source, cwd=tmp_path).error("E_FILE")
    assert "that these weights were trained in" in unfit


def test_the_reference_as_target(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    done = mlec("compile", iris.pickle, "--trust-pickle", "--target", "numpy", "-o", tmp_path / "m.mle")
    assert done.code == 0, done.err
    assert "rows differ" in done.out or "of the bound" in done.out, "compared with its source"
    assert "kind=numpy" in mlec("inspect", tmp_path / "m.mle").out
    for model in (iris.mle, tmp_path / "m.mle"):
        assert mlec("run", model, iris.csv, "-o", tmp_path / f"{model.stem}.csv").code == 0
    assert (tmp_path / "m.csv").read_text().splitlines()[0] == (tmp_path / "iris.csv").read_text().splitlines()[0]
    assert "thread" in mlec("bench", tmp_path / "m.mle", "--batch", "2", "--seconds", "0.02").out
    assert mlec("report", tmp_path / "m.mle", "-o", tmp_path / "m.html").code == 0


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_lower_precisions_are_for_networks(mlec: Run, iris: Iris, tmp_path: Path, precision: str) -> None:
    done = mlec("compile", iris.pickle, "--trust-pickle", "-o", tmp_path / "m.mle", "--precision", precision)
    assert "is for networks, and this is a classifier" in done.error("E_NOT_OFFERED")
    assert listing(tmp_path) == []


def test_tuning_is_in_the_report_and_remembered(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    words = ("compile", iris.pickle, "--trust-pickle", "-o", tmp_path / "m.mle", "--tune", "1", "--report", report)
    runs = []
    for _ in range(2):
        done = mlec(*words, env={"XDG_STATE_HOME": str(tmp_path / "state")})
        assert done.code == 0, done.err
        runs.append(json.loads(report.read_text())["tuning"])
    first, second = runs
    assert first
    changed = sum(entry["chosen"] != entry["default"] for entry in second)
    assert f"{len(second)} distinct kernel" in done.out
    assert f"measured, {changed} with another schedule" in done.out
    assert [entry["remembered"] for entry in (*first, *second)] == [False] * len(first) + [True] * len(first)
    done = mlec("compile", iris.pickle, "--trust-pickle", "-o", tmp_path / "n.mle", "--tune", "2", "--target", "cuda")
    assert "leave tune at 0" in done.error("E_TARGET")
    assert listing(tmp_path) == ["m.mle", "r.json", "state"]


@pytest.mark.parametrize(
    "words",
    [
        ("compile",),
        ("compile", "m.pkl", "--nonsense"),
        ("compile", "m.pkl", "--input-shape", "3,4"),
        ("compile", "m.pkl", "--tune", "-1"),
        ("bench", "m.mle", "--batch", "1,many"),
        ("bench", "m.mle", "--batch", "0"),
        ("verify", "m.mle", "--inputs", "x.npy"),
        ("nonsense",),
    ],
)  # fmt: skip
def test_wrong_usage_exits_2(mlec: Run, words: tuple[str, ...]) -> None:
    done = mlec(*words)
    assert done.code == 2
    assert "Usage: mlec" in done.err or "Error: " in done.err
    assert "Traceback" not in done.err


def test_the_output_must_not_be_the_model(mlec: Run, iris: Iris) -> None:
    done = mlec("compile", iris.pickle, "-o", iris.pickle, "--trust-pickle")
    assert done.code == 2
    assert "the model itself" in done.err
    assert pickle.loads(iris.pickle.read_bytes()) is not None


def test_missing_directory_is_found_before_the_work(mlec: Run, tmp_path: Path) -> None:
    # There is no model either: what is wrong with the output comes first.
    mlec("compile", "absent.pkl", "-o", tmp_path / "no" / "m.mle").error("E_WRITE_NO_DIRECTORY")
    mlec("compile", "absent.pkl", "-o", tmp_path).error("E_WRITE_DIRECTORY")
    done = mlec("compile", "absent.pkl", "-o", tmp_path / "m.mle", "--report", tmp_path / "report.pdf")
    assert ".html" in done.error("E_USAGE")


def without_privilege() -> None:
    """Takes from root the right to write where the mode of a directory forbids it."""
    drop_from_bounding_set, override = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(drop_from_bounding_set, override, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")


def test_read_only_directory(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    for words in (
        ("compile", "absent.pkl", "-o", folder / "m.mle"), ("compile", "absent.pkl", "-o", "m.mle", "--report", folder / "r.html"),
        ("run", iris.mle, iris.csv, "-o", folder / "p.csv"), ("report", iris.mle, "-o", folder / "r.html"),
        ("demo", "-o", folder),
    ):  # fmt: skip
        assert str(folder) in mlec(*words, preexec_fn=without_privilege).error("E_WRITE_PERMISSION")
    assert listing(folder) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no directory in which the system makes the files")
def test_a_directory_that_takes_no_files(mlec: Run) -> None:
    mlec("compile", "absent.pkl", "-o", "/proc/m.mle").error("E_WRITE_PERMISSION")
    mlec("compile", "absent.pkl", "-o", "/proc/no/m.mle").error("E_WRITE_NO_DIRECTORY")


def limited(size: int) -> Callable[[], None]:
    """A disk on which no file can grow beyond some bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    (tmp_path / "m.mle").write_bytes(b"before")
    (tmp_path / "p.csv").write_bytes(b"before")
    done = mlec("compile", iris.pickle, "--trust-pickle", "-o", tmp_path / "m.mle", preexec_fn=limited(20_000))
    assert "temporary files" in done.error("E_TEMPORARY_SPACE")
    mlec("run", iris.mle, iris.csv, "-o", tmp_path / "p.csv", preexec_fn=limited(1_000)).error("E_WRITE_TOO_LARGE")
    assert listing(tmp_path) == ["m.mle", "p.csv"]
    assert (tmp_path / "m.mle").read_bytes() == (tmp_path / "p.csv").read_bytes() == b"before"


class Call:
    """What stands for it in a pickle is a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def slow_pickle(marker: Path) -> bytes:
    """Its reading makes a file, and then takes its time."""
    return pickle.dumps(("sklearn", Call(Path.touch, marker), Call(time.sleep, 60)))


def test_a_pickle_is_not_read_without_permission(mlec: Run, tmp_path: Path) -> None:
    (tmp_path / "slow.pkl").write_bytes(slow_pickle(tmp_path / "marker"))
    error = mlec("compile", tmp_path / "slow.pkl").error("E_UNTRUSTED_PICKLE")
    assert "--trust-pickle" in error
    assert listing(tmp_path) == ["slow.pkl"]


def interrupted(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out.decode()


def test_interrupt_while_reading(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "slow.pkl").write_bytes(slow_pickle(tmp_path / "marker"))
    command = [sys.executable, "-m", "mlec", "compile", "slow.pkl", "--trust-pickle"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while not (tmp_path / "marker").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    code, text = interrupted(process)
    assert code == 130
    assert text.strip() == "interrupted: nothing half-written is left behind"
    assert listing(tmp_path) == ["marker", "slow.pkl"]


def test_interrupt_while_generating_and_the_bar_on_a_terminal(
    iris: Iris, tmp_path: Path, environment: dict[str, str]
) -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "mlec", "compile", str(iris.pickle), "--trust-pickle", "-o", "m.mle"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**environment, "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=side,
    )
    os.close(side)
    shown = b""
    while b"generate" not in shown and b"lower" not in shown and b"build" not in shown:
        shown += os.read(terminal, 4096)
    code, out = interrupted(process)
    assert code == 130
    assert out == ""
    assert listing(tmp_path) == []
    os.close(terminal)


def fails(mlec: Run, path: Path, code: str) -> str:
    done: Done = mlec("compile", path, "--trust-pickle")
    assert not path.with_suffix(".mle").exists()
    return done.error(code)


def test_what_is_no_model(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("not a model\n")
    (tmp_path / "empty.pkl").write_bytes(b"")
    shutil.copy(iris.mle, tmp_path / "renamed.onnx")
    (tmp_path / "cut.pt2").write_bytes(b"PK\3\4" + bytes(2000))
    assert "cut off" in fails(mlec, tmp_path / "cut.pt2", "E_MODEL_FILE")
    fails(mlec, tmp_path / "absent.pkl", "E_MODEL_FILE")
    assert "not a model file" in fails(mlec, tmp_path / "text.txt", "E_MODEL_FILE")
    fails(mlec, tmp_path / "empty.pkl", "E_MODEL_FILE")
    assert "mlec run" in fails(mlec, tmp_path / "renamed.onnx", "E_MODEL_FILE")


def test_a_module_whose_class_was_defined_in_a_script(mlec: Run, tmp_path: Path) -> None:
    script = f"{NETWORK}\n{ESTIMATOR}\nif __name__ == '__main__':\n    torch.save(Net(), 'net.pt')\n"
    script += "    pickle.dump(make_pipeline(Same(), Ridge()).fit([[0.0], [1.0]], [0.0, 1.0]), open('own.pkl', 'wb'))\n"
    (tmp_path / "own_script.py").write_text(script)
    subprocess.run([sys.executable, "own_script.py"], cwd=tmp_path, check=True)
    error = mlec("compile", "net.pt", "--trust-pickle", cwd=tmp_path).error("E_FILE")
    for way in ("in a module of its own", "PYTHONPATH", "--model-class", "torch.export.save"):
        assert way in error
    assert "in a module of its own" in mlec("compile", "own.pkl", "--trust-pickle", cwd=tmp_path).error("E_FRONTEND")


def test_why_nothing_was_compared(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "m.mle")
    (tmp_path / "g.mlet").write_text("graph @g(%x: f32[n]) -> (f32[n]) {\n  %y = exp(%x) : f32[n]\n  return %y\n}\n")
    for words, why in (
        ((iris.pickle, "--trust-pickle", "--no-validate"), "as --no-validate says"),
        ((tmp_path / "g.mlet",), "a graph has no library"),
    ):
        assert f"not compared with the source: {why}" in mlec("compile", *words, "--target", "numpy", *out).out


def test_what_cannot_be_compiled(mlec: Run, tmp_path: Path) -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.linear_model import Ridge

    (tmp_path / "unfitted.pkl").write_bytes(pickle.dumps(Ridge()))
    process = GaussianProcessRegressor().fit([[0.0], [1.0]], [0.0, 1.0])
    (tmp_path / "process.pkl").write_bytes(pickle.dumps(process))
    assert "Ridge" in fails(mlec, tmp_path / "unfitted.pkl", "E_NOT_FITTED")
    assert "GaussianProcessRegressor" in fails(mlec, tmp_path / "process.pkl", "E_UNSUPPORTED_MODEL")


def test_an_error_as_json(mlec: Run, tmp_path: Path) -> None:
    done = mlec("compile", tmp_path / "absent.pkl", "--json")
    assert done.code == 1
    assert done.document()["code"] == "E_MODEL_FILE"
    assert done.err == ""
    done = mlec("compile", "--json")
    assert done.code == 2
    assert done.document()["code"] == "E_USAGE"


def test_debug_shows_the_traceback(mlec: Run, tmp_path: Path) -> None:
    done = mlec("compile", tmp_path / "absent.pkl", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err

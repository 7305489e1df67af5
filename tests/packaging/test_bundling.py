"""Models in directories that run without mlec and the compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

import mlec
from mlec.errors import SecurityError, UsageError, WriteError
from mlec.packaging import bundled_model

BARE = ("numpy", "numpy.libs", "tvm_ffi", "typing_extensions.py")
"""What is installed where a directory goes: numpy, tvm-ffi, and what that requires."""


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, table: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("bundling") / "churn.mle"
    forest = RandomForestClassifier(5, random_state=0).fit(table, table[:, 0] > 0)
    mlec.compile(forest, table[:5], validate=False).save(path)
    return path


@pytest.fixture(scope="module")
def directory(file: Path) -> Path:
    return Path(mlec.bundle(file, file.parent / "churn").path)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has nothing but `BARE`, metadata included."""
    site = tmp_path_factory.mktemp("site")
    for name in BARE:
        found = importlib.util.find_spec(name.removesuffix(".py").partition(".")[0])
        assert found is not None
        assert found.origin is not None
        packages = Path(found.origin).parent if name.endswith(".py") else Path(found.origin).parents[1]
        if (packages / name).exists():
            (site / name).symlink_to(packages / name)
        for metadata in packages.glob("apache_tvm_ffi-*.dist-info"):
            if not (site / metadata.name).exists():
                (site / metadata.name).symlink_to(metadata)
    return site


def run(bare: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python without the packages of this environment, and without anything that this user trusts."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(bare), "XDG_STATE_HOME": str(bare)}
    environment |= {name: os.environ[name] for name in ("PYTHONDONTWRITEBYTECODE",) if name in os.environ}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(bare), *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_it_runs_where_only_numpy_and_tvm_ffi_are_installed(
    directory: Path, file: Path, bare: Path, table: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "X.npy", table)
    done = run(bare, str(directory / "model.py"), "X.npy", "-o", "Y.npz", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with np.load(tmp_path / "Y.npz") as found:
        for i, expected in enumerate(mlec.load(file).run([table])):
            np.testing.assert_array_equal(found[f"output_{i}"], expected)
    np.savez(tmp_path / "X.npz", X=table)
    done = run(bare, str(directory / "model.py"), "X.npy", "--method", "predict_proba", cwd=tmp_path)
    assert done.stdout.strip() == str(mlec.load(file).predict_proba(table))


def test_as_a_module(directory: Path, bare: Path, tmp_path: Path) -> None:
    script = tmp_path / "use.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(directory)!r})\nimport model\nm = model.load(num_threads=1)\n"
        "import numpy as np\nprint(m.predict(np.zeros((1, 5), np.float32)), sorted({'tvm', 'torch', 'sklearn'} & set(sys.modules)))\n"
        "print(m.graph is not None, m.report is not None, m.metadata != {})\n"
    )
    done = run(bare, str(script), cwd=tmp_path)
    assert done.stdout.endswith("[]\nTrue True True\n"), done.stderr


def test_errors_there_are_clear(directory: Path, bare: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((2, 9)))
    (tmp_path / "text.npy").write_text("nonsense")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 no more")
    cases = (("wide.npy", "5"), ("text.npy", "error"), ("cut.npz", "not a zip file"), ("none.npy", "No such file"))
    for name, message in cases:
        done = run(bare, str(directory / "model.py"), name, cwd=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert message in done.stderr


def test_a_changed_model_does_not_load(file: Path, table: np.ndarray, bare: Path, tmp_path: Path) -> None:
    directory = Path(mlec.bundle(file, tmp_path / "b").path)
    other = RandomForestClassifier(3, random_state=1).fit(table, table[:, 1] > 0)
    mlec.compile(other, table[:5], validate=False).save(directory / "model.mle")
    np.save(tmp_path / "X.npy", table)
    done = run(bare, str(directory / "model.py"), "X.npy", cwd=tmp_path)
    assert done.returncode == 1
    assert "not the one you trust" in done.stderr


def test_another_python_is_named(file: Path, bare: Path, tmp_path: Path) -> None:
    directory = Path(mlec.bundle(file, tmp_path / "b").path)
    facts = json.loads((directory / "bundle.json").read_text())
    facts["made_for"][1] = "3.99"
    (directory / "bundle.json").write_text(json.dumps(facts))
    done = run(bare, str(directory / "model.py"), "X.npy", cwd=tmp_path)
    assert done.returncode == 1
    assert "made for cpython 3.99" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("facts", [None, "[", "{}", "[1]", '{"made_for": 1}'])
def test_a_directory_that_is_not_whole(facts: str | None, bare: Path, tmp_path: Path) -> None:
    shutil.copy(bundled_model.__file__, tmp_path / "model.py")
    if facts is not None:
        (tmp_path / "bundle.json").write_text(facts)
    done = run(bare, str(tmp_path / "model.py"), "X.npy", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'bundle.json'} cannot be read: ")
    assert "Traceback" not in done.stderr


def test_a_command_that_is_ended_leaves_nothing(file: Path, tmp_path: Path) -> None:
    script = (
        "import shutil, sys, time\n"
        "shutil.copytree = lambda *a, **k: (print('copying', flush=True), time.sleep(60))\n"
        "from mlec.cli import main\nsys.exit(main())\n"
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", script, "bundle", str(file), "-o", str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, preexec_fn=partial(signal.signal, number, signal.SIG_DFL),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "copying\n"
        process.send_signal(number)
        _, text = process.communicate(timeout=60)
        assert (process.returncode, text.strip()) == (code, "interrupted: nothing half-written is left behind")
        assert not list(tmp_path.iterdir())


def test_what_cannot_be_bundled(file: Path, table: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match="exists already"):
        mlec.bundle(file, tmp_path)
    interpreted = tmp_path / "slow.mle"
    forest = RandomForestClassifier(2, random_state=0).fit(table, table[:, 0] > 0)
    mlec.compile(forest, table[:5], target="numpy", validate=False).save(interpreted)
    with pytest.raises(UsageError, match="no machine code"):
        mlec.bundle(interpreted, tmp_path / "out")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
    with pytest.raises(SecurityError, match="not trusted here"):
        mlec.bundle(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["slow.mle"]


def test_a_full_disk_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(WriteError, match="No space left"):
        mlec.bundle(file, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_to_do_there(file: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from mlec.cli.bundling import bundle_command

    done = CliRunner().invoke(bundle_command, [str(file), "-o", str(tmp_path / "b"), "--json"])
    found = json.loads(done.output)
    assert {line.partition("==")[0] for line in found["requirements"]} == {"numpy", "apache-tvm-ffi"}
    assert found["size_bytes"] < 60e6

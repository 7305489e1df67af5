"""Nonsense in every place of the command line: always a clear error, never a traceback, and no file lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlec.cli import main
from tests.cli.conftest import Iris, Run

GRAPH = "graph @g(%x: f32[n, 2]) -> (f32[n, 2]) {\n  %y = exp(%x) : f32[n, 2]\n  return %y\n}\n"


@pytest.fixture(scope="module")
def folder(iris: Iris, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many kinds, and what is no file; as a root without a name for missing ones."""
    made = tmp_path_factory.mktemp("nonsense")
    (made / "g.mlet").write_text(GRAPH)
    (made / "empty").write_bytes(b"")
    (made / "text.csv").write_text("a,b\n1,x\n")
    (made / "dir").mkdir()
    os.mkfifo(made / "fifo")
    for name, target in (("loop", "loop"), ("dangling", "nowhere"), ("m.mle", iris.mle), ("m.pkl", iris.pickle)):
        (made / name).symlink_to(target)
    np.save(made / "x.npy", iris.table.to_numpy())
    for name, shape in (("none.npy", (0, 4)), ("deep.npy", (1, 2, 2, 2)), ("one.npy", ())):
        np.save(made / name, np.zeros(shape))
    np.save(made / "records.npy", np.zeros(3, [("a", "f4"), ("b", "i4")]))
    heads = {
        "sparse.txt": b"tree\nversion=v4\n",
        "sparse.pt2": b"PK\3\4",
        "sparse.mle": b"MLE\0\1\0\0\0",
        "sparse.csv": b"a,b\n1,2\n",
    }
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000, 4), }"
    for name, head in {**heads, "sparse.npy": b"\x93NUMPY\1\0v\0" + header.ljust(118)}.items():
        with (made / name).open("wb") as file:
            file.write(head)
            file.truncate(1 << 42)
    return made


FILES = (
    "absent", "empty", "dir", "fifo", "loop", "dangling", "g.mlet", "x.npy", "text.csv", "none.npy", "deep.npy", "one.npy", "records.npy",
    "sparse.txt", "sparse.pt2", "sparse.mle", "sparse.csv", "sparse.npy", "m.pkl", "/dev/zero", "/dev/null",
    "/proc/self/mem", "", ".", "..", "/", "n" * 300, "m.mle/x", "\udcff.mle",
)  # fmt: skip
READERS = (
    ("inspect",),
    ("report",),
    ("verify",),
    ("opt",),
    ("compile", "-o", "o.mle", "--target", "numpy"),
    ("sign", "--key", "no.key"),
    ("bundle", "-o", "b"),
    ("recover", "-o", "r"),
    ("trust", "add"),
    ("run", "m.mle"),
    ("sign", "m.mle", "-o", "s.mle", "--key"),
    ("inspect", "m.mle", "--key-file"),
    ("verify", "m.mle", "--against"),
    ("compile", "g.mlet", "--target", "numpy", "-o", "c.mle", "--calibration"),
    ("compile", "m.pkl", "--trust-pickle", "--target", "numpy", "-o", "e.mle", "--example"),
    ("compile", "g.mlet", "-o", "f.mle", "--sign"),
    ("compile", "g.mlet", "-o", "f.mle", "--encrypt-key-file"),
    ("bench", "m.mle", "--batch", "1", "--against"),
)
UNWRITABLE = ("fifo", "loop", "/proc/self/mem", "n" * 300, "m.mle/x")
WRITERS = (
    ("run", "m.mle", "x.npy", "-o"),
    ("report", "m.mle", "-o"),
    ("compile", "g.mlet", "--target", "numpy", "-o"),
    ("keygen",),
    ("keygen", "--encryption"),
    ("compile", "g.mlet", "--target", "numpy", "-o", "w.mle", "--report"),
    ("bundle", "m.mle", "-o"),
    ("recover", "m.mle", "-o"),
    ("opt", "g.mlet", "--dump"),
)


def ended(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> int:
    """How a command ends, and that it says what is wrong where something is."""
    code = main([*words])
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert code in (0, 1, 2), words
    assert "E_DEFECT" not in said, (words, said)
    assert "E_SYSTEM" not in said, (words, said)
    assert "Traceback" not in said, (words, said)
    if code:
        assert said.strip(), words
    return code


@pytest.fixture
def own_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs there, with a keyring and caches of its own."""
    monkeypatch.chdir(folder)
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.parametrize("words", READERS, ids=lambda words: " ".join(words)[:40])
@pytest.mark.usefixtures("own_place")
def test_whatever_is_read(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for file in FILES:
        ended((*words, file), capsys)


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: " ".join(words)[:40])
@pytest.mark.usefixtures("own_place")
def test_wherever_is_written(folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.stat().st_size < 1 << 30}
    for file in (*UNWRITABLE, "empty", "dir", "/dev/zero", "/proc/x", "", ".", "..", "/", "no/x/y"):
        code = ended((*words, file), capsys)
        if (
            words[0] not in ("keygen", "opt") and file in UNWRITABLE
        ):  # the names of keys get an ending; a dump may be empty
            assert code, (words, file)
    kept = {path: path.read_bytes() for path in before if path.name != "empty"}
    assert kept == {path: data for path, data in before.items() if path.name != "empty"}


OPTIONS = (
    "run m.mle x.npy --threads 99999999999999999999999",
    "run m.mle x.npy --threads -1",
    "run m.mle x.npy --threads 1e3",
    "run m.mle x.npy --method \udcff",
    "run m.mle x.npy --trust sha256:",
    "run m.mle x.npy -o y.",
    "run x.npy m.mle",
    "run m.mle",
    "bench m.mle --batch ²",
    "bench m.mle --batch ,",
    "bench m.mle --batch -1",
    "bench m.mle --batch 0 --seconds 0.01",
    "bench m.mle --seconds 1e999",
    "compile g.mlet --target cpu:",
    "compile g.mlet --target :",
    "compile g.mlet --target cpu:,,",
    "compile g.mlet --target {}",
    "compile g.mlet --target numpy:x",
    "compile g.mlet --precision fp7",
    "compile g.mlet --input-shape x=²",
    "compile g.mlet --input-shape x=n,-3",
    f"compile g.mlet --input-shape x={'9' * 5000}",
    "compile g.mlet --input-shape =",
    "compile g.mlet --passes ,,,",
    "compile g.mlet --passes O9",
    f"compile g.mlet --passes {'(' * 5000}",
    f"opt g.mlet --passes vectorize{{{'9' * 5000}",
    "compile g.mlet --tune x",
    "compile g.mlet --input-range x",
    "compile g.mlet --input-range x=1,0 --target numpy -o q.mle",
    "compile g.mlet --report r.xyz",
    "compile g.mlet --input-range x=nan,nan --target numpy -o q.mle",
    "compile g.mlet --compress gzip",
    "compile m.pkl --trust-pickle=x",
    "compile m.pkl --model-class a.b:c --trust-pickle --target numpy -o q.mle",
    "trust remove x --revoke",
    "trust nosuch",
    "keygen k2 --label \n",
    "ops x",
    "frontends x",
    "passes x",
    "help",
    "--nope",
    "\udcff",
    "inspect m.mle --key-file dir",
    "opt g.mlet --dump m.mle",
    "opt g.mlet --verify x",
)


@pytest.mark.usefixtures("own_place")
def test_values_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    for line in OPTIONS:
        ended(tuple(line.split(" ")), capsys)


def test_no_output_is_an_input(iris: Iris, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", iris.table.to_numpy())
    (tmp_path / "m.pkl").write_bytes(iris.pickle.read_bytes())
    os.link(tmp_path / "x.npy", tmp_path / "linked.npy")
    (tmp_path / "r.html").symlink_to("m.pkl")
    x, pickled = str(tmp_path / "x.npy"), str(tmp_path / "m.pkl")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for words, what in (
        (("compile", pickled, "--trust-pickle", "--example", x, "-o", x), "the --example"),
        (("compile", pickled, "--trust-pickle", "--report", str(tmp_path / "r.html")), "the model itself"),
        (("compile", pickled, "-o", str(tmp_path / "a.html"), "--report", f"{tmp_path}/./a.html"), "two outputs"),
        (("run", str(iris.mle), x, "-o", str(tmp_path / "linked.npy"), "--method", "predict"), "the input itself"),
    ):
        assert main([*words, "--json"]) == 2
        assert what in json.loads(capsys.readouterr().out)["message"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_are_no_text(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    source, made, report = (os.fsdecode(bytes(tmp_path) + name) for name in (b"/\xff.pkl", b"/\xff.mle", b"/\xff.html"))
    Path(source).write_bytes(iris.pickle.read_bytes())
    done = mlec("compile", source, "--trust-pickle", "--target", "numpy", "--report", report)
    assert done.code == 0, done.err
    assert sorted(os.listdir(bytes(tmp_path))) == [b"\xff.html", b"\xff.mle", b"\xff.pkl"]
    assert "?" in mlec("inspect", made).out
    done = mlec("verify", made, "--against", source, "--trust-pickle")
    assert done.code == 0, done.err


def test_a_digest_or_a_permission_or_neither(iris: Iris, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    digest = "sha256:" + hashlib.sha256(iris.pickle.read_bytes()).hexdigest()
    rest = ("--target", "numpy", "--no-validate", "-o", str(tmp_path / "m.mle"))
    for words, code in (
        (("compile", "--trust-pickle", str(iris.pickle), *rest), 0),
        (("compile", str(iris.pickle), "--trust-pickle", digest, *rest), 0),
        (("compile", str(iris.pickle), *rest, f"--trust-pickle={digest.upper().replace('SHA256', 'sha256')}"), 0),
        (("compile", str(iris.pickle), "--trust-pickle", "sha256:" + "0" * 64, *rest), 1),
        (("compile", str(iris.pickle), "--trust-pickle", "sha256:12", *rest), 2),
        (("compile", *rest, "--trust-pickle", "--", str(iris.pickle)), 0),
        (("compile", *rest, "--", "--trust-pickle"), 1),
    ):
        assert main([*words]) == code, words
        printed = capsys.readouterr()
        if code == 1 and digest not in printed.err:
            assert "E_MODEL_FILE" in printed.err
    main(["compile", str(iris.pickle), *rest])
    assert f"--trust-pickle {digest}" in capsys.readouterr().err


def test_where_nothing_can_be_kept_or_written(iris: Iris, environment: dict[str, str], tmp_path: Path) -> None:
    bare = {name: value for name, value in environment.items() if not name.startswith("XDG_") and name != "HOME"}
    for extra in (
        {},
        {"HOME": "/proc"},
        {"HOME": "."},
        {f"XDG_{name}_HOME": "/dev/null" for name in ("STATE", "CONFIG", "CACHE")},
    ):
        done = subprocess.run(
            [sys.executable, "-m", "mlec", "inspect", str(iris.mle), "--json"],
            env={**bare, **extra},
            cwd=tmp_path,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    for way, code in ((">&- 2>&- <&-", 0), ("--nope >&- 2>&-", 2), ("2> /dev/full > /dev/full", 1)):
        line = f"exec {sys.executable} -m mlec inspect {iris.mle} {way}"
        assert subprocess.run(["bash", "-c", line], env=environment, check=False).returncode == code, way

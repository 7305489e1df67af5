"""mlec run, verify, bench: inputs and outputs of every kind, and files that must not be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import StandardScaler

from mlec import compile, lower
from tests.cli.conftest import Iris, Run


@pytest.fixture(scope="module")
def labels(iris: Iris) -> list[str]:
    found: list[str] = iris.source.predict(iris.table).tolist()
    return found


def test_run_prints_the_results(mlec: Run, iris: Iris) -> None:
    done = mlec("run", iris.mle, iris.csv)
    assert done.code == 0, done.err
    assert done.out.startswith("predict  ")
    assert "setosa" in done.out
    assert "predict_proba  float64[150, 3]" in done.out


def test_run_as_json(mlec: Run, iris: Iris, labels: list[str], tmp_path: Path) -> None:
    iris.table.to_parquet(tmp_path / "x.parquet")
    first, second = mlec("run", iris.mle, tmp_path / "x.parquet", "--json").document()["outputs"]
    assert (first["name"], first["data"]) == ("predict", labels)
    assert second["shape"] == [150, 3]
    np.testing.assert_allclose(second["data"], iris.source.predict_proba(iris.table), rtol=1e-9)


def test_every_kind_of_input_and_output(mlec: Run, iris: Iris, labels: list[str], tmp_path: Path) -> None:
    rows = iris.table.to_numpy()
    np.save(tmp_path / "x.npy", rows)
    np.savez(tmp_path / "unnamed.npz", rows)
    np.savez(tmp_path / "columns.npz", **{name: column.to_numpy() for name, column in iris.table.items()})
    np.savetxt(tmp_path / "no-header.csv", rows, delimiter=",")
    inputs_and_outputs = {
        "x.npy": "p.csv",
        "unnamed.npz": "p.json",
        "columns.npz": "p.npz",
        "no-header.csv": "labels.npy",
    }
    for inputs, output in inputs_and_outputs.items():
        method = ("--method", "predict") if output == "labels.npy" else ()
        done = mlec("run", iris.mle, tmp_path / inputs, "-o", tmp_path / output, *method)
        assert (done.code, done.out) == (0, ""), (inputs, done.err)
    wanted = iris.source.predict_proba(iris.table)
    table = pd.read_csv(tmp_path / "p.csv")
    assert table.columns.tolist() == ["predict", "predict_proba_0", "predict_proba_1", "predict_proba_2"]
    assert table["predict"].tolist() == labels
    np.testing.assert_allclose(table.iloc[:, 1:], wanted, rtol=1e-9)
    assert json.loads((tmp_path / "p.json").read_text())["predict"] == labels
    with np.load(tmp_path / "p.npz") as arrays:
        np.testing.assert_allclose(arrays["predict_proba"], wanted, rtol=1e-9)
        assert arrays["predict"].tolist() == labels
    assert np.load(tmp_path / "labels.npy").tolist() == labels


def test_inputs_that_do_not_fit(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros((3, 2)))
    iris.table.rename(columns={"petal_w": "petal_width"}).to_csv(tmp_path / "renamed.csv", index=False)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY garbage")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 garbage")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "x.txt").write_text("1 2")
    done = mlec("run", iris.mle, tmp_path / "narrow.npy")
    assert done.code == 1
    assert "error[E_INPUT" in done.err
    assert "4" in done.err
    done = mlec("run", iris.mle, tmp_path / "renamed.csv")
    assert done.code == 1
    assert "petal_w" in done.err
    assert "Traceback" not in done.err
    for name in ("absent.npy", "objects.npy", "broken.npy", "broken.parquet", "empty.csv", "x.txt"):
        mlec("run", iris.mle, tmp_path / name).error("E_INPUT_FILE")


def test_outputs_that_cannot_be_written(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    mlec("run", iris.mle, iris.csv, "-o", tmp_path / "p.npy").error("E_USAGE")  # two arrays
    mlec("run", iris.mle, iris.csv, "-o", tmp_path / "p.xlsx").error("E_USAGE")
    mlec("run", iris.mle, iris.csv, "-o", tmp_path / "no" / "p.csv").error("E_WRITE_NO_DIRECTORY")
    assert list(tmp_path.iterdir()) == []


def test_no_such_method(mlec: Run, iris: Iris) -> None:
    done = mlec("run", iris.mle, iris.csv, "--method", "transform")
    assert done.code == 1
    assert "error[E_NO_METHOD]" in done.err
    assert "predict_proba" in done.err


def test_run_imports_no_framework(iris: Iris, environment: dict[str, str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", iris.table.to_numpy())
    code = f"""
import sys
from mlec.cli import main
assert main(["run", {str(iris.mle)!r}, {str(tmp_path / "x.npy")!r}, "-o", {str(tmp_path / "p.csv")!r}]) == 0
assert not {{"torch", "sklearn", "xgboost", "lightgbm", "tvm", "pandas"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    "command", [("run", "x.npy"), ("inspect",), ("verify",), ("bench",), ("report",)], ids=lambda c: c[0]
)
def test_what_is_no_mle_file(mlec: Run, iris: Iris, tmp_path: Path, command: tuple[str, ...]) -> None:
    np.save(tmp_path / "x.npy", iris.table.to_numpy())
    whole = iris.mle.read_bytes()
    (tmp_path / "truncated.mle").write_bytes(whole[: len(whole) // 2])
    done = mlec(command[0], tmp_path / "truncated.mle", *command[1:], cwd=tmp_path)
    assert done.code == 1
    assert "truncated.mle" in done.err
    assert "hint: " in done.err
    assert "Traceback" not in done.err
    mlec(command[0], tmp_path / "absent.mle", *command[1:], cwd=tmp_path).error("E_OPEN")


def test_a_foreign_or_damaged_file(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    damaged = bytearray(iris.mle.read_bytes())
    sections = mlec("inspect", iris.mle, "--json").document()["sections"]
    kernels, weights = sections["kernels"], sections["weights"]
    damaged[kernels["offset"] + kernels["size"] // 2] ^= 1
    (tmp_path / "damaged.mle").write_bytes(damaged)
    done = mlec("verify", tmp_path / "damaged.mle", "--full")
    assert done.code == 1
    assert "intact" in done.err
    damaged = bytearray(iris.mle.read_bytes())
    damaged[sections["kernels"]["offset"] - 1] ^= 1
    (tmp_path / "damaged.mle").write_bytes(damaged)
    assert "mlec recover" in mlec("verify", tmp_path / "damaged.mle").error("E_PADDING")
    damaged = bytearray(iris.mle.read_bytes())
    damaged[weights["offset"] + 2] ^= 1
    (tmp_path / "damaged.mle").write_bytes(damaged)
    assert "weights" in mlec("verify", tmp_path / "damaged.mle").error("E_CRC_WEIGHTS"), "without --full"
    assert "pickle" in mlec("run", iris.pickle, iris.csv).err


def test_verify(mlec: Run, iris: Iris) -> None:
    done = mlec("verify", iris.mle, "--full")
    assert done.code == 0, done.err
    assert "every byte checked" in done.out
    assert "built by this user on this machine" in done.out
    assert "as recorded" in done.out
    against = mlec(
        "verify", iris.mle, "--against", iris.pickle, "--trust-pickle", "--inputs", iris.csv, "--json"
    ).document()
    assert against["signature"] == "none"
    assert against["parity"]["methods"]["predict"]["label_mismatches"] == 0


def test_verify_says_what_it_did_not_check(
    iris: Iris, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlec.cli import main, running

    for limit, words, checked in ((10**9, (), True), (1, (), False), (1, ("--full",), True)):
        monkeypatch.setattr(running, "CHECKED_BYTES", limit)
        assert main(["verify", str(iris.mle), "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["weights_checked"] is checked
        assert main(["verify", str(iris.mle), *words]) == 0
        assert ("WEIGHTS NOT CHECKED: --full checks them" in capsys.readouterr().out) is not checked


def test_verify_against_another_model(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    import pickle

    from sklearn.linear_model import LogisticRegression

    other = LogisticRegression(max_iter=1000).fit(iris.table, np.roll(iris.source.predict(iris.table), 50))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(other))
    done = mlec("verify", iris.mle, "--against", tmp_path / "other.pkl", "--trust-pickle")
    assert done.code == 1
    assert "error[E_PARITY]" in done.err
    assert "compile it again" in done.err


def test_verify_says_first_how_the_models_differ(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    import pickle

    from sklearn.linear_model import LogisticRegression

    other = LogisticRegression(max_iter=1000).fit(iris.table.iloc[:, :3], iris.source.predict(iris.table))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(other))
    done = mlec("verify", iris.mle, "--against", tmp_path / "other.pkl", "--trust-pickle")
    assert "it takes 3 features, the compiled model 4" in done.error("E_SOURCE_FAILS")
    assert "--no-validate" not in done.err


def test_verify_against_a_model_that_answers_to_nothing_of_it(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(4, 3), tmp_path / "other.pt")
    done = mlec("verify", iris.mle, "--against", tmp_path / "other.pt", "--trust-pickle")
    assert "it has the methods run, the compiled model" in done.error("E_SOURCE_FAILS")
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    done = mlec("verify", iris.mle, "--against", iris.pickle, "--trust-pickle", "--inputs", tmp_path / "x.npy")
    assert "the model expects 4 features" in done.error("E_INPUT_SHAPE")  # and nothing of the source


def test_kernels_of_others_do_not_run_unasked(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    """Another user's state: the file was not built there."""
    elsewhere = {"XDG_STATE_HOME": str(tmp_path)}
    code = mlec("inspect", iris.mle, "--json", env=elsewhere).document()
    assert "not built by this user" in code["trust"]
    done = mlec("run", iris.mle, iris.csv, "--method", "predict", env=elsewhere)
    assert done.code == 0, done.err
    assert "compiled on this machine instead" in done.err
    done = mlec("run", iris.mle, iris.csv, "--method", "predict", "--trust", f"sha256:{code['code_id']}", env=elsewhere)
    assert done.code == 0, done.err
    assert "instead" not in done.err
    mlec("run", iris.mle, iris.csv, "--trust", f"sha256:{'0' * 64}", env=elsewhere).error("E_TRUST_DIGEST")
    mlec("run", iris.mle, iris.csv, "--trust", "abc").error("E_USAGE_TRUST")


def test_bench(mlec: Run, iris: Iris) -> None:
    done = mlec("bench", iris.mle, "--batch", "1,16", "--seconds", "0.05", "--threads", "1")
    assert done.code == 0, done.err
    assert "1 threads" not in done.out
    found = mlec(
        "bench", iris.mle, "--batch", "3", "--seconds", "0.05", "--against", iris.pickle, "--trust-pickle", "--json"
    ).document()
    (batch,) = found["batches"]
    assert batch["rows"] == 3
    assert 0 < batch["compiled"]["p50"] <= batch["compiled"]["p99"]
    assert batch["source"]["num_runs"] >= 3
    assert batch["speedup"] == batch["source"]["min"] / batch["compiled"]["min"]
    assert isinstance(batch["disturbance"], str)


@pytest.mark.parametrize("name", ["close", "run", "__init__", "graph", "nope", ""])
def test_only_methods_of_the_source_can_be_named(mlec: Run, iris: Iris, name: str) -> None:
    error = mlec("run", iris.mle, iris.csv, "--method", name).error("E_NO_METHOD")
    assert "it has predict, predict_proba" in error


def test_output_that_cannot_be_written(iris: Iris, environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m mlec inspect {iris.mle} --graph"
    for way, code in (("> /dev/full", 1), (">&-", 0)):
        done = subprocess.run(["bash", "-c", f"{command} {way}"], env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert ("error[E_SYSTEM]: " in done.stderr) == (code == 1)


def test_a_directory_that_was_deleted(environment: dict[str, str], tmp_path: Path) -> None:
    command = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m mlec compile x.pt2"
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error[E_SYSTEM]: the current directory was deleted" in done.stderr


def test_a_transformer_that_returns_a_table(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    source = StandardScaler().set_output(transform="pandas").fit(iris.table)
    compile(source).save(tmp_path / "s.mle")
    document = mlec("run", tmp_path / "s.mle", iris.csv, "--method", "transform", "--json").document()
    np.testing.assert_allclose(document["outputs"][0]["data"], source.transform(iris.table), rtol=1e-9, atol=1e-12)


def test_bench_says_which_batches_there_are(mlec: Run, tmp_path: Path) -> None:
    file = tmp_path / "g.mlet"
    file.write_text("graph @g(%x: f32[n, 2]) -> (f32[n, 2]) {\n  %y = exp(%x) : f32[n, 2]\n  return %y\n}\n")
    graph = lower(str(file))
    bounded = msgspec.structs.replace(graph.signature, symbols={"n": (0, 4096)})
    compile(graph.with_signature(bounded), target="numpy").save(tmp_path / "g.mle")
    error = mlec("bench", tmp_path / "g.mle", "--batch", "4097").error("E_BATCH")
    assert "batches of 0 to 4096 rows, not of 4097" in error
    np.save(tmp_path / "x.npy", np.zeros((4097, 2), np.float32))
    error = mlec("run", tmp_path / "g.mle", tmp_path / "x.npy").error("E_INPUT_SHAPE")
    assert "at least 0 and at most 4096, got 4097" in error
    assert "bounds" in error


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0"])
def test_bench_for_a_time_that_is_none(mlec: Run, iris: Iris, seconds: str) -> None:
    done = mlec("bench", iris.mle, "--seconds", seconds, "--json")
    assert (done.code, done.document()["code"]) == (2, "E_USAGE")
    assert "--seconds" in done.document()["message"]


@pytest.mark.parametrize("content", [b"\x7fELF\2\1\1", b"\x08\x07\x12\x07pytorch", b"PK\3\4", b"MLE\0\2\0\0\0", b""])
def test_foreign_files_are_refused_by_every_command(
    iris: Iris, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlec.cli import main

    file, directory = tmp_path / "x.mle", tmp_path / "d.mle"
    file.write_bytes(content + bytes(200) if content else b"")
    directory.mkdir()
    for path in map(str, (file, directory)):
        against = (str(iris.mle), "--trust-pickle", "--against", path)
        for words in (
            ("verify", path), ("bench", path), ("report", path), ("opt", path), ("inspect", path), ("run", path, str(iris.csv)),
            ("verify", *against), ("bench", *against, "--batch", "1"), ("run", str(iris.mle), path),
            ("compile", str(iris.pickle), "--trust-pickle", "--example", path, "-o", str(tmp_path / "o.mle")),
            ("verify", str(iris.mle), "--trust-pickle", "--against", str(iris.pickle), "--inputs", path),
        ):  # fmt: skip
            assert main([*words, "--json"]) == 1, words
            printed = capsys.readouterr()
            error = json.loads(printed.out)
            assert error["code"] not in ("E_DEFECT", "E_SYSTEM"), error
            assert error["hint"], error
            assert path in f"{error['message']} {error['location']}"
            assert printed.err == ""


def test_more_rows_than_memory_holds(mlec: Run, iris: Iris) -> None:
    for rows in ("9999999999", "9" * 30):
        mlec("bench", iris.mle, "--batch", rows).error("E_NO_MEMORY")

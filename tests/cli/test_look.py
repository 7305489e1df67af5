"""mlec inspect, report, opt, passes, ops, targets, frontends: what is in a file, and what this installation can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import ROOT, Iris, Run


def test_inspect(mlec: Run, iris: Iris) -> None:
    done = mlec("inspect", iris.mle)
    assert done.code == 0, done.err
    for part in (
        "classifier", "sepal_l, sepal_w", "predict_proba", "weights", "built by this user", "sha256:", "compressed with zlib\n",
    ):  # fmt: skip
        assert part in done.out
    graph = mlec("inspect", iris.mle, "--graph", "--kernels")
    assert "graph @" in graph.out
    assert "loc(" in graph.out
    assert "relocatable object" in graph.out
    document = mlec("inspect", iris.mle, "--graph", "--json").document()
    assert document["graph"].startswith("graph @")
    assert document["size_bytes"] == iris.mle.stat().st_size


def test_inspect_executes_and_imports_nothing(iris: Iris, environment: dict[str, str]) -> None:
    code = f"""
import sys
from mlec.cli import main
for option in ("--graph", "--kernels", "--json"):
    assert main(["inspect", {str(iris.mle)!r}, option]) == 0
assert not {{"torch", "sklearn", "xgboost", "lightgbm", "tvm", "tvm_ffi", "tvm_ffi_orcjit", "pandas"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_report(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    assert "predict_proba" in mlec("report", iris.mle).out
    assert mlec("report", iris.mle, "-o", tmp_path / "r.html").out == ""
    assert "</html>" in (tmp_path / "r.html").read_text()
    assert mlec("report", iris.mle, "-o", tmp_path / "r.json").code == 0
    assert json.loads((tmp_path / "r.json").read_text()) == mlec("report", iris.mle, "--json").document()
    mlec("report", iris.mle, "-o", tmp_path / "r.pdf").error("E_USAGE")


GRAPH = """\
// passes: canonicalize,dce
graph @g(%x: f32[n, 4]) -> (f32[n, 2]) {
  %w = constant {value = @w} : f32[4, 2]
  %zero = constant {value = 0.0} : f32[]
  %y = matmul(%x, %w) : f32[n, 2]
  %z = add(%y, %zero) : f32[n, 2]
  return %z
}
"""


def test_opt(mlec: Run, tmp_path: Path) -> None:
    file = tmp_path / "g.mlet"
    file.write_text(GRAPH)
    done = mlec("opt", file, "--remarks", "all", "--verify", "numeric")
    assert done.code == 0, done.err
    assert "// canonicalize: applied: " in done.out
    assert "// numeric: 1 pass of 2 changed the graph" in done.out
    assert "add(" not in done.out[done.out.index("graph @") :]
    file.write_text(done.out)
    again = mlec("opt", file, "--passes", "canonicalize,dce")
    assert again.out == done.out[done.out.index("graph @") :], "what is printed can be read again"
    document = mlec("opt", file, "--passes", "O3", "--remarks", "missed", "--json").document()
    assert {p["name"] for p in document["passes"]} >= {"fuse", "dce"}


def test_a_graph_is_compiled_but_is_no_source(mlec: Run, tmp_path: Path) -> None:
    file, compiled = tmp_path / "g.mlet", tmp_path / "g.mle"
    file.write_text("graph @g(%x: f32[n]) -> (f32[n]) {\n  %y = exp(%x) : f32[n]\n  return %y\n}\n")
    done = mlec("compile", file, "-o", compiled)
    assert done.code == 0, done.err
    assert compiled.exists()
    mlec("verify", compiled, "--against", file).error("E_NO_SOURCE")


def test_opt_for_a_target(mlec: Run, tmp_path: Path) -> None:
    file = tmp_path / "g.mlet"
    file.write_text(GRAPH.partition("\n")[2])
    default = mlec("opt", file, "--json").document()
    assert (
        mlec("opt", file, "--target", "cuda", "--json").document()["passes"][0]["name"] == default["passes"][0]["name"]
    )
    mlec("opt", file, "--target", "abacus").error("E_USAGE")


def test_opt_reads_compiled_files_and_golden_tests(mlec: Run, iris: Iris) -> None:
    assert "graph @" in mlec("opt", iris.mle, "--passes", "dce").out
    golden = next((ROOT / "tests" / "golden" / "canonicalize").glob("*.mlet"))
    assert mlec("opt", golden).code == 0


def test_opt_errors(mlec: Run, tmp_path: Path) -> None:
    file = tmp_path / "g.mlet"
    file.write_text(GRAPH.replace("matmul", "matmull"))
    done = mlec("opt", file)
    assert done.code == 1
    assert "line 5" in done.err
    file.write_text(GRAPH)
    assert "fuse" in mlec("opt", file, "--passes", "fuze").error("E_USAGE"), "names what there is"
    mlec("opt", file, "--passes", "fuse{").error("E_PIPELINE")
    os.mkfifo(tmp_path / "pipe.mlet")
    assert "pipe" in mlec("opt", tmp_path / "pipe.mlet").error("E_OPEN")
    mlec("opt", tmp_path / "absent.mlet").error("E_OPEN")


@pytest.mark.parametrize(("wrong", "code"), [("matmull(%x", "E_UNKNOWN_OP"), ("concat(%x", "E_ATTR")])
def test_opt_names_the_list_of_ops(mlec: Run, tmp_path: Path, wrong: str, code: str) -> None:
    (tmp_path / "g.mlet").write_text(GRAPH.replace("matmul(%x", wrong))
    assert "`mlec ops`" in mlec("opt", tmp_path / "g.mlet").error(code)


@pytest.mark.parametrize(
    ("command", "key", "known"),
    [("passes", "passes", "fuse"), ("frontends", "frontends", "sklearn"), ("targets", "targets", "cuda")],
)
def test_tables(mlec: Run, command: str, key: str, known: str) -> None:
    done = mlec(command, "--json")
    assert done.code == 0, done.err
    assert known in [row.get("name", row.get("target")) for row in done.document()[key]]
    text = mlec(command, env={"PYTHONIOENCODING": "ascii"})
    assert text.code == 0, text.err
    assert known in text.out


def test_pipelines_are_wrapped_between_passes(mlec: Run) -> None:
    pipelines = mlec("passes", "--json").document()["pipelines"]
    lines = mlec("passes", env={"COLUMNS": "70"}).out.splitlines()
    words = [word.partition("{")[0].strip(",") for line in lines for word in line.split()]
    assert all(words.count(name.partition("{")[0]) > 1 for name in pipelines["O3"].split(",")), (
        "in the table of passes and, whole, in a pipeline"
    )


def test_the_classes_of_a_frontend(mlec: Run) -> None:
    from mlec.frontends.sklearn import SklearnFrontend

    classes = SklearnFrontend().supported()
    text = mlec("frontends", "sklearn").out
    assert text.splitlines()[-len(classes) :] == classes
    assert "mlec frontends" not in text, "no advice to do what was just done"
    assert mlec("frontends", "sklearn", "--json").document()["supported"] == classes
    assert "sklearn" in mlec("frontends", "skl").error("E_USAGE")


def test_tables_fit_and_lose_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlec.cli.output import print_table

    words = " ".join(f"word{i}" for i in range(60))
    for width in (60, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(("a", "n", "b"), [("x", 1, "y"), ("two", 12, words)], right=("n",))
        head, first, *rest = capsys.readouterr().out.splitlines()
        assert head.split() == ["a", "n", "b"]
        assert first.split() == ["x", "1", "y"]
        assert first.index("1") == head.index("n"), "numbers end below their title"
        assert all(len(line) <= width for line in rest)
        assert " ".join(" ".join(rest).split()[2:]) == words


def test_ops_shows_what_each_backend_compiles(mlec: Run) -> None:
    by_name = {op["name"]: op for op in mlec("ops", "--json").document()["ops"]}
    assert all(op["backends"]["numpy"]["supported"] for op in by_name.values())
    assert by_name["matmul"]["backends"]["tvm"]["supported"]
    assert by_name["matmul"]["operands"]
    assert by_name["matmul"]["backends"]["tvm"]["how"] == {
        "cpu": "template with epilogue, backends/tvm/lower_linalg.py", "cuda": "template, backends/tvm/cuda.py",
    }  # fmt: skip
    text = mlec("ops").out
    assert max(map(len, text.splitlines())) <= 120
    assert f"numpy: {len(by_name)} of {len(by_name)} ops" in text


def test_one_op_in_full(mlec: Run) -> None:
    text = mlec("ops", "matmul").out
    assert "operands   a, b" in text
    assert "backends/tvm/lower_linalg.py" in text
    assert mlec("ops", "matmul", "--json").document()["operands"] == ["a", "b"]
    assert "matmul" in mlec("ops", "matmull").error("E_USAGE")


def test_table_help_and_errors_agree(mlec: Run, iris: Iris) -> None:
    document = mlec("targets", "--json").document()
    help_text = " ".join(mlec("compile", "--help").out.split())
    wrong = [
        mlec("compile", iris.pickle, "--trust-pickle", *words)
        for words in (("--target", "tpu"), ("--precision", "fp17"))
    ]
    target, precision = wrong[0].error("E_USAGE"), wrong[1].error("E_USAGE")
    assert {row["target"] for row in document["targets"]} >= {"cpu", "cuda", "numpy"}
    for row in document["targets"]:
        assert row["target"] in help_text
        assert f'"{row["target"]}"' in target
    for row in document["precisions"]:
        assert row["precision"] in help_text
        assert row["precision"] in precision
    for row in mlec("frontends", "--json").document()["frontends"]:
        assert f"{row['name']}: {row['files']}" in help_text


def test_help_and_version(mlec: Run) -> None:
    import mlec as package

    assert package.__version__ in mlec("--version").out
    done = mlec("compile", "--help")
    assert done.code == 0
    for option in (
        "--target",
        "--precision",
        "--input-shape",
        "--example",
        "--calibration",
        "--passes",
        "--tune",
        "--debug",
    ):
        assert option in done.out


def test_a_closed_pipe_is_no_error_message(environment: dict[str, str], iris: Iris) -> None:
    command = f"{sys.executable} -m mlec inspect {iris.mle} --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_without_the_frameworks(mlec: Run, iris: Iris, tmp_path: Path) -> None:
    """What the base installation can do: run files, and say what it lacks."""
    absent = ("torch", "sklearn", "xgboost", "lightgbm", "pandas", "joblib", "threadpoolctl")
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({absent}))")
    base = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert "pip install 'mlec[torch]'" in mlec("frontends", env=base).out
    np.save(tmp_path / "x.npy", iris.table.to_numpy())
    assert mlec("run", iris.mle, tmp_path / "x.npy", "-o", tmp_path / "p.csv", env=base).code == 0
    assert "pip install" in mlec("run", iris.mle, iris.csv, env=base).error("E_MISSING_PACKAGE")
    done = mlec("compile", iris.pickle, "--trust-pickle", "-o", tmp_path / "m.mle", env=base)
    assert "mlec[sklearn]" in done.error("E_MISSING_PACKAGE")
    done = mlec("demo", "--only", "xgboost", "-o", tmp_path / "demo", env=base)
    assert done.code == 0
    assert "pip install 'mlec[xgboost]'" in done.out


def test_demo(mlec: Run, tmp_path: Path) -> None:
    done = mlec("demo", "--only", "logistic", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    (model,) = done.document()["models"]
    measured = model["measured"]
    assert measured["label_mismatches"] == 0
    assert measured["excess"] <= 1
    assert measured["score"] > 0.9
    assert measured["times"]["1"]["compiled"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "logistic-regression.html",
        "logistic-regression.mle",
    ]
    table = mlec("report", tmp_path / "out" / "logistic-regression.mle")
    assert "predict_proba" in table.out


def test_demo_of_no_model(mlec: Run, tmp_path: Path) -> None:
    error = mlec("demo", "--only", "logistic", "--only", "nothing", "-o", tmp_path / "out").error("E_USAGE")
    assert "no model of the demo has 'nothing' in its name" in error
    assert "logistic regression" in error
    assert not (tmp_path / "out").exists()

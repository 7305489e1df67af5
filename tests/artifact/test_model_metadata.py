"""Files whose metadata is sound JSON, but not what mlec writes: every value is changed in turn and the file sealed again."""

from __future__ import annotations

import base64
import copy
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact, read_model
from mlec.artifact.model import with_entries_unpacked
from mlec.cli import main
from mlec.errors import MlecError
from tests.artifact.surgery import Parts, join, split

ODD: tuple[Any, ...] = (None, True, -1, 2**63, 0.5, "", "x", [], [[]], {}, {"x": {}}, ["x", -1], "1" * 600)
Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A classifier with labels, a coded column and a report. Its program is one for the interpreter: nothing is compiled."""
    import pandas as pd
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    table = pd.DataFrame({"kind": ["a", "b", "a", "b"], "size": [1.0, 2.0, 3.0, 5.0]})
    encoded = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    source = make_pipeline(encoded, LogisticRegression()).fit(table, ["no", "yes", "no", "yes"])
    path = tmp_path_factory.mktemp("model") / "m.mle"
    mlec.compile(source, [table]).save(path, metadata={"author": "me"})
    parts = split(path.read_bytes())
    parts.kernels.clear()
    parts.metadata["program"] = {**with_entries_unpacked(parts.metadata)["program"], "backend": "numpy"}
    parts.metadata["targets"][0]["cpu_flags"] = []
    return parts


def places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every place in a document: of lists, the first and the last entry."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*at, index))


def replaced(document: dict[str, Any], at: Path_, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    *path, last = at
    inner: Any = document
    for step in path:
        inner = inner[step]
    inner[last] = value
    return document


def changed(parts: Parts, at: Path_, value: Any) -> bytes:
    return join(Parts(replaced(parts.metadata, at, value), parts.graph, parts.weights, parts.kernels))


def uses(path: Path) -> list[Callable[[], object]]:
    def load_and_run() -> None:
        with mlec.load(path) as loaded:
            x = np.array([["a", 1.0], ["b", 2.0]], object)
            for method in ("predict", "predict_proba"):
                getattr(loaded, method)(x)
            loaded.run(x)

    def render() -> None:
        with mlec.load(path) as loaded:
            loaded.report.to_text()
            loaded.report.to_html()

    return [load_and_run, render]


def sweep(model: Parts, keys: tuple[str, ...], values: tuple[Any, ...]) -> Iterator[tuple[Path_, Any, bytes]]:
    for key in keys:
        for at in places(model.metadata[key], (key,)):
            for value in values:
                yield at, value, changed(model, at, value)


def test_the_model_runs_as_it_is(model: Parts, tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(join(model))
    for use in uses(path):
        use()


def outcome(use: Callable[[], object], at: Path_, value: Any) -> str:
    """The code of the clear error, or nothing where all went well."""
    try:
        use()
    except MlecError as error:
        return error.code
    except Exception as error:
        pytest.fail(f"{'.'.join(map(str, at))} = {value!r}: {type(error).__name__}: {error}")
    return ""


@pytest.mark.parametrize("key", ["signature", "program", "name", "source", "targets", "user", "mlec_version"])
def test_a_changed_value_is_a_clear_error_where_it_is_used(model: Parts, tmp_path: Path, key: str) -> None:
    path = tmp_path / "m.mle"
    codes: set[str] = set()
    for at, value, data in sweep(model, (key,), ODD):
        path.write_bytes(data)
        codes.update(outcome(use, at, value) for use in uses(path))
    assert "E_METADATA" in codes or key == "mlec_version"
    assert "E_DEFECT" not in codes


def test_a_program_is_read_packed_and_as_earlier_versions_stored_it(
    model: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plain = tmp_path / "m.mle", model.metadata["program"]
    path.write_bytes(join(model))
    with Artifact.open(path) as artifact:
        expected = read_model(artifact).program
    path.write_bytes(changed(model, ("program",), packed(json.dumps(plain))))
    with Artifact.open(path) as artifact:
        assert read_model(artifact).program == expected
    for use in uses(path):
        use()
    assert main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["program"] == plain
    for program, code in (
        (packed(""), "E_JSON_SYNTAX"),
        (packed("[1]"), "E_METADATA"),
        (packed("[" * 65 + "]" * 65), "E_JSON_DEPTH"),
        (packed(" " * (16 << 20) + "{}"), "E_METADATA"),  # larger than metadata can be
        ("", "E_METADATA"),
        ("{}", "E_METADATA"),
        (packed(json.dumps(plain)) + "!", "E_METADATA"),
        (packed(json.dumps({**plain, "sequence": 1})), "E_METADATA"),
    ):
        path.write_bytes(changed(model, ("program",), program))
        assert [outcome(use, (), program) for use in uses(path)] == [code, code]
        assert main(["inspect", "--json", str(path)]) in (0, 1)
        assert "E_DEFECT" not in capsys.readouterr().err


def with_report(model: Parts, report: Any) -> bytes:
    return changed(model, ("report",), report)


def packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode())).decode()


def read(model: Parts) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(model.metadata["report"])))


def test_a_changed_report_is_a_clear_error_where_it_is_shown(model: Parts, tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    document = {"report": read(model)}
    for at in places(document["report"], ("report",)):
        for value in (None, -1, 0, ["x", -1]):
            path.write_bytes(with_report(model, packed(json.dumps(replaced(document, at, value)["report"]))))
            assert outcome(uses(path)[1], at, value) in ("", "E_REPORT", "E_METADATA")


def test_a_report_is_read_when_it_is_asked_for(model: Parts, tmp_path: Path) -> None:
    """Compressed, or as the object that earlier versions stored; whatever it is, the model runs."""
    path = tmp_path / "m.mle"
    path.write_bytes(join(model))
    expected = mlec.load(path).report.to_dict()
    assert expected["passes"]
    path.write_bytes(with_report(model, read(model)))
    assert mlec.load(path).report.to_dict() == expected
    sound = model.metadata["report"]
    for report, code in (
        (packed(""), "E_JSON_SYNTAX"),
        (packed("[1]"), "E_REPORT"),
        (packed('{"passes": [], "passes": []}'), "E_JSON_DUPLICATE"),
        (packed('{"passes": 1e999}'), "E_JSON_NONFINITE"),
        (packed("[" * 65 + "]" * 65), "E_JSON_DEPTH"),
        (packed(" " * (16 << 20) + "{}"), "E_REPORT"),  # larger than metadata can be
        ("", "E_REPORT"),
        ("{}", "E_REPORT"),
        (sound[:-8], "E_REPORT"),
        (sound + "!", "E_REPORT"),
        (base64.b64encode(base64.b64decode(sound) + b"x").decode(), "E_REPORT"),
    ):
        path.write_bytes(with_report(model, report))
        run, render = uses(path)
        assert [outcome(run, (), report), outcome(render, (), report)] == ["", code]


def test_inspect_shows_the_report_where_it_is_one(
    model: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.mle"
    for report, shown in ((model.metadata["report"], read(model)), (packed("[1]"), packed("[1]"))):
        path.write_bytes(with_report(model, report))
        assert main(["inspect", "--json", str(path)]) == 0
        assert json.loads(capsys.readouterr().out)["metadata"]["report"] == shown


def test_commands_never_call_it_a_defect(model: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.mle"
    keys = ("signature", "program", "name", "report", "targets", "user")
    for at, value, data in sweep(model, keys, (None, ["x", -1])):
        if len(at) > 3:
            continue
        path.write_bytes(data)
        for words in (["inspect"], ["inspect", "--kernels"], ["inspect", "--json"], ["verify"], ["report"]):
            code = main([*words, str(path)])
            shown = capsys.readouterr().err
            assert code in (0, 1)
            assert "E_DEFECT" not in shown, (at, value, words, shown)


@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_a_signature_of_another_program_is_refused(model: Parts, tmp_path: Path, key: str) -> None:
    path = tmp_path / "m.mle"
    signature = {**model.metadata["signature"], "methods": [], "run": [], "table": None, key: []}
    path.write_bytes(changed(model, ("signature",), signature))
    with pytest.raises(MlecError, match=f"the {key} of the program") as caught:
        read_model(Artifact.open(path))
    assert caught.value.code == "E_METADATA"


def test_missing_keys(model: Parts, tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    for key in model.metadata:
        document = {k: v for k, v in model.metadata.items() if k != key}
        path.write_bytes(join(Parts(document, model.graph, model.weights, [])))
        needed = key in ("signature", "program", "format", "digests", "mlec_version", "targets")
        codes = {outcome(use, (key,), "missing") for use in uses(path)}
        assert codes <= ({"E_METADATA", "E_METADATA_SCHEMA"} if needed else {""}), key


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (("signature", "methods", 0, "outputs"), [9], "outputs that do not exist"),
        (("signature", "methods", 0, "labels", 0, "dtype"), "<U99999999", "not of their type"),
        (("signature", "methods", 0, "labels", 0, "dtype"), "float64", "not of their type"),
        (("signature", "methods", 0, "dtype"), "V8", "unknown type"),
        (("signature", "table", "n_features"), 2**60, "columns"),
        (("signature", "inputs", 0, "shape"), ["(" * 300, 2], "a shape that is none"),
        (("signature", "inputs", 0, "shape"), ["+".join("n" * 250), 2], "not that of the graph"),
        (("signature", "inputs", 0, "dtype"), "f8", "unknown element type"),
        (("signature", "run"), ["fly"], "not among the methods"),
        (("signature", "symbols"), {"n": [5, 2]}, "contradict"),
    ],
)
def test_what_contradicts_itself_is_named(model: Parts, tmp_path: Path, at: Path_, value: Any, says: str) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(changed(model, at, value))
    with pytest.raises(MlecError, match=says) as caught:
        mlec.load(path)
    assert caught.value.code == "E_METADATA"
    with Artifact.open(path) as artifact:
        if says != "not that of the graph":
            with pytest.raises(MlecError, match=says):
                read_model(artifact)

"""Files of skops: what is constructed of them, what is refused, and that no file ends the process that compiles."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import ensemble, impute, linear_model, neighbors, preprocessing, tree
from sklearn.datasets import load_iris
from sklearn.pipeline import make_pipeline

from mlec.errors import FrontendError, MlecError, UntrustedPickleError
from mlec.frontends.base import LowerOptions
from mlec.frontends.sklearn import SklearnFrontend, skops_files
from mlec.frontends.sklearn.skops_files import SkopsFile, open_skops
from mlec.ir import print_graph

skops = pytest.importorskip("skops.io")

IRIS, KIND = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"], object)[KIND]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.any"


def saved(path: Path, model: Any) -> Any:
    skops.dump(model, path)
    return model


def edited(path: Path, edit: Callable[[Any], object]) -> bytes:
    """The file with its description edited."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == "schema.json":
                document = json.loads(content)
                edit(document)
                content = json.dumps(document).encode()
            target.writestr(entry.filename, content)
    path.write_bytes(made.getvalue())
    return made.getvalue()


def load(lab: Any, path: Path, **options: Any) -> SkopsFile:
    assert lab.frontend.sniff(path.read_bytes()[:65536], path)
    model = lab.frontend.load(path, LowerOptions(**options))
    assert isinstance(model, SkopsFile)
    return model


FRAME = pd.DataFrame(IRIS, columns=list("abcd"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SkopsFile]:
    """A classifier with text labels, and its file in a process of its own: seconds of imports."""
    path = tmp_path_factory.mktemp("skops") / "labelled.any"
    model = saved(
        path, make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression()).fit(FRAME, NAMES)
    )
    return model, SklearnFrontend().load(path, LowerOptions())


def test_a_file_gives_the_graph_and_the_answers_of_its_estimator(lab: Any, labelled: tuple[Any, SkopsFile]) -> None:
    model, file = labelled
    assert lab.frontend.accepts(file)
    graph, wanted = lab.frontend.lower(file, LowerOptions()), lab.lower(model)
    assert print_graph(graph) == print_graph(wanted)
    assert graph.signature == wanted.signature
    oracle, own = lab.frontend.oracle(file), lab.frontend.oracle(model)
    assert list(oracle) == list(own)
    for name in oracle:
        np.testing.assert_array_equal(oracle[name](FRAME), own[name](FRAME))
    assert oracle["predict"](FRAME).dtype == object


def test_compiling_a_file_imports_no_library_here(path: Path) -> None:
    saved(path, tree.DecisionTreeClassifier(max_depth=3, random_state=0).fit(IRIS, NAMES))
    code = (
        "import sys, mlec\n"
        f"report = mlec.compile({str(path)!r}, progress=False).report\n"
        "assert report.parity['methods']['predict']['label_mismatches'] == 0, report.parity\n"
        "assert report.timing['measured']['speedup'] > 0, report.timing\n"
        "sys.exit(bool({'sklearn', 'skops'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_frames_come_back_as_they_are(lab: Any, path: Path) -> None:
    table = pd.DataFrame({"a": [1.0, np.nan, 3.0], "b": [4.0, 5.0, np.nan]}, index=[7, 8, 9])
    model = saved(path, impute.SimpleImputer().set_output(transform="pandas").fit(table))
    pd.testing.assert_frame_equal(lab.frontend.oracle(load(lab, path))["transform"](table), model.transform(table))


def test_rows_without_one_right_answer_are_known_there(lab: Any, path: Path) -> None:
    points = np.repeat(np.arange(12.0).reshape(6, 2), 2, axis=0)
    model = saved(path, neighbors.KNeighborsClassifier(3, algorithm="brute").fit(points, np.arange(12) % 2))
    oracle, own = lab.frontend.oracle(load(lab, path)), lab.frontend.oracle(model)
    np.testing.assert_array_equal(oracle.decided(points), own.decided(points))
    assert not oracle.decided(points).all()


def test_types_that_nobody_trusts(lab: Any, path: Path) -> None:
    saved(path, neighbors.KNeighborsClassifier(algorithm="kd_tree").fit(IRIS, KIND))
    with pytest.raises(
        UntrustedPickleError, match=r"model\.any: it holds types that are not trusted: .*KDTree"
    ) as caught:
        load(lab, path)
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in str(caught.value.hint)
    with pytest.raises(UntrustedPickleError, match="not the file that you trust"):
        load(lab, path, trust_pickle="sha256:" + "0" * 64)
    answers = lab.frontend.oracle(load(lab, path, trust_pickle=digest))
    np.testing.assert_array_equal(answers["predict"](IRIS[:5]), KIND[:5])


def test_the_list_of_such_types_is_short(path: Path) -> None:
    saved(path, linear_model.Ridge().fit(IRIS, KIND))

    def edit(document: Any) -> None:
        part = {"__class__": "X", "__module__": "m", "__loader__": "TypeNode"}
        extra = {"__class__": "list", "__module__": "builtins", "__loader__": "ListNode"}
        extra["content"] = [{**part, "__class__": f"T{i}" * 1000} for i in range(100)]
        document["content"]["content"]["extra"] = extra

    with pytest.raises(UntrustedPickleError, match="and 92 more") as caught:
        open_skops(io.BytesIO(edited(path, edit)), "skops")
    assert len(str(caught.value)) < 2000


OLD_FUNCTION = {"module_path": "os", "function": "mkdir"}
CALL = {"__class__": "methodcaller", "__module__": "operator", "__loader__": "OperatorFuncNode"}


def _calls(mark: Path) -> list[Callable[[Any], object]]:
    """Ways in which a description asks for a call."""
    text = {
        "__class__": "str",
        "__module__": "builtins",
        "__loader__": "JsonNode",
        "content": json.dumps(str(mark)),
        "is_json": True,
    }

    def arguments(*content: Any) -> dict[str, Any]:
        return {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": list(content)}

    def attribute(node: Any) -> Callable[[Any], object]:
        return lambda document: document["content"]["content"].update(extra=node)

    touch = {"__class__": "open", "__module__": "io", "__loader__": "FunctionNode"}
    empty = {"__class__": "dict", "__module__": "builtins", "__loader__": "DictNode", "content": {}, "key_types": arguments() | {
        "__class__": "list", "__loader__": "ListNode"}}  # fmt: skip
    partial = {"__class__": "partial", "__module__": "functools", "__loader__": "PartialNode"}
    return [
        attribute({"__class__": "mkdir", "__module__": "os", "__loader__": "ConstructorFromReduceNode", "content": arguments(text)}),
        attribute({**CALL, "attrs": arguments(text)}),
        attribute({"__class__": "Path", "__module__": "pathlib", "__loader__": "ObjectNode", "content": empty}),
        attribute({**partial, "content": {"func": touch, "args": arguments(text), "kwds": empty, "namespace": empty}}),
        attribute({**empty, "__class__": "mkdir", "__module__": "os"}),
        attribute({"__class__": "mkdir", "__module__": "os", "__loader__": "ListNode", "content": [text]}),
        attribute({"__class__": "mkdir", "__module__": "os", "__loader__": "TypeNode"}),
        attribute({**touch, "__loader__": "LossNode", "__reduce__": {"args": arguments(text)}, "content": empty}),
        attribute({"__class__": "str", "__module__": "builtins", "__loader__": "MethodNode", "content": {"func": "format", "obj": text}}),
        lambda document: document.update(__class__="mkdir", __module__="os"),
        lambda document: document.update(protocol=0) or attribute({**touch, "content": OLD_FUNCTION})(document),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(11))
def test_calls_in_files_are_never_made(path: Path, tmp_path: Path, number: int) -> None:
    """Here in this process: whatever skops did would be seen."""
    saved(path, linear_model.Ridge().fit(IRIS, KIND))
    mark = tmp_path / "made"
    data = edited(path, _calls(mark)[number])
    with pytest.raises(MlecError) as caught:
        open_skops(io.BytesIO(data), "skops")
    assert caught.value.code in ("E_UNTRUSTED_PICKLE", "E_FILE")
    assert not mark.exists()


def test_protocols_that_are_none(path: Path) -> None:
    for protocol in (-1, 99, True, None, "2", [2]):
        saved(path, linear_model.Ridge().fit(IRIS, KIND))
        data = edited(path, lambda document, protocol=protocol: document.update(protocol=protocol))  # type: ignore[misc]
        with pytest.raises(FrontendError) as caught:
            open_skops(io.BytesIO(data), "skops")
        assert caught.value.code == "E_FILE"


def test_the_types_of_the_file_are_never_what_is_trusted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(skops, "loads", lambda data, trusted: given.append(trusted))
    saved(path, neighbors.KNeighborsClassifier(algorithm="kd_tree").fit(IRIS, KIND))
    open_skops(io.BytesIO(path.read_bytes()), "skops")
    assert given == [sorted(skops_files.TRUSTED_TYPES)]


@pytest.mark.parametrize("name", ["../model", "/tmp/x", "a\\b"])
def test_archives_are_looked_at_before_skops_reads_them(
    lab: Any, path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(path, linear_model.Ridge().fit(IRIS, KIND))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    monkeypatch.setattr(skops_files, "SourceProcess", None)  # is not reached
    with pytest.raises(FrontendError) as caught:
        load(lab, path)
    assert caught.value.code == "E_FILE_PATH"


def test_other_descriptions_than_an_object(lab: Any, path: Path) -> None:
    for text in ("[]", "{", "3"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("schema.json", text)
        with pytest.raises(FrontendError, match=r"model\.any") as caught:
            load(lab, path)
        assert caught.value.code == "E_FILE_JSON"
    for text in ("{}", '{"protocol": 2}', '{"protocol": 2, "__loader__": []}'):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("schema.json", text)
        with pytest.raises(FrontendError) as caught:
            open_skops(io.BytesIO(path.read_bytes()), "skops")
        assert caught.value.code == "E_FILE"


def test_a_hostile_tree_is_refused_and_ends_nothing(lab: Any, path: Path) -> None:
    """scikit-learn follows the children of a tree wherever they lead."""
    model = tree.DecisionTreeClassifier(max_depth=3, random_state=0).fit(IRIS, KIND)
    state = model.tree_.__getstate__()
    state["nodes"]["left_child"][0] = 10**9
    model.tree_.__setstate__(state)
    saved(path, model)
    file = load(lab, path)
    with pytest.raises(FrontendError, match="child 1000000000") as caught:
        lab.frontend.lower(file, LowerOptions())
    assert caught.value.code == "E_TREE"
    for _ in range(2):
        with pytest.raises(
            FrontendError, match=r"sklearn itself fails on model\.any: its process died of SIG"
        ) as caught:
            lab.frontend.oracle(file)["predict"](IRIS)
        assert caught.value.code == "E_SOURCE_FAILS"


def test_an_array_that_wants_all_memory(path: Path) -> None:
    saved(path, linear_model.Ridge().fit(IRIS, KIND))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 42,)})
    made = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            target.writestr(
                entry.filename, header.getvalue() if entry.filename.endswith(".npy") else source.read(entry)
            )
    made.seek(0)
    with pytest.raises(FrontendError, match="allocate") as caught:
        open_skops(made, "skops")
    assert caught.value.code == "E_FILE"


def test_another_version_of_scikit_learn_is_said(lab: Any, path: Path) -> None:
    saved(path, linear_model.Ridge().fit(IRIS, KIND))

    def edit(document: Any) -> None:
        document["content"]["content"]["_sklearn_version"]["content"] = '"1.0.2"'

    options = LowerOptions()
    lab.frontend.lower(open_skops(io.BytesIO(edited(path, edit)), "skops"), options)
    (note,) = options.notes
    assert "1.0.2" in note
    assert "Ridge" in note


def test_versions_of_skops_that_construct_too_much(lab: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(path, ensemble.RandomForestClassifier(1).fit(IRIS, KIND))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.12.1")
    with pytest.raises(FrontendError, match=r"skops 0\.12\.1 constructs more") as caught:
        load(lab, path)
    assert caught.value.code == "E_MISSING_PACKAGE"
    assert "skops>=0.13" in str(caught.value.hint)

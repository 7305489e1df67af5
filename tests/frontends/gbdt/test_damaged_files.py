"""Model files that are cut off, changed or made to do harm end in a clear error, and soon."""

from __future__ import annotations

import copy
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
import xgboost as xgb

from mlec.errors import FrontendError, MlecError
from mlec.frontends import gbdt, ubjson
from mlec.frontends.base import LowerOptions
from mlec.frontends.lightgbm import LightGBMFrontend
from mlec.frontends.select import load_model_file
from mlec.frontends.xgboost import ModelFile, XGBoostFrontend
from mlec.validation.probes import probe_rows

rng = np.random.default_rng(0)
X = np.c_[rng.normal(size=(200, 3)), rng.integers(0, 40, 200)]
Y = X[:, 0] + 3 * np.sin(X[:, 3])
TYPES = ["q", "q", "q", "c"]
BOOSTER = xgb.train({"max_depth": 3}, xgb.DMatrix(X, Y, feature_types=TYPES, enable_categorical=True), 3)
FOREST = lgb.LGBMRegressor(verbose=-1, n_estimators=3, min_data_per_group=1, cat_smooth=1).fit(
    X, Y, categorical_feature=[3]
)
UBJSON = b"{L\0\0\0\0\0\0\0\x07learner{U\x01a"
"""How files of XGBoost begin in it, until the value of the first member."""
TEXT = FOREST.booster_.model_to_string()
SECONDS = 5.0
"""Of processor time, so that a busy machine does not count. What a false size makes of it takes hours, or all memory."""


def lower_bytes(frontend: Any, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    start = time.process_time()
    try:
        frontend.lower(frontend.load(path, LowerOptions()), LowerOptions())
    finally:
        assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("ending", ["json", "ubj"])
def test_truncated_xgboost_files(tmp_path: Path, ending: str) -> None:
    data = bytes(BOOSTER.save_raw(ending))
    lower_bytes(XGBoostFrontend(), tmp_path / "m", data)
    for cut in (1, 2, 3, 10, 100, len(data) // 2, len(data) - 2, len(data) - 1):
        with pytest.raises(FrontendError):
            lower_bytes(XGBoostFrontend(), tmp_path / "m", data[:cut])


def test_truncated_lightgbm_files(tmp_path: Path) -> None:
    data = TEXT.encode()
    lower_bytes(LightGBMFrontend(), tmp_path / "m", data)
    for cut in (0, 1, 5, 100, data.index(b"Tree=1"), data.index(b"end of trees") - 1):
        with pytest.raises(FrontendError):
            lower_bytes(LightGBMFrontend(), tmp_path / "m", data[:cut])


@pytest.mark.parametrize("ending", ["json", "ubj", "txt"])
def test_flipped_bytes_never_escape_the_error_tree(tmp_path: Path, ending: str) -> None:
    frontend: Any = LightGBMFrontend() if ending == "txt" else XGBoostFrontend()
    data = TEXT.encode() if ending == "txt" else bytes(BOOSTER.save_raw(ending))
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[place] = int(rng.integers(0, 256))
        try:
            lower_bytes(frontend, tmp_path / "m", bytes(changed))
        except MlecError:
            refused += 1
    assert refused > 30


def tree(document: Any) -> Any:
    return document["learner"]["gradient_booster"]["model"]["trees"][0]


def put(key: str, index: int, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        values = list(tree(document)[key])
        values[index] = value
        tree(document)[key] = values

    return change


def params(**changed: Any) -> Callable[[Any], None]:
    return lambda document: document["learner"]["learner_model_param"].update(changed)


def categorical(key: str, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        trees = document["learner"]["gradient_booster"]["model"]["trees"]
        target = next(t for t in trees if len(t["categories_nodes"]))
        target[key] = [value] * len(target[key])

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("left_children", 0, 0),
        put("left_children", 1, 0),
        put("left_children", 0, 10**6),
        put("right_children", 0, -1),
        put("right_children", 0, 2**31),
        put("right_children", 0, 1),
        put("left_children", 0, "1"),
        put("left_children", 0, 1.5),
        put("left_children", 0, None),
        put("left_children", 0, [1]),
        put("left_children", 0, 2**70),
        put("left_children", 0, -2),
        put("left_children", 0, -(2**62)),
        put("split_indices", 0, 4),
        put("split_indices", 0, -1),
        put("split_conditions", 0, {}),
        lambda d: tree(d)["tree_param"].update(num_nodes="3"),
        lambda d: tree(d)["tree_param"].update(num_nodes="-3"),
        lambda d: tree(d)["tree_param"].update(num_nodes="9" * 10**5),
        lambda d: tree(d)["tree_param"].update(size_leaf_vector="7"),
        lambda d: tree(d).update(left_children=[]),
        lambda d: tree(d).update(id=2),
        lambda d: tree(d).update(id=-1),
        lambda d: d["learner"]["gradient_booster"]["model"].update(trees={}),
        lambda d: d["learner"]["gradient_booster"]["model"].update(tree_info=[0, 0]),
        lambda d: d["learner"]["gradient_booster"]["model"].update(tree_info=[0, 0, 1]),
        lambda d: d["learner"]["gradient_booster"]["model"].update(tree_info=[0, 0, -1]),
        lambda d: d["learner"]["gradient_booster"].update(name="forest"),
        lambda d: d["learner"]["objective"].update(name="reg:mine"),
        lambda d: d["learner"].update(feature_names=["a"]),
        lambda d: d["learner"].update(attributes={"scikit_learn": "["}),
        lambda d: d["learner"].update(attributes={"scikit_learn": '{"_estimator_type": "regressor"}', "best_iteration": "99"}),
        lambda d: d["learner"]["gradient_booster"]["model"]["cats"].update(enc=[{"offsets": [0, 9], "values": [1]}] * 4),
        lambda d: d["learner"]["gradient_booster"]["model"]["cats"].update(enc=[{"type": 15, "values": [1, 1]}] * 4),
        params(num_feature=str(2**60)),
        params(num_feature="2"),
        params(num_class=str(2**40)),
        params(num_class="9"),  # trees for one output
        params(num_target=str(2**16 + 1)),
        params(num_target="x"),
        params(base_score="[a]"),
        params(base_score="[1,2,3]"),
        params(base_score=None),
        categorical("categories_segments", 10**9),
        categorical("categories_segments", -1),
        categorical("categories_sizes", 10**9),
        categorical("categories", -1),
        categorical("categories", 2**40),
        categorical("categories_nodes", 10**6),
        lambda d: d.pop("learner"),
        lambda d: d["learner"].pop("gradient_booster"),
        lambda d: d.update(learner=[]),
    ],
)  # fmt: skip
def test_inconsistent_xgboost_documents(change: Callable[[Any], None]) -> None:
    document = copy.deepcopy(ubjson.loads(bytes(BOOSTER.save_raw("ubj"))))
    change(document)
    start = time.process_time()
    with pytest.raises(FrontendError):
        XGBoostFrontend().lower(ModelFile(Path("m"), document, b""), LowerOptions())
    assert time.process_time() - start < SECONDS


def length(count: int) -> bytes:
    return b"L" + struct.pack(">q", count)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b"{" + (length(1) + b"a{") * 100_000,
        b"[#" + length(2**62),
        b"[#" + length(2**62) + b"Z" * 1000,
        b"[$d#" + length(2**62),
        b"[$d#" + length(-1),
        b"[$Z#" + length(2**40),
        b"S" + length(2**62) + b"a",
        b"S" + length(-5) + b"a",
        b"{" + length(2) + b"\xff\xff" + b"T}",
        b"{" + (length(1) + b"aT") * 2 + b"}",
        b"{}{}",
        b"H",
        b"",
    ],
    ids=lambda d: repr(d[:16]),
)
def test_hostile_ubjson(data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(FrontendError):
        ubjson.loads(data)
    assert time.process_time() - start < SECONDS


def test_ubjson_values() -> None:
    data = (
        b"{"
        + length(1)
        + b"a[i\xffU\xff]"
        + length(1)
        + b"b[$I#"
        + length(2)
        + b"\x00\x01\xff\xff"
        + length(1)
        + b"cSU\x01x}"
    )
    value = ubjson.loads(data)
    assert value["a"] == [-1, 255]
    assert value["b"].tolist() == [1, -1]
    assert value["c"] == "x"


def test_deeply_nested_json(tmp_path: Path) -> None:
    for text in (b'{"learner":' * 100_000, b'{"learner":' + b"[" * 100_000):
        with pytest.raises(FrontendError, match="JSON"):
            lower_bytes(XGBoostFrontend(), tmp_path / "m", text)


def test_names_that_occur_twice_in_json(tmp_path: Path) -> None:
    text = bytes(BOOSTER.save_raw("json"))
    for name in (b'"learner"', b'"num_feature"', b'"left_children"'):
        with pytest.raises(FrontendError, match="twice") as caught:
            lower_bytes(XGBoostFrontend(), tmp_path / "m", text.replace(name, name + b":0," + name, 1))
        assert caught.value.code == "E_MODEL_FILE"


def test_columns_of_one_name() -> None:
    document = copy.deepcopy(ubjson.loads(bytes(BOOSTER.save_raw("ubj"))))
    document["learner"]["feature_names"] = ["a", "b", "a", "c"]
    with pytest.raises(FrontendError, match="'feature_names': a name occurs twice"):
        XGBoostFrontend().lower(ModelFile(Path("m"), document, b""), LowerOptions())


def test_a_table_of_millions_of_columns(tmp_path: Path) -> None:
    """The few bytes that say so are no reason to make gigabytes of rows."""
    document = copy.deepcopy(ubjson.loads(bytes(BOOSTER.save_raw("ubj"))))
    document["learner"]["learner_model_param"]["num_feature"] = str(1 << 20)
    document["learner"].update(feature_names=[], feature_types=[])
    graph = XGBoostFrontend().lower(ModelFile(Path("m"), document, b""), LowerOptions())
    assert probe_rows(graph) == 64


def line(key: str, value: str) -> Callable[[str], str]:
    """Replaces the first line of that key."""

    def change(text: str) -> str:
        lines = text.split("\n")
        at = next(i for i, found in enumerate(lines) if found.startswith(f"{key}="))
        lines[at] = f"{key}={value}"
        return "\n".join(lines)

    return change


def first(key: str, value: str) -> Callable[[str], str]:
    """Replaces the first number of the first such line."""

    def change(text: str) -> str:
        found = next(x for x in text.split("\n") if x.startswith(f"{key}="))
        return line(key, " ".join([value, *found.partition("=")[2].split()[1:]]))(text)

    return change


@pytest.mark.parametrize(
    "change",
    [
        first("left_child", "0"),
        first("left_child", "100000"),
        first("right_child", "-100000"),
        first("right_child", str(2**70)),
        first("left_child", "x"),
        first("split_feature", "4"),
        first("split_feature", "-1"),
        first("decision_type", "12"),
        first("threshold", "zero"),
        first("leaf_value", ""),
        first("cat_boundaries", "1"),
        first("cat_threshold", "-1"),
        first("cat_threshold", str(2**33)),
        line("cat_boundaries", "0 1000000000"),
        line("num_leaves", "1000000000"),
        line("num_leaves", "0"),
        line("num_leaves", "-1"),
        line("num_leaves", "9" * 10**5),
        line("num_cat", "0"),
        line("num_cat", str(2**62)),
        line("num_tree_per_iteration", "2"),
        line("num_tree_per_iteration", "0"),
        line("max_feature_idx", str(2**60)),
        line("max_feature_idx", "1"),
        line("feature_infos", "none"),
        line("objective", "mine"),
        line("tree_sizes", "\nTree=0"),
        lambda text: text.replace("num_leaves=", "num_leaves=2\nnum_leaves=", 1),
        lambda text: text.replace("num_class=", "num_class=2\nnum_class=", 1),
        lambda text: text.replace("end of trees", ""),
        lambda text: text.replace("tree\n", "forest\n", 1),
        lambda text: text + "pandas_categorical:[[\n",
        lambda text: text + "pandas_categorical:" + "[" * 100_000 + "\n",
        lambda text: text + "pandas_categorical:[1]\n",
        lambda text: text + 'pandas_categorical:[["a"], ["b"]]\n',
    ],
)  # fmt: skip
def test_inconsistent_lightgbm_texts(tmp_path: Path, change: Callable[[str], str]) -> None:
    with pytest.raises(FrontendError):
        lower_bytes(LightGBMFrontend(), tmp_path / "m", change(TEXT).encode())


@pytest.mark.parametrize("word", ["4294967295 ", "0 "])
def test_many_splits_on_one_large_set(tmp_path: Path, word: str) -> None:
    """Each of them repeats the set in the table: two megabytes would become many gigabytes. Zeros are looked through for each."""
    leaves, words = 400, 200_000
    inner = leaves - 1
    tree = {
        "num_leaves": leaves,
        "num_cat": 1,
        "split_feature": "0 " * inner,
        "threshold": "0 " * inner,
        "decision_type": "1 " * inner,
        "left_child": " ".join(map(str, [*range(1, inner), -1])),
        "right_child": " ".join(str(-i - 2) for i in range(inner)),
        "leaf_value": "1 " * leaves,
        "cat_boundaries": f"0 {words}",
        "cat_threshold": word * words,
    }
    body = "".join(f"{key}={value}\n" for key, value in tree.items())
    text = TEXT[: TEXT.index("Tree=0")] + f"Tree=0\n{body}\n" + TEXT[TEXT.index("end of trees") :]
    with pytest.raises(FrontendError, match="too large for a table"):
        lower_bytes(LightGBMFrontend(), tmp_path / "m", text.encode())


@pytest.mark.parametrize(
    "data",
    [
        b'{"learner":[' + b"{}," * 100_000,
        b'{"learner":[' + b"[]," * 100_000,
        b'{"learner":[' + b"1," * 500_000,
        b'{"learner":{' + b",".join(b'"%07d":1' % i for i in range(100_000)),
        b'{"learner":"\\ud83d\\ude00' + b"a" * 500_000,
        '{"learner":"\U0001f600'.encode() + b"a" * 500_000,
        UBJSON + b"[" + b"i\x80" * 500_000,
        UBJSON + b"[" + b"Z" * 500_000,
        UBJSON + b"[" + b"[]" * 500_000,
        UBJSON + b"{" + b"".join(b"U\x07%07dZ" % i for i in range(100_000)),
        UBJSON + b"[" + b"[$i#U\0" * 100_000,
        b"tree\nversion=v4\n" + b"ab\n" * 200_000,
    ],
    ids=[
        "objects",
        "arrays",
        "numbers",
        "members",
        "escaped",
        "rare",
        "bytes",
        "nothings",
        "ubjson arrays",
        "ubjson members",
        "typed",
        "lines",
    ],
)
def test_a_file_that_would_become_more_than_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    path = tmp_path / "m"
    path.write_bytes(data)
    monkeypatch.setattr(gbdt, "MEMORY", 8 * len(data))
    with pytest.raises(FrontendError) as caught:
        load_model_file(path, LowerOptions())
    assert caught.value.code == "E_NO_MEMORY"


def test_a_list_that_would_become_more_than_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LightGBMFrontend().load(_written(tmp_path / "m", line("leaf_value", "1 " * 50_000)(TEXT)), LowerOptions())
    monkeypatch.setattr(gbdt, "MEMORY", 1 << 20)
    with pytest.raises(FrontendError) as caught:
        LightGBMFrontend().lower(model, LowerOptions())
    assert caught.value.code == "E_NO_MEMORY"


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for frontend, data in (
        (LightGBMFrontend(), line("num_leaves", "0")(TEXT).encode()),
        (LightGBMFrontend(), first("left_child", "0")(TEXT).encode()),
        (LightGBMFrontend(), b"\xff"),
        (XGBoostFrontend(), b"{Lx"),
        (XGBoostFrontend(), b"{"),
        (XGBoostFrontend(), b"[]"),
        (XGBoostFrontend(), b"{}"),
    ):
        with pytest.raises(FrontendError) as caught:
            lower_bytes(frontend, path, data)
        assert caught.value.message.startswith(f"{path}: ")
        assert caught.value.message.count(str(path)) == 1


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    for frontend in (XGBoostFrontend(), LightGBMFrontend()):
        with pytest.raises(FrontendError, match="cannot read"):
            frontend.load(tmp_path / "none", LowerOptions())


def test_sniffing() -> None:
    path = Path("m")
    for data in (
        bytes(BOOSTER.save_raw("json")),
        bytes(BOOSTER.save_raw("ubj")),
        b' {\n "version": [3], "learner": {}}',
    ):
        assert XGBoostFrontend().sniff(data, path)
        assert not LightGBMFrontend().sniff(data, path)
    assert LightGBMFrontend().sniff(TEXT.encode(), path)
    for data in (TEXT.encode(), b"", b"{}", b'{"a": 1}', b"\x80\x04", b"PK\x03\x04"):
        assert not XGBoostFrontend().sniff(data, path)

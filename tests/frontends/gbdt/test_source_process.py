"""Model files against the library that wrote them, which runs in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb

import mlec
from mlec.errors import FrontendError, UsageError
from mlec.frontends import source_process
from mlec.frontends.base import LowerOptions
from mlec.frontends.select import load_model_file
from mlec.frontends.source_process import SourceProcess

rng = np.random.default_rng(0)
X = rng.normal(size=(200, 4))
X[rng.random(X.shape) < 0.1] = np.nan
Y = np.nan_to_num(X) @ [1.0, 2.0, 3.0, 4.0]
CLASSES = np.digitize(Y, [-1, 1])
FRAME = pd.DataFrame({"a": X[:, 0], "b": pd.Categorical(rng.choice(["u", "v", "w"], 200)), "c": X[:, 1]})
PLAIN = FRAME.astype({"b": object})


@pytest.fixture
def xgb_file(tmp_path: Path) -> Path:
    xgb.XGBRegressor(n_estimators=3, max_depth=2).fit(X, Y).save_model(tmp_path / "m.ubj")
    return tmp_path / "m.ubj"


def oracle_of(path: Path) -> Any:
    frontend, model = load_model_file(path, LowerOptions())
    return frontend.oracle(model)


@pytest.mark.parametrize("kind", ["xgb classifier", "xgb booster", "xgb categories", "lgb", "lgb categories"])
def test_a_file_answers_as_its_model(tmp_path: Path, kind: str) -> None:
    table: Any = X
    path = tmp_path / "model"
    methods = {"predict"}
    if kind == "xgb classifier":
        path = path.with_suffix(".json")
        model: Any = xgb.XGBClassifier(n_estimators=3).fit(X, CLASSES)
        methods = {"predict", "predict_proba"}
        model.save_model(path)
    elif kind == "xgb booster":
        path = path.with_suffix(".ubj")
        model = xgb.train({"max_depth": 3}, xgb.DMatrix(X, Y), 3)
        model.save_model(path)
        table = xgb.DMatrix(X)
    elif kind == "xgb categories":
        path = path.with_suffix(".ubj")
        model = xgb.XGBRegressor(n_estimators=3, enable_categorical=True).fit(FRAME, Y)
        model.save_model(path)
        table = FRAME
    else:
        table = FRAME if kind == "lgb categories" else X
        model = lgb.LGBMRegressor(n_estimators=3, verbose=-1).fit(table, Y)
        model.booster_.save_model(path)
    given = PLAIN if table is FRAME else X
    oracle = oracle_of(path)
    assert set(oracle) == methods
    for name, function in oracle.items():
        np.testing.assert_array_equal(function(given), getattr(model, name)(table))
    oracle.close()


def test_compiling_a_file_compares_it_with_the_library(xgb_file: Path) -> None:
    report = mlec.compile(xgb_file, progress=False).report
    assert report.parity["methods"]["predict"]["rows"] >= 256
    assert report.parity["methods"]["predict"]["max_abs_error"] == 0.0
    assert report.warnings == []


def test_compiling_a_file_without_the_library_says_so(xgb_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xgboost" else find(name))
    report = mlec.compile(xgb_file, progress=False).report
    assert report.parity == {}
    assert report.warnings == ["not compared with its source: install xgboost to compare"]
    assert "install xgboost to compare" in report.to_text()
    assert "install xgboost to compare" in report.to_html()


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
def test_a_file_that_the_library_refuses(library: str) -> None:
    kind = {"xgboost": "XGBRegressor", "lightgbm": "Booster"}[library]
    oracle = SourceProcess(library, kind, b"{not a model", ("predict",), "m.bin")
    with pytest.raises(FrontendError, match=f"{library} itself fails on m.bin") as failure:
        oracle["predict"](X)
    assert failure.value.code == "E_SOURCE_FAILS"


def test_a_table_that_the_library_refuses_does_not_end_the_process(xgb_file: Path) -> None:
    predict = oracle_of(xgb_file)["predict"]
    with pytest.raises(UsageError, match="predict: ValueError: Feature shape mismatch"):
        predict(X[:, :2])
    assert predict(X).shape == (200,)


def test_a_crash_of_the_library_is_an_error(xgb_file: Path) -> None:
    oracle = oracle_of(xgb_file)
    oracle["predict"](X)
    os.kill(oracle._process.pid, signal.SIGSEGV)
    with pytest.raises(FrontendError, match="died of SIGSEGV"):
        oracle["predict"](X)
    with pytest.raises(FrontendError, match="died of SIGSEGV"):
        oracle["predict"](X)


def test_a_library_that_hangs_is_an_error(xgb_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = oracle_of(xgb_file)
    oracle["predict"](X)
    monkeypatch.setattr(source_process, "SECONDS", 0.2)
    os.kill(oracle._process.pid, signal.SIGSTOP)
    with pytest.raises(FrontendError, match="took more than"):
        oracle["predict"](X)

    with pytest.raises(FrontendError, match="took more than"):
        oracle["predict"](X)


def test_an_interrupted_question_leaves_no_answer_to_the_next(xgb_file: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        _interrupted(oracle_of(xgb_file))
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(oracle: Any) -> None:
    oracle["predict"](X)
    os.kill(oracle._process.pid, signal.SIGSTOP)
    interrupt = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        oracle["predict"](X[:50])
    assert oracle._process.poll() == -signal.SIGKILL
    with pytest.raises(FrontendError, match="stopped when an earlier question was interrupted"):
        oracle["predict"](X)


def test_threads_get_their_own_answers(xgb_file: Path) -> None:
    oracle = oracle_of(xgb_file)
    tables = [X[:rows] for rows in range(1, 41)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(oracle["predict"], tables))
    wanted = oracle["predict"](X)
    for table, answer in zip(tables, answers, strict=True):
        np.testing.assert_array_equal(answer, wanted[: len(table)])


def test_the_memory_of_the_library_is_bounded(xgb_file: Path) -> None:
    oracle = oracle_of(xgb_file)
    oracle["predict"](X)
    limits = Path(f"/proc/{oracle._process.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert "unlimited" not in line


def test_the_process_ends_with_the_oracle(xgb_file: Path) -> None:
    oracle = oracle_of(xgb_file)
    process = oracle._process
    assert process.poll() is None
    del oracle
    assert process.poll() is not None

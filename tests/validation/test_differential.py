"""The comparison of a compiled model with its source finds what it should, and excuses only what it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightgbm import LGBMRegressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    BaggingClassifier,
    BaggingRegressor,
    RandomForestClassifier,
    StackingRegressor,
    VotingClassifier,
)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler
from xgboost import XGBRegressor

import mlec
from mlec.errors import MlecError, ToleranceError
from mlec.frontends.base import SourceMethods
from mlec.frontends.select import frontend_for
from mlec.validation import answers
from mlec.validation.differential import ESTIMATOR, TREES, blamed, compare, difference
from mlec.validation.probes import MAX_PROBE_ROWS, PROBE_ROWS, probe_inputs

X = np.arange(6.0)[:, None]
LABELS = np.array([0, 1, 0, 1, 0, 1])


class Answers:
    """A compiled model, as far as `compare` looks at one."""

    def __init__(self, labels: Any, proba: Any) -> None:
        self.predict = lambda table: np.asarray(labels)
        self.predict_proba = lambda table: np.asarray(proba)


def differing(proba: Any, mine: Any, tolerance: Any) -> Any:
    """The comparison of ``predict``, where the first label is another."""
    oracle = {"predict": lambda table: LABELS, "predict_proba": lambda table: np.asarray(proba)}
    found = compare(Answers(np.r_[1, LABELS[1:]], mine), oracle, [X], tolerance)  # type: ignore[arg-type]
    return next(c for c in found if c.method == "predict")


@pytest.mark.parametrize("tolerance", [TREES, ESTIMATOR])
def test_a_label_at_a_tie_is_excused_only_where_the_scores_differ_by_rounding(tolerance: Any) -> None:
    proba = np.tile([0.5, 0.5], (6, 1))
    assert differing(proba, proba, tolerance).label_mismatches == 1
    rounded = proba.copy()
    rounded[0] += [-(2.0**-53), 2.0**-53]
    found = differing(proba, rounded, tolerance)
    assert (found.label_mismatches, found.ties, found.excess) == (0, 1, 0.0)


def test_scores_further_apart_than_their_rounding_are_no_tie() -> None:
    proba = np.tile([0.5 + 1e-8, 0.5 - 1e-8], (6, 1))
    rounded = proba + np.array([-(2.0**-52), 2.0**-52])
    assert differing(proba, rounded, TREES).label_mismatches == 1
    assert differing(proba, rounded, TREES).excess == float("inf")


@pytest.mark.parametrize("metric", ["manhattan", "chebyshev", "euclidean"])
@pytest.mark.parametrize("algorithm", ["brute", "kd_tree"])
def test_neighbours_at_the_same_distance_are_left_out(metric: str, algorithm: str) -> None:
    grid = np.stack(np.meshgrid(range(6), range(6)), -1).reshape(-1, 2).astype(float)
    labels = np.arange(36) % 3
    settings = {"weights": "distance", "metric": metric, "algorithm": algorithm}
    for model in (KNeighborsClassifier(4, **settings), KNeighborsRegressor(5, **settings)):
        pipe = make_pipeline(MinMaxScaler((0, 5)), model).fit(grid, labels)
        oracle = frontend_for(pipe).oracle(pipe)
        assert isinstance(oracle, SourceMethods)
        assert oracle.decided is not None
        assert not oracle.decided(grid + 0.5).all()
        assert mlec.compile(pipe, grid + 0.5, progress=False).report.parity["methods"]["predict"]["excess"] <= 1


GRID = np.stack(np.meshgrid(range(9), range(9)), -1).reshape(-1, 2).astype(float)
KINDS = np.random.default_rng(0).integers(0, 3, 81)
KNN, KNNR = KNeighborsClassifier(4), KNeighborsRegressor(4)


@pytest.mark.parametrize(
    "model",
    [
        VotingClassifier([("near", KNN), ("line", LogisticRegression())], voting="soft"),
        VotingClassifier([("near", make_pipeline(MinMaxScaler(), KNN)), ("two", KNN), ("line", LogisticRegression())]),
        StackingRegressor([("near", KNNR), ("line", LinearRegression())], cv=3),
        make_pipeline(
            MinMaxScaler((0, 8)), StackingRegressor([("near", KNNR)], LinearRegression(), cv=3, passthrough=True)
        ),
        BaggingClassifier(KNN, 3, max_features=1, bootstrap=False, max_samples=0.8, random_state=0, n_jobs=2),
        BaggingRegressor(KNNR, 3, random_state=0),
        OneVsRestClassifier(KNN),
        CalibratedClassifierCV(KNN, cv=3),
        MultiOutputRegressor(KNNR),
    ],
    ids=lambda m: type(m).__name__,
)
def test_neighbours_inside_of_other_models_are_found(model: Any) -> None:
    target = np.c_[KINDS > 0, KINDS > 1].astype(int) if isinstance(model, MultiOutputRegressor) else KINDS
    model.fit(GRID, target)
    attributes = dict(vars(model))
    table = np.random.default_rng(1).integers(0, 17, (200, 2)) / 2
    oracle = frontend_for(model).oracle(model)
    assert isinstance(oracle, SourceMethods)
    assert oracle.decided is not None
    assert not oracle.decided(table).all()
    assert {name: id(v) for name, v in attributes.items()} == {name: id(v) for name, v in vars(model).items()}, (
        "the model itself stays as it is"
    )
    for method in mlec.compile(model, table, target="numpy", progress=False).report.parity["methods"].values():
        assert method["excess"] <= 1


def test_models_without_neighbours_are_decided_everywhere() -> None:
    model = make_pipeline(MinMaxScaler(), RandomForestClassifier(2)).fit(GRID, KINDS)
    oracle = frontend_for(model).oracle(model)
    assert isinstance(oracle, SourceMethods)
    assert oracle.decided is None


def test_a_tie_between_rows_of_the_same_target_is_decided() -> None:
    twice = np.repeat(X, 2, axis=0)
    model = KNeighborsClassifier(3).fit(twice, np.repeat(LABELS, 2))
    oracle = frontend_for(model).oracle(model)
    assert isinstance(oracle, SourceMethods)
    assert oracle.decided is not None
    np.testing.assert_array_equal(oracle.decided(np.array([[1.2], [1.0], [1.5]])), [True, True, False])
    bags = BaggingClassifier(KNeighborsClassifier(3), 10, random_state=0)
    rng = np.random.default_rng(0)
    bags.fit(rng.normal(size=(100, 2)), rng.integers(0, 2, 100))
    ours = frontend_for(bags).oracle(bags)
    assert isinstance(ours, SourceMethods)
    assert ours.decided is not None
    assert ours.decided(rng.normal(size=(50, 2))).all()


def test_the_error_says_what_of_which_result_differs() -> None:
    proba = np.eye(2)[LABELS]
    oracle = {"predict": lambda table: LABELS, "predict_proba": lambda table: proba}
    answers: Any = Answers(LABELS, 1 - proba)
    found = {c.method: c for c in compare(answers, oracle, [X], ESTIMATOR)}
    assert found["predict"].excess == 0
    assert difference(found["predict_proba"]) == "values differ on 6 rows, max error 1 (relative 1)"
    (labels,) = compare(Answers(1 - LABELS, None), {"predict": oracle["predict"]}, [X], ESTIMATOR)  # type: ignore[arg-type]
    assert difference(labels) == "6 different labels on 6 rows"


def test_a_difference_at_a_row_that_is_decided_is_still_one() -> None:
    model = KNeighborsClassifier(1).fit(X, LABELS)
    oracle = frontend_for(model).oracle(model)
    oracle.pop("predict_proba")  # type: ignore[attr-defined]
    rows = np.array([[0.5], [1.2], [4.9]])
    (found,) = compare(Answers([0, 0, 1], None), oracle, [rows], ESTIMATOR)  # type: ignore[arg-type]
    assert (found.rows, found.label_mismatches) == (2, 1)


@pytest.mark.parametrize(
    "model",
    [RandomForestClassifier(2), XGBRegressor(n_estimators=2), LGBMRegressor(n_estimators=2, verbose=-1)],
    ids=lambda m: type(m).__name__,
)
def test_trees_without_a_split(model: Any) -> None:
    assert (
        mlec.compile(model.fit(X, np.zeros(6, int)), progress=False).report.parity["methods"]["predict"]["excess"] == 0
    )


def test_probes_hold_every_threshold_and_both_floats_beside_it() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(300, 2)).astype(np.float32)
    model = RandomForestClassifier(5, max_depth=5, random_state=0).fit(data, data[:, 0] > data[:, 1])
    graph = mlec.lower(model)
    (table,) = probe_inputs(graph, 4096) or [None]
    (node,) = (n for n in graph.nodes if n.name == "tree_ensemble")
    feature, threshold = (graph.constant_value(v) for v in node.inputs[1:3])
    assert feature is not None
    assert threshold is not None
    for column in (0, 1):
        exact = np.unique(threshold[feature == column])
        wanted = np.concatenate([exact, *(np.nextafter(exact, np.float32(s)) for s in (-np.inf, np.inf))])
        # A few rows are overwritten by NaN.
        assert np.isin(wanted, table[:, column].astype(np.float32)).mean() > 0.9
        assert np.isnan(table[:, column]).any()


def test_probes_hold_the_codes_of_category_sets_and_infinity() -> None:
    rng = np.random.default_rng(0)
    data = np.c_[rng.integers(0, 6, 300), rng.normal(size=300)]
    model = XGBRegressor(n_estimators=3, enable_categorical=True, feature_types=["c", "q"], max_cat_to_onehot=2)
    model.fit(data, (data[:, 0] % 2) + data[:, 1])
    (table,) = probe_inputs(mlec.lower(model)) or [None]
    assert set(range(6)) <= set(table[:, 0])
    assert np.isinf(table[:, 1]).any()


def _forest() -> Any:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3000, 3)).astype(np.float32)
    return RandomForestClassifier(10, random_state=0).fit(table, rng.integers(0, 2, 3000))


def test_the_source_is_asked_once_about_all_probes() -> None:
    model = _forest()
    asked: list[int] = []

    def predict(table: Any) -> Any:
        asked.append(len(table))
        return model.predict(table)

    found = answers.ask(mlec.lower(model), {"predict": predict, "not_offered": lambda table: 1 / 0}, None)
    assert asked == [1, PROBE_ROWS, MAX_PROBE_ROWS, 1, 5]  # what a row costs; all; few
    assert [len(batch.inputs[0]) for batch in found.batches] == [MAX_PROBE_ROWS, 1, 5]
    assert (found.refused, found.shortened) == ("", "")
    assert found.timed is not None
    assert len(found.timed[0]) == PROBE_ROWS


def test_a_slow_source_is_asked_about_fewer_rows_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SOURCE_SECONDS", 1e-6)
    report = mlec.compile(_forest(), progress=False).report
    assert report.parity["methods"]["predict"]["rows"] == PROBE_ROWS
    assert report.parity["shortened"].startswith("256 of 4,096 rows, as the source takes ")
    for text in (report.to_text(), report.to_html()):
        assert "256 of 4,096 rows, as the source takes" in " ".join(text.split())


def test_all_targets_are_compared_with_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _forest()
    rows: list[int] = []
    monkeypatch.setattr(
        model, "predict", lambda table, own=model.predict: (rows.append(len(table)), own(table))[1], raising=False
    )
    mlec.compile(model, target="cpu:x86-64-v2,x86-64-v3", progress=False)
    assert rows.count(MAX_PROBE_ROWS) == 1


def test_probes_that_the_source_refuses_are_left_out() -> None:
    rng = np.random.default_rng(0)
    table = rng.uniform(0.1, 4.0, (60, 2))
    model = make_pipeline(FunctionTransformer(np.log), LinearRegression()).fit(table, table[:, 0])
    parity = mlec.compile(model, progress=False).report.to_dict()["parity"]
    assert "NaN" in parity["refused"] or "infinity" in parity["refused"]
    assert 0 < parity["methods"]["predict"]["rows"] < 200  # about a quarter of the rows is positive in both columns


def test_a_source_that_refuses_every_probe_asks_for_examples() -> None:
    table = np.random.default_rng(0).uniform(1.0, 2.0, (60, 40))  # no probe is positive in all columns
    model = make_pipeline(FunctionTransformer(np.log), LinearRegression()).fit(table, table[:, 0])
    with pytest.raises(mlec.MlecError, match="takes none of the inputs") as caught:
        mlec.compile(model, progress=False)
    assert "example_inputs" in str(caught.value.hint)
    assert mlec.compile(model, table, progress=False).report.to_dict()["parity"]["methods"]["predict"]["rows"] == 60


class Logarithm(torch.nn.Module):
    """Of the distance from the mean: few digits of it are right, and near 0 none."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.dtype is None else x.to(self.dtype)
        return torch.log((x - x.mean(-1, keepdim=True)).abs() + 1e-9)


def refused(model: torch.nn.Module | Path, x: torch.Tensor) -> MlecError:
    with pytest.raises(ToleranceError) as caught:
        mlec.compile(model, (x,))
    assert caught.value.code == "E_PARITY"
    return caught.value


def test_a_source_that_is_off_itself_is_named_as_the_cause(tmp_path: Path) -> None:
    x = torch.randn(32, 100, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    hint = str(refused(Logarithm(), x).hint)
    assert hint.startswith("the model magnifies the rounding of its own numbers")
    allowed = float(hint.partition("rtol=")[2].rstrip(")"))
    compiled = mlec.compile(Logarithm(), (x,), tolerance=mlec.Tolerance(rtol=allowed))  # what the hint says
    assert compiled.report.to_dict()["parity"]["methods"]["run"]["max_rel_error"] > 1e-4
    program = tmp_path / "logarithm.pt2"  # asked in a process of its own
    torch.export.save(torch.export.export(Logarithm(), (x,)), program)
    assert str(refused(program, x).hint) == hint
    # One that names float32 cannot be asked in float64.
    assert "unless the model magnifies" in str(refused(Logarithm(torch.float32), x).hint)


@pytest.mark.parametrize(
    ("source", "mine", "rounding"),
    [
        ([1.0, 2.5], [1.0, 1.2], True),
        ([1.0, 2.1], [1.0, 2.5], False),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([-np.inf, 2.1], [-np.inf, 2.2], True),
        ([1.0, 2.1], [-np.inf, 2.1], False),
    ],
)
def test_who_is_to_blame(source: list[float], mine: list[float], rounding: bool) -> None:
    class Mine:
        def run(self, inputs: Any) -> list[Any]:
            return [np.array(mine, np.float32)]

    asked = answers.Answered([X], {"run": [np.array(source, np.float32)]})
    found = blamed(Mine(), lambda inputs: [np.array([1.0, 2.0])], asked)  # type: ignore[arg-type]
    assert found is not None
    assert found.is_rounding is rounding

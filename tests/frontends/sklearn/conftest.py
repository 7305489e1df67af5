"""Differential tests of the scikit-learn frontend: the lowered graph, run by the reference interpreter, against the library."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_limits

from mlec.frontends.base import LowerOptions
from mlec.frontends.sklearn import SklearnFrontend
from mlec.ir import Graph, run_graph
from mlec.runtime import CompiledModel


class Interpreted:
    """Runs a graph by its numpy references."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return run_graph(self.graph, inputs)


class Lab:
    """Lowers estimators and compares every method with the source."""

    frontend = SklearnFrontend()

    def lower(self, model: Any, **options: Any) -> Graph:
        return self.frontend.lower(model, LowerOptions(**options))

    def compile(self, model: Any, **options: Any) -> CompiledModel:
        graph = self.lower(model, **options)
        assert all(str(node.loc) for node in graph.nodes), "a node without a location"
        return CompiledModel(graph.signature, Interpreted(graph))

    def check(
        self, model: Any, *tables: Any, rtol: float = 1e-11, ignore: tuple[str, ...] = (), **options: Any
    ) -> CompiledModel:
        """Every method on every table, and on its first 0 (where the source takes that), 1, 2 and 5 rows."""
        before = pickle.dumps(model)
        compiled = self.compile(model, **options)
        assert pickle.dumps(model) == before, "lowering changed the estimator"
        oracle = self.frontend.oracle(model)
        names = {spec.name for spec in compiled.signature.methods}
        assert names == set(oracle) - set(ignore), f"methods {names}, the source has {set(oracle)}"
        for table in tables:
            for rows in (len(table), 1, 2, 5):
                part = table[:rows]
                for name in names:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        expected = oracle[name](copy.deepcopy(part))
                    self.same(getattr(compiled, name)(part), expected, rtol, f"{name} of {rows} rows")
            self.same_form(compiled, oracle, table, names)
        return compiled

    def same(self, got: Any, expected: Any, rtol: float, where: str) -> None:
        assert isinstance(got, list) == isinstance(expected, list), where
        if isinstance(expected, list):
            assert len(got) == len(expected), where
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                self.same(g, e, rtol, f"{where}, output {i}")
            return
        if isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(got, expected, rtol=rtol, atol=rtol, obj=where)
            return
        expected = np.asarray(expected)
        assert got.shape == expected.shape, f"{where}: shape {got.shape}, the source's {expected.shape}"
        assert got.dtype == expected.dtype, f"{where}: dtype {got.dtype}, the source's {expected.dtype}"
        if expected.dtype.kind == "f":
            finite = expected[np.isfinite(expected)]
            scale = np.abs(finite).max(initial=0.0)
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * max(scale, 1e-300), err_msg=where)
        else:
            np.testing.assert_array_equal(got, expected, err_msg=where)

    def same_form(self, compiled: CompiledModel, oracle: Any, table: Any, names: set[str]) -> None:
        """No rows at all: shapes and dtypes as for one row."""
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = oracle[name](table[:1])
            got = getattr(compiled, name)(table[:0])
            whole = expected if isinstance(expected, list | pd.DataFrame) else np.asarray(expected)
            for g, e in zip(got, whole, strict=True) if isinstance(whole, list) else [(got, whole)]:
                assert g.shape == (0, *e.shape[1:]), name
                assert getattr(g, "dtype", None) == getattr(e, "dtype", None), name


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with threadpool_limits(1):  # the models are tiny: threads that wait for each other would take most of the time
        yield Lab()


def thresholds_of(model: Any) -> np.ndarray:
    """(feature, threshold) of every split of the sklearn trees in a model."""
    members = getattr(model, "estimators_", [model])
    trees = [m.tree_ for m in np.ravel(np.asarray(members, dtype=object))]
    return np.array([(f, t) for tree in trees for f, t in zip(tree.feature, tree.threshold, strict=True) if f >= 0])


@pytest.fixture(scope="session")
def around_thresholds() -> Any:
    """Rows that differ from given ones in one feature, which lies at a threshold or one step of float32 or float64 beside it."""

    def make(model: Any, base: np.ndarray, limit: int = 60, splits: np.ndarray | None = None) -> np.ndarray:
        pairs = thresholds_of(model) if splits is None else splits
        pairs = pairs[:: max(1, len(pairs) // limit)]
        rows = []
        for i, (feature, threshold) in enumerate(pairs):
            narrow = np.float32(threshold)
            for value in (
                threshold,
                np.nextafter(threshold, np.inf),
                np.nextafter(threshold, -np.inf),
                float(narrow),
                float(np.nextafter(narrow, np.float32(np.inf))),
                float(np.nextafter(narrow, np.float32(-np.inf))),
            ):
                row = base[i % len(base)].copy()
                row[int(feature)] = value
                rows.append(row)
        return np.array(rows)

    return make

"""How far outputs are apart, and what other labels cost."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.difference import Difference, probabilities


def test_a_label_counts_by_how_much_less_likely_it_is() -> None:
    wanted = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.45, 0.05], [0.1, 0.1, 0.8]]))
    got = wanted.copy()
    got[0, 0], got[1, 1] = -9.0, 9.0
    for scores in (wanted, wanted + 100, np.exp(wanted)):
        found = Difference()
        found.add(scores, got)
        assert (found.rows, found.changed, found.labels) == (3, 2, True)
        assert found.accuracy_loss == pytest.approx((0.5 + 0.05) / 3)


def test_batches_are_one() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(50, 4)).astype(np.float32)
    got = wanted + rng.normal(size=wanted.shape).astype(np.float32)
    whole, parts = Difference(), Difference()
    whole.add(wanted, got)
    for i in range(0, 50, 7):
        parts.add(wanted[i : i + 7], got[i : i + 7])
    for name in ("rows", "changed", "largest", "scale", "count"):
        assert getattr(whole, name) == getattr(parts, name)
    assert whole.error == pytest.approx(parts.error)
    assert whole.error == pytest.approx(np.sqrt(np.mean((wanted - got) ** 2.0) / np.mean(wanted**2.0)), rel=1e-5)
    assert whole.accuracy_loss == pytest.approx(parts.accuracy_loss)


def test_whole_numbers_are_labels() -> None:
    found = Difference()
    found.add(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4]))
    assert (found.labels, found.changed, found.accuracy_loss) == (True, 1, 0.25)


def test_a_column_of_numbers_has_no_labels() -> None:
    found = Difference()
    found.add(np.ones((3, 1)), np.full((3, 1), 1.1))
    assert not found.labels
    assert found.error == pytest.approx(0.1)


def test_what_was_never_finite_is_not_compared_and_what_gets_lost_is_without_bound() -> None:
    found = Difference()
    found.add(np.array([[np.nan, 1.0]]), np.array([[7.0, 1.0]]))
    assert found.error == 0
    found.add(np.array([[2.0, 1.0]]), np.array([[np.nan, 1.0]]))
    assert found.error == found.largest == np.inf


def test_scores_that_are_infinite_have_probabilities() -> None:
    found = probabilities(np.array([[np.inf, 0.0], [-np.inf, 0.0], [np.nan, 1.0]]))
    np.testing.assert_allclose(found, [[1, 0], [0, 1], [0, 1]])

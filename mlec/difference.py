"""How far one output of a model is from what it should be, batch after batch: errors, labels, and what other labels cost."""

from __future__ import annotations

import numpy as np

from mlec.ir.op import Array


class Difference:
    """What was seen of one output. Where the wanted numbers are not finite, there is nothing to compare with.

    Attributes:
        rows: how many.
        changed: rows ``[rows, classes]`` whose largest element is another one; of whole numbers, the elements that differ.
        labels: whether rows have labels: the numbers of a row are scores of classes, or it is a whole number.
        lost: sum over the rows of what other labels cost, see `accuracy_loss`.
        largest, total: of the errors: the largest one, and their sum.
        scale: the largest magnitude wanted.
        count: numbers compared.
    """

    def __init__(self) -> None:
        self.rows = self.changed = self.count = 0
        self.labels = False
        self.lost = self.largest = self.scale = self.total = self._power = self._error_power = 0.0

    def add(self, wanted: Array, got: Array) -> None:
        self.rows += len(wanted) if wanted.ndim else 1
        if wanted.dtype.kind not in "fV":
            changed = int((wanted != got).sum())
            self.labels = True
            self.changed += changed
            self.lost += changed / max(wanted.size, 1) * len(np.atleast_1d(wanted))
            return
        a, b = wanted.astype(np.float64), got.astype(np.float64)
        if a.ndim == 2 and a.shape[1] > 1 and a.size:
            self.labels = True
            old, new, rows = a.argmax(axis=1), b.argmax(axis=1), np.arange(len(a))
            self.changed += int((old != new).sum())
            likely = probabilities(a)
            self.lost += float(np.abs(likely[rows, old] - likely[rows, new]).sum())
        finite = np.isfinite(a)
        known = a[finite]
        error = np.abs(np.where(np.isfinite(b), b, np.inf)[finite] - known)
        self.count += error.size
        self.total += float(error.sum())
        self.largest = max(self.largest, float(error.max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(known).max(initial=0.0)))
        self._power += float(np.square(known).sum())
        self._error_power += float(np.square(error).sum())

    @property
    def accuracy_loss(self) -> float:
        """The part of the rows by which accuracy is expected to be less.

        A label that changes counts by how much less likely the new one is, as the wanted scores say: where two are about equally likely,
        either is right about as often.
        """
        return self.lost / max(self.rows, 1)

    @property
    def error(self) -> float:
        """Root mean square of the errors, relative to that of the numbers."""
        if self._error_power == 0:
            return 0.0
        return float(np.sqrt(self._error_power / self._power)) if self._power else float("inf")


def probabilities(scores: Array) -> Array:
    """Of classes, from scores ``[rows, classes]``: these themselves if they are probabilities, else their softmax; NaN is the least."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    if (known >= 0).all() and np.allclose(known.sum(axis=1), 1, atol=1e-3):
        return np.asarray(known)
    with np.errstate(invalid="ignore", over="ignore"):
        raised = np.exp(np.clip(known, -1e300, 1e300) - np.clip(known, -1e300, 1e300).max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))

"""The kernels with what is known of their time: measured where the model was run, predicted elsewhere; and their sums by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlec.reporting.schema import Kernel, ReportData

MOST_LAYERS = 40

_SCOPE = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True)
class Run:
    """One kernel.

    Attributes:
        kernel: what it is.
        predicted, measured: seconds of a call; at the extents that were measured, or at the nominal ones if nothing was.
        flops, bytes: of a call at these extents.
        live: bytes of the intermediate values that are alive while it runs; None where that is not known.
        share: of the time of all kernels, 0 to 1.
    """

    kernel: Kernel
    predicted: float | None
    measured: float | None
    flops: int
    bytes: int
    live: int | None = None
    share: float = 0.0

    @property
    def seconds(self) -> float:
        """What is known best."""
        return (self.predicted or 0.0) if self.measured is None else self.measured

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to what was measured."""
        return None if self.predicted is None or not self.measured else self.predicted / self.measured - 1


def runs(data: ReportData) -> list[Run]:
    """In the order in which they run."""
    measured = {kernel.symbol: kernel for kernel in data.profile.kernels}
    live = {step.symbol: step.live_bytes for step in data.memory.timeline.steps}
    found = []
    for kernel in data.kernels:
        one = measured.get(kernel.symbol)
        if one is not None:
            found.append(Run(kernel, one.predicted_seconds, one.seconds, one.flops, one.bytes, live.get(kernel.symbol)))
        elif not measured:
            found.append(
                Run(kernel, kernel.predicted_seconds, None, kernel.nominal_flops, kernel.nominal_bytes, live.get(kernel.symbol))
            )  # fmt: skip
    whole = sum(run.seconds for run in found)
    return [replace(run, share=run.seconds / whole if whole else 0.0) for run in found]


@dataclass
class Layer:
    """The kernels from one place in the model.

    Attributes:
        name: the path inside the model; the place in the source where there is none.
        seconds, weights, live: time, bytes of weights, and the most bytes of intermediate values at one time, of its kernels.
        share: of the time of all kernels.
    """

    name: str
    kernels: int = 0
    seconds: float = 0.0
    share: float = 0.0
    weights: int = 0
    live: int = 0


def layers(found: Sequence[Run]) -> list[Layer]:
    """In the order in which they run first; scopes are joined from the inside out until there are few."""
    for depth in range(8, 0, -1):
        grouped = _grouped(found, depth)
        if len(grouped) <= MOST_LAYERS:
            return grouped
    return grouped


def _grouped(found: Sequence[Run], depth: int) -> list[Layer]:
    grouped: dict[str, Layer] = {}
    for run in found:
        name = _name(run.kernel.location, depth)
        layer = grouped.setdefault(name, Layer(name))
        layer.kernels += 1
        layer.seconds += run.seconds
        layer.share += run.share
        layer.weights += run.kernel.weights_bytes
        layer.live = max(layer.live, run.live or 0)
    return list(grouped.values())


def short_place(location: str) -> str:
    """Of places in the source the paths inside the model, each once; the place itself where it has none."""
    places = (scope.group(1) if (scope := _SCOPE.search(part)) else part for part in location.split(" + "))
    return " + ".join(dict.fromkeys(places))


def _name(location: str, depth: int) -> str:
    """The scope of the first place, so many names deep."""
    first = location.partition(" + ")[0]
    scope = _SCOPE.search(first)
    name = scope.group(1) if scope else first
    return (".".join(name.split(".")[:depth]) if scope or "/" not in name else name) or "other"

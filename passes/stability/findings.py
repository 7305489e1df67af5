"""Findings: what the report says of the numerics of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlec.ir import Location
from mlec.ir.op import Array

Severity = Literal["error", "warning", "note"]
SEVERE = ("error", "warning")
MAX_LISTED = 4096
"""Elements of an input that are listed in full; of a larger one the words must do."""


@dataclass(frozen=True)
class Finding:
    """One finding, as the report holds it.

    Attributes:
        rule: its name, such as ``"softmax-by-hand"``.
        severity: "error": a finite result is lost; "warning": a result is undefined, wrong or inaccurate; "note": not shown, or out of the
            range of the element type for inputs that nobody said to occur.
        op: where the result comes out.
        location: in the user's code.
        danger: what goes wrong.
        input: the witness in words; empty without one.
        witness: the witness: for each input nested lists of numbers.
        shows: what comes out of it.
        error_before, error_after: relative to the output's scale, as it is and with the stable rewrites; None without a witness, infinite
            where a number is lost.
        rewrite: the stable spelling, if there is one.
        applied: whether it was rewritten.
        ranges: the range of each input within which was searched.
    """

    rule: str
    severity: Severity
    op: str
    location: Location
    danger: str
    input: str = ""
    witness: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    error_before: float | None = None
    error_after: float | None = None
    rewrite: str = ""
    applied: bool = False
    ranges: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For the report; see ``docs/report.md``."""
        places = [str(leaf) for leaf in self.location.leaves]
        return {
            "rule": self.rule,
            "severity": self.severity,
            "op": self.op,
            "location": places[0] if places else "",
            "locations": places,
            "message": self.danger,
            "input": self.input,
            "witness": self.witness,
            "shows": self.shows,
            "error_before": _number(self.error_before),
            "error_after": _number(self.error_after),
            "rewrite": self.rewrite,
            "applied": self.applied,
            "ranges": self.ranges,
        }


def _number(error: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "not finite" if error is not None and not math.isfinite(error) else error


def listed(array: Array) -> Any:
    """An input as JSON holds it, or None for a large one."""
    return array.tolist() if array.size <= MAX_LISTED else None


def warning_of(finding: Mapping[str, Any]) -> str:
    """One sentence for the terminal, of a severe finding that is still there; else an empty text."""
    if finding["severity"] not in SEVERE or finding["applied"]:
        return ""
    place = f" at {finding['location']}" if finding["location"] else ""
    stable = f"; {finding['rewrite']} is stable (--stabilize)" if finding["rewrite"] else ""
    return f"{finding['rule']}{place}: {finding['message']}; with {finding['input']}, {finding['shows']}{stable}"

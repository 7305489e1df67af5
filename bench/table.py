"""From timings to the table of the README."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from bench.harness import Timing

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def ratios(timings: Sequence[Timing]) -> dict[tuple[str, str, int, int], dict[str, float]]:
    """For each (group, case, batch, threads): seconds of each competitor divided by mlec's."""
    rows: dict[tuple[str, str, int, int], dict[str, float]] = defaultdict(dict)
    for t in timings:
        if not t.error and t.p50:
            rows[(t.group, t.case, t.batch, t.threads)][t.competitor] = t.p50
    return {key: {name: p50 / row["mlec"] for name, p50 in row.items()} for key, row in rows.items() if "mlec" in row}


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


class _Notes:
    """Reasons of missing figures, numbered in the order in which the table names them."""

    def __init__(self, timings: Sequence[Timing]) -> None:
        self._failed = [t for t in timings if t.error]
        self._numbers: dict[tuple[str, str], int] = {}

    def mark(self, competitor: str, case: str | None = None, batch: int | None = None, **where: str | int) -> str:
        """``(1)`` for each reason why the competitor has no figure there; empty when nothing failed."""
        found = [
            self._numbers.setdefault((competitor, t.error), len(self._numbers) + 1)
            for t in self._failed
            if t.competitor == competitor
            and case in (None, t.case)
            and (batch is None or t.batch in (0, batch))
            and all(getattr(t, key) == value for key, value in where.items())
        ]
        return " ".join(f"({number})" for number in dict.fromkeys(found))

    def lines(self) -> list[str]:
        """To stand below the table."""
        return [f"({number}) {competitor}: {reason}" for (competitor, reason), number in self._numbers.items()]


def _names(timings: Sequence[Timing]) -> list[str]:
    """The peers that ran or should have."""
    return [name for name in dict.fromkeys(t.competitor for t in timings) if name != "mlec"]


def markdown(timings: Sequence[Timing], title: str, skipped: Sequence[str] = ()) -> str:
    """One line for each case and batch: mlec's time, and how many times longer each peer takes; geometric means below.

    Where a peer failed, its cell holds the number of a note that says why.

    Args:
        skipped: cases for which no time was left.
    """
    found, names, notes = ratios(timings), _names(timings), _Notes(timings)
    ours = {(t.group, t.case, t.batch, t.threads): t.p50 for t in timings if t.competitor == "mlec" and not t.error}
    lines = [title, "", f"| model | batch | threads | mlec | {' | '.join(names)} |", f"|{'---|' * (4 + len(names))}"]
    for (group, case, batch, threads), row in found.items():
        cells = [
            f"{row[n]:.2f}x" if n in row else notes.mark(n, case, batch, group=group, threads=threads) for n in names
        ]
        time = seconds_text(ours[group, case, batch, threads])
        lines.append(f"| {case} | {batch} | {threads} | {time} | {' | '.join(cells)} |")
    for group, threads in dict.fromkeys((key[0], key[3]) for key in found):
        rows = [row for key, row in found.items() if (key[0], key[3]) == (group, threads)]
        cells = [_mean([row[n] for row in rows if n in row]) for n in names]
        lines.append(f"| **{group}, geometric mean** | | {threads} | | {' | '.join(cells)} |")
    lost = [f"mlec failed on {t.case}: {t.error}" for t in timings if t.competitor == "mlec" and t.error]
    return _with_notes(lines, [*notes.lines(), *lost, *_not_run(skipped)])


def summary(timings: Sequence[Timing], title: str, skipped: Sequence[str] = ()) -> str:
    """For each group the geometric mean over its cases and batches of how many times longer each peer takes.

    A peer that failed on some of them has the mean of the others, and a note.
    """
    found, names, notes = ratios(timings), _names(timings), _Notes(timings)
    lines = [title, "", f"| geometric mean | cases | {' | '.join(names)} |", f"|{'---|' * (2 + len(names))}"]
    for group, threads in dict.fromkeys((key[0], key[3]) for key in found):
        rows = [row for key, row in found.items() if (key[0], key[3]) == (group, threads)]
        cells = [
            f"{_mean([row[n] for row in rows if n in row])} {notes.mark(n, group=group, threads=threads)}".strip()
            for n in names
        ]
        lines.append(f"| {group}, threads: {threads} | {len(rows)} | {' | '.join(cells)} |")
    return _with_notes(lines, [*notes.lines(), *_not_run(skipped)])


def _with_notes(lines: list[str], notes: Sequence[str]) -> str:
    return "\n".join([*lines, *(["", *(f"{note}  " for note in notes)] if notes else [])])


def _not_run(skipped: Sequence[str]) -> list[str]:
    return [f"Not run, the time was spent: {', '.join(skipped)}"] if skipped else []


def _mean(values: list[float]) -> str:
    return f"**{geomean(values):.2f}x**" if values else ""


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def put_into(readme: str, table: str) -> str:
    """The README with the table between its two marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"

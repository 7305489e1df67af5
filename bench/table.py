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


def markdown(timings: Sequence[Timing], title: str) -> str:
    """One line for each case and batch: mlec's time, and how many times longer each peer takes; geometric means below."""
    found = ratios(timings)
    names = [
        n
        for n in dict.fromkeys(t.competitor for t in timings)
        if n != "mlec" and any(n in row for row in found.values())
    ]
    ours = {(t.group, t.case, t.batch, t.threads): t.p50 for t in timings if t.competitor == "mlec" and not t.error}
    lines = [title, "", f"| model | batch | threads | mlec | {' | '.join(names)} |", f"|{'---|' * (4 + len(names))}"]
    for key, row in found.items():
        cells = " | ".join(f"{row[n]:.2f}x" if n in row else "" for n in names)
        lines.append(f"| {key[1]} | {key[2]} | {key[3]} | {seconds_text(ours[key])} | {cells} |")
    for group in dict.fromkeys(key[0] for key in found):
        cells = " | ".join(_mean([row[n] for key, row in found.items() if key[0] == group and n in row]) for n in names)
        lines.append(f"| **{group}, geometric mean** | | | | {cells} |")
    return "\n".join(lines)


def summary(timings: Sequence[Timing], title: str) -> str:
    """For each group the geometric mean over its cases and batches of how many times longer each peer takes."""
    found = ratios(timings)
    competitors = dict.fromkeys(t.competitor for t in timings)
    names = [n for n in competitors if n != "mlec" and any(n in row for row in found.values())]
    lines = [title, "", f"| geometric mean | cases | {' | '.join(names)} |", f"|{'---|' * (2 + len(names))}"]
    for group, threads in dict.fromkeys((key[0], key[3]) for key in found):
        rows = [row for key, row in found.items() if (key[0], key[3]) == (group, threads)]
        cells = " | ".join(_mean([row[n] for row in rows if n in row]) for n in names)
        lines.append(f"| {group}, threads: {threads} | {len(rows)} | {cells} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"**{geomean(values):.2f}x**" if values else ""


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def put_into(readme: str, table: str) -> str:
    """The README with the table between its two marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"

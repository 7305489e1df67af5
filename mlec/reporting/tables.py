"""Tables of the page: on a narrow screen each cell carries its title; a click on a title sorts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlec.reporting import units
from mlec.reporting.markup import Child, Html, element, join


class Cell(NamedTuple):
    """What a cell shows, and the number that it is sorted by; None: below all numbers, or in a column without any by its text."""

    content: Child
    key: float | None = None


def table(titles: Sequence[str], rows: Sequence[Sequence[Cell]], kind: str, sortable: bool = True) -> Html:
    """A table; ``kind`` is its class."""
    body = [
        element(
            "tr",
            [
                element("td", _whole(cell.content), data_label=title or None, data_sort=cell.key)
                for title, cell in zip(titles, row, strict=True)
            ],
        )
        for row in rows
    ]
    head = element("tr", [element("th", title, scope="col") for title in titles])
    return element(
        "table",
        element("thead", head),
        element("tbody", body),
        class_=f"rows {kind}",
        data_sortable=sortable and len(rows) > 1,
    )


def _whole(content: Child) -> Html | None:
    """All of a cell as one element, beside which its title can stand; nothing where there is nothing."""
    return element("div", content) if join([content]) else None


QUANTIZATION = {
    "layer": "layer", "decision": "decision", "reason": "reason", "sqnr_db": "signal / error", "float32_us": "float32", "int8_us": "int8",
    "predicted_gain": "predicted gain", "output_error": "alone moves outputs by", "method": "method", "scale": "scale",
    "zero_point": "zero point", "weights": "weights", "op": "op",
}  # fmt: skip
"""The keys that have a place of their own, in the order of the columns, with their titles. Others follow under their own names."""


def quantization_rows(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Titles and rows of the table of layers: a column for each key that some layer has; the place stands below the layer."""
    occurring = dict.fromkeys(key for entry in entries for key, value in entry.items() if value is not None)
    keys = [key for key in QUANTIZATION if key in occurring]
    keys += [key for key in occurring if key not in QUANTIZATION and not (key == "location" and "layer" in occurring)]
    titles = [QUANTIZATION.get(key, key.replace("_", " ")) for key in keys]
    return titles, [[_cell(key, entry) for key in keys] for entry in entries]


def on_8_bits(entry: Mapping[str, Any]) -> bool:
    """Whether a layer, or its weights alone, are in 8 bits."""
    return entry.get("decision") in ("int8", "weights")


def quantization_line(entry: Mapping[str, Any]) -> str:
    """What the row of a layer says, in one line."""
    said = {key: _words(key, value) for key, value in entry.items() if value is not None and value != ""}
    head = ": ".join(said.pop(key) for key in ("layer", "decision") if key in said)
    if "layer" in entry and said.get("location") == str(entry["layer"]):
        del said["location"]
    reason = said.pop("reason", "")
    order = [*(key for key in QUANTIZATION if key in said), *(key for key in said if key not in QUANTIZATION)]
    rest = ", ".join(f"{QUANTIZATION.get(key, key.replace('_', ' '))} {said[key]}" for key in order)
    return "; ".join(part for part in (", ".join(filter(None, (head, reason))), rest) if part)


def _cell(key: str, entry: Mapping[str, Any]) -> Cell:
    value = entry.get(key)
    if value is None:
        return Cell(None)
    if key == "layer":
        place = str(entry.get("location") or "").removesuffix(f"({value})").rstrip()
        place = "" if place == str(value) else place
        return Cell([element("b", str(value)), element("div", place, class_="muted") if place else None])
    if key == "decision":
        return Cell(element("span", str(value), class_="chip good" if on_8_bits(entry) else "chip"))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Cell(_words(key, value))
    return Cell(_words(key, value), value)


def _words(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return " × ".join(map(str, value)) if key == "weights" and isinstance(value, list) else _text(value)
    if key == "output_error":
        return f"{value:.2%}"
    if key == "predicted_gain":
        return units.times(value)
    if key == "sqnr_db":
        return f"{value:.1f} dB"
    if key.endswith("_us"):
        return units.seconds(value / 1e6)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)

"""Builds HTML and SVG so that escaping cannot be forgotten: whatever is not `Html` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Html | Iterable[Html | None] | None

_EMPTY = frozenset({"meta", "input", "br", "circle", "line", "path", "rect"})


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """``element("td", text, class_="number", data_label="rows")``.

    Args:
        name: of the tag.
        children: strings are escaped, `Html` is kept, None is left out.
        attributes: a trailing underscore is dropped, other underscores become hyphens; None and False leave an attribute out, True gives it
            no value.
    """
    opening = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            opening.append(key)
        elif value is not None and value is not False:
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            opening.append(f'{key}="{html.escape(shown)}"')
    tag = " ".join(opening)
    return Html(f"<{tag}/>" if name in _EMPTY and not children else f"<{tag}>{join(children)}</{name}>")


def join(children: Iterable[Child], separator: str = "") -> Html:
    """The children one after another, escaped where they are plain text."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(html.escape(child))
        else:
            parts.append(join(child))
    return Html(separator.join(parts))

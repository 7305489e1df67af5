"""Draws a graph of the report as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlec.reporting import units
from mlec.reporting.graph_layout import Point, lay_out
from mlec.reporting.markup import Html, element
from mlec.reporting.schema import Picture, PictureNode, Roofline
from mlec.wording import plural

DRAWN_NODES = 3000
DRAWN_EDGES = 12_000
"""Larger graphs are shown as text: neither eye nor browser gains from the picture."""
MARGIN = 16.0
CHARACTER = 7.1
LINE = 16.0
LINE_CHARACTERS = 30
BODY_LINES = 3
CORNER = 6


def draw(picture: Picture, name: str, machine: Roofline | None, places: dict[str, int]) -> Html | None:
    """The picture; None when the graph is too large or empty.

    Args:
        picture: nodes and edges.
        name: distinguishes the pictures of one page.
        machine: nodes are shaded by their part of the time that its roofline predicts; None leaves them plain.
        places: numbers of the places in the source, which all pictures of a page share; new ones are added.
    """
    if not 0 < len(picture.nodes) <= DRAWN_NODES or len(picture.edges) > DRAWN_EDGES:
        return None
    nodes = {node.id: node for node in picture.nodes}
    labels = {key: _label_lines(node) for key, node in nodes.items()}
    sizes = {key: _size(labels[key], node.type) for key, node in nodes.items()}
    layout = lay_out(sizes, picture.edges)
    shares = _time_shares(picture.nodes, machine)
    arrow = f"arrow-{name}"
    width, height = layout.width + 2 * MARGIN, layout.height + 2 * MARGIN
    return element(
        "svg",
        element(
            "defs",
            element(
                "marker", element("path", d="M0 0 8 4 0 8z"), id=arrow, viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7,
                orient="auto",
            ),
        ),
        element(
            "g",
            element("g", [_edge(points, arrow) for points in layout.routes.values()], class_="edges"),
            element("g", [_node(nodes[k], labels[k], at, sizes[k], shares.get(k), places) for k, at in layout.centres.items()]),
            transform=f"translate({MARGIN:g} {MARGIN:g})",
        ),
        class_="graph", width=round(width), height=round(height), viewBox=f"0 0 {round(width)} {round(height)}", role="img",
        aria_label=f"graph {name} the passes: {plural(len(nodes), 'node')}",
    )  # fmt: skip


def _label_lines(node: PictureNode) -> list[str]:
    """The op; for inputs and outputs their name; for a fused node its ops, a few to the line."""
    words = [node.label or node.op] if node.op != "fused" else node.label.split(" + ")
    lines = [""]
    for i, word in enumerate(words):
        joined = f"{lines[-1]} + {word}" if lines[-1] else word
        if not lines[-1] or len(joined) <= LINE_CHARACTERS:
            lines[-1] = joined
        elif len(lines) < BODY_LINES:
            lines.append(f"+ {word}")
        else:
            lines.append(f"+ {len(words) - i} more")
            break
    return [_cut(line) for line in lines]


def _size(lines: Sequence[str], kind: str) -> tuple[float, float]:
    longest = max(*map(len, lines), 0.86 * len(_cut(kind)), 6)
    return longest * CHARACTER + 20, (len(lines) + 1) * LINE + 10


def _time_shares(nodes: Sequence[PictureNode], machine: Roofline | None) -> Mapping[str, float]:
    """By node, its part of the predicted time."""
    if machine is None or not machine.flops or not machine.bandwidth:
        return {}
    times = {
        n.id: max(n.flops / machine.flops, n.bytes / machine.bandwidth) + machine.kernel_seconds
        for n in nodes
        if n.flops or n.bytes
    }
    whole = sum(times.values())
    return {key: seconds / whole for key, seconds in times.items()} if whole else {}


def _node(
    node: PictureNode, lines: Sequence[str], at: Point, size: tuple[float, float], share: float | None, places: dict[str, int]
) -> Html:  # fmt: skip
    (x, y), (width, height) = at, size
    kind = node.op if node.op in ("input", "output", "fused") else "op"
    box = {
        "x": round(x - width / 2),
        "y": round(y - height / 2),
        "width": round(width),
        "height": round(height),
        "rx": CORNER if kind != "input" else height / 2,
    }
    if kind == "output":
        box["rx"] = height / 2
    first = y - height / 2 + LINE + 3
    texts = [element("text", line, x=round(x), y=round(first + i * LINE)) for i, line in enumerate(lines)]
    return element(
        "g",
        element("title", _described(node, share)),
        element("rect", **box),
        element("rect", **box, class_="heat", fill_opacity=round(min(1.0, share) ** 0.5 * 0.42, 3)) if share else None,
        texts,
        element("text", _cut(node.type), x=round(x), y=round(first + len(lines) * LINE), class_="type"),
        class_=f"node {kind}",
        tabindex=0,
        data_places=" ".join(str(places.setdefault(p, len(places))) for p in node.locations or (node.location,) if p)
        or None,
    )


def _described(node: PictureNode, share: float | None) -> str:
    lines = [f"{node.op}: {node.label}" if node.label not in ("", node.op) else node.op, node.type]
    lines += node.locations or (node.location,)
    if node.flops or node.bytes:
        lines.append(f"{units.count(node.flops, 'FLOP')}, {units.size(node.bytes)} moved")
    if share is not None:
        lines.append(f"{units.share(share)} of the predicted time")
    return "\n".join(line for line in dict.fromkeys(lines) if line)


def _edge(points: Sequence[Point], arrow: str) -> Html:
    """Curves between layers, straight lines across them."""
    path = [f"M{points[0][0]:.0f} {points[0][1]:.0f}"]
    for i in range(1, len(points)):
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        if i % 2:
            middle = (y0 + y1) / 2
            path.append(f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}")
        else:
            path.append(f"V{y1:.0f}")
    return element("path", d="".join(path), marker_end=f"url(#{arrow})")


def _cut(text: str) -> str:
    return text if len(text) <= LINE_CHARACTERS + 6 else f"{text[: LINE_CHARACTERS + 5]}…"

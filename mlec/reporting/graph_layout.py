"""Places the nodes of a directed graph in layers.

The steps of the classic layered drawing: longest-path layers, invisible nodes where an edge crosses a layer,
barycentre sweeps against crossings, and then coordinates: within a layer every node goes as near to its neighbours as the order and the
widths allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

BENDS_PER_NODE = 6
"""Invisible nodes for each node; the longest edges of a denser graph go straight through what is between."""
ORDER_SWEEPS = 10
POSITION_SWEEPS = 16
CHAIN_PULL = 12.0
GAP = 22.0
LANE = 10.0
FAN_GAP = 90.0
"""Most space that is added below a layer for edges that go far to the side."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Where everything is drawn.

    Attributes:
        centres: (x, y) of each node's centre.
        routes: for each edge, the points that it passes: from the bottom of its source to the top of its target.
        width, height: of the whole; all coordinates are within.
    """

    centres: Mapping[str, Point]
    routes: Mapping[tuple[str, str], Sequence[Point]]
    width: float
    height: float


def lay_out(
    sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]], row_gap: float = 34.0
) -> Layout:
    """Places nodes.

    Args:
        sizes: width and height of each node, in the order of the graph.
        edges: pairs of ids; repeated edges, loops, edges to unknown ids and edges that close a cycle are left out.
        row_gap: space between layers.
    """
    links = [(a, b) for a, b in dict.fromkeys(edges) if a in sizes and b in sizes and a != b]
    order, links = _topological(list(sizes), links)
    layer = _layers(order, links)
    names = {name: i for i, name in enumerate(order)}
    rows, chains, neighbours = _rows(order, layer, links)
    _reduce_crossings(rows, neighbours)
    widths = [sizes[name][0] for name in order]
    widths += [LANE] * (sum(map(len, rows)) - len(order))
    xs = _positions(rows, neighbours, widths, len(order))

    heights = [max((sizes[order[i]][1] for i in row if i < len(order)), default=0.0) for row in rows]
    tops, y = [], 0.0
    for row, height in zip(rows, heights, strict=True):
        tops.append(y)
        reach = max((abs(xs[m] - xs[k]) for m in row for k in neighbours.below[m]), default=0.0)
        y += height + row_gap + min(FAN_GAP, reach / 16)
    left = min((xs[i] - widths[i] / 2 for row in rows for i in row), default=0.0)
    right = max((xs[i] + widths[i] / 2 for row in rows for i in row), default=0.0)

    middle = {name: (xs[i] - left, tops[layer[name]] + heights[layer[name]] / 2) for name, i in names.items()}
    routes = {}
    for (a, b), chain in chains.items():
        (ax, ay), (bx, by) = middle[a], middle[b]
        points = [(ax, ay + sizes[a][1] / 2)]
        for step, dummy in enumerate(chain, start=layer[a] + 1):
            x = xs[dummy] - left
            points += [(x, tops[step]), (x, tops[step] + heights[step])]
        routes[a, b] = [*points, (bx, by - sizes[b][1] / 2)]
    return Layout(middle, routes, right - left, max(0.0, y - row_gap))


def _topological(names: Sequence[str], links: Sequence[tuple[str, str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """The nodes with every source before its targets, and the links that agree with it."""
    waiting = dict.fromkeys(names, 0)
    targets = defaultdict(list)
    for a, b in links:
        waiting[b] += 1
        targets[a].append(b)
    order = [name for name in names if not waiting[name]]
    for name in order:
        for b in targets[name]:
            waiting[b] -= 1
            if not waiting[b]:
                order.append(b)
    seen = set(order)
    order += [name for name in names if name not in seen]
    place = {name: i for i, name in enumerate(order)}
    return order, [(a, b) for a, b in links if place[a] < place[b]]


def _layers(order: Sequence[str], links: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from the top; a node without sources moves down to where it is first used."""
    sources, targets = defaultdict(list), defaultdict(list)
    for a, b in links:
        sources[b].append(a)
        targets[a].append(b)
    layer: dict[str, int] = {}
    for name in order:
        layer[name] = max((layer[a] + 1 for a in sources[name]), default=0)
    for name in order:
        if targets[name] and not sources[name]:
            layer[name] = min(layer[b] for b in targets[name]) - 1
    return layer


@dataclass(frozen=True)
class _Neighbours:
    above: Sequence[list[int]]
    below: Sequence[list[int]]


def _rows(
    order: Sequence[str], layer: Mapping[str, int], links: Sequence[tuple[str, str]]
) -> tuple[list[list[int]], dict[tuple[str, str], list[int]], _Neighbours]:
    """The members of each layer as numbers: nodes first, then the invisible ones; and the invisible ones of each link."""
    number = {name: i for i, name in enumerate(order)}
    rows: list[list[int]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for name in order:
        rows[layer[name]].append(number[name])
    above: list[list[int]] = [[] for _ in order]
    below: list[list[int]] = [[] for _ in order]
    chains: dict[tuple[str, str], list[int]] = {}
    bends = BENDS_PER_NODE * len(order)
    for a, b in sorted(links, key=lambda link: layer[link[1]] - layer[link[0]]):
        chain: list[int] = []
        previous = number[a]
        crossed = layer[b] - layer[a] - 1
        if crossed <= bends:
            bends -= crossed
            for row in range(layer[a] + 1, layer[b]):
                chain.append(len(above))
                above.append([previous])
                below.append([])
                below[previous].append(chain[-1])
                rows[row].append(chain[-1])
                previous = chain[-1]
        above[number[b]].append(previous)
        below[previous].append(number[b])
        chains[a, b] = chain
    return rows, chains, _Neighbours(above, below)


def _reduce_crossings(rows: Sequence[list[int]], neighbours: _Neighbours) -> None:
    """Sorts each layer by the mean place of its neighbours in the layers above, then below, and so on."""
    place = [0.0] * len(neighbours.above)
    for row in rows:
        for i, member in enumerate(row):
            place[member] = (i + 0.5) / len(row)
    for sweep in range(ORDER_SWEEPS):
        down = sweep % 2 == 0
        side = neighbours.above if down else neighbours.below
        for row in rows if down else reversed(rows):
            wanted = {m: sum(place[k] for k in side[m]) / len(side[m]) if side[m] else place[m] for m in row}
            row.sort(key=wanted.__getitem__)
            for i, member in enumerate(row):
                place[member] = (i + 0.5) / len(row)


def _positions(rows: Sequence[list[int]], neighbours: _Neighbours, widths: Sequence[float], nodes: int) -> list[float]:
    """x of each member; ``nodes`` is the number of visible ones."""
    xs = [0.0] * len(widths)
    for row in rows:
        x = -sum(widths[m] + GAP for m in row) / 2
        for member in row:
            xs[member] = x + (widths[member] + GAP) / 2
            x += widths[member] + GAP
    pulls = [_pulls(m, neighbours) for m in range(len(widths))]
    for sweep in range(POSITION_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [sum(pull * xs[k] for k, pull in pulls[m]) if pulls[m] else xs[m] for m in row]
            weights = [1.0 if m < nodes else 3.0 for m in row]
            for member, x in zip(row, _spread(wanted, weights, [widths[m] for m in row]), strict=True):
                xs[member] = x
    return xs


def _pulls(member: int, neighbours: _Neighbours) -> list[tuple[int, float]]:
    """The neighbours and how strongly each pulls, 1 in all: chains shall be straight, forks and joins may bend."""
    above, below = neighbours.above, neighbours.below
    strengths = [(k, CHAIN_PULL if len(above[member]) == 1 and len(below[k]) == 1 else 1.0) for k in above[member]]
    strengths += [(k, CHAIN_PULL if len(below[member]) == 1 and len(above[k]) == 1 else 1.0) for k in below[member]]
    whole = sum(strength for _, strength in strengths)
    return [(k, strength / whole) for k, strength in strengths]


def _spread(wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones (weighted least squares) that keep the order and do not overlap.

    With the distances that neighbours must keep subtracted, this is isotonic regression: pool adjacent violators.
    """
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP)
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for target, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, total, members = target - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, other_total, other_members = pools.pop()
            mean = (mean * total + other * other_total) / (total + other_total)
            total, members = total + other_total, members + other_members
        pools.append((mean, total, members))
    levels = [mean for mean, _, members in pools for _ in range(members)]
    return [level + offset for level, offset in zip(levels, offsets, strict=False)]

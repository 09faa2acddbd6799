"""Layered drawing of a directed acyclic graph.

Sugiyama, Tagawa & Toda 1981, "Methods for visual understanding of hierarchical system structures":
layers by longest path, order within a layer by barycentres, then coordinates; the last step places
each layer by isotonic regression, the least-squares answer under "keep the order and the gaps".
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Key = Hashable
Point = tuple[float, float]
Name = TypeVar("Name", bound=Hashable)

_ORDER_SWEEPS = 12
_PLACE_SWEEPS = 12


@dataclass
class Layout:
    """Top-left corners of boxes, and for each edge a polyline from source bottom to target top."""

    corners: dict[Key, Point] = field(default_factory=dict)
    routes: dict[tuple[Key, Key], list[Point]] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def layered(
    sizes: Mapping[Key, tuple[float, float]],
    edges: Iterable[tuple[Key, Key]],
    level: Mapping[Key, int],
    *,
    gap: float = 26.0,
    layer_gap: float = 38.0,
) -> Layout:
    """Place boxes of the given (width, height) in the rows that `level` (see `levels`) says.

    `sizes` lists the boxes in topological order. Edges that span several layers pass through points
    of their own in between, so that they go round boxes; edges of one source share them.
    """
    edges = list(dict.fromkeys(edges))
    layers, above, below, chains = _chained(sizes, edges, level)
    layers = _order(layers, above, below)
    width_of = {key: sizes[key][0] if key in sizes else 4.0 for key in above}
    centre = _centres(layers, above, below, width_of, gap)
    left = min((centre[k] - width_of[k] / 2 for k in centre), default=0.0)

    layout, top = Layout(), 0.0
    anchors: dict[Key, tuple[Point, Point]] = {}  # where edges enter and leave
    for layer in layers:
        height = max((sizes[k][1] for k in layer if k in sizes), default=0.0)
        for key in layer:
            x = centre[key] - left
            own = sizes[key][1] if key in sizes else height
            y = top + (height - own) / 2
            anchors[key] = (x, y), (x, y + own)
            if key in sizes:
                layout.corners[key] = (x - width_of[key] / 2, y)
            layout.width = max(layout.width, x + width_of[key] / 2)
        top += height + layer_gap
    layout.height = max(top - layer_gap, 0.0)
    for edge, chain in chains.items():
        points = [anchors[edge[0]][1]]
        for waypoint in chain[1:-1]:
            points += anchors[waypoint]
        layout.routes[edge] = [*points, anchors[edge[1]][0]]
    return layout


def rows(order: Sequence[Name], edges: Iterable[tuple[Name, Name]]) -> list[list[Name]]:
    """The nodes by level, in an order within each level that has few crossings; no coordinates.

    `order` is topological."""
    links: list[tuple[Key, Key]] = list(dict.fromkeys(edges))
    layers, above, below, _ = _chained(order, links, levels(order, links))
    own: dict[Key, Name] = {key: key for key in order}
    return [[own[k] for k in layer if k in own] for layer in _order(layers, above, below)]


def _chained(
    keys: Iterable[Key], edges: Sequence[tuple[Key, Key]], level: Mapping[Key, int]
) -> tuple[
    list[list[Key]],
    dict[Key, list[Key]],
    dict[Key, list[Key]],
    dict[tuple[Key, Key], list[Key]],
]:
    """Layers, neighbours above and below, and the chain of each edge, with a waypoint in every
    layer that an edge passes through."""
    layers: list[list[Key]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    above: dict[Key, list[Key]] = {}
    for key in keys:
        layers[level[key]].append(key)
        above[key] = []
    chains = {edge: [edge[0]] for edge in edges}
    for source, target in edges:
        for row in range(level[source] + 1, level[target]):
            waypoint: Key = (_Waypoint, source, row)
            if waypoint not in above:
                above[waypoint] = [chains[source, target][-1]]
                layers[row].append(waypoint)
            chains[source, target].append(waypoint)
        above[target].append(chains[source, target][-1])
        chains[source, target].append(target)
    below: dict[Key, list[Key]] = {key: [] for key in above}
    for key, sources in above.items():
        for source in sources:
            below[source].append(key)
    return layers, above, below, chains


def levels(order: Sequence[Key], edges: Iterable[tuple[Key, Key]]) -> dict[Key, int]:
    """Row of each node, so that edges point down: the length of the longest path to it.

    Nodes without inputs, and what only depends on one of them, move down to their first consumer.
    `order` is topological.
    """
    outgoing: dict[Key, list[Key]] = {key: [] for key in order}
    incoming: dict[Key, list[Key]] = {key: [] for key in order}
    for source, target in edges:
        outgoing[source].append(target)
        incoming[target].append(source)
    level = dict.fromkeys(order, 0)
    free: set[Key] = set()
    for key in order:
        if not incoming[key] or (len(set(incoming[key])) == 1 and incoming[key][0] in free):
            free.add(key)
        for target in outgoing[key]:
            level[target] = max(level[target], level[key] + 1)
    for key in reversed(order):
        if key in free and outgoing[key]:
            level[key] = min(level[target] for target in outgoing[key]) - 1
    return level


class _Waypoint:
    """Tag of the keys of points that long edges pass through."""


def _order(
    layers: list[list[Key]], above: Mapping[Key, list[Key]], below: Mapping[Key, list[Key]]
) -> list[list[Key]]:
    """Barycentre sweeps down and up; the order with the fewest crossings is kept."""
    best, fewest = layers, _crossings(layers, below)
    for sweep in range(_ORDER_SWEEPS):
        if fewest == 0:
            break
        down = sweep % 2 == 0
        neighbours = above if down else below
        place: dict[Key, float] = {}
        new: list[list[Key]] = []
        for layer in layers if down else reversed(layers):
            here = {key: float(i) for i, key in enumerate(layer)}
            weight = {key: _mean([place[n] for n in neighbours[key]], here[key]) for key in layer}
            ordered = sorted(layer, key=lambda key: weight[key])  # stable: ties keep their order
            place.update((key, float(i)) for i, key in enumerate(ordered))
            new.append(ordered)
        layers = new if down else new[::-1]
        crossings = _crossings(layers, below)
        if crossings < fewest:
            best, fewest = layers, crossings
    return best


def _crossings(layers: list[list[Key]], below: Mapping[Key, list[Key]]) -> int:
    """Number of crossing pairs of edges between neighbouring layers: inversions, by merge sort."""
    total = 0
    for upper, lower in zip(layers, layers[1:], strict=False):
        place = {key: i for i, key in enumerate(lower)}
        ends: list[int] = []
        for key in upper:
            ends += sorted(place[target] for target in below[key])
        total += _inversions(ends)[0]
    return total


def _inversions(values: list[int]) -> tuple[int, list[int]]:
    if len(values) < 2:
        return 0, values
    middle = len(values) // 2
    (a, left), (b, right) = _inversions(values[:middle]), _inversions(values[middle:])
    count, merged, i, j = a + b, [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            count += len(left) - i
            j += 1
    return count, merged + left[i:] + right[j:]


def _centres(
    layers: list[list[Key]],
    above: Mapping[Key, list[Key]],
    below: Mapping[Key, list[Key]],
    width: Mapping[Key, float],
    gap: float,
) -> dict[Key, float]:
    """Horizontal centres: each layer moves towards its neighbours' mean, without overlaps."""
    centre: dict[Key, float] = {}
    for layer in layers:
        centre.update(zip(layer, _place([0.0] * len(layer), layer, width, gap), strict=True))
    for sweep in range(_PLACE_SWEEPS):
        # Ends downwards: where boxes follow each other one by one, the line is straight.
        down = sweep % 2 == 1 or sweep == _PLACE_SWEEPS - 2
        for layer in layers if down else reversed(layers):
            first, second = (above, below) if down else (below, above)
            ends = [first[key] or second[key] or [key] for key in layer]
            wish = [_mean([centre[end] for end in those], 0.0) for those in ends]
            centre.update(zip(layer, _place(wish, layer, width, gap), strict=True))
    return centre


def _place(
    wish: Sequence[float], layer: Sequence[Key], width: Mapping[Key, float], gap: float
) -> list[float]:
    """Positions nearest to `wish` in least squares that keep the order and the gaps.

    With the minimal distances subtracted this is isotonic regression: pool adjacent violators.
    """
    offsets = [0.0]
    for a, b in zip(layer, layer[1:], strict=False):
        offsets.append(offsets[-1] + (width[a] + width[b]) / 2 + gap)
    pools: list[tuple[float, int]] = []  # (mean, members)
    for want, offset in zip(wish, offsets, strict=False):
        mean, count = want - offset, 1
        while pools and pools[-1][0] > mean:
            other, members = pools.pop()
            mean = (mean * count + other * members) / (count + members)
            count += members
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=False)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise

"""A graph by layers: groups in rows that follow the data, and a column for each phase.

Layers are what users think in: `layer1.0.conv1` lies in `layer1.0`, which lies in `layer1`. The
outline is that tree, with the groups inside each group in rows: data of the forward pass flows
down. In the columns beside, the backward pass of a layer stands next to the layer and flows up.
Its size grows with the nodes only, and any group can be folded to one box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphc.ir import SOURCES, Graph, Node
from graphc.viz.layout import rows
from graphc.viz.phases import phase_of

# (layer, phase): where a node stands
Place = tuple[str, str]
# Blocks alike that follow each other are one group more, from this many on.
REPEATED = 2


@dataclass
class Group:
    """A layer, or the common first part of several layers' names.

    path: that part of the name. rows: the groups inside, those of one row side by side; none for a
    layer. repeats: how many groups alike `rows` are, where the group was made for them.
    """

    path: str
    name: str
    rows: list[list[Group]] = field(default_factory=list)
    repeats: int = 0

    def leaves(self) -> Iterator[Group]:
        """The layers inside, from the top; the group itself if it is one."""
        if not self.rows:
            yield self
        for row in self.rows:
            for group in row:
                yield from group.leaves()


def is_inlined(node: Node) -> bool:
    """Whether a node is shown where it is used: parameters, states, constants, learning rates."""
    if node.op == "input":
        return node.types[0].shape == () and "default" in node.attrs
    return node.op == "constant" or (node.op in SOURCES and node.graph.is_read(node))


def place_of(node: Node) -> Place:
    """Layer and phase of a node."""
    return node.origin.layer, phase_of(node)


def outline(graphs: Sequence[Graph]) -> Group:
    """The layers of some versions of one graph as a tree; the first decides how they follow."""
    depth: dict[str, int] = {}
    kinds: dict[str, list[tuple]] = {}
    edges: dict[tuple[str, str], None] = {}
    for number, graph in enumerate(graphs):
        for layer, steps in _depths(graph).items():
            depth.setdefault(layer, steps)
        for node in graph:
            layer = node.origin.layer
            if number == 0:
                kinds.setdefault(layer, []).append((node.op, node.types))
            for value in node.inputs:
                source = value.node.origin.layer
                if number == 0 or not (layer in kinds and source in kinds):
                    edges.setdefault((source, layer))
    # Only what leads on: gradients go back, and a layer used twice would make a cycle.
    position = {layer: i for i, layer in enumerate(sorted(depth, key=depth.__getitem__))}
    onward = [(a, b) for a, b in edges if position[a] < position[b]]
    paths = {layer: tuple(layer.split(".")) for layer in position}
    return _tree((), list(position), paths, onward, kinds)


def _depths(graph: Graph) -> dict[str, int]:
    """How many operators lie before the end of each layer's forward part, from the inputs on."""
    depth: dict[str, int] = {}
    layers: dict[str, int] = {}
    for node in graph:
        steps = max((depth[v.node.name] for v in node.inputs), default=-1) + 1
        depth[node.name] = steps
        if phase_of(node) == "forward":
            layer = node.origin.layer
            layers[layer] = max(layers.get(layer, 0), steps)
    for node in graph:  # layers without a forward part come last
        layers.setdefault(node.origin.layer, len(graph))
    return layers


def _tree(
    path: tuple[str, ...],
    layers: list[str],
    paths: dict[str, tuple[str, ...]],
    edges: list[tuple[str, str]],
    kinds: dict[str, list[tuple]],
) -> Group:
    depth = len(path)
    inside: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        inside.setdefault(paths[layer][: depth + 1], []).append(layer)
    group = Group(".".join(path), path[-1] if path else "")
    if list(inside) == [path]:
        return group
    child_of = {layer: child for child, members in inside.items() for layer in members}
    links = [
        (child_of[a], child_of[b])
        for a, b in edges
        if a in child_of and b in child_of and child_of[a] != child_of[b]
    ]
    first = {child: i for i, child in enumerate(inside)}
    links = [(a, b) for a, b in links if first[a] < first[b]]
    made: dict[tuple[str, ...], Group] = {}
    for child, members in inside.items():
        if child == path:  # nodes of the group itself
            made[child] = Group(".".join(path), path[-1])
        else:
            made[child] = _tree(child, members, paths, edges, kinds)
    found = [[made[child] for child in row] for row in rows(list(inside), links)]
    group.rows = _with_repeats(found, kinds) if path else found
    return group


def _with_repeats(found: list[list[Group]], kinds: dict[str, list[tuple]]) -> list[list[Group]]:
    """Rows where a run of blocks alike, each a row of its own, is one group."""
    result: list[list[Group]] = []
    start = 0
    while start < len(found):
        end = start + 1
        if len(found[start]) == 1 and found[start][0].rows:
            look = _signature(found[start][0], kinds)
            while (
                end < len(found)
                and len(found[end]) == 1
                and _signature(found[end][0], kinds) == look
            ):
                end += 1
        if end - start >= REPEATED:
            first, last = found[start][0], found[end - 1][0]
            name = f"{first.name}–{last.name}"
            result.append([Group(f"{first.path}–{last.name}", name, found[start:end], end - start)])
        else:
            result += found[start:end]
        start = end
    return result


def _signature(group: Group, kinds: dict[str, list[tuple]]) -> tuple:
    below = len(group.path)
    return tuple((leaf.path[below:], tuple(kinds.get(leaf.path, ()))) for leaf in group.leaves())


class Cells:
    """The nodes of each layer and phase in rows that follow the data.

    Layers of one structure are ordered once."""

    def __init__(self) -> None:
        self._known: dict[tuple, list[list[Any]]] = {}

    def __call__(self, graph: Graph) -> dict[Place, list[list[Node]]]:
        members: dict[Place, list[Node]] = {}
        for node in graph:
            if not is_inlined(node):
                members.setdefault(place_of(node), []).append(node)
        return {place: self._rows(nodes) for place, nodes in members.items()}

    def _rows(self, nodes: list[Node]) -> list[list[Node]]:
        if len(nodes) == 1:
            return [nodes]
        number = {node.name: i for i, node in enumerate(nodes)}
        edges = tuple(
            (number[value.node.name], i)
            for i, node in enumerate(nodes)
            for value in node.inputs
            if value.node.name in number
        )
        key = (len(nodes), edges)
        if key not in self._known:
            self._known[key] = rows(range(len(nodes)), edges)
        return [[nodes[i] for i in row] for row in self._known[key]]

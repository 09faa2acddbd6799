"""A graph as a picture: boxes in layers, data flowing down.

Parameters and constants are lines inside the box that uses them, as are values that come from far
above (an activation that the backward pass needs again): drawn as edges, they would hide the graph.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphc.errors import GraphcError
from graphc.ir import SOURCES, Graph
from graphc.viz.box import BODY, Box, update_targets
from graphc.viz.by_layers import by_layers
from graphc.viz.formats import to_dot, to_graphml
from graphc.viz.layout import layered, levels
from graphc.viz.outline import Cells, Group, is_inlined
from graphc.viz.phases import COLOURS, EDGES, phase_of
from graphc.viz.scene import Curve, Painter, Rectangle, Scene, Shape, Text, text_width

MARGIN = 24.0
_FAR = 7  # layers; longer edges become a line of text in the box that they lead to
# Larger graphs are drawn by their layers, which takes a time proportional to their size.
LARGE = 250


@dataclass(frozen=True)
class Drawing:
    """A drawn graph. Jupyter shows it; `save` writes it as .svg, .png, .dot or .graphml."""

    graph: Graph

    def svg(self) -> str:
        """A standalone SVG document."""
        return scene(self.graph).svg()

    def _repr_svg_(self) -> str:
        return self.svg()

    def dot(self) -> str:
        """Graphviz source, with a cluster for each fused node."""
        return to_dot(self.graph)

    def graphml(self) -> str:
        """GraphML with op, types, phase and layer of each node, slot and output of each edge."""
        return to_graphml(self.graph)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture in the format of the suffix and return its path.

        Raises GraphcError for other suffixes, MissingExtraError for .png without matplotlib.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".png":
            scene(self.graph).save_png(path)
            return path
        writers = {".svg": self.svg, ".dot": self.dot, ".graphml": self.graphml}
        if suffix not in writers:
            raise GraphcError(f"{path}: pictures are .svg, .png, .dot or .graphml")
        path.write_text(writers[suffix](), encoding="utf-8")
        return path


def draw(graph: Any) -> Drawing:
    """A picture of a Graph, or of the compiled graph of an executable."""
    found = graph if isinstance(graph, Graph) else getattr(graph, "graph", None)
    if not isinstance(found, Graph):
        raise TypeError(f"draw: {type(graph).__name__} is neither a graph nor an executable")
    return Drawing(found)


# ---- the picture


def scene(graph: Graph, tree: Group | None = None, cells: Cells | None = None) -> Scene:
    """The shapes of the picture; for `tree` and `cells` see `by_layers`."""
    small = tree is None and len(graph) <= LARGE
    wide, high, paint = _by_rows(graph) if small else by_layers(graph, tree, cells)
    header = _header(graph, {phase_of(node) for node in graph})
    width = max(wide, header.width) + 2 * MARGIN
    picture = Scene(width, high + header.height + 2 * MARGIN, str(graph.name), header.shapes)
    picture.shapes += paint((width - wide) / 2, header.height + MARGIN)
    return picture


def _by_rows(graph: Graph) -> tuple[float, float, Painter]:
    """Width, height and shapes of a picture in rows, each node below what it reads."""
    phase: dict[Hashable, str] = {node.name: phase_of(node) for node in graph}
    inlined = {node.name for node in graph if is_inlined(node)}
    edges = [
        (value.node.name, node.name)
        for node in graph
        for value in node.inputs
        if value.node.name not in inlined
    ]
    outputs = {f"output {name}": value for name, value in graph.outputs.items()}
    edges += [(v.node.name, key) for key, v in outputs.items() if v.node.name not in inlined]
    drawn = [node.name for node in graph if node.name not in inlined]
    level = levels([*drawn, *outputs], edges)
    far = {(a, b) for a, b in edges if level[b] - level[a] > _FAR and b not in outputs}
    targets = update_targets(graph)
    boxes: dict[str, Box] = {
        node.name: Box(node, inlined, far, targets) for node in graph if node.name not in inlined
    }
    for key, value in outputs.items():
        boxes[key] = Box.pill(key.removeprefix("output "), value.type)
    near = [edge for edge in edges if edge not in far]
    layout = layered({key: box.size for key, box in boxes.items()}, near, level)

    def paint(left: float, top: float) -> Iterator[Shape]:
        for (_, target), points in layout.routes.items():
            moved = tuple((x + left, y + top) for x, y in points)
            yield Curve(moved, EDGES[phase.get(target, "forward")])
        for key, box in boxes.items():
            x, y = layout.corners[key]
            yield from box.shapes(x + left, y + top)

    return layout.width, layout.height, paint


def _header(graph: Graph, present: set[str]) -> Scene:
    """Name, size, and what the colours mean where there is more than one."""
    operators = sum(n.op not in SOURCES for n in graph)
    facts = f"{operators} operators"
    if parameters := len(graph.parameters):
        facts += f", {parameters} parameters"
    head = Scene(0, 26)
    x = MARGIN
    head.shapes.append(Text(x, MARGIN + 4, graph.name, 15, bold=True))
    x += text_width(graph.name, 15, bold=True) + 12
    head.shapes.append(Text(x, MARGIN + 4, facts, BODY, "#5a6772"))
    x += text_width(facts, BODY) + 8
    if len(present) > 1:
        x, head.height = MARGIN, 46
        for name in ("forward", "backward", "update"):
            if name in present:
                fill, stroke = COLOURS[name]
                head.shapes.append(Rectangle(x, MARGIN + 15, 11, 11, fill, stroke, 2.0))
                head.shapes.append(Text(x + 16, MARGIN + 24, name, BODY, "#5a6772"))
                x += 16 + text_width(name, BODY) + 16
    head.width = x - MARGIN
    return head

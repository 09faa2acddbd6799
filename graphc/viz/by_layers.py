"""A large graph as a picture: layers from the top down, forward and backward side by side."""

from __future__ import annotations

from collections.abc import Iterator

from graphc.ir import Graph
from graphc.viz.arrange import PAD, arrange
from graphc.viz.box import SMALL, Box, update_targets
from graphc.viz.outline import Cells, Group, is_inlined, outline
from graphc.viz.phases import COLOURS, EDGES, PHASES, phase_of
from graphc.viz.scene import Curve, Painter, Rectangle, Shape, Text

_ACROSS = "#d5dde6"  # what the backward pass reads of the forward pass


def by_layers(
    graph: Graph, tree: Group | None = None, cells: Cells | None = None
) -> tuple[float, float, Painter]:
    """Width, height and shapes of the picture.

    `tree` (default: the graph's own layers) and `cells` may be shared by several versions of one
    graph: what they have in common then stands in the same place."""
    drawn = {node.name: node for node in graph if not is_inlined(node)}
    inlined = {node.name for node in graph if node.name not in drawn}
    column = {name: PHASES.index(phase_of(node)) for name, node in drawn.items()}
    edges = dict.fromkeys(
        (value.node.name, name)
        for name, node in drawn.items()
        for value in node.inputs
        if value.node.name in drawn
    )
    targets = update_targets(graph)
    boxes = {name: Box(node, inlined, set(), targets) for name, node in drawn.items()}
    where = arrange(
        tree or outline([graph]),
        (cells or Cells())(graph),
        {name: box.size for name, box in boxes.items()},
    )

    def paint(left: float, top: float) -> Iterator[Shape]:
        for f in where.frames:
            x, y = f.x + left, f.y + top
            yield Rectangle(x, y, f.width, f.height, "#fbfcfd", _ACROSS, 6.0)
            yield Text(x + PAD, y + 12, f.group.path, SMALL, COLOURS[f.phase][1], bold=True)
        corners = {name: (x + left, y + top) for name, (x, y) in where.corners.items()}
        for source, target in edges:
            (x0, y0), (w0, h0) = corners[source], boxes[source].size
            (x1, y1), (w1, h1) = corners[target], boxes[target].size
            if column[source] != column[target]:
                ends = (x0 + w0, y0 + h0 / 2), (x1, y1 + h1 / 2)
                yield Curve(ends, _ACROSS, 0.8, sideways=True)
            else:
                down = y0 <= y1
                begin = x0 + w0 / 2, y0 + h0 if down else y0
                end = x1 + w1 / 2, y1 if down else y1 + h1
                yield Curve((begin, end), EDGES[PHASES[column[target]]])
        for name, box in boxes.items():
            yield from box.shapes(*corners[name])

    return where.width, where.height, paint

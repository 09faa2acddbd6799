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
from graphc.ir import ROWS, SOURCES, Graph, Node, TensorType, Value
from graphc.viz.formats import fused_operators, to_dot, to_graphml
from graphc.viz.layout import layered, levels
from graphc.viz.phases import COLOURS, EDGES, phase_of
from graphc.viz.scene import Curve, Rectangle, Scene, Text, text_width

_PAD, _LINE, _MARGIN = 9.0, 14.0, 24.0
_TITLE, _BODY, _SMALL = 12.0, 10.5, 9.0
_FAR = 7  # layers; longer edges become a line of text in the box that they lead to
_LONGEST = 46  # characters in a line
# Attributes that the types tell, that are internal, or at a value that goes without saying.
_UNSHOWN = {"shape", "dtype", "seed", "stream", "input_shape", "weight_shape"}
_SILENT = {"padding": 0, "stride": 1, "dilation": 1, "groups": 1, "keepdims": False}


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


def scene(graph: Graph) -> Scene:
    """The shapes of the picture."""
    phase: dict[Hashable, str] = {node.name: phase_of(node) for node in graph}
    inlined = {node.name for node in graph if _is_inlined(node)}
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
    boxes: dict[str, _Box] = {
        node.name: _Box(node, graph, inlined, far) for node in graph if node.name not in inlined
    }
    for key, value in outputs.items():
        boxes[key] = _Box.pill(key.removeprefix("output "), value.type)
    near = [edge for edge in edges if edge not in far]
    layout = layered({key: box.size for key, box in boxes.items()}, near, level)

    header = _header(graph, set(phase.values()))
    width = max(layout.width, header.width) + 2 * _MARGIN
    shift = (width - layout.width) / 2
    picture = Scene(width, layout.height + header.height + 2 * _MARGIN, str(graph.name))
    picture.shapes += header.shapes
    down = header.height + _MARGIN
    for (_, target), points in layout.routes.items():
        moved = tuple((x + shift, y + down) for x, y in points)
        picture.shapes.append(Curve(moved, EDGES[phase.get(target, "forward")]))
    for key, box in boxes.items():
        x, y = layout.corners[key]
        picture.shapes += box.shapes(x + shift, y + down)
    return picture


def _is_inlined(node: Node) -> bool:
    """Whether a node is shown where it is used: parameters, states, constants, learning rates."""
    if node.op == "input":
        return node.types[0].shape == () and "default" in node.attrs
    return node.op == "constant" or (node.op in SOURCES and node.graph.nx.out_degree(node.name) > 0)


class _Box:
    """One node: lines of text, and for a fused node an inner box for each operator in it."""

    def __init__(
        self, node: Node, graph: Graph, inlined: set[str], far: set[tuple[str, str]]
    ) -> None:
        self.kind = "input" if node.op == "input" else phase_of(node)
        self.tooltip = repr(node)
        fused = fused_operators(node)
        op = fused[0].op if len(fused) == 1 else "" if fused else node.op
        self.title, self.op = _shorten(node.name), "" if op == node.name else op
        attributes = "" if node.op in (*SOURCES, "fused") else _attributes(node)
        self.details = [attributes] if attributes else []
        self.details += [_shorten(_type_and_layout(value)) for value in node.outputs[:3]]
        self.notes = list(_notes(node, graph, inlined, far))
        self.inner = [_inner_line(n) for n in fused] if len(fused) > 1 else []
        self.size = self._measure()

    @classmethod
    def pill(cls, name: str, type_: TensorType) -> _Box:
        box = cls.__new__(cls)
        box.kind, box.tooltip, box.title, box.op = "output", f"output {name}", name, str(type_)
        box.details, box.notes, box.inner = [], [], []
        box.size = box._measure()
        return box

    def _measure(self) -> tuple[float, float]:
        title = text_width(self.title, _TITLE, bold=True)
        title += 7 + text_width(self.op, _BODY) if self.op else 0
        width = max(
            [title]
            + [text_width(t, _BODY) for t in self.details]
            + [text_width(t, _SMALL) for t in self.notes]
            + [text_width(t, _SMALL) + 14 for t in self.inner]
        )
        rows = 1 + len(self.details) + len(self.notes)
        inner = len(self.inner) * (_LINE + 4) + (4 if self.inner else 0)
        height = rows * _LINE + inner + 2 * _PAD - 4
        return width + 2 * _PAD, height

    def shapes(self, x: float, y: float) -> Iterator[Rectangle | Text]:
        fill, stroke = COLOURS[self.kind]
        width, height = self.size
        pill = self.kind in ("input", "output")
        radius = height / 2 if pill and height < 40 else 5.0
        ink = "#ffffff" if self.kind == "output" else "#1b2733"
        faint = "#cfd8dc" if self.kind == "output" else "#5a6772"
        yield Rectangle(x, y, width, height, fill, stroke, radius, self.tooltip)
        left, row = x + _PAD, y + _PAD + 8
        yield Text(left, row, self.title, _TITLE, ink, bold=True)
        if self.op:
            after = left + text_width(self.title, _TITLE, bold=True) + 7
            yield Text(after, row, self.op, _BODY, faint if pill else stroke)
        for line in self.inner:
            row += _LINE + 4
            yield Rectangle(left, row - 11, width - 2 * _PAD, _LINE + 1, "#ffffff", stroke, 3.0)
            yield Text(left + 6, row, line, _SMALL)
        row += 4 if self.inner else 0
        for line in self.details:
            row += _LINE
            yield Text(left, row, line, _BODY, "#33414d")
        for line in self.notes:
            row += _LINE
            yield Text(left, row, line, _SMALL, faint)


def _notes(node: Node, graph: Graph, inlined: set[str], far: set[tuple[str, str]]) -> Iterator[str]:
    for value in node.inputs:
        source = value.node
        if source.op == "constant":
            yield _shorten(f"constant {_constant(source)}")
        elif source.name in inlined:
            name = source.name.removeprefix(f"{node.origin.layer}.")
            yield _shorten(f"{name}  {value.type}")
        elif (source.name, node.name) in far:
            yield _shorten(f"↑ {value.name}  {value.type}")
    targets = [name for name, value in graph.updates.items() if value.node is node]
    if targets:
        more = f" and {len(targets) - 2} more" if len(targets) > 2 else ""
        yield _shorten(f"→ {', '.join(targets[:2])}{more}")


def _constant(node: Node) -> str:
    value = node.attrs["value"]
    return f"{value.item():.6g}" if value.size == 1 else str(node.types[0])


def _attributes(node: Node) -> str:
    """The attributes that say something: set, short, and not in the result's type."""
    shown = []
    for key, value in node.attrs.items():
        while isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1:
            value = value[0]  # (2, 2) and ((2, 2), (2, 2)) are 2
        if value is None or (key in _SILENT and value == _SILENT[key]):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if key not in _UNSHOWN and len(text) <= 20:
            shown.append(f"{key.replace('_', ' ')} {text}")
    return _shorten(", ".join(shown))


def _type_and_layout(value: Value) -> str:
    return str(value.type) if value.layout == ROWS else f"{value.type} {value.layout}"


def _inner_line(node: Node) -> str:
    name = f"{node.name} · " if not node.name.startswith(node.op) else ""
    return _shorten(f"{name}{node.op}  {', '.join(map(str, node.types))}")


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _header(graph: Graph, present: set[str]) -> Scene:
    """Name, size, and what the colours mean where there is more than one."""
    operators = sum(n.op not in SOURCES for n in graph)
    facts = f"{operators} operators"
    if parameters := len(graph.parameters):
        facts += f", {parameters} parameters"
    head = Scene(0, 26)
    x = _MARGIN
    head.shapes.append(Text(x, _MARGIN + 4, graph.name, 15, bold=True))
    x += text_width(graph.name, 15, bold=True) + 12
    head.shapes.append(Text(x, _MARGIN + 4, facts, _BODY, "#5a6772"))
    x += text_width(facts, _BODY) + 8
    if len(present) > 1:
        x, head.height = _MARGIN, 46
        for name in ("forward", "backward", "update"):
            if name in present:
                fill, stroke = COLOURS[name]
                head.shapes.append(Rectangle(x, _MARGIN + 15, 11, 11, fill, stroke, 2.0))
                head.shapes.append(Text(x + 16, _MARGIN + 24, name, _BODY, "#5a6772"))
                x += 16 + text_width(name, _BODY) + 16
    head.width = x - _MARGIN
    return head

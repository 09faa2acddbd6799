"""The box of a node: what it says, how large that is, the shapes it is drawn with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graphc.ir import ROWS, SOURCES, Graph, Node, TensorType, Value
from graphc.viz.formats import fused_operators
from graphc.viz.phases import COLOURS, phase_of
from graphc.viz.scene import Rectangle, Text, text_width

PAD, LINE = 9.0, 14.0
TITLE, BODY, SMALL = 12.0, 10.5, 9.0
_LONGEST = 46  # characters in a line
# Attributes that the types tell, that are internal, or at a value that goes without saying.
_UNSHOWN = {"shape", "dtype", "seed", "stream", "input_shape", "weight_shape"}
_SILENT = {"padding": 0, "stride": 1, "dilation": 1, "groups": 1, "keepdims": False}


class Box:
    """One node: lines of text, and for a fused node an inner box for each operator in it."""

    def __init__(
        self,
        node: Node,
        inlined: set[str],
        far: set[tuple[str, str]],
        targets: Mapping[str, list[str]],
    ) -> None:
        """inlined: nodes named where they are used. far: (from, to) of edges that are not drawn.
        targets: see `update_targets`."""
        self.kind = "input" if node.op == "input" else phase_of(node)
        self.tooltip = f"{node.describe()}\n{node.origin.layer}"
        fused = fused_operators(node)
        op = fused[0].op if len(fused) == 1 else "" if fused else node.op
        self.title, self.op = _shorten(node.name), "" if op == node.name else op
        attributes = "" if node.op in (*SOURCES, "fused") else _attributes(node)
        self.details = [attributes] if attributes else []
        self.details += [_shorten(_type_and_layout(value)) for value in node.outputs[:3]]
        self.notes = list(_notes(node, inlined, far, targets.get(node.name, [])))
        self.inner = [_inner_line(n) for n in fused] if len(fused) > 1 else []
        self.size = self._measure()

    @classmethod
    def pill(cls, name: str, type_: TensorType) -> Box:
        box = cls.__new__(cls)
        box.kind, box.tooltip, box.title, box.op = "output", f"output {name}", name, str(type_)
        box.details, box.notes, box.inner = [], [], []
        box.size = box._measure()
        return box

    def _measure(self) -> tuple[float, float]:
        title = text_width(self.title, TITLE, bold=True)
        title += 7 + text_width(self.op, BODY) if self.op else 0
        width = max(
            [title]
            + [text_width(t, BODY) for t in self.details]
            + [text_width(t, SMALL) for t in self.notes]
            + [text_width(t, SMALL) + 14 for t in self.inner]
        )
        rows = 1 + len(self.details) + len(self.notes)
        inner = len(self.inner) * (LINE + 4) + (4 if self.inner else 0)
        height = rows * LINE + inner + 2 * PAD - 4
        return width + 2 * PAD, height

    def shapes(self, x: float, y: float) -> Iterator[Rectangle | Text]:
        fill, stroke = COLOURS[self.kind]
        width, height = self.size
        pill = self.kind in ("input", "output")
        radius = height / 2 if pill and height < 40 else 5.0
        ink = "#ffffff" if self.kind == "output" else "#1b2733"
        faint = "#cfd8dc" if self.kind == "output" else "#5a6772"
        yield Rectangle(x, y, width, height, fill, stroke, radius, self.tooltip)
        left, row = x + PAD, y + PAD + 8
        yield Text(left, row, self.title, TITLE, ink, bold=True)
        if self.op:
            after = left + text_width(self.title, TITLE, bold=True) + 7
            yield Text(after, row, self.op, BODY, faint if pill else stroke)
        for line in self.inner:
            row += LINE + 4
            yield Rectangle(left, row - 11, width - 2 * PAD, LINE + 1, "#ffffff", stroke, 3.0)
            yield Text(left + 6, row, line, SMALL)
        row += 4 if self.inner else 0
        for line in self.details:
            row += LINE
            yield Text(left, row, line, BODY, "#33414d")
        for line in self.notes:
            row += LINE
            yield Text(left, row, line, SMALL, faint)


def update_targets(graph: Graph) -> dict[str, list[str]]:
    """The parameters and states that a node computes new values of, by name of the node."""
    found: dict[str, list[str]] = {}
    for name, value in graph.updates.items():
        found.setdefault(value.node.name, []).append(name)
    return found


def _notes(
    node: Node, inlined: set[str], far: set[tuple[str, str]], targets: list[str]
) -> Iterator[str]:
    for value in node.inputs:
        source = value.node
        if source.op == "constant":
            yield _shorten(f"constant {_constant(source)}")
        elif source.name in inlined:
            name = source.name.removeprefix(f"{node.origin.layer}.")
            yield _shorten(f"{name}  {value.type}")
        elif (source.name, node.name) in far:
            yield _shorten(f"↑ {value.name}  {value.type}")
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

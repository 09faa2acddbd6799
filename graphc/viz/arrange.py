"""Coordinates of the boxes in an outline with every group open (a page folds in the browser)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphc.ir import Node
from graphc.viz.outline import Group, Place
from graphc.viz.phases import PHASES

GAP, LAYER_GAP, PAD, TITLE, COLUMN_GAP = 16.0, 20.0, 8.0, 15.0, 60.0


@dataclass(frozen=True)
class Frame:
    """The part of a group in one column: a rectangle around its boxes."""

    x: float
    y: float
    width: float
    height: float
    group: Group
    phase: str


@dataclass
class Arrangement:
    """Top-left corners of boxes by name of the node, and the frames around them."""

    corners: dict[str, tuple[float, float]] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def arrange(
    tree: Group,
    cells: Mapping[Place, list[list[Node]]],
    sizes: Mapping[str, tuple[float, float]],
) -> Arrangement:
    """Place the boxes of the given (width, height), by name of the node."""
    arranger = _Arranger(cells, sizes)
    extent = arranger.measure(tree)
    left, lefts = 0.0, []
    for width in extent.widths:
        lefts.append(left)
        left += width + COLUMN_GAP if width else 0.0
    arranger.result.width = max(left - COLUMN_GAP, 0.0)
    arranger.result.height = extent.height
    arranger.put(tree, lefts, 0.0, extent)
    return arranger.result


@dataclass(frozen=True)
class _Extent:
    """Width in each column, and the height that the columns share. Nothing has the height 0."""

    widths: tuple[float, ...]
    height: float


class _Arranger:
    def __init__(
        self,
        cells: Mapping[Place, list[list[Node]]],
        sizes: Mapping[str, tuple[float, float]],
    ) -> None:
        self.cells, self.sizes = cells, sizes
        self.result = Arrangement()
        self.known: dict[int, _Extent] = {}

    def measure(self, group: Group) -> _Extent:
        if id(group) not in self.known:
            extent = self._of_groups(group) if group.rows else self._of_boxes(group)
            if extent.height and self.framed(group):
                extent = _Extent(
                    tuple(w + 2 * PAD if w else 0.0 for w in extent.widths),
                    extent.height + 2 * PAD + TITLE,
                )
            self.known[id(group)] = extent
        return self.known[id(group)]

    def framed(self, group: Group) -> bool:
        """Whether a group has a frame of its own: not around a single box in each column."""
        if group.rows:
            return bool(group.path)
        return any(sum(map(len, self.cell(group, phase))) > 1 for phase in PHASES)

    def cell(self, group: Group, phase: str) -> list[list[Node]]:
        return self.cells.get((group.path, phase), [])

    def _of_groups(self, group: Group) -> _Extent:
        widths, height = [0.0] * len(PHASES), 0.0
        for row in self.present(group):
            for column in range(len(PHASES)):
                widths[column] = max(widths[column], self._row_width(row, column))
            height += max(self.measure(child).height for child in row) + LAYER_GAP
        return _Extent(tuple(widths), max(height - LAYER_GAP, 0.0))

    def present(self, group: Group) -> list[list[Group]]:
        """The rows of a group, without groups that have no box."""
        rows = [[child for child in row if self.measure(child).height] for row in group.rows]
        return [row for row in rows if row]

    def _row_width(self, row: list[Group], column: int) -> float:
        wide = [w for child in row if (w := self.measure(child).widths[column])]
        return sum(wide) + GAP * max(len(wide) - 1, 0)

    def _of_boxes(self, group: Group) -> _Extent:
        found = [self._cell_size(self.cell(group, phase)) for phase in PHASES]
        return _Extent(tuple(w for w, _ in found), max(h for _, h in found))

    def _cell_size(self, cell: list[list[Node]]) -> tuple[float, float]:
        wide, high = 0.0, 0.0
        for row in cell:
            wide = max(wide, sum(self.sizes[n.name][0] + GAP for n in row) - GAP)
            high += max(self.sizes[n.name][1] for n in row) + LAYER_GAP
        return wide, max(high - LAYER_GAP, 0.0)

    def put(self, group: Group, lefts: list[float], top: float, extent: _Extent) -> None:
        """Place an open group whose columns begin at `lefts`."""
        height = extent.height
        if self.framed(group):
            for column, phase in enumerate(PHASES):
                if width := extent.widths[column]:
                    self.result.frames.append(
                        Frame(lefts[column], top, width, height, group, phase)
                    )
            top, height = top + PAD + TITLE, height - 2 * PAD - TITLE
        if not group.rows:
            for column, phase in enumerate(PHASES):
                self._put_boxes(group, phase, lefts[column], extent.widths[column], top, height)
            return
        for row in self.present(group):
            tall = max(self.measure(child).height for child in row)
            starts = [
                left + (width - self._row_width(row, column)) / 2
                for column, (left, width) in enumerate(zip(lefts, extent.widths, strict=True))
            ]
            for child in row:
                own = self.measure(child)
                self.put(child, list(starts), top + (tall - own.height) / 2, own)
                moved = [w + GAP if w else 0.0 for w in own.widths]
                starts = [start + w for start, w in zip(starts, moved, strict=True)]
            top += tall + LAYER_GAP

    def _put_boxes(
        self, group: Group, phase: str, left: float, width: float, top: float, height: float
    ) -> None:
        cell = self.cell(group, phase)
        y = top + (height - self._cell_size(cell)[1]) / 2
        for row in reversed(cell) if phase == "backward" else cell:
            whole = sum(self.sizes[n.name][0] + GAP for n in row) - GAP
            x, tall = left + (width - whole) / 2, max(self.sizes[n.name][1] for n in row)
            for node in row:
                wide, high = self.sizes[node.name]
                self.result.corners[node.name] = (x, y + (tall - high) / 2)
                x += wide + GAP
            y += tall + LAYER_GAP

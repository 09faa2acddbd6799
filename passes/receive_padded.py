"""Receive small inputs where their padding has been written already."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import ROWS, Graph, Node
from passes.base import Pass, note


@dataclass(frozen=True)
class ReceivePadded(Pass):
    """Mark the region that pads an input, where nothing else reads the input.

    Requires: fused regions, layouts assigned. Ensures: the same graph; marked regions have the
    attributes `prepared`, so that they run when parameters are loaded and keep their value, and
    `interior`, the slices of the padded value that the executable copies the input to at every
    call. Inputs of more than `most_bytes` are left alone: the executable does not copy them.
    """

    most_bytes: int

    def run(self, graph: Graph) -> Graph:
        if not any(map(_padding, graph)):
            return graph
        new = graph.copy()
        results = set(new.results)
        for node in new.inputs.values():
            readers = new.users(node[0])
            if len(readers) != 1 or node[0] in results or node.types[0].nbytes > self.most_bytes:
                continue
            reader = readers[0][0]
            padding = _padding(reader)
            if padding is None or reader[0] in results or reader[0].layout != ROWS:
                continue
            reader.attrs["prepared"] = True
            reader.attrs["interior"] = tuple(
                slice(before, before + size)
                for (before, _), size in zip(padding, node.types[0].sizes, strict=True)
            )
            note(new, f"{node.name} is received as {reader.name}")
        return new


def _padding(region: Node) -> tuple[tuple[int, int], ...] | None:
    """The (before, after) by axis of a region that only pads its operand with a constant."""
    if region.op != "fused" or len(region.inputs) != 1:
        return None
    operators = [n for n in region.attrs["body"] if n.op not in ("input", "constant")]
    if [n.op for n in operators] != ["pad"]:
        return None
    return operators[0].attrs["padding"]

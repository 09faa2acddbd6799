"""Read a value from inside its padded copy, where that is kept and the value need not be."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops import registry
from graphc.ops.slicing import slice as interior
from passes.base import Pass, note


@dataclass(frozen=True)
class ReadInterior(Pass):
    """Let the backward pass read x from a padded copy of x that it needs anyway.

    Requires: int dimensions, `explicit_padding`. Ensures: equal results. Weight gradients read the
    padded images of the forward pass; then relu's mask can be found there as well, and the images
    without padding do not outlive the forward pass. Values that the backward pass reads in another
    way than element by element are left alone: they are kept in any case.
    """

    def run(self, graph: Graph) -> Graph:
        padded = {v: pad for v, pad in _padded_copies(graph).items() if _only_elements(graph, v)}
        copies: dict[str, Value] = {}

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if node.op == "pad":
                copies[node.name] = new.copy_node(node, inputs)[0]
                return (copies[node.name],)
            if node.origin.phase != "backward" or not any(v in padded for v in node.inputs):
                return None
            own = list(inputs)
            for slot, value in enumerate(node.inputs):
                if value in padded and padded[value].name in copies:
                    pad = padded[value]
                    starts = [before for before, _ in pad.attrs["padding"]]
                    stops = [a + size for a, size in zip(starts, value.sizes, strict=True)]
                    own[slot] = interior(copies[pad.name], starts, stops)
            return new.copy_node(node, tuple(own)).outputs

        new = graph.rebuild(visit)
        note(new, f"{len(padded)} values are read from inside their padded copies")
        return new


def _padded_copies(graph: Graph) -> dict[Value, Node]:
    """Padding nodes of the forward pass that the backward pass reads, by what they pad."""
    return {
        node.inputs[0]: node
        for node in graph
        if node.op == "pad" and _backward(graph, node[0]) and node.origin.phase == ""
    }


def _backward(graph: Graph, value: Value) -> list[Node]:
    return [n for n, _ in graph.users(value) if n.origin.phase == "backward" and n.op != "pad"]


def _only_elements(graph: Graph, value: Value) -> bool:
    readers = _backward(graph, value)
    return bool(readers) and all(registry.get(n.op).elementwise for n in readers)

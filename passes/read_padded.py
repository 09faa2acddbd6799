"""Store what is padded once, with its padding."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.registry import apply, get
from passes.base import Pass, note
from passes.choose_convolutions import BATCH


@dataclass(frozen=True)
class ReadPadded(Pass):
    """Where an elementwise result is padded, let all others read the inside of the padded value.

    Requires: explicit padding; the batch in the lanes, where padding costs no more than a store.
    Ensures: equal results. The result itself is then stored nowhere else: the kernel that computes
    it writes the zeros around it.
    """

    def run(self, graph: Graph) -> Graph:
        if graph.annotations.get("layout_mode") != BATCH:
            return graph
        pads = {v: pad for v in _elementwise(graph) if (pad := _only_pad(graph, v))}
        inside: dict[Value, Value] = {}

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if node.op == "pad" and pads.get(node.inputs[0]) is node:
                return inside[node.inputs[0]].node.inputs
            own = tuple(inside.get(v, made) for v, made in zip(node.inputs, inputs, strict=True))
            copy = new.copy_node(node, own)
            if len(copy.types) == 1 and node[0] in pads:
                pad = pads[node[0]]
                wide = apply("pad", copy[0], name=pad.name, **pad.attrs)[0]
                edges = zip(pad.attrs["padding"], node.types[0].sizes, strict=True)
                inside[node[0]] = wide[tuple(slice(low, low + size) for (low, _), size in edges)]
            return copy.outputs

        new = graph.rebuild(visit)
        note(new, f"{len(inside)} values are stored with their padding")
        return new


def _elementwise(graph: Graph) -> list[Value]:
    results = set(graph.results)
    return [n[0] for n in graph if n.inputs and get(n.op).elementwise and n[0] not in results]


def _only_pad(graph: Graph, value: Value) -> Node | None:
    """The one node that pads a value with zeros, if others read the value too."""
    users = {user.name: user for user, _ in graph.users(value)}.values()
    pads = [n for n in users if n.op == "pad" and n.attrs["value"] == 0]
    return pads[0] if len(pads) == 1 and len(users) > 1 else None

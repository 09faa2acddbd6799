"""Which part of a training step a node belongs to, and the colour that says so."""

from __future__ import annotations

from graphc.errors import NameLookupError
from graphc.ir import SOURCES, Graph, Node

# phase -> (fill, stroke)
COLOURS = {
    "forward": ("#e9f1fb", "#4a78b5"),
    "backward": ("#fdeee0", "#c77a33"),
    "update": ("#e8f5e9", "#4b9a57"),
    "input": ("#eceff1", "#607080"),
    "output": ("#37474f", "#37474f"),
}


def phases(graph: Graph) -> dict[str, str]:
    """Node name -> "forward", "backward" or "update", from the structure.

    Forward is what an output other than `grad:...` needs. Of the rest, an update is a node whose
    value a parameter takes, or an elementwise one used in updates only; the others are backward.
    """
    plain_outputs = [v for name, v in graph.outputs.items() if not name.startswith("grad:")]
    if not plain_outputs and not graph.updates:
        return {node.name: "forward" for node in graph}
    forward: set[str] = set()
    stack = [value.node for value in plain_outputs]
    while stack:
        node = stack.pop()
        if node.name not in forward:
            forward.add(node.name)
            stack += [value.node for value in node.inputs]
    result: dict[str, str] = {}
    updated = {value.node.name for value in graph.updates.values()}
    for node in reversed(graph.nodes):
        users = [consumer for _, consumer in graph.nx.out_edges(node.name)]
        if node.name in forward:
            phase = "forward"
        elif node.name in updated or (
            users and _is_elementwise(node) and all(result[u] == "update" for u in users)
        ):
            phase = "update"
        else:
            phase = "backward"
        result[node.name] = phase
    return result


def _is_elementwise(node: Node) -> bool:
    if node.op in SOURCES:
        return True
    from graphc.ops.registry import get

    try:
        return get(node.op).elementwise
    except NameLookupError:
        return False

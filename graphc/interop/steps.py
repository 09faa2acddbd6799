"""A declared graph as the calls that other libraries have a function for."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import SOURCES, Graph, Node, Value


@dataclass(frozen=True)
class Step:
    """One call of a library: `op` of `inputs` (None: an absent bias), with a node's attributes."""

    op: str
    node: Node
    inputs: tuple[Value | None, ...]
    output: Value


def steps(graph: Graph) -> list[Step]:
    """The operators of a bound graph in order, and the layers that libraries have a function for.

    `conv2d` and `linear` take their bias, `cross_entropy` the mean over the batch. What only fed
    such a layer (a transposed weight, a reshaped bias) is no step of its own."""
    taken: set[str] = set()
    found: list[Step] = []
    for node in graph:
        if node.op not in SOURCES and node.name not in taken:
            found.append(_layer(graph, node, taken))
    read = set(graph.outputs.values())
    kept = []
    for step in reversed(found):
        if step.output in read:
            kept.append(step)
            read |= {v for v in step.inputs if v is not None}
    return kept[::-1]


def _layer(graph: Graph, node: Node, taken: set[str]) -> Step:
    """The step that begins with a node; nodes that it includes are added to `taken`."""
    if node.op in ("conv2d", "matmul"):
        x, weight = node.inputs
        op = node.op
        if op == "matmul":
            if not _is_transposed_parameter(weight):
                return Step(op, node, (x, weight), node[0])
            op, weight = "linear", weight.node.inputs[0]
        bias, added = _bias(graph, node)
        if added is not None:
            taken.add(added.name)
        return Step(op, node, (x, weight, bias), (added or node)[0])
    if node.op == "softmax_cross_entropy":
        mean = _only_user(graph, node[0])
        if mean is not None and mean.op == "mean" and mean.types[0].shape == ():
            taken.add(mean.name)
            return Step("cross_entropy", node, node.inputs, mean[0])
    return Step(node.op, node, node.inputs, node[0])


def _only_user(graph: Graph, value: Value) -> Node | None:
    users = graph.users(value)
    return users[0][0] if len(users) == 1 and value not in graph.results else None


def _is_transposed_parameter(value: Value) -> bool:
    node = value.node
    return node.op == "transpose" and value.rank == 2 and node.inputs[0].node.op == "parameter"


def _bias(graph: Graph, node: Node) -> tuple[Value | None, Node | None]:
    """The bias parameter that is added to a layer's only use, and the node that adds it."""
    add = _only_user(graph, node[0])
    if add is None or add.op != "add":
        return None, None
    other = next((v for v in add.inputs if v.node is not node), None)
    if other is None:
        return None, None
    source = other
    if node.op == "conv2d":
        if other.node.op != "reshape" or other.shape != (node.types[0].shape[1], 1, 1):
            return None, None
        source = other.node.inputs[0]
    if source.node.op != "parameter" or source.rank != 1:
        return None, None
    return source, add


def axis_of(step: Step) -> int:
    """The one axis of a softmax."""
    axis = step.node.attrs["axis"]
    return axis if isinstance(axis, int) else axis[0]

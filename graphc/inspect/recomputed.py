"""What a program computes more than once because that costs less than to store and read it."""

from __future__ import annotations

from collections.abc import Hashable

from graphc.ir import SOURCES, Graph, Node, Value
from graphc.text import freeze
from graphc.viz.formats import fused_operators

# Index maps: reading through them costs nothing, so every reader has its own.
_FREE = frozenset("reshape transpose expand squeeze unsqueeze slice stop_gradient".split())


def recomputed(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Operators of which several kernels compute the same value: name -> names of the kernels.

    The same value is the same operator of the same values, whatever the copies are called: value
    numbering (Cocke & Schwartz 1970, "Programming languages and their compilers")."""
    numbers: dict[Hashable, int] = {}
    known: dict[Value, int] = {}
    kernels: dict[int, dict[str, None]] = {}
    names: dict[int, str] = {}

    def number(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    def define(node: Node) -> None:
        key = (node.op, freeze(node.attrs), tuple(known[value] for value in node.inputs))
        for output in node.outputs:
            known[output] = number((*key, output.index))

    for node in graph:
        body = node.attrs.get("body")
        if not isinstance(body, Graph):
            if node.op in SOURCES:
                known[node[0]] = number((node.op, node.name))
            else:
                define(node)
            continue
        for source, operand in zip(body.inputs.values(), node.inputs, strict=True):
            known[source[0]] = known[operand]
        for inner in body:
            if inner.op == "constant":
                known[inner[0]] = number(("constant", freeze(inner.attrs["value"])))
            elif inner.op not in SOURCES:
                define(inner)
        for inner in fused_operators(node):
            if inner.op not in _FREE:
                kernels.setdefault(known[inner[0]], {})[node.name] = None
                names.setdefault(known[inner[0]], inner.name)
        for output, result in zip(node.outputs, body.outputs.values(), strict=True):
            known[output] = known[result]
    return {names[n]: tuple(where) for n, where in kernels.items() if len(where) > 1}

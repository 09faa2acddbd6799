"""Replace every operator that is a composition of others by its parts."""

from __future__ import annotations

from dataclasses import dataclass

from graphc import errors
from graphc.ir import SOURCES, Graph, Node, Value
from graphc.ops import registry
from passes.base import Pass


@dataclass(frozen=True)
class Decompose(Pass):
    """Apply `OpDef.decompose` until no operator has one.

    Requires: int dimensions, and modes resolved (set_mode). Ensures: every node is a source or has
    a lowering. Runs after autodiff, so that composed operators keep their closed-form chain rules.
    `depth` bounds how deep a composition may nest; a deeper one is a cycle of definitions.
    """

    depth: int = 16

    def run(self, graph: Graph) -> Graph:
        for _ in range(self.depth):
            if not any(map(_composed, graph)):
                return graph
            graph = graph.rebuild(_visit)
        left = next(filter(_composed, graph), None)
        if left is not None:
            raise errors.CompileError(
                f"{left.describe()}: still composed after {self.depth} rounds of decomposition; "
                f"operator {left.op!r} decomposes into itself"
            )
        return graph


def _composed(node: Node) -> bool:
    return node.op not in SOURCES and registry.get(node.op).decompose is not None


def _visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
    if not _composed(node):
        return None
    rule = registry.get(node.op).decompose
    assert rule is not None
    return tuple(rule(node, inputs))

"""Remove the nodes that no output and no update needs."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph
from passes.base import Pass


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Keep only what the outputs and updates need.

    Requires: nothing. Ensures: every node but the inputs kept below, and the parameters and states
    that an update writes, has a path to an output or update.
    keep_inputs: keep declared inputs that nothing reads (an executable then still accepts them).
    """

    keep_inputs: bool = False

    def run(self, graph: Graph) -> Graph:
        kept = _kept(graph, self.keep_inputs)
        # Only a node that nothing reads can be the last of a dead chain.
        read = {value.node.name for node in graph for value in node.inputs}
        if len(read.union(kept)) == len(graph):
            return graph
        new = graph.copy()
        remove_dead(new, self.keep_inputs)
        return new


def remove_dead(graph: Graph, keep_inputs: bool = False) -> None:
    """Remove what `EliminateDead` leaves out from a graph of the caller's own."""
    needed = _kept(graph, keep_inputs)
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update([value.node.name for value in node.inputs])
        else:
            graph.remove(node)
            node.dissolve()


def _kept(graph: Graph, inputs: bool) -> set[str]:
    """Names of the nodes that stay whatever reads them."""
    kept = {value.node.name for value in graph.results} | graph.updates.keys()
    return kept | graph.inputs.keys() if inputs else kept

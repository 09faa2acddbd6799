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
        kept = [*graph.results, *(graph.node(name)[0] for name in graph.updates)]
        if self.keep_inputs:
            kept += [node[0] for node in graph.inputs.values()]
        names = {value.node.name for value in kept}
        names |= {value.node.name for node in graph for value in node.inputs}
        if len(names) == len(graph):
            return graph  # Only a node that nothing reads can be the last of a dead chain.
        return graph.subgraph(kept)

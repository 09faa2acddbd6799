"""Compute once what depends on parameters alone."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Value, is_view
from passes.base import Pass, note


@dataclass(frozen=True)
class HoistParameters(Pass):
    """Mark the regions of a program without updates that no input reaches.

    Requires: fused regions, layouts assigned. Ensures: the same graph; marked nodes have the
    attribute `prepared`. The executable runs them when parameters are loaded, not at every call,
    and their values stay in memory of their own (weights transformed for a convolution algorithm,
    folded batch norms).
    """

    def run(self, graph: Graph) -> Graph:
        if graph.updates:
            return graph
        new = graph.copy()
        fixed: set[Value] = set()
        results = set(new.results)
        for node in new:
            if node.op in ("parameter", "state", "constant"):
                fixed.update(node.outputs)
            elif node.op != "input" and node.inputs and all(v in fixed for v in node.inputs):
                if node.op == "fused" and not results & set(node.outputs):
                    node.attrs["prepared"] = True
                    fixed.update(node.outputs)
                elif is_view(node):
                    fixed.update(node.outputs)
        note(new, f"{sum('prepared' in n.attrs for n in new)} regions of parameters alone")
        return new

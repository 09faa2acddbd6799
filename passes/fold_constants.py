"""Evaluate at compile time what depends on constants only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphc.ir import SOURCES, Graph, Node, Value
from graphc.ops import registry
from passes.base import Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes whose operands are all constants by their value, from the NumPy reference.

    Requires: int dimensions. Ensures: the same results; no constant of more than `limit` elements
    is made unless its operands were as large. Nodes whose mode or seed is still open are left
    alone.
    """

    limit: int = 1024

    def run(self, graph: Graph) -> Graph:
        return graph.rebuild(self._visit)

    def _visit(self, new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
        if node.op in SOURCES or not inputs or any(v.node.op != "constant" for v in inputs):
            return None
        if node.op == "expand":  # Copies elements and computes none: cheaper where it is read.
            return None
        if any(node.attrs.get(key, 0) is None for key in ("training", "seed")):
            return None
        if sum(t.size for t in node.types) > max(self.limit, sum(v.type.size for v in inputs)):
            return None
        arrays = [v.node.attrs["value"] for v in inputs]
        with np.errstate(all="ignore"):
            results = registry.get(node.op).evaluate(arrays, node.attrs)
        return tuple(
            new.constant(np.array(array), dtype=t.dtype, name=node.name)
            for array, t in zip(results, node.types, strict=True)
        )

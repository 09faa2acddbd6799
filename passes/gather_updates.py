"""Run the updates of small parameters one after the other at the end of a step."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import SOURCES, Graph, Node, root
from passes.base import Pass, note
from passes.liveness import SizeOf, storage_bytes


@dataclass(frozen=True)
class GatherUpdates(Pass):
    """Move the regions that only make new values of parameters and states to the end, where what
    they read then is small.

    Requires: fused regions, the final layouts. Ensures: the same nodes in an order that respects
    operands. Updates share no memory, so that no barrier stands between them there, and none
    between the gradients that they leave behind. A gradient of more than `most_bytes` is used up at
    once, while it is in a cache and before its memory is wanted.

    No update is fused with the kernel of its gradient, which may still read the old parameter. Each
    is a launch of its own, all of one kernel: a parameter, its gradient and its states have one
    layout, so that every update is one loop over contiguous memory, whatever its shape
    (`graphc.codegen.schedule.collapse`).
    """

    most_bytes: int = 256_000
    size_of: SizeOf = storage_bytes

    def run(self, graph: Graph) -> Graph:
        results = set(graph.outputs.values())
        late = {
            node.name
            for node in graph
            if node.origin.phase == "update"
            and not graph.is_read(node)
            and results.isdisjoint(node.outputs)
            and self._held(node) <= self.most_bytes
        }
        order = [n for n in graph if n.name not in late] + [n for n in graph if n.name in late]
        new = graph.reordered(order)
        note(new, f"{len(late)} updates at the end")
        return new

    def _held(self, node: Node) -> int:
        """Bytes of what is kept for an update alone: its operands that are no sources."""
        operands = dict.fromkeys(map(root, node.inputs))
        return sum(self.size_of(v) for v in operands if v.node.op not in SOURCES)

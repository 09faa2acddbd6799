"""Let the backward pass pad its images itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphc.ir import Graph, Node, Value
from passes.base import Pass, note


@dataclass(frozen=True)
class RepeatPadding(Pass):
    """Give the backward pass a copy of its own of each padding that the forward pass does.

    Requires: int dimensions, `explicit_padding`. Ensures: equal results. Weight gradients read the
    padded images of the forward pass, which would be kept beside what they are made from; the copy
    is made just before it is read, often block by block in the cache. What has less than
    `least_bytes` is left alone: it costs little to keep and a launch to make.
    """

    least_bytes: int = 1_000_000

    def run(self, graph: Graph) -> Graph:
        padded = {n[0] for n in graph if n.op == "pad" and self._is_repeated(graph, n)}
        copies: dict[Value, Value] = {}

        def again(new: Graph, pad: Node) -> Value:
            if pad[0] not in copies:
                with new.origin(replace(pad.origin, phase="backward")):
                    copies[pad[0]] = new.add("pad", pad.inputs, pad.attrs, name=pad.name)[0]
            return copies[pad[0]]

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if node.origin.phase != "backward" or padded.isdisjoint(node.inputs):
                return None
            own = [
                again(new, made.node) if value in padded else made
                for value, made in zip(node.inputs, inputs, strict=True)
            ]
            return new.copy_node(node, tuple(own)).outputs

        new = graph.rebuild(visit)
        note(new, f"{len(copies)} values are padded again")
        return new

    def _is_repeated(self, graph: Graph, pad: Node) -> bool:
        users = [user for user, _ in graph.users(pad[0])]
        return (
            pad.origin.phase == ""
            and pad.types[0].nbytes >= self.least_bytes
            and any(user.origin.phase == "" for user in users)
        )

"""Resolve what depends on training or inference: batch normalisation, dropout, seeds."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from passes.base import Pass


@dataclass(frozen=True)
class SetMode(Pass):
    """Give every `training=None` and `seed=None` attribute a value.

    Requires: nothing. Ensures: no attribute `training` or `seed` is None. Layers declared with an
    explicit mode keep it (a frozen batch norm inside a network that trains). Out of training,
    dropout is the identity and batch norm reads its running statistics; the updates of those
    statistics and of dropout's step counter are then dropped.
    """

    training: bool
    seed: int = 0

    def run(self, graph: Graph) -> Graph:
        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            attrs = self._resolved(node)
            if node.op == "dropout" and not attrs["training"]:
                return (inputs[0],)
            if attrs == node.attrs:
                return None
            copy = new.add(node.op, inputs, attrs, name=node.name)
            copy.layouts = node.layouts
            return copy.outputs

        idle = self._idle_updates(graph)
        new = graph.rebuild(visit)
        new.updates = {name: v for name, v in new.updates.items() if name not in idle}
        return new

    def _resolved(self, node: Node) -> dict:
        attrs = dict(node.attrs)
        if "training" in attrs and attrs["training"] is None:
            attrs["training"] = self.training
        if "seed" in attrs and attrs["seed"] is None:
            attrs["seed"] = self.seed
        return attrs

    def _idle_updates(self, graph: Graph) -> set[str]:
        """States whose update does nothing: statistics of a fixed batch norm, unused steps."""
        idle: set[str] = set()
        counted: set[str] = set()
        for node in graph:
            training = self._resolved(node).get("training")
            if node.op == "dropout":
                steps = {v.node.name for v in node.inputs[1:]}
                (counted if training else idle).update(steps)
            elif node.op == "batch_norm" and not training:
                outputs = node.outputs
                idle.update(name for name, value in graph.updates.items() if value in outputs[1:])
        return idle - counted

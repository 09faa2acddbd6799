"""Let every reader compute a scaled, shifted and rectified value from the one it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphc.ir import Graph, Node, Value
from passes.base import Pass, note
from passes.eliminate_dead import remove_dead
from passes.fuse import REDUCTIONS

CHEAP = frozenset({"add", "sub", "mul", "relu"})


@dataclass(frozen=True)
class RepeatAffine(Pass):
    """Give every reader of x scaled and shifted per channel, with relu or without, a copy of those
    operations of its own.

    Requires: int dimensions, composite operators decomposed; common subexpressions are not to be
    merged afterwards. Ensures: equal results. x is stored whatever happens, because a reduction
    reads it as well (batch norm's statistics), and the factors do not depend on the batch: fusion
    then computes the copies where they are read, in their reader's phase, and the normalised images
    and relu's masks, which forward and backward pass share, are never written to memory.
    """

    def run(self, graph: Graph) -> Graph:
        cheap = _cheap_values(graph)
        repeated = 0

        def fresh(new: Graph, old: Value, made: Value, phase: str) -> Value:
            """`made`, the new graph's `old`; where it is cheap, one more copy of it for a phase."""
            nonlocal repeated
            if old not in cheap:
                return made
            repeated += 1
            inputs = tuple(map(fresh, [new] * 2, old.node.inputs, made.node.inputs, [phase] * 2))
            with new.origin(replace(old.node.origin, phase=phase)):
                return new.add(old.node.op, inputs, old.node.attrs, name=old.node.name)[0]

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if not any(v in cheap for v in node.inputs) or node[0] in cheap:
                return None
            phase = node.origin.phase
            own = [fresh(new, *pair, phase) for pair in zip(node.inputs, inputs, strict=True)]
            return new.copy_node(node, tuple(own)).outputs

        new = graph.rebuild(visit)
        remove_dead(new, keep_inputs=True)
        note(new, f"{repeated} scaled or shifted values are computed by their readers")
        return new


def _cheap_values(graph: Graph) -> set[Value]:
    """Sums and products of a stored value, or of one of them, with factors of no batch axis, and
    relu of those."""
    reduced = {v for node in graph if node.op in REDUCTIONS for v in node.inputs}
    found: set[Value] = set()
    for node in graph:
        if node.op not in CHEAP or node.types[0].rank < 2:
            continue
        shape = node.types[0].shape
        wide = [v for v in node.inputs if v.shape == shape]
        factors = [v for v in node.inputs if v.shape != shape]
        constant = all(v.rank < len(shape) or v.shape[0] == 1 for v in factors)
        if len(wide) == 1 and constant and (wide[0] in reduced or wide[0] in found):
            found.add(node[0])
    return found

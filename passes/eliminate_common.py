"""Merge nodes that compute the same thing: common subexpression elimination by value numbering."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc.ir import NAMED_SOURCES, Graph, Node, Value
from passes.base import Pass

# Operators whose result does not depend on the order of their two operands, to the last bit.
_COMMUTATIVE = ("add", "mul")
# Operators whose result is larger than their operand: the backward pass computes it again instead
# of keeping it.
EXPANDING = ("patch_transform",)


@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Merge nodes with the same operator, operands, attributes and layouts, and equal constants.

    Requires: nothing. Ensures: no two such nodes remain, but for those of `EXPANDING` in different
    phases. Random operators differ in their `stream` attribute and so are not merged. Constants
    above `constant_limit` elements are left alone.
    """

    constant_limit: int = 65536

    def run(self, graph: Graph) -> Graph:
        seen: dict[Hashable, Node] = {}

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if node.op in NAMED_SOURCES:
                return None
            if node.op == "constant" and node.types[0].size > self.constant_limit:
                return None
            operands = [(v.node.name, v.index) for v in inputs]
            if node.op in _COMMUTATIVE:
                operands.sort()
            attrs = tuple(sorted((k, _key(v)) for k, v in node.attrs.items()))
            key: Hashable = (node.op, tuple(operands), attrs, node.layouts)
            if node.op in EXPANDING:
                key = (key, node.origin.phase)
            if key not in seen:
                seen[key] = new.adopt(node, inputs)
            return seen[key].outputs

        return graph.rebuild(visit)


def _key(value: Any) -> Hashable:
    """Tells apart attributes that compare equal but are not the same: 1 and 1.0, 0.0 and -0.0."""
    if isinstance(value, np.ndarray):
        return f"array {value.dtype.str} {value.shape} {value.tobytes()!r}"
    if isinstance(value, Graph):
        return f"graph {value.fingerprint()}"
    return repr(value)

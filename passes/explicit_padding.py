"""Make the padding of convolutions a value of its own.

Their inner loops then need no bounds checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.registry import apply
from passes.base import Pass


@dataclass(frozen=True)
class ExplicitPadding(Pass):
    """Replace padded convolutions by convolutions of padded operands.

    Requires: int dimensions. Ensures: equal results; no `conv2d` or `conv2d_weight_grad` is padded,
    and `conv2d_input_grad` of stride 1 reads a cotangent that is padded along the width (along the
    height the range of the taps is cut, which saves their work). Every reader of a padded value
    reads the padded one, so that it is stored once.
    """

    def run(self, graph: Graph) -> Graph:
        wide: dict[tuple[Value, tuple], Value] = {}

        def padded(value: Value, padding: tuple) -> Value:
            """`value` with zeros around its images; one copy for all readers."""
            if not any(any(p) for p in padding):
                return value
            key = (value, padding)
            if key not in wide:
                wide[key] = apply("pad", value, padding=((0, 0), (0, 0), *padding), value=0.0)[0]
            return wide[key]

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if node.op in ("conv2d", "conv2d_weight_grad") and _is_padded(node):
                attrs = {**node.attrs, "padding": ((0, 0), (0, 0))}
                x = padded(inputs[0], node.attrs["padding"])
                return new.add(node.op, (x, inputs[1]), attrs, name=node.name).outputs
            if node.op == "conv2d_input_grad" and node.attrs["stride"] == (1, 1):
                return _input_grad(new, node, inputs, padded)
            return None

        return graph.rebuild(visit)


def _input_grad(
    new: Graph,
    node: Node,
    inputs: tuple[Value, ...],
    padded: Callable[[Value, tuple], Value],
) -> tuple[Value, ...] | None:
    """`conv2d_input_grad` of a cotangent that is padded along the width as far as taps reach."""
    taps = node.inputs[1].sizes[3]
    (top, bottom), (left, right) = node.attrs["padding"]
    reach = node.attrs["dilation"][1] * (taps - 1)
    if (left, right) == (reach, reach) or left > reach or right > reach:
        return None
    g = padded(inputs[0], ((0, 0), (reach - left, reach - right)))
    attrs = {**node.attrs, "padding": ((top, bottom), (reach, reach))}
    return new.add(node.op, (g, inputs[1]), attrs, name=node.name).outputs


def _is_padded(node: Node) -> bool:
    return any(any(p) for p in node.attrs["padding"])

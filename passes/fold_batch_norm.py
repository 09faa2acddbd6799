"""Fold batch normalisation of fixed statistics into the convolution before it."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.elementwise import add, mul, rsqrt, sub
from graphc.ops.shape import reshape
from passes.base import Pass, note


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """batch_norm(conv2d(x, w)) becomes conv2d(x, w * scale) + shift.

    Requires: inference, int dimensions. Ensures: equal results up to rounding. `scale` and `shift`
    depend on parameters alone, so they are computed once, when parameters are loaded
    (`HoistParameters`); weights stay arguments, never constants in code. A convolution that others
    read too is left.
    """

    def run(self, graph: Graph) -> Graph:
        uses: dict[Value, int] = {}
        for node in graph:
            for value in node.inputs:
                uses[value] = uses.get(value, 0) + 1
        for value in graph.results:
            uses[value] = uses.get(value, 0) + 1
        # Convolutions to fold, by the batch norm that follows them.
        pairs = {
            node: node.inputs[0].node
            for node in graph
            if node.op == "batch_norm"
            and not node.attrs["training"]
            and node.inputs[0].node.op == "conv2d"
            and uses[node.inputs[0]] == 1
        }
        operands: dict[Node, tuple[Value, ...]] = {}

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            operands[node] = inputs
            if node not in pairs:
                return None
            conv = pairs[node]
            _, gamma, beta, mean, var = inputs
            scale = mul(rsqrt(add(var, node.attrs["eps"])), gamma)
            shift = sub(beta, mul(mean, scale))
            x, weight = operands[conv]
            channels = int(gamma.shape[0])
            folded = mul(weight, reshape(scale, (channels, 1, 1, 1)))
            with new.origin(conv.origin):
                y = new.add("conv2d", (x, folded), conv.attrs, name=conv.name)[0]
            y = add(y, reshape(shift, (channels, 1, 1)))
            return (y, mean, var)

        result = graph.rebuild(visit)
        note(result, f"{len(pairs)} folded")
        return result

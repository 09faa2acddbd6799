"""Take weight gradients block by block of the batch, beside what makes and reads their operands."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.batch_parts import sum_by_parts
from passes.base import Pass, note
from passes.choose_convolutions import BATCH

# Gradients that sum over the batch, and over which axes of the second operand besides.
SUMS = {"conv2d_weight_grad": (2, 3), "toom_conv_weight_grad": (3, 4), "patch_weight_grad": (4,)}
# Below so many terms for each element and block, adding partial sums costs more than it saves.
_TERMS = 16


@dataclass(frozen=True)
class SumByBlocks(Pass):
    """Rewrite weight gradients as partial sums over vectors of images, and their sum.

    Requires: int dimensions; `choose_convolutions` has put the batch in the lanes. Ensures: results
    equal up to the order of additions. Kernels that run block by block of the batch
    (`parallelize`) then include the gradient. Transformed images, which are larger than the images,
    are transformed again for it instead of being kept through the forward pass.
    """

    lanes: int
    # Operands of fewer bytes are still in the cores' caches when the whole batch has been through.
    cached_bytes: int

    def run(self, graph: Graph) -> Graph:
        batch = graph.annotations.get("batch") or 0
        if graph.annotations.get("layout_mode") != BATCH or batch < 2 * self.lanes:
            return graph

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if not self._pays(node, batch):
                return None
            note(new, f"{node.name}: {batch // self.lanes} blocks")
            operands = [_transformed_again(v) for v in inputs]
            return (sum_by_parts(node, operands, batch // self.lanes),)

        return graph.rebuild(visit)

    def _pays(self, node: Node, batch: int) -> bool:
        if node.op not in SUMS or node.inputs[0].sizes[0] != batch:
            return False
        sizes = node.inputs[1].sizes
        terms = math.prod(sizes[axis] for axis in SUMS[node.op] if axis < len(sizes))
        return terms >= _TERMS and sum(v.type.nbytes for v in node.inputs) > self.cached_bytes


def _transformed_again(value: Value) -> Value:
    """A transform of the forward pass once more, where the running node is."""
    node = value.node
    if node.op != "tile_transform" or node.origin.phase:
        return value
    return value.graph.add(node.op, node.inputs, node.attrs, name=node.name)[0]

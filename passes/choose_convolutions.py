"""Write convolutions as Toom-Cook products where that needs clearly less arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.registry import apply
from graphc.ops.toom_cook import conv2d_by_rows
from passes.base import Pass, note

# The most interpolation points: with 9 the error stays within a few 1e-6 of the largest output.
MOST_POINTS = 9
# Predicted cost relative to the direct convolution below which the rewrite is worth its transforms.
WORTH = 0.8


@dataclass(frozen=True)
class ChooseConvolutions(Pass):
    """Replace `conv2d` by `tile_transform` and `toom_conv` (Toom-Cook along rows) by predicted cost.

    Requires: int dimensions; runs before autodiff, so that the chain rule differentiates the products and
    the backward pass saves as much. Ensures: results equal up to rounding (a few 1e-6 of the largest).
    Applies to stride 1, one group, and a batch that fills the lanes: with images side by side in the lanes
    a transform is a handful of vector operations and needs no shuffles.
    The predicted costs are in `graph.annotations["convolutions"]`.
    """

    lanes: int

    def run(self, graph: Graph) -> Graph:
        batch = graph.annotations.get("batch")
        choices: dict[str, dict[str, float]] = {}

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]):
            if node.op != "conv2d" or not batch or batch % self.lanes or not _eligible(node):
                return None
            costs = predicted(node)
            choices[node.name] = costs
            best = min(costs, key=costs.__getitem__)
            if best == "direct" or costs[best] > WORTH * costs["direct"]:
                return None
            note(new, f"{node.name}: {best}")
            return (_rewritten(node, inputs, int(best.split("(")[1].split(",")[0])),)

        new = graph.rebuild(visit)
        new.annotations["convolutions"] = choices
        return new


def _eligible(node: Node) -> bool:
    a = node.attrs
    taps = node.inputs[1].shape[3]
    return a["stride"] == (1, 1) and a["dilation"] == (1, 1) and a["groups"] == 1 and taps >= 3


def predicted(node: Node) -> dict[str, float]:
    """Vector multiply-adds an image of the direct convolution and of F(m, taps) for each m, where moving a
    transformed value through memory counts as a few."""
    _, _, oh, ow = (int(d) for d in node.types[0].shape)
    oc, ic, kh, kw = (int(d) for d in node.inputs[1].shape)
    costs = {"direct": float(oc * ic * kh * kw * oh * ow)}
    for m in range(2, ow + 1):
        points = m + kw - 1
        if points > MOST_POINTS:
            break
        tiles = -(-ow // m)
        products = oc * ic * kh * oh * tiles * points
        images = ic * (oh + kh - 1) * tiles * points * (points + 3)
        outputs = oc * oh * tiles * m * (points + 6)
        costs[f"F({m},{kw})"] = float(products + images + outputs)
    return costs


def _rewritten(node: Node, inputs: tuple[Value, ...], m: int) -> Value:
    x, weight = inputs
    ow, taps = int(node.types[0].shape[3]), int(weight.shape[3])
    (top, bottom), (left, right) = node.attrs["padding"]
    width = -(-ow // m) * m + taps - 1
    extra = width - (int(x.shape[3]) + left)
    # Columns beyond the image are zeros; columns that no output reads are cut off.
    padding = ((0, 0), (0, 0), (top, bottom), (left, max(extra, 0)))
    if any(any(p) for p in padding):
        x = apply("pad", x, padding=padding, value=0.0)[0]
    if x.shape[3] != width:
        x = x[:, :, :, :width]
    y = conv2d_by_rows(x, weight, m, name=node.name)
    return y if y.shape[3] == ow else y[:, :, :, :ow]

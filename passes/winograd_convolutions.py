"""Convolutions, and both gradients of those of stride 1, as Winograd patches."""

from __future__ import annotations

from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.depth import space_to_depth
from graphc.ops.winograd import (
    conv2d_by_patches,
    conv2d_input_grad_by_patches,
    conv2d_weight_grad_by_patches,
)
from passes.base import Pass, note
from passes.choose_convolutions import (
    BATCH,
    CHANNELS,
    Choose,
    by_patches,
    by_split_patches,
    cut,
    framed,
    is_short,
    phases,
    predicted_best,
    strip_count,
    tile_size,
)


@dataclass(frozen=True)
class WinogradConvolutions(Pass):
    """Rewrite `conv2d`, `conv2d_input_grad` and `conv2d_weight_grad` as patches, by predicted cost.

    Requires: int dimensions; `choose_convolutions` has chosen what lies in the lanes
    (`annotations["layout_mode"]`), else nothing changes, and has rewritten what is better done by
    rows. Runs after autodiff: gradients are rewritten from what they are. Ensures: results equal up
    to rounding (a few 1e-6 of the largest). `choose` decides for each node. With channels in the
    lanes, a convolution of stride s is one of stride 1 over the s x s phases of its images.
    """

    lanes: int
    training: bool = False
    choose: Choose = predicted_best

    def run(self, graph: Graph) -> Graph:
        mode = graph.annotations.get("layout_mode")
        if mode not in (BATCH, CHANNELS):
            return graph

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            rewrite = _REWRITES.get(node.op)
            if rewrite is None or not is_short(node, mode == CHANNELS and node.op == "conv2d"):
                return None
            if mode == CHANNELS and min(_channels(node)) < self.lanes:
                return None
            best = self.choose(node, self._costs(node, mode), mode)
            if best == "direct":
                return None
            note(new, f"{node.name}: {best}")
            return (rewrite(node, inputs, tile_size(best), mode == BATCH),)

        return graph.rebuild(visit)

    def _costs(self, node: Node, mode: str) -> dict[str, float]:
        """Predicted cost by algorithm."""
        out_channels, channels, taps, _ = _weight(node)
        height, width = _pixels(node)
        images = node.inputs[0].sizes[0]
        costs = {"direct": float(out_channels * channels * taps * taps * height * width)}
        shape = *phases(node, out_channels, channels, taps), height, width
        if mode == BATCH:
            costs |= by_split_patches(*shape, self.lanes)
        else:
            costs |= by_patches(*shape, images, not self.training)
        return {algorithm: images * cost for algorithm, cost in costs.items()}


def _weight(node: Node) -> tuple[int, ...]:
    """Sizes [OC, IC, KH, KW] of the weight of a convolution or of one of its gradients."""
    return node.types[0].sizes if node.op == "conv2d_weight_grad" else node.inputs[1].sizes


def _channels(node: Node) -> tuple[int, int]:
    """Output and input channels of the convolution of stride 1."""
    out_channels, channels, _, _ = _weight(node)
    return out_channels, channels * node.attrs["stride"][0] ** 2


def _pixels(node: Node) -> tuple[int, int]:
    """Height and width that are cut into patches: of the cotangent for a weight gradient."""
    return (node.inputs[1] if node.op == "conv2d_weight_grad" else node[0]).sizes[2:]  # type: ignore[return-value]


def _whole(pixels: tuple[int, ...], outputs: int, taps: int) -> tuple[int, int]:
    """Height and width of an operand whose patches give at least so many outputs."""
    return tuple(-(-p // outputs) * outputs + taps - 1 for p in pixels)  # type: ignore[return-value]


def _forward(node: Node, inputs: tuple[Value, ...], m: int, split: bool) -> Value:
    x, weight = inputs
    stride, pixels = node.attrs["stride"][0], node.types[0].sizes[2:]
    taps = -(-weight.sizes[3] // stride)
    (top, _), (left, _) = node.attrs["padding"]
    height, width = _whole(pixels, m, taps)
    x = framed(x, (top, left), (stride * height, stride * width))
    if stride > 1:
        weight = framed(weight, (0, 0), (stride * taps, stride * taps))
        x, weight = (space_to_depth(v, stride) for v in (x, weight))
    oc, ic = weight.sizes[:2]
    strips = 1 if split else strip_count(oc, ic, taps, m, *pixels)
    return cut(conv2d_by_patches(x, weight, m, split, strips, name=node.name), pixels)


def _input_grad(node: Node, inputs: tuple[Value, ...], m: int, split: bool) -> Value:
    g, weight = inputs
    pixels, taps = node.types[0].sizes[2:], weight.sizes[3]
    (top, _), (left, _) = node.attrs["padding"]
    g = framed(g, (taps - 1 - top, taps - 1 - left), _whole(pixels, m, taps))
    oc, ic = weight.sizes[:2]
    strips = 1 if split else strip_count(ic, oc, taps, m, *pixels)
    return cut(conv2d_input_grad_by_patches(g, weight, m, split, strips, name=node.name), pixels)


def _weight_grad(node: Node, inputs: tuple[Value, ...], m: int, split: bool) -> Value:
    x, g = inputs
    taps = node.types[0].sizes[3]
    (top, _), (left, _) = node.attrs["padding"]
    whole = _whole(g.sizes[2:], m, taps)
    g = framed(g, (0, 0), (whole[0] - taps + 1, whole[1] - taps + 1))
    return conv2d_weight_grad_by_patches(framed(x, (top, left), whole), g, m, split, name=node.name)


_REWRITES = {
    "conv2d": _forward,
    "conv2d_input_grad": _input_grad,
    "conv2d_weight_grad": _weight_grad,
}

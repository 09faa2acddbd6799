"""Make the padding of convolutions a value of its own.

Their inner loops then need no bounds checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.registry import apply
from graphc.ops.window import Pair, WindowAxis, window_axes
from passes.base import Pass
from passes.choose_convolutions import BATCH


@dataclass(frozen=True)
class ExplicitPadding(Pass):
    """Replace padded convolutions by convolutions of padded operands.

    Requires: int dimensions. Ensures: equal results; no `conv2d` or `conv2d_weight_grad` is padded,
    and `conv2d_input_grad` reads a cotangent that is padded along the width (along the height the
    range of the taps is cut, which saves their work) and gives an image of whole strides, so that
    all phases of the stride have equal sizes. Every reader of a padded value reads the padded one,
    so that it is stored once. With `rows`, that cotangent is padded along the height too: for
    targets that share rows between threads, which check bounds where a CPU cuts a loop.

    For a CPU, unless the batch is to lie in the lanes, convolutions of single pixels also have
    stride 1: the pixels that they read are put side by side first, where they are one long loop.
    """

    rows: bool = False

    def run(self, graph: Graph) -> Graph:
        wide: dict[tuple[Value, tuple], Value] = {}
        gather = not self.rows and graph.annotations.get("layout_mode") != BATCH

        def padded(value: Value, padding: tuple) -> Value:
            """`value` with zeros around its images; one copy for all readers."""
            if not any(any(p) for p in padding):
                return value
            key = (value, padding)
            if key not in wide:
                wide[key] = apply("pad", value, padding=((0, 0), (0, 0), *padding), value=0.0)[0]
            return wide[key]

        def gathered(value: Value, stride: Pair) -> Value:
            """Every `stride`-th pixel of `value`, stored; one copy for all readers."""
            key = (value, stride)
            if key not in wide:
                pixels = value[:, :, :: stride[0], :: stride[1]]
                wide[key] = apply("pad", pixels, padding=((0, 0),) * 4, value=0.0)[0]
            return wide[key]

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if gather and _skips(node):
                attrs = {**node.attrs, "stride": (1, 1)}
                x = gathered(inputs[0], node.attrs["stride"])
                return new.add(node.op, (x, inputs[1]), attrs, name=node.name).outputs
            if node.op in ("conv2d", "conv2d_weight_grad") and _is_padded(node):
                attrs = {**node.attrs, "padding": ((0, 0), (0, 0))}
                x = padded(inputs[0], node.attrs["padding"])
                return new.add(node.op, (x, inputs[1]), attrs, name=node.name).outputs
            if node.op == "conv2d_input_grad":
                return _input_grad(new, node, inputs, padded, self.rows)
            return None

        return graph.rebuild(visit)


def _input_grad(
    new: Graph,
    node: Node,
    inputs: tuple[Value, ...],
    padded: Callable[[Value, tuple], Value],
    pad_rows: bool,
) -> tuple[Value, ...] | None:
    """`conv2d_input_grad` of whole strides, its cotangent padded along the width, and the height if
    `pad_rows`, as far as windows reach."""
    g, weight = inputs
    shape, stride = node.attrs["input_shape"], node.attrs["stride"]
    whole = (*shape[:2], *(-(-d // s) * s for d, s in zip(shape[2:], stride, strict=True)))
    rows, columns = window_axes(whole[2:], g.sizes[2:], weight.sizes[2:], node.attrs)
    above, high = _all_windows(rows) if pad_rows else _windows(rows, 0, rows.output)
    beside, wide = _all_windows(columns)
    if whole == shape and not any(above + beside):
        return None
    attrs = {**node.attrs, "input_shape": whole, "padding": (high, wide)}
    out = new.add(node.op, (padded(g, (above, beside)), weight), attrs, name=node.name)[0]
    return (out if whole == shape else out[:, :, : shape[2], : shape[3]],)


def _all_windows(axis: WindowAxis) -> tuple[Pair, Pair]:
    """`_windows` of an axis with every window that meets some position."""
    first, last = axis.reach()
    return _windows(axis, max(0, -first), axis.size // axis.stride + last)


def _windows(axis: WindowAxis, before: int, outputs: int) -> tuple[Pair, Pair]:
    """`before` more windows in front, and `outputs` or more windows of the axis's own numbering.

    Returns the padding of the cotangent and that of the image with so many windows."""
    span = axis.dilation * (axis.kernel - 1) + 1
    front = axis.before + before * axis.stride
    fitting = (axis.size + axis.before - span) // axis.stride + 1
    outputs = max(outputs, axis.output, fitting)
    covered = (outputs - 1) * axis.stride + span - axis.before
    return (before, outputs - axis.output), (front, max(0, covered - axis.size))


def _is_padded(node: Node) -> bool:
    return any(any(p) for p in node.attrs["padding"])


def _skips(node: Node) -> bool:
    """Whether a convolution of single pixels, or the gradient of its weights, leaves some out."""
    if node.op not in ("conv2d", "conv2d_weight_grad") or _is_padded(node):
        return False
    weight = node.types[0] if node.op == "conv2d_weight_grad" else node.inputs[1].type
    return weight.sizes[2:] == (1, 1) and node.attrs["stride"] != (1, 1)

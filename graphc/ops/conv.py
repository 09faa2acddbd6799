"""Two-dimensional convolution and its two gradients.

    conv2d(x, w)[n, oc, oh, ow] = sum over ic, kh, kw of
        x[n, g*IC + ic, oh*stride - pad + kh*dilation, ow*stride - pad + kw*dilation]
        * w[oc, ic, kh, kw]

with images [N,C,H,W], weights [OC, C/groups, KH, KW] and g the group of output channel oc (strictly
a cross-correlation, as in every deep-learning library). It is bilinear, so `conv2d`,
`conv2d_input_grad` and `conv2d_weight_grad` are each other's chain rules and gradients of any order
exist (Dumoulin & Visin 2016, "A guide to convolution arithmetic", section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, within
from graphc.ir import Node, TensorType, Value
from graphc.ops.broadcast import same_dtype
from graphc.ops.elementwise import add
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, lift, register
from graphc.ops.shape import reshape
from graphc.ops.window import (
    Bounds,
    Indices,
    WindowAxis,
    add_windows,
    image_type,
    naming,
    output_extents,
    pad_images,
    padding_pairs,
    pair,
    sum_over_windows,
    window_axes,
    windows,
)

__all__ = ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"]

GEOMETRY = ("stride", "padding", "dilation", "groups")


def conv2d(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    name: str | None = None,
) -> Value:
    """Convolve images x[N,C,H,W] with weight[OC, C/groups, KH, KW]; add bias[OC]. Returns
    [N,OC,OH,OW].

    `stride`, `dilation`: an int or (height, width). `padding`: an int, (height, width),
    ((top, bottom), (left, right)), "same" (OH = ceil(H / stride)) or "valid" (none).
    Raises ShapeError, DTypeError.
    """
    weight = lift(weight, x)
    with naming("conv2d", name, x):
        # Without four dimensions there is nothing to normalise: the type rule then refuses.
        image = x.shape[2:] if x.rank == 4 else (1, 1)
        kernel = pair(weight.shape[2:], "kernel") if weight.rank == 4 else (1, 1)
        stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
        attrs = {
            "stride": stride,
            "padding": padding_pairs(padding, image, kernel, stride, dilation),
            "dilation": dilation,
            "groups": int(groups),
        }
    y = apply("conv2d", x, weight, name=name, **attrs)[0]
    if bias is None:
        return y
    bias = lift(bias, x)
    if bias.shape != (y.shape[1],):
        raise errors.ShapeError(
            f"{y.node.describe()}: bias {bias.name!r} {bias.type} must have shape [{y.shape[1]}], "
            f"one element per output channel of weight {weight.name!r} {weight.type}"
        )
    return add(y, reshape(bias, (y.shape[1], 1, 1)), name=f"{name}.add" if name else None)


def conv2d_input_grad(
    g: Value, weight: Value, *, input_shape: tuple[int, ...], **geometry
) -> Value:
    """Cotangent of conv2d's images, also known as the transposed convolution of g[N,OC,OH,OW]."""
    return apply("conv2d_input_grad", g, weight, input_shape=tuple(input_shape), **geometry)[0]


def conv2d_weight_grad(x: Value, g: Value, *, weight_shape: tuple[int, ...], **geometry) -> Value:
    """Cotangent of conv2d's weight for images x[N,C,H,W] and output cotangent g[N,OC,OH,OW]."""
    return apply("conv2d_weight_grad", x, g, weight_shape=tuple(weight_shape), **geometry)[0]


def _geometry(attrs: Attrs) -> Attrs:
    return {key: attrs[key] for key in GEOMETRY}


# ---- shapes


def _output_type(x: TensorType, weight: TensorType, attrs: Attrs) -> TensorType:
    """Output type of a convolution; checks everything that can be wrong with x and weight."""
    image_type(x)
    if weight.rank != 4:
        raise errors.ShapeError(f"weight {weight} must have 4 dimensions [OC,IC,KH,KW]")
    dtype = same_dtype([x, weight], "input and weight")
    groups, channels, out_channels, per_group = (
        attrs["groups"],
        x.shape[1],
        weight.shape[0],
        weight.shape[1],
    )
    if not all(isinstance(d, int) for d in (channels, *weight.shape)):
        raise errors.ShapeError(
            f"the channels of input {x} and all of weight {weight} must be numbers"
        )
    if groups < 1 or out_channels % groups or channels % groups:
        raise errors.ShapeError(
            f"groups={groups} must divide the input's {channels} channels and the weight's "
            f"{out_channels}"
        )
    if channels != per_group * groups:
        expects = f"{per_group * groups}" + (
            f" ({groups} groups of {per_group})" if groups > 1 else ""
        )
        raise errors.ShapeError(
            f"input {x} has {channels} channels, weight {weight} expects {expects}"
        )
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    out = output_extents(x.shape[2:], kernel, attrs["stride"], attrs["padding"], attrs["dilation"])
    return TensorType((x.shape[0], out_channels, *out), dtype)


def _infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    return [_output_type(types[0], types[1], attrs)]


def _infer_input_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, weight = types
    x = TensorType(attrs["input_shape"], g.dtype)
    _check_cotangent(g, _output_type(x, weight, attrs))
    return [x]


def _infer_weight_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, g = types
    weight = TensorType(attrs["weight_shape"], x.dtype)
    _check_cotangent(g, _output_type(x, weight, attrs))
    return [weight]


def _check_cotangent(g: TensorType, expected: TensorType) -> None:
    if g != expected:
        raise errors.ShapeError(
            f"cotangent {g} must be {expected}, the type of the convolution's output"
        )


# ---- NumPy reference: im2col and matrix products (Chellapilla et al. 2006)


def _columns(x: np.ndarray, kernel: tuple[int, int], attrs: Attrs) -> np.ndarray:
    """All windows of x as [N, groups, IC*KH*KW, OH*OW]."""
    view = windows(pad_images(x, attrs["padding"]), kernel, attrs["stride"], attrs["dilation"])
    n, c, kh, kw, oh, ow = view.shape
    return view.reshape(n, attrs["groups"], c // attrs["groups"] * kh * kw, oh * ow)


def _evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, weight = arrays
    out = output_extents(
        x.shape[2:], weight.shape[2:], attrs["stride"], attrs["padding"], attrs["dilation"]
    )
    columns = _columns(x, weight.shape[2:], attrs)
    groups, out_channels = attrs["groups"], weight.shape[0]
    rows = weight.reshape(groups, out_channels // groups, columns.shape[2])
    return [np.matmul(rows, columns).reshape(x.shape[0], out_channels, *out)]


def _evaluate_input_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, weight = arrays
    n, out_channels, oh, ow = g.shape
    groups, shape = attrs["groups"], (n, *attrs["input_shape"][1:])
    per_group = out_channels // groups
    rows = weight.reshape(groups, per_group, weight[0].size)
    columns = np.matmul(rows.transpose(0, 2, 1), g.reshape(n, groups, per_group, oh * ow))
    taps = columns.reshape(n, shape[1], *weight.shape[2:], oh, ow)
    return [add_windows(taps, shape, attrs["stride"], attrs["padding"], attrs["dilation"])]


def _evaluate_weight_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, g = arrays
    shape, groups = attrs["weight_shape"], attrs["groups"]
    columns = _columns(x, shape[2:], attrs)
    cotangents = g.reshape(g.shape[0], groups, g.shape[1] // groups, columns.shape[3])
    # One image at a time: the sum over the batch never makes an array larger than the weight.
    total = np.zeros((groups, g.shape[1] // groups, columns.shape[2]), x.dtype)
    for image in range(x.shape[0]):
        total += np.matmul(cotangents[image], columns[image].transpose(0, 2, 1))
    return [total.reshape(shape)]


# ---- chain rules


def _vjp(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, weight), g, geometry = node.inputs, cotangents[0], _geometry(node.attrs)
    assert g is not None
    return (
        conv2d_input_grad(g, weight, input_shape=x.sizes, **geometry),
        conv2d_weight_grad(x, g, weight_shape=weight.sizes, **geometry),
    )


def _vjp_input_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (g, weight), c, geometry = node.inputs, cotangents[0], _geometry(node.attrs)
    assert c is not None
    return (
        apply("conv2d", c, weight, **geometry)[0],
        conv2d_weight_grad(c, g, weight_shape=weight.sizes, **geometry),
    )


def _vjp_weight_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, g), c, geometry = node.inputs, cotangents[0], _geometry(node.attrs)
    assert c is not None
    return (
        conv2d_input_grad(g, c, input_shape=x.sizes, **geometry),
        apply("conv2d", x, c, **geometry)[0],
    )


# ---- lowering


def _group(k: Lowering, channel: Index, per_group: int, groups: int) -> tuple[Index, Index]:
    """Group of a channel, and the channel's position in it."""
    if groups == 1:
        return Index(), channel
    return (channel, Index()) if per_group == 1 else k.divmod(channel, per_group)


def _read_image(
    k: Lowering,
    slot: int,
    axes: tuple[WindowAxis, WindowAxis],
    n: Index,
    channel: Index,
    o: Indices,
    tap: Indices,
) -> Expr:
    """Element of operand `slot` under tap (kh, kw) of window (oh, ow): 0 in the padding."""
    y, above = axes[0].input_position(o[0], tap[0])
    x, beside = axes[1].input_position(o[1], tap[1])
    element = k.read(slot, (n, channel, y, x))
    bounds = tuple(above + beside)
    return within(bounds, element, 0) if bounds else element


def _lower(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    x, weight = (v.sizes for v in node.inputs)
    axes = window_axes(x[2:], node[0].sizes[2:], weight[2:], node.attrs)
    n, oc, oh, ow = index
    g, _oc = _group(k, oc, weight[0] // node.attrs["groups"], node.attrs["groups"])

    def term(ic: Index, kh: Index, kw: Index) -> Expr:
        pixel = _read_image(k, 0, axes, n, g * weight[1] + ic, (oh, ow), (kh, kw))
        return pixel * k.read(1, (oc, ic, kh, kw))

    return k.reduce("sum", weight[1:], term)


def _lower_input_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    g_shape, weight = (v.sizes for v in node.inputs)
    axes = window_axes(node[0].sizes[2:], g_shape[2:], weight[2:], node.attrs)
    n, channel, ih, iw = index
    per_group = weight[0] // node.attrs["groups"]
    group, ic = _group(k, channel, weight[1], node.attrs["groups"])

    def term(loops: Indices, o: Indices, tap: Indices, bounds: Bounds) -> Expr:
        oc = group * per_group + loops[0]
        product = k.read(0, (n, oc, *o)) * k.read(1, (oc, ic, *tap))
        return within(bounds, product, 0) if bounds else product

    return sum_over_windows(k, axes, (ih, iw), (per_group,), term)


def _lower_weight_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    x, g = (v.sizes for v in node.inputs)
    weight = node[0].sizes
    axes = window_axes(x[2:], g[2:], weight[2:], node.attrs)
    oc, ic, kh, kw = index
    group, _oc = _group(k, oc, weight[0] // node.attrs["groups"], node.attrs["groups"])

    def term(n: Index, oh: Index, ow: Index) -> Expr:
        pixel = _read_image(k, 0, axes, n, group * weight[1] + ic, (oh, ow), (kh, kw))
        return pixel * k.read(1, (n, oc, oh, ow))

    return k.reduce("sum", (g[0], *g[2:]), term)


# ---- samples: odd sizes, every attribute, sizes the stride does not divide

# (input shape, weight shape, stride, padding, dilation, groups)
_CASES = (
    ((2, 3, 7, 5), (4, 3, 3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 2, 5, 6), (3, 2, 3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1), 1),
    ((2, 2, 8, 7), (2, 2, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    ((1, 2, 9, 7), (2, 2, 2, 3), (1, 1), ((2, 1), (0, 2)), (2, 2), 1),
    ((1, 2, 9, 8), (2, 2, 3, 2), (2, 3), ((1, 2), (1, 0)), (2, 1), 1),
    ((1, 1, 8, 9), (1, 1, 2, 3), (3, 2), ((1, 0), (2, 2)), (3, 2), 1),
    ((2, 4, 5, 5), (6, 2, 3, 3), (1, 2), ((1, 1), (1, 1)), (1, 1), 2),
    ((1, 3, 5, 4), (3, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 3),
    ((2, 3, 4, 5), (2, 3, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 3, 5, 4), (2, 3, 1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 1, 6, 4), (2, 1, 2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    ((0, 2, 5, 5), (3, 2, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
)


def _cases() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Attrs]]:
    rng = np.random.default_rng(20)
    for x_shape, w_shape, stride, padding, dilation, groups in _CASES:
        attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x, weight = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
        shape = _evaluate([x, weight], attrs)[0].shape
        yield x, weight, rng.standard_normal(shape), attrs


def _samples() -> list[Sample]:
    return [Sample((x, weight), attrs) for x, weight, _, attrs in _cases()]


def _samples_input_grad() -> list[Sample]:
    return [
        Sample((g, weight), {**attrs, "input_shape": x.shape}) for x, weight, g, attrs in _cases()
    ]


def _samples_weight_grad() -> list[Sample]:
    return [
        Sample((x, g), {**attrs, "weight_shape": weight.shape}) for x, weight, g, attrs in _cases()
    ]


register(OpDef("conv2d", _infer, _evaluate, _vjp, _lower, _samples))
register(
    OpDef(
        "conv2d_input_grad",
        _infer_input_grad,
        _evaluate_input_grad,
        _vjp_input_grad,
        _lower_input_grad,
        _samples_input_grad,
    )
)
register(
    OpDef(
        "conv2d_weight_grad",
        _infer_weight_grad,
        _evaluate_weight_grad,
        _vjp_weight_grad,
        _lower_weight_grad,
        _samples_weight_grad,
    )
)

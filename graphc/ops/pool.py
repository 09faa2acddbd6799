"""Pooling over windows of an image [N,C,H,W].

Max pooling is three operators that are closed under differentiation. For a fixed choice of one
element per window, `max_pool2d_gather` picks these elements from an image and `max_unpool2d` puts a
window's cotangent back where its element came from: each is linear and the other's transpose. The
choice is `max_pool2d_argmax`: the row-major position in the window of the first maximum, as in
PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, call, position, select, within
from graphc.ir import Node, TensorType, Value
from graphc.ops.elementwise import mul
from graphc.ops.reduce import mean
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, register
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

__all__ = ["max_pool2d", "avg_pool2d", "global_avg_pool2d"]


def max_pool2d(
    x: Value,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | str | Sequence = 0,
    dilation: int | Sequence[int] = 1,
    name: str | None = None,
) -> Value:
    """Largest element of each window of x[N,C,H,W]; padding counts as -inf, NaN as largest.

    `stride=None` means the kernel's size. `padding` as for `conv2d`, at most half the window.
    Raises ShapeError, DTypeError.
    """
    with naming("max_pool2d", name, x):
        attrs = _arguments(x, kernel_size, stride, padding, dilation)
    return apply("max_pool2d", x, name=name, **attrs)[0]


def max_pool2d_argmax(x: Value, **geometry: Any) -> Value:
    """int32[N,C,OH,OW]: row-major position in its window of each window's first maximum."""
    return apply("max_pool2d_argmax", x, **geometry)[0]


def max_unpool2d(
    g: Value, argmax: Value, *, input_shape: tuple[int, ...], **geometry: Any
) -> Value:
    """Image of shape `input_shape` holding g[N,C,OH,OW] at the chosen positions, summed where
    windows meet."""
    return apply("max_unpool2d", g, argmax, input_shape=tuple(input_shape), **geometry)[0]


def max_pool2d_gather(x: Value, argmax: Value, **geometry: Any) -> Value:
    """The chosen element of each window of x[N,C,H,W]: [N,C,OH,OW]."""
    return apply("max_pool2d_gather", x, argmax, **geometry)[0]


def avg_pool2d(
    x: Value,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | str | Sequence = 0,
    count_include_pad: bool = True,
    name: str | None = None,
) -> Value:
    """Mean of each window of x[N,C,H,W]. With `count_include_pad=False` the padding is not counted.

    `stride=None` means the kernel's size. Raises ShapeError, DTypeError.
    """
    with naming("avg_pool2d", name, x):
        attrs = _arguments(x, kernel_size, stride, padding, 1)
    del attrs["dilation"]
    y = apply("avg_pool2d", x, name=name, **attrs)[0]
    if count_include_pad or not any(map(any, attrs["padding"])):
        return y
    if not all(isinstance(d, int) for d in x.shape[2:]):
        raise errors.ShapeError(
            f"{y.node.describe()}: count_include_pad=False needs height and width as numbers"
        )
    counts = [
        _real_taps(axis) for axis in window_axes(x.shape[2:], y.shape[2:], attrs["kernel"], attrs)
    ]
    factor = math.prod(attrs["kernel"]) / np.outer(*counts)
    return mul(y, y.graph.constant(factor[None, None], dtype=x.dtype))


def avg_pool2d_grad(g: Value, *, input_shape: tuple[int, ...], **geometry: Any) -> Value:
    """Cotangent of avg_pool2d's images: each window's g[N,C,OH,OW] shared equally by its
    elements."""
    return apply("avg_pool2d_grad", g, input_shape=tuple(input_shape), **geometry)[0]


def global_avg_pool2d(x: Value, name: str | None = None) -> Value:
    """Mean over height and width: [N,C,H,W] -> [N,C,1,1]."""
    if x.rank != 4:
        raise errors.ShapeError(
            f"global_avg_pool2d: input {x.name!r} {x.type} must have 4 dimensions [N,C,H,W]"
        )
    return mean(x, axis=(2, 3), keepdims=True, name=name)


def _arguments(x: Value, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Attrs:
    kernel, dilation = pair(kernel_size, "kernel_size"), pair(dilation, "dilation")
    stride = kernel if stride is None else pair(stride, "stride")
    image = x.shape[2:] if x.rank == 4 else (1, 1)
    padding = padding_pairs(padding, image, kernel, stride, dilation)
    return {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}


def _real_taps(axis: WindowAxis) -> np.ndarray:
    """How many taps of each window of an axis lie on the input."""
    first = np.arange(axis.output) * axis.stride - axis.before
    return np.minimum(first + axis.kernel, axis.size) - np.maximum(first, 0)


# ---- shapes


def _pooled(x: TensorType, attrs: Attrs) -> tuple:
    image_type(x)
    dilation = attrs.get("dilation", (1, 1))
    for kernel, pads, step in zip(attrs["kernel"], attrs["padding"], dilation, strict=True):
        if 2 * max(pads) > step * (kernel - 1) + 1:
            raise errors.ShapeError(
                f"padding {pads[0]}+{pads[1]} is more than half of the window {kernel}: use a "
                "larger kernel or less padding"
            )
    return (
        *x.shape[:2],
        *output_extents(x.shape[2:], attrs["kernel"], attrs["stride"], attrs["padding"], dilation),
    )


def _infer_pool(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    return [TensorType(_pooled(types[0], attrs), types[0].dtype)]


def _infer_argmax(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    return [TensorType(_pooled(types[0], attrs), "int32")]


def _check_windows(types: list[TensorType], what: Sequence[str], shape: tuple) -> None:
    for t, name in zip(types, what, strict=True):
        if t.shape != shape:
            raise errors.ShapeError(f"{name} {t} must have the pool's output shape {list(shape)}")


def _infer_unpool(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    image = TensorType(attrs["input_shape"], types[0].dtype)
    _check_windows(types, ("cotangent", "argmax")[: len(types)], _pooled(image, attrs))
    return [image]


def _infer_gather(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    shape = _pooled(types[0], attrs)
    _check_windows(types[1:], ("argmax",), shape)
    return [TensorType(shape, types[0].dtype)]


# ---- NumPy references


def _taps(x: np.ndarray, attrs: Attrs, outside: float) -> np.ndarray:
    """Windows as [N,C,KH*KW,OH,OW]."""
    padded = pad_images(x, attrs["padding"], outside)
    view = windows(padded, attrs["kernel"], attrs["stride"], attrs.get("dilation", (1, 1)))
    n, c, kh, kw, oh, ow = view.shape
    return view.reshape(n, c, kh * kw, oh, ow)


def _evaluate_max(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    return [_taps(arrays[0], attrs, -np.inf).max(axis=2)]


def _evaluate_argmax(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    return [_taps(arrays[0], attrs, -np.inf).argmax(axis=2).astype("int32")]


def _evaluate_unpool(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, argmax = arrays
    kh, kw = attrs["kernel"]
    chosen = argmax[:, :, None] == np.arange(kh * kw).reshape(-1, 1, 1)
    taps = np.where(chosen, g[:, :, None], g.dtype.type(0))
    return [_add(taps.reshape(*g.shape[:2], kh, kw, *g.shape[2:]), attrs)]


def _evaluate_gather(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, argmax = arrays
    return [
        np.take_along_axis(_taps(x, attrs, 0), argmax[:, :, None].astype("int64"), axis=2)[:, :, 0]
    ]


def _evaluate_avg(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    return [_taps(arrays[0], attrs, 0).mean(axis=2)]


def _evaluate_avg_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, (kh, kw) = arrays[0] / math.prod(attrs["kernel"]), attrs["kernel"]
    taps = np.broadcast_to(g[:, :, None, None], (*g.shape[:2], kh, kw, *g.shape[2:]))
    return [_add(taps, attrs)]


def _add(taps: np.ndarray, attrs: Attrs) -> np.ndarray:
    shape = (taps.shape[0], *attrs["input_shape"][1:])
    return add_windows(
        taps, shape, attrs["stride"], attrs["padding"], attrs.get("dilation", (1, 1))
    )


# ---- chain rules


def _geometry(node: Node) -> Attrs:
    return {key: value for key, value in node.attrs.items() if key != "input_shape"}


def _vjp_max(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    x, g, geometry = node.inputs[0], cotangents[0], _geometry(node)
    assert g is not None
    argmax = max_pool2d_argmax(x, **geometry)
    return (max_unpool2d(g, argmax, input_shape=x.sizes, **geometry),)


def _vjp_argmax(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return (None,)  # the choice is piecewise constant


def _vjp_unpool(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    c = cotangents[0]
    assert c is not None
    return max_pool2d_gather(c, node.inputs[1], **_geometry(node)), None


def _vjp_gather(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, argmax), g = node.inputs, cotangents[0]
    assert g is not None
    return max_unpool2d(g, argmax, input_shape=x.sizes, **_geometry(node)), None


def _vjp_avg(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    x, g = node.inputs[0], cotangents[0]
    assert g is not None
    return (avg_pool2d_grad(g, input_shape=x.sizes, **_geometry(node)),)


def _vjp_avg_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    c = cotangents[0]
    assert c is not None
    return (apply("avg_pool2d", c, **_geometry(node))[0],)


# ---- lowering


def _over_taps(
    k: Lowering,
    node: Node,
    index: tuple[Index, ...],
    combine: str,
    outside: float,
    body: Callable[[Expr, Index, Index], Expr] | None = None,
) -> Expr:
    """Fold the elements of operand 0 under one window.

    `body(element, kh, kw)` may change each first."""
    n, c, oh, ow = index
    shape, kernel = node.inputs[0].shape, node.attrs["kernel"]
    axes = window_axes(shape[2:], node.types[0].shape[2:], kernel, node.attrs)

    def tap(kh: Index, kw: Index) -> Expr:
        y, above = axes[0].input_position(oh, kh)
        x, beside = axes[1].input_position(ow, kw)
        element = k.read(0, (n, c, y, x))
        bounds = tuple(above + beside)
        element = within(bounds, element, outside) if bounds else element
        return body(element, kh, kw) if body else element

    return k.reduce(combine, kernel, tap)


def _lower_max(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    return _over_taps(k, node, index, "max", -math.inf)


def _lower_argmax(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    return _over_taps(k, node, index, "argmax", -math.inf)


def _lower_gather(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    width = node.attrs["kernel"][1]

    def chosen(element: Expr, kh: Index, kw: Index) -> Expr:
        return select(call("eq", k.read(1, index), position(kh * width + kw)), element, 0)

    return _over_taps(k, node, index, "sum", 0, chosen)


def _lower_unpool(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, c, ih, iw = index
    width = node.attrs["kernel"][1]

    def term(_: Indices, o: Indices, tap: Indices, bounds: Bounds) -> Expr:
        window = (n, c, *o)
        here = call("eq", k.read(1, window), position(tap[0] * width + tap[1]))
        share = select(here, k.read(0, window), 0)
        return within(bounds, share, 0) if bounds else share

    return sum_over_windows(k, _transposed_axes(node), (ih, iw), (), term)


def _lower_avg(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    return _over_taps(k, node, index, "sum", 0) * (1.0 / math.prod(node.attrs["kernel"]))


def _lower_avg_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, c, ih, iw = index

    def term(_: Indices, o: Indices, tap: Indices, bounds: Bounds) -> Expr:
        g = k.read(0, (n, c, *o))
        return within(bounds, g, 0) if bounds else g

    total = sum_over_windows(k, _transposed_axes(node), (ih, iw), (), term)
    return total * (1.0 / math.prod(node.attrs["kernel"]))


def _transposed_axes(node: Node) -> tuple[WindowAxis, WindowAxis]:
    return window_axes(
        node.types[0].shape[2:], node.inputs[0].shape[2:], node.attrs["kernel"], node.attrs
    )


# ---- samples

# (input shape, kernel, stride, padding, dilation)
_CASES = (
    ((2, 3, 6, 4), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    ((1, 2, 7, 5), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    ((2, 1, 7, 6), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    ((1, 2, 5, 6), (3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1)),
    ((1, 1, 7, 7), (2, 3), (1, 2), ((0, 0), (0, 0)), (2, 1)),
    ((1, 1, 9, 8), (2, 3), (2, 3), ((1, 0), (1, 2)), (3, 2)),
    ((1, 2, 6, 7), (2, 2), (3, 4), ((0, 0), (0, 0)), (1, 1)),
    ((3, 1, 1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ((0, 2, 4, 4), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
)


def _cases(dilated: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray, Attrs]]:
    rng = np.random.default_rng(30)
    for shape, kernel, stride, padding, dilation in _CASES:
        attrs: Attrs = {"kernel": kernel, "stride": stride, "padding": padding}
        if dilated:
            attrs["dilation"] = dilation
        elif dilation != (1, 1):
            continue
        # Distinct values: a finite difference must not change which element is largest.
        x = rng.permutation(math.prod(shape)).reshape(shape) / 10 - 2
        pooled = _evaluate_max([x], attrs)[0].shape
        yield x, rng.standard_normal(pooled), attrs


def _samples_max() -> list[Sample]:
    return [Sample((x,), attrs) for x, _, attrs in _cases()]


def _samples_argmax() -> list[Sample]:
    return [Sample((x,), attrs, grad=()) for x, _, attrs in _cases()]


def _samples_unpool() -> list[Sample]:
    return [
        Sample((g, _evaluate_argmax([x], attrs)[0]), {**attrs, "input_shape": x.shape})
        for x, g, attrs in _cases()
    ]


def _samples_gather() -> list[Sample]:
    return [
        Sample((x[..., ::-1].copy(), _evaluate_argmax([x], attrs)[0]), attrs)
        for x, _, attrs in _cases()
    ]


def _samples_avg() -> list[Sample]:
    return [Sample((x,), attrs) for x, _, attrs in _cases(dilated=False)]


def _samples_avg_grad() -> list[Sample]:
    return [
        Sample((g,), {**attrs, "input_shape": x.shape}) for x, g, attrs in _cases(dilated=False)
    ]


register(OpDef("max_pool2d", _infer_pool, _evaluate_max, _vjp_max, _lower_max, _samples_max))
register(
    OpDef(
        "max_pool2d_argmax",
        _infer_argmax,
        _evaluate_argmax,
        _vjp_argmax,
        _lower_argmax,
        _samples_argmax,
    )
)
register(
    OpDef(
        "max_unpool2d", _infer_unpool, _evaluate_unpool, _vjp_unpool, _lower_unpool, _samples_unpool
    )
)
register(
    OpDef(
        "max_pool2d_gather",
        _infer_gather,
        _evaluate_gather,
        _vjp_gather,
        _lower_gather,
        _samples_gather,
    )
)
register(OpDef("avg_pool2d", _infer_pool, _evaluate_avg, _vjp_avg, _lower_avg, _samples_avg))
register(
    OpDef(
        "avg_pool2d_grad",
        _infer_unpool,
        _evaluate_avg_grad,
        _vjp_avg_grad,
        _lower_avg_grad,
        _samples_avg_grad,
    )
)

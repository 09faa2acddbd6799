"""Operators that change the shape and compute nothing: reshape, transpose, expand.

flatten, squeeze and unsqueeze are reshapes. All lower to index maps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Dimension, Node, TensorType, Value
from graphc.ops.broadcast import broadcast_index, broadcast_shapes, unbroadcast
from graphc.ops.pointwise import SHAPES, chain_rule, draw
from graphc.ops.reduce import normalize_axes
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, here, register

__all__ = ["reshape", "flatten", "squeeze", "unsqueeze", "transpose", "expand", "stop_gradient"]


def reshape(x: Value, shape: Iterable[Dimension], name: str | None = None) -> Value:
    """The elements in row-major order with another shape; one dimension may be -1: what is left."""
    return apply("reshape", x, name=name, shape=_resolve_shape(x, tuple(shape)))[0]


def flatten(x: Value, start_axis: int = 1, name: str | None = None) -> Value:
    """All axes from `start_axis` on as one: [N, C, H, W] -> [N, C*H*W]."""
    start = checked_axis(x, start_axis, "flatten") if x.rank else 0
    return reshape(x, (*x.shape[:start], -1), name=name or "flatten")


def squeeze(x: Value, axis: int | Iterable[int], name: str | None = None) -> Value:
    """Without the given axes, which must have size 1."""
    axes = _axes(x, axis, "squeeze")
    for a in axes:
        if x.shape[a] != 1:
            raise errors.ShapeError(
                f"{here()}squeeze of {x.name!r} {x.type}: axis {a} has size {x.shape[a]}, not 1"
            )
    return reshape(x, [d for a, d in enumerate(x.shape) if a not in axes], name=name or "squeeze")


def unsqueeze(x: Value, axis: int | Iterable[int], name: str | None = None) -> Value:
    """With new axes of size 1 at the given positions of the result."""
    rank = x.rank + (1 if isinstance(axis, int) else len(axis := tuple(axis)))
    try:
        axes = normalize_axes(axis, rank)
    except errors.ShapeError as error:
        raise errors.ShapeError(f"{here()}unsqueeze of {x.name!r} {x.type}: {error}") from None
    sizes = iter(x.shape)
    return reshape(
        x, [1 if a in axes else next(sizes) for a in range(rank)], name=name or "unsqueeze"
    )


def transpose(x: Value, axes: Iterable[int] | None = None, name: str | None = None) -> Value:
    """Axes in another order: axis i of the result is axis axes[i] of x; None reverses them."""
    order = tuple(range(x.rank))[::-1] if axes is None else tuple(axes)
    if len(order) != x.rank or len(_axes(x, order, "transpose")) != x.rank:
        raise errors.ShapeError(
            f"{here()}transpose of {x.name!r} {x.type}: axes {order} do not order {x.rank} axes"
        )
    return apply("transpose", x, name=name, axes=tuple(int(a) % x.rank for a in order))[0]


def expand(x: Value, shape: Iterable[Dimension], name: str | None = None) -> Value:
    """Broadcast to `shape`: new axes in front, axes of size 1 repeated; -1 keeps an axis."""
    target = tuple(shape)
    lead = len(target) - x.rank
    for a, d in enumerate(target):
        if d == -1 and a < lead:
            raise errors.ShapeError(
                f"{here()}expand of {x.name!r} {x.type}: new axis {a} needs a size, not -1"
            )
    target = tuple(x.shape[a - lead] if d == -1 else d for a, d in enumerate(target))
    return apply("expand", x, name=name, shape=target)[0]


def stop_gradient(x: Value, name: str | None = None) -> Value:
    """x, to which no gradient flows."""
    return apply("stop_gradient", x, name=name)[0]


def _axes(x: Value, axis: int | Iterable[int], op: str) -> tuple[int, ...]:
    try:
        return normalize_axes(axis, x.rank)
    except errors.ShapeError as error:
        raise errors.ShapeError(f"{here()}{op} of {x.name!r} {x.type}: {error}") from None


def checked_axis(x: Value, axis: int, op: str) -> int:
    return _axes(x, axis, op)[0]


# ---- reshape


def _volume(shape: Sequence[Dimension]) -> tuple[int, Counter]:
    """Number of elements as an int and the names it is multiplied by."""
    return math.prod(d for d in shape if not isinstance(d, str)), Counter(
        d for d in shape if isinstance(d, str)
    )


def _resolve_shape(x: Value, shape: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    """`shape` with its -1 replaced."""
    shape = tuple(d if isinstance(d, str) else int(d) for d in shape)
    if -1 not in shape:
        return shape
    where_from = f"{here()}reshape of {x.name!r} {x.type} to {list(shape)}"
    if shape.count(-1) > 1:
        raise errors.ShapeError(f"{where_from}: only one dimension can be -1")
    (size, names), (given, given_names) = _volume(x.shape), _volume([d for d in shape if d != -1])
    left = names - given_names
    if given_names - names or left.total() > 1 or (left and size != given):
        raise errors.ShapeError(
            f"{where_from}: -1 is not one size or one name; give all dimensions"
        )
    if not left and (given == 0 or size % given):
        raise errors.ShapeError(f"{where_from}: {size} elements do not divide by {given}")
    rest: Dimension = next(iter(left)) if left else size // given
    return tuple(rest if d == -1 else d for d in shape)


def _reshape_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, shape = types[0], attrs["shape"]
    if any(not isinstance(d, str) and d < 0 for d in shape):
        raise errors.ShapeError(f"shape {list(shape)} has a negative size")
    if _volume(x.shape) != _volume(shape) and not (0 in x.shape and 0 in shape):
        raise errors.ShapeError(f"{x} cannot become {list(shape)}: the numbers of elements differ")
    return [TensorType(shape, x.dtype)]


def _reshape_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    source, target = node.inputs[0].sizes, node[0].sizes
    if 0 in source:
        return k.read(0, [Index()] * len(source))
    return k.read(0, reshape_index(k, source, target, index))


def reshape_index(
    k: Lowering, source: Sequence[int], target: Sequence[int], index: Sequence[Index]
) -> list[Index]:
    """The index into `source` of element `index` of its reshape to `target`; no axis is empty.

    Axes are matched in groups of equal volume, so that only the axes that change are divided."""
    found = [Index()] * len(source)
    axes_in = iter([a for a, d in enumerate(source) if d != 1])
    axes_out = iter([a for a, d in enumerate(target) if d != 1])
    for first in axes_in:
        group_in, group_out = [first], [next(axes_out)]
        volume_in, volume_out = source[first], target[group_out[0]]
        while volume_in != volume_out:
            if volume_in < volume_out:
                group_in.append(next(axes_in))
                volume_in *= source[group_in[-1]]
            else:
                group_out.append(next(axes_out))
                volume_out *= target[group_out[-1]]
        flat, stride = Index(), 1
        for axis in reversed(group_out):
            flat, stride = flat + index[axis] * stride, stride * target[axis]
        for axis in reversed(group_in[1:]):
            flat, found[axis] = k.divmod(flat, source[axis])
        found[group_in[0]] = flat
    return found


def _reshape_samples() -> list[Sample]:
    cases = [
        ((), (1, 1)),
        ((1,), ()),
        ((7,), (7, 1)),
        ((2, 17), (34,)),
        ((34,), (2, 17)),
        ((2, 3, 4), (2, 12)),
        ((2, 3, 4), (6, 4)),
        ((2, 3, 4), (4, 6)),
        ((6, 4), (2, 3, 2, 2)),
        ((1, 6, 1), (2, 1, 3)),
        ((0, 3), (3, 0, 2)),
    ]
    return [Sample((draw(a),), {"shape": b}) for a, b in cases]


register(
    OpDef(
        "reshape",
        infer=_reshape_infer,
        evaluate=lambda arrays, attrs: [arrays[0].reshape(attrs["shape"])],
        vjp=chain_rule(lambda node, g: reshape(g, node.inputs[0].shape)),
        lower=_reshape_lower,
        samples=_reshape_samples,
    )
)


# ---- transpose


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(a) for a in np.argsort(axes))


def _transpose_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    return k.read(0, [index[a] for a in _inverse(node.attrs["axes"])])


register(
    OpDef(
        "transpose",
        infer=lambda types, attrs: [
            TensorType(tuple(types[0].shape[a] for a in attrs["axes"]), types[0].dtype)
        ],
        evaluate=lambda arrays, attrs: [arrays[0].transpose(attrs["axes"])],
        vjp=chain_rule(lambda node, g: transpose(g, _inverse(node.attrs["axes"]))),
        lower=_transpose_lower,
        samples=lambda: [
            Sample((draw(shape),), {"axes": axes})
            for shape, axes in [
                ((), ()),
                ((7,), (0,)),
                ((2, 17), (1, 0)),
                ((2, 3, 4), (1, 2, 0)),
                ((2, 1, 3, 4), (0, 3, 1, 2)),
                ((0, 3), (1, 0)),
            ]
        ],
    )
)


# ---- expand


def _expand_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, shape = types[0], attrs["shape"]
    if any(not isinstance(d, str) and d < 0 for d in shape):
        raise errors.ShapeError(f"shape {list(shape)} has a negative size")
    if broadcast_shapes(x.shape, shape) != shape:
        raise errors.ShapeError(
            f"{x} does not broadcast to {list(shape)}: only axes of size 1 are repeated"
        )
    return [TensorType(shape, x.dtype)]


register(
    OpDef(
        "expand",
        infer=_expand_infer,
        evaluate=lambda arrays, attrs: [np.broadcast_to(arrays[0], attrs["shape"]).copy()],
        vjp=chain_rule(lambda node, g: unbroadcast(g, node.inputs[0].shape)),
        lower=lambda k, node, output, index: k.read(
            0, broadcast_index(index, node.inputs[0].shape)
        ),
        samples=lambda: [
            Sample((draw(a),), {"shape": b})
            for a, b in [
                ((), ()),
                ((), (2, 3)),
                ((1,), (7,)),
                ((2, 1), (2, 17)),
                ((1, 3), (4, 2, 3)),
                ((3, 1, 2), (3, 5, 2)),
                ((1, 3), (0, 3)),
            ]
        ],
    )
)


# ---- stop_gradient


register(
    OpDef(
        "stop_gradient",
        infer=lambda types, attrs: [types[0]],
        evaluate=lambda arrays, attrs: [arrays[0]],
        vjp=lambda node, cotangents: [None],
        lower=lambda k, node, output, index: k.read(0, index),
        samples=lambda: [Sample((draw(shape),), {}) for shape in SHAPES],
        elementwise=True,
    )
)

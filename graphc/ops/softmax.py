"""softmax, log_softmax and logsumexp along axes, stable for operands of any size.

All subtract the largest element first, so that exp never overflows (Blanchard, Higham & Higham
2021, "Accurately computing the log-sum-exp and softmax functions").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphc import errors
from graphc.ir import Node, TensorType, Value
from graphc.ops.compare import eq, where
from graphc.ops.elementwise import abs as absolute
from graphc.ops.elementwise import add, div, exp, log, mul, sub
from graphc.ops.reduce import max as reduce_max
from graphc.ops.reduce import sum as reduce_sum
from graphc.ops.registry import Attrs, OpDef, Sample, apply, register
from graphc.ops.shape import reshape

__all__ = ["softmax", "log_softmax", "logsumexp"]


def softmax(x: Value, axis: int = -1, name: str | None = None) -> Value:
    """exp(x) / sum(exp(x)) along `axis`. Raises ShapeError, DTypeError."""
    return apply("softmax", x, axis=_axes(x, axis, "softmax")[0], name=name)[0]


def log_softmax(x: Value, axis: int = -1, name: str | None = None) -> Value:
    """log(softmax(x)) along `axis`, without forming the quotient. Raises ShapeError, DTypeError."""
    return apply("log_softmax", x, axis=_axes(x, axis, "log_softmax")[0], name=name)[0]


def logsumexp(
    x: Value,
    axis: int | Sequence[int] | None = None,
    keepdims: bool = False,
    name: str | None = None,
) -> Value:
    """log(sum(exp(x))) over one axis, several, or all (None). Raises ShapeError, DTypeError."""
    return apply(
        "logsumexp", x, axis=_axes(x, axis, "logsumexp"), keepdims=bool(keepdims), name=name
    )[0]


def _axes(x: Value, axis: int | Sequence[int] | None, op: str) -> tuple[int, ...]:
    """Axes counted from the front, ascending."""
    axes = (
        range(x.rank) if axis is None else (axis,) if isinstance(axis, (int, np.integer)) else axis
    )
    wrong = [a for a in axes if not -x.rank <= a < x.rank]
    if wrong or len({a % x.rank for a in axes}) < len(axes):
        raise errors.ShapeError(
            f"{op}: axis={axis!r} must name different axes of {x.name!r} {x.type}, between "
            f"{-x.rank} and {x.rank - 1}"
        )
    return tuple(sorted(int(a) % x.rank for a in axes))


# ---- type rules


def _checked(x: TensorType, axes: tuple[int, ...]) -> TensorType:
    if not x.is_float:
        raise errors.DTypeError(
            f"operand {x} must be float32 or float64; convert it with gc.cast(x, 'float32')"
        )
    for axis in axes:
        if not 0 <= axis < x.rank:
            raise errors.ShapeError(f"axis {axis} is not one of {x}")
        if x.shape[axis] == 0:
            raise errors.ShapeError(
                f"axis {axis} of {x} is empty: there is nothing to normalise over"
            )
    return x


def _infer_same(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    return [_checked(types[0], (attrs["axis"],))]


def _infer_logsumexp(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, axes = _checked(types[0], attrs["axis"]), attrs["axis"]
    kept = [
        1 if i in axes else d for i, d in enumerate(x.shape) if attrs["keepdims"] or i not in axes
    ]
    return [TensorType(tuple(kept), x.dtype)]


# ---- NumPy references


def _evaluate_softmax(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    e = np.exp(arrays[0] - arrays[0].max(axis=attrs["axis"], keepdims=True))
    return [e / e.sum(axis=attrs["axis"], keepdims=True)]


def _evaluate_log_softmax(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    z = arrays[0] - arrays[0].max(axis=attrs["axis"], keepdims=True)
    return [z - np.log(np.exp(z).sum(axis=attrs["axis"], keepdims=True))]


def _evaluate_logsumexp(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, axes = arrays[0], attrs["axis"]
    m = x.max(axis=axes, keepdims=True)
    m = np.where(np.isinf(m), x.dtype.type(0), m)
    y = m + np.log(np.exp(x - m).sum(axis=axes, keepdims=True))
    return [y if attrs["keepdims"] else y.squeeze(axes)]


# ---- parts


def _decompose_softmax(node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    x, axis = operands[0], node.attrs["axis"]
    e = exp(sub(x, reduce_max(x, axis=axis, keepdims=True)))
    return (div(e, reduce_sum(e, axis=axis, keepdims=True)),)


def _decompose_log_softmax(node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    x, axis = operands[0], node.attrs["axis"]
    z = sub(x, reduce_max(x, axis=axis, keepdims=True))
    return (sub(z, log(reduce_sum(exp(z), axis=axis, keepdims=True))),)


def _decompose_logsumexp(node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    x, axes = operands[0], node.attrs["axis"]
    m = reduce_max(x, axis=axes, keepdims=True)
    # An infinite maximum is the result itself; subtracting it would give inf - inf.
    m = where(eq(absolute(m), float("inf")), 0.0, m)
    y = add(m, log(reduce_sum(exp(sub(x, m)), axis=axes, keepdims=True)))
    return (y if y.type == node.types[0] else reshape(y, node.types[0].shape),)


# ---- chain rules, from each operator's own result


def _vjp_softmax(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    """dy = y * (dx - sum(y * dx)), whose matrix is symmetric."""
    y, g, axis = node[0], cotangents[0], node.attrs["axis"]
    assert g is not None
    return (mul(y, sub(g, reduce_sum(mul(g, y), axis=axis, keepdims=True))),)


def _vjp_log_softmax(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    y, g, axis = node[0], cotangents[0], node.attrs["axis"]
    assert g is not None
    return (sub(g, mul(exp(y), reduce_sum(g, axis=axis, keepdims=True))),)


def _vjp_logsumexp(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    x, axes = node.inputs[0], node.attrs["axis"]
    kept = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    g = cotangents[0]
    assert g is not None
    y, g = (v if v.shape == kept else reshape(v, kept) for v in (node[0], g))
    return (mul(g, exp(sub(x, y))),)


# ---- samples


def _samples_axis() -> list[Sample]:
    rng = np.random.default_rng(40)
    cases = (
        ((3, 5), 1),
        ((3, 5), 0),
        ((2, 7, 3), 1),
        ((17,), 0),
        ((4, 1), 1),
        ((0, 3), 1),
        ((2, 3, 4), 2),
    )
    return [Sample((3 * rng.standard_normal(shape),), {"axis": axis}) for shape, axis in cases]


def _samples_logsumexp() -> list[Sample]:
    rng = np.random.default_rng(41)
    cases = (
        ((3, 5), (1,), False),
        ((3, 5), (0,), True),
        ((2, 7, 3), (0, 2), False),
        ((2, 7, 3), (0, 1, 2), True),
        ((17,), (0,), False),
        ((0, 3), (1,), False),
        ((), (), False),
    )
    return [
        Sample((3 * rng.standard_normal(shape),), {"axis": axes, "keepdims": keepdims})
        for shape, axes, keepdims in cases
    ]


register(
    OpDef(
        "softmax",
        _infer_same,
        _evaluate_softmax,
        _vjp_softmax,
        None,
        _samples_axis,
        _decompose_softmax,
    )
)
register(
    OpDef(
        "log_softmax",
        _infer_same,
        _evaluate_log_softmax,
        _vjp_log_softmax,
        None,
        _samples_axis,
        _decompose_log_softmax,
    )
)
register(
    OpDef(
        "logsumexp",
        _infer_logsumexp,
        _evaluate_logsumexp,
        _vjp_logsumexp,
        None,
        _samples_logsumexp,
        _decompose_logsumexp,
    )
)

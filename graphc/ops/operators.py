"""Python's operators and a few methods for `Value`, bound when this module is imported.

`==` and `!=` stay identity, as dictionaries of values need; use `gc.eq` and `gc.ne` for elements.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable
from typing import Any

from graphc import errors
from graphc.ir import Axis, Dimension, Value
from graphc.ops import compare, elementwise, reduce, shape, slicing


def _matmul(a: Any, b: Any) -> Value:
    from graphc.ops.matmul import matmul

    return matmul(a, b)


def _reflected(function: Callable) -> Callable:
    return lambda self, other: function(other, self)


def getitem(x: Value, key: Any) -> Value:
    """x[key] for ints, slices with steps >= 1, Ellipsis and None, as in NumPy."""
    items = key if isinstance(key, tuple) else (key,)
    for item in items:
        if (
            item is not None
            and item is not Ellipsis
            and not isinstance(item, (int, builtins.slice))
        ):
            raise errors.DeclarationError(
                f"{x.name!r} {x.type} cannot be indexed with {type(item).__name__}; "
                f"use ints, slices, ... or None"
            )
    used = builtins.sum(item is not None and item is not Ellipsis for item in items)
    if used > x.rank or builtins.sum(item is Ellipsis for item in items) > 1:
        raise errors.ShapeError(
            f"{x.name!r} {x.type} has {x.rank} axes and cannot be indexed with {items}"
        )
    if Ellipsis not in items:
        items = (*items, Ellipsis)
    at = items.index(Ellipsis)
    items = (*items[:at], *[builtins.slice(None)] * (x.rank - used), *items[at + 1 :])

    starts: list[int | None] = []
    stops: list[int | None] = []
    steps: list[int] = []
    kept: list[int | None] = []  # axes of the slice that stay; None: a new axis
    for item in items:
        axis = len(starts)
        if item is None:
            kept.append(None)
        elif isinstance(item, int):
            position = _checked_position(x, axis, item)
            starts, stops, steps = [*starts, position], [*stops, position + 1], [*steps, 1]
        else:
            kept.append(axis)
            starts, stops = [*starts, item.start], [*stops, item.stop]
            steps = [*steps, 1 if item.step is None else item.step]
    whole = all(
        a in (None, 0) and b is None and s == 1
        for a, b, s in zip(starts, stops, steps, strict=True)
    )
    part = x if whole else slicing.slice(x, starts, stops, steps)
    if kept == list(range(x.rank)):
        return part
    return shape.reshape(part, [1 if axis is None else part.shape[axis] for axis in kept])


def _checked_position(x: Value, axis: int, item: int) -> int:
    size = x.shape[axis]
    low = -size if isinstance(size, int) else 0
    if item < low or (isinstance(size, int) and item >= size):
        raise errors.ShapeError(f"{x.name!r} {x.type}: index {item} of axis {axis} is out of range")
    return item + size if isinstance(size, int) and item < 0 else item


def _sum(self: Value, axis: Axis = None, keepdims: bool = False) -> Value:
    return reduce.sum(self, axis, keepdims)


def _mean(self: Value, axis: Axis = None, keepdims: bool = False) -> Value:
    return reduce.mean(self, axis, keepdims)


def _max(self: Value, axis: Axis = None, keepdims: bool = False) -> Value:
    return reduce.max(self, axis, keepdims)


def _min(self: Value, axis: Axis = None, keepdims: bool = False) -> Value:
    return reduce.min(self, axis, keepdims)


def _reshape(self: Value, *sizes: Dimension | Iterable[Dimension]) -> Value:
    """x.reshape(2, -1) or x.reshape((2, -1))."""
    single = len(sizes) == 1 and not isinstance(sizes[0], (int, str))
    return shape.reshape(self, sizes[0] if single else sizes)  # type: ignore[arg-type]


def _transpose(self: Value, *axes: int | Iterable[int]) -> Value:
    """x.transpose(1, 0), x.transpose((1, 0)) or, reversing all axes, x.transpose()."""
    if len(axes) == 1 and not isinstance(axes[0], int):
        return shape.transpose(self, axes[0])
    return shape.transpose(self, axes or None)  # type: ignore[arg-type]


def _astype(self: Value, dtype: str) -> Value:
    return compare.cast(self, dtype)


_BINARY = {
    "add": elementwise.add,
    "sub": elementwise.sub,
    "mul": elementwise.mul,
    "truediv": elementwise.div,
    "pow": elementwise.pow,
    "matmul": _matmul,
}
_COMPARE = {"lt": compare.lt, "le": compare.le, "gt": compare.gt, "ge": compare.ge}
_METHODS = {
    "__neg__": lambda self: elementwise.neg(self),
    "__abs__": lambda self: elementwise.abs(self),
    "__getitem__": getitem,
    "sum": _sum,
    "mean": _mean,
    "max": _max,
    "min": _min,
    "reshape": _reshape,
    "transpose": _transpose,
    "astype": _astype,
}


def _bind() -> None:
    for name, function in _BINARY.items():
        setattr(Value, f"__{name}__", lambda self, other, f=function: f(self, other))
        setattr(Value, f"__r{name}__", _reflected(function))
    for name, function in _COMPARE.items():
        setattr(Value, f"__{name}__", lambda self, other, f=function: f(self, other))
    for name, method in _METHODS.items():
        setattr(Value, name, method)
    # Makes `array + value` ask the value instead of spreading over the array's elements.
    Value.__array_ufunc__ = None


_bind()

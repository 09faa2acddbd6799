"""NumPy broadcasting: of types, of indices, and its transpose (summing a cotangent back)."""

from __future__ import annotations

import functools

from graphc import errors
from graphc.expr import Index
from graphc.ir import Dimension, TensorType, Value


@functools.lru_cache(1 << 12)
def broadcast_shapes(*shapes: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    """The common shape. Raises ShapeError. Symbolic dimensions match themselves and 1."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dimension] = []
    for axis in range(-rank, 0):
        dims = [s[axis] for s in shapes if len(s) >= -axis]
        wide = [d for d in dims if d != 1]
        if len(set(wide)) > 1:
            listed = " and ".join(str(list(s)) for s in shapes)
            differing = " and ".join(str(d) for d in dict.fromkeys(wide))
            raise errors.ShapeError(
                f"shapes {listed} do not broadcast: axis {axis} has sizes {differing}; "
                f"reshape or expand one of them"
            )
        result.append(wide[0] if wide else 1)
    return tuple(result)


def same_dtype(types: list[TensorType], what: str = "operands") -> str:
    """The one dtype of all types. Raises DTypeError naming the cast to insert."""
    kinds = list(dict.fromkeys(t.dtype for t in types))
    if len(kinds) > 1:
        raise errors.DTypeError(
            f"{what} mix {' and '.join(kinds)}; convert one with gc.cast(x, {kinds[0]!r})"
        )
    return kinds[0]


def broadcast_index(index: tuple[Index, ...], shape: tuple[Dimension, ...]) -> tuple[Index, ...]:
    """The index into an operand of `shape` for an element of the broadcast result."""
    tail = index[len(index) - len(shape) :]
    return tuple(Index() if d == 1 else i for i, d in zip(tail, shape, strict=True))


def unbroadcast(cotangent: Value, shape: tuple[Dimension, ...]) -> Value:
    """Sum a cotangent over the axes that broadcasting added or stretched, back to `shape`."""
    if cotangent.shape == shape:
        return cotangent
    from graphc.ops.reduce import sum as reduce_sum
    from graphc.ops.shape import reshape

    lead = cotangent.rank - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, d in enumerate(shape) if d == 1 and cotangent.shape[lead + i] != 1
    )
    summed = reduce_sum(cotangent, axis=axes, keepdims=True) if axes else cotangent
    return summed if summed.shape == shape else reshape(summed, shape)

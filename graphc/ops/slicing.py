"""Taking values apart and putting them together: slice, split, pad, concat, stack.

All lower to index maps; what lies outside an operand is never read.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, within
from graphc.ir import Dimension, Node, TensorType, Value
from graphc.ops.broadcast import same_dtype
from graphc.ops.pointwise import chain_rule, differentiable, draw
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, here, register
from graphc.ops.shape import checked_axis, reshape, unsqueeze

__all__ = ["slice", "split", "pad", "concat", "stack"]


def slice(
    x: Value,
    starts: Sequence[int | None],
    stops: Sequence[int | None],
    steps: Sequence[int] | None = None,
    name: str | None = None,
) -> Value:
    """x[starts[0]:stops[0]:steps[0], ...], given for the first axes; steps >= 1.

    Bounds are read as Python reads them: None is the end, negative ones count from it. An axis
    whose size is a name takes whole slices, or bounds >= 0 that the size must reach once bound.
    """
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(stops) == len(steps) <= x.rank:
        raise errors.ShapeError(
            f"{here()}slice of {x.name!r} {x.type}: {len(starts)} starts, {len(stops)} stops and "
            f"{len(steps)} steps for {x.rank} axes"
        )
    bounds = [_bounds(x, a, *b) for a, b in enumerate(zip(starts, stops, steps, strict=True))]
    bounds += [(0, d, 1) for d in x.shape[len(bounds) :]]
    return apply(
        "slice",
        x,
        name=name,
        starts=tuple(b[0] for b in bounds),
        stops=tuple(b[1] for b in bounds),
        steps=tuple(b[2] for b in bounds),
    )[0]


def split(
    x: Value, parts: int | Sequence[int], axis: int = 0, name: str | None = None
) -> tuple[Value, ...]:
    """Consecutive slices along an axis: `parts` equal ones, or one of each size given."""
    axis = checked_axis(x, axis, "split")
    size = x.shape[axis]
    if isinstance(size, str):
        raise errors.ShapeError(
            f"{here()}split of {x.name!r} {x.type}: axis {axis} has no size yet"
        )
    if isinstance(parts, int):
        if parts < 1 or size % parts:
            raise errors.ShapeError(
                f"{here()}split of {x.name!r} {x.type}: "
                f"axis {axis} does not divide into {parts} parts"
            )
        parts = [size // parts] * parts
    if builtins.sum(parts) != size or builtins.min(parts, default=0) < 0:
        raise errors.ShapeError(
            f"{here()}split of {x.name!r} {x.type}: sizes {list(parts)} do not add up to {size}"
        )
    found, start, before = [], 0, [None] * axis
    for part in parts:
        found.append(slice(x, [*before, start], [*before, start + part], name=name or "split"))
        start += part
    return tuple(found)


def pad(
    x: Value, padding: Sequence[tuple[int, int]], value: float = 0.0, name: str | None = None
) -> Value:
    """`value` before and after each axis: `padding` is ((before, after), ...), a pair for each."""
    pairs = tuple((int(before), int(after)) for before, after in padding)
    return apply("pad", x, name=name, padding=pairs, value=value)[0]


def concat(values: Sequence[Value], axis: int = 0, name: str | None = None) -> Value:
    """Values one after the other along an axis; the other axes must agree."""
    if not values:
        raise errors.ShapeError("concat: needs at least one value")
    return apply("concat", *values, name=name, axis=checked_axis(values[0], axis, "concat"))[0]


def stack(values: Sequence[Value], axis: int = 0, name: str | None = None) -> Value:
    """Values of one shape along a new axis."""
    return concat([unsqueeze(v, axis) for v in values], axis, name=name or "stack")


# ---- slice


def _bounds(
    x: Value, axis: int, start: int | None, stop: int | None, step: int
) -> tuple[int, Dimension, int]:
    """Python's slice bounds as start in [0, size], stop in [start, size] and step >= 1."""
    size = x.shape[axis]
    if step < 1:
        raise errors.ShapeError(
            f"{here()}slice of {x.name!r} {x.type}: step {step} of axis {axis} is below 1"
        )
    if isinstance(size, int):
        first, last, _ = builtins.slice(start, stop, step).indices(size)
        return int(first), int(builtins.max(first, last)), int(step)
    if start in (None, 0) and stop is None and step == 1:
        return 0, size, 1
    if stop is None or stop < 0 or (start or 0) < 0:
        raise errors.ShapeError(
            f"{here()}slice of {x.name!r} {x.type}: axis {axis} has no size yet; "
            f"slice it whole or with bounds >= 0"
        )
    return int(start or 0), int(builtins.max(start or 0, stop)), int(step)


def _slice_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    shape: list[Dimension] = []
    for axis, (size, start, stop, step) in enumerate(
        zip(types[0].shape, attrs["starts"], attrs["stops"], attrs["steps"], strict=True)
    ):
        if isinstance(stop, str):
            shape.append(stop)
            continue
        if isinstance(size, int) and not 0 <= start <= stop <= size:
            raise errors.ShapeError(
                f"bounds {start}:{stop} of axis {axis} do not lie within its size {size}"
            )
        shape.append(-(-(stop - start) // step))
    return [TensorType(tuple(shape), types[0].dtype)]


def _slice_evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    bounds = zip(attrs["starts"], attrs["stops"], attrs["steps"], strict=True)
    return [arrays[0][tuple(builtins.slice(*b) for b in bounds)]]


def _slice_vjp(node: Node, g: Value) -> Value:
    shape, steps = node.inputs[0].sizes, node.attrs["steps"]
    if any(step > 1 for step in steps):
        g = _dilate(g, steps)
    before = node.attrs["starts"]
    after = [size - start - part for size, start, part in zip(shape, before, g.sizes, strict=True)]
    return pad(g, list(zip(before, after, strict=True))) if any((*before, *after)) else g


def _dilate(x: Value, steps: Sequence[int]) -> Value:
    """step - 1 zeros between neighbours of each axis: [n] -> [(n - 1) * step + 1]."""
    wide = [d for size in x.sizes for d in (size, 1)]
    gaps = [pair for step in steps for pair in ((0, 0), (0, step - 1))]
    spread = reshape(
        pad(reshape(x, wide), gaps), [d * s for d, s in zip(x.sizes, steps, strict=True)]
    )
    stops = [builtins.max((d - 1) * s + 1, 0) for d, s in zip(x.sizes, steps, strict=True)]
    return slice(spread, [0] * x.rank, stops)


def _slice_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    bounds = zip(index, node.attrs["starts"], node.attrs["steps"], strict=True)
    return k.read(0, [i * step + start for i, start, step in bounds])


def _slice_samples() -> list[Sample]:
    cases = [
        ((), (), (), ()),
        ((7,), (2,), (5,), (1,)),
        ((17,), (1,), (17,), (3,)),
        ((17,), (0,), (16,), (5,)),
        ((2, 7), (0, 1), (2, 6), (1, 2)),
        ((4, 3, 5), (1, 0, 2), (4, 3, 3), (2, 1, 1)),
        ((7,), (3,), (3,), (2,)),
        ((0, 3), (0, 1), (0, 3), (1, 1)),
    ]
    return [Sample((draw(s),), {"starts": a, "stops": b, "steps": c}) for s, a, b, c in cases]


register(
    OpDef(
        "slice",
        infer=_slice_infer,
        evaluate=_slice_evaluate,
        vjp=chain_rule(_slice_vjp),
        lower=_slice_lower,
        samples=_slice_samples,
    )
)


# ---- pad


def _pad_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, padding = types[0], attrs["padding"]
    if len(padding) != x.rank:
        raise errors.ShapeError(f"padding has {len(padding)} pairs for the {x.rank} axes of {x}")
    shape: list[Dimension] = []
    for axis, (size, (before, after)) in enumerate(zip(x.shape, padding, strict=True)):
        if before < 0 or after < 0:
            raise errors.ShapeError(
                f"padding {(before, after)} of axis {axis} is negative; use a slice"
            )
        if isinstance(size, str) and before + after:
            raise errors.ShapeError(f"axis {axis} of {x} has no size yet and cannot be padded")
        shape.append(size if isinstance(size, str) else size + before + after)
    return [TensorType(tuple(shape), x.dtype)]


def _pad_evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    return [
        np.pad(arrays[0], attrs["padding"], constant_values=attrs["value"])
        if arrays[0].ndim
        else arrays[0]
    ]


def _pad_vjp(node: Node, g: Value) -> Value:
    starts = [before for before, _ in node.attrs["padding"]]
    return slice(g, starts, [s + d for s, d in zip(starts, node.inputs[0].sizes, strict=True)])


def _pad_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    shape, padding = node.inputs[0].sizes, node.attrs["padding"]
    source = [i - before for i, (before, _) in zip(index, padding, strict=True)]
    inside = k.read(0, source)
    bounds = tuple((i, d) for i, d, p in zip(source, shape, padding, strict=True) if any(p))
    kind = {"f": float, "i": int, "b": bool}[np.dtype(inside.dtype).kind]
    return within(bounds, inside, kind(node.attrs["value"])) if bounds else inside


def _pad_samples() -> list[Sample]:
    cases = [
        ((), (), 0.0),
        ((7,), ((1, 2),), 0.0),
        ((1,), ((0, 16),), -1.5),
        ((2, 3), ((0, 0), (2, 0)), float("-inf")),
        ((2, 3, 4), ((1, 0), (0, 0), (2, 3)), 0.5),
        ((0, 3), ((1, 1), (0, 1)), 0.0),
    ]
    found = [Sample((draw(s),), {"padding": p, "value": v}) for s, p, v in cases]
    return [
        *found,
        Sample(
            (np.arange(6, dtype=np.int32).reshape(2, 3),),
            {"padding": ((0, 1), (1, 0)), "value": 7.0},
        ),
    ]


register(
    OpDef(
        "pad",
        infer=_pad_infer,
        evaluate=_pad_evaluate,
        vjp=chain_rule(_pad_vjp),
        lower=_pad_lower,
        samples=_pad_samples,
    )
)


# ---- concat


def _concat_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    axis, first = attrs["axis"], types[0]
    dtype = same_dtype(types)
    others = [(*t.shape[:axis], *t.shape[axis + 1 :]) for t in types]
    for t, other in zip(types, others, strict=True):
        if t.rank != first.rank or other != others[0]:
            raise errors.ShapeError(
                f"{first} and {t} differ in another axis than {axis}, along which they are joined"
            )
    sizes = [t.shape[axis] for t in types]
    if len(sizes) > 1 and any(isinstance(d, str) for d in sizes):
        raise errors.ShapeError(f"axis {axis} of {first} has no size yet and cannot be joined")
    total = sizes[0] if len(sizes) == 1 else builtins.sum(int(d) for d in sizes)
    return [TensorType((*first.shape[:axis], total, *first.shape[axis + 1 :]), dtype)]


def _concat_vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    g, before = cotangents[0], [None] * node.attrs["axis"]
    found: list[Value | None] = []
    start = 0
    for value in node.inputs:
        stop = start + value.sizes[node.attrs["axis"]]
        if g is not None and differentiable(value):
            found.append(slice(g, [*before, start], [*before, stop]))
        else:
            found.append(None)
        start = stop
    return found


def _concat_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    axis, dtype = node.attrs["axis"], node.types[0].dtype
    starts = [0, *map(int, np.cumsum([v.sizes[axis] for v in node.inputs]))]
    nothing: Expr | float = {"f": 0.0, "i": 0, "b": False}[np.dtype(dtype).kind]

    def choose(low: int, high: int) -> Expr:
        """The element of one of the operands from `low` to before `high`: a tree, not a chain, so
        that expressions of hundreds of operands are not hundreds of levels deep."""
        middle = (low + high) // 2 if high - low > 1 else high
        local = index[axis] - starts[low]
        if middle - low == 1:
            first = k.read(low, (*index[:axis], local, *index[axis + 1 :]))
        else:
            first = choose(low, middle)
        # The last operand is guarded too: no operand is read outside its bounds.
        rest = choose(middle, high) if middle < high else nothing
        return within(((local, starts[middle] - starts[low]),), first, rest)

    return choose(0, len(node.inputs))


def _concat_samples() -> list[Sample]:
    cases: list[tuple[list[tuple[int, ...]], int]] = [
        ([(7,)], 0),
        ([(1,), (17,), (2,)], 0),
        ([(2, 3), (2, 1)], 1),
        ([(2, 3, 2), (1, 3, 2), (4, 3, 2)], 0),
        ([(0, 3), (2, 3)], 0),
        ([(2, 0), (2, 0)], 1),
    ]
    found = [
        Sample(tuple(draw(s, seed=i) for i, s in enumerate(shapes)), {"axis": axis})
        for shapes, axis in cases
    ]
    return [
        *found,
        Sample((np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)), {"axis": 0}),
    ]


register(
    OpDef(
        "concat",
        infer=_concat_infer,
        evaluate=lambda arrays, attrs: [np.concatenate(arrays, axis=attrs["axis"])],
        vjp=_concat_vjp,
        lower=_concat_lower,
        samples=_concat_samples,
    )
)

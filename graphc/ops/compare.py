"""Comparisons and what is done with them: where, logical operators, casts, one-hot codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, call, position, select
from graphc.expr import cast as cast_expr
from graphc.ir import DTYPES, Node, TensorType, Value
from graphc.ops.broadcast import broadcast_shapes, same_dtype, unbroadcast
from graphc.ops.pointwise import (
    SHAPE_PAIRS,
    broadcast_type,
    check_dtype,
    differentiable,
    draw,
    lower_of,
    operands,
)
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, here, register

__all__ = ["lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not"]
__all__ += ["where", "cast", "one_hot"]


def lt(a: Any, b: Any, name: str | None = None) -> Value:
    """a < b as bool, broadcast."""
    return apply("lt", *operands(a, b), name=name)[0]


def le(a: Any, b: Any, name: str | None = None) -> Value:
    """a <= b as bool, broadcast."""
    return apply("le", *operands(a, b), name=name)[0]


def gt(a: Any, b: Any, name: str | None = None) -> Value:
    """a > b as bool, broadcast."""
    return apply("gt", *operands(a, b), name=name)[0]


def ge(a: Any, b: Any, name: str | None = None) -> Value:
    """a >= b as bool, broadcast."""
    return apply("ge", *operands(a, b), name=name)[0]


def eq(a: Any, b: Any, name: str | None = None) -> Value:
    """Elementwise a == b as bool, broadcast. (The operator `==` compares identities.)"""
    return apply("eq", *operands(a, b), name=name)[0]


def ne(a: Any, b: Any, name: str | None = None) -> Value:
    """Elementwise a != b as bool, broadcast."""
    return apply("ne", *operands(a, b), name=name)[0]


def logical_and(a: Any, b: Any, name: str | None = None) -> Value:
    """True where both bool operands are, broadcast."""
    return apply("logical_and", *operands(a, b), name=name)[0]


def logical_or(a: Any, b: Any, name: str | None = None) -> Value:
    """True where one of the bool operands is, broadcast."""
    return apply("logical_or", *operands(a, b), name=name)[0]


def logical_not(x: Value, name: str | None = None) -> Value:
    """True where the bool operand is False."""
    return apply("logical_not", x, name=name)[0]


def where(condition: Any, a: Any, b: Any, name: str | None = None) -> Value:
    """`a` where the bool `condition` holds, `b` elsewhere; all three broadcast.

    The gradient flows only to the operand chosen. Two plain numbers become float32."""
    if isinstance(a, Value) or isinstance(b, Value):
        a, b = operands(a, b)
        condition = (
            condition if isinstance(condition, Value) else a.graph.constant(condition, dtype="bool")
        )
    elif isinstance(condition, Value):
        a, b = (condition.graph.constant(x, dtype="float32") for x in (a, b))
    return apply("where", condition, a, b, name=name)[0]


def cast(x: Value, dtype: str, name: str | None = None) -> Value:
    """`x` converted to `dtype`; `x` itself if it has that dtype.

    Floats become ints by truncation towards zero. Gradients flow between float dtypes."""
    return x if x.dtype == dtype else apply("cast", x, name=name, dtype=dtype)[0]


def one_hot(
    labels: Value, classes: int, dtype: str = "float32", axis: int = -1, name: str | None = None
) -> Value:
    """1 at each label's class, 0 elsewhere: int[...] -> dtype[..., classes].

    `axis` is where the new axis is in the result. A label outside [0, classes) gives all zeros."""
    rank = labels.rank + 1
    if not -rank <= axis < rank:
        raise errors.ShapeError(
            f"{here()}one_hot of {labels.name!r} {labels.type}: "
            f"axis {axis} is not in [-{rank}, {rank})"
        )
    return apply("one_hot", labels, name=name, classes=int(classes), dtype=dtype, axis=axis % rank)[
        0
    ]


def _define_predicate(
    name: str, reference: Callable, scalar: Callable[..., Expr], kinds: Sequence[str]
) -> None:
    """Registers an operator with a bool result. No gradient flows: the result is constant almost
    everywhere, and derivatives of masked gradients (relu's, max's) must pass through it."""

    def infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
        return broadcast_type(
            "bool" if all(t.dtype == "bool" for t in types) and "bool" in kinds else kinds[0],
            "bool",
        )(types, attrs)

    def evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
        return [np.asarray(reference(*arrays), dtype=bool)]

    def samples() -> list[Sample]:
        found = []
        for p, q in SHAPE_PAIRS:
            # Few distinct values, so that equal pairs occur.
            pair = [np.rint(draw(p, seed=1)), np.rint(draw(q, seed=2))]
            for kind in kinds:
                arrays = pair if kind == "number" else [a > 0 for a in pair]
                found.append(Sample(tuple(arrays[:1] if name == "logical_not" else arrays), {}))
        found += [Sample(tuple(a.astype(np.int32) for a in pair), {})] if "number" in kinds else []
        return found

    register(
        OpDef(
            name,
            infer,
            evaluate,
            vjp=lambda node, cotangents: [None] * len(node.inputs),
            lower=lower_of(scalar),
            samples=samples,
            elementwise=True,
        )
    )


_define_predicate("lt", np.less, lambda a, b: call("lt", a, b), ("number",))
_define_predicate("le", np.less_equal, lambda a, b: call("le", a, b), ("number",))
_define_predicate("gt", np.greater, lambda a, b: call("gt", a, b), ("number",))
_define_predicate("ge", np.greater_equal, lambda a, b: call("ge", a, b), ("number",))
_define_predicate("eq", np.equal, lambda a, b: call("eq", a, b), ("number", "bool"))
_define_predicate("ne", np.not_equal, lambda a, b: call("ne", a, b), ("number", "bool"))
_define_predicate("logical_and", np.logical_and, lambda a, b: call("and_", a, b), ("bool",))
_define_predicate("logical_or", np.logical_or, lambda a, b: call("or_", a, b), ("bool",))
_define_predicate("logical_not", np.logical_not, lambda a: call("not_", a), ("bool",))


# ---- where


def _where_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    condition, a, b = types
    if condition.dtype != "bool":
        raise errors.DTypeError(f"the condition is {condition}, not bool; compare it, e.g. x > 0")
    return [
        TensorType(
            broadcast_shapes(*(t.shape for t in types)), same_dtype([a, b], "the two branches")
        )
    ]


def _where_vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    condition, a, b = node.inputs
    g = cotangents[0]
    if g is None:
        return [None, None, None]
    return [
        None,
        unbroadcast(where(condition, g, 0.0), a.shape) if differentiable(a) else None,
        unbroadcast(where(condition, 0.0, g), b.shape) if differentiable(b) else None,
    ]


def _where_samples() -> list[Sample]:
    shapes = [
        ((), (), ()),
        ((2, 17), (2, 17), (2, 17)),
        ((3, 1), (1, 7), ()),
        ((7,), (), (2, 7)),
        ((0, 3), (3,), ()),
    ]
    return [
        Sample((draw(c, seed=1) > 0, draw(a, seed=2), draw(b, seed=3)), {}) for c, a, b in shapes
    ] + [Sample((draw((5,)) > 0, np.arange(5, dtype=np.int32), np.array([7], dtype=np.int32)), {})]


register(
    OpDef(
        "where",
        infer=_where_infer,
        evaluate=lambda arrays, attrs: [np.asarray(np.where(*arrays), dtype=arrays[1].dtype)],
        vjp=_where_vjp,
        lower=lower_of(select),
        samples=_where_samples,
        elementwise=True,
    )
)


# ---- cast


def _cast_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    if attrs["dtype"] not in DTYPES:
        raise errors.DTypeError(
            f"dtype {attrs['dtype']!r} is not supported; use one of {', '.join(DTYPES)}"
        )
    return [TensorType(types[0].shape, attrs["dtype"])]


def _cast_vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    x, g = node.inputs[0], cotangents[0]
    if g is None or not differentiable(x) or not node.types[0].is_float:
        return [None]
    return [cast(g, x.dtype)]


def _cast_samples() -> list[Sample]:
    floats = draw((2, 17), -9, 9)
    ints = np.arange(-3, 4, dtype=np.int32)
    return [
        *(Sample((floats,), {"dtype": d}) for d in DTYPES),
        *(Sample((ints,), {"dtype": d}) for d in DTYPES),
        *(Sample((floats[0] > 0,), {"dtype": d}) for d in DTYPES),
        Sample((draw(()),), {"dtype": "float64"}),
        Sample((draw((0, 3)),), {"dtype": "float64"}),
    ]


register(
    OpDef(
        "cast",
        infer=_cast_infer,
        evaluate=lambda arrays, attrs: [arrays[0].astype(attrs["dtype"])],
        vjp=_cast_vjp,
        lower=lower_of(lambda x, dtype: cast_expr(x, dtype)),
        samples=_cast_samples,
        elementwise=True,
    )
)


# ---- one_hot


def _one_hot_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    check_dtype(types, "integer")
    if attrs["dtype"] not in DTYPES:
        raise errors.DTypeError(
            f"dtype {attrs['dtype']!r} is not supported; use one of {', '.join(DTYPES)}"
        )
    if attrs["classes"] < 1:
        raise errors.ShapeError(f"classes={attrs['classes']}: at least one class is needed")
    shape, axis = types[0].shape, attrs["axis"]
    return [TensorType((*shape[:axis], attrs["classes"], *shape[axis:]), attrs["dtype"])]


def _one_hot_evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    labels, axis = np.expand_dims(arrays[0], attrs["axis"]), attrs["axis"]
    classes = np.arange(attrs["classes"]).reshape(
        [-1 if i == axis else 1 for i in range(labels.ndim)]
    )
    return [(labels == classes).astype(attrs["dtype"])]


def _one_hot_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    axis = node.attrs["axis"]
    label = k.read(0, (*index[:axis], *index[axis + 1 :]))
    hit = call("eq", label, cast_expr(position(index[axis]), label.dtype))
    return cast_expr(hit, node.types[0].dtype)


def _one_hot_samples() -> list[Sample]:
    labels = np.arange(-1, 6, dtype=np.int32)
    return [
        Sample((labels,), {"classes": 5, "dtype": "float32", "axis": 1}),
        Sample((labels.astype(np.int64),), {"classes": 5, "dtype": "float64", "axis": 0}),
        Sample((labels[:6].reshape(2, 3),), {"classes": 17, "dtype": "int32", "axis": 1}),
        Sample((np.array(1, dtype=np.int32),), {"classes": 1, "dtype": "bool", "axis": 0}),
        Sample((labels[:0],), {"classes": 3, "dtype": "float32", "axis": 1}),
    ]


register(
    OpDef(
        "one_hot",
        infer=_one_hot_infer,
        evaluate=_one_hot_evaluate,
        vjp=lambda node, cotangents: [None],
        lower=_one_hot_lower,
        samples=_one_hot_samples,
    )
)

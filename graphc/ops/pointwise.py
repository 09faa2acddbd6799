"""What elementwise operators share: type rules, operand lifting, chain rules, lowering, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Node, TensorType, Value
from graphc.ops.broadcast import broadcast_index, broadcast_shapes, same_dtype, unbroadcast
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, lift, register

# Shapes that samples are drawn with: scalars, sizes 1, 7 and 17, an empty array, broadcasting.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (2, 17), (0, 3))
SHAPE_PAIRS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((), ()),
    ((2, 3), (2, 3)),
    ((2, 1, 3), (4, 1)),
    ((7,), ()),
    ((1,), (17,)),
    ((0, 3), (3,)),
)


def draw(shape: Sequence[int], low: float = -2.0, high: float = 2.0, seed: int = 0) -> np.ndarray:
    """Sample data: float64, uniform in [low, high), the same in every process."""
    return np.random.default_rng([seed, *shape]).uniform(low, high, tuple(shape))


def whole_numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Sample data: int32, uniform in [-4, 4]."""
    return np.random.default_rng([seed, *shape]).integers(-4, 5, shape, dtype=np.int32)


def differentiable(value: Value) -> bool:
    """Whether this operand gets a cotangent: floats that are not fixed data."""
    return value.type.is_float and value.node.op != "constant"


def operands(*items: Any) -> tuple[Value, ...]:
    """Operands as values of one graph: numbers and arrays become constants of the values' dtype.

    Raises DTypeError where that would lose a fraction (`i32 + 0.5`)."""
    like = next((x for x in items if isinstance(x, Value)), None)
    if like is None:
        kinds = ", ".join(type(x).__name__ for x in items)
        raise errors.DeclarationError(f"at least one operand must be a graph value; got {kinds}")
    for item in items:
        fractional = not isinstance(item, Value) and np.asarray(item).dtype.kind in "fc"
        if fractional and not like.type.is_float:
            shown = repr(item) if np.ndim(item) == 0 else f"a float array {list(np.shape(item))}"
            raise errors.DTypeError(
                f"{shown} cannot become {like.dtype}, the dtype of {like.name!r} {like.type}; "
                f"convert that with gc.cast(x, 'float32')"
            )
    return tuple(lift(x, like) for x in items)


def check_dtype(types: Sequence[TensorType], kind: str) -> None:
    """Raises DTypeError unless every type is of `kind`: "float", "number", "integer" or "bool"."""
    allowed = {
        "float": ("float32", "float64"),
        "number": ("float32", "float64", "int32", "int64"),
        "integer": ("int32", "int64"),
        "bool": ("bool",),
    }[kind]
    for t in types:
        if t.dtype not in allowed:
            raise errors.DTypeError(
                f"needs {' or '.join(allowed)} operands, got {t}; "
                f"convert it with gc.cast(x, {allowed[0]!r})"
            )


def broadcast_type(kind: str, dtype: str | None = None) -> Callable:
    """A type rule: operands of one dtype of `kind`, broadcast; `dtype`: the result's, if fixed."""

    def infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
        check_dtype(types, kind)
        common = same_dtype(types)
        return [TensorType(broadcast_shapes(*(t.shape for t in types)), dtype or common)]

    return infer


def reference_of(function: Callable) -> Callable:
    """Wraps `function(*arrays, **attrs)` as an `evaluate` rule with the first operand's dtype."""

    def evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
        return [np.asarray(function(*arrays, **attrs)).astype(arrays[0].dtype, copy=False)]

    return evaluate


def lower_of(
    scalar: Callable[..., Expr],
) -> Callable[[Lowering, Node, int, tuple[Index, ...]], Expr]:
    """Wraps `scalar(*elements, **attrs)` as a `lower` rule that broadcasts the operands."""

    def lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
        elements = [k.read(i, broadcast_index(index, v.shape)) for i, v in enumerate(node.inputs)]
        return scalar(*elements, **node.attrs)

    return lower


def chain_rule(rule: Callable[[Node, Value], Value]) -> Callable:
    """Wraps `rule(node, g)`, the cotangent of the one operand, as a `vjp` rule."""

    def vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
        g = cotangents[0]
        return [rule(node, g) if g is not None and differentiable(node.inputs[0]) else None]

    return vjp


def define_unary(
    name: str,
    reference: Callable,
    derivative: Callable[..., Value | None] | None,
    scalar: Callable[..., Expr],
    *,
    kind: str = "float",
    low: float = -2.0,
    high: float = 2.0,
    attrs: Sequence[Attrs] = ({},),
) -> OpDef:
    """Registers y = f(x).

    `reference(x, **attrs)` is NumPy, `scalar(x, **attrs)` an expression and
    `derivative(x, y, g, **attrs)` the operand's cotangent in graph ops. Samples are drawn from
    [low, high).
    """

    def vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
        x, g = node.inputs[0], cotangents[0]
        assert derivative is not None
        return [
            derivative(x, node[0], g, **node.attrs) if g is not None and differentiable(x) else None
        ]

    def samples() -> list[Sample]:
        arrays = [draw(shape, low, high) for shape in SHAPES]
        arrays += [whole_numbers(2, 7)] if kind == "number" else []
        return [Sample((array,), dict(a)) for a in attrs for array in arrays]

    return register(
        OpDef(
            name,
            infer=broadcast_type(kind),
            evaluate=reference_of(reference),
            vjp=vjp if derivative else None,
            lower=lower_of(scalar),
            samples=samples,
            elementwise=True,
        )
    )


def define_binary(
    name: str,
    reference: Callable,
    partials: tuple[Callable[..., Value], Callable[..., Value]],
    scalar: Callable[..., Expr],
    *,
    kind: str = "number",
    left: tuple[float, float] = (-2.0, 2.0),
    right: tuple[float, float] = (-2.0, 2.0),
) -> OpDef:
    """Registers y = f(a, b) with NumPy broadcasting.

    `partials` are the two operands' cotangents `(a, b, y, g) -> Value` before they are summed over
    broadcast axes. Samples are drawn from the intervals `left` and `right`.
    """

    def vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
        a, b = node.inputs
        g = cotangents[0]
        if g is None:
            return [None, None]
        return [
            unbroadcast(partial(a, b, node[0], g), operand.shape)
            if differentiable(operand)
            else None
            for operand, partial in zip((a, b), partials, strict=True)
        ]

    def samples() -> list[Sample]:
        pairs = [(draw(p, *left, seed=1), draw(q, *right, seed=2)) for p, q in SHAPE_PAIRS]
        pairs += [(whole_numbers(2, 7), whole_numbers(7))] if kind == "number" else []
        return [Sample(pair, {}) for pair in pairs]

    return register(
        OpDef(
            name,
            infer=broadcast_type(kind),
            evaluate=reference_of(reference),
            vjp=vjp,
            lower=lower_of(scalar),
            samples=samples,
            elementwise=True,
        )
    )

"""The operator registry: one `OpDef` per operator, whole.

An operator is its type rule, chain rule, NumPy reference, lowering and samples. Tests walk the
registry, so an operator without one of them (or an explicit None with a reason) fails by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Node, TensorType, Value, caller

Attrs = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Operands to try an operator on.

    `inputs`: NumPy arrays (float arrays as float64; the test casts them to the dtype under test;
    integer and bool arrays are passed as they are). `grad`: operand slots to differentiate; None:
    all float ones.
    """

    inputs: tuple[np.ndarray, ...]
    attrs: Attrs
    grad: tuple[int, ...] | None = None


class Lowering(Protocol):
    """What an operator's `lower` rule may ask for; implemented by graphc.codegen.lower.

    All indices are affine in loop variables. Rules are called with `index`, one Index per axis of
    the output, and return the scalar expression of that output element.
    """

    def read(self, slot: int, index: Sequence[Index | int]) -> Expr:
        """Element of operand `slot`. The operand may be inlined or in memory: rules do not care."""
        ...

    def reduce(self, combine: str, extents: Sequence[int], body: Callable[..., Expr]) -> Expr:
        """Fold `body(i, j, ...)` over fresh loops with `combine`: sum prod max min argmax.

        argmax gives the int32 row-major position, within the loops, of the first maximum."""
        ...

    def divmod(self, index: Index, divisor: int) -> tuple[Index, Index]:
        """Quotient and remainder of an index by a constant.

        Loops are split as needed to keep it affine."""
        ...


@dataclass(frozen=True)
class OpDef:
    """Everything graphc knows about an operator.

    name         the field's name for it
    infer        (operand types, attrs) -> output types; raises ShapeError or DTypeError with the
                 reason only
    evaluate     (operand arrays, attrs) -> output arrays, in the operands' dtype: the reference
    vjp          chain rule: (node, cotangents) -> cotangent per operand (None: no gradient flows),
                 written in graph ops; a cotangent of the node's outputs is None where nothing
                 depends on that output
    lower        (k: Lowering, node, output number, index) -> Expr; None for operators that
                 decompose
    samples      () -> list of Sample: odd sizes, broadcasting, every attribute
    decompose    (node, operands) -> values in simpler operators, one per output; None for
                 operators that lower
    elementwise  output element i depends on operands' elements i only (after broadcasting)
    """

    name: str
    infer: Callable[[list[TensorType], Attrs], Sequence[TensorType]]
    evaluate: Callable[[list[np.ndarray], Attrs], Sequence[np.ndarray]]
    vjp: Callable[[Node, Sequence[Value | None]], Sequence[Value | None]] | None
    lower: Callable[[Lowering, Node, int, tuple[Index, ...]], Expr] | None
    samples: Callable[[], list[Sample]]
    decompose: Callable[[Node, tuple[Value, ...]], Sequence[Value]] | None = None
    elementwise: bool = False


_REGISTRY: dict[str, OpDef] = {}


def register(op: OpDef) -> OpDef:
    if op.name in _REGISTRY:
        raise ValueError(f"operator {op.name!r} is registered twice")
    _REGISTRY[op.name] = op
    return op


def get(name: str) -> OpDef:
    """The definition of an operator. Raises NameLookupError."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise errors.NameLookupError(f"no operator {name!r} is registered") from None


def all_ops() -> dict[str, OpDef]:
    """Every registered operator by name, in order of registration."""
    return dict(_REGISTRY)


def apply(op: str, *operands: Value, name: str | None = None, **attrs: Any) -> Node:
    """Append an operator to the graph its operands belong to."""
    for operand in operands:
        if isinstance(operand, Value):
            return operand.graph.add(op, operands, attrs, name=name)
    raise errors.DeclarationError(
        f"{op}: needs a graph value; got {', '.join(type(o).__name__ for o in operands)}"
    )


def lift(x: Any, like: Value) -> Value:
    """`x` as a value of `like`'s graph: numbers and arrays become constants of `like`'s dtype."""
    if isinstance(x, Value):
        return x
    if isinstance(x, (bool, int, float, np.ndarray, np.generic, list, tuple)):
        return like.graph.constant(x, dtype=like.dtype)
    raise errors.DeclarationError(f"{type(x).__name__} is not a graph value, a number or an array")


def here() -> str:
    """The user's line, `lenet.py:12: `, for errors met before a node could name it."""
    origin = caller()
    return f"{origin}: " if origin.file else ""

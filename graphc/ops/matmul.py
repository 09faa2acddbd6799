"""Matrix product with NumPy's rules: batch axes broadcast, a 1-D operand is a row (left) or a
column (right)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Node, TensorType, Value
from graphc.ops.broadcast import broadcast_index, broadcast_shapes, same_dtype, unbroadcast
from graphc.ops.pointwise import operands
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, register
from graphc.ops.shape import reshape, transpose

__all__ = ["matmul"]


def matmul(a: Any, b: Any, name: str | None = None) -> Value:
    """`a @ b` as np.matmul: [..., M, K] @ [..., K, N] -> [..., M, N]. Raises ShapeError,
    DTypeError."""
    return apply("matmul", *operands(a, b), name=name)[0]


def _infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    a, b = types
    dtype = same_dtype(types)
    if dtype == "bool":
        raise errors.DTypeError(
            "a matrix product of bool is not defined; convert with gc.cast(x, 'float32')"
        )
    for t, side in ((a, "left"), (b, "right")):
        if t.rank == 0:
            raise errors.ShapeError(f"the {side} operand {t} is a scalar; multiply with * instead")
    inner = b.shape[0] if b.rank == 1 else b.shape[-2]
    if a.shape[-1] != inner:
        raise errors.ShapeError(
            f"left {a} has {a.shape[-1]} columns, right {b} has {inner} rows: they must agree; "
            "transpose or reshape one"
        )
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return [TensorType((*batch, *(a.shape[-2:-1]), *(b.shape[-1:] if b.rank > 1 else ())), dtype)]


def _evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    return [np.asarray(np.matmul(*arrays))]


def _swap(x: Value) -> Value:
    return transpose(x, (*range(x.rank - 2), x.rank - 1, x.rank - 2))


def _vjp(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    """d(AB) = dA B + A dB: A's cotangent is G B^T, B's is A^T G, summed over broadcast axes."""
    a, b = node.inputs
    g = cotangents[0]
    assert g is not None
    matrix_a = reshape(a, (1, *a.shape)) if a.rank == 1 else a
    matrix_b = reshape(b, (*b.shape, 1)) if b.rank == 1 else b
    batch = broadcast_shapes(matrix_a.shape[:-2], matrix_b.shape[:-2])
    full = (*batch, matrix_a.shape[-2], matrix_b.shape[-1])
    g = g if g.shape == full else reshape(g, full)
    if matrix_b.rank == 2 and matrix_a.rank > 2:
        # One matrix for the whole batch: fold the batch into its rows instead of summing a product
        # per item.
        rows = math.prod(g.sizes[:-1])
        flat_a, flat_g = reshape(matrix_a, (rows, a.shape[-1])), reshape(g, (rows, full[-1]))
        grad_a, grad_b = matmul(flat_g, _swap(matrix_b)), matmul(_swap(flat_a), flat_g)
    else:
        grad_a = unbroadcast(matmul(g, _swap(matrix_b)), matrix_a.shape)
        grad_b = unbroadcast(matmul(_swap(matrix_a), g), matrix_b.shape)
    return (
        grad_a if grad_a.shape == a.shape else reshape(grad_a, a.shape),
        grad_b if grad_b.shape == b.shape else reshape(grad_b, b.shape),
    )


def _lower(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    a, b = (v.sizes for v in node.inputs)
    row = () if len(a) == 1 else (index[-1 if len(b) == 1 else -2],)
    column = () if len(b) == 1 else (index[-1],)
    batch = index[: len(index) - len(row) - len(column)]
    batch_a, batch_b = (broadcast_index(batch, s[:-2]) for s in (a, b))
    return k.reduce(
        "sum",
        (a[-1],),
        lambda i: k.read(0, (*batch_a, *row, i)) * k.read(1, (*batch_b, i, *column)),
    )


def _samples() -> list[Sample]:
    rng = np.random.default_rng(10)
    shapes = (
        ((3, 4), (4, 5)),
        ((1, 1), (1, 1)),
        ((7, 17), (17, 1)),
        ((4,), (4, 3)),
        ((3, 4), (4,)),
        ((5,), (5,)),
        ((2, 3, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (3, 4, 2)),
        ((3, 4), (2, 4, 5)),
        ((2, 3, 4), (4,)),
        ((4,), (2, 4, 3)),
        ((0, 3), (3, 2)),
        ((2, 0), (0, 3)),
    )
    return [Sample((rng.standard_normal(a), rng.standard_normal(b)), {}) for a, b in shapes]


register(OpDef("matmul", _infer, _evaluate, _vjp, _lower, _samples))

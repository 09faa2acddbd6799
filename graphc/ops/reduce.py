"""Reductions over axes: sum, mean, max, min, prod, var, argmax.

Each takes `axis`: None for all axes, an int or a tuple, negative ones counted from the end, and
`keepdims`. Results keep the operand's dtype (int32 sums stay int32); argmax gives int32.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Axis, Dimension, Node, TensorType, Value
from graphc.ops.compare import cast, eq, where
from graphc.ops.elementwise import div, mul, square, sub
from graphc.ops.pointwise import chain_rule, check_dtype, draw, whole_numbers
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, here, register

__all__ = ["sum", "mean", "max", "min", "prod", "var", "argmax"]


def normalize_axes(axis: Axis, rank: int) -> tuple[int, ...]:
    """`axis` as sorted axes in [0, rank). Raises ShapeError for one out of range or given twice."""
    if axis is None:
        return tuple(range(rank))
    given = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in given:
        if not -rank <= a < rank:
            raise errors.ShapeError(
                f"axis {a} is not in [{-rank}, {rank}) for an operand of rank {rank}"
            )
    axes = tuple(sorted(int(a) % rank for a in given))
    if len(set(axes)) != len(axes):
        raise errors.ShapeError(f"axis {given} names an axis twice")
    return axes


def reduced_shape(
    shape: Sequence[Dimension], axes: Sequence[int], keepdims: bool
) -> tuple[Dimension, ...]:
    """The shape after reducing `axes`."""
    if keepdims:
        return tuple(1 if i in axes else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in axes)


def _reduce(op: str, x: Value, axis: Axis, keepdims: bool, name: str | None, **attrs: Any) -> Value:
    try:
        axes = normalize_axes(axis, x.rank)
    except errors.ShapeError as error:
        raise errors.ShapeError(f"{here()}{op} of {x.name!r} {x.type}: {error}") from None
    return apply(op, x, name=name, axis=axes, keepdims=bool(keepdims), **attrs)[0]


def sum(x: Value, axis: Axis = None, keepdims: bool = False, name: str | None = None) -> Value:
    """Sum over axes; 0 over an empty axis."""
    return _reduce("sum", x, axis, keepdims, name)


def mean(x: Value, axis: Axis = None, keepdims: bool = False, name: str | None = None) -> Value:
    """Mean of floats over axes; NaN over an empty axis."""
    return _reduce("mean", x, axis, keepdims, name)


def max(x: Value, axis: Axis = None, keepdims: bool = False, name: str | None = None) -> Value:
    """Maximum over axes. Equal maxima share the gradient evenly, as in torch.amax."""
    return _reduce("max", x, axis, keepdims, name)


def min(x: Value, axis: Axis = None, keepdims: bool = False, name: str | None = None) -> Value:
    """Minimum over axes. Equal minima share the gradient evenly, as in torch.amin."""
    return _reduce("min", x, axis, keepdims, name)


def prod(x: Value, axis: Axis = None, keepdims: bool = False, name: str | None = None) -> Value:
    """Product over axes; 1 over an empty axis. The gradient is exact where factors are zero."""
    return _reduce("prod", x, axis, keepdims, name)


def var(
    x: Value,
    axis: Axis = None,
    keepdims: bool = False,
    correction: int = 0,
    name: str | None = None,
) -> Value:
    """Variance of floats: the sum of squared distances from the mean over n - correction.

    The default is the population's variance (NumPy's `ddof=0`, as batch norm uses it); PyTorch's
    `torch.var` defaults to `correction=1`. NaN where n <= correction."""
    return _reduce("var", x, axis, keepdims, name, correction=int(correction))


def argmax(x: Value, axis: Axis = None, keepdims: bool = False, name: str | None = None) -> Value:
    """int32 position of the first maximum; over several axes the row-major position within them."""
    return _reduce("argmax", x, axis, keepdims, name)


# ---- rules


def _infer(kind: str, *, nonempty: bool = False, dtype: str | None = None) -> Callable:
    def infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
        x = types[0]
        check_dtype(types, kind)
        if nonempty and 0 in [x.shape[a] for a in attrs["axis"]]:
            raise errors.ShapeError(f"{x} has no element to choose along axis {attrs['axis']}")
        shape = reduced_shape(x.shape, attrs["axis"], attrs["keepdims"])
        return [TensorType(shape, dtype or x.dtype)]

    return infer


def _evaluate(function: Callable) -> Callable:
    def evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
        result = function(arrays[0], axis=attrs["axis"], keepdims=attrs["keepdims"])
        return [np.asarray(result, dtype=arrays[0].dtype)]

    return evaluate


def _lower(combine: str) -> Callable:
    def lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
        shape, axes, keepdims = node.inputs[0].shape, node.attrs["axis"], node.attrs["keepdims"]
        kept = [i for axis, i in enumerate(index) if axis not in axes] if keepdims else list(index)

        def body(*loops: Index) -> Expr:
            inner, outer = iter(loops), iter(kept)
            return k.read(0, [next(inner) if a in axes else next(outer) for a in range(len(shape))])

        return k.reduce(combine, [shape[a] for a in axes], body)

    return lower


def _restore(reduced: Value, node: Node) -> Value:
    """`reduced`, one element for each group, with the reduced axes back as size 1."""
    from graphc.ops.shape import reshape

    shape = reduced_shape(node.inputs[0].shape, node.attrs["axis"], True)
    return reduced if reduced.shape == shape else reshape(reduced, shape)


def _spread(reduced: Value, node: Node) -> Value:
    """`reduced`, one element for each group, copied to every element of its group."""
    from graphc.ops.shape import expand

    return expand(_restore(reduced, node), node.inputs[0].shape)


def _count(node: Node) -> int:
    return math.prod(node.inputs[0].shape[a] for a in node.attrs["axis"])


def _extremum_vjp(node: Node, g: Value) -> Value:
    x = node.inputs[0]
    hit = cast(eq(x, _restore(node[0], node)), x.dtype)
    share = div(_restore(g, node), sum(hit, node.attrs["axis"], keepdims=True))
    return mul(hit, share)


def _prod_vjp(node: Node, g: Value) -> Value:
    # The product of the other factors is prod / x without zeros; with one zero it is not zero only
    # there. Its own derivative is exact where no factor is zero.
    x, axes = node.inputs[0], node.attrs["axis"]
    zero = eq(x, 0.0)
    filled = where(zero, 1.0, x)
    zeros = sum(cast(zero, x.dtype), axes, keepdims=True)
    product = prod(filled, axes, keepdims=True)
    others = where(
        zero, where(eq(zeros, 1.0), product, 0.0), where(eq(zeros, 0.0), div(product, filled), 0.0)
    )
    return mul(_restore(g, node), others)


def _var_divisor(node: Node) -> float:
    return float(builtins.max(_count(node) - node.attrs["correction"], 0))


def _var_vjp(node: Node, g: Value) -> Value:
    x = node.inputs[0]
    distance = sub(x, mean(x, node.attrs["axis"], keepdims=True))
    return mul(distance, mul(_restore(g, node), 2 / (_var_divisor(node) or math.nan)))


def _var_decompose(node: Node, inputs: tuple[Value, ...]) -> list[Value]:
    x, axes = inputs[0], node.attrs["axis"]
    squares = square(sub(x, mean(x, axes, keepdims=True)))
    return [div(sum(squares, axes, node.attrs["keepdims"]), _var_divisor(node))]


def _var_evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, axes = arrays[0], attrs["axis"]
    count = math.prod(x.shape[a] for a in axes)
    distance = x - _mean(x, axes, True)
    total = np.asarray(
        np.sum(distance * distance, axis=axes, keepdims=attrs["keepdims"]), dtype=x.dtype
    )
    return [total / np.asarray(builtins.max(count - attrs["correction"], 0), dtype=x.dtype)]


def _mean(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    # np.mean warns about empty axes; the quotient is NaN all the same.
    count = np.asarray(math.prod(x.shape[a] for a in axis), dtype=x.dtype)
    return np.sum(x, axis=axis, keepdims=keepdims) / count


def _argmax_evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, axes = arrays[0], attrs["axis"]
    kept = [a for a in range(x.ndim) if a not in axes]
    rows = x.transpose(*kept, *axes).reshape(
        *(x.shape[a] for a in kept), math.prod(x.shape[a] for a in axes)
    )
    shape = reduced_shape(x.shape, axes, attrs["keepdims"])
    return [np.argmax(rows, axis=-1).astype(np.int32).reshape(shape)]


def _samples(
    kind: str = "number", *, nonempty: bool = False, identity: bool = True, **attrs: Any
) -> Callable[[], list[Sample]]:
    """Samples for a reduction. `nonempty`: over one element or more; `identity`: also over none."""

    def samples() -> list[Sample]:
        cases = [
            ((), ()),
            ((7,), (0,)),
            ((2, 17), (1,)),
            ((2, 17), (0,)),
            ((2, 3, 4, 1), (0, 2, 3)),
            ((3, 5), (0, 1)),
            ((0, 3), (1,)),
        ]
        cases += [((2, 3), ())] if identity else []
        cases += [] if nonempty else [((0, 3), (0,))]
        arrays = [(draw(shape), axis) for shape, axis in cases]
        arrays += [(whole_numbers(3, 2, 5), (0, 2))] if kind == "number" else []
        return [
            Sample((array,), {"axis": axis, "keepdims": keepdims, **attrs})
            for array, axis in arrays
            for keepdims in (False, True)
        ]

    return samples


register(
    OpDef(
        "sum",
        infer=_infer("number"),
        evaluate=_evaluate(np.sum),
        vjp=chain_rule(lambda node, g: _spread(g, node)),
        lower=_lower("sum"),
        samples=_samples(),
    )
)
register(
    OpDef(
        "mean",
        infer=_infer("float"),
        evaluate=_evaluate(_mean),
        vjp=chain_rule(lambda node, g: _spread(div(g, float(_count(node))), node)),
        lower=None,
        decompose=lambda node, inputs: [
            div(sum(inputs[0], node.attrs["axis"], node.attrs["keepdims"]), float(_count(node)))
        ],
        samples=_samples("float"),
    )
)
register(
    OpDef(
        "max",
        infer=_infer("number", nonempty=True),
        evaluate=_evaluate(np.max),
        vjp=chain_rule(_extremum_vjp),
        lower=_lower("max"),
        samples=_samples(nonempty=True),
    )
)
register(
    OpDef(
        "min",
        infer=_infer("number", nonempty=True),
        evaluate=_evaluate(np.min),
        vjp=chain_rule(_extremum_vjp),
        lower=_lower("min"),
        samples=_samples(nonempty=True),
    )
)
register(
    OpDef(
        "prod",
        infer=_infer("number"),
        evaluate=_evaluate(np.prod),
        vjp=chain_rule(_prod_vjp),
        lower=_lower("prod"),
        samples=_samples(),
    )
)
register(
    OpDef(
        "var",
        infer=_infer("float"),
        evaluate=_var_evaluate,
        vjp=chain_rule(_var_vjp),
        lower=None,
        decompose=_var_decompose,
        samples=lambda: [
            *_samples("float", correction=0)(),
            Sample((draw((3, 7)),), {"axis": (1,), "keepdims": False, "correction": 1}),
            Sample((draw((3, 7)),), {"axis": (0, 1), "keepdims": True, "correction": 1}),
        ],
    )
)
register(
    OpDef(
        "argmax",
        infer=_infer("number", nonempty=True, dtype="int32"),
        evaluate=_argmax_evaluate,
        vjp=None,
        lower=_lower("argmax"),
        samples=_samples(nonempty=True, identity=False),
    )
)

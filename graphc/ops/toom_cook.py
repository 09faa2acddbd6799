"""Short convolutions with fewer multiplications (Toom-Cook), as three small linear operators.

A row of m outputs of an r-tap filter needs m * r products directly and m + r - 1 by interpolation:

    y = A^T [(G w) * (B^T x)]        (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural
                                     Networks"; Winograd 1980, "Arithmetic Complexity of Computations")

`tile_transform` cuts the last axis into overlapping tiles and multiplies each by a constant matrix (B^T of
the images, G of the weights, A^T of the products); `toom_conv` is the product between. All are linear or
bilinear, so their chain rules are each other, and the backward pass of a convolution written with them
needs as few products as its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, within
from graphc.ir import Node, TensorType, Value
from graphc.ops.broadcast import same_dtype
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, register

__all__: list[str] = []

# Interpolation points in the order they are taken; infinity is always the last.
POINTS = ("0", "1", "-1", "1/2", "-1/2", "2", "-2", "4", "-4", "1/4", "-1/4")


@cache
def matrices(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A^T [m, n], G [n, r], B^T [n, n]) of F(m, r), float64, n = m + r - 1 points.

    Exact up to the last rounding: computed in rationals. Rows of B^T are scaled by powers of two to a
    largest entry near 1 and G by the inverse, which keeps transformed images in range.
    """
    n = outputs + taps - 1
    points = [Fraction(p) for p in POINTS[: n - 1]]
    if len(points) < n - 1:
        raise ValueError(f"F({outputs}, {taps}) needs {n - 1} points, there are {len(POINTS)}")
    a = [[p**j for p in points] + [Fraction(int(j == outputs - 1))] for j in range(outputs)]
    g = [[p**k / _spread(points, i) for k in range(taps)] for i, p in enumerate(points)]
    g.append([Fraction(int(k == taps - 1)) for k in range(taps)])
    b = [_product(points[:i] + points[i + 1 :]) + [Fraction(0)] for i in range(n - 1)]
    b.append(_product(points))
    for row in range(n):
        largest = max(abs(v) for v in b[row])
        scale = Fraction(2) ** -round(float(np.log2(float(largest))))
        b[row] = [v * scale for v in b[row]]
        g[row] = [v / scale for v in g[row]]
    return tuple(np.array([[float(v) for v in row] for row in m]) for m in (a, g, b))  # type: ignore[return-value]


def _spread(points: list[Fraction], i: int) -> Fraction:
    result = Fraction(1)
    for j, p in enumerate(points):
        if j != i:
            result *= points[i] - p
    return result


def _product(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the polynomial with these roots, lowest first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def conv2d_by_rows(x: Value, weight: Value, outputs: int, name: str | None = None) -> Value:
    """conv2d of stride 1 without padding, every row in tiles of `outputs`; x[N,C,H,W], weight[OC,C,KH,KW].

    W must hold whole tiles: W = tiles * outputs + KW - 1. Returns [N, OC, H - KH + 1, tiles * outputs].
    """
    from graphc.ops.shape import reshape

    at, g, bt = matrices(outputs, int(weight.shape[3]))
    graph = x.graph
    constants = [graph.constant(m, dtype=x.dtype) for m in (bt, g, at)]
    images = apply("tile_transform", x, constants[0], step=outputs)[0]
    weights = apply("tile_transform", weight, constants[1], step=1)[0]
    products = apply("toom_conv", images, weights, name=name)[0]
    n, oc, oh, tiles, _ = products.shape
    rows = apply("tile_transform", products, constants[2], step=1)[0]
    return reshape(rows, (n, oc, oh, int(tiles) * outputs))


# ---- tile_transform: out[..., t, p] = sum over j of matrix[p, j] * x[..., t * step + j]


def _infer_transform(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, matrix = types
    points, taps = (int(d) for d in matrix.shape)
    tiles, rest = divmod(int(x.shape[-1]) - taps, attrs["step"])
    if rest or tiles < 0:
        raise errors.ShapeError(f"a width of {x.shape[-1]} does not hold whole tiles of {taps} every {attrs['step']}")
    return [TensorType((*x.shape[:-1], tiles + 1, points), same_dtype(types))]


def _windows(x: np.ndarray, taps: int, step: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, taps, axis=-1)[..., ::step, :]


def _evaluate_transform(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, matrix = arrays
    return [np.matmul(_windows(x, matrix.shape[1], attrs["step"]), matrix.T)]


def _vjp_transform(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    x, matrix = node.inputs
    return apply("tile_transform_grad", cotangents[0], matrix, step=node.attrs["step"], width=x.shape[-1])[0], None


def _lower_transform(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    (*lead, t, p), taps = index, node.inputs[1].shape[1]
    step = node.attrs["step"]
    return k.reduce("sum", (taps,), lambda j: k.read(0, (*lead, t * step + j)) * k.read(1, (p, j)))


# ---- tile_transform_grad: out[..., w] = sum over t, p of matrix[p, w - t * step] * g[..., t, p]


def _infer_transform_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, matrix = types
    expected = _infer_transform([TensorType((*g.shape[:-2], attrs["width"]), g.dtype), matrix], attrs)[0]
    if g != expected:
        raise errors.ShapeError(f"cotangent {g} must be {expected}")
    return [TensorType((*g.shape[:-2], attrs["width"]), same_dtype(types))]


def _evaluate_transform_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, matrix = arrays
    parts = np.matmul(g, matrix)
    out = np.zeros((*g.shape[:-2], attrs["width"]), g.dtype)
    for t in range(g.shape[-2]):
        out[..., t * attrs["step"] : t * attrs["step"] + matrix.shape[1]] += parts[..., t, :]
    return [out]


def _vjp_transform_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return apply("tile_transform", cotangents[0], node.inputs[1], step=node.attrs["step"])[0], None


def _lower_transform_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    (*lead, w), (points, taps) = index, node.inputs[1].shape
    tiles, step = node.inputs[0].shape[-2], node.attrs["step"]

    def term(t: Index, p: Index) -> Expr:
        j = w - t * step
        product = k.read(0, (*lead, t, p)) * k.read(1, (p, j))
        return within(((j, int(taps)),), product, 0)

    return k.reduce("sum", (tiles, points), term)


# ---- toom_conv: m[n, o, h, t, p] = sum over c, kh of v[n, c, h + kh, t, p] * u[o, c, kh, 0, p]


def _infer_conv(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    v, u = types
    if v.rank != 5 or u.rank != 5 or v.shape[1] != u.shape[1] or v.shape[4] != u.shape[4] or u.shape[3] != 1:
        raise errors.ShapeError(f"transformed images {v} and weights {u} do not fit")
    height = int(v.shape[2]) - int(u.shape[2]) + 1
    return [TensorType((v.shape[0], u.shape[0], height, *v.shape[3:]), same_dtype(types))]


def _evaluate_conv(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    v, u = arrays
    rows = np.lib.stride_tricks.sliding_window_view(v, u.shape[2], axis=2)
    return [np.einsum("nchtpk,ockp->nohtp", rows, u[:, :, :, 0, :], optimize=True)]


def _vjp_conv(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (v, u), g = node.inputs, cotangents[0]
    return (
        apply("toom_conv_input_grad", g, u, height=v.shape[2])[0],
        apply("toom_conv_weight_grad", v, g)[0],
    )


def _lower_conv(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, o, h, t, p = index
    channels, taps = node.inputs[1].shape[1:3]
    return k.reduce(
        "sum", (channels, taps), lambda c, kh: k.read(0, (n, c, h + kh, t, p)) * k.read(1, (o, c, kh, 0, p))
    )


def _infer_input_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, u = types
    v = TensorType((g.shape[0], u.shape[1], attrs["height"], *g.shape[3:]), same_dtype(types))
    if _infer_conv([v, u], attrs)[0] != g:
        raise errors.ShapeError(f"cotangent {g} does not fit weights {u} and height {attrs['height']}")
    return [v]


def _evaluate_input_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, u = arrays
    out = np.zeros((g.shape[0], u.shape[1], attrs["height"], *g.shape[3:]), g.dtype)
    for kh in range(u.shape[2]):
        out[:, :, kh : kh + g.shape[2]] += np.einsum("nohtp,ocp->nchtp", g, u[:, :, kh, 0, :], optimize=True)
    return [out]


def _vjp_input_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (g, u), c = node.inputs, cotangents[0]
    return apply("toom_conv", c, u)[0], apply("toom_conv_weight_grad", c, g)[0]


def _lower_input_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, c, h, t, p = index
    g, u = (v.shape for v in node.inputs)

    def term(o: Index, kh: Index) -> Expr:
        product = k.read(0, (n, o, h - kh, t, p)) * k.read(1, (o, c, kh, 0, p))
        return within(((h - kh, int(g[2])),), product, 0)

    return k.reduce("sum", (u[0], u[2]), term)


def _infer_weight_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    v, g = types
    taps = int(v.shape[2]) - int(g.shape[2]) + 1
    if v.shape[0] != g.shape[0] or v.shape[3:] != g.shape[3:] or taps < 1:
        raise errors.ShapeError(f"transformed images {v} and cotangent {g} do not fit")
    return [TensorType((g.shape[1], v.shape[1], taps, 1, v.shape[4]), same_dtype(types))]


def _evaluate_weight_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    v, g = arrays
    rows = np.lib.stride_tricks.sliding_window_view(v, g.shape[2], axis=2)
    return [np.einsum("nckthp,nohtp->ockp", np.moveaxis(rows, -1, -2), g, optimize=True)[:, :, :, None, :]]


def _vjp_weight_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (v, g), c = node.inputs, cotangents[0]
    return apply("toom_conv_input_grad", g, c, height=v.shape[2])[0], apply("toom_conv", v, c)[0]


def _lower_weight_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    o, c, kh, _one, p = index
    images, _channels, height, tiles, _points = node.inputs[1].shape
    return k.reduce(
        "sum",
        (images, height, tiles),
        lambda n, h, t: k.read(0, (n, c, h + kh, t, p)) * k.read(1, (n, o, h, t, p)),
    )


# ---- samples


def _samples_transform() -> list[Sample]:
    rng = np.random.default_rng(60)
    cases = (((2, 3, 9), (4, 5), 2), ((1, 7), (3, 3), 1), ((2, 1, 3, 5), (2, 5), 4), ((3, 1), (1, 1), 1))
    return [Sample((rng.standard_normal(x), rng.standard_normal(m)), {"step": s}, (0,)) for x, m, s in cases]


def _samples_transform_grad() -> list[Sample]:
    rng = np.random.default_rng(61)
    cases = (((2, 3, 3, 4), (4, 5), 2, 9), ((1, 5, 3), (3, 3), 1, 7), ((2, 1, 1, 2), (2, 5), 4, 5))
    return [
        Sample((rng.standard_normal(g), rng.standard_normal(m)), {"step": s, "width": w}, (0,))
        for g, m, s, w in cases
    ]


_SHAPES = (
    ((2, 3, 5, 2, 4), (4, 3, 3, 1, 4), (2, 4, 3, 2, 4)),
    ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    ((3, 2, 4, 1, 5), (1, 2, 2, 1, 5), (3, 1, 3, 1, 5)),
)


def _samples(first: int, second: int, height: bool = False):
    def make() -> list[Sample]:
        rng = np.random.default_rng(62)
        return [
            Sample(
                (rng.standard_normal(s[first]), rng.standard_normal(s[second])),
                {"height": s[0][2]} if height else {},
            )
            for s in _SHAPES
        ]

    return make


register(OpDef("tile_transform", _infer_transform, _evaluate_transform, _vjp_transform, _lower_transform, _samples_transform))
register(
    OpDef(
        "tile_transform_grad",
        _infer_transform_grad,
        _evaluate_transform_grad,
        _vjp_transform_grad,
        _lower_transform_grad,
        _samples_transform_grad,
    )
)
register(OpDef("toom_conv", _infer_conv, _evaluate_conv, _vjp_conv, _lower_conv, _samples(0, 1)))
register(
    OpDef(
        "toom_conv_input_grad",
        _infer_input_grad,
        _evaluate_input_grad,
        _vjp_input_grad,
        _lower_input_grad,
        _samples(2, 1, height=True),
    )
)
register(
    OpDef(
        "toom_conv_weight_grad",
        _infer_weight_grad,
        _evaluate_weight_grad,
        _vjp_weight_grad,
        _lower_weight_grad,
        _samples(0, 2),
    )
)

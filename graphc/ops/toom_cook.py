"""Short convolutions with fewer multiplications (Toom-Cook), as a few small linear operators.

A row of m outputs of an r-tap filter needs m * r products directly and m + r - 1 by interpolation:

    y = A^T [(G w) * (B^T x)]

(Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"; Winograd 1980, "Arithmetic
Complexity of Computations").

`tile_transform` cuts the last axis into overlapping tiles and multiplies each by a constant matrix
(B^T of the images, G of the weights); its transpose `tile_transform_grad` puts tiles back (A^T of
the products); `toom_conv` is the product between, one small convolution for each interpolation
point. All are linear or bilinear, so their chain rules are each other, and the backward pass of a
convolution written with them needs as few products as its forward pass. The points come before the
channels: what belongs to one point lies together in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Exact up to the last rounding: computed in rationals. Rows of B^T are scaled by powers of two to
    a largest entry near 1 and G by the inverse, which keeps transformed images in range.
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
    return _array(a), _array(g), _array(b)


def _array(rows: list[list[Fraction]]) -> np.ndarray:
    return np.array([[float(v) for v in row] for row in rows])


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
        coefficients = [
            s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)
        ]
    return coefficients


def conv2d_by_rows(x: Value, weight: Value, outputs: int, name: str | None = None) -> Value:
    """conv2d of stride 1 without padding, every row in tiles of `outputs`.

    x[N,C,H,W], weight[OC,C,KH,KW]. W must hold whole tiles: W = tiles * outputs + KW - 1.
    Returns [N, OC, H - KH + 1, tiles * outputs].
    """
    at, g, bt = (x.graph.constant(m, dtype=x.dtype) for m in _stored(outputs, weight.sizes[3]))
    images = apply("tile_transform", x, bt, step=outputs, axis=1)[0]
    weights = apply("tile_transform", weight, g, step=1, axis=0)[0]
    products = apply("toom_conv", images, weights, name=name)[0]
    width = products.sizes[-1] * outputs
    return apply("tile_transform_grad", products, at, step=outputs, axis=1, width=width)[0]


def _stored(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices with points as rows, as the operators take them: A [n, m], G [n, r], B^T [n, n]."""
    at, g, bt = matrices(outputs, taps)
    return at.T.copy(), g, bt


# ---- tile_transform, p at `axis`:
#          out[.., p, .., t] = sum over j of matrix[p, j] * x[.., t * step + j]


def _infer_transform(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, matrix = types
    points, taps = matrix.sizes
    tiles, rest = divmod(x.sizes[-1] - taps, attrs["step"])
    if rest or tiles < 0:
        raise errors.ShapeError(
            f"a width of {x.shape[-1]} does not hold whole tiles of {taps} every {attrs['step']}"
        )
    shape = list(x.shape[:-1])
    shape.insert(attrs["axis"], points)
    return [TensorType((*shape, tiles + 1), same_dtype(types))]


def _evaluate_transform(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, matrix = arrays
    windows = np.lib.stride_tricks.sliding_window_view(x, matrix.shape[1], axis=-1)[
        ..., :: attrs["step"], :
    ]
    return [np.moveaxis(np.matmul(windows, matrix.T), -1, attrs["axis"])]


def _vjp_transform(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, matrix), g = node.inputs, cotangents[0]
    assert g is not None
    return apply("tile_transform_grad", g, matrix, width=x.sizes[-1], **node.attrs)[0], None


def _split(index: tuple[Index, ...], axis: int) -> tuple[tuple[Index, ...], Index]:
    """The index without the points' axis, and the point."""
    return (*index[:axis], *index[axis + 1 :]), index[axis]


def _lower_transform(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    (*lead, t), p = _split(index, node.attrs["axis"])
    taps, step = node.inputs[1].sizes[1], node.attrs["step"]
    return k.reduce("sum", (taps,), lambda j: k.read(0, (*lead, t * step + j)) * k.read(1, (p, j)))


# ---- tile_transform_grad: out[.., w] = sum over t, p of matrix[p, w - t * step] * g[.., p, .., t]


def _infer_transform_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, matrix = types
    lead = list(g.shape[:-1])
    del lead[attrs["axis"]]
    x = TensorType((*lead, attrs["width"]), same_dtype(types))
    if _infer_transform([x, matrix], attrs)[0] != g:
        raise errors.ShapeError(f"cotangent {g} is not that of {x}")
    return [x]


def _evaluate_transform_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, matrix = arrays
    parts = np.matmul(np.moveaxis(g, attrs["axis"], -1), matrix)
    out = np.zeros((*parts.shape[:-2], attrs["width"]), g.dtype)
    for t in range(parts.shape[-2]):
        out[..., t * attrs["step"] : t * attrs["step"] + matrix.shape[1]] += parts[..., t, :]
    return [out]


def _vjp_transform_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (_, matrix), c = node.inputs, cotangents[0]
    assert c is not None
    attrs = {key: node.attrs[key] for key in ("step", "axis")}
    return apply("tile_transform", c, matrix, **attrs)[0], None


def _lower_transform_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    (*lead, w), (points, taps) = index, node.inputs[1].sizes
    axis, step, tiles = node.attrs["axis"], node.attrs["step"], node.inputs[0].sizes[-1]

    def product(t: Index, p: Index, j: Index) -> Expr:
        return k.read(0, (*lead[:axis], p, *lead[axis:], t)) * k.read(1, (p, j))

    if taps == step:  # tiles side by side: every output belongs to one
        t, j = k.divmod(w, step)
        return k.reduce("sum", (points,), lambda p: product(t, p, j))

    def term(t: Index, p: Index) -> Expr:
        return within(((w - t * step, taps),), product(t, p, w - t * step), 0)

    return k.reduce("sum", (tiles, points), term)


# ---- toom_conv: m[n, p, o, h, t] = sum over c, kh of v[n, p, c, h + kh, t] * u[p, o, c, kh, 0]


def _infer_conv(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    v, u = types
    if v.rank != 5 or u.rank != 5 or v.shape[1:3] != (u.shape[0], u.shape[2]) or u.shape[4] != 1:
        raise errors.ShapeError(f"transformed images {v} and weights {u} do not fit")
    height = v.sizes[3] - u.sizes[3] + 1
    return [TensorType((v.shape[0], u.shape[0], u.shape[1], height, v.shape[4]), same_dtype(types))]


def _rows(x: np.ndarray, taps: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, taps, axis=3)


def _evaluate_conv(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    v, u = arrays
    return [np.einsum("npchtk,pock->npoht", _rows(v, u.shape[3]), u[..., 0], optimize=True)]


def _vjp_conv(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (v, u), g = node.inputs, cotangents[0]
    assert g is not None
    return (
        apply("toom_conv_input_grad", g, u, height=v.sizes[3])[0],
        apply("toom_conv_weight_grad", v, g)[0],
    )


def _lower_conv(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, p, o, h, t = index
    channels, taps = node.inputs[1].sizes[2:4]
    return k.reduce(
        "sum",
        (channels, taps),
        lambda c, kh: k.read(0, (n, p, c, h + kh, t)) * k.read(1, (p, o, c, kh, 0)),
    )


def _infer_input_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, u = types
    v = TensorType(
        (g.shape[0], g.shape[1], u.shape[2], attrs["height"], g.shape[4]), same_dtype(types)
    )
    if _infer_conv([v, u], attrs)[0] != g:
        raise errors.ShapeError(
            f"cotangent {g} does not fit weights {u} and height {attrs['height']}"
        )
    return [v]


def _evaluate_input_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, u = arrays
    out = np.zeros((g.shape[0], g.shape[1], u.shape[2], attrs["height"], g.shape[4]), g.dtype)
    for kh in range(u.shape[3]):
        out[:, :, :, kh : kh + g.shape[3]] += np.einsum(
            "npoht,poc->npcht", g, u[:, :, :, kh, 0], optimize=True
        )
    return [out]


def _vjp_input_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (g, u), c = node.inputs, cotangents[0]
    assert c is not None
    return apply("toom_conv", c, u)[0], apply("toom_conv_weight_grad", c, g)[0]


def _lower_input_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, p, c, h, t = index
    g, u = (v.sizes for v in node.inputs)

    def term(o: Index, kh: Index) -> Expr:
        product = k.read(0, (n, p, o, h - kh, t)) * k.read(1, (p, o, c, kh, 0))
        return within(((h - kh, g[3]),), product, 0)

    return k.reduce("sum", (u[1], u[3]), term)


def _infer_weight_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    v, g = types
    taps = v.sizes[3] - g.sizes[3] + 1
    if v.shape[:2] != g.shape[:2] or v.shape[4] != g.shape[4] or taps < 1:
        raise errors.ShapeError(f"transformed images {v} and cotangent {g} do not fit")
    return [TensorType((g.shape[1], g.shape[2], v.shape[2], taps, 1), same_dtype(types))]


def _evaluate_weight_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    v, g = arrays
    taps = v.shape[3] - g.shape[3] + 1
    return [np.einsum("npchtk,npoht->pock", _rows(v, taps), g, optimize=True)[..., None]]


def _vjp_weight_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (v, g), c = node.inputs, cotangents[0]
    assert c is not None
    return apply("toom_conv_input_grad", g, c, height=v.sizes[3])[0], apply("toom_conv", v, c)[0]


def _lower_weight_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    p, o, c, kh, _one = index
    images, _points, _channels, height, tiles = node.inputs[1].sizes
    return k.reduce(
        "sum",
        (images, height, tiles),
        lambda n, h, t: k.read(0, (n, p, c, h + kh, t)) * k.read(1, (n, p, o, h, t)),
    )


# ---- samples


def _samples_transform() -> list[Sample]:
    rng = np.random.default_rng(60)
    cases = (
        ((2, 3, 9), (4, 5), 2, 1),
        ((1, 7), (3, 3), 1, 0),
        ((2, 1, 3, 5), (2, 5), 4, 1),
        ((3, 1), (1, 1), 1, 1),
    )
    return [
        Sample((rng.standard_normal(x), rng.standard_normal(m)), {"step": s, "axis": a}, (0,))
        for x, m, s, a in cases
    ]


def _samples_transform_grad() -> list[Sample]:
    rng = np.random.default_rng(61)
    cases = (
        ((2, 4, 3, 3), (4, 5), 2, 1, 9),
        ((3, 1, 5), (3, 3), 1, 0, 7),
        ((2, 2, 1, 1), (2, 5), 4, 1, 5),
        ((2, 5, 3, 2), (5, 3), 3, 1, 6),
    )
    return [
        Sample(
            (rng.standard_normal(g), rng.standard_normal(m)),
            {"step": s, "axis": a, "width": w},
            (0,),
        )
        for g, m, s, a, w in cases
    ]


_SHAPES = (
    ((2, 4, 3, 5, 2), (4, 4, 3, 3, 1), (2, 4, 4, 3, 2)),
    ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    ((3, 5, 2, 4, 1), (5, 1, 2, 2, 1), (3, 5, 1, 3, 1)),
)


def _samples(first: int, second: int, height: bool = False) -> Callable[[], list[Sample]]:
    def make() -> list[Sample]:
        rng = np.random.default_rng(62)
        return [
            Sample(
                (rng.standard_normal(s[first]), rng.standard_normal(s[second])),
                {"height": s[0][3]} if height else {},
            )
            for s in _SHAPES
        ]

    return make


register(
    OpDef(
        "tile_transform",
        _infer_transform,
        _evaluate_transform,
        _vjp_transform,
        _lower_transform,
        _samples_transform,
    )
)
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

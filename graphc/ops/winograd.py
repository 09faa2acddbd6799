"""Two-dimensional short convolutions with fewer multiplications, for channels in the lanes.

    Y = A^T [ (G w G^T) * (B^T x B) ] A        (Lavin & Gray 2016, section 4)

`patch_transform` cuts images into overlapping patches and multiplies each by a constant matrix from
both sides; its transpose `patch_transform_grad` puts patches back. The product in between is one
matrix product for each interpolation point, over channels: the ordinary `matmul`. Everything is
linear or bilinear, so chain rules are made of the same operators. The gradients of a convolution
are rewritten from their definitions instead (a data gradient is again a convolution), which needs
no overlapping sums. Matrices: `graphc.ops.toom_cook.matrices`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, within
from graphc.ir import Node, TensorType, Value
from graphc.ops.broadcast import same_dtype
from graphc.ops.matmul import matmul
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, register
from graphc.ops.shape import squeeze, transpose
from graphc.ops.toom_cook import matrices

__all__: list[str] = []


def conv2d_by_patches(x: Value, weight: Value, outputs: int, name: str | None = None) -> Value:
    """conv2d of stride 1 without padding in patches of `outputs` x `outputs`.

    x[N,C,H,W] with H and W whole patches (tiles * outputs + taps - 1), weight[OC,C,taps,taps].
    Returns [N, OC, H - taps + 1, W - taps + 1].
    """
    _, g, _ = matrices(outputs, weight.sizes[3])
    return _by_patches(x, weight, g, outputs, name)


def conv2d_input_grad_by_patches(
    g: Value, weight: Value, outputs: int, name: str | None = None
) -> Value:
    """conv2d_input_grad of stride 1: a convolution of the cotangent g[N,OC,H,W], padded to whole
    patches as in `conv2d_by_patches`, with turned taps of weight[OC,C,taps,taps].

    Returns [N, C, H - taps + 1, W - taps + 1].
    """
    _, matrix, _ = matrices(outputs, weight.sizes[3])
    return _by_patches(g, transpose(weight, (1, 0, 2, 3)), matrix[:, ::-1], outputs, name)


def conv2d_weight_grad_by_patches(
    x: Value, g: Value, outputs: int, name: str | None = None
) -> Value:
    """conv2d_weight_grad of stride 1 for x[N,C,H,W] as in `conv2d_by_patches`, the transpose of its
    weights' path: products of transformed images and cotangents g[N,OC,tiles * outputs,..].

    Returns [OC, C, taps, taps], taps = H - tiles * outputs + 1.
    """
    taps = x.sizes[2] - g.sizes[2] + 1
    at, matrix, bt = matrices(outputs, taps)
    images, cotangents = _patches(x, bt, outputs), _patches(g, at.T, outputs)
    products = apply("patch_weight_grad", images, cotangents, name=name)[0]
    return _pixels(products, matrix, taps, taps, taps)


def _by_patches(
    x: Value, weight: Value, matrix: np.ndarray, outputs: int, name: str | None
) -> Value:
    """Patches of x, times weight[OC,C,taps,taps] between `matrix` and its transpose, to pixels."""
    taps = weight.sizes[3]
    at, _, bt = matrices(outputs, taps)
    height, width = (d - taps + 1 for d in x.sizes[2:])
    # A weight is an image of one patch: [OC, points, C, 1].
    weights = squeeze(_patches(weight, matrix, taps), -1)
    products = matmul(transpose(weights, (1, 0, 2)), _patches(x, bt, outputs), name=name)
    return _pixels(products, at.T, outputs, height, width)


def _patches(x: Value, matrix: np.ndarray, step: int) -> Value:
    """Patches of x every `step` pixels, multiplied by matrix[points, taps] from both sides."""
    constant = x.graph.constant(matrix.copy(), dtype=x.dtype)
    return apply("patch_transform", x, constant, step=step)[0]


def _pixels(x: Value, matrix: np.ndarray, step: int, height: int, width: int) -> Value:
    """The transpose of `_patches`: images of height x width pixels."""
    constant = x.graph.constant(matrix.copy(), dtype=x.dtype)
    return apply("patch_transform_grad", x, constant, step=step, height=height, width=width)[0]


def _tiles(extent: int, taps: int, step: int) -> int:
    tiles, rest = divmod(extent - taps, step)
    if rest or tiles < 0:
        raise errors.ShapeError(f"{extent} pixels do not hold whole patches of {taps} every {step}")
    return tiles + 1


# ---- patch_transform: out[n, (p, q), c, (th, tw)] =
#          sum over i, j of matrix[p, i] * matrix[q, j] * x[n, c, th * step + i, tw * step + j]


def _infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, matrix = types
    images, channels, height, width = x.sizes
    points, taps = matrix.sizes
    tiles = _tiles(height, taps, attrs["step"]) * _tiles(width, taps, attrs["step"])
    return [TensorType((images, points * points, channels, tiles), same_dtype(types))]


def _evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, matrix = arrays
    taps, step = matrix.shape[1], attrs["step"]
    patches = np.lib.stride_tricks.sliding_window_view(x, (taps, taps), axis=(2, 3))
    patches = patches[:, :, ::step, ::step]
    out = np.einsum("pi,qj,nchwij->npqchw", matrix, matrix, patches, optimize=True)
    n, p, q, c, h, w = out.shape
    return [out.reshape(n, p * q, c, h * w)]


def _vjp(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, matrix), g = node.inputs, cotangents[0]
    assert g is not None
    height, width = x.sizes[2:]
    attrs = {"step": node.attrs["step"], "height": height, "width": width}
    return apply("patch_transform_grad", g, matrix, **attrs)[0], None


def _lower(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, point, c, tile = index
    points, taps = node.inputs[1].sizes
    step = node.attrs["step"]
    p, q = k.divmod(point, points)
    th, tw = k.divmod(tile, _tiles(node.inputs[0].sizes[3], taps, step))

    def row(i: Index) -> Expr:
        def element(j: Index) -> Expr:
            return k.read(0, (n, c, th * step + i, tw * step + j)) * k.read(1, (q, j))

        return k.reduce("sum", (taps,), element) * k.read(1, (p, i))

    return k.reduce("sum", (taps,), row)


# ---- patch_transform_grad: the transpose, out[n, c, h, w]


def _infer_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, matrix = types
    x = TensorType((g.shape[0], g.shape[2], attrs["height"], attrs["width"]), same_dtype(types))
    if _infer([x, matrix], attrs)[0] != g:
        raise errors.ShapeError(f"cotangent {g} is not that of patches of {x}")
    return [x]


def _evaluate_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, matrix = arrays
    (points, taps), step = matrix.shape, attrs["step"]
    th, tw = (_tiles(attrs[k], taps, step) for k in ("height", "width"))
    grid = g.reshape(g.shape[0], points, points, g.shape[2], th, tw)
    parts = np.einsum("pi,qj,npqchw->nchwij", matrix, matrix, grid, optimize=True)
    out = np.zeros((g.shape[0], g.shape[2], attrs["height"], attrs["width"]), g.dtype)
    for a in range(th):
        for b in range(tw):
            out[:, :, a * step : a * step + taps, b * step : b * step + taps] += parts[:, :, a, b]
    return [out]


def _vjp_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (_, matrix), c = node.inputs, cotangents[0]
    assert c is not None
    return apply("patch_transform", c, matrix, step=node.attrs["step"])[0], None


def _lower_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, c, h, w = index
    points, taps = node.inputs[1].sizes
    step = node.attrs["step"]
    rows, columns = (_tiles(node.attrs[key], taps, step) for key in ("height", "width"))

    def read(p: Index, q: Index, th: Index, tw: Index) -> Expr:
        return k.read(0, (n, p * points + q, c, th * columns + tw))

    if taps == step:  # patches side by side: every pixel belongs to one
        (th, i), (tw, j) = k.divmod(h, step), k.divmod(w, step)

        def row(p: Index) -> Expr:
            inner = k.reduce("sum", (points,), lambda q: read(p, q, th, tw) * k.read(1, (q, j)))
            return inner * k.read(1, (p, i))

        return k.reduce("sum", (points,), row)

    def term(th: Index, p: Index, tw: Index, q: Index) -> Expr:
        i, j = h - th * step, w - tw * step
        product = read(p, q, th, tw) * (k.read(1, (p, i)) * k.read(1, (q, j)))
        return within(((i, taps), (j, taps)), product, 0)

    return k.reduce("sum", (rows, points, columns, points), term)


# ---- patch_weight_grad: out[o, p, c, 0] = sum over n, t of x[n, p, c, t] * g[n, p, o, t]


def _infer_weight_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, g = types
    if x.rank != 4 or g.rank != 4 or (x.shape[:2], x.shape[3]) != (g.shape[:2], g.shape[3]):
        raise errors.ShapeError(f"images {x} and cotangents {g} differ in more than their channels")
    return [TensorType((g.shape[2], x.shape[1], x.shape[2], 1), same_dtype(types))]


def _evaluate_weight_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, g = arrays
    return [np.einsum("npct,npot->opc", x, g, optimize=True)[..., None]]


def _vjp_weight_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, g), c = node.inputs, cotangents[0]
    assert c is not None
    c = squeeze(c, -1)
    return matmul(transpose(c, (1, 2, 0)), g), matmul(transpose(c, (1, 0, 2)), x)


def _lower_weight_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    o, p, c, _one = index
    images, _, _, tiles = node.inputs[0].sizes
    return k.reduce(
        "sum",
        (images, tiles),
        lambda n, t: k.read(0, (n, p, c, t)) * k.read(1, (n, p, o, t)),
    )


# ---- samples


def _samples() -> list[Sample]:
    rng = np.random.default_rng(70)
    cases = (((2, 3, 6, 6), (4, 4), 2), ((1, 2, 4, 7), (3, 4), 3), ((1, 1, 3, 3), (5, 3), 1))
    return [
        Sample((rng.standard_normal(x), rng.standard_normal(m)), {"step": s}, (0,))
        for x, m, s in cases
    ]


def _samples_grad() -> list[Sample]:
    rng = np.random.default_rng(71)
    cases = (
        ((2, 16, 3, 4), (4, 4), 2, 6, 6),
        ((1, 9, 2, 2), (3, 4), 3, 4, 7),
        ((2, 9, 2, 6), (3, 2), 2, 4, 6),
    )
    return [
        Sample(
            (rng.standard_normal(g), rng.standard_normal(m)),
            {"step": s, "height": h, "width": w},
            (0,),
        )
        for g, m, s, h, w in cases
    ]


def _samples_weight_grad() -> list[Sample]:
    rng = np.random.default_rng(72)
    cases = (
        ((2, 4, 3, 5), (2, 4, 2, 5)),
        ((1, 9, 1, 1), (1, 9, 7, 1)),
        ((3, 1, 17, 2), (3, 1, 1, 2)),
    )
    return [Sample((rng.standard_normal(x), rng.standard_normal(g)), {}) for x, g in cases]


register(
    OpDef(
        "patch_weight_grad",
        _infer_weight_grad,
        _evaluate_weight_grad,
        _vjp_weight_grad,
        _lower_weight_grad,
        _samples_weight_grad,
    )
)
register(OpDef("patch_transform", _infer, _evaluate, _vjp, _lower, _samples))
register(
    OpDef(
        "patch_transform_grad", _infer_grad, _evaluate_grad, _vjp_grad, _lower_grad, _samples_grad
    )
)

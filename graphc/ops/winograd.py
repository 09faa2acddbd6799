"""Two-dimensional short convolutions with fewer multiplications.

    Y = A^T [ (G w G^T) * (B^T x B) ] A        (Lavin & Gray 2016, section 4)

`patch_transform` cuts images into overlapping patches and multiplies each by a constant matrix from
both sides; its transpose `patch_transform_grad` puts patches back. The product in between is one
matrix product for each interpolation point, over channels. Everything is linear or bilinear, so
chain rules are made of the same operators. The gradients of a convolution are rewritten from their
definitions instead (a data gradient is again a convolution), which needs no overlapping sums.
Matrices: `graphc.ops.toom_cook.matrices`.

Patches of points (p, q) lie as [N, (p, q), C, T] where channels are in the lanes; the product is
the ordinary `matmul`. With the batch in the lanes they are `split`, [N, p, C, q, T], and multiplied
by `patch_product`: a patch is then written to a few rows of memory, where 36 places a power of two
apart would all fall into one set of the cache.

The patches of an image may come in `strips` of as many, one after another, [N * strips, (p, q), C,
T / strips], as if they were images: all that is done to one before the next then fits the caches.
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


def conv2d_by_patches(
    x: Value,
    weight: Value,
    outputs: int,
    split: bool = False,
    strips: int = 1,
    name: str | None = None,
) -> Value:
    """conv2d of stride 1 without padding in patches of `outputs` x `outputs`.

    x[N,C,H,W] with H and W whole patches (tiles * outputs + taps - 1), weight[OC,C,taps,taps].
    Returns [N, OC, H - taps + 1, W - taps + 1].
    """
    _, g, _ = matrices(outputs, weight.sizes[3])
    return _by_patches(x, weight, g, outputs, split, strips, name)


def conv2d_input_grad_by_patches(
    g: Value,
    weight: Value,
    outputs: int,
    split: bool = False,
    strips: int = 1,
    name: str | None = None,
) -> Value:
    """conv2d_input_grad of stride 1: a convolution of the cotangent g[N,OC,H,W], padded to whole
    patches as in `conv2d_by_patches`, with turned taps of weight[OC,C,taps,taps].

    Returns [N, C, H - taps + 1, W - taps + 1].
    """
    _, matrix, _ = matrices(outputs, weight.sizes[3])
    turned = transpose(weight, (1, 0, 2, 3))
    return _by_patches(g, turned, matrix[:, ::-1], outputs, split, strips, name)


def conv2d_weight_grad_by_patches(
    x: Value, g: Value, outputs: int, split: bool = False, name: str | None = None
) -> Value:
    """conv2d_weight_grad of stride 1 for x[N,C,H,W] as in `conv2d_by_patches`, the transpose of its
    weights' path: products of transformed images and cotangents g[N,OC,tiles * outputs,..].

    Returns [OC, C, taps, taps], taps = H - tiles * outputs + 1.
    """
    taps = x.sizes[2] - g.sizes[2] + 1
    at, matrix, bt = matrices(outputs, taps)
    images, cotangents = (_patches(v, b, outputs, split) for v, b in ((x, bt), (g, at.T)))
    products = apply("patch_weight_grad", images, cotangents, name=name)[0]
    if split:
        products = transpose(products, (1, 0, 2, 3))
    return _pixels(products, matrix, taps, taps, taps)


def _by_patches(
    x: Value,
    weight: Value,
    matrix: np.ndarray,
    outputs: int,
    split: bool,
    strips: int,
    name: str | None,
) -> Value:
    """Patches of x, times weight[OC,C,taps,taps] between `matrix` and its transpose, to pixels."""
    taps = weight.sizes[3]
    at, _, bt = matrices(outputs, taps)
    height, width = (d - taps + 1 for d in x.sizes[2:])
    # A weight is an image of one patch: [OC, points, C, 1].
    weights, images = _patches(weight, matrix, taps), _patches(x, bt, outputs, split, strips)
    if split:
        products = apply("patch_product", images, weights, name=name)[0]
    else:
        products = matmul(transpose(squeeze(weights, -1), (1, 0, 2)), images, name=name)
    return _pixels(products, at.T, outputs, height, width, split, strips)


def _patches(
    x: Value, matrix: np.ndarray, step: int, split: bool = False, strips: int = 1
) -> Value:
    """Patches of x every `step` pixels, multiplied by matrix[points, taps] from both sides."""
    constant = x.graph.constant(matrix.copy(), dtype=x.dtype)
    return apply("patch_transform", x, constant, step=step, split=split, strips=strips)[0]


def _pixels(
    x: Value,
    matrix: np.ndarray,
    step: int,
    height: int,
    width: int,
    split: bool = False,
    strips: int = 1,
) -> Value:
    """The transpose of `_patches`: images of height x width pixels."""
    constant = x.graph.constant(matrix.copy(), dtype=x.dtype)
    attrs: Attrs = {"step": step, "height": height, "width": width, "split": split}
    attrs["strips"] = strips
    return apply("patch_transform_grad", x, constant, **attrs)[0]


def _tiles(extent: int, taps: int, step: int) -> int:
    tiles, rest = divmod(extent - taps, step)
    if rest or tiles < 0:
        raise errors.ShapeError(f"{extent} pixels do not hold whole patches of {taps} every {step}")
    return tiles + 1


# ---- patch_transform: out[n, (p, q), c, (th, tw)], split out[n, p, c, q, (th, tw)] =
#          sum over i, j of matrix[p, i] * matrix[q, j] * x[n, c, th * step + i, tw * step + j]


def _infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, matrix = types
    images, channels, height, width = x.sizes
    points, taps = matrix.sizes
    tiles = _tiles(height, taps, attrs["step"]) * _tiles(width, taps, attrs["step"])
    strips = attrs["strips"]
    if tiles % strips:
        raise errors.ShapeError(f"{tiles} patches of {x} do not fall into {strips} equal strips")
    images, tiles = images * strips, tiles // strips
    split = (images, points, channels, points, tiles)
    shape = split if attrs["split"] else (images, points * points, channels, tiles)
    return [TensorType(shape, same_dtype(types))]


def _evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, matrix = arrays
    taps, step = matrix.shape[1], attrs["step"]
    patches = np.lib.stride_tricks.sliding_window_view(x, (taps, taps), axis=(2, 3))
    patches = patches[:, :, ::step, ::step]
    out = np.einsum("pi,qj,nchwij->npqchw", matrix, matrix, patches, optimize=True)
    n, p, q, c, h, w = out.shape
    strips = attrs["strips"]
    out = out.reshape(n, p, q, c, strips, h * w // strips).transpose(0, 4, 1, 2, 3, 5)
    out = out.reshape(n * strips, p, q, c, h * w // strips)
    if attrs["split"]:
        return [out.transpose(0, 1, 3, 2, 4)]
    return [out.reshape(n * strips, p * q, c, -1)]


def _vjp(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, matrix), g = node.inputs, cotangents[0]
    assert g is not None
    height, width = x.sizes[2:]
    return apply("patch_transform_grad", g, matrix, height=height, width=width, **node.attrs)[
        0
    ], None


def _lower(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    points, taps = node.inputs[1].sizes
    step = node.attrs["step"]
    if node.attrs["split"]:
        n, p, c, q, tile = index
    else:
        n, point, c, tile = index
        p, q = k.divmod(point, points)
    n, strip = k.divmod(n, node.attrs["strips"])
    tile = strip * node.types[0].sizes[-1] + tile
    th, tw = k.divmod(tile, _tiles(node.inputs[0].sizes[3], taps, step))

    def row(i: Index) -> Expr:
        def element(j: Index) -> Expr:
            return k.read(0, (n, c, th * step + i, tw * step + j)) * k.read(1, (q, j))

        return k.reduce("sum", (taps,), element) * k.read(1, (p, i))

    return k.reduce("sum", (taps,), row)


# ---- patch_transform_grad: the transpose, out[n, c, h, w]


def _infer_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    g, matrix = types
    images = g.sizes[0] // attrs["strips"]
    x = TensorType((images, g.shape[2], attrs["height"], attrs["width"]), same_dtype(types))
    if _infer([x, matrix], attrs)[0] != g:
        raise errors.ShapeError(f"cotangent {g} is not that of patches of {x}")
    return [x]


def _evaluate_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    g, matrix = arrays
    (points, taps), step = matrix.shape, attrs["step"]
    th, tw = (_tiles(attrs[k], taps, step) for k in ("height", "width"))
    channels, strips = g.shape[2], attrs["strips"]
    if attrs["split"]:
        g = g.transpose(0, 1, 3, 2, 4)
    grid = g.reshape(-1, strips, points, points, channels, th * tw // strips)
    grid = grid.transpose(0, 2, 3, 4, 1, 5).reshape(-1, points, points, channels, th, tw)
    parts = np.einsum("pi,qj,npqchw->nchwij", matrix, matrix, grid, optimize=True)
    out = np.zeros((len(grid), channels, attrs["height"], attrs["width"]), g.dtype)
    for a in range(th):
        for b in range(tw):
            out[:, :, a * step : a * step + taps, b * step : b * step + taps] += parts[:, :, a, b]
    return [out]


def _vjp_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (_, matrix), c = node.inputs, cotangents[0]
    assert c is not None
    attrs = {key: node.attrs[key] for key in ("step", "split", "strips")}
    return apply("patch_transform", c, matrix, **attrs)[0], None


def _lower_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, c, h, w = index
    points, taps = node.inputs[1].sizes
    step, split, strips = (node.attrs[key] for key in ("step", "split", "strips"))
    rows, columns = (_tiles(node.attrs[key], taps, step) for key in ("height", "width"))

    def read(p: Index, q: Index, th: Index, tw: Index) -> Expr:
        strip, tile = k.divmod(th * columns + tw, node.inputs[0].sizes[-1])
        image = n * strips + strip
        return k.read(0, (image, p, c, q, tile) if split else (image, p * points + q, c, tile))

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


# ---- patch_product: out[n, p, o, q, t] = sum over c of x[n, p, c, q, t] * w[o, (p, q), c, 0]


def _infer_product(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, w = types
    if x.rank != 5 or w.rank != 4 or w.sizes[1:] != (x.sizes[1] * x.sizes[3], x.sizes[2], 1):
        raise errors.ShapeError(f"split patches {x} and transformed weights {w} do not fit")
    return [TensorType((*x.shape[:2], w.shape[0], *x.shape[3:]), same_dtype(types))]


def _evaluate_product(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, w = arrays
    points = w.reshape(w.shape[0], x.shape[1], x.shape[3], -1)
    return [np.einsum("npcqt,opqc->npoqt", x, points, optimize=True)]


def _vjp_product(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, w), c = node.inputs, cotangents[0]
    assert c is not None
    weights = transpose(apply("patch_weight_grad", x, c)[0], (1, 0, 2, 3))
    return apply("patch_product", c, transpose(w, (2, 1, 0, 3)))[0], weights


def _lower_product(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    n, p, o, q, t = index
    channels, points = node.inputs[0].sizes[2:4]
    return k.reduce(
        "sum",
        (channels,),
        lambda c: k.read(0, (n, p, c, q, t)) * k.read(1, (o, p * points + q, c, 0)),
    )


# ---- patch_weight_grad: out[o, p, c, 0] = sum over n, t of x[n, p, c, t] * g[n, p, o, t],
#          of split ones out[(p, q), o, c, 0] = ... x[n, p, c, q, t] * g[n, p, o, q, t]: what one
#          point needs then stays in the cache for all channels


def _infer_weight_grad(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x, g = types
    same = (x.rank, x.shape[:2], x.shape[3:]) == (g.rank, g.shape[:2], g.shape[3:])
    if x.rank not in (4, 5) or not same:
        raise errors.ShapeError(f"images {x} and cotangents {g} differ in more than their channels")
    out_channels, channels = g.shape[2], x.shape[2]
    points = x.sizes[1] * x.sizes[3] if x.rank == 5 else x.sizes[1]
    order = (points, out_channels) if x.rank == 5 else (out_channels, points)
    return [TensorType((*order, channels, 1), same_dtype(types))]


def _evaluate_weight_grad(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, g = arrays
    if x.ndim == 4:
        return [np.einsum("npct,npot->opc", x, g, optimize=True)[..., None]]
    out = np.einsum("npcqt,npoqt->pqoc", x, g, optimize=True)
    return [out.reshape(-1, *out.shape[2:], 1)]


def _vjp_weight_grad(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, g), c = node.inputs, cotangents[0]
    assert c is not None
    if x.rank == 5:
        by_channel = transpose(c, (2, 0, 1, 3)), transpose(c, (1, 0, 2, 3))
        gx, gg = (apply("patch_product", v, w)[0] for v, w in zip((g, x), by_channel, strict=True))
        return gx, gg
    c = squeeze(c, -1)
    return matmul(transpose(c, (1, 2, 0)), g), matmul(transpose(c, (1, 0, 2)), x)


def _lower_weight_grad(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    x = node.inputs[0].sizes
    if len(x) == 4:
        o, p, c, _one = index
    else:
        point, o, c, _one = index
        p, q = k.divmod(point, x[3])

    def at(n: Index, channel: Index, t: Index) -> tuple[Index, ...]:
        return (n, p, channel, t) if len(x) == 4 else (n, p, channel, q, t)

    return k.reduce(
        "sum", (x[0], x[-1]), lambda n, t: k.read(0, at(n, c, t)) * k.read(1, at(n, o, t))
    )


# ---- samples


def _samples() -> list[Sample]:
    rng = np.random.default_rng(70)
    cases = (
        ((2, 3, 6, 6), (4, 4), 2, 4),
        ((1, 2, 4, 7), (3, 4), 3, 2),
        ((1, 1, 3, 3), (5, 3), 1, 1),
        ((2, 1, 5, 9), (3, 3), 2, 4),
    )
    return [
        Sample(
            (rng.standard_normal(x), rng.standard_normal(m)),
            {"step": s, "split": split, "strips": strips},
            (0,),
        )
        for x, m, s, most in cases
        for split in (False, True)
        for strips in {1, most}
    ]


def _samples_grad() -> list[Sample]:
    rng = np.random.default_rng(71)
    cases = (
        ((2, 16, 3, 4), (4, 4), 2, 6, 6, 1),
        ((1, 9, 2, 2), (3, 4), 3, 4, 7, 1),
        ((2, 9, 2, 6), (3, 2), 2, 4, 6, 1),
        ((4, 9, 2, 3), (3, 2), 2, 4, 6, 2),
        ((2, 4, 3, 4, 4), (4, 4), 2, 6, 6, 1),
        ((2, 3, 2, 3, 6), (3, 2), 2, 4, 6, 1),
        ((6, 3, 2, 3, 4), (3, 2), 2, 6, 8, 3),
    )
    return [
        Sample(
            (rng.standard_normal(g), rng.standard_normal(m)),
            {"step": s, "height": h, "width": w, "split": len(g) == 5, "strips": strips},
            (0,),
        )
        for g, m, s, h, w, strips in cases
    ]


def _samples_product() -> list[Sample]:
    rng = np.random.default_rng(73)
    cases = (((2, 3, 4, 3, 5), (7, 9, 4, 1)), ((1, 2, 1, 2, 1), (1, 4, 1, 1)))
    return [Sample((rng.standard_normal(x), rng.standard_normal(w)), {}) for x, w in cases]


def _samples_weight_grad() -> list[Sample]:
    rng = np.random.default_rng(72)
    cases = (
        ((2, 4, 3, 5), (2, 4, 2, 5)),
        ((1, 9, 1, 1), (1, 9, 7, 1)),
        ((3, 1, 17, 2), (3, 1, 1, 2)),
        ((2, 3, 2, 3, 2), (2, 3, 4, 3, 2)),
    )
    return [Sample((rng.standard_normal(x), rng.standard_normal(g)), {}) for x, g in cases]


register(
    OpDef(
        "patch_product",
        _infer_product,
        _evaluate_product,
        _vjp_product,
        _lower_product,
        _samples_product,
    )
)
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

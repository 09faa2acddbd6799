"""Blocks of pixels as channels, and back.

    space_to_depth(x)[n, (i * block + j) * C + c, h, w] = x[n, c, h * block + i, w * block + j]

A convolution of stride s is one of stride 1 over `space_to_depth(x, s)`, its taps likewise: pixels
of one phase of the stride lie side by side. `depth_to_space` is the inverse, so each is the other's
chain rule. The order of the channels is that of ONNX's SpaceToDepth and DepthToSpace (mode DCR).
"""

from __future__ import annotations

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Node, TensorType, Value
from graphc.ops.pointwise import chain_rule, draw
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, register

__all__: list[str] = []


def space_to_depth(x: Value, block: int) -> Value:
    """x[N, C, H * block, W * block] as [N, block * block * C, H, W]."""
    return apply("space_to_depth", x, block=block)[0]


def depth_to_space(x: Value, block: int) -> Value:
    """x[N, block * block * C, H, W] as [N, C, H * block, W * block]."""
    return apply("depth_to_space", x, block=block)[0]


# ---- space_to_depth


def _infer_depth(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    (x,), block = types, attrs["block"]
    images, channels, height, width = x.sizes
    if height % block or width % block:
        raise errors.ShapeError(f"images {x} do not fall into blocks of {block} x {block} pixels")
    shape = (images, block * block * channels, height // block, width // block)
    return [TensorType(shape, x.dtype)]


def _evaluate_depth(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    (x,), block = arrays, attrs["block"]
    n, c, h, w = x.shape
    cut = x.reshape(n, c, h // block, block, w // block, block).transpose(0, 3, 5, 1, 2, 4)
    return [cut.reshape(n, block * block * c, h // block, w // block)]


def _lower_depth(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    (n, channel, h, w), block = index, node.attrs["block"]
    phase, c = k.divmod(channel, node.inputs[0].sizes[1])
    i, j = k.divmod(phase, block)
    return k.read(0, (n, c, h * block + i, w * block + j))


# ---- depth_to_space


def _infer_space(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    (x,), block = types, attrs["block"]
    images, channels, height, width = x.sizes
    if channels % (block * block):
        raise errors.ShapeError(f"the channels of {x} are no multiple of {block} * {block}")
    shape = (images, channels // (block * block), height * block, width * block)
    return [TensorType(shape, x.dtype)]


def _evaluate_space(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    (x,), block = arrays, attrs["block"]
    n, c, h, w = x.shape
    cut = x.reshape(n, block, block, c // (block * block), h, w).transpose(0, 3, 4, 1, 5, 2)
    return [cut.reshape(n, c // (block * block), h * block, w * block)]


def _lower_space(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    (n, c, y, x), block = index, node.attrs["block"]
    (h, i), (w, j) = k.divmod(y, block), k.divmod(x, block)
    return k.read(0, (n, (i * block + j) * node.types[0].sizes[1] + c, h, w))


def _samples(shapes: list[tuple[tuple[int, ...], int]]) -> list[Sample]:
    return [Sample((draw(shape),), {"block": block}) for shape, block in shapes]


register(
    OpDef(
        "space_to_depth",
        _infer_depth,
        _evaluate_depth,
        chain_rule(lambda node, g: depth_to_space(g, node.attrs["block"])),
        _lower_depth,
        lambda: _samples([((2, 3, 4, 6), 2), ((1, 1, 3, 3), 3), ((2, 8, 2, 4), 1)]),
    )
)
register(
    OpDef(
        "depth_to_space",
        _infer_space,
        _evaluate_space,
        chain_rule(lambda node, g: space_to_depth(g, node.attrs["block"])),
        _lower_space,
        lambda: _samples([((2, 12, 2, 3), 2), ((1, 9, 1, 1), 3), ((2, 8, 2, 4), 1)]),
    )
)

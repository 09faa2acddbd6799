"""A sum over the batch in parts: one partial sum for each block of images.

The weight gradient of a convolution sums over all images. Its partial sum over a few of them can be
taken while they are in the cache, together with whatever makes and reads them; the partial sums are
then added. `batch_parts` says that of any operator whose lowering sums over axis 0 of its operands
first: it has that operator's type rule, reference and lowering, for blocks of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Node, TensorType, Value
from graphc.ops.reduce import sum as reduce_sum
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, get, register
from graphc.ops.shape import reshape

__all__: list[str] = []


def sum_by_parts(node: Node, operands: Sequence[Value], parts: int) -> Value:
    """The result of `node`, which sums over axis 0 of all operands, from partial sums of each of
    `parts` blocks."""
    attrs = {"inner": node.op, "attrs": node.attrs, "parts": parts}
    each = apply("batch_parts", *operands, name=node.name, **attrs)[0]
    total = reduce_sum(reshape(each, (parts, node.types[0].size)), axis=0)
    return reshape(total, node.types[0].shape)


def undivided(node: Node) -> Node:
    """The node whose sum a `batch_parts` node takes in parts. It belongs to no graph."""
    types = tuple(replace(t, shape=t.shape[1:]) for t in node.types)
    attrs = node.attrs["attrs"]
    return Node(node.graph, node.name, node.attrs["inner"], node.inputs, attrs, types, node.origin)


def _infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    parts, images = attrs["parts"], types[0].sizes[0]
    if any(t.sizes[0] != images for t in types) or images % parts:
        raise errors.ShapeError(f"{images} images do not fall into {parts} equal parts")
    block = [replace(t, shape=(images // parts, *t.shape[1:])) for t in types]
    results = get(attrs["inner"]).infer(block, attrs["attrs"])
    return [replace(t, shape=(parts, *t.shape)) for t in results]


def _evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    evaluate = get(attrs["inner"]).evaluate
    blocks = zip(*(np.split(a, attrs["parts"]) for a in arrays), strict=True)
    return [np.stack([evaluate(list(block), attrs["attrs"])[0] for block in blocks])]


class _Part:
    """`Lowering` of the operator inside: its first sum runs over one block of the images."""

    def __init__(self, k: Lowering, part: Index, images: int, parts: int):
        self.read, self.divmod = k.read, k.divmod
        self._k, self._part, self._images, self._size = k, part, images, images // parts

    def reduce(self, combine: str, extents: Sequence[int], body: Callable[..., Expr]) -> Expr:
        if combine != "sum" or extents[0] != self._images:
            return self._k.reduce(combine, extents, body)
        first = self._part * self._size
        return self._k.reduce("sum", (self._size, *extents[1:]), lambda n, *i: body(first + n, *i))


def _lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    rule = get(node.attrs["inner"]).lower
    assert rule is not None, f"{node.describe()}: {node.attrs['op']!r} has no lowering"
    part = _Part(k, index[0], node.inputs[0].sizes[0], node.attrs["parts"])
    return rule(part, undivided(node), output, index[1:])


def _samples() -> list[Sample]:
    rng = np.random.default_rng(80)
    convolution: Attrs = {
        "stride": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "dilation": (1, 1),
        "groups": 1,
        "weight_shape": (5, 2, 3, 2),
    }
    cases: tuple[tuple[str, Attrs, tuple[int, ...], tuple[int, ...], int], ...] = (
        ("conv2d_weight_grad", convolution, (6, 2, 5, 4), (6, 5, 3, 3), 3),
        ("conv2d_weight_grad", convolution, (17, 2, 3, 2), (17, 5, 1, 1), 17),
        ("toom_conv_weight_grad", {}, (4, 3, 2, 5, 2), (4, 3, 7, 3, 2), 2),
        ("patch_weight_grad", {}, (8, 2, 3, 2, 5), (8, 2, 4, 2, 5), 1),
    )
    return [
        Sample(
            (rng.standard_normal(x), rng.standard_normal(g)),
            {"inner": op, "attrs": attrs, "parts": parts},
        )
        for op, attrs, x, g, parts in cases
    ]


# Parts are made after autodiff, of gradients: no chain rule.
register(OpDef("batch_parts", _infer, _evaluate, None, _lower, _samples))

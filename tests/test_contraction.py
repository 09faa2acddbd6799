"""Contractions seen as matrix products: gathered by their own description, they give the result."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import graphc as gc
from graphc.codegen.contraction import Contraction, Factor, find_contraction
from graphc.codegen.lower import lower_region
from graphc.expr import Index
from graphc.ir import Graph
from graphc.ops.registry import get


def body_of(op: str, shapes: list[tuple[int, ...]], **attrs) -> Graph:
    """One operator as a region, the way fusion leaves it."""
    g = Graph("body")
    operands = [g.input(f"operand{i}", shape, "float32") for i, shape in enumerate(shapes)]
    g.output(result0=g.add(op, operands, attrs)[0])
    return g


def positions(c: Contraction, loops: tuple[str, ...]) -> list[dict[str, int]]:
    ranges = [range(c.kernel.loops[n].extent) for n in loops]
    return [dict(zip(loops, digits, strict=True)) for digits in itertools.product(*ranges)]


def at(index: Index, where: dict[str, int]) -> int:
    return index.constant + sum(c * where[n] for n, c in index.terms)


def gathered(factor: Factor, where: list[dict[str, int]], arrays: list[np.ndarray]) -> np.ndarray:
    """The factor at every combination of loops; outside its bounds 0."""
    access = factor.expr.attributes["access"]
    flat = arrays[access.buffer].ravel()
    values = np.zeros(len(where))
    for k, loops in enumerate(where):
        if all(0 <= at(index, loops) < extent for index, extent in factor.bounds):
            values[k] = flat[at(Index(access.strides, access.offset), loops)]
    return values


def multiplied(c: Contraction, arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The result, by one matrix product for each item of the batch."""
    out = np.full(math.prod(shape), np.nan)
    access = c.kernel.stores[0].access
    inner = positions(c, c.inner)
    ragged = [loop for loop in c.kernel.loops.values() if loop.ragged]
    for item in positions(c, c.batch):
        sides = []
        for factor, loops in ((c.left, c.rows), (c.right, c.columns)):
            where = [{**item, **line, **k} for line in positions(c, loops) for k in inner]
            sides.append(gathered(factor, where, arrays).reshape(-1, len(inner)))
        product = sides[0] @ sides[1].T
        for i, row in enumerate(positions(c, c.rows)):
            for j, column in enumerate(positions(c, c.columns)):
                where = {**item, **row, **column}
                if all(where[r.block] * r.extent + where[r.name] < r.total for r in ragged):
                    out[at(Index(access.strides, access.offset), where)] = product[i, j]
    return out.reshape(shape)


GEOMETRIES = [
    # (image, weight, stride, padding, dilation, groups)
    ((2, 3, 5, 4), (4, 3, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    ((1, 4, 5, 6), (6, 2, 2, 3), (1, 1), ((0, 1), (2, 1)), (2, 1), 2),
    ((2, 2, 6, 6), (3, 2, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    ((2, 2, 7, 5), (3, 2, 3, 3), (2, 2), ((1, 1), (0, 0)), (1, 1), 1),
    ((1, 3, 8, 7), (2, 3, 1, 1), (2, 3), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 2, 9, 9), (2, 2, 5, 4), (3, 2), ((2, 2), (2, 1)), (1, 1), 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
]


@pytest.mark.parametrize("op", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_convolutions_are_matrix_products(op, case):
    image, weight, stride, padding, dilation, groups = case
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    probe = body_of("conv2d", [image, weight], **attrs)
    output = probe.outputs["result0"].sizes
    shapes = {
        "conv2d": [image, weight],
        "conv2d_input_grad": [output, weight],
        "conv2d_weight_grad": [image, output],
    }[op]
    extra = {
        "conv2d": {},
        "conv2d_input_grad": {"input_shape": image},
        "conv2d_weight_grad": {"weight_shape": weight},
    }[op]
    body = body_of(op, shapes, **attrs, **extra)
    c = find_contraction(lower_region("k", body))
    assert c is not None
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    (expected,) = get(op).evaluate(arrays, {**attrs, **extra})
    np.testing.assert_allclose(
        multiplied(c, arrays, expected.shape), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "a, b", [((3, 4), (4, 5)), ((2, 1, 3, 4), (3, 4, 2)), ((1, 1), (1, 1)), ((5,), (5, 2))], ids=str
)
def test_matrix_products(a, b):
    c = find_contraction(lower_region("k", body_of("matmul", [a, b])))
    assert c is not None
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in (a, b)]
    expected = np.matmul(*arrays)
    np.testing.assert_allclose(multiplied(c, arrays, expected.shape), expected, rtol=1e-4)


def test_loops_by_factor():
    c = find_contraction(
        lower_region(
            "k",
            body_of(
                "conv2d",
                [(8, 6, 9, 9), (4, 3, 3, 3)],
                stride=(1, 1),
                padding=((0, 0), (0, 0)),
                dilation=(1, 1),
                groups=2,
            ),
        )
    )
    assert c is not None
    sizes = [c.extent(loops) for loops in (c.batch, c.rows, c.columns, c.inner)]
    assert sizes == [2, 2, 8 * 7 * 7, 3 * 3 * 3]


def test_gradient_of_a_stride_sums_over_windows_in_reach_alone():
    """Of 28 x 28 windows, a position of a 3 x 3 convolution of stride 2 is in 2 x 2 at most."""
    body = body_of(
        "conv2d_input_grad",
        [(2, 4, 28, 28), (4, 3, 3, 3)],
        input_shape=(2, 3, 56, 56),
        stride=(2, 2),
        padding=((1, 1), (1, 1)),
        dilation=(1, 1),
        groups=1,
    )
    c = find_contraction(lower_region("k", body))
    assert c is not None
    sizes = [c.extent(loops) for loops in (c.batch, c.rows, c.columns, c.inner)]
    assert sizes == [2 * 2, 3, 2 * 28 * 28, 4 * 2 * 2]


def test_what_is_no_contraction():
    g = Graph("body")
    x = g.input("operand0", (3, 4), "float32")
    g.output(result0=gc.sum(x, 1))
    assert find_contraction(lower_region("k", g)) is None
    g = Graph("body")
    x = g.input("operand0", (3, 4), "float32")
    g.output(result0=gc.relu(x))
    assert find_contraction(lower_region("k", g)) is None

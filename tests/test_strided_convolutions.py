"""Convolutions that skip pixels, and their gradients: explicit padding, phases, layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from compile_checks import assert_same

import graphc as gc
from graphc.codegen import core, parts, program
from graphc.codegen.lower import lower_region
from graphc.codegen.simd_host import host_lanes
from graphc.interpreter import interpret
from graphc.ir import Graph
from graphc.ops.conv import conv2d_input_grad
from graphc.runtime.layout import read_layout, write_layout
from graphc.types import Layout
from passes.explicit_padding import ExplicitPadding

GEOMETRIES = [
    {
        "stride": (stride, 4 - stride),
        "dilation": (dilation, 3 - dilation),
        "padding": padding,
        "groups": groups,
    }
    for stride, dilation, padding, groups in itertools.product(
        (1, 2, 3), (1, 2), (((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 2), (5, 1))), (1, 2)
    )
]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("size, kernel", [((7, 9), (3, 3)), ((8, 12), (2, 1)), ((5, 5), (1, 2))])
def test_padding_is_explicit_and_changes_nothing(size, kernel, rows):
    rng = np.random.default_rng(5)
    for geometry in GEOMETRIES:
        g = Graph()
        x = g.input("x", (2, 4, *size), dtype="float64")
        w = g.input("w", (6, 4 // geometry["groups"], *kernel), dtype="float64")
        y = gc.conv2d(x, w, **geometry)
        c = g.input("c", y.sizes, dtype="float64")
        g.output(y=y, dx=conv2d_input_grad(c, w, input_shape=x.sizes, **geometry))
        feeds = {name: rng.standard_normal(node.types[0].sizes) for name, node in g.inputs.items()}
        padded = ExplicitPadding(rows).run(g)
        expected, got = interpret(g, feeds).outputs, interpret(padded, feeds).outputs
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)
        for node in padded:
            if node.op == "conv2d":
                assert node.attrs["padding"] == ((0, 0), (0, 0))
            if node.op == "conv2d_input_grad":
                whole = zip(node.types[0].sizes[2:], node.attrs["stride"], strict=True)
                assert all(extent % stride == 0 for extent, stride in whole)


def test_single_pixels_are_gathered():
    """Forward and weight gradient read one copy of the pixels that a stride leaves."""
    rng = np.random.default_rng(6)
    g = Graph()
    x, w = g.input("x", (2, 4, 7, 9), dtype="float64"), g.input("w", (6, 2, 1, 1), dtype="float64")
    y = gc.conv2d(x, w, stride=(2, 3), groups=2)
    c = g.input("c", y.sizes, dtype="float64")
    attrs = {"stride": (2, 3), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 2}
    g.output(y=y, dw=g.add("conv2d_weight_grad", (x, c), {**attrs, "weight_shape": w.sizes})[0])
    feeds = {name: rng.standard_normal(node.types[0].sizes) for name, node in g.inputs.items()}
    gathered = ExplicitPadding().run(g)
    expected, got = interpret(g, feeds).outputs, interpret(gathered, feeds).outputs
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)
    convolutions = [n for n in gathered if n.op.startswith("conv2d")]
    assert {n.attrs["stride"] for n in convolutions} == {(1, 1)}
    assert len({n.inputs[0] for n in convolutions}) == 1
    assert ExplicitPadding(rows=True).run(g).structure() == g.structure()


# (input [C, H, W], weight [OC, C/groups, KH, KW], stride, padding, dilation, groups)
LAYERS = (
    ((16, 9, 8), (17, 16, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    ((8, 7, 11), (16, 8, 1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    ((5, 8, 7), (9, 5, 3, 2), (3, 2), ((0, 1), (2, 0)), (1, 2), 1),
    ((16, 7, 7), (32, 8, 3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1), 2),
    ((8, 10, 9), (8, 1, 5, 3), (2, 3), ((2, 2), (1, 1)), (1, 1), 8),
    ((3, 17, 17), (16, 3, 7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), 1),
)


def check_gradients(layers, layout, batch):
    g, feeds, terms = Graph("strided"), {}, []
    rng = np.random.default_rng(6)
    for n, (image, weight, stride, padding, dilation, groups) in enumerate(layers):
        x, w = g.input(f"x{n}", ("N", *image)), g.parameter(f"w{n}", weight)
        y = gc.conv2d(gc.tanh(x), w, None, stride, padding, dilation, groups)
        terms.append(gc.sum(gc.mul(gc.sin(y), 0.1)))
        feeds[x.name] = rng.standard_normal((batch, *image)).astype("float32")
    g.output(loss=gc.sum(gc.stack(terms)))
    compiled, _ = assert_same(
        g,
        feeds,
        dims={"N": batch},
        outputs=["loss"],
        loss="loss",
        gradients=[*g.inputs, *g.parameters],
        pipeline=gc.default_pipeline(layout),
    )
    return compiled


@pytest.mark.parametrize("layout, batch", [("batch", 16), ("channels", 3)])
def test_gradients(layout, batch):
    check_gradients(LAYERS[:1], layout, batch)


@pytest.mark.slow
@pytest.mark.parametrize("layout, batch", [("batch", 16), ("channels", 3), ("rows", 2)])
def test_gradients_of_every_geometry(layout, batch):
    check_gradients(LAYERS, layout, batch)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_arrays_in_and_out_of_ordered_layouts(axis):
    layout = Layout(axis, 4 if axis is not None else 1, order=(1, 2, 3, 0))
    array = np.random.default_rng(7).standard_normal((5, 6, 3, 2))
    memory = np.full(layout.physical_shape(array.shape), np.nan)
    write_layout(memory, array, layout)
    np.testing.assert_array_equal(read_layout(memory, array.shape, layout), array)
    strides = layout.strides(array.shape)
    at = (3, 2, 1, 1)
    lane = at[axis] % 4 if axis is not None else 0
    blocks = [p // 4 if a == axis else p for a, p in enumerate(at)]
    offset = sum(b * s for b, s in zip(blocks, strides, strict=True)) + lane
    assert memory.reshape(-1)[offset] == array[at]


@pytest.mark.parametrize("layout, batch", [("batch", 16), ("channels", 3)])
def test_weight_gradients_in_parts(layout, batch, monkeypatch):
    """Around the loops that threads share, or within them."""
    monkeypatch.setattr(core, "L1_BYTES", 8000)
    monkeypatch.setattr(core, "L2_BYTES", 9000)
    monkeypatch.setattr(program, "_scheduled", {})
    layer = ((9, 31, 64), (32, 9, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1)
    compiled = check_gradients([layer], layout, batch)
    (launch,) = [one for one in compiled.launches if one.node.name == "conv2d_weight_grad"]
    schedule = launch.schedule
    cut = any(n.startswith("r") for n in launch.kernel.outer)
    assert cut or host_lanes() != 8  # the sizes are such that it pays for vectors of 8
    assert {*schedule.around, *schedule.order, schedule.lane} >= set(launch.kernel.outer)
    assert all(n.startswith("i") for n in schedule.order[: schedule.parallel])
    for loop, count in schedule.tile:
        innermost = loop == schedule.order[-1] and not schedule.whole
        assert innermost or launch.kernel.loops[loop].extent % count == 0


def test_sums_are_cut_evenly():
    body = Graph("body")
    x, g = body.input("operand0", (3, 2, 12, 4)), body.input("operand1", (3, 5, 12, 4))
    attrs = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1}
    dw = body.add("conv2d_weight_grad", (x, g), {**attrs, "weight_shape": (5, 2, 1, 1)})
    body.output(result0=dw[0])
    kernel = lower_region("dw", body)
    total = kernel.stores[0].expr
    images, rows, _ = total.attributes["loops"]
    ways = list(parts.ways_to_cut(kernel, total, None))
    assert [way[rows] for way in ways] == [12, 6, 4, 3, 2, 1]
    assert all(way[images] == 1 for way in ways)
    assert parts.can_be_cut(kernel, total)
    outside = parts.cut(kernel, ways[2])
    assert outside == (images, f"{rows}b")
    assert kernel.loops[f"{rows}b"].extent == 3 and kernel.loops[f"{rows}l"].extent == 4
    assert kernel.outer[-2:] == outside

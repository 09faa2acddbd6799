"""Tiled CUDA kernels of contractions, run thread by thread on the CPU, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("numba.cuda.cudadrv", reason='needs numba-cuda: pip install ".[cuda]"')

import graphc as gc
from graphc.codegen import cuda_contraction, cuda_generic
from graphc.codegen.contraction import find_contraction
from graphc.codegen.cuda import Rendering
from graphc.codegen.cuda_copies import deal
from graphc.codegen.cuda_indices import total
from graphc.codegen.cuda_tiles import TENSOR_TILES, TILES, TensorTile, Tile, choose_tile
from graphc.codegen.kernel import Kernel
from graphc.codegen.program import lower_node
from graphc.compiler import default_pipeline
from graphc.interpreter import interpret
from graphc.ir import Graph, Node
from graphc.runtime.cuda_device import DeviceCall
from graphc.runtime.cuda_emulated import EmulatedDevice
from graphc.runtime.emulate import ORDERS


def regions(graph: Graph) -> list[Node]:
    """The fused regions of a graph, as they are lowered for CUDA."""
    fused, _ = default_pipeline(target="cuda").run(graph)
    return [n for n in fused if n.op == "fused"]


class Emulated:
    """One kernel with memory of its own on the emulated device; `in_place`: the number of the
    operand in whose memory the first result lies."""

    def __init__(
        self, node: Node, kernel: Kernel, rendering: Rendering, in_place: int | None = None
    ):
        self.node = node
        self.device = EmulatedDevice()
        values = [*node.inputs, *node.outputs]
        self.addresses = [self.device.allocate(v.type.nbytes) for v in values]
        if in_place is not None:
            self.addresses[len(node.inputs)] = self.addresses[in_place]
        self.addresses.append(self.device.allocate(max(64, rendering.workspace)))
        self.workspace = rendering.workspace
        dtypes = [*(b.dtype for b in kernel.buffers), "float32"]
        rows = [
            (f"{node.name}_{i}", launch, tuple(dtypes[b] for b in launch.buffers))
            for i, launch in enumerate(rendering.launches)
        ]
        loaded = self.device.load(rows)
        calls = []
        for (name, launch, _), entry in zip(rows, loaded.kernels, strict=True):
            pointers = [self.addresses[b] for b in launch.buffers]
            parameters = np.array([*pointers, *launch.numbers], np.int64)
            calls.append(
                DeviceCall(name, entry, launch.grid, launch.block, launch.shared, parameters)
            )
        self.program = self.device.program(calls)

    def run(self, arrays: list[np.ndarray], order: str = "forward") -> list[np.ndarray]:
        """Results for operands; what is not written is NaN."""
        self.device.emulator.order = order
        results = [np.full(v.sizes, np.nan, v.dtype) for v in self.node.outputs]
        for address, array in zip(self.addresses[len(arrays) :], results, strict=False):
            self.device.write(address, array)
        for address, array in zip(self.addresses, arrays, strict=False):
            self.device.write(address, array)
        self.device.fill(self.addresses[-1], self.workspace, 0xFF)
        self.program.run()
        for address, array in zip(self.addresses[len(arrays) :], results, strict=False):
            self.device.read(address, array)
        return results


def matrix_product(a: tuple[int, ...], b: tuple[int, ...]) -> Graph:
    g = Graph("product")
    g.output(y=gc.matmul(g.input("a", a), g.input("b", b)))
    return g


def linear(a: tuple[int, int], columns: int) -> Graph:
    """A product with a transposed matrix: neighbouring terms of both factors are neighbours."""
    g = Graph("linear")
    g.output(y=gc.matmul(g.input("a", a), gc.transpose(g.input("w", (columns, a[1])), (1, 0))))
    return g


def convolution(image, weight, bias: bool = False, **geometry) -> Graph:
    g = Graph("convolution")
    y = gc.conv2d(g.input("x", image), g.input("w", weight), **geometry)
    if bias:
        y = gc.relu(y + g.input("b", (weight[0], 1, 1)))
    g.output(y=y)
    return g


def gradient(of: str, image, weight, **geometry) -> Graph:
    """The gradient of a convolution's "x" or "w" alone."""
    from graphc.compiler import transform

    g = convolution(image, weight, **geometry)
    g.output(loss=gc.sum(gc.mul(g.outputs["y"], g.input("g", g.outputs["y"].sizes))))
    joint, _ = transform(g, [], {}, "loss", [of])
    return joint


# Of factors with 10 bits after the point, or 7, a sum of products of numbers around 1.
ROUNDED = {"tf32": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("precision, quads", [("tf32", False), ("bfloat16", True)])
def test_tensor_cores(precision, quads):
    """Exact on numbers that the precision holds; else as far off as its rounding says. Tiles are
    stored line by line for `ldmatrix`, but those whose lines are copied four at once."""
    inner, columns = (36, 68) if quads else (37, 66)
    (node,) = regions(matrix_product((70, inner), (inner, columns)))
    kernel = lower_node(node)
    c = find_contraction(kernel.copy())
    assert c is not None
    tile = TensorTile(64, 64, 16, 8, 8, precision)
    rendering = cuda_contraction.render_tiled(c, tile, 1)
    assert f'"{precision}", (True, {not quads})' in rendering.launches[0].source
    run = Emulated(node, kernel, rendering)
    rng = np.random.default_rng(0)
    whole = [rng.integers(-8, 9, v.sizes).astype("float32") for v in node.inputs]
    for order in ORDERS:
        np.testing.assert_array_equal(run.run(whole, order)[0], whole[0] @ whole[1])
    arrays = [rng.standard_normal(v.sizes).astype("float32") for v in node.inputs]
    with_nan = arrays[0].copy()
    with_nan.view("uint32")[3, 5] = 0x7FFFFFFF  # as GPUs write it
    rows = np.isnan(run.run([with_nan, arrays[1]])[0])
    assert rows[3].all() and rows.sum() == columns
    expected = arrays[0].astype("float64") @ arrays[1]
    error = np.abs(run.run(arrays)[0] - expected).max() / np.abs(expected).max()
    assert ROUNDED[precision] / 100 < error < ROUNDED[precision]


def test_precision_is_an_option_of_the_cuda_targets():
    graph = matrix_product((192, 160), (160, 256))
    rng = np.random.default_rng(0)
    feeds = {"a": rng.standard_normal((192, 160)), "b": rng.standard_normal((160, 256))}
    expected = feeds["a"] @ feeds["b"]
    options = {"outputs": ["y"], "target": "cuda-emulated"}
    error = {}
    for precision in ("float32", "bfloat16"):
        y = gc.compile(graph, precision=precision, **options).run(feeds)["y"]
        error[precision] = np.abs(y - expected).max() / np.abs(expected).max()
    assert error["float32"] < 2e-6 < 1e-4 < error["bfloat16"] < ROUNDED["bfloat16"]
    with pytest.raises(gc.errors.CompileError, match="target='cpu' has 'float32', 'strict'"):
        gc.compile(graph, outputs=["y"], precision="tf32")
    with pytest.raises(gc.errors.CompileError, match="check=True compares kernels in float32"):
        gc.compile(graph, precision="tf32", check=True, **options)


LARGE, TALL, SMALL = Tile(128, 128, 16, 8, 8), Tile(64, 128, 8, 8, 8), Tile(16, 64, 8, 4, 4)
FLAT = Tile(32, 64, 8, 8, 4)
SLOW = ("large tile, odd matrices", "image gradient, stride", "many terms", "terms of one address")
CASES = {
    "large tile, odd matrices": (matrix_product((133, 37), (37, 165)), "matmul", LARGE, 1),
    "quads, split": (matrix_product((64, 40), (40, 132)), "matmul", Tile(64, 64, 8, 4, 4), 2),
    "terms in quads": (linear((33, 68), 65), "matmul", FLAT, 2),
    "lines of one address": (
        convolution((2, 6, 16, 16), (10, 6, 3, 3), padding=1),
        "conv2d",
        SMALL,
        1,
    ),
    "many terms": (
        convolution((1, 129, 5, 6), (9, 129, 3, 3), padding=1),
        "conv2d",
        SMALL,
        1,
    ),
    "terms of one address": (
        gradient("w", (3, 4, 16, 16), (5, 4, 3, 3), padding=1),
        "conv2d_weight_grad",
        SMALL,
        2,
    ),
    "batch of products": (matrix_product((3, 5, 9), (3, 9, 7)), "matmul", SMALL, 2),
    "bias and relu": (
        convolution((2, 6, 9, 7), (10, 3, 3, 3), True, padding=1, stride=2, groups=2),
        "conv2d",
        TALL,
        1,
    ),
    "image gradient": (
        gradient("x", (2, 3, 8, 9), (5, 3, 3, 2), padding=1, dilation=(1, 2)),
        "conv2d_input_grad",
        SMALL,
        1,
    ),
    "image gradient, stride": (
        gradient("x", (2, 3, 9, 7), (5, 3, 3, 3), padding=1, stride=(2, 3)),
        "conv2d_input_grad",
        SMALL,
        1,
    ),
    "weight gradient, split": (
        gradient("w", (3, 4, 9, 7), (5, 4, 3, 3), padding=1, stride=2),
        "conv2d_weight_grad",
        SMALL,
        3,
    ),
    "one by one": (matrix_product((1, 1), (1, 1)), "matmul", SMALL, 1),
}


def rendered(case: str) -> tuple[Node, Kernel, Rendering]:
    graph, kind, tile, splits = CASES[case]
    (node,) = [n for n in regions(graph) if n.attrs["kind"] == kind]
    kernel = lower_node(node)
    c = find_contraction(kernel.copy())
    assert c is not None
    return node, kernel, cuda_contraction.render_tiled(c, tile, splits)


@cache
def emulated(case: str) -> Emulated:
    return Emulated(*rendered(case))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
def test_emulated_kernels_agree_with_numpy(case, order):
    kernel = emulated(case)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(v.sizes).astype(v.dtype) for v in kernel.node.inputs]
    named = {f"operand{i}": a.astype("float64") for i, a in enumerate(arrays)}
    expected = interpret(kernel.node.attrs["body"], named).outputs
    for got, wanted in zip(kernel.run(arrays, order), expected.values(), strict=True):
        scale = np.abs(wanted).max()
        assert np.abs(got - wanted).max() <= 2e-6 * scale


def test_overlapping_tiles_store_every_sum_once():
    """33 x 65 sums in tiles of 16 x 64, added to what lies where the result will."""
    g = matrix_product((33, 17), (17, 65))
    g.output(y=g.outputs["y"] + g.input("c", (33, 65)))
    (node,) = regions(g)
    kernel = lower_node(node)
    c = find_contraction(kernel.copy())
    assert c is not None
    added = [v.sizes for v in node.inputs].index((33, 65))
    rendering = cuda_contraction.render_tiled(c, SMALL, 1)
    run = Emulated(node, kernel, rendering, in_place=added)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-8, 9, v.sizes).astype("float32") for v in node.inputs]
    a, b = (array for k, array in enumerate(arrays) if k != added)
    for order in ORDERS:
        np.testing.assert_array_equal(run.run(arrays, order)[0], a @ b + arrays[added])


def test_a_missing_barrier_is_found():
    """Without the barrier after the copies, some order of threads multiplies what is not there."""
    (node,) = regions(matrix_product((33, 17), (17, 65)))
    kernel = lower_node(node)
    c = find_contraction(kernel.copy())
    assert c is not None
    rendering = cuda_contraction.render_tiled(c, SMALL, 1)
    (launch,) = rendering.launches
    before, found, after = launch.source.partition("    copied()\n    cuda.syncthreads()\n")
    assert found
    broken = replace(launch, source=f"{before}    copied()\n{after}")
    run = Emulated(node, kernel, Rendering((broken,)))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(v.sizes).astype(v.dtype) for v in node.inputs]
    expected = arrays[0] @ arrays[1]
    right = [np.allclose(run.run(arrays, order)[0], expected, rtol=1e-4) for order in ORDERS]
    assert not all(right)


def test_both_renderers_agree_in_every_launch_of_a_split_sum():
    """Launches take their buffers by number; the workspace is the one after the last."""
    (node,) = regions(matrix_product((64, 4096), (4096, 64)))
    kernel = lower_node(node)
    rendering = cuda_contraction.render(kernel.copy(), "float32")
    assert rendering is not None and len(rendering.launches) == 2
    first, second = rendering.launches
    workspace = len(kernel.buffers)
    assert workspace in first.buffers and workspace in second.buffers
    splits = rendering.workspace // (4 * 64 * 64)
    assert splits > 1 and rendering.workspace % (4 * 64 * 64) == 0
    assert cuda_generic.render(kernel.copy(), "float32").workspace == 0


def test_a_pool_leaves_a_convolution_its_tiles():
    """On the CPU a pool whose windows do not overlap is part of the convolution's kernel."""
    graph = convolution((8, 16, 32, 32), (32, 16, 3, 3), padding=1)
    graph.output(y=gc.max_pool2d(graph.outputs["y"], 2))
    (node,) = [n for n in regions(graph) if n.attrs["kind"] == "conv2d"]
    assert cuda_contraction.render(lower_node(node), "float32") is not None


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), ((2, 3), 2)])
def test_no_windows_are_checked(stride, padding):
    """All that the sum of a data gradient runs over exists; a stride checks taps, of its weight."""
    geometry = {"stride": stride, "padding": padding}
    graph = gradient("x", (2, 3, 9, 7), (5, 3, 3, 3), **geometry)
    (node,) = [n for n in regions(graph) if n.attrs["kind"] == "conv2d_input_grad"]
    c = find_contraction(lower_node(node))
    assert c is not None
    assert not c.right.bounds
    assert bool(c.left.bounds) == (stride != 1)
    assert all(c.kernel.loops[n].extent <= 3 for i, _ in c.left.bounds for n, _ in i.terms)


def test_source_of_a_tiled_kernel(golden):
    (node,) = regions(convolution((2, 8, 16, 16), (32, 8, 3, 3), True, padding=1))[1:]
    c = find_contraction(lower_node(node))
    assert c is not None
    (launch,) = cuda_contraction.render_tiled(c, Tile(32, 32, 8, 4, 4), 1).launches
    golden("kernel_cuda_convolution.py.txt", launch.source)


@pytest.mark.parametrize(
    "lanes, count, whole, together",
    [
        (8, 4, 32, (4, 8)),  # neighbours stay together in one row of 32
        (16, 8, 112, (4, 4)),
        (8, 16, 56, (2, 4)),
        (8, 4, 28, (2, 2)),
        (8, 4, 14, (1, 8)),  # pairs would part threads that read neighbours
        (2, 16, 16, (8, 2)),  # two threads can always be neighbours
        (10, 6, 30, (3, 10)),
    ],
)
def test_items_are_dealt_once(lanes, count, whole, together):
    dealt = deal(lanes, count, whole)
    assert (dealt.together, dealt.apart) == together

    def value(terms: list[str], number: int) -> int:
        return eval(total(terms), {"U": int, "lane": number})

    firsts = [value(dealt.first("lane", 1), lane) for lane in range(lanes)]
    items = {first + dealt.item(number) for first in firsts for number in range(count)}
    assert items == set(range(lanes * count))
    for first in firsts:  # items with one address lie in one row
        for turn in range(0, count, dealt.together):
            group = [first + dealt.item(turn + k) for k in range(dealt.together)]
            assert dealt.together == 1 or len({item // whole for item in group}) == 1
    groups = [value(dealt.group("lane", 1), k) for k in range(lanes * count // dealt.together)]
    by_lane = [
        first + dealt.item(turn) for turn in range(0, count, dealt.together) for first in firsts
    ]
    assert groups == by_lane


def test_copies_share_addresses():
    """Rows of 16 pixels: two addresses for eight copies of a thread. Few terms have a table."""

    def source(case: str) -> str:
        return rendered(case)[2].launches[0].source

    convolved = source("lines of one address")
    assert "read_right = w.read_numbers(2)" in convolved
    assert "right_start = right_terms[right_k]" in convolved
    assert "right_terms" not in source("many terms")
    assert "(8, 4), (True, True)" in source("terms in quads")


def test_tiles():
    for tile in (*TILES, *TENSOR_TILES):
        assert tile.threads % 32 == 0 and tile.threads % tile.columns == 0
        assert tile.threads % tile.depth == 0
        # Every thread copies something of both operands.
        assert min(tile.rows, tile.columns) * tile.depth >= tile.threads
        # One thread for each line works out where it begins.
        assert max(tile.rows, tile.columns) <= tile.threads


def test_choice_of_tiles():
    tile, splits = choose_tile(4096, 4096, 4096, 1)
    assert (tile.part, splits) == (64, 1)
    tile, splits = choose_tile(64, 576, 200_000, 1)
    assert splits >= 8  # few tiles, a long sum
    _, splits = choose_tile(64, 576, 200_000, 1, splittable=False)
    assert splits == 1
    assert choose_tile(1, 50_000, 9, 32) is None  # a depthwise convolution

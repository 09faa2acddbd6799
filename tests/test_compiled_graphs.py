"""Random float32 networks: compiled forward and every gradient against the interpreter."""

from __future__ import annotations

import compile_checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphc as gc
from graphc.codegen.program import plan_launches
from graphc.ir import Graph, Value

SIZES = (1, 7, 17, 31)
Recipe = list[tuple[int, int, int]]


def _image(x: Value) -> Value:
    """A value as [N,C,H,W], shrunk where a recipe would make it large."""
    while x.rank < 4:
        x = gc.unsqueeze(x, 0)
    if x.rank > 4:
        x = gc.reshape(x, (-1, *x.shape[-3:]))
    return gc.slice(x, [None] * 4, [3, 9, 9, 9])


def _constant(x: Value, *shape: int) -> Value:
    values = np.random.default_rng(sum(shape)).normal(0, 1 / max(shape[-1], 1), shape)
    return x.graph.constant(values.astype(np.float32))


def _conv(x: Value, **attrs) -> Value:
    x = _image(x)
    groups = x.shape[1] if attrs.pop("depthwise", False) else 1
    out = groups if groups > 1 else 5
    return gc.conv2d(x, _constant(x, out, x.shape[1] // groups, 3, 3), groups=groups, **attrs)


def _weights(x: Value, y: Value) -> Value:
    """A convolution whose weight is computed too: gradients flow to both operands."""
    x = _image(x)
    weight = gc.tanh(gc.sum(y)) + _constant(x, 3, x.shape[1], 1, 1)
    return gc.conv2d(x, weight, stride=2)


def _pool(kind, **attrs):
    def pool(x: Value) -> Value:
        x = _image(x)
        kernel = min(2, *x.shape[2:])
        return kind(x, kernel, **attrs)

    return pool


def _product(x: Value, y: Value) -> Value:
    while x.rank < 2:
        x = gc.unsqueeze(x, 0)
    if y.rank >= 2 and y.shape[-2] == x.shape[-1] and (y.rank == 2 or x.rank == 2):
        return gc.matmul(x, y)
    return gc.matmul(x, _constant(x, x.shape[-1], 6))


def _last(x: Value) -> Value:
    return x if x.rank else gc.reshape(x, (1,))


def _joined(x: Value, y: Value) -> Value:
    flat = [gc.reshape(v, (-1,)) for v in (x, y)]
    return gc.slice(gc.concat(flat, 0), [None], [40])


OPERATORS = {
    "add": (2, gc.add),
    "mul": (2, lambda x, y: gc.mul(x, gc.tanh(y))),
    "maximum": (2, gc.maximum),
    "where": (2, lambda x, y: gc.where(gc.gt(x, y), x, gc.mul(y, 0.5))),
    "relu": (1, gc.relu),
    "gelu": (1, gc.gelu),
    "sum": (1, lambda x: gc.sum(_last(x), -1)),
    "sum first": (1, lambda x: gc.sum(_last(x), 0, keepdims=True)),
    "mean": (1, lambda x: gc.mean(x, keepdims=True)),
    "max": (1, lambda x: gc.max(_last(x), 0)),
    "softmax": (1, lambda x: gc.softmax(_last(x), -1)),
    "normed": (1, lambda x: x - gc.mean(_last(x), -1, keepdims=True)),
    "transpose": (1, lambda x: gc.transpose(x)),
    "flat": (1, lambda x: gc.reshape(x, (-1,))),
    "half": (1, lambda x: gc.slice(_last(x), [0], [None], [2])),
    "concat": (2, _joined),
    "pad": (1, lambda x: gc.pad(_last(x), [(0, 0)] * (_last(x).rank - 1) + [(1, 2)])),
    "conv": (1, lambda x: _conv(x, padding=1)),
    "strided": (1, lambda x: _conv(x, padding=1, stride=2)),
    "dilated": (1, lambda x: _conv(x, padding=2, dilation=2)),
    "depthwise": (1, lambda x: _conv(x, padding=1, depthwise=True)),
    "weights": (2, _weights),
    "max pool": (1, _pool(gc.max_pool2d)),
    "overlapping": (1, _pool(gc.max_pool2d, stride=1)),
    "avg pool": (1, _pool(gc.avg_pool2d)),
    "matmul": (2, _product),
}


def _fits(a: tuple, b: tuple) -> bool:
    return all(p == q or 1 in (p, q) for p, q in zip(a[::-1], b[::-1], strict=False))


def build(recipe: Recipe, shape: tuple[int, ...]) -> Graph:
    """Outputs `last`, `middle` and the scalar `loss`; inputs x [N,C,H,W], y [W], z [H,1], s []."""
    graph = Graph("random")
    batch, channels, height, width = shape
    inputs = {"x": (batch, channels, height, width), "y": (width,), "z": (height, 1), "s": ()}
    values = [graph.input(name, dims) for name, dims in inputs.items()]
    for number, first, second in recipe:
        arity, function = list(OPERATORS.values())[number % len(OPERATORS)]
        operands = [values[first % len(values)], values[second % len(values)]][:arity]
        if arity == 2 and function not in (_joined, _product, _weights):
            if not _fits(operands[0].shape, operands[1].shape):
                operands[1] = gc.mean(operands[1])
        value = function(*operands)
        values.append(gc.tanh(value) if value.type.size > 2000 else value)
    loss = values[0].graph.constant(0.0)
    for value in [*values[:4], *values[-3:]]:
        loss = loss + gc.mean(gc.tanh(value))
    graph.output(last=values[-1], middle=values[len(values) // 2], loss=loss)
    return graph


STEPS = st.tuples(st.integers(0, len(OPERATORS) - 1), st.integers(0, 30), st.integers(0, 30))
RECIPES = st.lists(STEPS, min_size=1, max_size=8)
SHAPES = st.tuples(
    st.sampled_from((1, 2, 7)),
    st.sampled_from((1, 3, 8)),
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
)


def check(recipe: Recipe, shape: tuple[int, ...], threads: int, seed: int) -> None:
    graph = build(recipe, shape)
    rng = np.random.default_rng(seed)
    feeds = {
        name: rng.standard_normal(node.types[0].shape).astype(np.float32)
        for name, node in graph.inputs.items()
    }
    compile_checks.assert_same(
        graph,
        feeds,
        steps=2,
        tolerance=1e-4,
        outputs=["last", "middle", "loss"],
        loss="loss",
        gradients=list(feeds),
        threads=threads,
    )


@settings(max_examples=6)
@given(recipe=RECIPES, shape=SHAPES, threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_random_networks(recipe, shape, threads, seed):
    check(recipe, shape, threads, seed)


@pytest.mark.slow
@settings(max_examples=300)
@given(recipe=RECIPES, shape=SHAPES, threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_many_random_networks(recipe, shape, threads, seed):
    check(recipe, shape, threads, seed)


def test_all_operators_in_one_network():
    """Every operator of the recipes once, of the same two operands, in one compile call."""
    graph = Graph("all")
    x, y = graph.input("x", (2, 3, 7, 17)), graph.input("y", (17,))
    results = {name: function(*(x, y)[:arity]) for name, (arity, function) in OPERATORS.items()}
    loss = graph.constant(0.0)
    for value in results.values():
        loss = loss + gc.mean(gc.tanh(value))
    outputs = {f"y{i}": value for i, value in enumerate(results.values())}
    graph.output(**outputs, loss=loss)
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in (("x", x), ("y", y))}
    compile_checks.assert_same(
        graph, feeds, tolerance=1e-4, outputs=list(outputs), loss="loss", gradients=["x", "y"]
    )


# ---- graphs that broke something once, and their like


def test_products_of_a_batch_with_itself():
    """Every image reads all images: no thread may run ahead with its own."""
    g = Graph("gram")
    h = gc.nn.linear(g.input("x", ("N", 5)), 7, name="fc")
    outer = gc.matmul(h, gc.transpose(h))
    g.output(outer=outer, inner=gc.matmul(gc.transpose(h), h), loss=gc.sum(outer))
    for n, threads in ((3, 2), (8, 3)):
        compile_checks.assert_same(
            g,
            {"x": np.random.default_rng(n).standard_normal((n, 5)).astype(np.float32)},
            tolerance=1e-4,
            outputs=["outer", "inner", "loss"],
            loss="loss",
            gradients=["x"],
            dims={"N": n},
            threads=threads,
        )


@pytest.mark.parametrize("size", [31, 32])
def test_sum_of_one_value_beside_sums_over_lanes(size):
    """The gradient of a mean of all is the same everywhere, and summed again for a part."""
    g = Graph("same")
    x = g.input("x", (1, 1, size, 1))
    y = x + gc.mean(gc.max_pool2d(gc.slice(x, [None] * 4, [3, 9, 9, 9]), 1, stride=1))
    g.output(y=y, loss=gc.mean(gc.tanh(gc.mean(y, keepdims=True))) + gc.mean(y))
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 1, size, 1)).astype(np.float32)}
    compile_checks.assert_same(g, feeds, outputs=["y", "loss"], loss="loss", gradients=["x"])


def test_neighbouring_images():
    """A shift by one image crosses the blocks of the batch."""
    g = Graph("shift")
    gc.tanh(g.input("x", ("N", 40)))
    bound = g.bind({"N": 8})
    h = bound.value("tanh")
    before = gc.slice(gc.pad(h, [(1, 0), (0, 0)]), [0], [8])
    bound.output(y=gc.relu(h + before), loss=gc.mean(h * before))
    x = np.random.default_rng(0).standard_normal((8, 40)).astype(np.float32)
    compile_checks.assert_same(
        bound, {"x": x}, outputs=["y", "loss"], loss="loss", gradients=["x"], threads=2
    )


@pytest.mark.parametrize(("layout", "batch"), [("batch", 8), ("channels", 2)])
def test_shared_weights(layout, batch):
    """One weight read three times; the last gradient is a choice between two constants."""
    g = Graph("shared")
    x = g.input("x", ("N", 8, 6, 6))
    w = g.parameter("w", (8, 8, 3, 3), np.random.default_rng(0).normal(0, 0.1, (8, 8, 3, 3)))
    h = x
    for _ in range(3):
        h = gc.relu(gc.conv2d(h, w, padding=1) + x)
    g.output(h=h, loss=gc.mean(h))
    arrays = np.random.default_rng(1).standard_normal((batch, 8, 6, 6)).astype(np.float32)
    compile_checks.assert_same(
        g,
        {"x": arrays},
        steps=2,
        tolerance=1e-4,
        outputs=["h", "loss"],
        loss="loss",
        gradients=["x"],
        optimizer=gc.optim.Adam(0.01),
        dims={"N": batch},
        pipeline=gc.default_pipeline(layout),
    )


def test_updates_read_old_values():
    g = Graph("updates")
    x, big = g.input("x", (9,)), g.input("big", (5000,))
    a, b, c = (g.state(name, (9,), np.arange(9.0) + i) for i, name in enumerate("abc"))
    g.state("copy", (5000,))
    g.update("a", b)
    g.update("b", a)
    g.update("c", c + a * x)
    g.update("copy", big)
    g.output(y=a + x, old=c, twice=c * 2.0)
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(g.value(n).shape).astype(np.float32) for n in ("x", "big")}
    compile_checks.assert_same(g, feeds, steps=4, outputs=["y", "old", "twice"])


def test_a_sum_of_all_beside_sums_of_rows():
    """One kernel holds both; the loop over the rows is no pooling window of the sum of all."""
    g = Graph("sums")
    x = g.input("x", (1, 3, 1, 17))
    h = gc.softmax(x, -1)
    g.output(loss=gc.mean(gc.tanh(gc.mul(h, h))) + gc.mean(gc.tanh(x)))
    arrays = np.random.default_rng(0).standard_normal((1, 3, 1, 17)).astype(np.float32)
    compile_checks.assert_same(g, {"x": arrays}, outputs=["loss"], loss="loss", gradients=["x"])


def test_padded_means():
    """The loops that pad and those that sum have one name: they are no loops of one kernel."""
    g = Graph("padded")
    x = g.input("x", (1, 3, 1, 1))
    mean = gc.mean(x, (0, 1, 2, 3), keepdims=True)
    g.output(y=gc.pad(mean, [(0, 0), (0, 0), (1, 1), (1, 1)]), z=gc.tanh(mean))
    arrays = np.random.default_rng(0).standard_normal((1, 3, 1, 1)).astype(np.float32)
    compile_checks.assert_same(g, {"x": arrays}, outputs=["y", "z"])


def test_hundreds_of_operators_and_operands():
    """Expressions are walked recursively: neither is as deep as it is long."""
    g = Graph("long")
    x = g.input("x", (5,))
    h = x
    for _ in range(130):
        h = gc.relu(h) + 0.01
    g.output(h=h)
    arrays = {"x": np.linspace(-1, 1, 5, dtype=np.float32)}
    compile_checks.assert_same(g, arrays, outputs=["h"])
    g = Graph("wide")
    x = g.input("x", (400,))
    g.output(y=gc.concat([x[i : i + 1] for i in reversed(range(400))]))
    (launch,) = plan_launches(gc.default_pipeline().run(g)[0], lanes=8, threads=1)
    assert launch.call.source.count("select") >= 400


def test_integers_and_not_a_number():
    g = Graph("special")
    x, i, j = g.input("x", (4, 19)), g.input("i", (4, 19), "int32"), g.input("j", (9,), "int64")
    outputs = {
        "max": gc.max(x, 1),
        "argmax": gc.argmax(x, 1),
        "argmax0": gc.argmax(x, 0),
        "min": gc.min(x, 0),
        "relu": gc.relu(x),
        "softmax": gc.softmax(x, 1),
        "clip": gc.clip(x, -1.0, 1.0),
        "sum": gc.sum(i, 1),
        "imax": gc.max(i, 0),
        "prod": gc.prod(i, 1),
        "half": gc.cast(i, "float32") / 2.0,
        "where": gc.where(gc.gt(i, 2), i, 0),
        "total": gc.sum(j),
        "least": gc.min(j),
        "most": gc.max(j),
    }
    g.output(**outputs)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 19)).astype(np.float32)
    values[0, 3] = values[0, 7] = np.nan
    values[1, 2], values[2] = np.inf, -np.inf
    feeds = {
        "x": values,
        "i": rng.integers(-3, 5, (4, 19)).astype(np.int32),
        "j": rng.integers(-(2**40), 2**40, 9),
    }
    compile_checks.assert_same(g, feeds, outputs=list(outputs))

"""Passes keep what a graph computes; each rewrite does what it says; pipelines are data."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import SHAPES, arrays, build, one, recipes, split

from graphc import ops
from graphc.compiler import transform
from graphc.interpreter import interpret
from graphc.ir import Graph
from graphc.ops import registry
from graphc.ops.winograd import conv2d_by_patches
from passes.autodiff import Autodiff
from passes.base import Pipeline, verify_graph
from passes.canonicalize import Canonicalize
from passes.choose_convolutions import ChooseConvolutions
from passes.decompose import Decompose
from passes.eliminate_common import EliminateCommon
from passes.eliminate_dead import EliminateDead
from passes.explicit_padding import ExplicitPadding
from passes.fuse import Fuse
from passes.parallelize import Parallelize
from passes.pipeline import BACKWARD, FORWARD
from passes.plan_memory import PlanMemory
from passes.read_padded import ReadPadded
from passes.repeat_affine import RepeatAffine
from passes.repeat_padding import RepeatPadding
from passes.rewrite import rewrite
from passes.schedule import Schedule
from passes.set_mode import SetMode
from passes.sum_by_blocks import SumByBlocks
from passes.winograd_convolutions import WinogradConvolutions

# What `gc.compile` does to any graph for the sake of memory.
MEMORY = Pipeline((Schedule(updates_in_place=True), PlanMemory(updates_in_place=True)))
PASSES = {
    step.name: step
    for step in (
        Canonicalize(drop_stop_gradient=True),
        EliminateCommon(),
        EliminateDead(),
        Decompose(),
        RepeatAffine(),
        SetMode(training=False),
        Schedule(),
        PlanMemory(),
    )
}


def assert_same_results(before: Graph, after: Graph, data, rtol=1e-10) -> None:
    expected = interpret(before, *split(data), dtype="float64")
    actual = interpret(after, *split(data), dtype="float64")
    assert list(actual.outputs) == list(expected.outputs)
    for name, array in expected.outputs.items():
        np.testing.assert_allclose(actual.outputs[name], array, rtol=rtol, atol=1e-12)
        assert after.outputs[name].type == before.outputs[name].type


@pytest.mark.parametrize("name", PASSES)
@settings(max_examples=25, deadline=None)
@given(recipe=recipes(), seed=st.integers(0, 99))
def test_every_pass_keeps_the_results(name, recipe, seed):
    graph = Autodiff("loss", tuple(SHAPES)).run(build(recipe))
    text = str(graph)
    after, _ = Pipeline((PASSES[name],)).run(graph, verify=True)
    assert str(graph) == text, "a pass changed its input"
    assert_same_results(graph, after, arrays(seed))


@settings(max_examples=50, deadline=None)
@given(recipe=recipes(), seed=st.integers(0, 99))
def test_the_pipelines_keep_the_results(recipe, seed):
    graph = build(recipe)
    before = Autodiff("loss", tuple(SHAPES)).run(graph)
    declared, _ = (
        Pipeline((SetMode(True),)) + FORWARD.with_options("eliminate_dead", keep_inputs=True)
    ).run(graph, verify=True)
    if "w" in declared:
        after, _ = Pipeline((Autodiff("loss", tuple(SHAPES)), *BACKWARD, *MEMORY)).run(
            declared, verify=True
        )
        assert_same_results(before, after, arrays(seed), rtol=1e-8)
        assert all(node.inputs == () or registry.get(node.op).decompose is None for node in after)


@settings(max_examples=25, deadline=None)
@given(recipe=recipes())
def test_simplification_is_idempotent_and_deterministic(recipe):
    graph = Autodiff("loss", tuple(SHAPES)).run(build(recipe))
    once, _ = BACKWARD.run(graph, verify=True)
    again, _ = BACKWARD.run(graph, verify=True)
    assert str(once) == str(again)
    assert once.fingerprint() == again.fingerprint()
    twice, _ = BACKWARD.run(once, verify=True)
    assert len(twice) == len(once)


# ---- canonicalize


def compute(graph: Graph) -> list[str]:
    """The operators of a graph without its sources."""
    return [node.op for node in graph if node.inputs]


RULES = {
    "add zero": (lambda x: ops.add(x, 0.0), []),
    "zero plus": (lambda x: ops.add(np.zeros((2, 3)), x), []),
    "subtract zero": (lambda x: ops.sub(x, 0.0), []),
    "from zero": (lambda x: ops.sub(0.0, x), ["neg"]),
    "times one": (lambda x: ops.mul(x, 1.0), []),
    "over one": (lambda x: ops.div(x, 1.0), []),
    "one over": (lambda x: ops.div(1.0, x), ["div"]),
    "times minus one": (lambda x: ops.mul(-1.0, x), ["neg"]),
    "double negation": (lambda x: ops.neg(ops.neg(x)), []),
    "negations": (lambda x: ops.neg(ops.neg(ops.neg(ops.neg(ops.neg(x))))), ["neg"]),
    "add negative": (lambda x: ops.add(ops.exp(x), ops.neg(x)), ["exp", "sub"]),
    "negative plus": (lambda x: ops.add(ops.neg(x), ops.exp(x)), ["exp", "sub"]),
    "subtract negative": (lambda x: ops.sub(ops.exp(x), ops.neg(x)), ["exp", "add"]),
    "negative difference": (lambda x: ops.neg(ops.sub(x, ops.exp(x))), ["exp", "sub"]),
    "divide by 8": (lambda x: ops.div(x, 8.0), ["mul"]),
    "divide by 3": (lambda x: ops.div(x, 3.0), ["div"]),
    "scales": (lambda x: ops.mul(ops.mul(x, 0.25), 3.0), ["mul"]),
    "inexact scales": (lambda x: ops.mul(ops.mul(x, 0.3), 3.0), ["mul", "mul"]),
    "square": (lambda x: ops.pow(x, 2.0), ["square"]),
    "root": (lambda x: ops.pow(x, 0.5), ["sqrt"]),
    "first power": (lambda x: ops.pow(x, 1.0), []),
    "cube": (lambda x: ops.pow(x, 3.0), ["pow"]),
    "relu twice": (lambda x: ops.relu(ops.relu(x)), ["relu"]),
    "even": (lambda x: ops.square(ops.neg(x)), ["square"]),
    "where true": (lambda x: ops.where(x.graph.constant(True), x, ops.exp(x)), []),
    "where false": (lambda x: ops.where(x.graph.constant(False), x, ops.exp(x)), ["exp"]),
    "cast": (lambda x: ops.cast(x, "float32"), []),
    "cast away": (lambda x: ops.cast(x, "float64"), ["cast"]),
    "reshape": (lambda x: ops.reshape(x, (2, 3)), []),
    "reshapes": (lambda x: ops.reshape(ops.reshape(x, (6,)), (3, 2)), ["reshape"]),
    "reshape back": (lambda x: ops.reshape(ops.reshape(x, (6,)), (2, 3)), []),
    "transposes": (lambda x: ops.transpose(ops.transpose(x)), []),
    "turns": (
        lambda x: ops.transpose(ops.transpose(ops.reshape(x, (1, 2, 3)), (1, 2, 0)), (1, 2, 0)),
        ["reshape", "transpose"],
    ),
    "expand": (lambda x: ops.expand(x, (2, 3)), []),
    "reshaped copies": (
        lambda x: ops.mul(ops.reshape(ops.expand(ops.sum(x, (0, 1), True), (3, 2)), (2, 3)), x),
        ["sum", "reshape", "mul"],
    ),
    "expands": (lambda x: ops.expand(ops.expand(x, (4, 2, 3)), (5, 4, 2, 3)), ["expand"]),
    "whole slice": (lambda x: ops.slice(x, [0, 0], [2, 3]), []),
    "part": (lambda x: ops.slice(x, [0, 1], [2, 3]), ["slice"]),
    "no padding": (lambda x: ops.pad(x, ((0, 0), (0, 0))), []),
    "concat of one": (lambda x: ops.concat([x], 0), []),
    "expanded operand": (
        lambda x: ops.mul(ops.expand(ops.sum(x), (2, 3)), x),
        ["sum", "mul"],
    ),
    "expanded operands": (
        lambda x: ops.neg(ops.mul(ops.expand(ops.sum(x), (2, 3)), 3.0)),
        ["sum", "mul", "neg", "expand"],
    ),
    "stop gradient": (lambda x: ops.stop_gradient(x), []),
    "widening zero": (lambda x: ops.add(x, np.zeros((4, 1, 1))), ["add"]),
}


@pytest.mark.parametrize("case", RULES)
def test_rule(case):
    function, expected = RULES[case]
    graph = one(function)
    after, (record,) = Pipeline((Canonicalize(drop_stop_gradient=True),)).run(graph, verify=True)
    assert compute(after) == expected
    assert bool(record.notes) == (compute(graph) != expected)
    data = {"x": np.array([[0.5, 1.5, 2.0], [3.0, 0.25, 7.0]])}
    np.testing.assert_array_equal(
        interpret(after, data).outputs["y"], interpret(graph, data).outputs["y"]
    )


def test_rules_that_undo_each_other_end():
    """The number of sweeps and the depth of nested rewrites are bounded."""

    def to_sub(m):
        return m.emit("sub", *m.inputs)

    def to_add(m):
        return m.emit("add", *m.inputs)

    graph = one(lambda x: ops.add(x, x))
    after, fired = rewrite(graph, {"add": (to_sub,), "sub": (to_add,)}, sweeps=3)
    verify_graph(after)
    assert compute(after) in (["add"], ["sub"]) and fired["to_sub"] < 100


def convolution_block(bias=True):
    graph = Graph("block")
    x = graph.input("x", (2, 3, 9, 8))
    w = graph.parameter("w", (4, 3, 3, 3))
    b = graph.parameter("b", (4,)) if bias else None
    h = ops.max_pool2d(
        ops.relu(ops.conv2d(x, w, b, padding=1, name="conv")), 3, 2, padding=1, name="pool"
    )
    graph.output(loss=ops.sum(ops.mul(h, ops.sin(h))))
    return graph


def test_relu_and_bias_move_behind_the_pool_and_gradients_stay():
    graph = convolution_block()
    after, _ = Pipeline((Canonicalize(),)).run(graph, verify=True)
    order = compute(after)
    assert (
        order.index("conv2d") < order.index("max_pool2d") < order.index("add") < order.index("relu")
    )
    kept, _ = Pipeline((Canonicalize(move_pools=False),)).run(graph, verify=True)
    assert compute(kept) == compute(graph)
    rng = np.random.default_rng(0)
    # Few distinct values: windows are full of ties, at zero and elsewhere.
    data = {"x": rng.integers(-1, 2, (2, 3, 9, 8))}
    state = {"w": rng.integers(-1, 2, (4, 3, 3, 3)), "b": rng.integers(-2, 2, 4)}
    names = ("x", "w", "b")
    results = [
        interpret(Autodiff("loss", names).run(g), data, state, dtype="float64").outputs
        for g in (graph, after)
    ]
    for name, array in results[0].items():
        np.testing.assert_allclose(results[1][name], array, rtol=1e-12, atol=1e-12)


def test_pool_rules_leave_shared_values_alone():
    graph = Graph("shared")
    x = graph.input("x", (1, 1, 4, 4))
    r = ops.relu(x)
    graph.output(y=ops.max_pool2d(r, 2), r=r)
    assert compute(Canonicalize().run(graph)) == ["relu", "max_pool2d"]
    graph = Graph("padding")
    x = graph.input("x", (1, 1, 2, 9))
    graph.output(y=ops.max_pool2d(ops.relu(x), 2, 1, padding=1, dilation=3))
    assert compute(Canonicalize().run(graph)) == ["relu", "max_pool2d"]


def test_pool_rule_leaves_a_bias_that_varies_over_the_image():
    graph = Graph("image bias")
    x, b = graph.input("x", (1, 1, 4, 4)), graph.input("b", (1, 4))
    graph.output(y=ops.max_pool2d(ops.add(x, b), 2))
    assert compute(Canonicalize().run(graph)) == ["add", "max_pool2d"]


# ---- constants, common and dead nodes


def test_constants_fold_but_never_grow():
    graph = Graph("fold")
    x = graph.input("x", (64, 64))
    small = ops.exp(ops.mul(graph.constant([1.0, 2.0]), 3.0))
    row = graph.constant(np.arange(64.0).reshape(1, 64))
    large = ops.matmul(ops.transpose(row), row)
    graph.output(small=small, large=ops.mul(x, large))
    after, _ = Pipeline((Canonicalize(), EliminateDead())).run(graph, verify=True)
    assert compute(after) == ["matmul", "mul"]
    np.testing.assert_allclose(
        after.outputs["small"].node.attrs["value"], np.exp([3.0, 6.0]), rtol=1e-6
    )


def test_common_nodes_merge_and_different_ones_do_not():
    graph = Graph("common")
    x, y = graph.input("x", (3,)), graph.input("y", (3,))
    a = ops.add(ops.mul(x, y), 1.0)
    b = ops.add(ops.mul(y, x), graph.constant(1.0))
    graph.output(z=ops.sub(a, b), minus=ops.div(ops.mul(x, 0.0), -0.0), plus=ops.div(x, 0.0))
    after, _ = Pipeline((EliminateCommon(), EliminateDead())).run(graph, verify=True)
    assert compute(after) == ["mul", "add", "sub", "mul", "div", "div"]
    assert sum(node.op == "constant" for node in after) == 3  # 1.0, 0.0 and -0.0


def test_random_streams_are_not_merged():
    graph = Graph("random")
    step = graph.input("step", (), dtype="int32")
    draws = [ops.random_uniform(step, shape=(4,), seed=1, stream=s) for s in (0, 1, 1)]
    graph.output(y=ops.concat(draws, 0))
    assert compute(EliminateCommon().run(graph)).count("random_uniform") == 2


def test_dead_nodes_go_and_updated_parameters_stay():
    graph = Graph("dead")
    x, unused = graph.input("x", (3,)), graph.input("unused", (3,))
    graph.parameter("p", (3,))
    ops.exp(unused)
    graph.update("p", ops.tanh(x))
    after, _ = Pipeline((EliminateDead(),)).run(graph, verify=True)
    assert [n.name for n in after] == ["x", "p", "tanh"]
    kept = EliminateDead(keep_inputs=True).run(graph)
    assert list(kept.inputs) == ["x", "unused"]


# ---- mode and decomposition


def network_with_modes():
    graph = Graph("modes")
    x = graph.input("x", (4, 3, 2, 2))
    weight, bias = graph.parameter("weight", (3,)), graph.parameter("bias", (3,))
    mean, var = graph.state("mean", (3,)), graph.state("var", (3,))
    y, new_mean, new_var = ops.batch_norm(x, weight, bias, mean, var)
    graph.update("mean", new_mean)
    graph.update("var", new_var)
    graph.output(y=ops.dropout(y, 0.5))
    return graph


STATE = {
    "weight": np.ones(3),
    "bias": np.zeros(3),
    "mean": np.array([0.5, -1.0, 2.0]),
    "var": np.array([1.0, 4.0, 0.25]),
    "dropout.step": np.array(0),
}


def test_inference_mode_drops_dropout_and_updates():
    graph = network_with_modes()
    after, _ = Pipeline((SetMode(training=False), EliminateDead())).run(graph, verify=True)
    assert after.updates == {}
    assert "dropout" not in compute(after)
    assert "dropout.step" not in after
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 2))
    y = interpret(after, {"x": x}, STATE, dtype="float64").outputs["y"]
    expected = (x - STATE["mean"][:, None, None]) / np.sqrt(STATE["var"] + 1e-5)[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-7)


def test_training_mode_sets_seed_and_keeps_updates():
    after = SetMode(training=True, seed=7).run(network_with_modes())
    assert set(after.updates) == {"mean", "var", "dropout.step"}
    (node,) = (n for n in after if n.op == "dropout")
    assert node.attrs["training"] is True and node.attrs["seed"] == 7
    decomposed, _ = Pipeline((Decompose(),)).run(after, verify=True)
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 2))
    a, b = (interpret(g, {"x": x}, STATE, dtype="float64") for g in (after, decomposed))
    for name in ("mean", "var", "dropout.step"):
        np.testing.assert_allclose(a.updates[name], b.updates[name], rtol=1e-7)
    np.testing.assert_allclose(a.outputs["y"], b.outputs["y"], rtol=1e-6, atol=1e-9)


def normalised(x_mean=0.0):
    """A training step's batch norm with relu after a product, differentiated and decomposed."""
    graph = Graph("normalised")
    x, w = graph.input("x", (4, 3, 2, 2)), graph.input("w", (3, 3, 1, 1))
    stored = ops.conv2d(x, w)
    state = [graph.state(n, (3,)) for n in ("mean", "var")]
    weight, bias = graph.parameter("weight", (3,)), graph.parameter("bias", (3,))
    y = ops.relu(ops.batch_norm(stored, weight, bias, *state)[0])
    graph.output(loss=ops.sum(y * y * y))
    data = np.random.default_rng(1).standard_normal((4, 3, 2, 2)) + x_mean
    graph = SetMode(training=True).run(graph)
    after = Autodiff("loss", ("w", "weight")).run(graph)
    inputs = {"x": data, "w": np.eye(3)[..., None, None]}
    return BACKWARD.run(after)[0], inputs


def test_readers_compute_normalised_images():
    graph, data = normalised()
    before, after = Fuse().run(graph), Pipeline((RepeatAffine(), Fuse())).run(graph)[0]
    images = [
        [v for n in g if n.op == "fused" for v in n.outputs if v.shape == (4, 3, 2, 2)]
        for g in (before, after)
    ]
    # Left: the product, relu's cotangent and the product's.
    assert len(images[1]) < len(images[0])
    a, b = (interpret(g, data, STATE, dtype="float64").outputs for g in (before, after))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-10)


@pytest.mark.parametrize("least", [0, 10**6])
def test_the_backward_pass_pads_its_own_images(least):
    """No padded image of the forward pass outlives it, but small ones."""
    graph = Graph("residual")
    x, w = graph.input("x", (2, 3, 5, 7)), graph.parameter("w", (3, 3, 3, 3))
    y = ops.relu(ops.add(ops.conv2d(x, w, padding=1), x), name="y")
    graph.output(loss=ops.sum(ops.add(ops.square(ops.conv2d(y, w, padding=1)), y)))
    graph, _ = transform(graph, ["loss"], {}, "loss", ["x", "w"])
    after, _ = Pipeline((ExplicitPadding(), RepeatPadding(least))).run(graph, verify=True)
    rng = np.random.default_rng(2)
    data, state = (
        {"x": rng.standard_normal((2, 3, 5, 7))},
        {"w": rng.standard_normal((3, 3, 3, 3))},
    )
    a, b = (interpret(g, data, state, dtype="float64").outputs for g in (graph, after))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-10)

    def kept(g: Graph) -> set[str]:
        """Paddings of the forward pass that the backward pass reads."""
        late = [v.node for n in g if n.origin.phase == "backward" for v in n.inputs]
        return {n.name for n in late if n.op == "pad" and n.origin.phase == ""}

    padded, _ = Pipeline((ExplicitPadding(),)).run(graph)
    assert len(kept(padded)) == 2 and len(kept(after)) == (0 if least == 0 else 2)


def test_batch_statistics_far_from_zero():
    graph, data = normalised(x_mean=1e4)
    got = interpret(graph, data, STATE, dtype="float32").outputs
    expected = interpret(graph, data, STATE, dtype="float64").outputs
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-2)


# ---- convolutions, and the order of kernels


@pytest.mark.parametrize("mode", ["batch", "channels"])
@pytest.mark.parametrize(("size", "padding"), [(8, 1), (11, 1), (8, (4, 1))])
def test_convolutions_and_gradients_become_patches(mode, size, padding):
    """Padding may be more than windows reach over the edge."""
    graph = Graph("convolution")
    x, w = graph.input("x", (8, 32, size, size)), graph.input("w", (32, 32, 3, 3))
    graph.output(loss=ops.sum(ops.square(ops.conv2d(x, w, padding=padding))))
    graph = Autodiff("loss", ("x", "w")).run(graph)
    graph.annotations["layout_mode"] = mode
    after, _ = Pipeline((WinogradConvolutions(lanes=8, training=True),)).run(graph, verify=True)
    done = [n.op for n in after]
    assert not {"conv2d", "conv2d_input_grad", "conv2d_weight_grad"} & set(done)
    assert done.count("patch_weight_grad") == 1
    assert done.count("patch_product" if mode == "batch" else "matmul") == 2
    rng = np.random.default_rng(5)
    data = {name: rng.standard_normal(node.types[0].sizes) for name, node in graph.inputs.items()}
    a, b = (interpret(g, data, dtype="float64").outputs for g in (graph, after))
    for name in a:
        # The transforms' matrices are float32.
        np.testing.assert_allclose(b[name], a[name], atol=5e-6 * np.abs(a[name]).max())


@pytest.mark.parametrize("size", [16, 17, 30])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (7, 2, 3), (7, 3, (2, 0))])
def test_strided_convolutions_become_patches_of_their_phases(size, kernel, stride, padding):
    graph = Graph("strided")
    x, w = graph.input("x", (2, 16, size, size)), graph.input("w", (32, 16, kernel, kernel))
    graph.output(y=ops.conv2d(x, w, stride=stride, padding=padding))
    graph.annotations["layout_mode"] = "channels"
    fewest = lambda node, costs, mode: min(costs.keys() - {"direct"}, key=costs.get)  # noqa: E731
    step = WinogradConvolutions(lanes=8, choose=fewest)
    after, _ = Pipeline((step,)).run(graph, verify=True)
    assert "conv2d" not in [n.op for n in after]
    rng = np.random.default_rng(7)
    data = {name: rng.standard_normal(node.types[0].sizes) for name, node in graph.inputs.items()}
    a, b = (interpret(g, data, dtype="float64").outputs["y"] for g in (graph, after))
    np.testing.assert_allclose(b, a, atol=5e-6 * np.abs(a).max())


@pytest.mark.parametrize(
    ("outputs", "taps", "limit"),
    [(2, 3, 1e-6), (4, 3, 6e-6), (5, 3, 1e-5), (4, 2, 5e-6), (5, 2, 1e-5), (4, 4, 1e-5)],
)
def test_patches_round_a_few_millionths(outputs, taps, limit):
    """Of the largest output, in float32 against the direct convolution in float64."""
    graph = Graph("rounding")
    size = 4 * outputs + taps - 1
    x, w = graph.input("x", (1, 64, size, size)), graph.input("w", (8, 64, taps, taps))
    graph.output(direct=ops.conv2d(x, w), patches=conv2d_by_patches(x, w, outputs))
    rng = np.random.default_rng(9)
    data = {name: rng.standard_normal(node.types[0].sizes) for name, node in graph.inputs.items()}
    data["x"] = np.maximum(data["x"], 0)
    exact = interpret(graph, data, dtype="float64").outputs["direct"]
    rounded = interpret(graph, data, dtype="float32").outputs["patches"]
    assert np.abs(rounded - exact).max() < limit * np.abs(exact).max()


@pytest.mark.parametrize("rows", [False, True])
def test_weight_gradients_sum_by_blocks_and_padded_values_are_stored_once(rows):
    graph = Graph("convolutions")
    x, w = graph.input("x", (16, 8, 12, 12)), graph.input("w", (8, 8, 3, 3))
    y = ops.relu(ops.conv2d(x, w, padding=1, name="first"))
    y = ops.relu(ops.add(ops.conv2d(y, w, padding=1, name="second"), y))
    graph.output(loss=ops.sum(ops.square(y)))
    if rows:
        graph.annotations["batch"] = 16
        choose = ChooseConvolutions(lanes=8, mode="batch", choose=lambda *_: "F(4,3) rows")
        graph = choose.run(graph)
        assert sum(n.op == "toom_conv" for n in graph) == 2
    graph = BACKWARD.run(Autodiff("loss", ("x", "w")).run(graph))[0]
    graph.annotations |= {"layout_mode": "batch", "batch": 16}
    steps = (ExplicitPadding(), SumByBlocks(lanes=8, cached_bytes=0), ReadPadded())
    after, _ = Pipeline(steps).run(graph, verify=True)
    parts = [n for n in after if n.op == "batch_parts"]
    assert len(parts) == 2 and all(n.types[0].shape[0] == 2 for n in parts)
    if rows:  # images are transformed for the forward pass, and again for the weight gradient
        assert sum(n.op == "tile_transform" for n in after) > sum(
            n.op == "tile_transform" for n in graph
        )
    between = next(n for n in after if n.op == "relu")
    assert [user.op for user, _ in after.users(between[0])] == ["pad"]
    rng = np.random.default_rng(6)
    data = {name: rng.standard_normal(node.types[0].sizes) for name, node in graph.inputs.items()}
    a, b = (interpret(g, data, dtype="float64").outputs for g in (graph, after))
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-9, atol=1e-9 * np.abs(a[name]).max())


def region(graph: Graph, name: str, *operands):
    """A fused region that adds its operands."""
    body = Graph(name)
    values = [body.input(f"operand{i}", v.shape) for i, v in enumerate(operands)]
    body.output(result0=functools.reduce(ops.add, values) if len(values) > 1 else values[0] * 2.0)
    attrs = {"body": body, "kind": "add", "outer": operands[0].shape}
    return graph.add("fused", operands, attrs, name=name)[0]


def test_groups_go_on_and_recomputed_values_wait():
    graph = Graph("order")
    image, weight = graph.input("image", (16, 4)), graph.input("weight", (16, 4))
    first = region(graph, "first", image)
    transformed = region(graph, "transformed", weight)
    second = region(graph, "second", first, transformed)
    with graph.origin(replace(second.node.origin, phase="backward")):
        loss = region(graph, "loss", second)
        cotangent = region(graph, "cotangent", region(graph, "delta", loss))
        again = region(graph, "wide", region(graph, "again", first))
        graph.output(gradient=region(graph, "gradient", cotangent, again))
    group = ("first", "second", "loss", "delta", "cotangent", "again", "wide")
    blocks = dict.fromkeys(group, 2)
    after, _ = Pipeline((Parallelize(lambda n: blocks.get(n.name), 0),)).run(graph, verify=True)
    order = [n.name for n in after if n.op == "fused"]
    assert order == ["transformed", *group, "gradient"]
    assert [names for _, names in after.annotations["groups"]] == [group]


@pytest.mark.parametrize("classes", [10, 1000])
def test_cross_entropy_and_its_gradient_are_one_region(classes):
    graph = Graph("classifier")
    x, label = graph.input("x", (128, classes)), graph.input("label", (128,), dtype="int32")
    graph.output(loss=ops.softmax_cross_entropy(x, label))
    joint, _ = transform(graph, ["loss"], {}, "loss", ["x"])
    regions = [n for n in Fuse().run(joint) if n.op == "fused"]
    loss, mean = sorted(regions, key=lambda n: -len(n.outputs))
    assert [t.shape for t in loss.types] == [(128, 1), (128, classes)]
    assert "exp" not in compute(mean.attrs["body"])


def test_explicit_modes_stay():
    graph = Graph("frozen")
    x = graph.input("x", (4, 3))
    with_mode = registry.apply(
        "batch_norm",
        x,
        graph.parameter("w", (3,)),
        graph.parameter("b", (3,)),
        graph.state("mean", (3,)),
        graph.state("var", (3,)),
        training=False,
        momentum=0.1,
        eps=1e-5,
    )
    graph.output(y=with_mode[0])
    graph.update("mean", with_mode[1])
    after = SetMode(training=True).run(graph)
    assert after.node("batch_norm").attrs["training"] is False
    assert after.updates == {}


def test_decompose_leaves_only_operators_that_lower():
    graph = Graph("parts")
    x = graph.input("x", (4, 5))
    label = graph.input("label", (4,), dtype="int32")
    graph.output(loss=ops.softmax_cross_entropy(ops.log_softmax(ops.mean(x, 0, True) + x), label))
    after, _ = Pipeline((Decompose(),)).run(graph, verify=True)
    assert all(registry.get(op).lower is not None for op in compute(after))

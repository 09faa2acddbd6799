"""Values computed again: equal results in less memory, at the price that is reported."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import arrays, recipes, split
from test_memory import allow_in_place, run_in_arena, training_graph

import graphc as gc
from graphc import compiler, errors, ops, zoo
from graphc.interpreter import interpret
from graphc.ir import Graph, Node
from graphc.runtime.executable import Executable
from passes.autodiff import differentiate
from passes.base import Pipeline
from passes.pipeline import BACKWARD
from passes.plan_memory import plan_memory
from passes.rematerialize import Rematerialize
from passes.schedule import Schedule


def elements(node: Node) -> float:
    """Seconds of a node in tests: a nanosecond for each element of its results."""
    return 1e-9 * sum(t.size for t in node.types)


def limited(graph: Graph, limit: int, in_place: bool = False, seconds=elements) -> Graph:
    repeat = Rematerialize(limit, seconds, updates_in_place=in_place)
    return Pipeline((repeat,)).run(graph, verify=True)[0]


def least(graph: Graph, in_place: bool = False) -> int:
    """The bytes that the pass names when it refuses."""
    with pytest.raises(errors.CompileError) as caught:
        limited(graph, 1, in_place)
    found = re.search(r"needs (\d+) bytes of activations at least", str(caught.value))
    assert found
    return int(found[1])


@settings(max_examples=30, deadline=None)
@given(recipes(), st.integers(0, 99), st.floats(0, 1), st.booleans())
def test_random_graphs_compute_the_same_in_any_memory_that_is_granted(
    recipe, seed, share, in_place
):
    graph = training_graph(recipe)
    inputs, state = split(arrays(seed))
    expected = interpret(graph, inputs, state)
    if in_place:
        graph = allow_in_place(graph)
    graph, _ = Pipeline((Schedule(updates_in_place=in_place),)).run(graph)
    smallest = least(graph, in_place)
    arena = plan_memory(graph, updates_in_place=in_place).arena_bytes
    limit = smallest + int(share * (arena - smallest))
    after = limited(graph, limit, in_place)
    assert plan_memory(after, updates_in_place=in_place).arena_bytes <= limit
    outputs, updates = run_in_arena(after, inputs, state, updates_in_place=in_place)
    for name, array in expected.outputs.items():
        np.testing.assert_array_equal(outputs[name], array)
    np.testing.assert_array_equal(updates["w"], expected.updates["w"])


def chain(layers: int) -> Graph:
    """The gradient of `layers` activations one after the other."""
    graph = Graph("chain")
    x = graph.input("x", (1000,))
    h = x
    for _ in range(layers):
        h = ops.tanh(h)
    (gradient,) = differentiate(graph, ops.sum(h), [x])
    graph.output(gradient=gradient)
    return BACKWARD.run(graph)[0]


def test_a_chain_needs_far_less_than_its_length():
    """Chen et al. 2016: with segments that are computed again, about twice the root of it."""
    graph = chain(36)
    value = 4032  # bytes of one activation, aligned
    assert plan_memory(graph).arena_bytes >= 36 * value
    after = limited(graph, 15 * value)
    assert plan_memory(after).arena_bytes <= 15 * value
    done = after.annotations["recomputed"]
    assert len(done.nodes) <= 36 and done.peak_before > 36 * value  # at most one more forward pass
    assert done.seconds == pytest.approx(sum(elements(graph.node(n)) for n in done.nodes))
    assert least(graph) <= 10 * value
    x = np.linspace(-2, 2, 1000, dtype=np.float32)
    (got,), (expected,) = (interpret(g, {"x": x}).outputs.values() for g in (after, graph))
    np.testing.assert_array_equal(got, expected)


def test_the_cheapest_value_is_computed_again():
    graph = Graph("two branches")
    x = graph.input("x", (64, 64))
    cheap, dear = ops.exp(x, name="cheap"), ops.matmul(x, x, name="dear")
    total = ops.sum(ops.add(ops.add(ops.sum(cheap), ops.sum(dear)), ops.sum(ops.matmul(x, x))))
    wide = ops.sum(ops.stack([ops.sin(ops.add(x, total)) for _ in range(2)]))
    graph.output(y=ops.add(ops.sum(ops.mul(cheap, wide)), ops.sum(ops.mul(dear, wide))))
    before = plan_memory(graph).arena_bytes
    after = limited(graph, before - 1, seconds=lambda n: 1.0 if n.op == "matmul" else 1e-3)
    assert after.annotations["recomputed"].nodes == ("cheap",)
    assert [n.op for n in after].count("exp") == 2


def test_a_graph_that_fits_is_left_alone():
    graph = chain(5)
    after = limited(graph, plan_memory(graph).arena_bytes)
    assert str(after) == str(graph) and "recomputed" not in after.annotations


def test_a_parameter_is_not_read_after_its_update():
    """What reads the old value cannot be computed again once the new one is in its place."""
    graph = Graph("updated early")
    x, w = graph.input("x", (256,)), graph.parameter("w", (256,))
    kept = ops.mul(x, w, name="kept")
    graph.update("w", ops.add(ops.mul(w, 0.5), ops.sum(kept), name="step"))
    wide = ops.sum(ops.stack([ops.exp(x), ops.sin(x), ops.tanh(x)]))
    graph.output(y=ops.mul(kept, wide))
    graph = allow_in_place(graph)
    graph.node("kept").attrs.pop("inplace")
    assert plan_memory(graph, updates_in_place=True).in_place_updates == ("w",)
    smallest = least(graph, in_place=True)
    assert smallest == plan_memory(graph, updates_in_place=True).arena_bytes
    after = limited(graph, smallest, in_place=True)
    assert [n.op for n in after].count("mul") == [n.op for n in graph].count("mul")


# ---- compiled

NETWORKS: dict[str, tuple[Callable[[], Graph], int]] = {
    "lenet": (zoo.lenet5, 7),
    "mlp": (lambda: zoo.mlp([40] * 6, (20,), 5), 32),
    "resnet": (lambda: networks.small_resnet(size=8), 2),
}


def compiled(
    graph: Graph, batch: int, limit: int | str | None = None, pipeline: Pipeline | None = None
) -> Executable:
    return gc.compile(
        graph,
        outputs=["loss"],
        dims={"N": batch},
        loss="loss",
        optimizer=gc.optim.SGD(0.05, momentum=0.9),
        memory_limit=limit,
        threads=2,
        pipeline=pipeline,
    )


def refused(graph: Graph, batch: int) -> int:
    """The least bytes, which the refusal of one byte names."""
    with pytest.raises(errors.CompileError) as caught:
        compiled(graph, batch, 1)
    found = re.search(r"needs (\d+) bytes of activations at least \([\d.]+ MB\)", str(caught.value))
    assert found, str(caught.value)
    return int(found[1])


@functools.cache
def trained(name: str) -> tuple[Executable, Executable, int]:
    """A training step as it is, in the least memory, and the bytes of that."""
    build, batch = NETWORKS[name]
    graph = build()
    smallest = refused(graph, batch)
    return compiled(graph, batch), compiled(graph, batch, smallest), smallest


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "resnet" else ()) for n in NETWORKS]
)
def test_networks_train_the_same_in_the_least_memory(name):
    """Bit for bit: what is computed again is the same kernel on the same operands."""
    plain, small, smallest = trained(name)
    plan = small.memory()
    assert plan.arena_bytes <= smallest < plain.memory().arena_bytes
    plan.plan.check()
    build, batch = NETWORKS[name]
    feeds = networks.feeds(build(), batch)
    for _ in range(3):
        small.poison()
        a, b = plain.run(feeds)["loss"], small.run(feeds)["loss"]
        assert np.isfinite(b)
        np.testing.assert_array_equal(a, b)
    for key, array in plain.state(True).items():
        np.testing.assert_array_equal(small.state(True)[key], array, err_msg=key)
    with pytest.raises(errors.CompileError, match="memory_limit"):
        compiled(build(), batch, smallest - 1)


def test_repetitions_keep_their_layer_and_take_the_phase_of_their_reader():
    _, small, _ = trained("resnet")
    firsts = {name: small.graph.node(name).origin for name in small.memory().recomputed.nodes}
    again = [n.origin for n in small.graph if n.op == "fused" and n.name not in firsts]
    for name, origin in firsts.items():
        assert origin.phase == "", name
        assert replace(origin, phase="backward") in again, name


def test_what_is_computed_again_is_reported():
    plain, small, _ = trained("lenet")
    done = small.memory().recomputed
    assert done.nodes and done.seconds > 0 and 0 < done.share < 1
    line = f"{len(done.nodes)} regions, predicted to take"
    assert line in str(small.memory()) and line in small.explain()
    assert plain.memory().recomputed is None and "recomputed" not in str(plain.memory())


def test_the_refusal_says_where_memory_goes():
    with pytest.raises(errors.CompileError) as caught:
        compiled(zoo.lenet5(), 7, "10kB")
    text = str(caught.value)
    assert text.startswith("memory_limit of 10000 bytes: graph 'lenet5' needs ")
    assert "most is live at " in text and "f32[7,6," in text
    assert text.endswith("use a smaller batch or raise the limit")


# All of LeNet is one group, in which nothing waits.
@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
def test_groups_stay_together_around_what_is_computed_again(name, monkeypatch):
    """As in large training graphs without a limit, here with as much time as a step to spare."""

    def spare(seconds):
        return Rematerialize(None, seconds, 1.0, updates_in_place=True)

    plain = trained(name)[0]
    monkeypatch.setattr(compiler, "_spare_memory", spare)
    build, batch = NETWORKS[name]
    small = compiled(build(), batch, pipeline=gc.default_pipeline())  # one that is not kept on disk
    assert small.memory().recomputed.nodes and small.memory().recomputed.share <= 1
    assert small.memory().lower_bound < plain.memory().lower_bound
    groups = [g.graph.annotations["groups"] for g in (plain, small)]
    assert groups[0] == groups[1]
    fresh, feeds = compiled(build(), batch), networks.feeds(build(), batch)
    plain.load_state(fresh.state(True), strict=False)
    small.memory().plan.check()
    for _ in range(3):
        small.poison()
        np.testing.assert_array_equal(plain.run(feeds)["loss"], small.run(feeds)["loss"])


def test_a_checked_executable_has_no_limit():
    with pytest.raises(errors.CompileError, match="check=True keeps every value"):
        gc.compile(zoo.lenet5(), outputs=["logits"], dims={"N": 1}, check=True, memory_limit="1MB")


@pytest.mark.slow
def test_kernels_run_block_by_block_under_a_limit():
    """Where groups need no other order and no more memory."""
    graph, batch = zoo.resnet20(), 16
    plain = compiled(graph, batch)
    limit = int(0.7 * plain.memory().arena_bytes)
    small = compiled(graph, batch, limit)
    assert small.graph.annotations["groups"] and small.memory().recomputed.nodes
    assert small.memory().arena_bytes <= limit
    feeds = networks.feeds(graph, batch)
    for _ in range(3):
        small.poison()
        np.testing.assert_allclose(small.run(feeds)["loss"], plain.run(feeds)["loss"], rtol=1e-4)

"""Schedules and memory plans: graphs run inside the planned arena; intervals never overlap."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import SHAPES, arrays, build, recipes, split

from graphc import compiler, ops, optim, zoo
from graphc.codegen import target
from graphc.interpreter import interpret
from graphc.ir import SOURCES, Graph, Layout, Value, root
from graphc.ops import registry
from passes.autodiff import Autodiff, differentiate
from passes.base import Pipeline, verify_graph
from passes.fuse import Fuse
from passes.gather_updates import GatherUpdates
from passes.liveness import Storage, peak_bytes, storage_bytes, storages
from passes.pipeline import BACKWARD, FORWARD
from passes.plan_memory import MemoryPlan, PlanMemory, place, plan_memory
from passes.schedule import Schedule
from passes.set_mode import SetMode


def allow_in_place(graph: Graph) -> Graph:
    """Let every elementwise node overwrite any operand, as fused kernels may."""
    graph = graph.copy()
    for node in graph:
        if node.inputs and registry.get(node.op).elementwise:
            node.attrs["inplace"] = tuple((0, slot) for slot in range(len(node.inputs)))
    return graph


def run_in_arena(graph: Graph, inputs, state, updates_in_place=False):
    """Outputs and updates of a graph whose values live only in the planned arena.

    Returns them as they are at the end of the step: what was overwritten too early shows.
    """
    plan = plan_memory(graph, updates_in_place=updates_in_place)
    plan.check()
    arena = np.full(plan.arena_bytes, 0xAA, np.uint8)
    sources = {}
    for node in graph:
        if node.op in SOURCES:
            given = (
                {**inputs, **state, node.name: node.attrs.get("value", 0)}
                if node.op == "constant"
                else {**inputs, **state}
            )
            sources[node[0]] = np.array(given[node.name], node.types[0].dtype)
    in_place = {graph.updates[name]: graph.node(name)[0] for name in plan.in_place_updates}

    def memory(value: Value) -> np.ndarray:
        base = root(value)
        if base in in_place:
            return sources[in_place[base]].reshape(value.shape)
        if base in sources:
            return sources[base].reshape(value.shape)
        start = plan.offset(value)
        assert start is not None
        return arena[start : start + value.type.nbytes].view(value.dtype).reshape(value.shape)

    for node in graph:
        if node.op in SOURCES or root(node[0]) != node[0]:
            continue
        attrs = {k: v for k, v in node.attrs.items() if k != "inplace"}
        results = registry.get(node.op).evaluate([memory(v) for v in node.inputs], attrs)
        for value, result in zip(node.outputs, [np.array(r) for r in results], strict=True):
            memory(value)[...] = result
    return (
        {k: memory(v).copy() for k, v in graph.outputs.items()},
        {k: memory(v).copy() for k, v in graph.updates.items()},
    )


def training_graph(recipe) -> Graph:
    """Forward, backward and a step of gradient descent on the parameter w."""
    graph = build(recipe)
    w = graph.value("w")
    (gradient,) = differentiate(graph, graph.value("loss"), [w])
    graph.update("w", ops.sub(w, ops.mul(gradient, 0.5)))
    return BACKWARD.run(graph)[0]


@settings(max_examples=60, deadline=None)
@given(recipes(), st.integers(0, 99), st.booleans(), st.booleans())
def test_a_graph_runs_in_its_planned_arena(recipe, seed, reorder, in_place):
    graph = training_graph(recipe)
    inputs, state = split(arrays(seed))
    expected = interpret(graph, inputs, state, dtype="float64")
    if in_place:
        graph = allow_in_place(graph)
    if reorder:
        graph, _ = Pipeline((Schedule(updates_in_place=in_place),)).run(graph, verify=True)
    outputs, updates = run_in_arena(graph, inputs, state, updates_in_place=in_place)
    for name, array in expected.outputs.items():
        np.testing.assert_allclose(outputs[name], array, rtol=1e-12)
    np.testing.assert_allclose(updates["w"], expected.updates["w"], rtol=1e-12)


intervals = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(intervals)
def test_storages_that_live_together_never_overlap(items):
    pieces = [Storage(str(i), 64 * s, a, a + n) for i, (a, n, s) in enumerate(items)]
    offsets = place(pieces)
    for i, p in enumerate(pieces):
        for j, q in enumerate(pieces[:i]):
            together = p.first <= q.last and q.first <= p.last
            apart = offsets[i] + p.size <= offsets[j] or offsets[j] + q.size <= offsets[i]
            assert apart or not together or not p.size or not q.size
    arena = max(o + p.size for o, p in zip(offsets, pieces, strict=True))
    bound = peak_bytes(pieces)
    assert bound <= arena <= sum(p.size for p in pieces)
    assert bound == max(sum(p.size for p in pieces if p.first <= t <= p.last) for t in range(34))
    assert place(pieces) == offsets


def test_thousands_of_values_are_planned_quickly():
    rng = np.random.default_rng(0)
    pieces = []
    for i in range(4000):  # like a deep network's step: half of the values wait for the backward
        last = min(4000, i + int(rng.integers(1, 5))) if i % 2 else 4000 - i // 2
        pieces.append(Storage(str(i), 64 * int(rng.integers(1, 4096)), i, max(i, last)))
    start = time.process_time()  # others may keep the machine busy
    offsets = place(pieces)
    seconds = time.process_time() - start
    arena = max(o + p.size for o, p in zip(offsets, pieces, strict=True))
    assert arena <= 1.05 * peak_bytes(pieces)
    assert seconds < 5, f"{seconds:.1f} s for 4,000 storages"  # about one


def diamond() -> Graph:
    """Two large branches, declared side by side, each reduced to a scalar."""
    graph = Graph("diamond")
    x = graph.input("x", (1000,))
    wide = [ops.exp(ops.mul(x, float(i + 2))) for i in range(6)]
    narrow = [ops.sum(v) for v in wide]
    graph.output(y=ops.sum(ops.stack(narrow, 0)))
    return graph


def test_schedule_lowers_the_peak_and_reports_both():
    graph = diamond()
    after, (record,) = Pipeline((Schedule(),)).run(graph, verify=True)
    before_peak, after_peak = after.annotations["peak_bytes"]
    assert after_peak < before_peak / 2
    assert record.notes == (f"peak of live bytes {before_peak} -> {after_peak}",)
    assert sorted(n.op for n in after) == sorted(n.op for n in graph)
    x = np.linspace(-1, 1, 1000)
    assert interpret(after, {"x": x}).outputs["y"] == interpret(graph, {"x": x}).outputs["y"]
    again, _ = Pipeline((Schedule(),)).run(graph)
    assert str(again) == str(after)


def test_schedule_keeps_an_order_that_is_as_good():
    graph = Graph("chain")
    h = graph.input("x", (100,))
    for _ in range(5):
        h = ops.tanh(h)
    graph.output(h=h)
    after, _ = Pipeline((Schedule(),)).run(graph, verify=True)
    assert [n.name for n in after] == [n.name for n in graph]


@settings(max_examples=40, deadline=None)
@given(recipes(), st.booleans())
def test_schedule_is_never_worse(recipe, in_place):
    graph = Autodiff("loss", tuple(SHAPES)).run(build(recipe))
    after, _ = Pipeline((Schedule(updates_in_place=in_place),)).run(graph, verify=True)
    before_peak, after_peak = after.annotations["peak_bytes"]
    assert after_peak <= before_peak
    assert after_peak == peak_bytes(storages(after))


def parameter_read_after_its_update() -> Graph:
    graph = Graph("late reader")
    x, w = graph.input("x", (8,)), graph.parameter("w", (8,))
    new = ops.mul(x, 2.0, name="new")
    graph.update("w", new)
    graph.output(y=ops.mul(w, x, name="late"))
    return graph


def test_updates_wait_for_the_readers_of_the_old_value():
    graph = parameter_read_after_its_update()
    assert plan_memory(graph, updates_in_place=True).in_place_updates == ()
    after, _ = Pipeline((Schedule(updates_in_place=True),)).run(graph, verify=True)
    plan = plan_memory(after, updates_in_place=True)
    assert plan.in_place_updates == ("w",)
    assert plan.offset(after.updates["w"]) is None
    outputs, updates = run_in_arena(
        after, {"x": np.arange(8.0)}, {"w": np.ones(8)}, updates_in_place=True
    )
    np.testing.assert_array_equal(outputs["y"], np.arange(8.0))
    np.testing.assert_array_equal(updates["w"], 2 * np.arange(8.0))


@pytest.mark.parametrize("optimizer", [optim.SGD(0.1, momentum=0.9), optim.AdamW()])
def test_updates_of_small_parameters_come_last(optimizer):
    graph = zoo.mlp([40, 30], (20,), 5)
    joint, _ = compiler.transform(graph, ["loss"], {"N": 8}, "loss", (), optimizer)
    before = Schedule(updates_in_place=True).run(Fuse().run(joint))
    after, _ = Pipeline((GatherUpdates(most_bytes=4000),)).run(before, verify=True)
    regions = [n for n in after if n.op == "fused"]
    tail = [n for n in regions if n.origin.phase == "update" and not after.nx.out_degree(n.name)]
    late = tail[1:]  # the largest gradient, of 30 x 40 elements, is used up at once
    assert max(v.type.size for v in tail[0].inputs) == 1200 and len(late) == 5
    assert regions[-5:] == late


def test_swapped_parameters_are_not_updated_in_place():
    graph = Graph("swap")
    a, b = graph.parameter("a", (4,)), graph.parameter("b", (4,))
    graph.update("a", ops.mul(b, 1.5))
    graph.update("b", ops.mul(a, 1.5))
    plan = plan_memory(graph, updates_in_place=True)
    assert plan.in_place_updates == ("b",)  # a's old value is read before b's new one is written
    _, updates = run_in_arena(graph, {}, {"a": np.ones(4), "b": np.zeros(4)}, updates_in_place=True)
    np.testing.assert_array_equal(updates["b"], np.full(4, 1.5))
    np.testing.assert_array_equal(updates["a"], np.zeros(4))


def test_an_update_that_reads_its_parameter_needs_leave():
    graph = Graph("step")
    w = graph.parameter("w", (4,))
    graph.update("w", ops.mul(w, 0.5))
    assert plan_memory(graph, updates_in_place=True).in_place_updates == ()
    assert plan_memory(allow_in_place(graph), updates_in_place=True).in_place_updates == ("w",)


def test_views_in_place_outputs_and_workspaces_share_as_declared():
    graph = Graph("sharing")
    x = graph.input("x", (4, 4))
    a = ops.exp(x, name="a")
    view = ops.reshape(a, (16,), name="view")
    b = ops.tanh(view, name="b")
    c = ops.sin(b, name="c")
    graph.output(c=c)
    b.node.attrs["inplace"] = ((0, 0),)
    b.node.attrs["workspace_bytes"] = 100
    plan = plan_memory(graph)
    assert plan.offset(a) == plan.offset(view) == plan.offset(b) != plan.offset(c)
    assert plan.offset(x) is None
    workspace = plan.workspace_offset(b.node)
    assert workspace is not None and workspace % 64 == 0
    assert plan.arena_bytes == plan.lower_bound == 64 + 128
    assert plan.total_without_reuse == 3 * 64 + 128
    (shared,) = (p for p in plan.lifetimes if p.name == "a")
    assert shared.shares == ("a", "b") and (shared.first, shared.last) == (1, 4)


def test_nothing_is_overwritten_that_is_still_read():
    """In place is refused to operands with later readers, outputs, other sizes and sources."""
    graph = Graph("refused")
    x = graph.input("x", (16,))
    a, b = ops.exp(x), ops.sin(x)
    graph.output(b=b)
    c = ops.add(a, b)
    d = ops.mul(c, a)
    graph.output(d=ops.sum(d), c2=ops.add(b, 1.0))
    graph = allow_in_place(graph)
    plan = plan_memory(graph)
    owners = {name: p.name for p in plan.lifetimes for name in p.shares}
    assert owners["add"] == "add" and owners["mul"] in ("add", "exp") and owners["sin"] == "sin"
    assert owners["add_1"] == "add_1" and owners["sum"] == "sum"


def test_outputs_can_be_copied_out_as_they_are_made():
    graph = Graph("outputs")
    x = graph.input("x", (64,))
    first = ops.exp(x)
    second = ops.tanh(first)
    graph.output(first=first, second=second, third=ops.sin(second))
    assert plan_memory(graph).arena_bytes == 3 * 256
    assert plan_memory(graph, outputs_live=False).arena_bytes == 2 * 256


def test_sizes_follow_layouts_and_can_be_replaced():
    graph = Graph("layouts")
    x = graph.input("x", (3, 5))
    y = ops.exp(x)
    graph.output(y=y)
    y.node.layouts = (Layout(1, 8),)
    assert storage_bytes(y) == 128  # 3 rows of one block of 8 lanes: 96 bytes
    assert plan_memory(graph).arena_bytes == 128
    assert plan_memory(graph, size_of=lambda v: 4096).arena_bytes == 4096


def test_empty_graphs_and_values():
    graph = Graph("empty")
    x = graph.input("x", (0, 4))
    graph.output(x=x, y=ops.exp(x), z=ops.reshape(x, (4, 0)))
    after, _ = Pipeline((Schedule(), PlanMemory())).run(graph, verify=True)
    plan = after.annotations["memory"]
    plan.check()
    assert plan.arena_bytes == plan.lower_bound == 0
    assert plan_memory(Graph("nothing")).arena_bytes == 0


def test_check_finds_overlaps_and_report_reads_well():
    graph = diamond()
    plan = plan_memory(graph)
    plan.check()
    first = plan.report().splitlines()
    assert first[0].startswith("planned 28.22 kB") and "bound" in first[0] and "sum" in first[0]
    assert "and 15 smaller" in plan.report(rows=5)
    moved = tuple(replace(p, offset=0) for p in plan.lifetimes)
    with pytest.raises(AssertionError, match="share bytes at position"):
        replace(plan, lifetimes=moved).check()
    with pytest.raises(AssertionError, match="outside the arena"):
        replace(plan, arena_bytes=64).check()


def lenet_steps() -> dict[str, Graph]:
    """LeNet for inference, and as training steps with gradient descent and Adam."""
    steps = {}
    declared = zoo.lenet5().bind({"N": 64})
    infer = declared.copy()
    del infer.outputs["loss"]
    steps["inference"] = (Pipeline((SetMode(False),)) + FORWARD + BACKWARD).run(infer)[0]
    for name, optimizer in (("SGD", optim.SGD(0.1, momentum=0.9)), ("Adam", optim.Adam(1e-3))):
        graph, _ = (Pipeline((SetMode(True),)) + FORWARD).run(declared)
        parameters = graph.parameters
        found = differentiate(graph, graph.outputs["loss"], [p[0] for p in parameters.values()])
        optimizer.apply(graph, dict(zip(parameters, found, strict=True)))
        steps[name] = BACKWARD.run(graph)[0]
    return steps


def planned(graph: Graph, batch: int, training: bool) -> tuple[MemoryPlan, MemoryPlan]:
    """The plans that `gc.compile` makes, with groups of kernels and without; nothing is compiled.

    Training: a step of gradient descent with momentum."""
    wanted = ["loss"] if training else ["logits"]
    loss, optimizer = ("loss", optim.SGD(0.1, momentum=0.9)) if training else (None, None)
    rewrites = compiler.algorithms("cpu", "float32", training)
    step, _ = compiler.transform(
        graph, wanted, {"N": batch}, loss, (), optimizer, None, 0, rewrites
    )
    fused, _ = compiler.default_pipeline().run(step)
    target.lower_graph(fused)
    passes = compiler.memory_pipeline(threads=2)
    plans = []
    for pipeline in (passes, passes.without("parallelize")):
        result, _ = pipeline.run(fused)
        plans.append(result.annotations["memory"])
    return plans[0], plans[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (zoo.lenet5, 1),
        (zoo.lenet5, 7),
        (zoo.lenet5, 64),
        pytest.param(zoo.resnet20, 1, marks=pytest.mark.slow),
        (zoo.resnet20, 128),
        pytest.param(zoo.resnet18, 8, marks=pytest.mark.slow),
    ],
)
def test_networks_are_planned_within_5_percent_of_the_bound(build, batch, training):
    """Of the kernels as they are: fused, in their layouts, scheduled, in groups or not."""
    for plan in planned(build(), batch, training):
        plan.check()
        assert plan.arena_bytes <= 1.05 * plan.lower_bound


def test_what_a_thread_keeps_of_a_block_follows_each_other():
    plan, _ = planned(zoo.resnet20(), 9, training=False)
    plan.check()
    for scratch in (p for p in plan.lifetimes if p.parts):
        share = scratch.bytes // scratch.copies
        assert scratch.copies == 2 and sum(p.bytes for p in scratch.parts) > 2 * share
        assert all(scratch.first <= p.first <= p.last <= scratch.last for p in scratch.parts)
        # Nothing is written where another value of the same thread is still to be read.
        crowded = replace(scratch, parts=tuple(replace(p, offset=0) for p in scratch.parts))
        with pytest.raises(AssertionError, match="share bytes|outside"):
            replace(plan, lifetimes=(crowded,)).check()
        assert {plan.steps[name, 0] for p in scratch.parts for name in p.shares} == {share}
    assert any(p.parts for p in plan.lifetimes)


@pytest.mark.parametrize("name", ["inference", "SGD", "Adam"])
@pytest.mark.parametrize("in_place", [False, True])
def test_lenet_is_planned_within_5_percent_of_the_bound(name, in_place):
    graph = lenet_steps()[name]
    if in_place:
        graph = allow_in_place(graph)
    passes = (Schedule(updates_in_place=in_place), PlanMemory(updates_in_place=in_place))
    planned, _ = Pipeline(passes).run(graph, verify=True)
    plan = planned.annotations["memory"]
    plan.check()
    assert plan.arena_bytes <= 1.05 * plan.lower_bound
    assert plan.arena_bytes < 0.7 * plan.total_without_reuse
    if in_place and name != "inference":
        assert set(plan.in_place_updates) == set(planned.updates)
    verify_graph(planned)

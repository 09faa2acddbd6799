"""Random numbers and dropout: published test vectors, statistics, independence, repetition."""

from __future__ import annotations

import numpy as np
import pytest
from scalar_evaluator import ScalarEvaluator

from graphc import compiler, ops
from graphc.codegen.program import plan_launches
from graphc.interpreter import interpret
from graphc.ir import Graph
from graphc.ops.random import key_schedule, threefry, uniform_reference
from passes.autodiff import differentiate

# Counter, key and result of Threefry-2x32, 20 rounds: kat_vectors of the authors' Random123.
VECTORS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_threefry_vectors(counter, key, expected):
    words = threefry(key_schedule(*key), *(np.array([c], dtype=np.uint32) for c in counter))
    assert tuple(int(w[0]) for w in words) == expected


def test_lowering_gives_the_same_bits():
    graph = Graph()
    step = graph.input("step", (), "int32")
    for seed, stream, count in [(0, 0, 0), (2**31 + 5, 3, 17), (-1, 2**31, -9)]:
        node = ops.random_uniform(step, shape=(3, 7), seed=seed, stream=stream).node
        evaluator = ScalarEvaluator(node, [np.array(count, dtype=np.int32)])
        expected = uniform_reference(count, (3, 7), seed, stream)
        found = [evaluator.element(0, at) for at in np.ndindex(3, 7)]
        np.testing.assert_array_equal(np.array(found).reshape(3, 7), expected)


def test_uniform_statistics():
    n = 200_000
    u = uniform_reference(3, (n,), 7, 1).astype(np.float64)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 / np.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)
    counts = np.histogram(u, 100, (0, 1))[0]
    chi_squared = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert abs(chi_squared - 99) < 5 * np.sqrt(2 * 99)
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / np.sqrt(n)


def test_steps_streams_and_seeds_are_independent():
    n = 50_000
    drawn = [
        uniform_reference(step, (n,), seed, stream)
        for step, seed, stream in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**32, 0)]
    ]
    correlation = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


def dropout_graph(training: bool | None = True) -> Graph:
    graph = Graph()
    x = graph.input("x", (100, 50))
    h = ops.dropout(x, 0.3, training=training)
    graph.output(first=h, second=ops.dropout(x, 0.3, training=training))
    return graph


def test_dropout_keeps_the_mean_and_counts_steps():
    graph, x = dropout_graph(), np.ones((100, 50), dtype=np.float32)
    assert list(graph.states) == ["dropout.step"] and list(graph.updates) == ["dropout.step"]
    assert not graph.node("dropout.step").attrs["persistent"]
    results = interpret(graph, {"x": x}, {"dropout.step": np.int32(5)})
    assert results.updates["dropout.step"] == 6
    first, second = results.outputs["first"], results.outputs["second"]
    assert set(np.unique(first)) == {0, np.float32(1 / 0.7)}
    assert abs((first == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert (first != second).any(), "two layers must not share a mask"
    again = interpret(graph, {"x": x}, {"dropout.step": np.int32(5)}).outputs["first"]
    np.testing.assert_array_equal(first, again)
    later = interpret(graph, {"x": x}, {"dropout.step": np.int32(6)}).outputs["first"]
    assert (first != later).any(), "two steps must not share a mask"


def test_dropout_outside_training_is_the_identity(rng):
    x = rng.normal(size=(100, 50)).astype(np.float32)
    for training in (False, None):
        results = interpret(dropout_graph(training), {"x": x}, {"dropout.step": np.int32(0)})
        np.testing.assert_array_equal(results.outputs["first"], x)


def test_dropout_gradient_uses_the_forward_mask():
    graph = dropout_graph()
    x = graph.value("x")
    loss = ops.sum(graph.outputs["first"])
    (gradient,) = differentiate(graph, loss, [x])
    y = graph.outputs["first"]
    ones = np.ones((100, 50), dtype=np.float32)
    found = interpret(
        graph, {"x": ones}, {"dropout.step": np.int32(2)}, values=[y, gradient]
    ).values
    np.testing.assert_array_equal(found[y], found[gradient])


def test_sums_of_dropped_values_are_rendered_soon():
    """A random number has 2^20 paths through its expressions: none of them is walked twice."""
    graph = Graph()
    x = graph.input("x", (4, 32))
    graph.output(y=ops.softmax(ops.dropout(x, 0.5)), loss=ops.mean(ops.dropout(x, 0.5) * x))
    joint, _ = compiler.transform(graph, ["y", "loss"], {}, mode="train")
    fused, _ = compiler.default_pipeline().run(joint)
    assert plan_launches(fused, 8, 2)

"""The interpreter: sources, symbolic sizes, chosen values, float64 throughout, fused bodies."""

from __future__ import annotations

import numpy as np
import pytest

from graphc import errors, ops
from graphc.interpreter import interpret
from graphc.ir import Graph, TensorType
from graphc.ops.registry import OpDef, all_ops


def linear() -> Graph:
    graph = Graph("linear")
    x = graph.input("x", ("N", 3))
    w = graph.parameter("w", (3, 2))
    y = ops.sum(ops.unsqueeze(x, 2) * w, 1)
    graph.output(y=y, loss=ops.mean(y))
    graph.update("w", w - 0.5)
    return graph


W = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)
X = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 2]], dtype=np.float32)


def test_outputs_and_updates():
    results = interpret(linear(), {"x": X}, {"w": W})
    np.testing.assert_allclose(results.outputs["y"], X @ W)
    np.testing.assert_allclose(results.outputs["loss"], (X @ W).mean())
    np.testing.assert_allclose(results.updates["w"], W - 0.5)
    assert results.values == {}


def test_chosen_values_need_only_their_sources():
    graph = linear()
    target = graph.updates["w"]
    results = interpret(graph, {}, {"w": W}, values=[target])
    np.testing.assert_allclose(results.values[target], W - 0.5)
    assert list(results.outputs) == []


def test_keep_returns_every_value():
    graph = linear()
    results = interpret(graph, {"x": X}, {"w": W}, keep=True)
    assert set(results.values) == {v for node in graph for v in node.outputs}


def test_lists_and_other_dtypes_are_converted():
    results = interpret(linear(), {"x": X.tolist()}, {"w": W.astype(np.float64)})
    assert results.outputs["y"].dtype == np.float32


def test_missing_and_unfit_sources_are_named():
    graph = linear()
    with pytest.raises(errors.InputError, match=r"input 'x' f32\[N,3\] is missing: pass x=..."):
        interpret(graph, {}, {"w": W})
    with pytest.raises(errors.StateError, match=r"parameter 'w' f32\[3,2\] has no value"):
        interpret(graph, {"x": X})
    with pytest.raises(errors.InputError, match=r"f32\[N,3\]; got an array of shape \[3\]"):
        interpret(graph, {"x": X[0]}, {"w": W})
    with pytest.raises(errors.StateError, match=r"got an array of shape \[2, 3\] with N=4"):
        interpret(graph, {"x": X}, {"w": W.T})


def test_one_name_has_one_size():
    graph = Graph()
    graph.output(z=graph.input("x", ("N",)) + graph.input("y", ("N",)))
    with pytest.raises(errors.InputError, match=r"input 'y' is f32\[N\]; got .* \[1\] with N=4"):
        interpret(graph, {"x": np.zeros(4), "y": np.zeros(1)})


def test_inputs_may_have_a_default():
    graph = Graph()
    attrs = {"type": TensorType((), "float32"), "default": 0.25}
    rate = graph.add("input", (), attrs, name="learning_rate")[0]
    graph.output(double=rate * 2)
    assert interpret(graph, {}).outputs["double"] == 0.5
    assert interpret(graph, {"learning_rate": 3}).outputs["double"] == 6


def test_float64_replaces_every_float():
    graph = Graph()
    x = graph.input("x", (3,))
    y = ops.cast(ops.cast(x, "float64"), "float32") / 3
    graph.output(y=y, hot=ops.one_hot(ops.cast(x, "int32"), 2), c=graph.constant([0.5]))
    results = interpret(graph, {"x": [1, 1, 2]}, dtype="float64").outputs
    assert {a.dtype.name for a in results.values()} == {"float64"}
    np.testing.assert_array_equal(results["y"], np.array([1, 1, 2]) / 3)
    assert interpret(graph, {"x": [1, 1, 2]}).outputs["y"].dtype == np.float32


def test_arithmetic_does_not_trap():
    graph = Graph()
    x = graph.input("x", (2,))
    graph.output(y=ops.log(x), z=1 / x)
    with np.errstate(all="raise"):
        results = interpret(graph, {"x": [0, -1]}).outputs
    np.testing.assert_array_equal(results["y"], [-np.inf, np.nan])
    np.testing.assert_array_equal(results["z"], [np.inf, -1])


def test_fused_bodies_run_recursively(monkeypatch):
    body = Graph("body")
    a, b = body.input("operand0", (3,)), body.input("operand1", (3,))
    body.output(result0=a + b, result1=a * b)
    if "fused" not in all_ops():
        fused = OpDef(
            "fused",
            infer=lambda types, attrs: [v.type for v in attrs["body"].outputs.values()],
            evaluate=lambda arrays, attrs: [],
            vjp=None,
            lower=None,
            samples=list,
        )
        monkeypatch.setitem(
            __import__("graphc.ops.registry").ops.registry._REGISTRY, "fused", fused
        )
    graph = Graph()
    x, y = graph.input("x", (3,)), graph.input("y", (3,))
    node = graph.add("fused", (x, y), {"body": body})
    graph.output(total=node[0], product=node[1])
    results = interpret(graph, {"x": [1, 2, 3], "y": [4, 5, 6]}).outputs
    np.testing.assert_array_equal(results["total"], [5, 7, 9])
    np.testing.assert_array_equal(results["product"], [4, 10, 18])

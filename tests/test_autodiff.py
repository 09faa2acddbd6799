"""The backward pass: against finite differences and PyTorch, its cost, errors, higher orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import SHAPES, SMOOTH, arrays, build, recipes, run_torch, split

from graphc import errors, ops
from graphc.interpreter import interpret
from graphc.ir import Graph
from passes.autodiff import Autodiff, differentiate
from passes.base import verify_graph


def gradients(recipe, seed):
    """(loss, gradients of all sources) of a recipe, by the pass and the interpreter in float64."""
    graph = Autodiff("loss", tuple(SHAPES)).run(build(recipe))
    verify_graph(graph)
    outputs = interpret(graph, *split(arrays(seed)), dtype="float64").outputs
    return outputs["loss"], {name: outputs[f"grad:{name}"] for name in SHAPES}


@settings(max_examples=80, deadline=None)
@given(recipes(SMOOTH), st.integers(0, 99))
def test_gradients_agree_with_finite_differences(recipe, seed):
    _, gradient = gradients(recipe, seed)
    graph, data, step = build(recipe), arrays(seed), 1e-6
    directions = arrays(seed + 1000)

    def loss(t):
        moved = {name: data[name] + t * directions[name] for name in SHAPES}
        return interpret(graph, *split(moved), dtype="float64").outputs["loss"]

    expected = (loss(step) - loss(-step)) / (2 * step)
    actual = sum(np.sum(gradient[name] * directions[name]) for name in SHAPES)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(recipes(), st.integers(0, 99))
def test_gradients_agree_with_pytorch(recipe, seed):
    pytest.importorskip("torch")
    loss, gradient = gradients(recipe, seed)
    expected_loss, expected = run_torch(recipe, arrays(seed))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-9, atol=1e-12)
    for name in SHAPES:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-8, atol=1e-11)


def scalar_graph(function):
    graph = Graph("scalar")
    x = graph.input("x", (3,))
    loss = ops.sum(function(x))
    graph.output(loss=loss)
    return graph, x, loss


def value_of(graph, value, x):
    return interpret(graph, {"x": np.asarray(x)}, values=[value], dtype="float64").values[value]


X = np.array([0.3, -0.7, 1.2])


@pytest.mark.parametrize(
    "function, derivatives",
    [
        (lambda x: ops.mul(x, x), (2 * X, np.full(3, 2.0), np.zeros(3))),
        (lambda x: ops.mul(ops.mul(x, x), x), (3 * X**2, 6 * X, np.full(3, 6.0))),
        (ops.sin, (np.cos(X), -np.sin(X), -np.cos(X))),
        (
            ops.tanh,
            (
                1 - np.tanh(X) ** 2,
                -2 * np.tanh(X) * (1 - np.tanh(X) ** 2),
                (6 * np.tanh(X) ** 2 - 2) * (1 - np.tanh(X) ** 2),
            ),
        ),
    ],
)
def test_gradients_can_be_differentiated_again(function, derivatives):
    graph, x, loss = scalar_graph(function)
    value = loss
    for expected in derivatives:
        (gradient,) = differentiate(graph, value, [x])
        np.testing.assert_allclose(value_of(graph, gradient, X), expected, rtol=1e-6, atol=1e-12)
        value = ops.sum(gradient)
    verify_graph(graph)


def test_gradient_of_a_gradient_norm():
    """The gradient penalty of a small network, against PyTorch's double backward."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((4, 5)), "w": rng.standard_normal((5, 3))}
    graph = Graph("penalty")
    x, w = graph.input("x", (4, 5)), graph.parameter("w", (5, 3))
    loss = ops.mean(ops.softplus(ops.matmul(x, w)))
    (gx,) = differentiate(graph, loss, [x])
    (gw,) = differentiate(graph, ops.sum(ops.square(gx)), [w])
    actual = interpret(
        graph, {"x": data["x"]}, {"w": data["w"]}, values=[gw], dtype="float64"
    ).values[gw]
    tx, tw = (torch.tensor(data[k], requires_grad=True) for k in ("x", "w"))
    inner = torch.nn.functional.softplus(tx @ tw).mean()
    (tgx,) = torch.autograd.grad(inner, tx, create_graph=True)
    (tgw,) = torch.autograd.grad((tgx**2).sum(), tw)
    np.testing.assert_allclose(actual, tgw.numpy(), rtol=1e-8)


def test_shared_values_and_diamonds():
    graph, x, loss = scalar_graph(lambda x: ops.add(ops.mul(x, x), ops.mul(ops.exp(x), x)))
    (gradient,) = differentiate(graph, loss, [x])
    np.testing.assert_allclose(value_of(graph, gradient, X), 2 * X + np.exp(X) * (X + 1))


def test_a_value_with_k_uses_costs_k_minus_one_additions():
    for uses in (1, 2, 5):
        graph = Graph("uses")
        x = graph.input("x", (3,))
        parts = [ops.sin(x) for _ in range(uses)]
        loss = ops.sum(ops.concat(parts, 0))
        before = sum(node.op == "add" for node in graph)
        differentiate(graph, loss, [x])
        assert sum(node.op == "add" for node in graph) - before == uses - 1


def deep_mlp(depth, width=4):
    graph = Graph("deep")
    h = graph.input("x", (2, width))
    for i in range(depth):
        h = ops.relu(ops.add(ops.matmul(h, graph.parameter(f"w{i}", (width, width))), 1.0))
    loss = ops.mean(h)
    graph.output(loss=loss)
    return graph, loss


def test_backward_is_linear_in_depth():
    """Every further layer adds the same number of backward nodes: none is visited twice."""
    counts = []
    for depth in (4, 5, 6, 12, 24):
        graph, loss = deep_mlp(depth)
        forward = len(graph)
        differentiate(graph, loss, [node[0] for node in graph.parameters.values()])
        counts.append((depth, len(graph) - forward))
    (d0, n0), (d1, n1) = counts[:2]
    per_layer = (n1 - n0) // (d1 - d0)
    assert per_layer > 0
    assert [n for _, n in counts] == [n0 + (d - d0) * per_layer for d, _ in counts]


def test_each_node_is_differentiated_once(monkeypatch):
    from graphc.ops import registry

    graph = Graph("diamonds")
    x = h = graph.input("x", (2,))
    for _ in range(40):  # 2**40 paths
        h = ops.add(ops.tanh(h), ops.sin(h))
    loss = ops.sum(h)
    calls = []
    get = registry.get

    def counting(name):
        op = get(name)
        from dataclasses import replace

        return replace(op, vjp=lambda node, g: (calls.append(node.name), op.vjp(node, g))[1])

    monkeypatch.setattr(registry, "get", counting)
    forward = len(graph)
    differentiate(graph, loss, [x])
    assert len(calls) == len(set(calls)) == forward - 1


def test_only_the_path_is_differentiated():
    graph = Graph("path")
    x, y = graph.input("x", (3,)), graph.input("y", (3,))
    w = graph.parameter("w", (3,))
    loss = ops.sum(ops.mul(ops.exp(ops.tanh(y)), ops.mul(x, w)))
    before = {node.name for node in graph}
    differentiate(graph, loss, [w])
    added = [node.op for node in graph if node.name not in before]
    assert "tanh" not in added and "exp" not in added
    assert added.count("mul") <= 2
    assert all(
        graph.nx.out_degree(node.name) or node.op == "mul"
        for node in graph
        if node.name not in before
    )


def test_independent_values_get_zeros_or_none():
    graph = Graph("independent")
    x, y = graph.input("x", (2, 3)), graph.input("y", (4,))
    loss = ops.sum(ops.mul(x, ops.stop_gradient(x)))
    assert differentiate(graph, loss, [y], zeros=False) == [None]
    gx, gy = differentiate(graph, loss, [x, y])
    assert gy.type == y.type
    values = interpret(graph, {"x": np.ones((2, 3)), "y": np.ones(4)}, values=[gx, gy]).values
    np.testing.assert_array_equal(values[gy], np.zeros(4))
    np.testing.assert_array_equal(values[gx], np.ones((2, 3)))


def test_loss_itself_intermediate_values_and_seeds():
    graph = Graph("seed")
    x = graph.input("x", (3,))
    h = ops.exp(x)
    loss = ops.sum(h)
    one, gh = differentiate(graph, loss, [loss, h])
    seed = graph.input("seed", (3,))
    (product,) = differentiate(graph, h, [x], seed=seed)
    values = interpret(
        graph, {"x": X, "seed": [1, 2, 3]}, values=[one, gh, product], dtype="float64"
    ).values
    assert values[one] == 1
    np.testing.assert_array_equal(values[gh], np.ones(3))
    np.testing.assert_allclose(values[product], np.exp(X) * [1, 2, 3])


def test_gradients_keep_the_origin_and_leave_the_graph_given_alone():
    graph = Graph("origin")
    x = graph.input("x", (3,))
    with graph.layer("block1"):
        h = ops.tanh(x)
    with graph.layer("head"):
        graph.output(loss=ops.sum(h))
    text = str(graph)
    new = Autodiff("loss", ("x",)).run(graph)
    assert str(graph) == text
    added = new.nodes[len(graph) :]
    assert {node.origin.layer for node in added} <= {"block1", "head"}
    assert list(new.outputs) == ["loss", "grad:x"]


def test_errors_say_what_to_change():
    graph = Graph("errors")
    x = graph.input("x", ("N", 3)).graph.bind({"N": 4}).value("x")
    graph = x.graph
    label = graph.input("label", (4,), dtype="int32")
    h = ops.tanh(x, name="hidden")
    with pytest.raises(
        errors.GradientError,
        match=r"^hidden \(tanh, test_autodiff.py:\d+\).*f32\[4,3\] is not a scalar.*gc.mean or gc",
    ):
        differentiate(graph, h, [x])
    loss = ops.sum(h)
    with pytest.raises(errors.GradientError, match=r"'label' i32\[4\] has no gradient"):
        differentiate(graph, loss, [label])
    with pytest.raises(errors.GradientError, match="a constant has no gradient"):
        differentiate(graph, loss, [graph.constant(1.0)])
    with pytest.raises(errors.GradientError, match="not of a float type"):
        differentiate(graph, ops.argmax(x), [x])
    with pytest.raises(errors.GradientError, match="cannot take a seed"):
        differentiate(graph, h, [x], seed=loss)
    choice = ops.argmax(x, axis=1, name="choice")
    picked = ops.sum(ops.cast(choice, "float32"))
    with pytest.raises(
        errors.GradientError,
        match=r"^choice \(argmax, test_autodiff.py:\d+\): the chain rule of argmax is not defined",
    ):
        differentiate(graph, picked, [x])
    graph.output(loss=loss)
    with pytest.raises(errors.NameLookupError, match="did you mean 'label'"):
        Autodiff("loss", ("labels",)).run(graph)


def test_a_wrong_chain_rule_is_named(monkeypatch):
    from dataclasses import replace

    from graphc.ops import registry

    graph, x, loss = scalar_graph(ops.tanh)
    get = registry.get
    monkeypatch.setattr(
        registry, "get", lambda n: replace(get(n), vjp=lambda node, g: [ops.sum(node.inputs[0])])
    )
    with pytest.raises(
        errors.GradientError, match=r"the chain rule of sum returned f32\[\] for operand 0"
    ):
        differentiate(graph, loss, [x])

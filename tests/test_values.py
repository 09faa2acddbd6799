"""User functions and Python operators on values: results as NumPy's, errors that name the line."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphc import errors, ops
from graphc.interpreter import interpret
from graphc.ir import Graph, Value

X = np.random.default_rng(3).uniform(0.5, 2, (4, 3, 5)).astype(np.float32)
Y = np.random.default_rng(4).uniform(0.5, 2, (3, 1)).astype(np.float32)


def run(function, *arrays):
    """`function` of values, evaluated on arrays."""
    graph = Graph("test")
    inputs = [graph.input(f"x{i}", a.shape, a.dtype.name) for i, a in enumerate(arrays)]
    value = function(*inputs)
    given_arrays = {f"x{i}": a for i, a in enumerate(arrays)}
    result = interpret(graph, given_arrays, values=[value]).values[value]
    assert (result.shape, result.dtype.name) == (value.shape, value.dtype)
    return result


EXPRESSIONS = {
    "x + y": lambda x, y: x + y,
    "x - y": lambda x, y: x - y,
    "x * y": lambda x, y: x * y,
    "x / y": lambda x, y: x / y,
    "x ** y": lambda x, y: x**y,
    "2 + x": lambda x, y: 2 + x,
    "2.5 - x": lambda x, y: 2.5 - x,
    "x * 3": lambda x, y: x * 3,
    "1 / x": lambda x, y: 1 / x,
    "2 ** x": lambda x, y: 2**x,
    "-x": lambda x, y: -x,
    "abs(x - 1)": lambda x, y: abs(x - 1),
    "array + x": lambda x, y: Y + x,
    "x - array": lambda x, y: x - Y,
    "number * x": lambda x, y: np.float64(2) * x,
    "x < y": lambda x, y: x < y,
    "x <= 1": lambda x, y: x <= 1,
    "x > y": lambda x, y: x > y,
    "1 >= x": lambda x, y: 1 >= x,
    "x.sum()": lambda x, y: x.sum(),
    "x.sum(-1)": lambda x, y: x.sum(-1),
    "x.sum((0, -1), keepdims=True)": lambda x, y: x.sum((0, -1), keepdims=True),
    "x.mean(1)": lambda x, y: x.mean(1),
    "x.max((1, 2))": lambda x, y: x.max((1, 2)),
    "x.min(axis=0, keepdims=True)": lambda x, y: x.min(axis=0, keepdims=True),
    "x.reshape(-1, 5)": lambda x, y: x.reshape(-1, 5),
    "x.reshape((4, 15))": lambda x, y: x.reshape((4, 15)),
    "x.transpose()": lambda x, y: x.transpose(),
    "x.transpose(2, 0, 1)": lambda x, y: x.transpose(2, 0, 1),
    "x.transpose((0, 2, 1))": lambda x, y: x.transpose((0, 2, 1)),
    "x.astype": lambda x, y: x.astype("int32"),
    "x @ y": lambda x, y: x.transpose(0, 2, 1) @ y,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_python_operators(name):
    function = EXPRESSIONS[name]
    np.testing.assert_allclose(run(function, X, Y), function(X, Y), rtol=1e-6)


INDICES = st.one_of(
    st.integers(-3, 2),
    st.none(),
    st.just(Ellipsis),
    st.builds(
        slice,
        st.none() | st.integers(-8, 8),
        st.none() | st.integers(-8, 8),
        st.none() | st.integers(1, 4),
    ),
)


@given(st.lists(INDICES, min_size=1, max_size=4).map(tuple))
def test_getitem_is_numpys(key):
    count = sum(k is not None and k is not Ellipsis for k in key)
    if count > 3 or sum(k is Ellipsis for k in key) > 1:
        with pytest.raises(errors.ShapeError):
            run(lambda x: x[key], X)
    else:
        np.testing.assert_array_equal(run(lambda x: x[key], X), X[key])


def test_getitem_of_one_item():
    np.testing.assert_array_equal(run(lambda x: x[1], X), X[1])
    np.testing.assert_array_equal(run(lambda x: x[-1], X), X[-1])
    np.testing.assert_array_equal(run(lambda x: x[1:3], X), X[1:3])
    np.testing.assert_array_equal(run(lambda x: x[..., 0], X), X[..., 0])


def test_getitem_of_everything_adds_no_node():
    graph = Graph()
    x = graph.input("x", ("N", 3))
    assert x[:] is x and x[...] is x and x[:, :] is x
    assert x[:, 0].shape == ("N",)
    assert x[:, None].shape == ("N", 1, 3)
    assert x[0].shape == (3,)


def test_equality_stays_identity():
    x = Graph().input("x", (2,))
    assert x == x.node[0] and x in {x}
    assert not x == x + 0
    assert ops.eq(x, 1.0).dtype == "bool"


def test_numpy_alike_functions():
    def check(function, expected, *arrays):
        np.testing.assert_allclose(run(function, *arrays), expected, rtol=1e-6)

    check(lambda x: ops.flatten(x), X.reshape(4, 15), X)
    check(lambda x: ops.flatten(x, 0), X.reshape(-1), X)
    check(lambda x: ops.flatten(x, -2), X.reshape(4, 15), X)
    check(lambda x: ops.unsqueeze(x, 0), X[None], X)
    check(lambda x: ops.unsqueeze(x, (1, -1)), X[:, None, :, :, None], X)
    check(lambda x: ops.squeeze(x, -1), Y[:, 0], Y)
    check(lambda x: ops.expand(x, (2, -1, 4)), np.broadcast_to(Y, (2, 3, 4)), Y)
    check(lambda x: ops.stack([x, x], -1), np.stack([X, X], -1), X)
    check(lambda x: ops.concat([x, x, x], -2), np.concatenate([X, X, X], -2), X)
    check(
        lambda x: ops.pad(x, ((1, 0), (0, 2)), 7), np.pad(Y, ((1, 0), (0, 2)), constant_values=7), Y
    )
    check(lambda x: ops.slice(x, (1,), (-1,)), X[1:-1], X)
    check(lambda x: ops.slice(x, (None, -2), (None, None), (3, 1)), X[::3, -2:], X)
    check(lambda x: ops.split(x, 2)[1], X[2:], X)
    check(lambda x: ops.split(x, (1, 4), axis=-1)[1], X[..., 1:], X)
    check(lambda x: ops.var(x, -1), X.var(-1), X)
    check(lambda x: ops.var(x, (0, 1), correction=1), X.var((0, 1), ddof=1), X)
    check(lambda x: ops.prod(x, 0), X.prod(0), X)
    check(lambda x: ops.argmax(x, -1), X.argmax(-1), X)
    check(lambda x: ops.argmax(x), X.argmax(), X)
    check(lambda x: ops.clip(x, 1, 1.5), X.clip(1, 1.5), X)
    check(lambda x: ops.where(x > 1, x, 0), np.where(X > 1, X, 0), X)
    check(lambda x: ops.where(x > 1, 1, 2), np.where(X > 1, 1.0, 2.0), X)
    check(lambda x: ops.where(X > 1, x, -x), np.where(X > 1, X, -X), X)
    check(lambda x: ops.stop_gradient(x), X, X)


def test_one_hot_places_its_axis(rng):
    labels = rng.integers(0, 5, (2, 3)).astype(np.int32)
    expected = np.eye(5, dtype=np.float32)[labels]
    np.testing.assert_array_equal(run(lambda x: ops.one_hot(x, 5), labels), expected)
    middle = run(lambda x: ops.one_hot(x, 5, axis=1, dtype="int32"), labels)
    np.testing.assert_array_equal(middle, expected.transpose(0, 2, 1))
    outside = np.array([-1, 5], dtype=np.int32)
    assert not run(lambda x: ops.one_hot(x, 5), outside).any()


def test_symbolic_dimensions():
    graph = Graph()
    x = graph.input("x", ("N", 16, 5, 5))
    assert ops.flatten(x).shape == ("N", 400)
    assert ops.reshape(x, (-1, 400)).shape == ("N", 400)
    assert ops.reshape(x, ("N", -1, 25)).shape == ("N", 16, 25)
    assert ops.transpose(x, (1, 0, 2, 3)).shape == (16, "N", 5, 5)
    assert ops.mean(x, (0, 2, 3)).shape == (16,)
    assert (x + x[:, :1]).shape == ("N", 16, 5, 5)
    assert ops.concat([x, x], 1).shape == ("N", 32, 5, 5)
    assert ops.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).shape == ("N", 16, 7, 7)
    assert ops.split(x, 4, 1)[0].shape == ("N", 4, 5, 5)
    graph.output(y=ops.flatten(x)[:, 1:3])
    assert graph.bind({"N": 2}).outputs["y"].shape == (2, 2)
    array = np.arange(3 * 400, dtype=np.float32).reshape(3, 16, 5, 5)
    result = interpret(graph, {"x": array}).outputs["y"]
    np.testing.assert_array_equal(result, array.reshape(3, 400)[:, 1:3])


def declare(function):
    graph = Graph("net")
    x = graph.input("x", ("N", 3, 4))
    return function(x, graph.input("m", (2, 3)), graph.input("i", (3,), "int32"))


ERRORS = {
    "broadcast": (
        lambda x, m, i: m + x,
        errors.ShapeError,
        r"^add \(add, test_values.py:\d+\): .*axis -2 has sizes 2 and 3"
        r".*operands: 'm' f32\[2,3\], 'x' f32\[N,3,4\]",
    ),
    "dtype": (
        lambda x, m, i: m + i,
        errors.DTypeError,
        "operands mix float32 and int32; convert one with gc.cast",
    ),
    "fraction": (
        lambda x, m, i: i + 0.5,
        errors.DTypeError,
        "0.5 cannot become int32, the dtype of 'i'",
    ),
    "integer": (
        lambda x, m, i: ops.exp(i),
        errors.DTypeError,
        r"exp \(exp, test_values.py:\d+\): needs float32 or float64 operands, got i32",
    ),
    "string": (lambda x, m, i: x + "a", errors.DeclarationError, "str is not a graph value"),
    "none": (
        lambda x, m, i: ops.add(1, 2),
        errors.DeclarationError,
        "must be a graph value; got int, int",
    ),
    "axis": (
        lambda x, m, i: m.sum(2),
        errors.ShapeError,
        r"sum of 'm' f32\[2,3\]: axis 2 is not in \[-2, 2\)",
    ),
    "twice": (lambda x, m, i: m.sum((0, -2)), errors.ShapeError, "names an axis twice"),
    "empty max": (lambda x, m, i: m[:0].max(0), errors.ShapeError, "no element to choose"),
    "reshape": (
        lambda x, m, i: m.reshape(4, 2),
        errors.ShapeError,
        r"f32\[2,3\] cannot become \[4, 2\]",
    ),
    "reshape rest": (
        lambda x, m, i: m.reshape(4, -1),
        errors.ShapeError,
        "6 elements do not divide by 4",
    ),
    "reshape two": (
        lambda x, m, i: m.reshape(-1, -1),
        errors.ShapeError,
        "only one dimension can be -1",
    ),
    "reshape name": (
        lambda x, m, i: x.reshape(-1),
        errors.ShapeError,
        "-1 is not one size or one name",
    ),
    "transpose": (lambda x, m, i: m.transpose(0, 0), errors.ShapeError, "transpose of 'm'"),
    "squeeze": (lambda x, m, i: ops.squeeze(m, 0), errors.ShapeError, "axis 0 has size 2, not 1"),
    "expand": (
        lambda x, m, i: ops.expand(m, (2, 1)),
        errors.ShapeError,
        "only axes of size 1 are repeated",
    ),
    "expand new": (
        lambda x, m, i: ops.expand(m, (-1, 2, 3)),
        errors.ShapeError,
        "new axis 0 needs a size",
    ),
    "concat": (
        lambda x, m, i: ops.concat([m, m[:, :2]], 0),
        errors.ShapeError,
        "differ in another axis than 0",
    ),
    "concat none": (lambda x, m, i: ops.concat([]), errors.ShapeError, "at least one value"),
    "concat name": (lambda x, m, i: ops.concat([x, x], 0), errors.ShapeError, "no size yet"),
    "pad": (
        lambda x, m, i: ops.pad(m, ((1, 1),)),
        errors.ShapeError,
        "padding has 1 pairs for the 2 axes",
    ),
    "pad name": (
        lambda x, m, i: ops.pad(x, ((1, 1), (0, 0), (0, 0))),
        errors.ShapeError,
        "no size yet",
    ),
    "pad below": (
        lambda x, m, i: ops.pad(m, ((-1, 0), (0, 0))),
        errors.ShapeError,
        "negative; use a slice",
    ),
    "slice step": (lambda x, m, i: m[::-1], errors.ShapeError, "step -1 of axis 0 is below 1"),
    "slice name": (lambda x, m, i: x[1:], errors.ShapeError, "axis 0 has no size yet"),
    "index": (lambda x, m, i: m[2], errors.ShapeError, "index 2 of axis 0 is out of range"),
    "index kind": (lambda x, m, i: m[i], errors.DeclarationError, "cannot be indexed with Value"),
    "split": (
        lambda x, m, i: ops.split(m, 2, 1),
        errors.ShapeError,
        "axis 1 does not divide into 2 parts",
    ),
    "split sizes": (
        lambda x, m, i: ops.split(m, (1, 1), 1),
        errors.ShapeError,
        "do not add up to 3",
    ),
    "where": (lambda x, m, i: ops.where(m, m, 0), errors.DTypeError, "the condition is f32"),
    "cast": (
        lambda x, m, i: ops.cast(m, "float16"),
        errors.DTypeError,
        "'float16' is not supported",
    ),
    "gelu": (
        lambda x, m, i: ops.gelu(m, "fast"),
        errors.DeclarationError,
        "neither 'none' nor 'tanh'",
    ),
    "clip": (lambda x, m, i: ops.clip(m), errors.DeclarationError, "give min, max or both"),
    "clip integer": (lambda x, m, i: ops.clip(i, 0.5), errors.DTypeError, "0.5 is not an integer"),
    "dropout": (lambda x, m, i: ops.dropout(m, 1.5), errors.DeclarationError, "not a probability"),
    "counter": (
        lambda x, m, i: ops.random_uniform(m, shape=(2,), seed=0),
        errors.ShapeError,
        r"the counter is f32\[2,3\], not i32\[\]",
    ),
    "one_hot": (
        lambda x, m, i: ops.one_hot(m, 3),
        errors.DTypeError,
        "needs int32 or int64 operands",
    ),
    "truth": (lambda x, m, i: bool(m > 0), errors.DeclarationError, "no truth value"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    function, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        declare(function)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text


def test_values_have_no_stray_attributes():
    x = Graph().input("x", (2,))
    with pytest.raises(AttributeError):
        x.label = 1
    assert isinstance(x + 1, Value)

"""What a user reads after a mistake: one line that names the node, its operands and the remedy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import graphc as gc
from graphc import errors
from graphc.ops import registry

HERE = os.path.basename(__file__)


def message(kind: type[Exception], mistake: Callable[[], object]) -> str:
    """The text of the error that `mistake` raises; this file's line numbers become `*`."""
    with pytest.raises(kind) as caught:
        mistake()
    assert isinstance(caught.value, errors.GraphcError)
    text = str(caught.value)
    assert "\n" not in text
    pieces = text.split(f"{HERE}:")
    return f"{HERE}:*".join([pieces[0], *(p.lstrip("0123456789") for p in pieces[1:])])


@pytest.fixture
def g() -> gc.Graph:
    """image f32[N,3,8,8] -> conv1 -> fc -> logits, loss."""
    g = gc.Graph("net")
    image, label = g.input("image", ("N", 3, 8, 8)), g.input("label", ("N",), "int32")
    h = gc.relu(gc.nn.conv2d(image, 4, 3, name="conv1"))
    logits = gc.nn.linear(gc.flatten(h), 10, name="fc")
    g.output(logits=logits, loss=gc.softmax_cross_entropy(logits, label))
    return g


def test_the_line_is_the_users(g):
    def mistake():
        gc.add(g.value("image"), g.parameter("p", (5,)))

    line = mistake.__code__.co_firstlineno + 1
    with pytest.raises(errors.ShapeError, match=rf"add \(add, {HERE}:{line}\): "):
        mistake()


SHAPES = {
    "conv2": (
        lambda g, x: gc.conv2d(x, g.parameter("w", (4, 5, 3, 3)), name="conv2"),
        "conv2 (conv2d, *): input f32[N,3,8,8] has 3 channels, weight f32[4,5,3,3] expects 5 "
        "(operands: 'image' f32[N,3,8,8], 'w' f32[4,5,3,3])",
    ),
    "sum1": (
        lambda g, x: gc.add(x, g.parameter("b", (5,)), name="sum1"),
        "sum1 (add, *): shapes ['N', 3, 8, 8] and [5] do not broadcast: axis -1 has sizes 8 and 5; "
        "reshape or expand one of them (operands: 'image' f32[N,3,8,8], 'b' f32[5])",
    ),
    "product": (
        lambda g, x: gc.matmul(gc.flatten(x), g.parameter("m", (7, 2)), name="product"),
        "product (matmul, *): left f32[N,192] has 192 columns, right f32[7,2] has 7 rows: they "
        "must agree; transpose or reshape one (operands: 'flatten_1' f32[N,192], 'm' f32[7,2])",
    ),
    "pool": (
        lambda g, x: gc.max_pool2d(x, 9, name="pool"),
        "pool (max_pool2d, *): a window of height 9 does not fit the input's height 8 with padding "
        "0+0: use a smaller kernel or more padding (operands: 'image' f32[N,3,8,8])",
    ),
    "labels": (
        lambda g, x: gc.softmax_cross_entropy(
            g.value("logits"), g.input("l", ("N", 1), "int32"), name="labels"
        ),
        "labels (softmax_cross_entropy, *): labels i32[N,1] must be i32[N] for logits f32[N,10] "
        "(operands: 'fc.add' f32[N,10], 'l' i32[N,1])",
    ),
    "flat": (
        lambda g, x: gc.reshape(g.parameter("r", (3, 4)), (5, 2), name="flat"),
        "flat (reshape, *): f32[3,4] cannot become [5, 2]: the numbers of elements differ "
        "(operands: 'r' f32[3,4])",
    ),
    "total": (
        lambda g, x: gc.sum(x, 7, name="total"),
        "*: sum of 'image' f32[N,3,8,8]: axis 7 is not in [-4, 4) for an operand of rank 4",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shapes(g, name):
    mistake, text = SHAPES[name]
    expected = text.replace("*", f"{HERE}:*", 1)
    assert message(errors.ShapeError, lambda: mistake(g, g.value("image"))) == expected
    # A refused line leaves no node behind.
    assert name not in g


def test_mixed_dtypes(g):
    def mistake(dtype):
        return lambda: gc.add(g.value("image"), g.input(dtype, (8,), dtype), name="mixed")

    for dtype, short in (("int32", "i32"), ("float64", "f64")):
        assert message(errors.DTypeError, mistake(dtype)) == (
            f"mixed (add, {HERE}:*): operands mix float32 and {dtype}; convert one with "
            f"gc.cast(x, 'float32') (operands: 'image' f32[N,3,8,8], '{dtype}' {short}[8])"
        )


def test_values_are_not_arrays(g):
    image, prefix = g.value("image"), f"image (input, {HERE}:*): a value of a static graph "
    assert message(errors.DeclarationError, lambda: bool(image)) == (
        f"{prefix}has no truth value while the graph is declared; use gc.where"
    )
    assert message(errors.DeclarationError, lambda: list(image)) == (
        f"{prefix}cannot be iterated; use slices or gc.split"
    )
    assert message(errors.DeclarationError, lambda: np.asarray(image)) == (
        f"{prefix}holds no data; compile and run the graph"
    )


def compile_(g: gc.Graph, **options):
    return lambda: gc.compile(g, **{"outputs": ["logits"], "dims": {"N": 2}, **options})


def test_unknown_names(g):
    assert message(errors.NameLookupError, compile_(g, outputs=["logit"])) == (
        "graph 'net' has no output and no node 'logit'; did you mean 'logits'?"
    )
    assert message(errors.NameLookupError, compile_(g, loss="lost", gradients=["image"])) == (
        "graph 'net' has no output and no node 'lost'; did you mean 'loss', 'logits'?"
    )
    assert message(errors.NameLookupError, compile_(g, loss="loss", gradients=["conv.weight"])) == (
        "graph 'net' has no output and no node 'conv.weight'; "
        "did you mean 'conv1.weight', 'fc.weight'?"
    )
    assert message(errors.UnboundDimensionError, compile_(g, dims={"N": 2, "M": 3})) == (
        "dims has 'M', but graph 'net' has N"
    )


def test_dimensions(g):
    assert message(errors.UnboundDimensionError, compile_(g, dims={})) == (
        f"image (input, {HERE}:*): dimension 'N' of f32[N,3,8,8] is unbound; "
        "pass dims={'N': size}"
    )
    for size in (-1, 2.0, "2"):
        assert message(errors.UnboundDimensionError, compile_(g, dims={"N": size})) == (
            f"dims['N'] = {size!r}: a size must be a non-negative int"
        )


def test_losses_and_gradients(g):
    assert message(errors.GradientError, compile_(g, loss="logits", gradients=["image"])) == (
        f"fc.add (add, {HERE}:*): the loss 'fc.add' f32[2,10] is not a scalar: "
        "reduce it with gc.mean or gc.sum"
    )
    assert message(errors.GradientError, compile_(g, loss="loss", gradients=["label"])) == (
        f"label (input, {HERE}:*): 'label' i32[2] has no gradient: "
        "only float32 and float64 values have one"
    )
    for options in ({"optimizer": gc.optim.SGD()}, {"gradients": ["image"]}):
        assert message(errors.GradientError, compile_(g, **options)) == (
            "gradients and optimizers need loss=...: the name of the scalar to differentiate"
        )


def test_options(g):
    for options, text in (
        ({"outputs": "loss"}, "outputs='loss': pass a list of names, e.g. outputs=['loss']"),
        (
            {"outputs": []},
            "nothing to compute: name outputs=[...], gradients=[...] or an optimizer",
        ),
        (
            {"optimizer": "adam", "loss": "loss"},
            "optimizer='adam': pass an optimizer, e.g. gc.optim.SGD(lr=0.1)",
        ),
        ({"mode": "test"}, "mode='test': use 'train', 'infer' or None"),
        ({"threads": 0}, "threads=0: use 1 to 256, or None for every core"),
    ):
        assert message(errors.CompileError, compile_(g, **options)) == text


def test_operators_without_a_lowering(g, monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, "relu", replace(registry.get("relu"), lower=None))
    assert message(errors.CompileError, compile_(g)) == (
        f"cannot be compiled: conv1 (fused, {HERE}:*): relu (relu, {HERE}:*): operator 'relu' has "
        "no lowering for the CPU; give its OpDef a lower or a decompose rule, or use "
        "target='interpret' (operands: 'conv1.add' f32[2,4,6,6])"
    )


def test_all_nodes_without_a_lowering_are_listed_at_once(g, monkeypatch):
    for op in ("relu", "conv2d"):
        monkeypatch.setitem(registry._REGISTRY, op, replace(registry.get(op), lower=None))
    pipeline = gc.default_pipeline().with_options("fuse", enabled=False)
    with pytest.raises(errors.CompileError) as caught:
        compile_(g, pipeline=pipeline)()
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 nodes cannot be compiled:"
    assert [line.split()[0] for line in lines[1:]] == ["conv1", "relu"]


def test_errors_do_not_start_the_compiler(g):
    """All of the above is refused before Numba compiles anything."""
    loaded = "numba" in sys.modules
    with pytest.raises(errors.GraphcError):
        compile_(g, outputs=["logit"])()
    assert ("numba" in sys.modules) == loaded

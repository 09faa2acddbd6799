"""PyTorch's name for each operator, and the comparison of results and gradients with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from op_checks import Case, Projection

from graphc.interpreter import interpret
from graphc.ops.registry import Sample

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: lambda t, a, b, f=name: getattr(t, f)(a, b)
        for name in "add sub mul div pow maximum minimum lt le gt ge eq ne logical_and "
        "logical_or".split()
    },
    **{
        name: lambda t, x, f=name: getattr(t, f)(x)
        for name in "neg abs sign square reciprocal sqrt rsqrt exp expm1 log log1p sin cos erf "
        "floor ceil relu sigmoid tanh logical_not".split()
    },
    "leaky_relu": lambda t, x, **a: t.nn.functional.leaky_relu(x, **a),
    "elu": lambda t, x, **a: t.nn.functional.elu(x, **a),
    "selu": lambda t, x: t.nn.functional.selu(x),
    "gelu": lambda t, x, **a: t.nn.functional.gelu(x, **a),
    "silu": lambda t, x: t.nn.functional.silu(x),
    "softplus": lambda t, x, **a: t.nn.functional.softplus(x, **a),
    "clip": lambda t, x, **a: t.clamp(x, **a),
    "where": lambda t, c, a, b: t.where(c, a, b),
    "cast": lambda t, x, dtype: x.to(getattr(t, dtype)),
    "sum": lambda t, x, axis, keepdims: t.sum(x, axis, keepdims, dtype=x.dtype) if axis else x * 1,
    "mean": lambda t, x, axis, keepdims: t.mean(x, axis, keepdims) if axis else x * 1,
    "max": lambda t, x, axis, keepdims: t.amax(x, axis, keepdims) if axis else x * 1,
    "min": lambda t, x, axis, keepdims: t.amin(x, axis, keepdims) if axis else x * 1,
    "prod": lambda t, x, axis, keepdims: _prod(t, x, axis, keepdims),
    "argmax": lambda t, x, axis, keepdims: _argmax(t, x, axis, keepdims),
    "reshape": lambda t, x, shape: t.reshape(x, shape),
    "transpose": lambda t, x, axes: t.permute(x, axes),
    "expand": lambda t, x, shape: x.expand(shape),
    "slice": lambda t, x, starts, stops, steps: x[tuple(map(slice, starts, stops, steps))],
    "pad": lambda t, x, padding, value: (
        t.nn.functional.pad(x, [p for pair in reversed(padding) for p in pair], value=value)
        if padding
        else x * 1
    ),
    "concat": lambda t, *xs, axis: t.cat(xs, axis),
    "matmul": lambda t, a, b: t.matmul(a, b),
}


def _prod(t: Any, x: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    for a in reversed(axis):
        x = t.prod(x, a, keepdim=keepdims, dtype=x.dtype)
    return x * 1


def _argmax(t: Any, x: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    kept = [a for a in range(x.ndim) if a not in axis]
    rows = x.permute((*kept, *axis)).reshape(
        [x.shape[a] for a in kept] + [math.prod(x.shape[a] for a in axis)]
    )
    shape = (
        [1 if a in axis else d for a, d in enumerate(x.shape)]
        if keepdims
        else [x.shape[a] for a in kept]
    )
    return t.argmax(rows, -1).reshape(shape).to(t.int32)


def check(torch: Any, case: Case) -> None:
    """Results and gradients in float64 equal PyTorch's."""
    tensors = [torch.tensor(a) for a in case.operands("float64")]
    slots = case.gradient_slots()
    for slot in slots:
        tensors[slot].requires_grad_()
    expected = FUNCTIONS[case.op](torch, *tensors, **case.sample.attrs)
    (result,) = case.evaluate("float64")
    assert tuple(expected.shape) == result.shape
    assert str(expected.dtype) == f"torch.{result.dtype.name}"
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    if not slots or not expected.requires_grad:
        return
    projection = Projection(case, order=1)
    weight = torch.tensor(projection.arrays["weight0"])
    (expected * weight.to(expected.dtype)).sum().backward()
    found = interpret(projection.graph, projection.arrays, values=projection.gradients).values
    for slot, gradient in zip(slots, projection.gradients, strict=True):
        reference = tensors[slot].grad
        reference = np.zeros(tensors[slot].shape) if reference is None else reference.numpy()
        np.testing.assert_allclose(found[gradient], reference, rtol=1e-10, atol=1e-12)


def _edges() -> list[Case]:
    """Points where the derivative is a convention: PyTorch's is kept."""
    kinks = np.array([-1.0, 0.0, 1.0, -0.0])
    unary = "abs sign square sqrt relu sigmoid tanh silu selu floor ceil exp log1p".split()
    samples: list[tuple[str, tuple[np.ndarray, ...], dict[str, Any]]] = [
        (name, (np.abs(kinks) if name in ("sqrt", "log1p") else kinks,), {}) for name in unary
    ]
    samples += [
        ("leaky_relu", (kinks,), {"negative_slope": 0.1}),
        ("elu", (kinks,), {"alpha": 1.5}),
        ("gelu", (np.array([-40.0, -8.0, 0.0, 8.0, 40.0]),), {"approximate": "none"}),
        ("gelu", (np.array([-40.0, -8.0, 0.0, 8.0, 40.0]),), {"approximate": "tanh"}),
        (
            "softplus",
            (np.array([-800.0, -30.0, 0.0, 20.0, 20.1, 800.0]),),
            {"beta": 1.0, "threshold": 20.0},
        ),
        ("sigmoid", (np.array([-800.0, -30.0, 30.0, 800.0]),), {}),
        ("expm1", (np.array([1e-12, -1e-12, 0.0]),), {}),
        ("log1p", (np.array([1e-12, -1e-12, 0.0]),), {}),
        ("clip", (kinks,), {"min": -1.0, "max": 1.0}),
        ("clip", (kinks,), {"min": 1.0, "max": -1.0}),
        ("maximum", (kinks, np.array([0.0, 0.0, 1.0, 0.0])), {}),
        ("minimum", (kinks, np.array([0.0, 0.0, 1.0, 0.0])), {}),
        ("pow", (np.array([0.0, 0.0, 0.0, 2.0, -2.0]), np.array([2.0, 1.0, 0.0, 0.0, 3.0])), {}),
        ("div", (np.array([0.0, 1.0]), np.array([2.0, -2.0])), {}),
        ("max", (np.array([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]),), {"axis": (1,), "keepdims": False}),
        (
            "max",
            (np.array([[1.0, 2.0, 2.0], [2.0, 1.0, 0.0]]),),
            {"axis": (0, 1), "keepdims": True},
        ),
        ("min", (np.array([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]]),), {"axis": (1,), "keepdims": False}),
        (
            "prod",
            (np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0], [2.0, 3.0, 4.0]]),),
            {"axis": (1,), "keepdims": False},
        ),
        (
            "argmax",
            (np.array([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]),),
            {"axis": (1,), "keepdims": False},
        ),
    ]
    return [Case(op, i, Sample(inputs, attrs)) for i, (op, inputs, attrs) in enumerate(samples)]


EDGE_CASES = _edges()

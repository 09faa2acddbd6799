"""Random programs for property tests: one recipe, built as a graphc graph or run by PyTorch.

A recipe is a list of (operator, operand, operand) numbers. It is total: numbers wrap around,
operands that do not fit are reduced first, so that Hypothesis shrinks freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from graphc import ops
from graphc.ir import Graph, Value

Recipe = list[tuple[int, int, int]]
SHAPES = {"x": (2, 3), "y": (3,), "z": (2, 1), "w": (1, 3, 2)}


@dataclass(frozen=True)
class Op:
    """An operator for recipes: how graphc and PyTorch compute it."""

    arity: int
    graphc: Callable[..., Value]
    torch: Callable[..., Any]
    smooth: bool = True


def _torch() -> Any:
    import torch

    return torch


def _reversed_axes(x: Any) -> tuple[int, ...]:
    return tuple(range(len(x.shape)))[::-1]


def _double(x: Any) -> tuple[int, ...]:
    return (2, *x.shape)


OPS: dict[str, Op] = {
    "add": Op(2, ops.add, lambda a, b: a + b),
    "sub": Op(2, ops.sub, lambda a, b: a - b),
    "mul": Op(2, ops.mul, lambda a, b: a * b),
    "div": Op(
        2,
        lambda a, b: ops.div(a, ops.add(ops.square(b), 1.0)),
        lambda a, b: a / (b * b + 1),
    ),
    "neg": Op(1, ops.neg, lambda a: -a),
    "tanh": Op(1, ops.tanh, lambda a: a.tanh()),
    "sigmoid": Op(1, ops.sigmoid, lambda a: a.sigmoid()),
    "square": Op(1, lambda a: ops.square(ops.tanh(a)), lambda a: a.tanh() ** 2),
    "exp": Op(1, lambda a: ops.exp(ops.sin(a)), lambda a: a.sin().exp()),
    "power": Op(1, lambda a: ops.pow(ops.sigmoid(a), 2.0), lambda a: a.sigmoid() ** 2.0),
    "zero": Op(1, lambda a: ops.add(a, 0.0), lambda a: a + 0),
    "scale": Op(1, lambda a: ops.mul(ops.mul(a, 0.5), 1.5), lambda a: a * 0.75),
    "half": Op(1, lambda a: ops.div(a, -2.0), lambda a: a / -2),
    "one": Op(1, lambda a: ops.mul(1.0, a), lambda a: a * 1),
    "folded": Op(
        1,
        lambda a: ops.add(a, ops.exp(a.graph.constant(np.arange(1.0), dtype=a.dtype))),
        lambda a: a + 1 if a.ndim else (a + 1).reshape(1),
    ),
    "sum": Op(1, lambda a: ops.sum(a, 0, True) if a.rank else a, lambda a: _sum_first(a)),
    "mean": Op(1, lambda a: ops.mean(a), lambda a: a.mean()),
    "flat": Op(1, lambda a: ops.reshape(a, (-1,)), lambda a: a.reshape(-1)),
    "wrapped": Op(1, lambda a: ops.reshape(a, (1, *a.shape)), lambda a: a.reshape(1, *a.shape)),
    "transpose": Op(1, lambda a: ops.transpose(a), lambda a: a.permute(_reversed_axes(a))),
    "expand": Op(1, lambda a: ops.expand(a, _double(a)), lambda a: a.expand(_double(a))),
    "concat": Op(
        1,
        lambda a: ops.concat([a, ops.neg(a)], 0) if a.rank else a,
        lambda a: _torch().cat([a, -a], 0) if a.ndim else a,
    ),
    "slice": Op(
        1,
        lambda a: ops.slice(a, [a.shape[0] // 2], [None]) if a.rank else a,
        lambda a: a[a.shape[0] // 2 :] if a.ndim else a,
    ),
    "whole": Op(
        1,
        lambda a: ops.slice(a, [0], [None]) if a.rank else a,
        lambda a: a,
    ),
    "relu": Op(1, ops.relu, lambda a: a.relu(), smooth=False),
    "abs": Op(1, ops.abs, lambda a: a.abs(), smooth=False),
    "where": Op(
        2,
        lambda a, b: ops.where(ops.gt(a, b), a, ops.tanh(b)),
        lambda a, b: _torch().where(a > b, a, b.tanh()),
        smooth=False,
    ),
    "softmax": Op(
        1,
        lambda a: ops.softmax(a, -1) if a.rank else a,
        lambda a: a.softmax(-1) if a.ndim else a,
    ),
}
SMOOTH = tuple(name for name, op in OPS.items() if op.smooth)


def _sum_first(a: Any) -> Any:
    return a.sum(0, keepdim=True) if a.ndim else a


def _fits(a: Sequence[int], b: Sequence[int]) -> bool:
    pairs = zip(tuple(a)[::-1], tuple(b)[::-1], strict=False)
    return all(p == q or 1 in (p, q) for p, q in pairs)


def recipes(names: Sequence[str] = tuple(OPS), max_size: int = 14) -> st.SearchStrategy[Recipe]:
    """Recipes over the operators called `names`."""
    numbers = [list(OPS).index(name) for name in names]
    step = st.tuples(st.sampled_from(numbers), st.integers(0, 40), st.integers(0, 40))
    return st.lists(step, min_size=1, max_size=max_size)


def _run(recipe: Recipe, sources: list, mean: Callable, function: Callable[[Op], Callable]) -> list:
    values = list(sources)
    for number, i, j in recipe:
        op = list(OPS.values())[number]
        operands = [values[i % len(values)], values[j % len(values)]][: op.arity]
        if op.arity == 2 and not _fits(operands[0].shape, operands[1].shape):
            operands[1] = mean(operands[1])
        # Expansions and concatenations may not grow without end.
        if any(np.prod(v.shape) > 64 or len(v.shape) > 4 for v in operands):
            operands = [mean(v) for v in operands]
        values.append(function(op)(*operands))
    return values


def build(recipe: Recipe) -> Graph:
    """The recipe as a float64 graph: sources `SHAPES`, outputs `last`, `inner`, scalar `loss`."""
    graph = Graph("random")
    sources = [
        (graph.parameter if name == "w" else graph.input)(name, shape, dtype="float64")
        for name, shape in SHAPES.items()
    ]
    values = _run(recipe, sources, ops.mean, lambda op: op.graphc)
    graph.output(last=values[-1], inner=values[len(values) // 2], loss=_loss(values, ops))
    return graph


def _loss(values: list, namespace: Any) -> Any:
    last = [namespace.mean(namespace.tanh(v)) for v in values[-3:]]
    return namespace.add(namespace.add(namespace.mul(last[0], last[1]), last[2]), last[0])


def run_torch(recipe: Recipe, arrays: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradients by PyTorch in float64."""
    torch = _torch()
    sources = [
        torch.tensor(arrays[name], dtype=torch.float64, requires_grad=True) for name in SHAPES
    ]
    values = _run(recipe, sources, lambda v: v.mean(), lambda op: op.torch)
    loss = _loss(values, torch)
    gradients = torch.autograd.grad(loss, sources, allow_unused=True)
    zero = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    return loss.item(), {
        name: zero[name] if g is None else g.numpy()
        for name, g in zip(SHAPES, gradients, strict=True)
    }


def arrays(seed: int) -> dict[str, np.ndarray]:
    """Operand data of a recipe."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def split(data: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs, state) as the interpreter takes them."""
    return {k: v for k, v in data.items() if k != "w"}, {"w": data["w"]}


def one(function, shape=(2, 3), **kwargs) -> Graph:
    graph = Graph("rule")
    graph.output(y=function(graph.input("x", shape, **kwargs)))
    return graph

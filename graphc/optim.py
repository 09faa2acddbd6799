"""Optimizers and learning-rate schedules.

An optimizer is a frozen description. `apply` writes its update into the training graph, next to the
gradients, so that one compiled step is forward, backward and update in one program. The learning
rate is an input of that program: a schedule changes it from call to call without recompilation.

Arithmetic, defaults and order of operations are those of torch.optim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from graphc import errors
from graphc.ir import Graph, Node, TensorType, Value
from graphc.ops.compare import cast
from graphc.ops.elementwise import add, div, expm1, mul, neg, rsqrt, sqrt, square, sub

__all__ = ["SGD", "Adam", "AdamW", "StepLR", "ExponentialLR", "CosineLR", "WarmupCosine"]

LEARNING_RATE = "learning_rate"
STEP = "optimizer.step"


class Optimizer(Protocol):
    """What `gc.compile(optimizer=...)` needs."""

    @property
    def lr(self) -> float: ...

    def apply(self, graph: Graph, grads: Mapping[str, Value]) -> None: ...


class Schedule(Protocol):
    """A learning rate as a function of the step (or the epoch), counted from 0."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum (Sutskever et al. 2013).

    g += weight_decay * p;  v = momentum * v + g;  p -= lr * (g + momentum * v if nesterov else v)
    """

    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise errors.DeclarationError("SGD: nesterov=True needs momentum > 0")

    def apply(self, graph: Graph, grads: Mapping[str, Value]) -> None:
        """Append the update of every parameter in `grads` (name -> gradient value) to the graph.

        Raises NameLookupError, ShapeError."""
        lr = _learning_rate(graph, self.lr)
        for node, g in _parameters(graph, grads):
            p = node[0]
            with graph.origin(node.origin):
                g = _decayed(g, p, self.weight_decay)
                if self.momentum:
                    v = _moment(graph, node, "momentum")
                    # torch.optim starts with v = g, which is momentum * 0 + g.
                    moved = add(mul(v, self.momentum), g)
                    graph.update(v.name, moved)
                    g = add(g, mul(moved, self.momentum)) if self.nesterov else moved
                graph.update(node.name, sub(p, mul(g, _like(lr, p))))


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1); `weight_decay` is an L2 penalty, added to the gradient.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p -= lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) +
    eps)
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_adam(self)

    def apply(self, graph: Graph, grads: Mapping[str, Value]) -> None:
        """Append the update of every parameter in `grads` (name -> gradient value) to the graph.

        Raises NameLookupError, ShapeError."""
        _apply_adam(self, graph, grads, decoupled=False)


@dataclass(frozen=True)
class AdamW:
    """Adam with weight decay apart from the gradient: first p *= 1 - lr * weight_decay.

    (Loshchilov & Hutter 2019, algorithm 2.)
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check_adam(self)

    def apply(self, graph: Graph, grads: Mapping[str, Value]) -> None:
        """Append the update of every parameter in `grads` (name -> gradient value) to the graph.

        Raises NameLookupError, ShapeError."""
        _apply_adam(self, graph, grads, decoupled=True)


def _apply_adam(
    options: Adam | AdamW, graph: Graph, grads: Mapping[str, Value], decoupled: bool
) -> None:
    parameters = _parameters(graph, grads)
    lr = _learning_rate(graph, options.lr)
    first, second = options.betas
    with graph.layer("optimizer"):
        step = graph.state(STEP, (), dtype="int32", persistent=False)
        count = add(step, 1)
        graph.update(STEP, count)
        t = cast(count, "float32")
        # 1 - beta^t by expm1: the difference of two floats near 1 would keep four digits for beta =
        # 0.999.
        step_size = div(lr, _one_minus_power(first, t))
        scale = rsqrt(_one_minus_power(second, t))
        keep = (
            sub(1.0, mul(lr, options.weight_decay)) if decoupled and options.weight_decay else None
        )
    for node, g in parameters:
        p = node[0]
        with graph.origin(node.origin):
            if keep is not None:
                p = mul(p, _like(keep, p))
            elif not decoupled:
                g = _decayed(g, p, options.weight_decay)
            m, v = (_moment(graph, node, name) for name in ("first_moment", "second_moment"))
            new_m = add(m, mul(sub(g, m), 1.0 - first))
            new_v = add(mul(v, second), mul(square(g), 1.0 - second))
            graph.update(m.name, new_m)
            graph.update(v.name, new_v)
            denominator = add(mul(sqrt(new_v), _like(scale, p)), options.eps)
            graph.update(node.name, sub(p, div(mul(new_m, _like(step_size, p)), denominator)))


def _one_minus_power(beta: float, t: Value) -> Value:
    """1 - beta^t as -expm1(t log beta); 1 for beta = 0."""
    if beta == 0:
        return t.graph.constant(1.0, dtype=t.dtype)
    return neg(expm1(mul(t, math.log(beta))))


# ---- what optimizers share


def _learning_rate(graph: Graph, default: float) -> Value:
    attrs = {"type": TensorType((), "float32"), "default": float(default)}
    with graph.layer("optimizer"):
        return graph.add("input", (), attrs, name=LEARNING_RATE)[0]


def _like(scalar: Value, parameter: Value) -> Value:
    return scalar if scalar.dtype == parameter.dtype else cast(scalar, parameter.dtype)


def _parameters(graph: Graph, grads: Mapping[str, Value]) -> list[tuple[Node, Value]]:
    pairs = []
    for name, g in grads.items():
        node = graph.node(name)
        if node.op != "parameter":
            raise errors.DeclarationError(f"{node.describe()}: only parameters are optimized")
        if g.type != node.types[0]:
            raise errors.ShapeError(
                f"{node.describe()}: the gradient {g.name!r} {g.type} must be {node.types[0]}"
            )
        pairs.append((node, g))
    return pairs


def _moment(graph: Graph, node: Node, name: str) -> Value:
    kind = node.types[0]
    state = f"optimizer.{node.name}.{name}"
    return graph.state(state, kind.sizes, dtype=kind.dtype, persistent=False)


def _decayed(g: Value, p: Value, weight_decay: float) -> Value:
    return add(g, mul(p, weight_decay)) if weight_decay else g


def _check(options: object, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0 or math.isinf(value):
            kind = type(options).__name__
            raise errors.DeclarationError(f"{kind}: {name}={value!r} must be a number >= 0")


def _check_adam(options: Adam | AdamW) -> None:
    _check(options, lr=options.lr, eps=options.eps, weight_decay=options.weight_decay)
    if len(options.betas) != 2 or not all(0 <= b < 1 for b in options.betas):
        raise errors.DeclarationError(
            f"{type(options).__name__}: betas={options.betas!r} must be two numbers in [0, 1)"
        )


# ---- schedules


@dataclass(frozen=True)
class StepLR:
    """lr * gamma^floor(step / step_size): torch.optim.lr_scheduler.StepLR."""

    lr: float
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check_steps(self, step_size=self.step_size)

    def __call__(self, step: int) -> float:
        return self.lr * self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class ExponentialLR:
    """lr * gamma^step: torch.optim.lr_scheduler.ExponentialLR."""

    lr: float
    gamma: float

    def __call__(self, step: int) -> float:
        return self.lr * self.gamma**step


@dataclass(frozen=True)
class CosineLR:
    """minimum + (lr - minimum) * (1 + cos(pi * step / total_steps)) / 2, then `minimum`.

    (Loshchilov & Hutter 2017, equation 5; torch.optim.lr_scheduler.CosineAnnealingLR up to
    total_steps.)
    """

    lr: float
    total_steps: int
    minimum: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, total_steps=self.total_steps)

    def __call__(self, step: int) -> float:
        progress = min(step / self.total_steps, 1.0)
        return self.minimum + (self.lr - self.minimum) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WarmupCosine:
    """Linear from lr / warmup_steps up to lr in `warmup_steps` steps, then CosineLR over the rest.

    (Goyal et al. 2017, section 2.2, for the warm-up.)
    """

    lr: float
    warmup_steps: int
    total_steps: int
    minimum: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        if self.warmup_steps >= self.total_steps:
            raise errors.DeclarationError(
                f"WarmupCosine: warmup_steps={self.warmup_steps} must be below "
                f"total_steps={self.total_steps}"
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        rest = CosineLR(self.lr, self.total_steps - self.warmup_steps, self.minimum)
        return rest(step - self.warmup_steps)


def _check_steps(options: object, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            kind = type(options).__name__
            raise errors.DeclarationError(f"{kind}: {name}={value!r} must be at least 1")

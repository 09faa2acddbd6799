"""Reverse-mode differentiation: the chain rule, once over the graph in reverse order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from graphc import errors
from graphc.ir import SOURCES, Graph, Node, Value
from graphc.ops import registry
from passes.base import Pass


@dataclass(frozen=True)
class Autodiff(Pass):
    """Append the gradients of the scalar `loss` with respect to `wrt`, as outputs `grad:<name>`.

    Requires: int dimensions; `loss` names a float scalar, each of `wrt` a float value. Ensures: the
    forward nodes are unchanged, and for each of `wrt` there is an output of the same type. Values
    the loss does not depend on get a gradient of zeros. Raises GradientError and NameLookupError.
    """

    loss: str
    wrt: tuple[str, ...]

    def run(self, graph: Graph) -> Graph:
        new = graph.copy()
        values = [new.value(name) for name in self.wrt]
        gradients = differentiate(new, new.value(self.loss), values)
        for name, gradient in zip(self.wrt, gradients, strict=True):
            new.output(**{f"grad:{name}": gradient})
        return new


@overload
def differentiate(
    graph: Graph,
    loss: Value,
    wrt: Sequence[Value],
    seed: Value | None = None,
    *,
    zeros: Literal[True] = True,
) -> list[Value]: ...


@overload
def differentiate(
    graph: Graph,
    loss: Value,
    wrt: Sequence[Value],
    seed: Value | None = None,
    *,
    zeros: Literal[False],
) -> list[Value | None]: ...


def differentiate(
    graph: Graph,
    loss: Value,
    wrt: Sequence[Value],
    seed: Value | None = None,
    *,
    zeros: bool = True,
) -> Sequence[Value | None]:
    """Append the gradients of `loss` with respect to each of `wrt` and return them, in that order.

    loss: a float scalar, or a value of any shape when `seed`, its cotangent, is given. Each
    gradient has the type of its value. Where the loss does not depend on a value the gradient is
    zeros, or None with `zeros=False`. Gradients are ordinary values and can be differentiated
    again.

    Reverse accumulation (Griewank & Walther 2008, Evaluating Derivatives, section 3.2). Only nodes
    on a path from `wrt` to `loss` are visited, each once, and a value with k uses costs k - 1
    additions: the work is linear in the number of nodes. Nothing that no gradient needs stays in
    the graph, and new nodes take the origin of the node they differentiate.
    Raises GradientError: a loss that is no float scalar, a value of integer type, an operator on
    the path without a chain rule.
    """
    _check_loss(loss, seed)
    for value in wrt:
        if value.node.op == "constant":
            raise errors.GradientError(
                f"{value.node.describe()}: a constant has no gradient; declare it as an input"
            )
        if not value.type.is_float:
            raise errors.GradientError(
                f"{value.node.describe()}: {value.name!r} {value.type} has no gradient: "
                f"only float32 and float64 values have one"
            )
    path, dependent = _path(graph, loss, wrt)
    start = len(graph)
    with graph.origin(loss.node.origin):
        seed = graph.constant(1.0, dtype=loss.dtype, name="one") if seed is None else seed
    cotangents: dict[Value, Value] = {loss: seed}
    for node in reversed(path):
        received = [cotangents.get(value) for value in node.outputs]
        if all(c is None for c in received):
            continue
        with graph.origin(node.origin):
            for value, cotangent in zip(node.inputs, _chain_rule(node, received), strict=True):
                if cotangent is not None and value in dependent:
                    before = cotangents.get(value)
                    cotangents[value] = cotangent if before is None else _add(before, cotangent)
    gradients = [cotangents.get(value) for value in wrt]
    for i, (value, gradient) in enumerate(zip(wrt, gradients, strict=True)):
        if gradient is None:
            _check_not_blocked(path, value)
            gradients[i] = _zeros(value) if zeros else None
    _discard_unused(graph, start, [g for g in gradients if g is not None])
    return gradients


def _check_loss(loss: Value, seed: Value | None) -> None:
    what = f"{loss.node.describe()}: the loss {loss.name!r} {loss.type}"
    if not loss.type.is_float:
        raise errors.GradientError(f"{what} is not of a float type: nothing can be differentiated")
    if seed is None and loss.shape != ():
        raise errors.GradientError(f"{what} is not a scalar: reduce it with gc.mean or gc.sum")
    if seed is not None and seed.type != loss.type:
        raise errors.GradientError(f"{what} cannot take a seed {seed.name!r} of type {seed.type}")


def _path(graph: Graph, loss: Value, wrt: Sequence[Value]) -> tuple[list[Node], set[Value]]:
    """Nodes that depend on `wrt` and that `loss` depends on, in execution order.

    Second result: the values that depend on `wrt` and can carry a cotangent, `wrt` included."""
    needed: set[str] = set()
    stack = [loss.node]
    while stack:
        node = stack.pop()
        if node.name not in needed:
            needed.add(node.name)
            stack.extend(value.node for value in node.inputs)
    dependent = set(wrt)
    path = []
    for node in graph:
        if node.name in needed and any(value in dependent for value in node.inputs):
            dependent.update(node.outputs)
            path.append(node)
    return path, {value for value in dependent if value.type.is_float}


def _chain_rule(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    rule = registry.get(node.op).vjp
    if rule is None:
        raise _no_rule(node)
    result = list(rule(node, cotangents))
    if len(result) != len(node.inputs):
        raise errors.GradientError(
            f"{node.describe()}: the chain rule of {node.op} returned {len(result)} cotangents "
            f"for {len(node.inputs)} operands"
        )
    for slot, (value, cotangent) in enumerate(zip(node.inputs, result, strict=True)):
        if cotangent is not None and value.type.is_float and cotangent.type != value.type:
            raise errors.GradientError(
                f"{node.describe()}: the chain rule of {node.op} returned {cotangent.type} for "
                f"operand {slot} {value.name!r} {value.type}"
            )
    return result


def _no_rule(node: Node) -> errors.GradientError:
    return errors.GradientError(
        f"{node.describe()}: the chain rule of {node.op} is not defined; differentiate with "
        f"respect to other values, or cut the path before it with gc.stop_gradient"
    )


def _check_not_blocked(path: Sequence[Node], value: Value) -> None:
    """A value may be independent of the loss, but not because an operator lacks a chain rule."""
    dependent = {value}
    for node in path:
        if any(v in dependent for v in node.inputs):
            if registry.get(node.op).vjp is None:
                raise _no_rule(node)
            dependent.update(node.outputs)


def _add(a: Value, b: Value) -> Value:
    return a.graph.add("add", (a, b))[0]


def _zeros(value: Value) -> Value:
    graph = value.graph
    with graph.origin(value.node.origin):
        zero = graph.constant(0.0, dtype=value.dtype, name="zero")
        if value.shape == ():
            return zero
        from graphc.ops.shape import expand

        return expand(zero, value.shape)


def _discard_unused(graph: Graph, start: int, keep: Sequence[Value]) -> None:
    """Remove the nodes from number `start` on that `keep` does not need."""
    kept = {value.node.name for value in keep} | {v.node.name for v in graph.results}
    for node in reversed(graph.nodes[start:]):
        if node.op in SOURCES and node.op != "constant":
            continue
        if node.name not in kept and not graph.is_read(node):
            graph.remove(node)

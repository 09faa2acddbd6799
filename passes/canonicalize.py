"""Rewrite the graph with algebra that keeps every result, into one form of each thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphc.ir import Graph, Value
from graphc.ops import registry
from passes.base import Pass, note
from passes.rewrite import Match, Rule, rewrite


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Apply the rules of `RULES` and `POOL_RULES` until none fits.

    At most `sweeps` sweeps, each linear in the number of nodes.
    Requires: int dimensions. Ensures: every output and update has the same value, up to the sign of
    zero and the last bit where a rule says so. No rule computes a value twice.
    move_pools: move relu and bias additions behind a max pool that follows (fewer elements). The
    rule belongs before autodiff, which then differentiates the smaller graph.
    drop_stop_gradient: remove stop_gradient, which means nothing once autodiff has run.
    """

    move_pools: bool = True
    drop_stop_gradient: bool = False
    sweeps: int = 8

    def run(self, graph: Graph) -> Graph:
        everywhere = (constant_operands, expand_later)
        new, fired = rewrite(graph, self._rules(), everywhere, self.sweeps)
        if fired:
            note(new, ", ".join(f"{name} x{count}" for name, count in fired.items()))
        return new

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        rules = dict(RULES)
        if self.move_pools:
            rules.update(POOL_RULES)
        if self.drop_stop_gradient:
            rules["stop_gradient"] = (identity,)
        return rules


def uniform(value: Value) -> float | None:
    """The one number that all elements of a constant have, seen through broadcasting; else None."""
    while value.node.op in ("expand", "reshape"):
        value = value.node.inputs[0]
    if value.node.op != "constant":
        return None
    data = value.node.attrs["value"]
    if data.size == 1:
        return data.item()
    if not data.size or data.size > 4096 or not (data == data.flat[0]).all():
        return None
    return data.flat[0].item()


def _power_of_two(x: float) -> bool:
    """Whether multiplying by x is exact short of over- and underflow."""
    if not isinstance(x, float) or x == 0 or not math.isfinite(x):
        return False
    mantissa, exponent = math.frexp(abs(x))
    return mantissa == 0.5 and abs(exponent) <= 32


def _scalar(match: Match, x: float) -> Value:
    return match.graph.constant(np.asarray(x, match.type.dtype), dtype=match.type.dtype)


# ---- constants

# No constant of more elements is made, unless its operands were as large.
CONSTANT_LIMIT = 1024


def constant_operands(m: Match) -> Value | None:
    """f of constants is a constant, from the NumPy reference. Copies of elements are left to their
    readers, and so are nodes whose mode or seed is still open."""
    if m.op == "expand" or not m.inputs or any(v.node.op != "constant" for v in m.inputs):
        return None
    if any(m.attrs.get(key, 0) is None for key in ("training", "seed")):
        return None
    if m.type.size > max(CONSTANT_LIMIT, sum(v.type.size for v in m.inputs)):
        return None
    arrays = [v.node.attrs["value"] for v in m.inputs]
    with np.errstate(all="ignore"):
        (array,) = registry.get(m.op).evaluate(arrays, m.attrs)
    return m.graph.constant(np.array(array), dtype=m.type.dtype, name=m.node.name)


# ---- arithmetic


def neutral_operand(m: Match) -> Value | None:
    """x + 0, x - 0, x * 1, x / 1, x ** 1 are x."""
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}[m.op]
    a, b = m.inputs
    if a.type == m.type and uniform(b) == neutral:
        return a
    if m.op in ("add", "mul") and b.type == m.type and uniform(a) == neutral:
        return b
    return None


def minus_one(m: Match) -> Value | None:
    """x * -1 and x / -1 are -x."""
    a, b = m.inputs
    if a.type == m.type and uniform(b) == -1:
        return m.emit("neg", a)
    if m.op == "mul" and b.type == m.type and uniform(a) == -1:
        return m.emit("neg", b)
    return None


def add_of_negative(m: Match) -> Value | None:
    """a + -b is a - b."""
    a, b = m.inputs
    if b.node.op == "neg":
        return m.emit("sub", a, b.node.inputs[0])
    if a.node.op == "neg":
        return m.emit("sub", b, a.node.inputs[0])
    return None


def sub_of_negative(m: Match) -> Value | None:
    """a - -b is a + b."""
    a, b = m.inputs
    return m.emit("add", a, b.node.inputs[0]) if b.node.op == "neg" else None


def sub_from_zero(m: Match) -> Value | None:
    """0 - x is -x, up to the sign of zero."""
    a, b = m.inputs
    return m.emit("neg", b) if b.type == m.type and uniform(a) == 0 else None


def neg_of_neg(m: Match) -> Value | None:
    """--x is x."""
    (x,) = m.inputs
    return x.node.inputs[0] if x.node.op == "neg" else None


def neg_of_sub(m: Match) -> Value | None:
    """-(a - b) is b - a, up to the sign of zero."""
    (x,) = m.inputs
    if x.node.op != "sub" or m.take(x) is None:
        return None
    a, b = x.node.inputs
    return m.emit("sub", b, a)


def div_by_power_of_two(m: Match) -> Value | None:
    """x / 2**k is x * 2**-k, exactly."""
    a, b = m.inputs
    divisor = uniform(b)
    if a.type == m.type and divisor is not None and _power_of_two(divisor):
        return m.emit("mul", a, _scalar(m, 1 / divisor))
    return None


def mul_of_mul(m: Match) -> Value | None:
    """(x * c) * d is x * (c * d) where c or d is a power of two, which makes it exact."""
    for x, d in (m.inputs, m.inputs[::-1]):
        outer = uniform(d)
        if outer is None or x.node.op != "mul" or x.type != m.type or not m.type.is_float:
            continue
        for y, c in (x.node.inputs, x.node.inputs[::-1]):
            inner = uniform(c)
            if inner is None or y.type != m.type:
                continue
            product = inner * outer
            if (_power_of_two(inner) or _power_of_two(outer)) and 1e-30 < abs(product) < 1e30:
                return m.emit("mul", y, _scalar(m, product))
    return None


def simple_power(m: Match) -> Value | None:
    """x ** 2, x ** 0.5, x ** -1 have operators of their own (differs at x = -inf for the root)."""
    base, exponent = m.inputs
    power = uniform(exponent)
    op = {2.0: "square", 0.5: "sqrt", -1.0: "reciprocal"}.get(power) if power is not None else None
    return m.emit(op, base) if op and base.type == m.type else None


def idempotent(m: Match) -> Value | None:
    """f(f(x)) is f(x)."""
    (x,) = m.inputs
    return x if x.node.op == m.op else None


def even_function(m: Match) -> Value | None:
    """f(-x) and f(abs(x)) are f(x)."""
    (x,) = m.inputs
    return m.emit(m.op, x.node.inputs[0], **m.attrs) if x.node.op in ("neg", "abs") else None


def constant_condition(m: Match) -> Value | None:
    """where(True, a, b) is a; where(False, a, b) is b."""
    condition, a, b = m.inputs
    value = uniform(condition)
    if value is None:
        return None
    chosen = a if value else b
    return chosen if chosen.type == m.type else m.emit("expand", chosen, shape=m.type.shape)


def expand_later(m: Match) -> Value | None:
    """f(expand(x), y) is f(x, y) where y broadcasts, else expand(f(x, y)): fewer elements.

    For elementwise operators; random ones tell elements apart by their position."""
    if not registry.get(m.op).elementwise or "stream" in m.attrs:
        return None
    if not any(v.node.op == "expand" for v in m.inputs):
        return None
    inputs = [v.node.inputs[0] if v.node.op == "expand" else v for v in m.inputs]
    value = m.emit(m.op, *inputs, **m.attrs)
    return value if value.type == m.type else m.emit("expand", value, shape=m.type.shape)


# ---- shapes


def identity(m: Match) -> Value | None:
    """A reshape, expand, pad, slice, cast or concatenation that changes nothing."""
    return m.inputs[0] if len(m.inputs) == 1 and m.inputs[0].type == m.type else None


def reshape_of_reshape(m: Match) -> Value | None:
    """Only the last of two reshapes matters."""
    (x,) = m.inputs
    return m.emit("reshape", x.node.inputs[0], **m.attrs) if x.node.op == "reshape" else None


def reshape_of_expanded_scalar(m: Match) -> Value | None:
    """A reshape of copies of one element is copies of that element."""
    (x,) = m.inputs
    if x.node.op != "expand" or x.node.inputs[0].type.size != 1:
        return None
    scalar = m.emit("reshape", x.node.inputs[0], shape=())
    return m.emit("expand", scalar, shape=m.type.shape)


def expand_of_expand(m: Match) -> Value | None:
    """Only the last of two expansions matters."""
    (x,) = m.inputs
    return m.emit("expand", x.node.inputs[0], **m.attrs) if x.node.op == "expand" else None


def transpose_of_transpose(m: Match) -> Value | None:
    """Two transposes are one, or none."""
    (x,) = m.inputs
    axes = m.attrs["axes"]
    if axes == tuple(range(x.rank)):
        return x
    if x.node.op != "transpose":
        return None
    inner = x.node.attrs["axes"]
    return m.emit("transpose", x.node.inputs[0], axes=tuple(inner[a] for a in axes))


def transpose_of_product(m: Match) -> Value | None:
    """(a @ b).T is b.T @ a.T.

    The gradient of a transposed weight comes out in the weight's own axes."""
    (x,) = m.inputs
    if x.node.op != "matmul" or x.rank != 2 or m.attrs["axes"] != (1, 0):
        return None
    a, b = x.node.inputs
    if a.rank != 2 or b.rank != 2 or m.take(x) is None:
        return None
    left, right = (m.emit("transpose", v, axes=(1, 0)) for v in (b, a))
    return m.emit("matmul", left, right)


# ---- max pooling


def relu_after_max_pool(m: Match) -> Value | None:
    """max_pool(relu(x)) is relu(max_pool(x)), on fewer elements.

    relu is non-decreasing, so it commutes with a maximum. The gradient is the same as well: where a
    window's maximum is positive, x and relu(x) have it at the same places, so the same first one is
    chosen. Where it is not, all of relu(x) is 0 and another element may be chosen, but relu's own
    derivative is 0 there and nothing flows. (A window of padding alone, possible with dilation
    only, would give relu(-inf): such pools are left.)
    """
    (x,) = m.inputs
    if x.node.op != "relu" or (m.attrs["dilation"] != (1, 1) and any(map(any, m.attrs["padding"]))):
        return None
    relu = m.take(x)
    return m.again(relu, m.again(m.node, relu.inputs[0])) if relu else None


def bias_after_max_pool(m: Match) -> Value | None:
    """max_pool(x + b) is max_pool(x) + b for a b that is constant over height and width.

    Adding b and rounding is non-decreasing, so the results agree to the last bit. Elements that are
    different in x can become equal when b is added: the gradient then goes to the larger of x, not
    to the first, which is as good a subgradient.
    """
    (total,) = m.inputs
    if total.node.op != "add":
        return None
    a, b = total.node.inputs
    if a.type != total.type:
        a, b = b, a
    if a.type != total.type or any(d != 1 for d in b.shape[-2:]):
        return None
    add = m.take(total)
    return m.again(add, m.again(m.node, a), b) if add else None


RULES: dict[str, tuple[Rule, ...]] = {
    "add": (neutral_operand, add_of_negative),
    "sub": (neutral_operand, sub_of_negative, sub_from_zero),
    "mul": (neutral_operand, minus_one, mul_of_mul),
    "div": (neutral_operand, minus_one, div_by_power_of_two),
    "pow": (neutral_operand, simple_power),
    "neg": (neg_of_neg, neg_of_sub),
    "relu": (idempotent,),
    "abs": (idempotent, even_function),
    "square": (even_function,),
    "cos": (even_function,),
    "where": (constant_condition,),
    "cast": (identity,),
    "expand": (identity, expand_of_expand),
    "slice": (identity,),
    "pad": (identity,),
    "concat": (identity,),
    "transpose": (transpose_of_transpose, transpose_of_product),
    "reshape": (identity, reshape_of_reshape, reshape_of_expanded_scalar),
}

POOL_RULES: dict[str, tuple[Rule, ...]] = {"max_pool2d": (relu_after_max_pool, bias_after_max_pool)}

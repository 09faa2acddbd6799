"""Elementwise arithmetic and functions, with NumPy broadcasting.

Integer operands are welcome where the result is an integer; they get no gradient. Numbers and
arrays given beside a value become constants of its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from graphc.expr import call
from graphc.ir import Value
from graphc.ops.compare import eq, ge, gt, logical_and, lt, where
from graphc.ops.pointwise import define_binary, define_unary, operands
from graphc.ops.registry import apply

__all__ = ["add", "sub", "mul", "div", "pow", "maximum", "minimum", "neg", "abs", "sign", "square"]
__all__ += ["reciprocal", "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "erf"]
__all__ += ["floor", "ceil"]


# ---- two operands


def add(a: Any, b: Any, name: str | None = None) -> Value:
    """a + b, broadcast."""
    return apply("add", *operands(a, b), name=name)[0]


def sub(a: Any, b: Any, name: str | None = None) -> Value:
    """a - b, broadcast."""
    return apply("sub", *operands(a, b), name=name)[0]


def mul(a: Any, b: Any, name: str | None = None) -> Value:
    """a * b, broadcast."""
    return apply("mul", *operands(a, b), name=name)[0]


def div(a: Any, b: Any, name: str | None = None) -> Value:
    """a / b of floats, broadcast."""
    return apply("div", *operands(a, b), name=name)[0]


def pow(a: Any, b: Any, name: str | None = None) -> Value:
    """a ** b of floats, broadcast. The gradients at a = 0 and at b = 0 are PyTorch's."""
    return apply("pow", *operands(a, b), name=name)[0]


def maximum(a: Any, b: Any, name: str | None = None) -> Value:
    """The larger of a and b, broadcast; equal ones share the gradient evenly, as in PyTorch."""
    return apply("maximum", *operands(a, b), name=name)[0]


def minimum(a: Any, b: Any, name: str | None = None) -> Value:
    """The smaller of a and b, broadcast; equal ones share the gradient evenly, as in PyTorch."""
    return apply("minimum", *operands(a, b), name=name)[0]


def _pow_base(a: Value, b: Value, y: Value, g: Value) -> Value:
    if b.node.op == "constant" and np.all(b.node.attrs["value"] != 0):
        return mul(g, mul(b, pow(a, b.node.attrs["value"] - 1)))
    # b * a**(b-1) is 0 * inf at a = b = 0, where the derivative is 0.
    return where(eq(b, 0.0), 0.0, mul(g, mul(b, pow(a, sub(b, 1.0)))))


def _pow_exponent(a: Value, b: Value, y: Value, g: Value) -> Value:
    # y * log(a) is 0 * -inf at a = 0, where the derivative is 0 for b >= 0.
    return where(logical_and(eq(a, 0.0), ge(b, 0.0)), 0.0, mul(g, mul(y, log(a))))


def _pick(compare: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    """The cotangent of the operand that `compare(a, b)` chooses."""
    return lambda a, b, y, g: where(eq(a, b), mul(g, 0.5), where(compare(a, b), g, 0.0))


define_binary(
    "add",
    np.add,
    (lambda a, b, y, g: g, lambda a, b, y, g: g),
    lambda a, b: call("add", a, b),
)
define_binary(
    "sub",
    np.subtract,
    (lambda a, b, y, g: g, lambda a, b, y, g: neg(g)),
    lambda a, b: call("sub", a, b),
)
define_binary(
    "mul",
    np.multiply,
    (lambda a, b, y, g: mul(g, b), lambda a, b, y, g: mul(g, a)),
    lambda a, b: call("mul", a, b),
)
define_binary(
    "div",
    np.divide,
    (lambda a, b, y, g: div(g, b), lambda a, b, y, g: neg(mul(div(g, b), y))),
    lambda a, b: call("div", a, b),
    kind="float",
    right=(0.5, 2.0),
)
define_binary(
    "pow",
    np.power,
    (_pow_base, _pow_exponent),
    lambda a, b: call("pow", a, b),
    kind="float",
    left=(0.5, 2.0),
)
define_binary("maximum", np.maximum, (_pick(gt), _pick(lt)), lambda a, b: call("maximum", a, b))
define_binary("minimum", np.minimum, (_pick(lt), _pick(gt)), lambda a, b: call("minimum", a, b))


# ---- one operand


def neg(x: Value, name: str | None = None) -> Value:
    """-x."""
    return apply("neg", x, name=name)[0]


def abs(x: Value, name: str | None = None) -> Value:
    """|x|, with gradient 0 at 0."""
    return apply("abs", x, name=name)[0]


def sign(x: Value, name: str | None = None) -> Value:
    """-1, 0 or 1, in x's dtype. No gradient flows."""
    return apply("sign", x, name=name)[0]


def square(x: Value, name: str | None = None) -> Value:
    """x * x."""
    return apply("square", x, name=name)[0]


def reciprocal(x: Value, name: str | None = None) -> Value:
    """1 / x of floats."""
    return apply("reciprocal", x, name=name)[0]


def sqrt(x: Value, name: str | None = None) -> Value:
    """Square root of floats, with gradient inf at 0."""
    return apply("sqrt", x, name=name)[0]


def rsqrt(x: Value, name: str | None = None) -> Value:
    """1 / sqrt(x) of floats."""
    return apply("rsqrt", x, name=name)[0]


def exp(x: Value, name: str | None = None) -> Value:
    """e ** x of floats."""
    return apply("exp", x, name=name)[0]


def expm1(x: Value, name: str | None = None) -> Value:
    """exp(x) - 1 of floats, accurate near 0."""
    return apply("expm1", x, name=name)[0]


def log(x: Value, name: str | None = None) -> Value:
    """Natural logarithm of floats."""
    return apply("log", x, name=name)[0]


def log1p(x: Value, name: str | None = None) -> Value:
    """log(1 + x) of floats, accurate near 0."""
    return apply("log1p", x, name=name)[0]


def sin(x: Value, name: str | None = None) -> Value:
    """Sine of floats, in radians."""
    return apply("sin", x, name=name)[0]


def cos(x: Value, name: str | None = None) -> Value:
    """Cosine of floats, in radians."""
    return apply("cos", x, name=name)[0]


def erf(x: Value, name: str | None = None) -> Value:
    """The error function 2/sqrt(pi) * integral of exp(-t**2) from 0 to x, of floats."""
    return apply("erf", x, name=name)[0]


def floor(x: Value, name: str | None = None) -> Value:
    """The largest integer <= x, as a float. No gradient flows."""
    return apply("floor", x, name=name)[0]


def ceil(x: Value, name: str | None = None) -> Value:
    """The smallest integer >= x, as a float. No gradient flows."""
    return apply("ceil", x, name=name)[0]


_ERF_STEP = 1 / 16


@lru_cache(maxsize=1)
def _erf_table() -> np.ndarray:
    """Taylor coefficients of erf around each multiple of the step in [-6, 6], a row for each order.

    The derivatives are Hermite polynomials, erf^(n+1)(x) = 2/sqrt(pi) (-1)^n H_n(x) exp(-x**2)
    (Abramowitz and Stegun, 7.1.19)."""
    x = np.arange(-96, 97) * _ERF_STEP
    hermite = [np.ones_like(x), 2 * x]
    while len(hermite) < 9:
        n = len(hermite) - 1
        hermite.append(2 * x * hermite[-1] - 2 * n * hermite[-2])
    scale = 2 / math.sqrt(math.pi) * np.exp(-x * x)
    rows = [np.array([math.erf(v) for v in x])]
    rows += [(-1) ** n * h * scale / math.factorial(n + 1) for n, h in enumerate(hermite)]
    return np.array(rows)


def erf_reference(x: np.ndarray) -> np.ndarray:
    """erf of a float array, which NumPy lacks: in float64, with absolute error below 3e-16."""
    clipped = np.clip(np.asarray(x, dtype=np.float64), -6.0, 6.0)
    nearest = np.rint(np.nan_to_num(clipped) / _ERF_STEP).astype(np.intp)
    offset = clipped - nearest * _ERF_STEP
    result = np.zeros_like(offset)
    for row in _erf_table()[::-1]:
        result = result * offset + row[nearest + 96]
    return result


define_unary("neg", np.negative, lambda x, y, g: neg(g), lambda x: call("neg", x), kind="number")
define_unary(
    "abs", np.abs, lambda x, y, g: mul(g, sign(x)), lambda x: call("abs", x), kind="number"
)
define_unary("sign", np.sign, lambda x, y, g: None, lambda x: call("sign", x), kind="number")
define_unary(
    "square",
    np.square,
    lambda x, y, g: mul(g, mul(x, 2.0)),
    lambda x: call("mul", x, x),
    kind="number",
)
define_unary(
    "reciprocal",
    lambda x: 1 / x,
    lambda x, y, g: neg(mul(g, square(y))),
    lambda x: call("reciprocal", x),
    low=0.5,
)
define_unary(
    "sqrt",
    np.sqrt,
    lambda x, y, g: div(g, mul(y, 2.0)),
    lambda x: call("sqrt", x),
    low=0.5,
)
define_unary(
    "rsqrt",
    lambda x: 1 / np.sqrt(x),
    lambda x, y, g: mul(mul(g, -0.5), mul(y, square(y))),
    lambda x: call("rsqrt", x),
    low=0.5,
)
define_unary("exp", np.exp, lambda x, y, g: mul(g, y), lambda x: call("exp", x))
define_unary("expm1", np.expm1, lambda x, y, g: mul(g, add(y, 1.0)), lambda x: call("expm1", x))
define_unary("log", np.log, lambda x, y, g: div(g, x), lambda x: call("log", x), low=0.5)
define_unary(
    "log1p", np.log1p, lambda x, y, g: div(g, add(x, 1.0)), lambda x: call("log1p", x), low=-0.5
)
define_unary("sin", np.sin, lambda x, y, g: mul(g, cos(x)), lambda x: call("sin", x))
define_unary("cos", np.cos, lambda x, y, g: neg(mul(g, sin(x))), lambda x: call("cos", x))
define_unary(
    "erf",
    erf_reference,
    lambda x, y, g: mul(g, mul(exp(neg(square(x))), 2 / math.sqrt(math.pi))),
    lambda x: call("erf", x),
)
define_unary("floor", np.floor, lambda x, y, g: None, lambda x: call("floor", x))
define_unary("ceil", np.ceil, lambda x, y, g: None, lambda x: call("ceil", x))

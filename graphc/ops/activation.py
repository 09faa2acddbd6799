"""Activation functions of floats, with PyTorch's definitions and defaults."""

from __future__ import annotations

import math

import numpy as np

from graphc import errors
from graphc.expr import Expr, call, select
from graphc.ir import Value
from graphc.ops.compare import ge, gt, le, logical_and, where
from graphc.ops.elementwise import add, erf, erf_reference, exp, mul, square, sub
from graphc.ops.pointwise import define_unary
from graphc.ops.registry import apply, here

__all__ = [
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "softplus",
    "sigmoid",
    "tanh",
    "clip",
]

# Self-normalizing neural networks (Klambauer et al. 2017), section 2 and PyTorch's digits.
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
# Gaussian error linear units (Hendrycks and Gimpel 2016), section 2.
_GELU_CUBIC = 0.044715
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def relu(x: Value, name: str | None = None) -> Value:
    """max(x, 0), with gradient 0 at 0."""
    return apply("relu", x, name=name)[0]


def leaky_relu(x: Value, negative_slope: float = 0.01, name: str | None = None) -> Value:
    """x where x > 0, negative_slope * x elsewhere."""
    return apply("leaky_relu", x, name=name, negative_slope=float(negative_slope))[0]


def elu(x: Value, alpha: float = 1.0, name: str | None = None) -> Value:
    """x where x > 0, alpha * (exp(x) - 1) elsewhere (Clevert et al. 2015)."""
    return apply("elu", x, name=name, alpha=float(alpha))[0]


def selu(x: Value, name: str | None = None) -> Value:
    """The scaled elu whose activations keep mean 0 and variance 1 (Klambauer et al. 2017)."""
    return apply("selu", x, name=name)[0]


def gelu(x: Value, approximate: str = "none", name: str | None = None) -> Value:
    """x times the normal distribution's cumulative density at x (Hendrycks and Gimpel 2016).

    `approximate="tanh"`: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))."""
    if approximate not in ("none", "tanh"):
        raise errors.DeclarationError(
            f"gelu of {x.name!r}: approximate={approximate!r} is neither 'none' nor 'tanh'"
        )
    return apply("gelu", x, name=name, approximate=approximate)[0]


def silu(x: Value, name: str | None = None) -> Value:
    """x * sigmoid(x), also known as swish."""
    return apply("silu", x, name=name)[0]


def softplus(
    x: Value, beta: float = 1.0, threshold: float = 20.0, name: str | None = None
) -> Value:
    """log(1 + exp(beta x)) / beta, and x itself where beta x > threshold."""
    if not beta > 0:
        raise errors.DeclarationError(f"softplus of {x.name!r}: beta={beta!r} is not above 0")
    return apply("softplus", x, name=name, beta=float(beta), threshold=float(threshold))[0]


def sigmoid(x: Value, name: str | None = None) -> Value:
    """1 / (1 + exp(-x))."""
    return apply("sigmoid", x, name=name)[0]


def tanh(x: Value, name: str | None = None) -> Value:
    """Hyperbolic tangent."""
    return apply("tanh", x, name=name)[0]


def clip(
    x: Value, min: float | None = None, max: float | None = None, name: str | None = None
) -> Value:
    """x limited to [min, max]; None: no limit. The gradient passes where min <= x <= max.

    As in torch.clamp, `max` wins where min > max."""
    if min is None and max is None:
        raise errors.DeclarationError(f"{here()}clip of {x.name!r}: give min, max or both")
    return apply("clip", x, name=name, min=_limit(x, min), max=_limit(x, max))[0]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # exp overflows to inf far below zero, where 1 / inf is the right limit.
    return 1 / (1 + np.exp(-x))


define_unary(
    "relu",
    lambda x: np.maximum(x, np.zeros_like(x)),
    lambda x, y, g: where(gt(y, 0.0), g, 0.0),
    lambda x: call("relu", x),
)
define_unary(
    "leaky_relu",
    lambda x, negative_slope: np.where(x > 0, x, x * negative_slope),
    lambda x, y, g, negative_slope: where(gt(x, 0.0), g, mul(g, negative_slope)),
    lambda x, negative_slope: select(x > 0.0, x, x * negative_slope),
    attrs=({"negative_slope": 0.01}, {"negative_slope": 0.5}),
)
define_unary(
    "sigmoid", _sigmoid, lambda x, y, g: mul(g, mul(y, sub(1.0, y))), lambda x: call("sigmoid", x)
)
define_unary(
    "tanh", np.tanh, lambda x, y, g: mul(g, sub(1.0, square(y))), lambda x: call("tanh", x)
)


# ---- elu and selu


def _elu(x: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _elu_scalar(x: Expr, alpha: float) -> Expr:
    return select(x > 0.0, x, call("expm1", call("minimum", x, 0.0)) * alpha)


define_unary(
    "elu",
    _elu,
    # Where x <= 0: alpha exp(x) = y + alpha.
    lambda x, y, g, alpha: where(gt(x, 0.0), g, mul(g, add(y, alpha))),
    _elu_scalar,
    attrs=({"alpha": 1.0}, {"alpha": 0.5}),
)
define_unary(
    "selu",
    lambda x: _SELU_SCALE * _elu(x, _SELU_ALPHA),
    lambda x, y, g: where(
        gt(x, 0.0), mul(g, _SELU_SCALE), mul(g, add(y, _SELU_SCALE * _SELU_ALPHA))
    ),
    lambda x: _elu_scalar(x, _SELU_ALPHA) * _SELU_SCALE,
)


# ---- gelu, silu, softplus


def _gelu(x: np.ndarray, approximate: str) -> np.ndarray:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(_SQRT_2_OVER_PI * (x + _GELU_CUBIC * x * x * x)))
    return 0.5 * x * (1 + erf_reference(x * math.sqrt(0.5)))


def _gelu_scalar(x: Expr, approximate: str) -> Expr:
    if approximate == "tanh":
        inner = (x + x * x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI
        return x * 0.5 * (call("tanh", inner) + 1.0)
    return x * 0.5 * (call("erf", x * math.sqrt(0.5)) + 1.0)


def _gelu_derivative(x: Value, y: Value, g: Value, approximate: str) -> Value:
    if approximate == "tanh":
        x2 = square(x)
        t = tanh(mul(mul(x, add(mul(x2, _GELU_CUBIC), 1.0)), _SQRT_2_OVER_PI))
        inner = mul(add(mul(x2, 3 * _GELU_CUBIC), 1.0), _SQRT_2_OVER_PI)
        slope = add(mul(add(t, 1.0), 0.5), mul(mul(x, 0.5), mul(sub(1.0, square(t)), inner)))
        return mul(g, slope)
    cumulative = mul(add(erf(mul(x, math.sqrt(0.5))), 1.0), 0.5)
    density = mul(exp(mul(square(x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return mul(g, add(cumulative, mul(x, density)))


define_unary(
    "gelu",
    _gelu,
    _gelu_derivative,
    _gelu_scalar,
    attrs=({"approximate": "none"}, {"approximate": "tanh"}),
)


def _silu_derivative(x: Value, y: Value, g: Value) -> Value:
    s = sigmoid(x)
    return mul(g, mul(s, add(mul(x, sub(1.0, s)), 1.0)))


define_unary(
    "silu",
    lambda x: x * _sigmoid(x),
    _silu_derivative,
    lambda x: x * call("sigmoid", x),
)


def _softplus(x: np.ndarray, beta: float, threshold: float) -> np.ndarray:
    t = x * beta
    return np.where(t > threshold, x, (np.maximum(t, 0) + np.log1p(np.exp(-np.abs(t)))) / beta)


def _softplus_scalar(x: Expr, beta: float, threshold: float) -> Expr:
    # log(1 + exp(t)) = max(t, 0) + log(1 + exp(-|t|)), which cannot overflow.
    t = x * beta
    stable = call("maximum", t, 0.0) + call("log1p", call("exp", -call("abs", t)))
    return select(t > threshold, x, stable / beta)


def _softplus_derivative(x: Value, y: Value, g: Value, beta: float, threshold: float) -> Value:
    t = mul(x, beta)
    return where(gt(t, threshold), g, mul(g, sigmoid(t)))


define_unary(
    "softplus",
    _softplus,
    _softplus_derivative,
    _softplus_scalar,
    attrs=({"beta": 1.0, "threshold": 20.0}, {"beta": 3.0, "threshold": 1.0}),
)


# ---- clip


def _limit(x: Value, limit: float | None) -> float | None:
    """A limit in x's kind of number. Raises DTypeError where that would lose a fraction."""
    if limit is None or x.type.is_float:
        return None if limit is None else float(limit)
    if limit != int(limit):
        raise errors.DTypeError(
            f"{here()}clip of {x.name!r} {x.type}: the limit {limit!r} is not an integer"
        )
    return int(limit)


def _clip(x: np.ndarray, min: float | None, max: float | None) -> np.ndarray:
    x = x if min is None else np.maximum(x, np.asarray(min, dtype=x.dtype))
    return x if max is None else np.minimum(x, np.asarray(max, dtype=x.dtype))


def _clip_scalar(x: Expr, min: float | None, max: float | None) -> Expr:
    x = x if min is None else call("maximum", x, min)
    return x if max is None else call("minimum", x, max)


def _clip_derivative(x: Value, y: Value, g: Value, min: float | None, max: float | None) -> Value:
    tests = ([ge(x, min)] if min is not None else []) + ([le(x, max)] if max is not None else [])
    return where(tests[0] if len(tests) == 1 else logical_and(tests[0], tests[1]), g, 0.0)


define_unary(
    "clip",
    _clip,
    _clip_derivative,
    _clip_scalar,
    kind="number",
    attrs=({"min": -1, "max": 1}, {"min": 0, "max": None}, {"min": None, "max": 1}),
)

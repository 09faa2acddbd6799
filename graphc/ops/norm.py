"""Batch normalisation (Ioffe & Szegedy 2015) of values [N,C,...] per channel, with PyTorch's
conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.ir import Node, TensorType, Value
from graphc.ops.broadcast import same_dtype
from graphc.ops.elementwise import add, div, mul, rsqrt, square, sub
from graphc.ops.reduce import sum as reduce_sum
from graphc.ops.registry import Attrs, OpDef, Sample, apply, lift, register
from graphc.ops.shape import reshape

__all__ = ["batch_norm"]


def batch_norm(
    x: Value,
    weight: Value,
    bias: Value,
    running_mean: Value,
    running_var: Value,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool | None = None,
    name: str | None = None,
) -> tuple[Value, Value, Value]:
    """(x - mean) / sqrt(var + eps) * weight + bias per channel (axis 1) of x[N,C,...].

    Returns (y, new running mean, new running var). In training, mean and (biased) variance are
    those of x, and the running ones move by `momentum` toward the mean and the unbiased variance;
    otherwise the running ones are used and returned unchanged. `training=None` is decided when the
    graph is compiled. No gradient flows to or from the running statistics. The other operands are
    [C]. Raises ShapeError, DTypeError.
    """
    operands = (x, *(lift(v, x) for v in (weight, bias, running_mean, running_var)))
    node = apply(
        "batch_norm",
        *operands,
        name=name,
        momentum=float(momentum),
        eps=float(eps),
        training=training,
    )
    y, new_mean, new_var = node.outputs
    return y, new_mean, new_var


def _infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    x = types[0]
    dtype = same_dtype(types)
    if not x.is_float:
        raise errors.DTypeError(
            f"input {x} must be float32 or float64; convert it with gc.cast(x, 'float32')"
        )
    if x.rank < 2:
        raise errors.ShapeError(f"input {x} must be [N,C,...]")
    for t, what in zip(types[1:], ("weight", "bias", "running mean", "running var"), strict=True):
        if t.shape != x.shape[1:2]:
            raise errors.ShapeError(
                f"{what} {t} must have shape [{x.shape[1]}], one element per channel of {x}"
            )
    over = (x.shape[0], *x.shape[2:])
    if attrs["training"] and all(isinstance(d, int) for d in over) and _count(x) < 2:
        raise errors.ShapeError(
            f"input {x} has {_count(x)} elements per channel: training needs two or more for a "
            f"variance; use a larger batch or training=False"
        )
    channels = TensorType(x.shape[1:2], dtype)
    return [x, channels, channels]


def _axes(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank))


def _evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, weight, bias, running_mean, running_var = arrays
    wide = (-1, *(1,) * (x.ndim - 2))
    mu, var = running_mean, running_var
    if attrs["training"]:
        mu, var = x.mean(axis=_axes(x.ndim)), x.var(axis=_axes(x.ndim))
        count = x.size // x.shape[1]
        momentum = attrs["momentum"]
        running_mean = running_mean * (1 - momentum) + mu * momentum
        running_var = running_var * (1 - momentum) + var * (momentum * count / (count - 1))
    scale = weight / np.sqrt(var + attrs["eps"])
    return [
        (x - mu.reshape(wide)) * scale.reshape(wide) + bias.reshape(wide),
        running_mean,
        running_var,
    ]


# ---- in graph operators


def _per_channel(v: Value, rank: int) -> Value:
    """[C] as [C,1,1,...], which broadcasts against [N,C,...]."""
    return reshape(v, (v.shape[0], *(1,) * (rank - 2))) if rank > 2 else v


def _statistics(x: Value) -> tuple[Value, Value]:
    """Mean and biased variance of each channel, as [1,C,1,...], exact for data far from 0.

    Those of each image first, which its own kernel can gather while the image is in the cache; the
    variance of all is the mean of theirs plus the variance of their means (Chan, Golub & LeVeque
    1979, for parts of equal size)."""
    pixels = _axes(x.rank)[1:]
    each, within = x, None
    if pixels:
        each = _mean(x, pixels)
        within = _mean(square(sub(x, each)), pixels)
    mu = _mean(each, (0,))
    between = square(sub(each, mu))
    spread = between if within is None else add(within, between)
    return mu, _mean(spread, (0,))


def _mean(x: Value, axes: tuple[int, ...]) -> Value:
    """The mean over axes, which stay as 1, in the operators that `mean` is made of: what batch norm
    decomposes into has no more parts."""
    return div(reduce_sum(x, axis=axes, keepdims=True), float(math.prod(x.sizes[a] for a in axes)))


def _channel_sum(x: Value) -> Value:
    """Sum over all but channels, as [1,C,1,...]: of each image, then over images."""
    pixels = _axes(x.rank)[1:]
    each = reduce_sum(x, axis=pixels, keepdims=True) if pixels else x
    return reduce_sum(each, axis=0, keepdims=True)


def _normalised(
    node: Node, operands: Sequence[Value]
) -> tuple[Value, Value, Value | None, Value | None]:
    """(x - mean) / sqrt(var + eps), 1 / sqrt(var + eps), and in training the batch's mean and
    variance."""
    x, _, _, running_mean, running_var = operands
    if node.attrs["training"]:
        mu, var = _statistics(x)
        inverse = rsqrt(add(var, node.attrs["eps"]))
        return mul(sub(x, mu), inverse), inverse, mu, var
    inverse = _per_channel(rsqrt(add(running_var, node.attrs["eps"])), x.rank)
    return mul(sub(x, _per_channel(running_mean, x.rank)), inverse), inverse, None, None


def _decompose(node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    x, weight, bias, running_mean, running_var = operands
    unit, _, mu, var = _normalised(node, operands)
    y = add(mul(unit, _per_channel(weight, x.rank)), _per_channel(bias, x.rank))
    if mu is None or var is None:
        return y, running_mean, running_var
    momentum, count = node.attrs["momentum"], _count(x)

    def moved(running: Value, batch: Value, scale: float) -> Value:
        return add(
            mul(running, 1.0 - momentum), mul(reshape(batch, running.shape), momentum * scale)
        )

    return y, moved(running_mean, mu, 1.0), moved(running_var, var, count / (count - 1))


def _count(x: Value | TensorType) -> int:
    """Elements per channel."""
    return math.prod(x.sizes[i] for i in _axes(x.rank))


def _vjp(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    """With u = (x - mean) / s, s = sqrt(var + eps) and m elements per channel,

        dx = weight / s * (dy - sum(dy) / m - u * sum(dy * u) / m)

    (the paper's section 3, simplified): one pass for both sums, one for dx.
    """
    g, x, weight = cotangents[0], node.inputs[0], node.inputs[1]
    if g is None:
        return (None,) * 5
    unit, inverse, mu, _ = _normalised(node, node.inputs)
    total, along = _channel_sum(g), _channel_sum(mul(g, unit))
    scale = mul(inverse, _per_channel(weight, x.rank))
    if mu is None:
        gx = mul(g, scale)
    else:
        share = 1.0 / _count(x)
        gx = mul(scale, sub(sub(g, mul(total, share)), mul(unit, mul(along, share))))
    return gx, reshape(along, weight.shape), reshape(total, weight.shape), None, None


def _samples() -> list[Sample]:
    rng = np.random.default_rng(60)
    samples = []
    for shape, training in (
        ((3, 2, 5, 7), True),
        ((3, 2, 5, 7), False),
        ((3, 2, 5, 7), None),
        ((17, 3), True),
        ((2, 1, 7), True),
        ((1, 2, 3, 1), True),
        ((1, 3), False),
        ((0, 2, 3, 3), False),
    ):
        c = shape[1]
        channel: list[Any] = [rng.standard_normal(c) for _ in range(3)]
        operands = (3 * rng.standard_normal(shape) + 1, *channel, rng.uniform(0.5, 2, c))
        attrs = {"momentum": 0.1, "eps": 1e-5, "training": training}
        samples.append(Sample(operands, attrs, grad=(0, 1, 2)))
    samples.append(
        Sample(samples[0].inputs, {"momentum": 0.4, "eps": 0.01, "training": True}, grad=(0, 1, 2))
    )
    return samples


register(OpDef("batch_norm", _infer, _evaluate, _vjp, None, _samples, _decompose))

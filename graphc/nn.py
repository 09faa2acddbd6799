"""Layers: an operator together with its parameters and their initialisers.

Names, layouts and default initial distributions of parameters are PyTorch's (`conv1.weight` [out,
in, kh, kw], `fc1.weight` [out, in], `bn.running_mean`), so state dictionaries move between the two
unchanged. Every node of a layer has the layer's name as its origin, and the layer's main operator
carries the name itself. Without a name a layer takes the first free one: `linear1`, `linear2`, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphc import errors, init
from graphc.ir import Dimension, Value
from graphc.ops.conv import conv2d as _conv2d
from graphc.ops.elementwise import add
from graphc.ops.matmul import matmul
from graphc.ops.norm import batch_norm
from graphc.ops.random import dropout as _dropout
from graphc.ops.shape import transpose
from graphc.ops.window import naming, pair

__all__ = ["linear", "conv2d", "batch_norm2d", "dropout", "init"]

# PyTorch's choice for every linear and convolution layer: uniform within 1 / sqrt(fan_in).
_WEIGHT = init.KaimingUniform(a=math.sqrt(5))


def linear(
    x: Value,
    out_features: int,
    bias: bool = True,
    name: str | None = None,
    weight_init: Any = _WEIGHT,
    bias_init: Any = "default",
) -> Value:
    """x @ weight.T + bias: [..., in] -> [..., out_features].

    Parameters `<name>.weight` [out_features, in] and `<name>.bias` [out_features]. Raises
    ShapeError.
    """
    name = _layer_name(x, name, "linear")
    features = _known(x, -1, name, "linear", "features") if x.rank else 0
    if not features:
        raise errors.ShapeError(
            f"{name} (linear): input {x.name!r} {x.type} has no features along its last axis"
        )
    graph = x.graph
    with graph.layer(name):
        weight = graph.parameter(
            f"{name}.weight", (out_features, features), weight_init, dtype=x.dtype
        )
        y = matmul(x, transpose(weight), name=name)
        if not bias:
            return y
        offset = graph.parameter(
            f"{name}.bias", (out_features,), _bias_init(bias_init, features), dtype=x.dtype
        )
        return add(y, offset, name=f"{name}.add")


def conv2d(
    x: Value,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
    name: str | None = None,
    weight_init: Any = _WEIGHT,
    bias_init: Any = "default",
) -> Value:
    """Convolution of images [N,C,H,W] -> [N,out_channels,OH,OW]; arguments as gc.conv2d.

    Parameters `<name>.weight` [out_channels, C/groups, KH, KW] and `<name>.bias` [out_channels].
    Raises ShapeError.
    """
    name = _layer_name(x, name, "conv2d")
    if x.rank != 4:
        raise errors.ShapeError(
            f"{name} (conv2d): input {x.name!r} {x.type} must have 4 dimensions [N,C,H,W]"
        )
    channels = _known(x, 1, name, "conv2d", "channels")
    if groups < 1 or channels % groups or out_channels % groups:
        raise errors.ShapeError(
            f"{name} (conv2d): groups={groups} must divide the {channels} channels of input "
            f"{x.name!r} {x.type} "
            f"and out_channels={out_channels}"
        )
    with naming("conv2d", name, x):
        kernel = pair(kernel_size, "kernel_size")
    shape = (out_channels, channels // groups, *kernel)
    graph = x.graph
    with graph.layer(name):
        weight = graph.parameter(f"{name}.weight", shape, weight_init, dtype=x.dtype)
        offset = None
        if bias:
            first = _bias_init(bias_init, math.prod(shape[1:]))
            offset = graph.parameter(f"{name}.bias", (out_channels,), first, dtype=x.dtype)
        return _conv2d(x, weight, offset, stride, padding, dilation, groups, name=name)


def batch_norm2d(
    x: Value, name: str | None = None, momentum: float = 0.1, eps: float = 1e-5
) -> Value:
    """Batch normalisation of images [N,C,H,W] over N, H and W; see gc.batch_norm.

    Parameters `<name>.weight` (ones) and `<name>.bias` (zeros), states `<name>.running_mean` and
    `<name>.running_var`, all [C]; a training step updates the states. Raises ShapeError.
    """
    name = _layer_name(x, name, "batch_norm2d")
    if x.rank != 4:
        raise errors.ShapeError(
            f"{name} (batch_norm2d): input {x.name!r} {x.type} must have 4 dimensions [N,C,H,W]"
        )
    shape, graph = (_known(x, 1, name, "batch_norm2d", "channels"),), x.graph
    with graph.layer(name):
        weight = graph.parameter(f"{name}.weight", shape, init.Ones(), dtype=x.dtype)
        bias = graph.parameter(f"{name}.bias", shape, init.Zeros(), dtype=x.dtype)
        mean = graph.state(f"{name}.running_mean", shape, init.Zeros(), dtype=x.dtype)
        var = graph.state(f"{name}.running_var", shape, init.Ones(), dtype=x.dtype)
        y, new_mean, new_var = batch_norm(
            x, weight, bias, mean, var, momentum=momentum, eps=eps, name=name
        )
        graph.update(mean.name, new_mean)
        graph.update(var.name, new_var)
    return y


def dropout(x: Value, p: float = 0.5, name: str | None = None) -> Value:
    """In training, zero each element with probability p and scale the others by 1 / (1 - p).

    (Srivastava et al. 2014.) In inference, x itself.
    """
    name = _layer_name(x, name, "dropout")
    with x.graph.layer(name):
        return _dropout(x, p, name=name)


def _bias_init(chosen: Any, fan_in: int) -> Any:
    if isinstance(chosen, str) and chosen == "default":
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        return init.Uniform(-bound, bound)
    return chosen


def _layer_name(x: Value, name: str | None, kind: str) -> str:
    """The given name, or the first of kind1, kind2, ... that no node or parameter uses."""
    if name is not None:
        return name
    graph, number = x.graph, 1
    while f"{kind}{number}" in graph or f"{kind}{number}.weight" in graph:
        number += 1
    return f"{kind}{number}"


def _known(x: Value, axis: int, name: str, kind: str, what: str) -> int:
    size: Dimension = x.shape[axis]
    if not isinstance(size, int):
        raise errors.ShapeError(
            f"{name} ({kind}): the {what} {size!r} of input {x.name!r} {x.type} must be a number: "
            f"a parameter's shape depends on it"
        )
    return size

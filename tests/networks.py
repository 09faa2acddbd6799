"""Small networks that between them use every kind of kernel; shared by the compiled tests."""

from __future__ import annotations

import numpy as np

import graphc as gc
from graphc.ir import Graph, Value


def _classified(g: Graph, logits: Value, label: Value) -> Graph:
    g.output(logits=logits, loss=gc.softmax_cross_entropy(logits, label))
    return g


def small_resnet(channels: int = 8, size: int = 16, in_channels: int = 3) -> Graph:
    """Batch norm, strided block with a projection, residual adds, padded pooling, global mean."""
    g = Graph("small_resnet")
    image = g.input("image", ("N", in_channels, size, size))
    label = g.input("label", ("N",), dtype="int32")

    def normed(x: Value, width: int, kernel: int, stride: int, name: str) -> Value:
        y = gc.nn.conv2d(
            x, width, kernel, stride=stride, padding=kernel // 2, bias=False, name=f"{name}.conv"
        )
        return gc.nn.batch_norm2d(y, name=f"{name}.bn")

    def block(x: Value, width: int, stride: int, name: str) -> Value:
        y = gc.relu(normed(x, width, 3, stride, f"{name}.1"))
        y = normed(y, width, 3, 1, f"{name}.2")
        skip = x if stride == 1 else normed(x, width, 1, stride, f"{name}.skip")
        return gc.relu(gc.add(y, skip))

    h = gc.relu(normed(image, channels, 3, 1, "stem"))
    h = gc.max_pool2d(h, 3, stride=2, padding=1)
    h = block(h, channels, 1, "block1")
    h = block(h, 2 * channels, 2, "block2")
    logits = gc.nn.linear(gc.flatten(gc.global_avg_pool2d(h)), 10, name="head")
    return _classified(g, logits, label)


def transformer_block(tokens: int = 7, width: int = 24, heads: int = 3) -> Graph:
    """Attention with batched products, layer norm by hand, a GELU network, residuals around both.

    The keys have no bias: softmax does not see it, and its gradient would be rounding error."""
    g = Graph("transformer_block")
    x = g.input("x", ("N", tokens, width))
    target = g.input("target", ("N", tokens, width))
    size = width // heads

    def normed(v: Value, name: str) -> Value:
        scale = g.parameter(f"{name}.weight", (width,), np.linspace(0.5, 1.5, width))
        shift = g.parameter(f"{name}.bias", (width,), np.linspace(-0.5, 0.5, width))
        centred = v - gc.mean(v, -1, keepdims=True)
        return (
            centred * gc.rsqrt(gc.mean(gc.square(centred), -1, keepdims=True) + 1e-5) * scale
            + shift
        )

    def projected(v: Value, out: int, name: str) -> Value:
        rng = np.random.default_rng(len(name))
        weight = g.parameter(
            f"{name}.weight", (v.shape[-1], out), rng.normal(0, 0.2, (v.shape[-1], out))
        )
        product = gc.matmul(v, weight)
        return product if name == "key" else product + g.parameter(f"{name}.bias", (out,))

    def split(v: Value) -> Value:
        return gc.transpose(gc.reshape(v, ("N", tokens, heads, size)), (0, 2, 1, 3))

    h = normed(x, "norm1")
    q, k, v = (split(projected(h, width, n)) for n in ("query", "key", "value"))
    weights = gc.softmax(gc.matmul(q, gc.transpose(k, (0, 1, 3, 2))) * size**-0.5, -1)
    mixed = gc.reshape(gc.transpose(gc.matmul(weights, v), (0, 2, 1, 3)), ("N", tokens, width))
    h = x + projected(mixed, width, "out")
    y = h + projected(gc.gelu(projected(normed(h, "norm2"), 2 * width, "up")), width, "down")
    g.output(y=y, loss=gc.mse_loss(y, target))
    return g


def convolutions() -> Graph:
    """Grouped, depthwise, dilated, strided and 1x1 convolutions, and both kinds of pooling."""
    g = Graph("convolutions")
    image = g.input("image", ("N", 4, 15, 13))
    label = g.input("label", ("N",), dtype="int32")
    h = gc.relu(gc.nn.conv2d(image, 8, 3, padding=1, groups=2, name="grouped"))
    h = gc.nn.conv2d(h, 8, 3, padding=1, groups=8, name="depthwise")
    h = gc.tanh(gc.nn.conv2d(h, 17, 1, name="pointwise"))
    h = gc.avg_pool2d(h, 2)
    h = gc.silu(gc.nn.conv2d(h, 6, 3, padding=2, dilation=2, name="dilated"))
    h = gc.max_pool2d(gc.relu(gc.nn.conv2d(h, 5, 2, stride=2, name="strided")), 2, stride=1)
    logits = gc.nn.linear(gc.flatten(h), 10, name="head")
    return _classified(g, logits, label)


def with_dropout() -> Graph:
    g = Graph("with_dropout")
    image = g.input("image", ("N", 20))
    label = g.input("label", ("N",), dtype="int32")
    h = gc.nn.dropout(gc.relu(gc.nn.linear(image, 33, name="fc1")), 0.4)
    h = gc.nn.dropout(gc.relu(gc.nn.linear(h, 17, name="fc2")), 0.2)
    return _classified(g, gc.nn.linear(h, 10, name="fc3"), label)


def feeds(graph: Graph, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays for the inputs of a network of this file or of gc.zoo."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, node in graph.inputs.items():
        shape = tuple(batch if d == "N" else d for d in node.types[0].shape)
        if node.types[0].is_float:
            arrays[name] = rng.standard_normal(shape).astype(node.types[0].dtype)
        else:
            arrays[name] = rng.integers(0, 10, shape).astype(node.types[0].dtype)
    return arrays

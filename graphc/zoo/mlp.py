"""The multilayer perceptron: linear layers with ReLU between them."""

from __future__ import annotations

from collections.abc import Sequence

from graphc import nn
from graphc.ir import Graph
from graphc.ops import flatten, relu, softmax_cross_entropy


def mlp(
    hidden: Sequence[int] = (128, 64), input_shape: Sequence[int] = (1, 28, 28), classes: int = 10
) -> Graph:
    """Layers `fc1`, `fc2`, ... of `hidden` sizes, then one of `classes`.

    Inputs `image` f32[N,*input_shape] and `label` i32[N]; outputs `logits` f32[N,classes] and
    `loss` f32[].
    """
    g = Graph("mlp")
    image = g.input("image", ("N", *input_shape))
    label = g.input("label", ("N",), dtype="int32")
    h = flatten(image) if len(input_shape) > 1 else image
    for number, size in enumerate(hidden, start=1):
        h = relu(nn.linear(h, size, name=f"fc{number}"))
    logits = nn.linear(h, classes, name=f"fc{len(hidden) + 1}")
    g.output(logits=logits, loss=softmax_cross_entropy(logits, label))
    return g

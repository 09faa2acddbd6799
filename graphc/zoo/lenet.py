"""LeNet-5 for 28x28 digits (LeCun et al. 1998, section II.B), with ReLU and max pooling as is usual
today."""

from __future__ import annotations

from graphc import nn
from graphc.ir import Graph
from graphc.ops import flatten, max_pool2d, relu, softmax_cross_entropy


def lenet5(classes: int = 10) -> Graph:
    """Inputs `image` f32[N,1,28,28] and `label` i32[N]; outputs `logits` f32[N,classes] and `loss`
    f32[]."""
    g = Graph("lenet5")
    image = g.input("image", ("N", 1, 28, 28))
    label = g.input("label", ("N",), dtype="int32")
    h = max_pool2d(relu(nn.conv2d(image, 6, 5, padding=2, name="conv1")), 2, name="pool1")
    h = max_pool2d(relu(nn.conv2d(h, 16, 5, name="conv2")), 2, name="pool2")
    h = relu(nn.linear(flatten(h), 120, name="fc1"))
    h = relu(nn.linear(h, 84, name="fc2"))
    logits = nn.linear(h, classes, name="fc3")
    g.output(logits=logits, loss=softmax_cross_entropy(logits, label))
    return g

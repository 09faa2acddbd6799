"""Residual networks (He et al. 2016, "Deep residual learning for image recognition").

`resnet18/34/50` are those of table 1, `resnet20/32/44/56/110` the thin ones of section 4.2 for
32x32 images. Names, layouts and initial distributions of parameters are torchvision's, so that its
state dictionaries load unchanged; as there, a bottleneck block has its stride in the 3x3
convolution.

Every function returns a graph with inputs `image` f32[N,3,H,W] and `label` i32[N] and outputs
`logits` f32[N,classes] and `loss` f32[], the mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphc import errors, init, nn
from graphc.ir import Graph, Value
from graphc.ops import add, flatten, global_avg_pool2d, max_pool2d, relu, softmax_cross_entropy

__all__ = [
    *("resnet18", "resnet34", "resnet50"),
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
]

# (x, width, stride, name) -> x's successor.
Block = Callable[[Value, int, int, str], Value]

# The first layers there are, and the size of image that each is for.
STEMS = {"imagenet": 224, "cifar": 32}
_SMALLEST_IMAGE = 8
# Keeps the variance of gradients through layers followed by a rectifier, as torchvision.
_WEIGHT = init.kaiming_normal(mode="fan_out")


def resnet18(classes: int = 1000, stem: str = "imagenet", image_size: int | None = None) -> Graph:
    """18 layers, 11.7 million parameters (1000 classes), 1.8e9 multiply-adds at 224x224.

    stem        "imagenet": a 7x7 convolution of stride 2 and a max pool; "cifar": a 3x3 convolution
                of stride 1, for small images
    image_size  height and width; None: 224 for the first stem, 32 for the second

    Raises DeclarationError for another stem or images below 8x8.
    """
    return _resnet("resnet18", basic_block, (2, 2, 2, 2), classes, stem, image_size)


def resnet34(classes: int = 1000, stem: str = "imagenet", image_size: int | None = None) -> Graph:
    """34 layers, 21.8 million parameters, 3.7e9 multiply-adds; see `resnet18`."""
    return _resnet("resnet34", basic_block, (3, 4, 6, 3), classes, stem, image_size)


def resnet50(classes: int = 1000, stem: str = "imagenet", image_size: int | None = None) -> Graph:
    """50 layers in bottleneck blocks, 25.6 million parameters, 4.1e9 multiply-adds; see
    `resnet18`."""
    return _resnet("resnet50", bottleneck_block, (3, 4, 6, 3), classes, stem, image_size)


def resnet20(classes: int = 10) -> Graph:
    """20 layers for 32x32 images, 0.27 million parameters.

    Shortcuts to a smaller image are 1x1 convolutions (option B of section 3.3)."""
    return _thin("resnet20", 20, classes)


def resnet32(classes: int = 10) -> Graph:
    """32 layers for 32x32 images, 0.47 million parameters; see `resnet20`."""
    return _thin("resnet32", 32, classes)


def resnet44(classes: int = 10) -> Graph:
    """44 layers for 32x32 images, 0.66 million parameters; see `resnet20`."""
    return _thin("resnet44", 44, classes)


def resnet56(classes: int = 10) -> Graph:
    """56 layers for 32x32 images, 0.86 million parameters; see `resnet20`."""
    return _thin("resnet56", 56, classes)


def resnet110(classes: int = 10) -> Graph:
    """110 layers for 32x32 images, 1.7 million parameters; see `resnet20`."""
    return _thin("resnet110", 110, classes)


def _resnet(
    name: str,
    block: Block,
    blocks: Sequence[int],
    classes: int,
    stem: str,
    image_size: int | None,
) -> Graph:
    if stem not in STEMS:
        raise errors.DeclarationError(f"{name}: stem={stem!r}: use {' or '.join(map(repr, STEMS))}")
    size = STEMS[stem] if image_size is None else image_size
    if not isinstance(size, int) or size < _SMALLEST_IMAGE:
        raise errors.DeclarationError(
            f"{name}: image_size={size!r}: use a number of pixels, {_SMALLEST_IMAGE} or more"
        )
    g, image, label = _inputs(name, size)
    if stem == "imagenet":
        h = _layer(image, 64, 7, 2, "conv1", "bn1", "relu")
        h = max_pool2d(h, 3, stride=2, padding=1, name="maxpool")
    else:
        h = _layer(image, 64, 3, 1, "conv1", "bn1", "relu")
    return _classified(g, _stages(h, block, blocks, (64, 128, 256, 512)), label, classes)


def _thin(name: str, depth: int, classes: int) -> Graph:
    """6n + 2 layers: a 3x3 convolution, three stages of n basic blocks, a linear layer."""
    g, image, label = _inputs(name, 32)
    h = _layer(image, 16, 3, 1, "conv1", "bn1", "relu")
    blocks = ((depth - 2) // 6,) * 3
    return _classified(g, _stages(h, basic_block, blocks, (16, 32, 64)), label, classes)


def _inputs(name: str, size: int) -> tuple[Graph, Value, Value]:
    g = Graph(name)
    image = g.input("image", ("N", 3, size, size))
    return g, image, g.input("label", ("N",), dtype="int32")


def _stages(h: Value, block: Block, blocks: Sequence[int], widths: Sequence[int]) -> Value:
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        for number in range(count):
            stride = 2 if stage > 1 and number == 0 else 1
            h = block(h, width, stride, f"layer{stage}.{number}")
    return h


def _classified(g: Graph, h: Value, label: Value, classes: int) -> Graph:
    features = flatten(global_avg_pool2d(h, name="avgpool"), name="flatten")
    logits = nn.linear(features, classes, name="fc")
    g.output(logits=logits, loss=softmax_cross_entropy(logits, label))
    return g


# ---- blocks


def basic_block(x: Value, width: int, stride: int, name: str) -> Value:
    """Two 3x3 convolutions and the shortcut (figure 5, left).

    [N,C,H,W] -> [N,width,H/stride,W/stride]."""
    y = _layer(x, width, 3, stride, f"{name}.conv1", f"{name}.bn1", f"{name}.relu1")
    y = _layer(y, width, 3, 1, f"{name}.conv2", f"{name}.bn2")
    return _joined(y, x, stride, name)


def bottleneck_block(x: Value, width: int, stride: int, name: str) -> Value:
    """1x1, 3x3 and 1x1 convolutions and the shortcut (figure 5, right).

    [N,C,H,W] -> [N,4 width,H/stride,W/stride]."""
    y = _layer(x, width, 1, 1, f"{name}.conv1", f"{name}.bn1", f"{name}.relu1")
    y = _layer(y, width, 3, stride, f"{name}.conv2", f"{name}.bn2", f"{name}.relu2")
    y = _layer(y, 4 * width, 1, 1, f"{name}.conv3", f"{name}.bn3")
    return _joined(y, x, stride, name)


def _joined(y: Value, x: Value, stride: int, name: str) -> Value:
    """relu(y + x), with x through a 1x1 convolution where its shape is not y's."""
    if stride != 1 or x.shape[1] != y.shape[1]:
        width = int(y.shape[1])
        x = _layer(x, width, 1, stride, f"{name}.downsample.0", f"{name}.downsample.1")
    return relu(add(y, x, name=f"{name}.add"), name=f"{name}.relu")


def _layer(
    x: Value,
    width: int,
    kernel: int,
    stride: int,
    conv: str,
    norm: str,
    activation: str | None = None,
) -> Value:
    """Convolution padded to keep the size (but for the stride), batch norm and perhaps relu, by
    their names."""
    y = nn.conv2d(x, width, kernel, stride, kernel // 2, bias=False, name=conv, weight_init=_WEIGHT)
    y = nn.batch_norm2d(y, name=norm)
    return relu(y, name=activation) if activation else y

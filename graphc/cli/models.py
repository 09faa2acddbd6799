"""The networks that the command line trains, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphc import zoo
from graphc.errors import GraphcError
from graphc.ir import Graph

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A network of the command line.

    build: from the shape [C, H, W] of an image and the number of classes, a graph with inputs
    image and label, outputs logits and loss. shape: the only one it takes, None for any. images:
    that in words. advice: what to do with others."""

    build: Callable[[Shape, int], Graph]
    shape: Shape | None = None
    images: str = ""
    advice: str = ""


MODELS = {
    "lenet": Network(
        lambda shape, classes: zoo.lenet5(classes=classes),
        (1, 28, 28),
        "grey images of 28x28",
        "mlp takes any size",
    ),
    "mlp": Network(lambda shape, classes: zoo.mlp(input_shape=shape, classes=classes)),
    "resnet20": Network(
        lambda shape, classes: zoo.resnet20(classes=classes),
        (3, 32, 32),
        "colour images of 32x32",
        "--data takes a folder with CIFAR-10's binary files",
    ),
}


def build(model: str, shape: Shape, classes: int) -> Graph:
    """The named network for images of `shape` [C, H, W]. Raises GraphcError."""
    network = MODELS[choose("model", model, MODELS)]
    if network.shape not in (None, shape):
        raise GraphcError(
            f"{model} takes {network.images} {list(network.shape or ())}, these are {list(shape)}; "
            f"{network.advice}"
        )
    return network.build(shape, classes)


def choose(what: str, name: str, known) -> str:
    """`name` if it is one of `known`. Raises GraphcError listing them."""
    if name not in known:
        raise GraphcError(f"no {what} {name!r}; choose from {', '.join(known)}")
    return name

"""The networks that the command line knows by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graphc as gc
from graphc import zoo
from graphc.errors import GraphcError
from graphc.ir import Graph

Shape = tuple[int, ...]


def _lenet(shape: Shape, classes: int) -> Graph:
    if shape != (1, 28, 28):
        raise GraphcError(
            f"lenet takes grey images of 28x28 [1, 28, 28], these are {list(shape)}; "
            "mlp takes any size"
        )
    return zoo.lenet5(classes=classes)


def _mlp(shape: Shape, classes: int) -> Graph:
    return zoo.mlp(input_shape=shape, classes=classes)


def _resnet20(shape: Shape, classes: int) -> Graph:
    if shape != (3, 32, 32):
        raise GraphcError(
            f"resnet20 takes colour images of 32x32 [3, 32, 32], these are {list(shape)}; "
            "--data takes a folder with CIFAR-10's binary files"
        )
    return zoo.resnet20(classes=classes)


# (shape of an image, number of classes) -> graph with inputs image, label; outputs logits, loss.
MODELS: dict[str, Callable[[Shape, int], Graph]] = {
    "lenet": _lenet,
    "mlp": _mlp,
    "resnet20": _resnet20,
}


def build(model: str, shape: Shape, classes: int) -> Graph:
    """The named network for images of `shape` [C, H, W]. Raises GraphcError."""
    return MODELS[choose("model", model, MODELS)](shape, classes)


def choose(what: str, name: str, known) -> str:
    """`name` if it is one of `known`. Raises GraphcError listing them."""
    if name not in known:
        raise GraphcError(f"no {what} {name!r}; choose from {', '.join(known)}")
    return name


def draw_model(model: str, stage: str, batch: int, path: Path) -> Path:
    """Write a picture of the network for digits (resnet20: CIFAR-10) in ten classes; returns its
    path."""
    choose("stage", stage, ("declared", "inference", "training"))
    graph = build(model, (3, 32, 32) if model == "resnet20" else (1, 28, 28), 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    if stage == "declared":
        return gc.viz.draw(graph).save(path)
    dims = {"N": batch}
    if stage == "inference":
        return gc.viz.draw(gc.compile(graph, outputs=["logits"], dims=dims)).save(path)
    optimizer = gc.optim.SGD(0.1, momentum=0.9)
    step = gc.compile(graph, outputs=["loss"], dims=dims, loss="loss", optimizer=optimizer)
    return gc.viz.draw(step).save(path)

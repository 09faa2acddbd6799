"""`graphc predict`: what trained weights make of images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import graphc as gc
from graphc import data
from graphc import train as training
from graphc.cli.models import build
from graphc.data.dataset import standardise
from graphc.errors import DataError
from graphc.serialize import load, load_metadata


@dataclass(frozen=True)
class Description:
    """What `graphc train` saves beside the weights."""

    model: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Description:
        """Raises DataError if the file lacks one."""
        text = load_metadata(path).get("graphc")
        if text is None:
            raise DataError(
                f"{path}: weights without a description of their network; "
                "`graphc train` saves one, in MODEL.safetensors"
            )
        try:
            saved = json.loads(text)
            fields = (saved[name] for name in ("image_shape", "classes", "mean", "std"))
            return cls(str(saved["model"]), *(tuple(field) for field in fields))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged description of the network ({error})") from None


def run(
    weights: Path, files: Sequence[Path], digits: int | None, threads: int | None, target: str
) -> None:
    """Print the class of each image and its probability. Raises GraphcError."""
    network = Description.read(weights)
    state = load(weights)
    if digits:
        names, images, labels = _held_out(network, digits)
    else:
        names, images = _from_files(network, files)
        labels = None

    graph = build(network.model, network.image_shape, len(network.classes))
    dims = {"N": min(len(images), 64)}
    executable = gc.compile(graph, outputs=["logits"], dims=dims, threads=threads, target=target)
    executable.load_state(state)
    logits = training.predict(executable, images).astype(np.float64)
    _print(network, names, logits, labels)


def _held_out(network: Description, count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    dataset = data.load_digits()
    if network.image_shape != dataset.image_shape:
        raise DataError(
            f"these weights are for images {list(network.image_shape)}, not for digits "
            f"{list(dataset.image_shape)}"
        )
    if count > len(dataset.test_images):
        raise DataError(f"--digits {count}: there are {len(dataset.test_images)} held-out digits")
    pixels = dataset.test_images[:count]
    # Back to pixels, and through the weights' own standardisation.
    images = pixels * np.float32(dataset.std[0]) + np.float32(dataset.mean[0])
    names = [f"digit {i}" for i in range(count)]
    prepared = standardise(images, network.mean, network.std)
    return names, prepared, dataset.test_labels[:count]


def _from_files(network: Description, files: Sequence[Path]) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    arrays: list[np.ndarray] = []
    for file in files:
        pixels = data.read_images(file, network.image_shape)
        if len(pixels) == 0:
            raise DataError(f"{file}: holds no images")
        pixels, inverted = _on_the_training_background(pixels, network)
        if inverted:
            print(f"note: {file}: inverted, as the network knows light on dark", file=sys.stderr)
        names += [f"{file}[{i}]" if len(pixels) > 1 else str(file) for i in range(len(pixels))]
        arrays.append(standardise(pixels, network.mean, network.std))
    return names, np.concatenate(arrays)


def _on_the_training_background(
    pixels: np.ndarray, network: Description
) -> tuple[np.ndarray, bool]:
    """Grey images with a light border are inverted if the training images were dark on average."""
    if network.image_shape[0] != 1 or network.mean[0] > 0.5:
        return pixels, False
    rows, columns = pixels[:, :, [0, -1], :], pixels[:, :, :, [0, -1]]
    border = np.concatenate([rows.ravel(), columns.ravel()])
    return (255 - pixels, True) if np.median(border) > 127 else (pixels, False)


def _print(
    network: Description, names: list[str], logits: np.ndarray, labels: np.ndarray | None
) -> None:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probability = odds / odds.sum(1, keepdims=True)
    best = np.argsort(-probability, axis=1, kind="stable")
    width = max(map(len, names))
    names_width = max(map(len, network.classes))
    for i, name in enumerate(names):
        first, second = best[i, 0], best[i, min(1, best.shape[1] - 1)]
        line = (
            f"{name:<{width}}  {network.classes[first]:<{names_width}} "
            f"{probability[i, first]:7.2%}  then {network.classes[second]} "
            f"{probability[i, second]:.2%}"
        )
        if labels is not None:
            truth = network.classes[labels[i]]
            line += "  right" if first == labels[i] else f"  wrong: it is {truth}"
        print(line)
    if labels is not None:
        right = int((best[:, 0] == labels).sum())
        print(f"{right} of {len(labels)} right")

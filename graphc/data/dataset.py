"""A labelled data set in memory, and reproducible batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from graphc.errors import DataError

# Takes a batch [N, C, H, W] and a generator, returns a changed batch of the same shape.
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and held-out examples.

    Images are float32 [N, C, H, W] (tables: [N, features]), standardised with the training set's
    `mean` and `std` per channel (per feature), which new examples must go through too. Labels are
    int32 class numbers [N]; for regression, float32 targets [N, 1] and no class names.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for what in ("train", "test"):
            images, labels = getattr(self, f"{what}_images"), getattr(self, f"{what}_labels")
            if len(images) != len(labels):
                raise DataError(f"{self.name}: {len(images)} {what} images, {len(labels)} labels")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis."""
        return self.train_images.shape[1:]

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Standardise new examples, uint8 [N, C, H, W] or a table, as the training set was."""
        return standardise(pixels, self.mean, self.std)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}: {len(self.train_images)} training and "
            f"{len(self.test_images)} test examples of shape {list(self.image_shape)}, "
            f"{len(self.classes)} classes)"
        )


def standardise(
    values: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], dtype: str = "float32"
) -> np.ndarray:
    """(values - mean) / std along axis 1; uint8 pixels are first scaled to [0, 1]."""
    scale = 255.0 if values.dtype == np.uint8 else 1.0
    tail = (1,) * (values.ndim - 2)
    factor = (1.0 / (scale * np.asarray(std))).astype(dtype).reshape(-1, *tail)
    offset = (np.asarray(mean) / np.asarray(std)).astype(dtype).reshape(-1, *tail)
    result = values.astype(dtype)
    result *= factor
    result -= offset
    return result


def moments(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std along axis 1, of pixels scaled to [0, 1] if uint8; constants get std 1."""
    axes = (0, *range(2, values.ndim))
    if values.dtype == np.uint8:
        # Exact and without a float copy of the whole set: from the histogram of each channel.
        levels = np.arange(256) / 255.0
        counts = [np.bincount(values[:, c].ravel(), minlength=256) for c in range(values.shape[1])]
        mean = np.array([np.average(levels, weights=n) for n in counts])
        square = np.array([np.average(levels**2, weights=n) for n in counts])
        std = np.sqrt(np.maximum(square - mean**2, 0.0))
    else:
        mean, std = values.mean(axes, dtype=np.float64), values.std(axes, dtype=np.float64)
    std = np.where(std > 1e-12, std, 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def image_dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
) -> Dataset:
    """A Dataset of (uint8 [N, C, H, W], integer labels [N]) pairs."""
    mean, std = moments(train[0])
    return Dataset(
        name,
        standardise(train[0], mean, std),
        train[1].astype(np.int32),
        standardise(test[0], mean, std),
        test[1].astype(np.int32),
        classes,
        mean,
        std,
    )


class Batches:
    """Batches of (images, labels), in an order that depends on `seed` and the epoch's number only.

    So a run that was interrupted goes on with the batches it would have seen. With
    `drop_last=False` the last batch of an epoch may be smaller than `batch_size`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        augment: Augment | None = None,
    ) -> None:
        if len(images) != len(labels):
            raise DataError(f"batches: {len(images)} images, {len(labels)} labels")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if drop_last and len(images) < batch_size:
            raise DataError(
                f"batches: {len(images)} examples do not fill a batch of {batch_size}; "
                "use a smaller batch"
            )
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.seed, self.drop_last, self.augment = shuffle, seed, drop_last, augment

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches of epoch `number` (0, 1, ...), from batch `start` on, as fresh arrays."""
        count = len(self.images)
        order = np.arange(count)
        if self.shuffle:
            np.random.default_rng((self.seed, number)).shuffle(order)
        for batch in range(start, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.images[rows]
            if self.augment is not None:
                images = self.augment(images, np.random.default_rng((self.seed, number, batch)))
            yield images, self.labels[rows]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.epoch(0)


def crop_and_flip(padding: int = 4, flip: bool = True, edge: bool = False) -> Augment:
    """Random crops of the padded image, and mirror images with probability 1/2.

    The defaults are those for CIFAR-10 in He et al. 2016, "Deep residual learning", section 4.2:
    the padding is zero after standardisation, which is the mean colour. `edge=True` repeats the
    border instead, which suits images on a plain background.
    """

    def augment(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
        count, _, height, width = images.shape
        border = ((0, 0), (0, 0), (padding, padding), (padding, padding))
        # [N, C, 2p + 1, 2p + 1, H, W], a view: every crop there is.
        crops = np.lib.stride_tricks.sliding_window_view(
            np.pad(images, border, mode="edge" if edge else "constant"),
            (height, width),
            axis=(2, 3),
        )
        top, left = random.integers(0, 2 * padding + 1, (2, count))
        result = crops[np.arange(count), :, top, left]
        if flip:
            mirrored = random.random(count) < 0.5
            result[mirrored] = result[mirrored][..., ::-1]
        return result

    return augment

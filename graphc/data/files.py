"""Readers of the standard image files: IDX (MNIST, Fashion-MNIST) and CIFAR-10's binary version.

Formats: MNIST's page (LeCun, Cortes, Burges) for IDX, CIFAR-10's page (Krizhevsky) for the latter.
Files are checked whole: a damaged one is a DataError that names it and what is wrong.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from graphc.data.dataset import Dataset, image_dataset
from graphc.data.embedded import DIGITS
from graphc.errors import DataError

FASHION = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

# The first training labels tell the two sets apart, whatever their folder is called.
_FIRST_LABELS = {
    (5, 0, 4, 1, 9, 2, 1, 3, 1, 4): ("mnist", DIGITS),
    (9, 0, 0, 3, 0, 2, 7, 2, 5, 5): ("fashion-mnist", FASHION),
}
_IDX_SUBFOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")
_CIFAR_SUBFOLDERS = ("", "cifar-10-batches-bin")
_CIFAR_RECORD = 1 + 3 * 32 * 32


def load(folder: str | os.PathLike[str]) -> Dataset:
    """The data set in `folder`: MNIST or Fashion-MNIST (IDX files), or CIFAR-10 (binary files).

    Raises DataError if the folder holds neither, or a file of them is damaged.
    """
    root = _existing_folder(folder)
    if _find_idx(root, "train", "images", 3):
        return load_idx_folder(root)
    if _cifar_folder(root):
        return load_cifar10(root)
    if any((root / sub / "data_batch_1").is_file() for sub in ("", "cifar-10-batches-py")):
        raise DataError(
            f"{root}: holds CIFAR-10's Python version (pickles); get the binary version "
            "(data_batch_1.bin ... test_batch.bin)"
        )
    raise DataError(
        f"{root}: no data set found; expected train-images-idx3-ubyte[.gz] and its three "
        "companions (MNIST, Fashion-MNIST) or data_batch_1.bin ... test_batch.bin (CIFAR-10)"
    )


def load_idx_folder(folder: str | os.PathLike[str]) -> Dataset:
    """MNIST, Fashion-MNIST or another set of grey images in ten classes in their four IDX files.

    File names as published (`train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, ...) or with a dot
    (`train-images.idx3-ubyte`), gzipped or not, in `folder` or where torchvision puts them.
    Raises DataError.
    """
    root = _existing_folder(folder)
    parts = {}
    for part in ("train", "t10k"):
        images_file = _require_idx(root, part, "images", 3)
        labels_file = _require_idx(root, part, "labels", 1)
        images, labels = read_idx(images_file, rank=3), read_idx(labels_file, rank=1)
        if len(images) != len(labels):
            raise DataError(
                f"{images_file}: holds {len(images)} images, but {labels_file.name} holds "
                f"{len(labels)} labels"
            )
        if images.size == 0:
            raise DataError(f"{images_file}: holds no images")
        _check_labels(labels_file, labels, 10)
        parts[part] = images[:, None], labels
    if parts["train"][0].shape[1:] != parts["t10k"][0].shape[1:]:
        sizes = " and ".join(str(list(p[0].shape[2:])) for p in parts.values())
        raise DataError(f"{root}: training and test images have different sizes, {sizes}")
    name, classes = _FIRST_LABELS.get(tuple(parts["train"][1][:10].tolist()), ("idx", DIGITS))
    return image_dataset(name, parts["train"], parts["t10k"], classes)


def load_cifar10(folder: str | os.PathLike[str]) -> Dataset:
    """CIFAR-10, binary version: `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.

    In `folder` or its subfolder `cifar-10-batches-bin`; images [N, 3, 32, 32]. Raises DataError.
    """
    root = _existing_folder(folder)
    root = _cifar_folder(root) or root
    batches = [_read_cifar(root / f"data_batch_{i}.bin") for i in range(1, 6)]
    counts = [len(labels) for _, labels in batches]
    if len(set(counts)) > 1:
        shortest = counts.index(min(counts)) + 1
        raise DataError(
            f"{root / f'data_batch_{shortest}.bin'}: truncated: {min(counts)} images, where "
            f"other batches have {max(counts)}"
        )
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    return image_dataset(
        "cifar-10", (images, labels), _read_cifar(root / "test_batch.bin"), CIFAR10
    )


def read_idx(path: str | os.PathLike[str], rank: int | None = None) -> np.ndarray:
    """The uint8 array in an IDX file, gzipped or not. Raises DataError.

    `rank`: the number of axes that the caller expects (3 for images, 1 for labels).
    """
    path = Path(path)
    data = _read_bytes(path)
    if len(data) < 4:
        raise DataError(f"{path}: truncated: {len(data)} bytes, shorter than an IDX header")
    zero, kind, axes = struct.unpack_from(">HBB", data)
    if zero != 0 or kind != 8 or not 1 <= axes <= 4:
        raise DataError(
            f"{path}: not an IDX file of bytes: magic number 0x{data[:4].hex()}, expected "
            f"0x000008{rank or 3:02x}"
        )
    if rank is not None and axes != rank:
        what = {1: "labels", 3: "images"}
        raise DataError(
            f"{path}: holds {what.get(axes, f'{axes} axes')}, expected "
            f"{what.get(rank, f'{rank} axes')} (magic number 0x{data[:4].hex()})"
        )
    header = 4 + 4 * axes
    if len(data) < header:
        raise DataError(f"{path}: truncated: {len(data)} bytes, the IDX header alone has {header}")
    shape = struct.unpack_from(f">{axes}I", data, 4)
    expected = header + math.prod(shape)
    if len(data) != expected:
        state = "truncated" if len(data) < expected else "too long"
        raise DataError(
            f"{path}: {state}: its header says {' x '.join(map(str, shape))}, which takes "
            f"{expected} bytes; it has {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path}: missing; CIFAR-10's binary version has five data_batch_N.bin "
                        "files and test_batch.bin")  # fmt: skip
    data = _read_bytes(path)
    if not data or len(data) % _CIFAR_RECORD:
        raise DataError(
            f"{path}: truncated or foreign: {len(data)} bytes are not a whole number of "
            f"CIFAR-10 records of {_CIFAR_RECORD} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR_RECORD)
    _check_labels(path, records[:, 0], 10)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data.startswith(b"\x1f\x8b"):
        if path.suffix == ".gz":
            raise DataError(f"{path}: not a gzip file, though its name ends in .gz")
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = "truncated" if isinstance(error, EOFError) else "damaged"
        raise DataError(f"{path}: {reason} gzip file ({error})") from None


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise DataError(
            f"{path}: label {labels[wrong[0]]} of image {wrong[0]} is not one of 0 to {classes - 1}"
        )


def _existing_folder(folder: str | os.PathLike[str]) -> Path:
    root = Path(folder).expanduser()
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {state}")
    return root


def _idx_names(part: str, kind: str, rank: int) -> list[str]:
    stems = (f"{part}-{kind}-idx{rank}-ubyte", f"{part}-{kind}.idx{rank}-ubyte")
    return [stem + suffix for stem in stems for suffix in ("", ".gz")]


def _find_idx(root: Path, part: str, kind: str, rank: int) -> Path | None:
    for sub in _IDX_SUBFOLDERS:
        for name in _idx_names(part, kind, rank):
            if (root / sub / name).is_file():
                return root / sub / name
    return None


def _require_idx(root: Path, part: str, kind: str, rank: int) -> Path:
    found = _find_idx(root, part, kind, rank)
    if found is None:
        raise DataError(f"{root}: {_idx_names(part, kind, rank)[0]}[.gz] is missing")
    return found


def _cifar_folder(root: Path) -> Path | None:
    for sub in _CIFAR_SUBFOLDERS:
        if any((root / sub).glob("data_batch_*.bin")) or (root / sub / "test_batch.bin").is_file():
            return root / sub
    return None

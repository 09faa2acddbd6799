"""Images to classify, from single files: pictures, NumPy arrays, IDX files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from graphc.data.files import read_idx
from graphc.errors import DataError, MissingExtraError


def read_images(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> np.ndarray:
    """The images in a file, uint8 [N, C, H, W] for `shape` (C, H, W). Raises DataError.

    .npy files hold [H, W], [N, H, W], [C, H, W] or [N, C, H, W], as uint8, or as floats in [0, 1].
    `...ubyte` and `.gz` files are IDX. Anything else is a picture, which is converted to grey or
    colour and resized; this needs Pillow (MissingExtraError).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".npy":
        return _fit(path, _read_array(path), shape)
    if path.name.endswith(("ubyte", ".gz", ".idx")):
        return _fit(path, read_idx(path), shape)
    return _read_picture(path, shape)


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error})") from None
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or not ((array >= 0) & (array <= 1)).all():
        raise DataError(f"{path}: {array.dtype} array; pixels must be uint8, or floats in [0, 1]")
    return np.rint(array * 255).astype(np.uint8)


def _fit(path: Path, array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    channels, *size = shape
    if channels == 1 and array.shape[-2:] == tuple(size) and array.ndim in (2, 3):
        return array.reshape(-1, *shape)
    if array.shape[-3:] == tuple(shape) and array.ndim in (3, 4):
        return array.reshape(-1, *shape)
    raise DataError(
        f"{path}: holds an array {list(array.shape)}, the network takes images {list(shape)}"
    )


def _read_picture(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError(
            f'{path}: reading pictures needs Pillow: pip install "graphc-nn[plot]" '
            "(or pillow alone); .npy and IDX files need nothing"
        ) from None
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else f"{error}"
        raise DataError(f"{path}: cannot be read: {reason}") from None
    # What is transparent becomes white, as a viewer shows it.
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    flat = page.convert("L" if channels == 1 else "RGB")
    if flat.size != (width, height):
        flat = flat.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(flat, np.uint8)
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)[None].copy()

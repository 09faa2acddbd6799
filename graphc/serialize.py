"""Weights on disk, as safetensors: a header of names, shapes and dtypes, then raw arrays; no code.

Any program that reads safetensors reads these files, under PyTorch's parameter names.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from graphc.errors import DataError


class HasState(Protocol):
    """An executable, as far as saving is concerned."""

    def state(self) -> dict[str, np.ndarray]: ...


def save(
    path: str | os.PathLike[str],
    source: HasState | Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the arrays of an executable's `state()`, or of a mapping, and text about them.

    The file appears whole or not at all: a reader, or a crash while writing, never sees half of it.
    """
    from safetensors.numpy import save as to_bytes

    arrays = source if isinstance(source, Mapping) else source.state()
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata {key!r}: names and values of safetensors metadata are str")
    # safetensors writes an array's buffer as it lies: make it row-major first.
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomically(path, to_bytes(rows, metadata=dict(metadata or {}) or None))


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays in a safetensors file. Raises DataError if it is damaged, truncated or foreign."""
    return _read(path)[0]


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text saved beside the arrays; empty if there is none. Raises DataError as `load` does."""
    return _read(path)[1]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    data = Path(path).read_bytes()
    try:
        arrays = from_bytes(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {_what_is_wrong(data)} ({str(error).strip()})") from None
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    return arrays, dict(header.get("__metadata__") or {})


def _what_is_wrong(data: bytes) -> str:
    if data.startswith((b"PK", b"\x80")):
        return "a pickle or zip archive, not a safetensors file; convert it with safetensors.torch"
    if len(data) < 8:
        return f"truncated: {len(data)} bytes, shorter than a safetensors header"
    (header_bytes,) = struct.unpack_from("<Q", data)
    if data[8:9] != b"{":
        return "not a safetensors file"
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        header = json.loads(data[8 : 8 + header_bytes])
        offsets = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        expected = 8 + header_bytes + max(offsets, default=0)
        if len(data) < expected:
            return f"truncated: {len(data)} of {expected} bytes"
    return "damaged, or of a type that NumPy does not have"


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under another name in its folder, flush it to disk, then move it in place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)

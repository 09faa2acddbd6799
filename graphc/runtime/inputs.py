"""Check the arrays given to a call: name, shape, dtype, contiguity.

Nothing wrong reaches a kernel.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from graphc import errors
from graphc.ir import Node


def checked_array(node: Node, given: Any) -> np.ndarray:
    """`given` as a C-contiguous array of the input's type. Raises InputError with what to change.

    Conversions that keep the values are made (float64 to float32 rounds); others are refused."""
    declared = node.types[0]
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise errors.InputError(
            f"input {node.name!r} expects {declared}; this is no array: {error}"
        ) from None
    if array.shape != declared.shape:
        raise errors.InputError(
            f"input {node.name!r} expects {declared}, got shape {list(array.shape)}: "
            "pass that shape, or compile with other dims"
        )
    if array.dtype != np.dtype(declared.dtype):  # another byte order, too
        array = _converted(node, array)
    return np.ascontiguousarray(array).reshape(array.shape)


def _converted(node: Node, array: np.ndarray) -> np.ndarray:
    declared = node.types[0]
    kind, target = array.dtype.kind, np.dtype(declared.dtype)
    if kind not in "biuf" or (kind == "f" and target.kind != "f"):
        raise errors.InputError(
            f"input {node.name!r} expects {declared}, got {array.dtype}: "
            f"convert it with .astype({declared.dtype!r})"
        )
    if target.kind == "b" and kind != "b":
        raise errors.InputError(
            f"input {node.name!r} expects {declared}, got {array.dtype}: compare it, e.g. x != 0"
        )
    if target.kind == "i" and kind in "iu" and array.size:
        info = np.iinfo(target)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise errors.InputError(
                f"input {node.name!r} expects {declared}; values {low} to {high} do not fit"
            )
    return array.astype(target)


def unknown_input(name: str, known: list[str], unneeded: bool = False) -> errors.InputError:
    if unneeded:
        return errors.InputError(
            f"input {name!r} is not needed for the outputs that were compiled: leave it out"
        )
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return errors.InputError(
        f"there is no input {name!r}; the inputs are {', '.join(map(repr, known)) or 'none'}{hint}"
    )


def missing_input(node: Node) -> errors.InputError:
    return errors.InputError(
        f"input {node.name!r} {node.types[0]} is missing: pass {node.name}=..."
    )

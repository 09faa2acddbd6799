"""What a value is: its shape and element type, where it comes from, how it lies in memory."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from graphc import errors

if TYPE_CHECKING:
    from graphc.ir import Value

Dimension = int | str
Axis = int | Iterable[int] | None
_ITEMSIZE = {"float32": 4, "float64": 8, "int32": 4, "int64": 8, "bool": 1}
DTYPES = tuple(_ITEMSIZE)
_SHORT = {"float32": "f32", "float64": "f64", "int32": "i32", "int64": "i64", "bool": "bool"}


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a value. A dimension is an int or a name bound at compile time."""

    shape: tuple[Dimension, ...]
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float32", "float64")

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.dtype]

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """`shape` where every dimension is bound. Raises UnboundDimensionError."""
        for d in self.shape:
            if isinstance(d, str):
                raise errors.UnboundDimensionError(
                    f"{self} has the unbound dimension {d!r}: pass dims={{{d!r}: ...}}"
                )
        return tuple(d for d in self.shape if not isinstance(d, str))

    @functools.cached_property
    def size(self) -> int:
        """Number of elements; every dimension must be bound."""
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    def __str__(self) -> str:
        return f"{_SHORT[self.dtype]}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the user's layer name and source line. Passes hand it on unchanged.

    `phase` tells the user's forward nodes ("") from those made by the chain rule ("backward") and
    the optimizer ("update")."""

    layer: str = ""
    file: str = ""
    line: int = 0
    phase: str = ""

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else ""


@dataclass(frozen=True)
class Layout:
    """How a value lies in memory.

    `lane_axis=None`: row-major. Otherwise that logical axis is cut in blocks of `lanes` elements
    and the position within a block becomes the innermost physical axis: with lane_axis 0, [N,C,H,W]
    is stored as [N/lanes, C, H, W, lanes]; the last block is padded with elements of no meaning.

    `order` lists the logical axes (the blocks, for the lane axis) from the slowest to the fastest
    in memory; () is their own order.

    `spare` lists (axis, n): n elements (blocks, for the lane axis) behind those of the value are
    left free, so that neighbours along the axes around it do not lie a power of two apart.

    `copies=n`: only one block of axis 0 is kept at a time, in a memory of its own for each of n
    threads (scratch inside a group of kernels that run block by block).
    """

    lane_axis: int | None = None
    lanes: int = 1
    copies: int = 0
    order: tuple[int, ...] = ()
    spare: tuple[tuple[int, int], ...] = ()

    def physical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in memory; of one thread's copy, where there are several."""
        if self.copies:
            return (1, *replace(self, copies=0).physical_shape(shape)[1:])
        blocked = list(shape)
        if self.lane_axis is not None:
            blocked[self.lane_axis] = -(-shape[self.lane_axis] // self.lanes)
        for axis, count in self.spare:
            blocked[axis] += count
        ordered = [blocked[axis] for axis in self.order or range(len(shape))]
        return (*ordered, *(() if self.lane_axis is None else (self.lanes,)))

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Strides in elements of the logical axes (of the blocks, for the lane axis)."""
        physical = self.physical_shape(shape)
        axes = self.order or range(len(shape))
        steps = {axis: math.prod(physical[place + 1 :]) for place, axis in enumerate(axes)}
        if self.copies:
            steps[0] = 0
        return tuple(steps[axis] for axis in range(len(shape)))

    def __str__(self) -> str:
        text = "rows" if self.lane_axis is None else f"lanes({self.lane_axis})x{self.lanes}"
        if self.order:
            text += f" of axes {','.join(map(str, self.order))}"
        text += "".join(f" and {count} spare along {axis}" for axis, count in self.spare)
        return f"{text} a thread" if self.copies else text


ROWS = Layout()
ALIGNMENT = 64


def block_bytes(value: Value) -> int:
    """Bytes of a value in its layout, padded lanes included, rounded up to the alignment; of one
    thread's copy, where threads have memory of their own."""
    kind, layout = value.type, value.layout
    if layout is ROWS:
        return -(-kind.nbytes // ALIGNMENT) * ALIGNMENT
    return _block_bytes(layout, kind.sizes, kind.itemsize)


@functools.lru_cache(1 << 14)
def _block_bytes(layout: Layout, sizes: tuple[int, ...], itemsize: int) -> int:
    size = itemsize * math.prod(layout.physical_shape(sizes))
    return -(-size // ALIGNMENT) * ALIGNMENT


def checked_type(name: str, shape: Iterable[Dimension], dtype: str) -> TensorType:
    """A declared type. Raises DTypeError and ShapeError that name the declaration."""
    dtype = np.dtype(dtype).name if not isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise errors.DTypeError(
            f"{name}: dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}"
        )
    dims: list[Dimension] = []
    for d in shape:
        if isinstance(d, str) and d.isidentifier():
            dims.append(d)
        elif isinstance(d, (int, np.integer)) and not isinstance(d, bool) and d >= 0:
            dims.append(int(d))
        else:
            raise errors.ShapeError(f"{name}: dimension {d!r} is neither a size >= 0 nor a name")
    return TensorType(tuple(dims), dtype)

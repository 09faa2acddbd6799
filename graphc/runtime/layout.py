"""Arrays in and out of a value's layout in memory."""

from __future__ import annotations

import numpy as np

from graphc.ir import Layout


def write_layout(memory: np.ndarray, array: np.ndarray, layout: Layout) -> None:
    """Copy `array` into `memory`, which has the layout's physical shape. Padding becomes zero."""
    memory = _unordered(memory, layout)
    if layout.lane_axis is None:
        memory[...] = array
        return
    axis, lanes = layout.lane_axis, layout.lanes
    full, rest = divmod(array.shape[axis], lanes)
    blocks = np.moveaxis(memory, -1, axis + 1)
    lead = (slice(None),) * axis
    whole, part = np.split(array, [full * lanes], axis)
    blocks[lead + (slice(0, full),)] = whole.reshape(
        *array.shape[:axis], full, lanes, *array.shape[axis + 1 :]
    )
    if rest:
        blocks[lead + (full,)] = 0
        blocks[lead + (full, slice(0, rest))] = part


def read_layout(memory: np.ndarray, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """A copy of the logical array of `shape` that lies in `memory`."""
    memory = _unordered(memory, layout)
    if layout.lane_axis is None:
        return memory.reshape(shape).copy()
    axis = layout.lane_axis
    blocks = np.moveaxis(memory, -1, axis + 1)
    merged = blocks.reshape(*shape[:axis], blocks.shape[axis] * layout.lanes, *shape[axis + 1 :])
    return np.ascontiguousarray(merged[(slice(None),) * axis + (slice(0, shape[axis]),)])


def _unordered(memory: np.ndarray, layout: Layout) -> np.ndarray:
    """A view of `memory` with the axes in their own order, the lanes last, without spare room."""
    if layout.order:
        places = np.argsort(layout.order)
        memory = memory.transpose(*places, *range(len(places), memory.ndim))
    for axis, count in layout.spare:
        memory = memory[(slice(None),) * axis + (slice(0, memory.shape[axis] - count),)]
    return memory

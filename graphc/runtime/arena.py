"""Arenas: the memory that a program's values live in, at offsets that the memory plan gives."""

import contextlib
import mmap
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from graphc.ir import SOURCES, Graph, Value, block_bytes

CACHE_LINE: Final = 64
PAGE: Final = 4096
HUGE_PAGE: Final = 1 << 21
LARGE: Final = 1 << 20
SLACK: Final = 256  # bytes at both ends that kernels may read, or write as padding


def aligned_zeros(nbytes: int, alignment: int = CACHE_LINE) -> np.ndarray:
    """uint8[nbytes] of zeros whose address is a multiple of `alignment`, a power of two.

    From 1 MiB on they lie in huge pages where the system has them: transformed weights of tens of
    megabytes would miss the TLB at every panel."""
    if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = np.zeros(nbytes + alignment, np.uint8)
    else:
        alignment = max(alignment, HUGE_PAGE)
        size = -(-nbytes // alignment) * alignment + alignment
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes]


def source_offsets(graph: Graph) -> tuple[dict[Value, int], int]:
    """Where parameters, states, inputs, constants and what is prepared from them lie in a memory of
    their own, and its bytes."""
    offsets, end = {}, 0
    for node in graph:
        if node.op in SOURCES or "prepared" in node.attrs:
            for value in node.outputs:
                offsets[value] = end
                end += block_bytes(value)
    return offsets, end


class Arena:
    """`nbytes` of zeroed memory, aligned to 64 bytes, or to 4096 and in huge pages from 1 MiB on.

    256 bytes more at each end belong to the arena: a kernel may load a whole vector across the
    end of a value. The system provides pages when they are first touched.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"an arena cannot have {nbytes} bytes")
        self.nbytes = nbytes
        alignment = PAGE if nbytes >= LARGE else CACHE_LINE
        slack = -(-SLACK // alignment) * alignment
        self._memory = aligned_zeros(nbytes + 2 * slack, alignment)
        self._bytes = self._memory[slack : slack + nbytes]
        self._base: int = self._memory.ctypes.data + slack

    def address(self, offset: int = 0) -> int:
        """Address of a byte; -256 to nbytes + 256 are within the arena."""
        if not -SLACK <= offset <= self.nbytes + SLACK:
            raise IndexError(f"offset {offset} lies outside an arena of {self.nbytes} bytes")
        return self._base + offset

    def view(
        self, offset: int, shape: tuple[int, ...], dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """The value at a byte offset as an array that shares the arena's memory, and keeps it."""
        dtype = np.dtype(dtype)
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if offset < 0 or offset + nbytes > self.nbytes:
            raise IndexError(
                f"bytes {offset} to {offset + nbytes} lie outside an arena of {self.nbytes} bytes"
            )
        return self._bytes[offset : offset + nbytes].view(dtype).reshape(shape)

    def poison(self) -> None:
        """Fills arena and slack with 0xFF: NaN in every float format, -1 in integers.

        What is read before it was written then shows in the result.
        """
        self._memory.fill(0xFF)

"""Render kernels of the kernel-level IR as CUDA kernels.

The interface between code generation and runtime, and between the renderers:

- A renderer is a function `render(kernel, precision) -> Rendering | None`. It turns one
  `graphc.codegen.kernel.Kernel`, all of whose buffers are row-major (layouts with lanes are the
  CPU's), into one launch or several that run one after the other in one stream; None says that it
  has nothing better to offer for this kernel. `cuda_program.RENDERERS` lists them; the first
  that answers wins, and the last, `cuda_generic.render`, renders everything. The kernel is a copy.
- A launch holds the text of a Python module that defines `kernel`, a plain function in the words of
  `graphc.codegen.cuda_vocabulary` (and of `numba.cuda`, which sources import from
  `graphc.codegen.numba_cuda`, the only module that imports it). The text depends on nothing but
  what is compiled in (a tile, the shape of the expression), so that layers share kernels; it is
  stored in the kernel cache as a readable file, as on the CPU.
- The function's parameters are first its buffers, one pointer each, then its numbers, one int32
  each: `kernel(in0, in1, out0, n_i0, s_i0, ...)`. Both are passed by value, in the constant bank: a
  launch needs no table in memory. `buffers` says which of `kernel.buffers` each pointer is; the
  number `len(kernel.buffers)` is the launches' common workspace, `Rendering.workspace` bytes of the
  arena that live for this node only (partial sums of a split reduction). A pointer has the buffer's
  element type; bool lies as uint8, the workspace is float32. Every value begins at a multiple of 64
  bytes, so 128-bit access is legal at element offsets that are a multiple of four.
- Indices fit in 32 bits: `graphc.codegen.cuda_program` refuses larger buffers before it renders.
- Grid, block and dynamic shared memory belong to the launch, not to the source. Blocks have at most
  1024 threads; a kernel must be right for any grid that covers its work, and its barriers must be
  reached by all threads of a block. Nothing may depend on the order of threads or blocks: results
  have the same bits in every run (no floating-point atomics).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from graphc.codegen.kernel import Kernel

Dimensions = tuple[int, int, int]


@dataclass(frozen=True)
class CudaLaunch:
    """One launch of a generated kernel.

    source     Python text that defines `kernel`
    buffers    of each pointer parameter, its number in `Kernel.buffers`; one past them is the
               workspace
    numbers    of each int32 parameter, its value
    grid, block  (x, y, z): blocks of the grid, threads of a block
    shared     bytes of dynamic shared memory, beside the arrays that the source declares
    resident   blocks that a multiprocessor should hold at once: bounds the registers
    """

    source: str
    buffers: tuple[int, ...]
    numbers: tuple[int, ...]
    grid: Dimensions
    block: Dimensions
    shared: int = 0
    resident: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return math.prod(self.block)


@dataclass(frozen=True)
class Rendering:
    """The launches of one kernel, in order, and the bytes of workspace that they share."""

    launches: tuple[CudaLaunch, ...]
    workspace: int = 0


Renderer = Callable[[Kernel, str], Rendering | None]

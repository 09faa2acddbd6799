"""Cut the innermost loop so that what it reads stays in the second cache.

A 1x1 convolution over many pixels reads its images once for every few output channels. Block by
block of pixels, all output channels are computed while the block is near, and the images come from
memory once (Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", section
4, loop 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphc.codegen import core
from graphc.codegen.kernel import Access, Kernel, Loop

# What is not fetched again must be worth the shorter loops.
_WORTH = 0.6
# Of the second cache that a block, or weights, may take.
_SHARE = 0.55


def block_count(
    kernel: Kernel,
    operands: Sequence[Access],
    outer: Sequence[str],
    counts: Mapping[str, int],
) -> int:
    """Into how many equal blocks the innermost of two or more loops `outer` is cut; 1 for none.

    `operands` are those of the main sum, `counts` of each loop are a register tile."""
    *around, middle, last = outer
    images = [a for a in operands if a.stride(last) and not a.stride(middle)]
    weights = [a for a in operands if a.stride(middle) and not a.stride(last)]
    ragged = any(loop.ragged and last in (name, loop.block) for name, loop in kernel.loops.items())
    if len(images) + len(weights) < len(operands) or ragged:
        return 1

    def size(accesses: Sequence[Access]) -> float:
        loops = ({n for n, step in a.strides if step} - {*around} for a in accesses)
        return sum(4.0 * kernel.trips(names) for names in loops)

    passes = -(-kernel.loops[middle].extent // counts.get(middle, 1))
    extent, read, again = kernel.loops[last].extent, size(images), size(weights)
    near = _SHARE * core.L2_BYTES
    if read <= near:
        return 1
    most = extent // (4 * counts.get(last, 1))
    even = (n for n in range(math.ceil(read / near), most + 1) if extent % n == 0)
    blocks = next(even, 1)
    # Weights that fit beside a block are as near.
    rate = core.L3_BYTES_PER_CYCLE / core.L2_BYTES_PER_CYCLE if again < near else 1.0
    return blocks if read + rate * blocks * again < _WORTH * passes * read else 1


def cut(kernel: Kernel, loop: str, blocks: int) -> tuple[str, str]:
    """Cut a loop into blocks; returns the loop over the blocks and the one within."""
    block, inner = block_name(loop), f"{loop}l"
    count = kernel.loops.pop(loop).extent // blocks
    kernel.loops |= {block: Loop(block, blocks), inner: Loop(inner, count)}
    kernel.substitute({loop: ((block, count), (inner, 1))})
    return block, inner


def block_name(loop: str) -> str:
    """The loop over the blocks of one that is cut."""
    return f"{loop}b"

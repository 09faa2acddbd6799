"""Fetch the next panel of a large operand while register tiles work on the present one.

Transformed weights of a wide layer are tens of megabytes, of which a few register tiles read a
panel of a few kilobytes over and over, then the next. Hardware follows a stream within its page of
memory only: without help the first tile of each panel would wait for most lines of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from graphc.codegen import core
from graphc.codegen.kernel import Access, Ahead, Kernel

LINE = core.LINE_BYTES // 4  # elements of four bytes
# More tiles than this to a panel hardly wait for it.
_TILES = 16


def read_ahead(
    kernel: Kernel,
    operands: Iterable[Access],
    lane: str | None,
    counts: Mapping[str, int],
    order: Sequence[str],
) -> tuple[Ahead, ...]:
    """Vectors among the operands of a sum that several tiles read before they go on.

    `order`: loops around the sum that one thread runs, `counts` of which are a register tile."""
    if len(order) < 2 or lane is None:
        return ()
    *_, outside, inside = order
    tiles = -(-kernel.loops[inside].extent // counts.get(inside, 1))
    if not 1 < tiles <= _TILES:
        return ()
    found = []
    for access in operands:
        step = access.stride(outside)
        everything = sum(s * (kernel.loops[n].extent - 1) for n, s in access.strides)
        if (
            access.stride(lane) == 1
            and not access.stride(inside)
            and step
            and 4 * everything > core.L2_BYTES  # what stays there needs no help
        ):
            found.append(Ahead(access.buffer, inside, step * counts.get(outside, 1)))
    return tuple(found)


def contiguous(kernel: Kernel, access: Access, loops: Sequence[str], lanes: int) -> tuple[int, int]:
    """How many of the innermost loops of a sum read one piece of memory, of a few lines at most,
    and its elements."""
    elements, count = lanes, 0
    for name in reversed(loops):
        if access.stride(name) != elements or elements >= 4 * LINE:
            break
        elements *= kernel.loops[name].extent
        count += 1
    return count, elements

"""Fetch what the next tiles read while register tiles work on what they have.

Several register tiles read the same piece of a large operand over and over, then go on to the next
one: the panel of a few output channels of a wide layer's weights, one image of a weight gradient,
one interpolation point of transformed images. Hardware follows a stream within its page of memory
only: without help the first tiles of each piece would wait for most lines of it, and later ones
read nothing. So every few steps of the sum fetch their share of the next piece into the second
cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from graphc.codegen import core
from graphc.codegen.cache_blocks import block_name
from graphc.codegen.kernel import Access, Ahead, Kernel

LINE = core.LINE_BYTES // 4  # elements of four bytes
# Iterations of a sum for each share: fewer would notice the instructions, more would wait for the
# lines of one share.
_LEAST, _MOST = 6, 16
# Of the second cache that the next piece may take beside the present one.
_SHARE = 0.4
# Elements of a piece may lie so much further apart than side by side.
_DENSE = 1.25
# Of one share; more come too late one after the other.
_LINES = 4


def read_ahead(
    kernel: Kernel,
    operands: Iterable[Access],
    sums: Sequence[str],
    lane: str | None,
    counts: Mapping[str, int],
    nest: Sequence[str],
) -> tuple[Ahead, ...]:
    """Which of the operands of a sum over the loops `sums` are fetched ahead, and how, once a
    `long_loop` of it is cut.

    `nest`: the loops around the sum, of which a thread goes through all but the first from end to
    end; `counts` of them are a register tile."""
    if lane is None:
        return ()
    extent = {n: loop.extent for n, loop in kernel.loops.items()}
    tiles = {n: -(-extent[n] // counts.get(n, 1)) for n in nest}
    shares = _shares(kernel, sums)
    found = []
    for access in operands:
        everything = sum(abs(s) * (extent[n] - 1) for n, s in access.strides)
        place = _piece(access, nest, tiles)
        if place is None or 4 * everything <= core.L2_BYTES:  # what stays there needs no help
            continue
        inside = tuple(nest[place + 1 :])
        reach = {n: extent[n] for n in (*inside, *sums, lane)}
        reach[nest[place]] = counts.get(nest[place], 1)
        elements, leaps = _extent(access, reach)
        pieces = math.prod(reach[n] for n in leaps)
        if any(counts.get(n) != reach[n] and n not in shares for n in leaps):
            continue
        sharing, step = _shared_out(elements, [tiles[n] for n in inside], shares, leaps)
        if 4 * pieces * elements <= _SHARE * core.L2_BYTES and step <= _LINES * LINE:
            around = tuple(_distances(access, nest[: place + 1], extent, counts))
            found.append(Ahead(access.buffer, around, inside, sharing, step, leaps))
    return tuple(found)


def long_loop(kernel: Kernel, sums: Sequence[str]) -> tuple[str, int] | None:
    """The innermost loop of a sum and the parts to cut it into, so that not all of a tile's share
    is fetched at once; None if it is short, or has no such parts."""
    loop = kernel.loops[sums[-1]] if sums else None
    if loop is None or loop.block or loop.extent <= _MOST:
        return None
    parts = (loop.extent // n for n in range(_MOST, _LEAST - 1, -1) if loop.extent % n == 0)
    return next(((loop.name, n) for n in parts), None)


def _shares(kernel: Kernel, sums: Sequence[str]) -> dict[str, int]:
    """Iterations of the leading loops of a sum, once it is cut, that fetch a share each."""
    long = long_loop(kernel, sums)
    if long:
        name, count = long
        return {**{n: kernel.loops[n].extent for n in sums[:-1]}, block_name(name): count}
    count, below = len(sums), 1
    while count and below < _LEAST:
        count -= 1
        below *= kernel.loops[sums[count]].extent
    return {n: kernel.loops[n].extent for n in sums[:count]}


def _shared_out(
    elements: int, inside: Sequence[int], shares: Mapping[str, int], leaps: Sequence[str]
) -> tuple[tuple[str, ...], int]:
    """The fewest of the leading loops of a sum, with those that leap, whose iterations fetch a line
    each at most, and the elements of a share."""
    visits, loops = math.prod(inside), tuple(shares)
    for count in range(len(loops) + 1):
        if count and loops[count - 1] not in leaps:
            visits *= shares[loops[count - 1]]
        step = -(-elements // visits)
        if step <= LINE and set(leaps).isdisjoint(loops[count:]):
            break
    return loops[:count], step


def _piece(access: Access, nest: Sequence[str], tiles: Mapping[str, int]) -> int | None:
    """The place of the innermost loop that goes on to other elements after loops inside it have
    read the same ones again and again."""
    again = False
    for place in reversed(range(len(nest))):
        if again and access.stride(nest[place]) and tiles[nest[place]] > 1:
            return place
        again |= not access.stride(nest[place]) and tiles[nest[place]] > 1
    return None


def _extent(access: Access, reach: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Elements from the first to the last that so many iterations of loops read, and the loops that
    leap over others, or go backwards, and are left out of it."""
    length, leaps = 1, []
    for stride, name in sorted((s, n) for n, s in access.strides if reach.get(n, 1) > 1):
        if 0 < stride <= _DENSE * length:
            length += stride * (reach[name] - 1)
        else:
            leaps.append(name)
    return length, tuple(leaps)


def _distances(
    access: Access, nest: Sequence[str], extent: Mapping[str, int], counts: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    """Each loop from the innermost on, and how far its next tile lies from the last tile of those
    inside it."""
    back = 0
    for name in reversed(nest):
        count, step = counts.get(name, 1), access.stride(name)
        yield name, step * count - back
        back += step * (extent[name] - count)

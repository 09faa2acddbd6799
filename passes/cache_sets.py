"""Keep what a kernel touches together out of the same few sets of the first cache.

A cache of 64 sets finds a line by bits 6 to 11 of its address: places a multiple of 4096 bytes
apart share one set, which holds 8 lines. A Winograd transform writes the points of one patch (36
for F(4x4,3x3)) so far apart, and would wait for every other one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache

from graphc.ir import Layout

_LINE, _SETS = 64, 64
# More lines than this of one patch in a set meet others' there.
_LINES = 5


@cache
def spread(layout: Layout, shape: tuple[int, ...], along: int, itemsize: int = 4) -> Layout:
    """`layout` with the least spare room that spreads neighbours along an axis over the sets.

    Of an axis in the lanes, the neighbours are blocks. The room is behind one or both of the next
    two axes, at most 3 elements or blocks each."""
    axes = range(along + 1, min(along + 3, len(shape)))
    ways = [
        replace(layout, spare=tuple((a, n) for a, n in zip(axes, counts, strict=True) if n))
        for counts in itertools.product(range(4), repeat=len(axes))
    ]
    ways.sort(key=lambda way: way.strides(shape)[along])
    return next((way for way in ways if _lines(way, shape, along, itemsize) <= _LINES), layout)


def _lines(layout: Layout, shape: tuple[int, ...], along: int, itemsize: int) -> int:
    """The most lines in one set, of one line for each place along an axis."""
    step = layout.strides(shape)[along] * itemsize
    places = -(-shape[along] // layout.lanes) if along == layout.lane_axis else shape[along]
    return max(Counter(i * step // _LINE % _SETS for i in range(places)).values(), default=0)

"""What a register tile costs: a small model of one core (`graphc.codegen.core`) and its caches.

Fused multiply-adds and loads each issue two a cycle, a chain of multiply-adds has a latency of
four, and sums that do not fit the registers go through memory. Tiles whose operands leave the first
cache wait for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphc.codegen import core
from graphc.codegen.kernel import Access, Kernel
from graphc.expr import Expr

Tile = tuple[tuple[str, int], ...]

# What a line of an operand beyond the second cache costs for every separate piece of memory that a
# tile reads: the hardware fetches a few streams ahead of time, the more there are the later.
_STREAM_CYCLES = 0.14
# From the second cache hardware fetches ahead in a few pages at a time: what a line costs, though
# it is near, where the part of a tile reads from more of them.
_LATE_CYCLES = 0.9
_PAGES = 8
_PAGE_BYTES = 4096
# Of each line that a part's operands take in the first cache, where others pass through.
_EVICTED_CYCLES = 0.05
# Results that leave the second cache between parts cost so many times as much.
_FAR_RESULTS = 2.5


class TileCost:
    """Cycles per useful multiply-add of the register tiles of a kernel's main reduction.

    `factors` are the accesses behind either factor of its product, `order` the outer loops as
    nested. A tile runs the whole reduction, or a part of it, of `kept` iterations of its loops.
    `shared`: the loop of which a kernel in a group runs one iteration at a time."""

    def __init__(
        self,
        kernel: Kernel,
        main: Expr,
        factors: Sequence[Sequence[Access]],
        order: Sequence[str],
        lane: str | None,
        lanes: int,
        kept: Mapping[str, int] | None = None,
        shared: str | None = None,
    ):
        self.extents = {n: loop.extent for n, loop in kernel.loops.items()}
        inside = {n: (kept or {}).get(n, self.extents[n]) for n in main.attributes["loops"]}
        self.lane_is_reduced = inside.pop(lane, 0) > 0
        self.steps = math.prod(inside.values())
        self.parts = bool(kept)
        # A part's operands share the first cache with those of the next tiles, which arrive soon.
        self.first_cache = core.L1_BYTES // 2 if kept else core.L1_BYTES
        self.registers = core.registers(lanes)
        self.inner_first = [n for n in reversed(order) if n != lane]
        reach = {**inside, lane: lanes} if lane else inside
        self.factors = [[_Access(a, reach, lane, lanes) for a in accesses] for accesses in factors]
        self.reads = [read for reads in self.factors for read in reads]
        self.results = [_Access(s.access, {lane: lanes}, lane, lanes) for s in kernel.stores]
        around = {n: self.extents[n] for n in self.inner_first[:2]}
        self.far_results = sum(r.bytes(around) for r in self.results) > core.L2_BYTES
        nest = [n for n in reversed(self.inner_first) if n != shared]
        walked = [(r, self._again(r, nest)) for r in self.reads if {*nest[-1:]} & {*r.strides}]
        self.streamed = [r for r, inside in walked if r.bytes(inside) > core.L2_BYTES]
        # Parts of sums over windows, which read over one another's elements, hide less.
        self.straight = self.parts and not any(r.slides for r in self.reads)
        near = walked if self.straight else []
        self.near = [(r, inside) for r, inside in near if r not in self.streamed]

    def __call__(self, tile: Tile) -> float:
        accumulators = math.prod(c for _, c in tile)
        issue = self.steps * self._step(tile, accumulators)
        counts = dict(tile)
        memory = self._memory(counts)
        # Each multiply-add chain starts and ends once a tile, and its result goes to some lines.
        lines = sum(result.bytes(counts) for result in self.results) / core.LINE_BYTES
        outside = 15.0 + 0.5 * accumulators + 1.5 * lines
        if self.straight:
            # Added to what earlier parts left, while the next part starts, but for more chains than
            # keep the core busy.
            outside = lines * (_FAR_RESULTS if self.far_results else 1.0)
            outside += 6.0 * max(0, accumulators - self.registers // 2)
            outside += _EVICTED_CYCLES * self._bytes(counts) / core.LINE_BYTES
        elif self.parts:
            outside += 0.4 * accumulators - 20.0 + 1.3 * lines
        if self.lane_is_reduced:
            outside += 4.0 * accumulators
        late = sum(_STREAM_CYCLES * r.pieces(counts) * r.bytes(counts) for r in self.streamed)
        for r, inside in self.near:
            if r.pages(counts) > _PAGES and r.bytes({**counts, **inside}) > core.L1_BYTES:
                late += _LATE_CYCLES * r.bytes(counts)
        cycles = max(issue, memory) + 0.15 * min(issue, memory) + outside + late / core.LINE_BYTES
        waste = math.prod(-(-self.extents[n] // c) * c / self.extents[n] for n, c in tile)
        return cycles / (accumulators * self.steps) * waste

    def _step(self, tile: Tile, accumulators: int) -> float:
        """Cycles of one multiply-add for each accumulator."""
        values = []
        loads = pointers = 0.0
        for reads in self.factors:
            used = math.prod(c for n, c in tile if any(n in read.strides for read in reads))
            values.append(used)
            for read in reads:
                loads += used * read.width
                # Addresses that x86 cannot form from a base and one stride are pointers.
                far = math.prod(c for n, c in tile if n in read.far)
                pointers += max(0, far - 5)
                pointers += 0.2 * max(0, far - 2) if self.straight else 0.01 * far
        # Operands that are used once may be memory operands; the smaller side stays in registers.
        need = accumulators + min(values) + (1 if max(values) > 1 else 0)
        spilled = max(0, need - self.registers)
        # A spilled sum is stored and loaded once a step. Two loads a cycle is what the manual says;
        # cache banks meet now and then.
        latency = 12.0 if spilled else core.LATENCY
        # Where no register is left over, loads wait for one.
        full = 0.5 if need + 1 >= self.registers else 0.15
        issue = max(accumulators / core.MULTIPLY_ADDS_PER_CYCLE, 0.55 * loads, latency)
        return issue + full + 2.0 * spilled + 0.25 * pointers

    def _memory(self, counts: dict[str, int]) -> float:
        """Cycles in which the next cache delivers what a tile does not find in the first one.

        The inner loops whose operands fit the first cache together read them once."""
        bytes_ = self._bytes(counts)
        if bytes_ > core.L2_BYTES:
            return bytes_ / core.L3_BYTES_PER_CYCLE
        if bytes_ > self.first_cache:
            # Less room than twice the tile leaves some of it in the cache.
            gone = min(bytes_ / self.first_cache - 1, 1.0) if self.parts else 1.0
            return gone * bytes_ / core.L2_BYTES_PER_CYCLE
        tiles = 1
        for n in self.inner_first:
            count, extent = counts.get(n, 1), self.extents[n]
            if count >= extent:
                continue
            whole = self._bytes({**counts, n: extent})
            if whole > self.first_cache:
                bytes_ = self._bytes({**counts, n: 2 * count}) - bytes_
                break
            tiles *= -(-extent // count)
            counts, bytes_ = {**counts, n: extent}, whole
        return bytes_ / tiles / core.L2_BYTES_PER_CYCLE

    def _again(self, read: _Access, nest: Sequence[str]) -> dict[str, int]:
        """The loops inside the first one that reads the same elements of an operand again."""
        repeats = (i + 1 for i, n in enumerate(nest) if n not in read.strides)
        return {n: self.extents[n] for n in nest[next(repeats, 0) :]}

    def _bytes(self, counts: Mapping[str, int]) -> float:
        return sum(read.bytes(counts) for read in self.reads)


class _Access:
    """A read of a factor of the product, or a result, as the cost of a tile looks at it."""

    def __init__(
        self, access: Access, reach: Mapping[str | None, int], lane: str | None, lanes: int
    ):
        self.strides = {n: abs(stride) for n, stride in access.strides if stride}
        step = self.strides.get(lane, 0) if lane else 0
        self.width = 1 if step in (0, 1) else lanes  # loads of one element of the tile
        near = (1, lanes, 2 * lanes)
        self.far = frozenset(n for n, stride in self.strides.items() if stride not in near)
        self.outer = [n for n in self.strides if n not in reach]
        steps = {self.strides[n] for n in self.strides if reach.get(n, 1) > 1}
        self.slides = any(self.strides[n] in steps for n in self.outer)
        self.reach: dict[int, int] = {}
        for n, stride in self.strides.items():
            if n in reach:
                self.reach[stride] = self.reach.get(stride, 1) + reach[n] - 1
        self.known: dict[tuple[int, ...], tuple[float, int, float]] = {}

    def bytes(self, counts: Mapping[str, int]) -> float:
        """Bytes in the cache lines that one tile touches."""
        return self._found(counts)[0]

    def pieces(self, counts: Mapping[str, int]) -> int:
        """How many separate pieces of memory one tile touches."""
        return self._found(counts)[1]

    def pages(self, counts: Mapping[str, int]) -> float:
        """How many pages of memory those pieces lie in."""
        return self._found(counts)[2]

    def _found(self, counts: Mapping[str, int]) -> tuple[float, int, float]:
        key = tuple(counts.get(n, 1) for n in self.outer)
        if key not in self.known:
            self.known[key] = self._touched(key)
        return self.known[key]

    def _touched(self, counts: tuple[int, ...]) -> tuple[float, int, float]:
        reach = dict(self.reach)
        for n, count in zip(self.outer, counts, strict=True):
            stride = self.strides[n]
            reach[stride] = reach.get(stride, 1) + count - 1
        # (step, length): loops that step over one another, as windows do, overlap.
        runs: list[tuple[int, int]] = []
        for stride, extent in sorted(reach.items()):
            step, length = runs[-1] if runs else (stride, 1)
            if stride % step == 0 and stride <= step * length:
                runs[-1:] = [(step, length + (extent - 1) * (stride // step))]
            else:
                runs.append((stride, extent))
        size, pieces, pages = 4.0, 1, 1.0
        for step, length in runs:
            if 4.0 * step > max(size, core.LINE_BYTES):
                pieces *= length
                pages *= max(1.0, min(1.0, 4.0 * step / _PAGE_BYTES) * length)
            size = length * max(size, min(4.0 * step, core.LINE_BYTES))
        return max(size, core.LINE_BYTES), pieces, pages


def all_bytes(kernel: Kernel, access: Access) -> float:
    """Bytes in the lines that a kernel touches through an access."""
    return _Access(access, {n: loop.extent for n, loop in kernel.loops.items()}, None, 1).bytes({})

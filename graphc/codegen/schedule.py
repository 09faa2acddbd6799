"""Choose how a kernel runs on a CPU: its SIMD lane, register tile, loop order and shared loops.

The choice is a small cost model of one core: fused multiply-adds and loads each issue two a cycle,
a chain of multiply-adds has a latency of four, and values that do not fit the registers are
spilled. The candidates are enumerated; the cheapest wins, or the fastest of the cheapest few when
they are measured (`graphc.tuning`). Everything is deterministic.
"""

from __future__ import annotations

import itertools
import math

from graphc.codegen.kernel import Access, Kernel, Loop, Schedule
from graphc.codegen.reductions import known_factor
from graphc.expr import Expr

_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14)


def rank_schedules(
    kernel: Kernel,
    lanes: int,
    threads: int,
    blocks: str | None = None,
    together: int = 1,
    most: int = 1,
) -> list[Schedule]:
    """Up to `most` schedules of a kernel whose results already have their layouts, the one with the
    lowest predicted cost first; they differ in their register tiles.

    May split loops of the kernel.
    `blocks` names an outermost loop that is shared between threads by itself: the kernel runs
    within a group, `together` blocks at a time."""
    keep = {blocks} if blocks else set()
    collapse(kernel, bounded(kernel) | keep)
    fixed = bounded(kernel)
    lane = _choose_lane(kernel, lanes, fixed)
    tiles: list[tuple[tuple[str, int], ...]] = [()]
    if lane or _main_reduction(kernel):
        tiles = _rank_tiles(kernel, lane, lanes, fixed, {blocks: together}, most)
    outer = tuple(n for n in kernel.outer if n != lane)
    if not blocks:
        outer = _ordered(kernel, outer)
    schedules = []
    for tile in tiles:
        counts = dict(tile)
        trips = [math.ceil(kernel.loops[n].extent / counts.get(n, 1)) for n in outer]
        shared = 1 if blocks else _shared(trips, threads) if threads > 1 else 0
        schedules.append(Schedule(lane, tile, outer, shared))
    return schedules


def _ordered(kernel: Kernel, outer: tuple[str, ...]) -> tuple[str, ...]:
    """Loops over which neither factor of the main product can be used again come first.

    The points of a Winograd product are an example: what belongs to one stays in the cache."""
    main = _main_reduction(kernel)
    if main is None:
        return outer
    left, right = ({n for a in _operand(f) for n, _ in a.strides} for f in _factors(main))
    return tuple(sorted(outer, key=lambda n: n not in left & right))


def _shared(trips: list[int], threads: int) -> int:
    """How many leading loops to share between threads.

    The fewest that give every thread an equal or nearly equal part."""
    units = 1
    for number, count in enumerate(trips):
        units *= count
        if units % threads == 0 or units >= 8 * threads:
            return number + 1
    return len(trips) if units > 1 else 0


def loads(kernel: Kernel) -> list[Expr]:
    return [e for e in kernel.expressions() if e.op == "load"]


def bounded(kernel: Kernel) -> set[str]:
    """Loops that bounds checks look at.

    They are neither lanes nor tiles, whose elements would need checks each."""
    return {
        n
        for e in kernel.expressions()
        if e.op == "within"
        for index, _ in e.attributes["bounds"]
        for n, _ in index.terms
    }


def _in_argmax(kernel: Kernel) -> set[str]:
    return {
        n
        for e in kernel.expressions()
        if e.op == "reduce" and e.attributes["combine"] == "argmax"
        for n in e.attributes["loops"]
    }


def collapse(kernel: Kernel, fixed: set[str]) -> None:
    """Merge neighbouring outer loops that every access walks through without a gap.

    Elementwise kernels become one flat loop, the same for every shape."""
    if any(e.op in ("reduce", "position") for e in kernel.expressions()):
        return
    accesses = [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]
    lanes = {a.padded for a in accesses if a.padded}
    position = 0
    while position + 1 < len(kernel.outer):
        first, second = kernel.outer[position], kernel.outer[position + 1]
        extent = kernel.loops[second].extent
        plain = not {first, second} & (fixed | lanes) and not any(
            kernel.loops[n].ragged for n in (first, second)
        )
        split = any(loop.block in (first, second) for loop in kernel.loops.values())
        if (
            plain
            and not split
            and all(a.stride(first) == a.stride(second) * extent for a in accesses)
        ):
            merged = kernel.loops.pop(first).extent * extent
            kernel.loops[second] = Loop(second, merged)
            kernel.substitute({first: ()})
        else:
            position += 1
    if len(kernel.outer) == 1 and not lanes:
        name = kernel.outer[0]
        kernel.loops["i"] = Loop("i", kernel.loops.pop(name).extent)
        kernel.substitute({name: (("i", 1),)})


# ---- lane


def _choose_lane(kernel: Kernel, lanes: int, fixed: set[str]) -> str | None:
    blocked = [s.access.padded for s in kernel.stores if s.access.padded]
    if blocked:
        return blocked[0] if blocked[0] not in fixed else None
    accesses = [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]
    argmax = _in_argmax(kernel)
    main = _main_reduction(kernel)
    over = kernel.free(main.args[0]) if main else frozenset()
    # Multiply-adds, two a cycle: only lanes make them fewer.
    work = kernel.trips(over) / 2 if main else 0.0
    best: str | None = None
    best_cost = work + sum(kernel.trips(n for n, _ in a.strides) for a in accesses)
    for loop in kernel.loops.values():
        if loop.name in fixed or loop.name in argmax or loop.extent < 2:
            continue
        if loop.ragged and loop.extent != lanes:
            continue
        if any(loop.name == other.block and other.ragged for other in kernel.loops.values()):
            continue
        cost = _lane_cost(kernel, loop, accesses, lanes)
        cost += work * math.ceil(loop.extent / lanes) / loop.extent if loop.name in over else work
        if cost < best_cost:
            best, best_cost = loop.name, cost
    if best is None:
        return None
    return best if kernel.loops[best].extent == lanes else split_lane(kernel, best, lanes)


def _lane_cost(kernel: Kernel, loop: Loop, accesses: list[Access], lanes: int) -> float:
    vectors = math.ceil(loop.extent / lanes) / loop.extent
    cost = 0.0
    for access in accesses:
        trips = kernel.trips(n for n, _ in access.strides)
        stride = access.stride(loop.name)
        cost += trips if stride == 0 else trips * vectors * (1.0 if stride == 1 else 1.5 * lanes)
    if loop.name not in kernel.outer:
        # Lanes are folded once for each element that does not run over them.
        folded = [s for s in kernel.stores if not s.access.stride(loop.name)]
        cost += sum(4.0 * kernel.trips(n for n, _ in s.access.strides) for s in folded)
    return cost


def split_lane(kernel: Kernel, name: str, lanes: int) -> str:
    """Cut a loop into blocks of one vector; the inner part is the lane.

    The last vector may be ragged."""
    loop = kernel.loops.pop(name)
    block, lane = f"{name}b", f"{name}l"
    kernel.loops[block] = Loop(block, -(-loop.extent // lanes))
    kernel.loops[lane] = Loop(lane, lanes, block, loop.extent if loop.extent % lanes else None)
    kernel.substitute({name: ((block, lanes), (lane, 1))})
    return lane


# ---- tile


def multiply_adds(kernel: Kernel) -> int:
    """Those of the main reduction; 0 if there is none."""
    main = _main_reduction(kernel)
    return kernel.trips(kernel.free(main.args[0])) if main else 0


def _main_reduction(kernel: Kernel) -> Expr | None:
    """The reduction that does most of the work, if there is one with a product."""
    found = [
        e
        for e in kernel.expressions()
        if e.op == "reduce" and e.attributes["combine"] == "sum" and _factors(e)
    ]
    return max(found, key=lambda e: kernel.trips(kernel.free(e.args[0])), default=None)


def _factors(reduction: Expr) -> tuple[Expr, ...]:
    """The two factors of a reduction's body; empty if it is not a product."""
    body = reduction.args[0]
    while body.op == "within":
        body = body.args[0]
    return body.args if body.op == "mul" else ()


def _windows(kernel: Kernel, main: Expr) -> tuple[str, ...]:
    """Loops of reductions around the main one (pooling over a convolution): unrolled whole."""
    inner = kernel.free(main)
    return tuple(
        dict.fromkeys(
            n
            for e in kernel.expressions()
            if e.op == "reduce" and e is not main
            for n in e.attributes["loops"]
            if n in inner
        )
    )


def _rank_tiles(
    kernel: Kernel,
    lane: str | None,
    lanes: int,
    fixed: set[str],
    limits: dict[str | None, int],
    most: int,
) -> list[tuple[tuple[str, int], ...]]:
    """Register tiles of the main reduction: at most two outer loops, besides pooling windows. Up to
    `most` of them, the cheapest first.

    `limits` caps the count of a loop."""
    main = _main_reduction(kernel)
    if not kernel.trips(kernel.loops):
        return [()]
    if main is None:
        return [_unrolled(kernel, lane, fixed, limits)]
    operands = [_operand(factor) for factor in _factors(main)]
    used = kernel.free(main)
    windows = _windows(kernel, main)
    if any(n in fixed or kernel.loops[n].ragged for n in windows):
        return [()]
    whole = _constant_matrix(kernel, main, lane, fixed)
    if whole:
        return [whole]
    base = [(n, kernel.loops[n].extent) for n in windows]
    blocks = {loop.block for loop in kernel.loops.values() if loop.ragged}
    candidates = [
        n
        for n in kernel.outer
        if n not in (lane, *fixed, *blocks)
        and not kernel.loops[n].ragged
        and kernel.loops[n].extent > 1
        and n in used
    ]
    # Blocks of ragged lanes may be unrolled where the inner loop reads a padded layout and so
    # needs no tails.
    block = kernel.loops[lane].block if lane and kernel.loops[lane].ragged else None
    if lane and block is not None and block in kernel.outer:
        accesses = [a for operand in operands for a in operand]
        straight = all(a.stride(lane) == 1 for a in _lane_accesses(kernel, lane))
        if (
            straight
            and all(a.padded == lane for a in accesses if a.stride(lane))
            and kernel.loops[block].extent > 1
        ):
            candidates.append(block)
    costs: dict[tuple[tuple[str, int], ...], float] = {}
    for pair in itertools.combinations(candidates, min(2, len(candidates))):
        for counts in itertools.product(*[_options(kernel, n, limits) for n in pair]):
            chosen = dict(zip(pair, counts, strict=True))
            if math.prod(counts) * math.prod(c for _, c in base) > 32:
                continue
            tile = [(n, chosen[n]) for n in kernel.outer if chosen.get(n, 1) > 1] + base
            cost = _tile_cost(kernel, main, operands, tile, lane, lanes)
            costs.setdefault(tuple(tile), round(cost, 9))
    return sorted(costs, key=costs.__getitem__)[:most] or [tuple(base)]


def _lane_accesses(kernel: Kernel, lane: str) -> list[Access]:
    accesses = [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]
    return [a for a in accesses if a.stride(lane)]


def _unrolled(
    kernel: Kernel, lane: str | None, fixed: set[str], limits: dict[str | None, int]
) -> tuple[tuple[str, int], ...]:
    """A few iterations of the innermost outer loop at once.

    Independent chains hide latencies and share the work of addresses. Only counts that divide the
    loop, so that nothing is computed twice."""
    inner = next((n for n in reversed(kernel.outer) if n != lane), None)
    if (
        lane is None
        or inner is None
        or inner in fixed
        or inner in limits
        or kernel.loops[inner].ragged
    ):
        return ()
    if kernel.outer == (inner, lane):
        return ()  # one flat loop: memory sets the pace, and one kernel serves every size
    if any(loop.block == inner and loop.ragged for loop in kernel.loops.values()):
        return ()
    extent = kernel.loops[inner].extent
    count = next((c for c in (4, 5, 3, 7, 2) if extent % c == 0), 1)
    argmax = any(
        e.op == "reduce" and e.attributes["combine"] == "argmax" for e in kernel.expressions()
    )
    return ((inner, count),) if count > 1 and not (argmax and count > 5) else ()


def _constant_matrix(
    kernel: Kernel, main: Expr, lane: str | None, fixed: set[str]
) -> tuple[tuple[str, int], ...] | None:
    """The tile in which products with small constant matrices are lines of code, one for each row.

    The matrix may be applied twice, from both sides."""
    if lane is None or known_factor(main.args[0]) is None:
        return None
    rows: set[str] = set()
    loops: list[str] = []
    for e in kernel.expressions():
        if e.op != "reduce" or e.attributes["combine"] != "sum":
            continue
        factors = known_factor(e.args[0])
        if factors is None:
            return None
        strides = dict(factors[0].attributes["access"].strides)
        if any(n not in strides for n in e.attributes["loops"]):
            return None  # loops that the matrix does not know would be sums of their own
        rows |= {n for n in strides if n in kernel.outer}
        loops += e.attributes["loops"]
    whole = [n for n in kernel.outer if n in rows] + loops
    extents = [kernel.loops[n].extent for n in whole]
    ragged = {loop.block for loop in kernel.loops.values() if loop.ragged}
    if any(n in fixed or n == lane or n in ragged or kernel.loops[n].ragged for n in whole):
        return None
    return tuple(zip(whole, extents)) if rows and max(extents) <= 12 else None


def _options(kernel: Kernel, loop: str, limits: dict[str | None, int]) -> list[int]:
    most = min(kernel.loops[loop].extent, limits.get(loop, max(_COUNTS)))
    return [c for c in _COUNTS if c <= most and (loop not in limits or most % c == 0)]


def _tile_cost(
    kernel: Kernel,
    main: Expr,
    operands: list[list[Access]],
    tile: list[tuple[str, int]],
    lane: str | None,
    lanes: int,
) -> float:
    """Cycles per useful multiply-add, from instruction issue and what the tile reads of the caches.

    One tile runs the whole reduction: `steps` times `accumulators` multiply-adds. `operands` are
    the accesses behind either factor."""
    counts = dict(tile)
    reach = {**counts, lane: lanes} if lane else counts
    registers = 32 if lanes in (4, 16) else 16
    loops = [n for n in main.attributes["loops"] if n != lane]
    steps = kernel.trips(loops)
    accumulators = math.prod(counts.values())
    values: list[int] = []
    loads = fresh = footprint = pointers = 0.0
    inner = next((n for n in reversed(kernel.outer) if n != lane), None)
    for accesses in operands:
        used = math.prod(c for n, c in tile if any(a.stride(n) for a in accesses))
        values.append(used)
        for a in accesses:
            width = lanes if lane and a.stride(lane) not in (0, 1) else 1
            loads += used * width
            # Addresses that x86 cannot form from a base and one stride are pointers of their own.
            far = math.prod(c for n, c in tile if a.stride(n) not in (0, 1, -1, lanes, 2 * lanes))
            pointers += max(0, far - 5)
            size = _touched(kernel, a, reach, loops)
            footprint += size
            if inner is not None and a.stride(inner):
                step = 2 * counts.get(inner, 1)
                fresh += _touched(kernel, a, {**reach, inner: step}, loops) - size
    # Operands that are used once may be memory operands; the smaller side stays in registers.
    need = accumulators + min(values) + (1 if max(values) > 1 else 0)
    spilled = max(0, need - registers)
    # Two loads a cycle is what the manual says; cache banks meet now and then.
    step_cycles = max(accumulators / 2, 0.55 * loads, 4.0) + 0.5 + 2.0 * spilled + 0.25 * pointers
    issue = steps * step_cycles
    if footprint > _L2_BYTES:
        memory = footprint / _L3_BYTES_PER_CYCLE
    else:
        memory = (footprint if footprint > _L1_BYTES else fresh) / _L2_BYTES_PER_CYCLE
    # Each multiply-add chain starts and ends once a tile; stores to distant lines cost a bit more.
    outside = 15.0 + 1.5 * accumulators
    waste = math.prod(
        math.ceil(kernel.loops[n].extent / c) * c / kernel.loops[n].extent for n, c in tile
    )
    cycles = max(issue, memory) + 0.15 * min(issue, memory) + outside
    return cycles / (accumulators * steps) * waste


# What a tile may keep in the first and second cache, and what a core gets from the next one.
_LINE_BYTES = 64.0
_L1_BYTES = 28_000
_L2_BYTES = 400_000
_L2_BYTES_PER_CYCLE = 24.0
_L3_BYTES_PER_CYCLE = 9.0


def _operand(factor: Expr) -> list[Access]:
    """The memory accesses behind one factor of the product."""
    found, stack = [], [factor]
    while stack:
        e = stack.pop()
        if e.op == "load":
            found.append(e.attributes["access"])
        stack.extend(e.args)
    return found


def _touched(kernel: Kernel, access: Access, counts: dict[str, int], loops: list[str]) -> float:
    """Bytes in the cache lines that one tile touches; `counts` includes the lane.

    Loops of one stride overlap (the sliding window of a convolution)."""
    reach: dict[int, int] = {}
    for n in [*counts, *loops]:
        stride = abs(access.stride(n))
        if stride:
            extent = counts[n] if n in counts else kernel.loops[n].extent
            reach[stride] = reach.get(stride, 1) + extent - 1
    run, runs = 1, 1
    for stride in sorted(reach):
        if stride <= run:
            run += stride * (reach[stride] - 1)
        else:
            runs *= reach[stride]
    return runs * max(4.0 * run, _LINE_BYTES)

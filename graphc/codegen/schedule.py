"""Choose how a kernel runs on a CPU: its SIMD lane, register tile, loop order and shared loops.

The candidates are enumerated; the cheapest by a small cost model (`graphc.codegen.tile_cost`) wins,
or the fastest of the cheapest few when they are measured (`graphc.tuning`). Everything is
deterministic.
"""

from __future__ import annotations

import itertools
import math

from graphc.codegen import cache_blocks, core, parts
from graphc.codegen.kernel import Access, Kernel, Loop, Schedule, expressions
from graphc.codegen.read_ahead import long_loop, read_ahead
from graphc.codegen.reductions import known_factor
from graphc.codegen.tile_cost import Tile, TileCost, all_bytes
from graphc.expr import Expr

# Cycles of a multiply-add that leave nothing to gain from cutting a sum into parts.
_GOOD = 0.56
# Tiles that are tried with every way to cut a sum.
_FEW = 8
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14)


def rank_schedules(
    kernel: Kernel,
    lanes: int,
    threads: int,
    blocks: tuple[str, ...] = (),
    together: int = 1,
    most: int = 1,
) -> list[Schedule]:
    """Up to `most` schedules of a kernel whose results already have their layouts, the one with the
    lowest predicted cost first; they differ in their register tiles.

    May split loops of the kernel.
    `blocks` are loops that are shared between threads by themselves: the kernel runs within a
    group, `together` blocks at a time."""
    collapse(kernel, bounded(kernel) | {*blocks})
    fixed = bounded(kernel)
    lane = _choose_lane(kernel, lanes, fixed, blocks)
    main = _main_reduction(kernel)
    outer = tuple(n for n in kernel.outer if n != lane)
    if blocks:
        outer = (*blocks, *(n for n in outer if n not in blocks))
    else:
        outer = _ordered(kernel, outer)
    limits = dict.fromkeys(blocks, together)
    tiles: dict[Tile, float] = {(): 0.0}
    if lane or main:
        tiles = _rank_tiles(kernel, lane, lanes, fixed, limits, outer)
    outside: tuple[str, ...] = ()
    # Bounds checks cut the range of their loops short: outside, most parts would be empty.
    whole = main is None or not fixed.isdisjoint(main.attributes["loops"])
    if main and not whole and min(tiles.values()) > _GOOD and parts.can_be_cut(kernel, main):
        kept, tiles = _choose_parts(kernel, main, lane, lanes, fixed, limits, outer, tiles)
        outside = parts.cut(kernel, kept) if kept else ()
        main = _main_reduction(kernel)
    uncut = len(outer)
    outer, tiles = _cut_last(kernel, outer, tiles, fixed, outside)
    schedules = []
    for tile in list(tiles)[:most]:
        counts = dict(tile)
        # Loops that end early, or with a smaller tile, are not shared.
        ends = [n for n, count in tile if outside and kernel.loops[n].extent % count]
        uneven = [i for i, n in enumerate(outer) if n in ends or kernel.loops[n].ragged]
        even = outer[: min(uneven, default=len(outer))]
        trips = [math.ceil(kernel.loops[n].extent / counts.get(n, 1)) for n in even]
        shared = len(blocks) or (_shared(trips, threads) if threads > 1 else 0)
        around: tuple[str, ...] = ()
        # Threads do not share parts, whose sums are one.
        order, first = outer, max(1 + len(outer) - uncut, shared)
        if outside and main:
            units = math.prod(trips[:first]) / threads
            if _around_all(kernel, main, outside, outer[:first], units, threads):
                around = outside
            else:
                order = (*outer[:first], *outside, *outer[first:])
        # A group goes on to its next block after other kernels, and only the last loop that is
        # shared goes from end to end but for where a thread's share ends.
        nest = order[1:] if blocks else order[max(shared - 1, 0) :]
        sums = _sum_loops(kernel, lane)
        ahead = read_ahead(kernel, _operands(kernel), sums, lane, counts, nest)
        long = long_loop(kernel, sums)
        if ahead and long:
            cache_blocks.cut(kernel, *long)
        schedules.append(Schedule(lane, tile, order, shared, around, not ends, ahead))
    return schedules


def _cut_last(
    kernel: Kernel,
    outer: tuple[str, ...],
    tiles: dict[Tile, float],
    fixed: set[str],
    outside: tuple[str, ...],
) -> tuple[tuple[str, ...], dict[Tile, float]]:
    """The loops and tiles once the innermost loop is cut into blocks for the second cache.

    What one part of a sum reads, of the loops `outside`, may stay there as it is."""
    blocks = 1
    if len(outer) > 1 and outer[-1] not in fixed:
        nest, counts = (*outside, *outer), dict(next(iter(tiles)))
        blocks = cache_blocks.block_count(kernel, _operands(kernel), nest, counts)
    if blocks == 1:
        return outer, tiles
    *around, middle, last = outer
    block, inner = cache_blocks.cut(kernel, last, blocks)
    renamed = {
        tuple((inner if n == last else n, count) for n, count in tile): cost
        for tile, cost in tiles.items()
    }
    return (*around, block, middle, inner), renamed


def _sum_loops(kernel: Kernel, lane: str | None) -> tuple[str, ...]:
    """The loops of the main sum, as nested."""
    main = _main_reduction(kernel)
    return tuple(n for n in main.attributes["loops"] if n != lane) if main else ()


def _operands(kernel: Kernel) -> list[Access]:
    """The memory accesses behind the product of the main sum, none if there is none."""
    main = _main_reduction(kernel)
    return [a for factor in _factors(main) for a in _operand(factor)] if main else []


def _around_all(
    kernel: Kernel,
    main: Expr,
    outside: tuple[str, ...],
    first: tuple[str, ...],
    units: float,
    threads: int,
) -> bool:
    """Whether parts go around the `first` loops, of which a thread has `units` iterations.

    The result is then read and written once a part, and operands that do not depend on these loops
    are read once, not in every iteration."""
    operands = [a for factor in _factors(main) for a in _operand(factor)]
    again = sum(all_bytes(kernel, a) for a in operands if not any(a.stride(n) for n in first))
    result = sum(all_bytes(kernel, store.access) for store in kernel.stores) / threads
    added = 2 * result * kernel.trips(outside)
    near = result <= core.L2_BYTES
    rate = core.L2_BYTES_PER_CYCLE if near else core.L3_BYTES_PER_CYCLE
    return added / rate < again * (units - 1) / core.L3_BYTES_PER_CYCLE


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

    A 1x1 convolution has one loop over pixels."""
    if any(e.op == "position" for e in kernel.expressions()) or _flatten(kernel, fixed):
        return
    accesses = _accesses(kernel)
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
    if len(kernel.outer) == 1 and not lanes and kernel.outer[0] not in fixed:
        name = kernel.outer[0]
        kernel.loops["i"] = Loop("i", kernel.loops.pop(name).extent)
        kernel.substitute({name: (("i", 1),)})


def _flatten(kernel: Kernel, fixed: set[str]) -> bool:
    """Make one loop of an elementwise kernel whose operands and results lie in memory alike and
    without gaps; lanes of padding are computed like all others. Returns whether it is one.

    The kernel is then the same for every shape and layout: one updates all parameters."""
    spread = [a for a in _accesses(kernel) if a.strides]
    if not spread or any(e.op == "reduce" for e in kernel.expressions()):
        return False
    walked = sorted(spread[0].strides, key=lambda item: item[1])
    names, first = [n for n, _ in walked], spread[0]
    if any(
        (a.offset, a.padded, {*a.strides}) != (first.offset, first.padded, {*walked})
        for a in spread
    ):
        return False
    if not fixed.isdisjoint(names) or {*names} != {*kernel.outer}:
        return False
    size = 1
    for name, step in walked:
        loop = kernel.loops[name]
        if step != size or (loop.ragged and first.padded != name):
            return False
        size *= loop.extent
    kernel.substitute({**dict.fromkeys(names, ()), names[0]: (("i", 1),)}, padded=False)
    kernel.loops = {"i": Loop("i", size)}
    return True


def _accesses(kernel: Kernel) -> list[Access]:
    return [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]


# ---- lane


def _choose_lane(
    kernel: Kernel, lanes: int, fixed: set[str], blocks: tuple[str, ...] = ()
) -> str | None:
    """The loop that costs least in the lanes, for one iteration of `blocks`; None: scalars."""
    blocked = [s.access.padded for s in kernel.stores if s.access.padded]
    if blocked:
        return blocked[0] if blocked[0] not in fixed else None
    main, argmax = _main_reduction(kernel), _in_argmax(kernel)
    reads = [e.attributes["access"] for e in loads(kernel)]
    factors = [a for f in _factors(main) for a in _operand(f)] if main else []
    over = kernel.free(main.args[0]) - {*blocks} if main else frozenset()
    # Multiply-adds, two a cycle: only lanes make them fewer.
    work = kernel.trips(over) / 2 if main else 0.0
    # A register tile reads an operand of the product again for every few of them.
    again = kernel.trips(over) / 4

    def cost_in_lanes(loop: Loop | None) -> float:
        cost = work
        if loop and loop.name in over:
            cost *= math.ceil(loop.extent / lanes) / loop.extent
        for a in [*reads, *(s.access for s in kernel.stores)]:
            trips: float = kernel.trips(n for n, _ in a.strides if n not in blocks)
            if loop and a.stride(loop.name):
                near = a.stride(loop.name) == 1
                if not near and a in factors:
                    trips = max(trips, again)
                vectors = math.ceil(loop.extent / lanes) / loop.extent
                trips *= vectors * (1.0 if near else 1.5 * lanes)
            cost += trips
        if loop and loop.name not in kernel.outer:
            # Lanes are folded once for each element that does not run over them.
            folded = [s.access for s in kernel.stores if not s.access.stride(loop.name)]
            cost += sum(
                4.0 * kernel.trips(n for n, _ in a.strides if n not in blocks) for a in folded
            )
        return cost

    best, best_cost = None, cost_in_lanes(None)
    for loop in kernel.loops.values():
        if loop.name in fixed or loop.name in argmax or loop.name in blocks or loop.extent < 2:
            continue
        if loop.ragged and loop.extent != lanes:
            continue
        if any(loop.name == other.block and other.ragged for other in kernel.loops.values()):
            continue
        cost = cost_in_lanes(loop)
        if cost < best_cost:
            best, best_cost = loop.name, cost
    if best is None:
        return None
    return best if kernel.loops[best].extent == lanes else split_lane(kernel, best, lanes)


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
    """Loops of reductions around the main one (pooling over a convolution): unrolled whole.

    A reduction that runs over other loops too, such as a sum of everything beside the main one, is
    a loop of its own."""
    inner = kernel.free(main)
    return tuple(
        dict.fromkeys(
            n
            for e in kernel.expressions()
            if e.op == "reduce" and e is not main and inner.issuperset(e.attributes["loops"])
            for n in e.attributes["loops"]
        )
    )


def _rank_tiles(
    kernel: Kernel,
    lane: str | None,
    lanes: int,
    fixed: set[str],
    limits: dict[str, int],
    order: tuple[str, ...],
    kept: dict[str, int] | None = None,
) -> dict[Tile, float]:
    """Register tiles of the main reduction and their costs, the cheapest first: at most two outer
    loops, besides pooling windows.

    `limits` caps the count of a loop. `kept`: the iterations of one part, where the sum is cut into
    parts; a tile that overlaps its neighbour would add twice there."""
    main = _main_reduction(kernel)
    if not kernel.trips(kernel.loops):
        return {(): 0.0}
    if main is None:
        return {_unrolled(kernel, lane, fixed, limits): 0.0}
    operands = [_operand(factor) for factor in _factors(main)]
    used = kernel.free(main)
    windows = _windows(kernel, main)
    if any(n in fixed or kernel.loops[n].ragged for n in windows):
        return {(): 0.0}
    whole = _constant_matrix(kernel, main, lane, fixed)
    if whole:
        return {whole: 0.0}
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
    if kept:  # the innermost loop may end with a smaller tile
        outside = candidates if len(order) < 2 else [n for n in candidates if n != order[-1]]
        limits = {**{n: kernel.loops[n].extent for n in outside}, **limits}
    shared = next(iter(limits), None)
    cost = TileCost(kernel, main, operands, order, lane, lanes, kept, shared)
    costs: dict[Tile, float] = {}
    for pair in itertools.combinations(candidates, min(2, len(candidates))):
        for counts in itertools.product(*[_options(kernel, n, limits) for n in pair]):
            chosen = dict(zip(pair, counts, strict=True))
            if math.prod(counts) * math.prod(c for _, c in base) > 32:
                continue
            tile = (*((n, chosen[n]) for n in kernel.outer if chosen.get(n, 1) > 1), *base)
            if tile not in costs:
                costs[tile] = round(cost(tile), 9)
    return dict(sorted(costs.items(), key=lambda item: item[1])) or {tuple(base): math.inf}


def _choose_parts(
    kernel: Kernel,
    main: Expr,
    lane: str | None,
    lanes: int,
    fixed: set[str],
    limits: dict[str, int],
    order: tuple[str, ...],
    tiles: dict[Tile, float],
) -> tuple[dict[str, int], dict[Tile, float]]:
    """How to cut a long sum into parts, {} for not at all, and the tiles that go with it; `tiles`
    are those of the whole sum."""
    ways = list(parts.ways_to_cut(kernel, main, lane))
    if not ways or lane is None:
        return {}, tiles
    factors = [_operand(factor) for factor in _factors(main)]
    shared = next(iter(limits), None)
    costs = [TileCost(kernel, main, factors, order, lane, lanes, kept, shared) for kept in ways]
    # The best few tiles of middling parts, the best parts for one of them, their best tile.
    middling = ways[len(ways) // 2]
    few = list(_rank_tiles(kernel, lane, lanes, fixed, limits, order, middling))[:_FEW]
    kept = ways[min(range(len(ways)), key=lambda way: min(map(costs[way], few)))]
    cut = _rank_tiles(kernel, lane, lanes, fixed, limits, order, kept)
    return (kept, cut) if min(cut.values()) < 0.97 * min(tiles.values()) else ({}, tiles)


def _lane_accesses(kernel: Kernel, lane: str) -> list[Access]:
    return [a for a in _accesses(kernel) if a.stride(lane)]


def _unrolled(kernel: Kernel, lane: str | None, fixed: set[str], limits: dict[str, int]) -> Tile:
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


def _constant_matrix(kernel: Kernel, main: Expr, lane: str | None, fixed: set[str]) -> Tile | None:
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


def _options(kernel: Kernel, loop: str, limits: dict[str, int]) -> list[int]:
    most = min(kernel.loops[loop].extent, limits.get(loop, max(_COUNTS)))
    return [c for c in _COUNTS if c <= most and (loop not in limits or most % c == 0)]


def _operand(factor: Expr) -> list[Access]:
    """The memory accesses behind one factor of the product; a reduction inside has its own."""
    inner = [e.args for e in expressions([factor]) if e.op == "reduce"]
    reads = [e for around in ((factor,), *inner) for e in expressions(around, False)]
    return [e.attributes["access"] for e in reads if e.op == "load"]

"""Choose how a kernel runs on a CPU: its SIMD lane, register tile, loop order and shared loops.

The choice is a small cost model of one core: fused multiply-adds and loads each issue two a cycle, a
chain of multiply-adds has a latency of four, and values that do not fit the registers are spilled. The
candidates are enumerated; the cheapest wins. Everything is deterministic.
"""

from __future__ import annotations

import itertools
import math

from graphc.codegen.kernel import Access, Kernel, Loop, Schedule
from graphc.expr import Expr

_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)


def choose_schedule(kernel: Kernel, lanes: int, threads: int) -> Schedule:
    """The schedule of a kernel whose results already have their layouts. May split loops of the kernel."""
    fixed = _bounded(kernel)
    lane = _choose_lane(kernel, lanes, fixed)
    tile = _choose_tile(kernel, lane, lanes, fixed) if lane or _main_reduction(kernel) else ()
    outer = [n for n in kernel.outer if n != lane]
    counts = dict(tile)
    trips = [math.ceil(kernel.loops[n].extent / counts.get(n, 1)) for n in outer]
    return Schedule(lane, tile, tuple(outer), _shared(trips, threads) if threads > 1 else 0)


def _shared(trips: list[int], threads: int) -> int:
    """How many leading loops to share: the fewest that give every thread an equal or nearly equal part."""
    units = 1
    for number, count in enumerate(trips):
        units *= count
        if units % threads == 0 or units >= 8 * threads:
            return number + 1
    return len(trips) if units > 1 else 0


def loads(kernel: Kernel) -> list[Expr]:
    return [e for e in kernel.expressions() if e.op == "load"]


def _bounded(kernel: Kernel) -> set[str]:
    """Loops that bounds checks look at: neither lanes nor tiles, whose elements would need checks each."""
    return {n for e in kernel.expressions() if e.op == "within" for index, _ in e.attributes["bounds"] for n, _ in index.terms}


def _in_argmax(kernel: Kernel) -> set[str]:
    return {n for e in kernel.expressions() if e.op == "reduce" and e.attributes["combine"] == "argmax" for n in e.attributes["loops"]}


# ---- lane


def _choose_lane(kernel: Kernel, lanes: int, fixed: set[str]) -> str | None:
    blocked = [s.access.padded for s in kernel.stores if s.access.padded]
    if blocked:
        return blocked[0] if blocked[0] not in fixed else None
    accesses = [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]
    argmax = _in_argmax(kernel)
    best, best_cost = None, sum(kernel.trips(n for n, _ in a.strides) for a in accesses)
    for loop in kernel.loops.values():
        if loop.name in fixed or loop.name in argmax or loop.extent < 2:
            continue
        if loop.ragged and loop.extent != lanes:
            continue
        if any(loop.name == other.block and other.ragged for other in kernel.loops.values()):
            continue
        cost = _lane_cost(kernel, loop, accesses, lanes)
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
        stored = sum(kernel.trips(n for n, _ in s.access.strides) for s in kernel.stores)
        cost += 4.0 * stored
    return cost


def split_lane(kernel: Kernel, name: str, lanes: int) -> str:
    """Cut a loop into blocks of one vector; the inner part is the lane. The last vector may be ragged."""
    loop = kernel.loops.pop(name)
    block, lane = f"{name}b", f"{name}l"
    kernel.loops[block] = Loop(block, -(-loop.extent // lanes))
    kernel.loops[lane] = Loop(lane, lanes, block, loop.extent if loop.extent % lanes else None)

    kernel.substitute({name: ((block, lanes), (lane, 1))})
    return lane


# ---- tile


def _main_reduction(kernel: Kernel) -> Expr | None:
    """The reduction that does most of the work, if there is one with a product."""
    found = [e for e in kernel.expressions() if e.op == "reduce" and e.attributes["combine"] == "sum" and _factors(e)]
    return max(found, key=lambda e: kernel.trips(kernel.free(e.args[0])), default=None)


def _factors(reduction: Expr) -> tuple[Expr, Expr] | None:
    body = reduction.args[0]
    while body.op == "within":
        body = body.args[0]
    return (body.args[0], body.args[1]) if body.op == "mul" else None


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


def _choose_tile(kernel: Kernel, lane: str | None, lanes: int, fixed: set[str]) -> tuple[tuple[str, int], ...]:
    main = _main_reduction(kernel)
    if main is None:
        return ()
    left, right = (kernel.free(f) for f in _factors(main))
    windows = _windows(kernel, main)
    if any(n in fixed or kernel.loops[n].ragged for n in windows):
        return ()
    base = [(n, kernel.loops[n].extent) for n in windows]
    blocks = {loop.block for loop in kernel.loops.values() if loop.ragged}
    ragged = {n for n in kernel.outer if kernel.loops[n].ragged}
    candidates = [
        n
        for n in kernel.outer
        if n not in (lane, *fixed, *ragged, *blocks) and kernel.loops[n].extent > 1 and n in left | right
    ]
    # Ragged lanes of a padded layout need no tail, so their block loop may be unrolled.
    if lane and kernel.loops[lane].ragged and kernel.loops[lane].block in kernel.outer:
        block = kernel.loops[lane].block
        accesses = [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]
        if all(a.padded == lane for a in accesses if a.stride(lane)) and kernel.loops[block].extent > 1:
            candidates.append(block)
    registers = 32 if lanes in (4, 16) else 16
    best, best_cost = tuple(base), math.inf
    for pair in itertools.combinations(range(len(candidates)), min(2, len(candidates))):
        for counts in itertools.product(*[_options(kernel, candidates[p]) for p in pair]):
            tile = [(candidates[p], c) for p, c in zip(pair, counts, strict=True) if c > 1]
            tile = [t for n in kernel.outer for t in tile if t[0] == n] + base
            cost = _tile_cost(kernel, tile, left, right, lane, registers)
            if cost < best_cost - 1e-9:
                best, best_cost = tuple(tile), cost
    return best


def _options(kernel: Kernel, loop: str) -> list[int]:
    return [c for c in _COUNTS if c <= kernel.loops[loop].extent]


def _tile_cost(kernel: Kernel, tile, left: frozenset[str], right: frozenset[str], lane: str | None, registers: int) -> float:
    """Cycles per useful multiply-add of the inner loop."""
    accumulators = math.prod(c for _, c in tile)
    a = math.prod(c for n, c in tile if n in left)
    b = math.prod(c for n, c in tile if n in right)
    # Operands that are used once may be memory operands; the smaller side stays in registers.
    need = accumulators + min(a, b) + (1 if max(a, b) > 1 else 0)
    spill = max(0, need - registers)
    cycles = max(accumulators / 2, (a + b) / 2, 4.0) + 0.5 + spill * 2.0
    waste = math.prod(math.ceil(kernel.loops[n].extent / c) * c / kernel.loops[n].extent for n, c in tile)
    return cycles / accumulators * waste

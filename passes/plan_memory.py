"""Place every value of a scheduled graph in one arena, reusing memory whose value is dead."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from graphc.ir import ALIGNMENT, Graph, Node, Value, root
from passes.base import Pass, note
from passes.liveness import (
    SizeOf,
    Storage,
    live_bytes,
    peak_bytes,
    storage_bytes,
    storages,
    updated_in_place,
)

log = logging.getLogger("graphc.memory")

# How often an order above the bound is tried again with the storages that overran it placed first,
# and how many placements all tries together may take: about a second.
_RETRIES = 24
_PLACEMENTS = 12000
# For how many storages is remembered which others live at the same time.
_ROWS = 2048
_HUGE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Placement:
    """Where one storage lies: bytes, its lifetime in positions (inclusive), offset in the arena.

    `shares` names the values that live in it one after another (computed in place); `name` is the
    first. Scratch memory of a group has `parts`, where they lie in the share of the first of
    `copies` threads; the others' shares follow.
    """

    name: str
    bytes: int
    first: int
    last: int
    offset: int
    shares: tuple[str, ...] = ()
    parts: tuple[Placement, ...] = ()
    copies: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets of all arena values of a graph, with what they cost.

    arena_bytes: size of the arena. lower_bound: bytes of the largest set of values that live at the
    same time; no plan for this order needs less. total_without_reuse: bytes if every value had its
    own memory. offsets: byte offset by (node name, output number); views have the offset of what
    they view, values of which threads have copies that of the first one. steps: bytes from such a
    copy to the next. in_place_updates: parameters and states whose update is computed straight into
    their own storage.
    """

    arena_bytes: int
    lower_bound: int
    total_without_reuse: int
    lifetimes: tuple[Placement, ...]
    offsets: dict[tuple[str, int], int]
    in_place_updates: tuple[str, ...] = ()
    steps: dict[tuple[str, int], int] = field(default_factory=dict)

    def offset(self, value: Value) -> int | None:
        """Byte offset of a value; None for what is not in the arena (sources, updates in place)."""
        return self.offsets.get((value.node.name, value.index))

    def step(self, value: Value) -> int:
        """Bytes from one thread's copy of a value to the next; 0 where all share it."""
        return self.steps.get((value.node.name, value.index), 0)

    def workspace_offset(self, node: Node) -> int | None:
        """Byte offset of a node's workspace, if it asked for one with `workspace_bytes`."""
        return self.offsets.get((f"{node.name}.workspace", 0))

    def check(self) -> None:
        """Prove that no two storages that live at the same time overlap and all lie in the arena,
        and the same of the parts of scratch memory.

        Raises AssertionError naming the two."""
        _check(self.lifetimes, 0, self.arena_bytes, "the arena")

    def report(self, rows: int = 12) -> str:
        """Text: a summary line, then the `rows` largest storages."""
        largest = sorted(self.lifetimes, key=lambda p: (-p.bytes, p.first))[:rows]
        lines = [
            f"planned {_bytes(self.arena_bytes)}, bound {_bytes(self.lower_bound)}, "
            f"sum {_bytes(self.total_without_reuse)}"
        ]
        for p in largest:
            also = f"  in place: {', '.join(p.shares[1:])}" if len(p.shares) > 1 else ""
            if p.parts:
                threads = f"{p.copies} threads" if p.copies > 1 else "one thread"
                also = f"  for {threads}, one after another: {', '.join(p.shares)}"
            lines.append(
                f"  {p.offset:>12} +{_bytes(p.bytes):<10} live {p.first}..{p.last}  {p.name}{also}"
            )
        if len(self.lifetimes) > rows:
            lines.append(f"  and {len(self.lifetimes) - rows} smaller")
        return "\n".join(lines)


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Compute a `MemoryPlan` and store it in `graph.annotations["memory"]`.

    Requires: the final execution order, layouts, and int dimensions. Ensures: the graph is the
    same, with the annotation; the plan holds for this graph only (any later pass makes it stale).
    See `passes.liveness.storages` for the options and the node attributes that matter.
    """

    size_of: SizeOf = storage_bytes
    outputs_live: bool = True
    updates_in_place: bool = False
    reuse: bool = True  # False: every value keeps memory of its own, to be looked at afterwards

    def run(self, graph: Graph) -> Graph:
        new = graph.copy()
        if not self.reuse:
            for node in new:
                node.attrs.pop("inplace", None)
        plan = plan_memory(
            new,
            self.size_of,
            outputs_live=self.outputs_live,
            updates_in_place=self.updates_in_place,
            reuse=self.reuse,
        )
        new.annotations["memory"] = plan
        if log.isEnabledFor(logging.INFO):
            log.info("%s: %s", new.name, plan.report())
        note(new, plan.report(rows=0).splitlines()[0])
        return new


def plan_memory(
    graph: Graph,
    size_of: SizeOf = storage_bytes,
    *,
    outputs_live: bool = True,
    updates_in_place: bool = False,
    reuse: bool = True,
) -> MemoryPlan:
    """The memory plan of a graph in its execution order."""
    pieces = storages(graph, size_of, outputs_live=outputs_live, updates_in_place=updates_in_place)
    if not reuse:
        for piece in pieces:
            piece.first, piece.last = 0, len(graph)
    bound = peak_bytes(pieces)
    within = [_place_parts(piece) for piece in pieces]
    offsets = place(pieces)
    where: dict[tuple[str, int], int] = {}
    steps: dict[tuple[str, int], int] = {}
    for piece, offset, inner in zip(pieces, offsets, within, strict=True):
        where.update(((v.node.name, v.index), offset) for v in piece.values)
        for part, at in zip(piece.parts, inner, strict=True):
            keys = [(v.node.name, v.index) for v in part.values]
            where.update((key, offset + at) for key in keys)
            steps.update((key, piece.size // piece.copies) for key in keys)
        if not piece.values:
            where[piece.name, 0] = offset
    for node in graph:
        for value in node.outputs:
            base = root(value)
            if base != value and (base.node.name, base.index) in where:
                where[node.name, value.index] = where[base.node.name, base.index]
    lifetimes = tuple(map(_placement, pieces, offsets, within))
    return MemoryPlan(
        arena_bytes=max((p.offset + p.bytes for p in lifetimes), default=0),
        lower_bound=bound,
        total_without_reuse=sum(
            p.size * max(1, len(p.values)) * whole.copies
            for whole in pieces
            for p in (whole.parts or [whole])
        ),
        lifetimes=lifetimes,
        offsets=where,
        in_place_updates=tuple(updated_in_place(graph)) if updates_in_place else (),
        steps=steps,
    )


def _place_parts(piece: Storage) -> list[int]:
    """Offsets of a storage's parts in a thread's share of it, which gets the size they take."""
    if not piece.parts:
        return []
    offsets = place(piece.parts)
    ends = (at + part.size for at, part in zip(offsets, piece.parts, strict=True))
    piece.size = piece.copies * max(ends)
    return offsets


def _placement(piece: Storage, offset: int, within: Sequence[int] = ()) -> Placement:
    parts = tuple(
        _placement(part, offset + at) for part, at in zip(piece.parts, within, strict=True)
    )
    names = [v.name for p in (piece, *piece.parts) for v in p.values]
    limits = piece.first, piece.last
    return Placement(piece.name, piece.size, *limits, offset, tuple(names), parts, piece.copies)


def place(pieces: Sequence[Storage]) -> list[int]:
    """Byte offset of each storage, such that storages that live at the same time do not overlap.

    Greedy best fit (Pisarchyk & Lee 2020, Efficient Memory Management for Deep Neural Net
    Inference, section 5): storages are placed one by one in the smallest gap between those that
    live at the same time. The order decides: by size, by breadth (those live at the fullest
    positions first), by area, and by position are all tried. While all are above the bound, the
    storages that stick out are moved to the front and placed again, from the best order on. Each
    placement scans the n storages with a few NumPy operations; large n get fewer tries, two at
    least.
    """
    if not pieces:
        return []
    start = min(p.first for p in pieces)
    live = live_bytes(pieces, max(p.last for p in pieces), start)
    bound = max(live)
    enough = bound + bound // 1000  # what is left to gain is not worth the time
    first = np.array([p.first for p in pieces])
    last = np.array([p.last for p in pieces])

    @lru_cache(_ROWS)
    def together(i: int) -> np.ndarray:
        """Which storages live at the same time as one."""
        return (first <= pieces[i].last) & (last >= pieces[i].first)

    breadth = [max(live[p.first - start : p.last - start + 1]) for p in pieces]
    orders: list[Callable[[int], tuple]] = [
        lambda i: (-pieces[i].size, pieces[i].first - pieces[i].last, i),
        lambda i: (-breadth[i], -pieces[i].size, i),
        lambda i: (-pieces[i].size * (pieces[i].last - pieces[i].first + 1), i),
        lambda i: (pieces[i].first - pieces[i].last, -pieces[i].size, i),
        lambda i: (pieces[i].first, -pieces[i].size, i),
    ]
    tries = max(2, _PLACEMENTS // len(pieces))
    tried: list[tuple[int, int, list[int], list[int]]] = []
    for key in orders[:tries]:
        order = sorted(range(len(pieces)), key=key)
        offsets, size = _best_fit(pieces, order, together)
        if size <= enough:
            return offsets
        tried.append((size, len(tried), order, offsets))
    tries -= len(tried)
    best_size, _, _, best = min(tried)
    for _, _, order, offsets in sorted(tried):
        for _ in range(min(_RETRIES, tries)):
            tries -= 1
            over = [i for i in order if offsets[i] + pieces[i].size > bound]
            moved = set(over)
            before, order = order, over + [i for i in order if i not in moved]
            if order == before:
                break
            offsets, size = _best_fit(pieces, order, together)
            if size < best_size:
                best, best_size = offsets, size
            if size <= enough:
                return best
    return best


def _best_fit(
    pieces: Sequence[Storage], order: Sequence[int], together: Callable[[int], np.ndarray]
) -> tuple[list[int], int]:
    """Offsets and arena size when storages are placed in the given order, each in the smallest gap
    of those that live at the same time, or above them."""
    count = len(pieces)
    offsets = [0] * count
    begin, end = np.zeros(count, np.int64), np.zeros(count, np.int64)
    # Those placed so far by offset, and their offsets.
    by_offset = np.empty(count, np.int64)
    taken_offsets: list[int] = []
    arena = placed = 0
    for i in order:
        size = pieces[i].size
        if size == 0:
            continue
        below = by_offset[:placed]
        taken = below[together(i)[below]]
        offset = 0
        if len(taken):
            covered = np.maximum.accumulate(end[taken])
            gaps = begin[taken]
            gaps[1:] -= covered[:-1]
            gaps[gaps < size] = _HUGE
            smallest = int(gaps.argmin())
            if gaps[smallest] == _HUGE:
                offset = int(covered[-1])
            elif smallest:
                offset = int(covered[smallest - 1])
        at = bisect_left(taken_offsets, offset)
        taken_offsets.insert(at, offset)
        by_offset[at + 1 : placed + 1] = by_offset[at:placed]
        by_offset[at] = i
        begin[i], end[i] = offset, offset + size
        placed += 1
        offsets[i] = offset
        arena = max(arena, offset + size)
    return offsets, arena


def _check(lifetimes: Sequence[Placement], begin: int, end: int, where: str) -> None:
    """Compares each storage with those live when it begins; all lie between `begin` and `end`."""
    live: list[Placement] = []
    for placed in sorted(lifetimes, key=lambda p: p.first):
        inside = begin <= placed.offset and placed.offset + placed.bytes <= end
        assert inside, f"{placed.name} lies outside {where}"
        assert placed.offset % ALIGNMENT == 0, f"{placed.name} is not aligned"
        live = [p for p in live if p.last >= placed.first]
        for other in live:
            apart = (
                placed.offset + placed.bytes <= other.offset
                or other.offset + other.bytes <= placed.offset
            )
            assert apart, f"{placed.name} and {other.name} share bytes at position {placed.first}"
        live.append(placed)
        share = placed.offset + placed.bytes // placed.copies
        _check(placed.parts, placed.offset, share, f"the first share of {placed.name}")


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"

"""Which elements of an operand's tile every thread of a block copies to shared memory.

A tile is some lines (rows of the left factor, columns of the right one) by `depth` terms of the
sum, stored term by term or line by line (`cuda_indices.line_place`). A thread copies four
neighbouring lines or terms at once (128 bits) where they lie together in memory, else single
elements, of which neighbouring threads take neighbouring lines or terms. What costs most is not the
copy, it is its address: a thread takes elements a known distance apart in memory as far as the
operand's shape has such, for which one address is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from graphc.codegen.contraction import Contraction, Factor
from graphc.codegen.cuda_indices import Flat, line_place, line_strides, term
from graphc.codegen.cuda_tiles import Storage
from graphc.codegen.kernel import Access


@dataclass(frozen=True)
class Deal:
    """How items in a row are dealt to `lanes` threads, `count` to each.

    Every `together` items that a thread gets in turn are `apart` items apart: neighbouring threads
    get neighbours, as many as that."""

    lanes: int
    count: int
    together: int
    apart: int

    def item(self, number: int) -> int:
        """Items from a thread's first one to another."""
        turns, place = divmod(number, self.together)
        return turns * self.together * self.lanes + place * self.apart

    def first(self, lane: str, unit: int) -> list[str]:
        """The first item of a thread by its number, times `unit`, as terms of a sum."""
        return [term(lane, unit)] if self.apart == self.lanes else self.group(lane, unit)

    def group(self, number: str, unit: int) -> list[str]:
        """The first item of a group: all threads' first groups are numbered by thread, then all
        second ones, and so on."""
        if self.together == 1:
            return [term(number, unit)]
        return [
            term(f"{number} // U({self.apart})", self.together * self.apart * unit),
            term(f"{number} % U({self.apart})", unit),
        ]


def deal(lanes: int, count: int, whole: int) -> Deal:
    """A deal with as many items together as possible, in groups that divide `whole` items.

    Neighbouring threads get at least as many neighbours as one gets items together, if there are so
    many threads: what they read at once lies together."""
    groups = [
        (n, apart)
        for n in range(2, count + 1)
        for apart in range(min(n, lanes), lanes + 1)
        if count % n == 0 and lanes % apart == 0 and whole % (n * apart) == 0
    ]
    return Deal(lanes, count, *max(groups, default=(1, lanes)))


@dataclass(frozen=True)
class Copies:
    """How the threads of a block share out the tiles of one factor.

    name     prefix of its variables: "left" or "right"
    lines    flat index of the loops that this factor alone has; the tile's first is `{name}_first`
    extent   lines of a tile
    base     its place in a stage of shared memory
    terms    of the sum, in whole tiles
    depth    terms of a tile
    padding  elements beside those of one term in shared memory
    stores   how it lies there
    """

    name: str
    factor: Factor
    contraction: Contraction
    lines: Flat
    extent: int
    base: int
    terms: int
    depth: int
    threads: int
    padding: int
    stores: Storage

    @cached_property
    def access(self) -> Access:
        access: Access = self.factor.expr.attributes["access"]
        return access

    @cached_property
    def inner(self) -> Flat:
        return Flat(self.contraction.kernel, self.contraction.inner)

    @cached_property
    def batch(self) -> Flat:
        return Flat(self.contraction.kernel, self.contraction.batch)

    @cached_property
    def strides(self) -> dict[str, int]:
        return dict(self.access.strides)

    @cached_property
    def line_checks(self) -> tuple[int, ...]:
        """Numbers of the bounds that depend on the line."""
        own = set(self.lines.loops)
        bounds = enumerate(self.factor.bounds)
        return tuple(k for k, (index, _) in bounds if own & {n for n, _ in index.terms})

    # ---- elements that lie together

    @cached_property
    def line_quads(self) -> bool:
        """Whether four neighbouring lines are copied at once."""
        if self.line_checks or self.stores is Storage.ONLY_BY_LINE:
            return False
        return self._quads_along(self.lines)

    @cached_property
    def term_quads(self) -> bool:
        """Whether four neighbouring terms are copied at once."""
        by_term = self.line_quads or self.stores is Storage.BY_TERM
        return not by_term and not self.factor.bounds and self._quads_along(self.inner)

    @property
    def by_line(self) -> bool:
        """Whether the tile is stored line by line."""
        by_line = self.stores in (Storage.BY_LINE, Storage.ONLY_BY_LINE)
        return self.term_quads or (by_line and not self.line_quads)

    @property
    def width(self) -> int:
        """Elements of one copy."""
        return 4 if self.line_quads or self.term_quads else 1

    @property
    def height(self) -> int:
        """Lines of one copy."""
        return 4 if self.line_quads else 1

    def _quads_along(self, flat: Flat) -> bool:
        """Whether every four neighbours of a flat index are neighbours in memory, and aligned."""
        flats = (self.inner, self.lines, self.batch)
        strides = [run.stride for other in flats for run in other.runs(self.strides)]
        if self._step(flat) != 1 or strides.count(1) != 1:
            return False
        strides.remove(1)
        return (
            self._span(flat) % 4 == 0
            and self.extent % (4 * self.threads // self.depth) == 0
            and not any(s % 4 for s in (self.access.offset, *strides))
        )

    def _step(self, flat: Flat) -> int:
        """From one to the next of a flat index in memory; 0 if they are not equally far apart."""
        runs = flat.runs(self.strides)
        return runs[-1].stride if runs and runs[-1].last == len(flat.loops) else 0

    def _span(self, flat: Flat) -> int:
        """How many are."""
        runs = flat.runs(self.strides)
        return flat.span(runs[-1]) if self._step(flat) else 1

    @cached_property
    def terms_first(self) -> bool:
        """Whether neighbouring threads copy neighbouring terms, not lines: those that lie closer
        in memory."""
        return not self.line_quads and self._closeness(self.inner) > self._closeness(self.lines)

    def _closeness(self, flat: Flat) -> float:
        """Elements that 32 neighbours read, by those they span in memory."""
        step = self._step(flat)
        return min(self._span(flat), 32) / abs(step) if step else 0.0

    @property
    def short(self) -> bool:
        """Whether there are fewer lines than a tile has."""
        return self.lines.extent < self.extent

    @property
    def overlaps(self) -> bool:
        """Whether the last tile begins in the one before it, to end with the last line."""
        return not self.short and self.lines.extent % self.extent != 0

    @cached_property
    def regular(self) -> bool:
        """Whether a thread's lines are the same distance apart, known when compiled."""
        loops = len(self.lines.runs(self.strides))
        return (
            not self.line_checks
            and not self.short
            and 0 <= 4 * self.extent * self._step(self.lines) < 2**31  # part of an instruction
            and (not loops or (loops == 1 and self._span(self.lines) == self.lines.extent))
        )

    # ---- a thread's share

    @cached_property
    def term_deal(self) -> Deal:
        """Which terms of a line a thread copies; those that are copied at once count as one."""
        unit = 4 if self.term_quads else 1
        depth = self.depth // unit
        one = Deal(depth, 1, 1, depth)
        if not (self.term_quads or self.terms_first) or self.factor.bounds:
            return one
        if self._step(self.inner) < 0 or (self.regular and not self.term_quads):
            return one
        whole = math.gcd(self._span(self.inner), self.depth) // unit
        deals = (deal(depth // n, n, whole) for n in (4, 2) if depth % n == 0)
        fitting = (d for d in deals if d.together == d.count)
        return next((d for d in fitting if self.extent % (self.threads // d.lanes) == 0), one)

    @cached_property
    def line_deal(self) -> Deal:
        """Which lines of a term a thread copies; those that are copied at once count as one."""
        lanes = self.threads // self.term_deal.lanes
        count = self.extent // (lanes * self.height)
        if self.regular:
            return Deal(lanes, count, count, lanes)
        if self.line_checks or self._step(self.lines) <= 0:
            return Deal(lanes, count, 1, lanes)
        return deal(lanes, count, math.gcd(self._span(self.lines), self.extent) // self.height)

    @property
    def addresses(self) -> int:
        """How many addresses a thread needs for a tile."""
        return self.line_deal.count // self.line_deal.together

    def copies(self) -> Iterator[tuple[int, int, int]]:
        """(lines, terms, elements of memory) from a thread's first copy to each, the last from the
        first copy with the same address; copies with one address follow one another."""
        for number in range(self.line_deal.count):
            line = self.line_deal.item(number) * self.height
            away = self.line_deal.item(number % self.line_deal.together) * self.height
            for turn in range(self.term_deal.count):
                own = self.term_deal.item(turn) * (4 if self.term_quads else 1)
                yield line, own, away * self._step(self.lines) + own * self._step(self.inner)

    @property
    def place(self) -> tuple[str, str]:
        """(lane among the terms, among the lines) of thread `t`."""
        if self.term_quads or self.terms_first:
            terms = self.term_deal.lanes
            return f"U(t % U({terms}))", f"U(t // U({terms}))"
        lines = self.line_deal.lanes
        return f"U(t // U({lines}))", f"U(t % U({lines}))"

    # ---- shared memory

    @property
    def size(self) -> int:
        """Elements of a tile in shared memory."""
        if self.by_line:
            return line_place(self.extent - 1, self.depth) + self.depth
        return self.depth * (self.extent + self.padding)

    def slot(self, line: int, term: int) -> int:
        """Where an element is."""
        if self.by_line:
            return line_place(line, self.depth) + term
        return term * (self.extent + self.padding) + line

    def slot_text(self, line: str, term: str) -> list[str]:
        """The same as terms of a sum."""
        if not self.by_line:
            return [f"+ {term} * U({self.extent + self.padding})", f"+ {line}"]
        one, four, many = line_strides(self.depth)
        return [
            f"+ {line} % U(4) * U({one})",
            f"+ {line} // U(4) % U(8) * U({four})",
            f"+ {line} // U(32) * U({many})",
            f"+ {term}",
        ]

"""The code that copies an operand of an implicit matrix product to shared memory, tile by tile.

Copies are asynchronous and go through no register; `cuda_copies.py` says which a thread makes.

What depends on the line is worked out before the loop over the terms. What depends on the term is
worked out in it, once for all lines: for the whole tile where its terms lie in a row in memory,
else for every term, or before the loop too where the terms are few. What the loop seldom needs it
reads from shared memory: registers are for the sums.
"""

from __future__ import annotations

import math
from functools import cached_property

from graphc.codegen.cuda_copies import Copies
from graphc.codegen.cuda_indices import term, total
from graphc.expr import Index

_FEW_TERMS = 1024  # where all begin takes 4 KiB of shared memory


class Operand(Copies):
    """One factor as the statements that copy its tiles."""

    def setup(self) -> list[str]:
        """Statements before the loop over the terms, the first of which may need a barrier."""
        name, (term_lane, line_lane) = self.name, self.place
        lines = [
            f"{name}_term = {total(self.term_deal.first(term_lane, 4 if self.term_quads else 1))}",
            f"{name}_lane = {line_lane}",
            f"{name}_line = {total(self.line_deal.first(f'{name}_lane', self.height))}",
            f"{name}_slot = {total(self.slot_text(f'{name}_line', f'{name}_term'), self.base)}",
        ]
        within = [term(f"{name}_term", self._step(self.inner))] if self._in_row else []
        if self.regular:
            lines.append(f"{name}_own = U({name}_first + {name}_line)")
            start = self.lines.terms(f"{name}_own", self.strides)
            start += self.batch.terms("item", self.strides) + within
            lines.append(f"{name}_at = {total(start, self.access.offset)}")
        else:
            lines += self._line_table()
            if within:
                lines.append(f"{name}_within = {total(within)}")
        if self._has_term_table:
            lines += self._term_table()
        checks = self._block_checks
        if checks:
            lines.append(f"{name}_checks = cuda.shared.array({len(checks)}, U)")
            lines.append("if t == U(0):")
        for k, number in enumerate(checks):
            index = self.factor.bounds[number][0]
            value = total(self._batch_terms(index), index.constant)
            lines.append(f"    {name}_checks[{k}] = {value}")
        return lines

    def _line_table(self) -> list[str]:
        """Statements that work out for every line with an address of its own where it begins, and
        its part of each check, one line a thread, and leave them in shared memory: those of one
        thread's copies together."""
        name, lanes, addresses = self.name, self.line_deal.lanes, self.addresses
        entries = lanes * addresses
        last = self.line_deal.item(self.line_deal.together - 1) * self.height
        last = self.lines.extent - last - self.height
        own = total([f"+ {name}_first", *self.line_deal.group("t", self.height)])
        start = self.lines.terms("line", self.strides) + self.batch.terms("item", self.strides)
        numbers = [total(start, self.access.offset)]
        for number in self.line_checks:
            index = self.factor.bounds[number][0]
            terms = self.lines.terms("line", dict(index.terms)) + self._batch_terms(index)
            numbers.append(total(terms, index.constant))
        lines = [
            f"{name}_lines = cuda.shared.array({entries * len(numbers)}, U, alignment=16)",
            f"{name}_own = U({name}_lane * U({addresses}))",
        ]
        if self.threads > entries:
            lines.append(f"if t < U({entries}):")
        inner = [
            f"line = min({own}, U({last}))" if self.short else f"line = {own}",
            f"to = U(t % U({lanes}) * U({addresses}) + t // U({lanes}))",
        ]
        for k, value in enumerate(numbers):
            inner.append(f"{name}_lines[{total(['+ to'], k * entries)}] = {value}")
        return [*lines, *("    " * (self.threads > entries) + line for line in inner)]

    def _term_table(self) -> list[str]:
        """Statements that leave in shared memory where every term begins."""
        return [
            f"{self.name}_terms = cuda.shared.array({self.terms}, U)",
            "k = U(t)",
            f"while k < U({self.terms}):",
            f"    {self.name}_terms[k] = {total(self.inner.terms('k', self.strides))}",
            f"    k = U(k + U({self.threads}))",
        ]

    @cached_property
    def _in_row(self) -> bool:
        """Whether the terms of a tile are equally far apart in memory."""
        runs = len(self.inner.runs(self.strides))
        if not self._step(self.inner):
            return not runs
        return runs == 1 or self._span(self.inner) % self.depth == 0

    @property
    def _has_term_table(self) -> bool:
        return not self._in_row and self.terms <= _FEW_TERMS

    @property
    def clipped(self) -> bool:
        """Whether terms of the last tile may lie past the last of the sum."""
        return self.terms != self.inner.extent

    @property
    def _block_checks(self) -> list[int]:
        """Numbers of the bounds whose part outside the sum is the same for the whole block."""
        return [k for k in range(len(self.factor.bounds)) if k not in self.line_checks]

    @property
    def prepared(self) -> bool:
        """Whether copies read what `setup` leaves in shared memory."""
        return not self.regular or self._has_term_table or bool(self._block_checks)

    def _batch_terms(self, index: Index) -> list[str]:
        return self.batch.terms("item", dict(index.terms))

    def copy(self) -> tuple[list[str], str]:
        """Statements that work out what to copy to `stage`, of the tile whose first term is `term`,
        and the one that begins the copies."""
        name = self.name
        lines = [f"{name}_k = U(term + {name}_term)"]
        inside = []
        if self.clipped:
            whole = self.inner.extent % self.depth == 0
            inside.append(f"{'term' if whole else f'{name}_k'} < U({self.inner.extent})")
        for number, (index, extent) in enumerate(self.factor.bounds):
            step = total(self.inner.terms(self._term_of(dict(index.terms)), dict(index.terms)))
            if number in self.line_checks:
                lines.append(f"{name}_step{number} = {step}")
            else:
                own = f"{name}_checks[{self._block_checks.index(number)}]"
                inside.append(f"U({own} + {step}) < U({extent})")
        if inside:
            lines.append(f"{name}_inside = {' and '.join(inside)}")
        lines.append(f"{name}_start = {self._start()}")
        line = f"{name}_at"
        if not self.regular:
            lines.append(f"{line} = read_{name}({name}_lines, {name}_own)")
        pointer = self.contraction.kernel.buffers[self.access.buffer].name
        call = f"tile, U(stage + {name}_slot), {pointer}, {name}_start, {line}"
        for k, number in enumerate(self.line_checks, 1):
            own = total([f"+ {name}_own"], k * self.extent)
            lines.append(f"{name}_own{number} = read_{name}({name}_lines, {own})")
        if self.line_checks:
            flags = (self._copied(copy, inside) for copy in range(self.line_deal.count))
            call += f", ({', '.join(flags)},)"
        elif inside:
            call += f", {name}_inside"
        return lines, f"copy_{name}({call})"

    def _term_of(self, strides: dict[str, int]) -> str:
        """The term at which to work out an affine function: the tile's first where all have the
        same value, else the thread's own."""
        below = (math.prod(self.inner.extents[run.last :]) for run in self.inner.runs(strides))
        same = all(extent % self.depth == 0 for extent in below)
        return "term" if same else f"{self.name}_k"

    def _start(self) -> str:
        """Where in memory the thread's first term begins, but for its line."""
        name = self.name
        if self._in_row:
            within = [] if self.regular or not self._step(self.inner) else [f"+ {name}_within"]
            return total(self.inner.terms("term", self.strides) + within)
        if self._has_term_table:
            return f"{name}_terms[{name}_k]"
        return total(self.inner.terms(f"{name}_k", self.strides))

    def _copied(self, copy: int, inside: list[str]) -> str:
        """Whether a copy has something to read, where that depends on the line."""
        name = self.name
        checks = [
            f"U({name}_own{number}[{copy}] + {name}_step{number}) < "
            f"U({self.factor.bounds[number][1]})"
            for number in self.line_checks
        ]
        return " and ".join([f"{name}_inside"] * bool(inside) + checks)

    def words(self) -> list[str]:
        """Statements that make the words `copy_left` and `read_left`, or right."""
        copies = list(self.copies())
        slots = tuple(self.slot(line, own) for line, own, _ in copies)
        starts = tuple(distance for *_, distance in copies)
        conditional = self.clipped or bool(self.factor.bounds)
        call = f"copy_lines({self.width}, {slots}, {starts}, {conditional})"
        read = [] if self.regular else [f"read_{self.name} = w.read_numbers({self.addresses})"]
        return [f"copy_{self.name} = w.{call}", *read]

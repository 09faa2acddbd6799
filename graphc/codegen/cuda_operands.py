"""Copy an operand of an implicit matrix product tile by tile from global to shared memory.

A tile is some lines (rows of the left factor, columns of the right one) by `depth` terms of the
sum, stored term by term. Copies are asynchronous and go through no register. Every thread copies
elements of one term: four neighbouring lines at once (128 bits) where they lie together in memory,
else single ones, of which neighbouring threads take neighbouring lines or terms. What depends on
the line is worked out before the loop over the terms, what depends on the term in it, once for all
lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from graphc.codegen.contraction import Contraction, Factor
from graphc.codegen.cuda_indices import Flat, total
from graphc.codegen.kernel import Access
from graphc.expr import Index


@dataclass(frozen=True)
class Operand:
    """How the threads of a block read the tiles of one factor.

    name     prefix of its variables: "left" or "right"
    lines    flat index of the loops that this factor alone has; the tile's first is `{name}_first`
    extent, depth  lines and terms of a tile
    base, pitch    place in a stage of shared memory, distance from one term to the next there
    """

    name: str
    factor: Factor
    contraction: Contraction
    lines: Flat
    extent: int
    depth: int
    threads: int
    base: int
    pitch: int

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
    def pointer(self) -> str:
        return self.contraction.kernel.buffers[self.access.buffer].name

    # ---- which elements a thread reads

    @cached_property
    def quads(self) -> bool:
        """Whether four neighbouring lines are four neighbours in memory, and aligned."""
        flats = (self.inner, self.lines, self.batch)
        strides = [run.stride for flat in flats for run in flat.runs(self.strides)]
        runs = self.lines.runs(self.strides)
        if self._line_checks or not runs or runs[-1].stride != 1 or strides.count(1) != 1:
            return False
        strides.remove(1)
        return (
            runs[-1].last == len(self.lines.loops)
            and self.lines.span(runs[-1]) % 4 == 0
            and not any(s % 4 for s in (self.access.offset, *strides))
            and self.extent % (4 * self.lanes) == 0
        )

    @cached_property
    def terms_first(self) -> bool:
        """Whether neighbouring threads copy neighbouring terms, not lines: those that lie closer
        in memory."""
        return not self.quads and self._closeness(self.inner) > self._closeness(self.lines)

    def _closeness(self, flat: Flat) -> float:
        """Elements that 32 neighbours read, by those they span in memory."""
        runs = flat.runs(self.strides)
        if not runs or runs[-1].last != len(flat.loops):
            return 0.0
        return min(flat.span(runs[-1]), 32) / abs(runs[-1].stride)

    @property
    def lanes(self) -> int:
        """Threads that copy elements of one term."""
        return self.threads // self.depth

    @property
    def step(self) -> int:
        """Lines from one of a thread's copies to the next."""
        return self.lanes * (4 if self.quads else 1)

    @property
    def copies(self) -> int:
        return self.extent // self.step

    @property
    def place(self) -> tuple[str, str]:
        """(term, line) of a tile that a thread copies first, from the thread's number `t`."""
        if self.terms_first:
            return f"U(t % U({self.depth}))", f"U(t // U({self.depth}))"
        line = f"t % U({self.lanes})"
        return f"U(t // U({self.lanes}))", f"U({line} * U(4))" if self.quads else f"U({line})"

    # ---- code

    def setup(self) -> list[str]:
        """Statements before the loop over the terms."""
        name, (own_term, own_line) = self.name, self.place
        lines = [f"{name}_term = {own_term}", f"{name}_line = {own_line}"]
        slot = [f"+ {name}_term * U({self.pitch})", f"+ {name}_line"]
        lines.append(f"{name}_slot = {total(slot, self.base)}")
        fixed = self.batch.terms("item", self.strides)
        for copy in range(1 if self.regular else self.copies):
            line = f"{name}_line{copy}"
            text = f"{name}_first + {name}_line"
            text = f"U({text} + U({copy * self.step}))" if copy else f"U({text})"
            if self.lines.extent % self.extent:
                text = f"min({text}, U({self.lines.extent - (4 if self.quads else 1)}))"
            lines.append(f"{line} = {text}")
            terms = self.lines.terms(line, self.strides) + fixed
            lines.append(f"{name}_at{copy} = {total(terms, self.access.offset)}")
            for number in self._line_checks:
                index = self.factor.bounds[number][0]
                terms = self.lines.terms(line, dict(index.terms)) + self._batch_terms(index)
                lines.append(f"{name}_check{number}_{copy} = {total(terms, index.constant)}")
        for number, (index, _) in enumerate(self.factor.bounds):
            if number not in self._line_checks:
                terms = self._batch_terms(index)
                lines.append(f"{name}_check{number} = {total(terms, index.constant)}")
        return lines

    @cached_property
    def _line_checks(self) -> tuple[int, ...]:
        """Numbers of the bounds that depend on the line."""
        own = set(self.lines.loops)
        bounds = enumerate(self.factor.bounds)
        return tuple(k for k, (index, _) in bounds if own & {n for n, _ in index.terms})

    def _batch_terms(self, index: Index) -> list[str]:
        return self.batch.terms("item", dict(index.terms))

    @cached_property
    def regular(self) -> bool:
        """Whether a thread's lines are the same distance apart, known when compiled."""
        runs = self.lines.runs(self.strides)
        return (
            not self._line_checks
            and self.lines.extent % self.extent == 0
            and 0 <= 4 * self.extent * self._line_stride < 2**31  # an offset in an instruction
            and (not runs or (len(runs) == 1 and self.lines.span(runs[0]) == self.lines.extent))
        )

    def copy(self, clipped: bool) -> list[str]:
        """Statements that begin the copy of the tile whose first term is `term` to `stage`;
        `clipped`: some of its terms may lie past the last."""
        name = self.name
        lines = [f"{name}_k = U(term + {name}_term)"]
        inside = [f"{name}_k < U({self.inner.extent})"] if clipped else []
        for number, (index, extent) in enumerate(self.factor.bounds):
            step = total(self.inner.terms(f"{name}_k", dict(index.terms)))
            if number in self._line_checks:
                lines.append(f"{name}_step{number} = {step}")
            else:
                inside.append(f"U({name}_check{number} + {step}) < U({extent})")
        if inside:
            lines.append(f"{name}_inside = {' and '.join(inside)}")
        start = total(self.inner.terms(f"{name}_k", self.strides))
        lines.append(f"{name}_from = {start}")
        starts = [f"U({name}_from + {name}_at{copy})" for copy in range(self.copies)]
        start = starts[0] if self.regular else f"({', '.join(starts)},)"
        call = f"tile, U(stage + {name}_slot), {self.pointer}, {start}"
        checks = [
            [
                f"U({name}_check{number}_{copy} + {name}_step{number}) < "
                f"U({self.factor.bounds[number][1]})"
                for number in self._line_checks
            ]
            for copy in range(self.copies)
        ]
        if self._line_checks:
            all_of = [" and ".join([*([f"{name}_inside"] * bool(inside)), *c]) for c in checks]
            call += f", ({', '.join(all_of)},)"
        elif inside:
            call += f", {name}_inside"
        lines.append(f"copy_{name}({call})")
        return lines

    def word(self, clipped: bool) -> str:
        """The call that makes the word `copy_left` or `copy_right`."""
        slots = tuple(copy * self.step for copy in range(self.copies))
        starts = tuple(slot * self._line_stride for slot in slots) if self.regular else None
        conditional = clipped or bool(self.factor.bounds)
        return f"copy_lines({4 if self.quads else 1}, {slots}, {starts}, {conditional})"

    @property
    def _line_stride(self) -> int:
        runs = self.lines.runs(self.strides)
        return runs[0].stride if runs else 0

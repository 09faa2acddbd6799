"""Copy an operand of an implicit matrix product tile by tile from global to shared memory.

A tile is some lines (rows of the left factor, columns of the right one) by `depth` terms of the
sum, stored term by term. Copies are asynchronous and go through no register. Every thread copies
elements of one term: four neighbouring lines at once (128 bits) where they lie together in memory,
else single ones, of which neighbouring threads take neighbouring lines or terms. Tensor cores read
tiles stored line by line too (`cuda_indices.line_place`): those whose lines are not copied four at
once; there a thread copies four neighbouring terms of some lines where these lie together.

What depends on the line is worked out before the loop over the terms, what depends on the term in
it, once for all lines. What the loop seldom needs it reads from shared memory: registers are for
the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from graphc.codegen.contraction import Contraction, Factor
from graphc.codegen.cuda_indices import Flat, line_place, line_strides, total
from graphc.codegen.kernel import Access
from graphc.expr import Index


@dataclass(frozen=True)
class Operand:
    """How the threads of a block read the tiles of one factor.

    name     prefix of its variables: "left" or "right"
    lines    flat index of the loops that this factor alone has; the tile's first is `{name}_first`
    extent   lines of a tile
    base     its place in a stage of shared memory
    depth    terms of a tile
    padding  elements beside those of one term there
    matrices  whether tensor cores read the tile
    """

    name: str
    factor: Factor
    contraction: Contraction
    lines: Flat
    extent: int
    base: int
    depth: int
    threads: int
    padding: int
    matrices: bool

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
    def line_quads(self) -> bool:
        """Whether four neighbouring lines are copied at once."""
        return (
            not self._line_checks
            and self.extent % (4 * self.lanes) == 0
            and self._quads_along(self.lines)
        )

    @cached_property
    def term_quads(self) -> bool:
        """Whether four neighbouring terms are copied at once."""
        return self.by_line and not self.factor.bounds and self._quads_along(self.inner)

    def _quads_along(self, flat: Flat) -> bool:
        """Whether every four neighbours of a flat index are neighbours in memory, and aligned."""
        flats = (self.inner, self.lines, self.batch)
        strides = [run.stride for other in flats for run in other.runs(self.strides)]
        runs = flat.runs(self.strides)
        if not runs or runs[-1].stride != 1 or strides.count(1) != 1:
            return False
        strides.remove(1)
        return (
            runs[-1].last == len(flat.loops)
            and flat.span(runs[-1]) % 4 == 0
            and not any(s % 4 for s in (self.access.offset, *strides))
        )

    @cached_property
    def terms_first(self) -> bool:
        """Whether neighbouring threads copy neighbouring terms, not lines: those that lie closer
        in memory."""
        return not self.line_quads and self._closeness(self.inner) > self._closeness(self.lines)

    @property
    def by_line(self) -> bool:
        """Whether the tile is stored line by line."""
        return self.matrices and not self.line_quads

    @property
    def size(self) -> int:
        """Elements of a tile in shared memory."""
        if self.by_line:
            return line_place(self.extent, self.depth)
        return self.depth * (self.extent + self.padding)

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
    def width(self) -> int:
        """Elements of one copy."""
        return 4 if self.line_quads or self.term_quads else 1

    @property
    def step(self) -> int:
        """Lines from one of a thread's copies to the next."""
        return self.lanes * self.width

    @property
    def copies(self) -> int:
        return self.extent // self.step

    @property
    def place(self) -> tuple[str, str]:
        """(term, line) of a tile that a thread copies first, from the thread's number `t`."""
        if self.term_quads:
            quads = self.depth // 4
            return f"U(t % U({quads}) * U(4))", f"U(t // U({quads}))"
        if self.terms_first:
            return f"U(t % U({self.depth}))", f"U(t // U({self.depth}))"
        line = f"t % U({self.lanes})"
        return f"U(t // U({self.lanes}))", f"U({line} * U(4))" if self.line_quads else f"U({line})"

    @property
    def _slot(self) -> list[str]:
        """The same in shared memory, as terms of a sum."""
        line, term = f"{self.name}_line", f"{self.name}_term"
        if not self.by_line:
            return [f"+ {term} * U({self.extent + self.padding})", f"+ {line}"]
        one, four, many = line_strides(self.depth)
        return [
            f"+ {line} % U(4) * U({one})",
            f"+ {line} // U(4) % U(8) * U({four})",
            f"+ {line} // U(32) * U({many})",
            f"+ {term}",
        ]

    # ---- code

    def setup(self) -> list[str]:
        """Statements before the loop over the terms, the first of which may need a barrier."""
        name, (own_term, own_line) = self.name, self.place
        lines = [f"{name}_term = {own_term}", f"{name}_line = {own_line}"]
        lines.append(f"{name}_slot = {total(self._slot, self.base)}")
        fixed = self.batch.terms("item", self.strides)
        if self.regular:
            lines.append(f"{name}_own = U({name}_first + {name}_line)")
            start = self.lines.terms(f"{name}_own", self.strides) + fixed
            lines.append(f"{name}_at = {total(start, self.access.offset)}")
        else:
            lines += self._table()
        checks = self._block_checks
        if checks:
            lines.append(f"{name}_checks = cuda.shared.array({len(checks)}, U)")
            lines.append("if t == U(0):")
        for k, number in enumerate(checks):
            index = self.factor.bounds[number][0]
            value = total(self._batch_terms(index), index.constant)
            lines.append(f"    {name}_checks[{k}] = {value}")
        return lines

    def _table(self) -> list[str]:
        """Statements that work out for every line where it begins, and its part of each check, one
        line a thread, and leave them in shared memory: those of one thread's copies together."""
        name, step, copies = self.name, self.step, self.copies
        last = self.lines.extent - (4 if self.line_quads else 1)
        own = f"U({name}_first + t)"
        start = self.lines.terms("line", self.strides) + self.batch.terms("item", self.strides)
        numbers = [total(start, self.access.offset)]
        for number in self._line_checks:
            index = self.factor.bounds[number][0]
            terms = self.lines.terms("line", dict(index.terms)) + self._batch_terms(index)
            numbers.append(total(terms, index.constant))
        size = self.extent * len(numbers)
        lines = [
            f"{name}_lines = cuda.shared.array({size}, U, alignment=16)",
            f"{name}_own = U({name}_line * U({copies}))",
        ]
        if self.threads > self.extent:
            lines.append(f"if t < U({self.extent}):")
        inner = [
            f"line = min({own}, U({last}))" if self.lines.extent % self.extent else f"line = {own}",
            f"to = U(t % U({step}) * U({copies}) + t // U({step}))",
        ]
        for k, value in enumerate(numbers):
            inner.append(f"{name}_lines[{total(['+ to'], k * self.extent)}] = {value}")
        return [*lines, *("    " * (self.threads > self.extent) + line for line in inner)]

    @cached_property
    def _line_checks(self) -> tuple[int, ...]:
        """Numbers of the bounds that depend on the line."""
        own = set(self.lines.loops)
        bounds = enumerate(self.factor.bounds)
        return tuple(k for k, (index, _) in bounds if own & {n for n, _ in index.terms})

    @property
    def _block_checks(self) -> list[int]:
        """Numbers of the others, whose part outside the sum is the same for the whole block."""
        return [k for k in range(len(self.factor.bounds)) if k not in self._line_checks]

    @property
    def prepared(self) -> bool:
        """Whether copies read what `setup` leaves in shared memory."""
        return not self.regular or bool(self._block_checks)

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
                own = f"{name}_checks[{self._block_checks.index(number)}]"
                inside.append(f"U({own} + {step}) < U({extent})")
        if inside:
            lines.append(f"{name}_inside = {' and '.join(inside)}")
        start = total(self.inner.terms(f"{name}_k", self.strides))
        line = f"{name}_at" if self.regular else f"read_{name}({name}_lines, {name}_own)"
        call = f"tile, U(stage + {name}_slot), {self.pointer}, {start}, {line}"
        for k, number in enumerate(self._line_checks, 1):
            own = total([f"+ {name}_own"], k * self.extent)
            lines.append(f"{name}_own{number} = read_{name}({name}_lines, {own})")
        if self._line_checks:
            call += f", ({', '.join(self._copied(copy, inside) for copy in range(self.copies))},)"
        elif inside:
            call += f", {name}_inside"
        lines.append(f"copy_{name}({call})")
        return lines

    def _copied(self, copy: int, inside: list[str]) -> str:
        """Whether a copy has something to read, where that depends on the line."""
        name = self.name
        checks = [
            f"U({name}_own{number}[{copy}] + {name}_step{number}) < "
            f"U({self.factor.bounds[number][1]})"
            for number in self._line_checks
        ]
        return " and ".join([f"{name}_inside"] * bool(inside) + checks)

    def words(self, clipped: bool) -> list[str]:
        """Statements that make the words `copy_left` and `read_left`, or right."""
        lines = tuple(copy * self.step for copy in range(self.copies))
        slots = tuple(line_place(line, self.depth) for line in lines) if self.by_line else lines
        starts = tuple(line * self._line_stride for line in lines) if self.regular else None
        conditional = clipped or bool(self.factor.bounds)
        call = f"copy_lines({self.width}, {slots}, {starts}, {conditional})"
        read = [] if self.regular else [f"read_{self.name} = w.read_numbers({self.copies})"]
        return [f"copy_{self.name} = w.{call}", *read]

    @property
    def _line_stride(self) -> int:
        runs = self.lines.runs(self.strides)
        return runs[0].stride if runs else 0

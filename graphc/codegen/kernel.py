"""The loop-level IR that every target renders: loops, memory accesses and scalar expressions.

A `Kernel` computes `stores` for every point of its `outer` loops. Expressions are those of
`graphc.expr`, in which each `read` has become a `load` of an affine address. Nothing says yet how
it runs: which loop lies in SIMD lanes, which are unrolled into registers and which are shared
between threads is the `Schedule`, chosen afterwards from the same loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from graphc.expr import Expr, Index


@dataclass(frozen=True)
class Loop:
    """A counted loop. The inner part of a split whose last block is short has `total` set: at block
    b it runs `min(extent, total - b * extent)` times."""

    name: str
    extent: int
    block: str | None = None
    total: int | None = None

    @property
    def ragged(self) -> bool:
        return self.total is not None


@dataclass(frozen=True)
class Access:
    """Element `offset + sum(stride * loop)` of a buffer. `padded` names the loop whose unused
    positions in the last block exist in memory (a blocked layout), so that they may be touched."""

    buffer: int
    offset: int
    strides: tuple[tuple[str, int], ...]
    padded: str | None = None

    def stride(self, loop: str | None) -> int:
        """Elements from one iteration of `loop` to the next; 0 if it is not among the loops."""
        for name, stride in self.strides:
            if name == loop:
                return stride
        return 0


@dataclass(frozen=True)
class Buffer:
    """A kernel argument: the memory of one operand or result."""

    name: str
    dtype: str
    written: bool


@dataclass(frozen=True)
class Store:
    """`access <- expr`, inside the `loops` that the outer loops do not cover."""

    access: Access
    expr: Expr
    loops: tuple[str, ...]


@dataclass
class Kernel:
    name: str
    loops: dict[str, Loop]
    outer: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    stores: tuple[Store, ...]
    _free: dict[int, frozenset[str]] = field(default_factory=dict, repr=False)
    _walked: tuple[tuple[Store, ...], list[Expr]] = field(default=((), []), repr=False)

    def free(self, expr: Expr) -> frozenset[str]:
        """Loops that the value of an expression depends on."""
        known = self._free.get(id(expr))
        if known is None:
            loops: set[str] = set()
            for arg in expr.args:
                loops |= self.free(arg)
            if expr.op == "load":
                loops |= {name for name, _ in expr.attributes["access"].strides}
            elif expr.op == "position":
                loops |= {name for name, _ in expr.attributes["index"].terms}
            elif expr.op == "within":
                loops |= {n for index, _ in expr.attributes["bounds"] for n, _ in index.terms}
            elif expr.op == "reduce":
                loops -= set(expr.attributes["loops"])
            known = self._free[id(expr)] = frozenset(loops)
        return known

    def expressions(self) -> list[Expr]:
        """Every distinct expression, operands first."""
        if self._walked[0] is not self.stores:
            self._walked = self.stores, expressions(store.expr for store in self.stores)
        return self._walked[1]

    def __getstate__(self) -> tuple[Any, ...]:
        """Expressions as a flat table: no depth of them is one of pickle's recursion."""
        number: dict[int, int] = {}
        rows: list[tuple[Any, ...]] = []
        for e in self.expressions():
            number[id(e)] = len(rows)
            rows.append((e.op, [number[id(a)] for a in e.args], e.dtype, e.attributes))
        stores = [(s.access, number[id(s.expr)], s.loops) for s in self.stores]
        return self.name, self.loops, self.outer, self.buffers, rows, stores

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name, self.loops, self.outer, self.buffers, rows, stores = state
        made: list[Expr] = []
        for op, args, dtype, attributes in rows:
            made.append(Expr(op, tuple([made[i] for i in args]), dtype, attributes))
        self.stores = tuple([Store(access, made[i], loops) for access, i, loops in stores])
        self._free, self._walked = {}, ((), [])

    def copy(self) -> Kernel:
        """A kernel whose loops can be changed without changing this one's."""
        return replace(self, loops=dict(self.loops), _free=dict(self._free))

    def trips(self, loops: Iterable[str]) -> int:
        """How many times nested `loops` run their body."""
        return math.prod(self.loops[n].extent for n in loops)

    def substitute(
        self, parts: dict[str, tuple[tuple[str, int], ...]], padded: bool = True
    ) -> None:
        """Replace loop variables: `parts[name]` lists (new loop, coefficient) that sum to it.

        The caller updates `loops`; accesses, indices and loop lists follow here. `padded=False`:
        the new loops go over padding like over elements."""

        def names(loops: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new for n in loops for new, _ in parts.get(n, ((n, 1),)))

        def terms(old: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
            return tuple((new, s * c) for n, s in old for new, c in parts.get(n, ((n, 1),)))

        def access(a: Access) -> Access:
            lane = parts[a.padded][-1][0] if padded and a.padded in parts else a.padded
            return Access(a.buffer, a.offset, terms(a.strides), lane if padded else None)

        def index(i: Index) -> Index:
            return Index(terms(i.terms), i.constant)

        done: dict[int, Expr] = {}

        def rewrite(e: Expr) -> Expr:
            if id(e) not in done:
                attributes = dict(e.attributes)
                for key, change in (("access", access), ("index", index), ("loops", names)):
                    if key in attributes:
                        attributes[key] = change(attributes[key])
                if "bounds" in attributes:
                    attributes["bounds"] = tuple((index(i), n) for i, n in attributes["bounds"])
                done[id(e)] = Expr(e.op, tuple(rewrite(a) for a in e.args), e.dtype, attributes)
            return done[id(e)]

        # The old expressions stay referenced by `done` until the end: ids are not reused meanwhile.
        self.stores = tuple(
            Store(access(s.access), rewrite(s.expr), names(s.loops)) for s in self.stores
        )
        self.outer = names(self.outer)
        self._free.clear()


def expressions(roots: Iterable[Expr], into_reductions: bool = True) -> list[Expr]:
    """Every distinct expression that some are made of, operands first, each once: a random number
    has more paths through its expressions than could ever be walked."""
    seen: dict[int, Expr] = {}

    def visit(expr: Expr) -> None:
        if id(expr) not in seen:
            if into_reductions or expr.op != "reduce":
                for arg in expr.args:
                    visit(arg)
            seen[id(expr)] = expr

    for root in roots:
        visit(root)
    return list(seen.values())


@dataclass(frozen=True)
class Ahead:
    """The next elements of `buffer`, fetched while tiles read others again and again.

    nest    (loop, elements to its next tile, from where the loops before it are at their last): the
            next elements are those of the first loop that is not at its last tile
    inside  loops that read the same elements again, in order
    sums    loops of the sum: each iteration of both fetches a share
    step    elements of a share
    leaps   loops of the tile or of the sum whose positions lie apart, each with shares of its own
    """

    buffer: int
    nest: tuple[tuple[str, int], ...]
    inside: tuple[str, ...]
    sums: tuple[str, ...]
    step: int
    leaps: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """How a kernel runs on a CPU.

    lane      the loop whose positions are SIMD lanes (None: scalar code)
    tile      (loop, count): outer loops unrolled `count` times into registers; reduction loops
              listed here (pooling windows) are unrolled whole
    order     outer loops as nested, outermost first, without the lane loop
    parallel  how many leading loops of `order` are shared between threads
    around    loops around all of `order`, which every thread runs (parts of a sum)
    whole     whether the last register tile of the innermost loop is moved back to end with the
              loop, computing some elements again; else it is a smaller tile
    ahead     operands of which each tile fetches a share of what later tiles need
    """

    lane: str | None
    tile: tuple[tuple[str, int], ...]
    order: tuple[str, ...]
    parallel: int
    around: tuple[str, ...] = ()
    whole: bool = True
    ahead: tuple[Ahead, ...] = ()

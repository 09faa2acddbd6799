"""Emit expressions as statements: names, register tiles, memory accesses, positions and bounds.

A value is computed in the outermost loop in which all loops it depends on are known, so invariants
leave the inner loops by construction. Offsets of memory accesses are built up loop by loop in the
same way.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from graphc.codegen.kernel import Access, Kernel, Loop, Schedule
from graphc.expr import Expr, Index

# Loops this short are written with a constant bound, so that LLVM may unroll them.
_UNROLL = 8
# Any bound beyond the iterations of loops: only the lower bound counts.
ENDLESS = 2**31 - 1
_NOT_FINITE = {"nan": 'float("nan")', "inf": 'float("inf")', "minus_inf": '-float("inf")'}


@dataclass
class Var:
    name: str
    axes: tuple[str, ...]


@dataclass
class Scope:
    parent: Scope | None
    bound: frozenset[str]
    depth: int
    lines: list[str] = field(default_factory=list)
    end: str = ""  # what a loop does at the end of each iteration
    values: dict[tuple, Var] = field(default_factory=dict)
    addresses: dict[tuple, str] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def chain(self) -> list[Scope]:
        """From the outermost scope to this one."""
        return [*(self.parent.chain() if self.parent else []), self]


class Emitter:
    """Statements of one kernel, being written."""

    def __init__(self, kernel: Kernel, schedule: Schedule, lanes: int):
        self.kernel, self.schedule, self.lanes = kernel, schedule, lanes
        self.lane = schedule.lane
        self.tile = dict(schedule.tile)
        self.numbers: dict[tuple, tuple[str, int]] = {}
        self.factories: dict[str, str] = {}
        self.counter: dict[str, int] = {}
        self.pointers: dict[int, str] = {}
        self.clipped: set[tuple[int, int]] = set()
        self.guard = ""

    @property
    def lane_loop(self) -> Loop:
        """The loop whose positions are the lanes; vector code only."""
        assert self.lane is not None, f"{self.kernel.name} is scalar code"
        return self.kernel.loops[self.lane]

    # ---- names and arguments

    def fresh(self, base: str) -> str:
        self.counter[base] = self.counter.get(base, -1) + 1
        return f"{base}{self.counter[base]}"

    def number(self, key: tuple, name: str, value: int) -> str:
        """A run-time integer argument; the same key gives the same argument."""
        if key not in self.numbers:
            self.numbers[key] = (self.fresh(name), value)
        return self.numbers[key][0]

    def factory(self, base: str, call: str) -> str:
        if call not in self.factories:
            self.factories[call] = (
                base if base not in self.factories.values() else self.fresh(base + "_")
            )
        return self.factories[call]

    def extent(self, loop: str) -> str:
        size = self.kernel.loops[loop].extent
        if loop[0] == "r" and size <= _UNROLL and not loop.endswith("b"):
            return str(size)
        return self.number(("extent", loop), f"n_{loop}_", size)

    def stride(self, access: Access, loop: str) -> str:
        value = access.stride(loop)
        if value in (0, 1, -1, self.lanes, 2 * self.lanes):
            return str(value)
        return self.number(("stride", access.buffer, loop, value), f"s_{loop}_", value)

    # ---- loops

    def _bound(self, loop: str) -> str:
        """Iterations of a plain loop; a ragged one is cut short in its last block."""
        info = self.kernel.loops[loop]
        if info.ragged:
            total = self.total(info)
            return self.smaller(str(info.extent), f"{total} - {info.block} * {info.extent}")
        return self.extent(loop)

    def total(self, loop: Loop) -> str:
        """Elements of a ragged loop in all its blocks."""
        assert loop.total is not None, f"{self.kernel.name}: loop {loop.name} is not ragged"
        return self.number(("total", loop.name), f"n_{loop.block}_all", loop.total)

    def open_loops(
        self,
        scope: Scope,
        loops: list[str],
        clips: dict[str, list[tuple[str, str]]] | None = None,
    ) -> Scope:
        for loop in loops:
            inner = Scope(scope, scope.bound | {loop}, scope.depth + 1)
            low, high = "0", self._bound(loop)
            for lower, upper in (clips or {}).get(loop, []):
                low, high = self.larger(low, lower), self.smaller(high, upper)
            inner.lines += [
                "    " * scope.depth + line for line in self.head(inner, loop, low, high)
            ]
            scope = inner
        return scope

    def head(self, inner: Scope, loop: str, low: str, high: str) -> list[str]:
        """The lines before the body of a loop from `low` to `high`; `inner` is to be its scope."""
        return [f"for {loop} in range({high if low == '0' else f'{low}, {high}'}):"]

    # Python's own min and max are functions that Numba compiles and LLVM would have to inline.

    def smaller(self, x: str, y: str) -> str:
        """The smaller of two integers."""
        return f"{self.factory('minimum', 'v.minimum')}({x}, {y})"

    def larger(self, x: str, y: str) -> str:
        """The larger of two integers."""
        return f"{self.factory('maximum', 'v.maximum')}({x}, {y})"

    def index(self, text: str) -> str:
        """Integer arithmetic as the target wants it; Numba's is 64 bits wide."""
        return text

    def close(self, scope: Scope, until: Scope) -> None:
        """Append finished inner scopes to the scopes around them."""
        while scope is not until:
            parent = scope.parent
            assert parent is not None, "`until` is not around `scope`"
            if scope.end:
                scope.add(scope.end)
            parent.lines += scope.lines
            scope = parent

    # ---- expressions

    def axes(self, expr: Expr) -> tuple[str, ...]:
        free = self.kernel.free(expr)
        return tuple(n for n in self.tile if n in free)

    def home(self, free: frozenset[str], scope: Scope) -> Scope:
        """The outermost scope that knows all `free` loops."""
        need = {
            n
            for n in free
            if n != self.lane and not (n in self.tile and n not in self.kernel.outer)
        }
        for candidate in scope.chain():
            if need <= candidate.bound:
                return candidate
        raise AssertionError(f"{self.kernel.name}: loops {sorted(need)} are not open here")

    def emit(self, expr: Expr, scope: Scope, splat: bool = False) -> Var:
        key = (id(expr), self.guard, splat and expr.op == "load")
        for known in scope.chain():
            # What is known without the guard is known with it.
            for same in (key, (key[0], "", key[2])):
                if same in known.values:
                    return known.values[same]
        home = self.home(self.kernel.free(expr), scope)
        if self.guard:
            home = scope
        if expr.op == "load":
            value = self._emit_load(expr, home, splat)
        else:
            value = getattr(self, f"_emit_{expr.op}", self._emit_call)(expr, home)
        home.values[key] = value
        return value

    def _assign(self, scope: Scope, base: str, text: str, axes: tuple[str, ...]) -> Var:
        name = self.fresh(base + "_")
        scope.add(f"{name} = {text}")
        return Var(name, axes)

    def _emit_constant(self, expr: Expr, scope: Scope) -> Var:
        value = expr.attributes["value"]
        if expr.dtype == "bool":
            return Var(str(bool(value)), ())
        if expr.dtype.startswith("float"):
            value = float(value)
            if math.isfinite(value):
                return Var(repr(value), ())
            name = "nan" if math.isnan(value) else "inf" if value > 0 else "minus_inf"
            return Var(self.factory(name, _NOT_FINITE[name]), ())
        return Var(str(int(value)), ())

    def _emit_call(self, expr: Expr, scope: Scope) -> Var:
        axes = self.axes(expr)
        operands = [self.spread(self.emit(a, scope), axes, scope) for a in expr.args]
        first = 1 if expr.op == "select" else 0
        if expr.dtype != "bool" and all(a.op == "constant" for a in expr.args[first:]):
            # Literals alone would have Numba's widest type.
            cast = self.factory(f"to_{expr.dtype}", f'v.cast("{expr.dtype}")')
            operands[first:] = [f"{cast}({text})" for text in operands[first:]]
        name = self.factory(expr.op, f"v.{expr.op}")
        return self._assign(scope, expr.op, f"{name}({', '.join(operands)})", axes)

    def _emit_cast(self, expr: Expr, scope: Scope) -> Var:
        operand = self.emit(expr.args[0], scope)
        name = self.factory(f"to_{expr.dtype}", f'v.cast("{expr.dtype}")')
        return self._assign(scope, "cast", f"{name}({operand.name})", operand.axes)

    def spread(self, value: Var, axes: tuple[str, ...], scope: Scope) -> str:
        """A value over fewer tile axes, repeated over `axes`.

        Values without axes broadcast by themselves."""
        if not value.axes or value.axes == axes:
            return value.name
        indices = self._positions(axes, value.axes)
        name = self.factory(f"pick_{len(indices)}", f"v.pick({indices})")
        return self._assign(scope, "spread", f"{name}({value.name})", axes).name

    def _counts(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.tile[n] for n in axes)

    def _positions(self, axes: tuple[str, ...], part: tuple[str, ...]) -> tuple[int, ...]:
        """For each element of a tile over `axes`, its element in a tile over the subset `part`."""
        result = []
        for flat in range(math.prod(self._counts(axes))):
            digits, rest = {}, flat
            for n in reversed(axes):
                rest, digits[n] = divmod(rest, self.tile[n])
            position = 0
            for n in part:
                position = position * self.tile[n] + digits[n]
            result.append(position)
        return tuple(result)

    def _digits(self, axes: tuple[str, ...]) -> list[dict[str, int]]:
        """Tile positions by axis, in the order of a tile's elements."""
        counts = [range(self.tile[n]) for n in axes]
        return [dict(zip(axes, digits, strict=True)) for digits in itertools.product(*counts)]

    # ---- memory

    def pointer(self, access: Access) -> str:
        self.pointers[access.buffer] = self.kernel.buffers[access.buffer].name
        return self.pointers[access.buffer]

    def address(self, access: Access, scope: Scope) -> str:
        """Element offset of an access without its lane and unrolled parts, built loop by loop."""
        terms = {n: s for n, s in access.strides if n != self.lane and not self._unrolled(n)}
        home = self.home(frozenset(terms), scope)
        inherited = home.parent.bound if home.parent else frozenset()
        key = (access.buffer, access.offset, tuple(sorted(terms.items())))
        for known in scope.chain():
            if key in known.addresses:
                return known.addresses[key]
        outer = tuple((n, s) for n, s in access.strides if n in terms and n in inherited)
        new = [n for n in terms if n not in inherited]
        parts = []
        if outer or not new:
            if home.parent and outer:
                parts.append(self.address(Access(access.buffer, access.offset, outer), home.parent))
        if not outer and access.offset:
            parts.append(
                self.number(("offset", access.buffer, access.offset), "offset", access.offset)
            )
        parts += [n if terms[n] == 1 else f"{n} * {self.stride(access, n)}" for n in new]
        if len(parts) == 1 and not new:
            name = parts[0]
        elif not parts:
            name = "0"
        else:
            name = self.fresh(f"at_{self.kernel.buffers[access.buffer].name}_")
            home.add(f"{name} = {self.index(' + '.join(parts))}")
        home.addresses[key] = name
        return name

    def safe_address(self, access: Access, scope: Scope) -> str:
        """The address, or that of element 0 where a bounds check keeps the access from memory."""
        address = self.address(access, scope)
        if self.guard:
            safe = self.fresh("safe")
            scope.add(f"{safe} = {self.index(f'{address} if {self.guard} else 0')}")
            address = safe
        return address

    def _unrolled(self, loop: str) -> bool:
        return loop in self.tile and loop not in self.kernel.outer

    def _memory(
        self, access: Access, axes: tuple[str, ...], vector: bool, scope: Scope, splat: bool = False
    ) -> tuple[str, str, str, tuple[int | None, ...], list[str]]:
        """Of a load or store: kind, address, strides, strides known to the code, more arguments."""
        address = self.safe_address(access, scope)
        extra: list[str] = []
        if not vector:
            kind = "splat" if splat and self.lane else "scalar"
        else:
            lane = self.lane_loop
            kind = "vector"
            if access.stride(lane.name) != 1:
                kind = "strided"
                extra.append(self.stride(access, lane.name))
            if lane.ragged and access.padded != lane.name:
                kind += "_tail"
                extra.append(self.tail(scope))
        strides = [self.stride(access, n) for n in axes]
        fixed = tuple(int(s) if s.lstrip("-").isdigit() else None for s in strides)
        return kind, address, f"({', '.join(strides)},)" if strides else "", fixed, extra

    def tail(self, scope: Scope) -> str:
        """How many lanes of the current vector hold elements."""
        info = self.lane_loop
        assert info.block is not None, f"{self.kernel.name}: lane {info.name} has no blocks"
        home = self.home(frozenset({info.block}), scope)
        key = ("tail",)
        for known in scope.chain():
            if key in known.addresses:
                return known.addresses[key]
        total = self.total(info)
        home.add(f"tail = {total} - {info.block} * {info.extent}")
        home.addresses[key] = "tail"
        return "tail"

    def _emit_load(self, expr: Expr, scope: Scope, splat: bool = False) -> Var:
        access, axes = expr.attributes["access"], self.axes(expr)
        vector = self.lane in self.kernel.free(expr)
        kind, address, strides, fixed, extra = self._memory(access, axes, vector, scope, splat)
        pointer = self.pointer(access)
        if not axes:
            suffix = "" if kind == "vector" else f"_{kind}".replace("_vector_tail", "_tail")
            name = self.factory(f"load{suffix}", f"v.load{suffix}")
            return self._assign(
                scope, pointer, f"{name}({', '.join([pointer, address, *extra])})", ()
            )
        if self._ends_within(kind, axes):
            name = self.factory("load_tail", "v.load_tail")
            parts = [
                f"{name}({pointer}, {at}, {n})"
                for at, n in self._tails(access, axes, address, extra[-1])
            ]
            return self._assign(scope, pointer, f"({', '.join(parts)},)", axes)
        counts = self._counts(axes)
        label = "x".join(map(str, counts))
        name = self.factory(
            f"load_{kind}_{label}", f'v.load_tile({counts}, "{kind}", fixed={fixed})'
        )
        return self._assign(
            scope, pointer, f"{name}({', '.join([pointer, address, strides, *extra])})", axes
        )

    def store(self, access: Access, value: Var, scope: Scope) -> None:
        axes = tuple(n for n in self.tile if access.stride(n) or n in value.axes)
        vector = access.stride(self.lane) != 0
        kind, address, strides, fixed, extra = self._memory(access, axes, vector, scope)
        pointer = self.pointer(access)
        if not axes:
            suffix = "" if kind == "vector" else f"_{kind}".replace("_vector_tail", "_tail")
            name = self.factory(f"store{suffix}", f"v.store{suffix}")
            tail = [extra.pop()] if kind.endswith("_tail") else []
            scope.add(f"{name}({', '.join([pointer, address, *extra, value.name, *tail])})")
            return
        counts = self._counts(axes)
        full = self.spread(value, axes, scope)
        if not value.axes:
            name = self.factory(f"full_{math.prod(counts)}", f"v.full({math.prod(counts)})")
            full = f"{name}({full})"
        if self._ends_within(kind, axes):
            name = self.factory("store_tail", "v.store_tail")
            whole = self._assign(scope, "whole", full, axes).name
            for number, (at, n) in enumerate(self._tails(access, axes, address, extra[-1])):
                scope.add(f"{name}({pointer}, {at}, {whole}[{number}], {n})")
            return
        label = "x".join(map(str, counts))
        name = self.factory(
            f"store_{kind}_{label}", f'v.store_tile({counts}, "{kind}", fixed={fixed})'
        )
        scope.add(f"{name}({', '.join([pointer, address, strides, full, *extra])})")

    def _ends_within(self, kind: str, axes: tuple[str, ...]) -> bool:
        """Whether the vectors of one tile have tails of different lengths."""
        if kind != "vector_tail":
            return False
        block = self.lane_loop.block
        return block is not None and block in axes

    def _tails(
        self, access: Access, axes: tuple[str, ...], address: str, tail: str
    ) -> list[tuple[str, str]]:
        """Address and number of elements of each vector of a tile that runs over the ragged end."""
        block = self.lane_loop.block
        assert block is not None
        result = []
        for digits in self._digits(axes):
            steps = [f" + {d} * {self.stride(access, n)}" for n, d in digits.items() if d]
            used = digits[block] * self.lanes
            result.append((address + "".join(steps), f"{tail} - {used}" if used else tail))
        return result

    # ---- positions and bounds

    def integer(self, index: Index) -> str:
        """A loop-variable expression for the part of an index that is known as plain integers."""
        parts = [
            n if c == 1 else f"{n} * {c}"
            for n, c in index.terms
            if n != self.lane and not self._unrolled(n)
        ]
        if index.constant or not parts:
            parts.append(str(index.constant))
        return " + ".join(parts).replace("+ -", "- ")

    def _emit_position(self, expr: Expr, scope: Scope) -> Var:
        index: Index = expr.attributes["index"]
        cast = self.factory("to_int32", 'v.cast("int32")')
        terms, axes = dict(index.terms), self.axes(expr)
        base = self.integer(index)
        if axes:
            counts = self._counts(axes)
            offsets = []
            for flat in range(math.prod(counts)):
                rest, offset = flat, 0
                for n in reversed(axes):
                    rest, digit = divmod(rest, self.tile[n])
                    offset += digit * terms.get(n, 0)
                offsets.append(offset)
            base_name = self.fresh("base")
            scope.add(f"{base_name} = {base}")
            text = f"{cast}(({', '.join(f'{base_name} + {o}' for o in offsets)},))"
        else:
            text = f"{cast}({base})"
        step = terms.get(self.lane, 0) if self.lane else 0
        if step:
            add, mul = self.factory("add", "v.add"), self.factory("mul", "v.mul")
            lane = self.factory("lane_index", "v.lane_index")
            text = f"{add}({mul}({lane}(), {step}), {text})"
        return self._assign(scope, "position", text, axes)

    def _emit_within(self, expr: Expr, scope: Scope) -> Var:
        conditions = []
        for number, (index, extent) in enumerate(expr.attributes["bounds"]):
            if (id(expr), number) in self.clipped:
                continue
            name = self.fresh("at")
            shift = ""
            if abs(index.constant) > 1:  # an argument, so that one kernel serves all sizes
                shift = f" + {self.number(('shift', index.constant), 'shift', index.constant)}"
                index = Index(index.terms)
            scope.add(f"{name} = {self.index(self.integer(index) + shift)}")
            if extent == 1:
                conditions.append(f"{name} == 0")
            elif extent >= ENDLESS:
                conditions.append(f"{name} >= 0")
            else:
                size = self.number(("size", extent), "size", extent)
                conditions.append(f"0 <= {name} < {size}")
        if not conditions:
            return self.emit(expr.args[0], scope)
        ok = self.fresh("inside")
        outer = f"{self.guard} and " if self.guard else ""
        scope.add(f"{ok} = {outer}{' and '.join(conditions)}")
        outside = self.emit(expr.args[1], scope)
        before, self.guard = self.guard, ok
        inside = self.emit(expr.args[0], scope)
        self.guard = before
        axes = self.axes(expr)
        select = self.factory("select", "v.select")
        a, b = self.spread(inside, axes, scope), self.spread(outside, axes, scope)
        if expr.dtype != "bool" and all(e.op == "constant" for e in expr.args):
            cast = self.factory(f"to_{expr.dtype}", f'v.cast("{expr.dtype}")')
            a, b = f"{cast}({a})", f"{cast}({b})"
        return self._assign(scope, "within", f"{select}({ok}, {a}, {b})", axes)

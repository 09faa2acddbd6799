"""Render a scheduled kernel as Python source in the SIMD vocabulary of `graphc.codegen.simd`.

One statement computes one node of an expression for a whole register tile. A value is computed in the
outermost loop in which all loops it depends on are known, so invariants leave the inner loops by
construction. Sizes and strides are arguments; only what the register tile needs is written into the code.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from graphc.codegen.kernel import Access, Kernel, Schedule
from graphc.expr import Expr, Index

_IDENTITY = {"sum": 0.0, "prod": 1.0, "max": -math.inf, "min": math.inf}
_COMBINE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}
# Loops this short are written with a constant bound, so that LLVM may unroll them.
_UNROLL = 8


@dataclass(frozen=True)
class CompiledCall:
    """Source of a kernel and the arguments of one launch: `buffers` addresses first, then `numbers`."""

    source: str
    buffers: int
    numbers: tuple[int, ...]


@dataclass
class _Var:
    name: str
    axes: tuple[str, ...]


@dataclass
class _Scope:
    parent: _Scope | None
    bound: frozenset[str]
    depth: int
    lines: list[str] = field(default_factory=list)
    values: dict[tuple, _Var] = field(default_factory=dict)
    addresses: dict[tuple, str] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def chain(self) -> list[_Scope]:
        """From the outermost scope to this one."""
        return [*(self.parent.chain() if self.parent else []), self]


def render(kernel: Kernel, schedule: Schedule, lanes: int) -> CompiledCall:
    return _Emitter(kernel, schedule, lanes).render()


class _Emitter:
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
        self.reduces = [e for e in kernel.expressions() if e.op == "reduce"]
        self.depends = {id(r): self._reduces_below(r) for r in self.reduces}

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
            self.factories[call] = base if base not in self.factories.values() else self.fresh(base + "_")
        return self.factories[call]

    def extent(self, loop: str) -> str:
        size = self.kernel.loops[loop].extent
        if loop[0] in "rc" and size <= _UNROLL and not loop.endswith("b"):
            return str(size)
        return self.number(("extent", loop), f"n_{loop}_", size)

    def stride(self, access: Access, loop: str) -> str:
        value = access.stride(loop)
        if value in (0, 1, -1, self.lanes, 2 * self.lanes):
            return str(value)
        return self.number(("stride", access.buffer, loop, value), f"s_{loop}_", value)

    # ---- the function

    def render(self) -> CompiledCall:
        root = _Scope(None, frozenset(), 1)
        body = self.outer_scopes(root)
        groups: dict[tuple[str, ...], list] = {}
        for store in self.kernel.stores:
            groups.setdefault(store.loops, []).append(store)
        for loops, stores in groups.items():
            scope = self.open_loops(body, [n for n in loops if n not in (self.lane, *self.tile)])
            # All values before the first store: a result may lie in an operand's memory.
            values = [self.emit(s.expr, scope) for s in stores]
            for store, value in zip(stores, values, strict=True):
                self.store(store.access, store.expr, value, scope)
            self.close(scope, body)
        self.close(body, root)
        return self.finish(root)

    def finish(self, root: _Scope) -> CompiledCall:
        names = [f"a_{b.name}" for b in self.kernel.buffers]
        numbers = list(self.numbers.values())
        names += [n for n, _ in numbers]
        head = [f"    {', '.join(names)}{',' if len(names) == 1 else ''} = arguments(args)"]
        for number, buffer in enumerate(self.kernel.buffers):
            if number in self.pointers:
                pointer = self.factory(f"pointer_{buffer.dtype}", f'v.pointer("{buffer.dtype}")')
                head.append(f"    {buffer.name} = {pointer}(a_{buffer.name})")
        factories = [f"arguments = v.arguments({len(names)})"]
        factories += [f"{name} = {call}" for call, name in self.factories.items()]
        source = "\n".join(
            [
                "from graphc.codegen import simd",
                "",
                f"v = simd.vocabulary({self.lanes})",
                *factories,
                "",
                "",
                "def kernel(args, thread, threads):",
                *head,
                *root.lines,
                "",
            ]
        )
        return CompiledCall(source, len(self.kernel.buffers), tuple(value for _, value in numbers))

    # ---- loops

    def trips(self, loop: str) -> str:
        """How many iterations an outer loop makes."""
        extent, count = self.kernel.loops[loop].extent, self.tile.get(loop, 1)
        if count == 1:
            return self.extent(loop)
        return self.number(("trips", loop), f"t_{loop}_", -(-extent // count))

    def start_loop(self, scope: _Scope, loop: str, source: str) -> None:
        """Bind a loop variable to trip number `source`; the last tile is moved back to end with the loop."""
        count = self.tile.get(loop, 1)
        if count == 1:
            if source != loop:
                scope.add(f"{loop} = {source}")
        elif self.kernel.loops[loop].extent % count == 0:
            scope.add(f"{loop} = {source} * {count}")
        else:
            last = self.number(("last", loop), f"l_{loop}_", self.kernel.loops[loop].extent - count)
            scope.add(f"{loop} = min({source} * {count}, {last})")

    def outer_scopes(self, root: _Scope) -> _Scope:
        order, shared = self.schedule.order, self.schedule.parallel
        scope = root
        if shared:
            loops = order[:shared]
            trips = [self.trips(n) for n in loops]
            if shared > 1:
                units = self.number(("units",), "units", math.prod(self._trip_count(n) for n in loops))
            else:
                units = trips[0]
            scope = _Scope(root, root.bound | set(loops), root.depth + 1)
            share = f"{units} * thread // threads, {units} * (thread + 1) // threads"
            scope.lines.append("    " * root.depth + f"for unit in range({share}):")
            rest = "unit"
            for position, loop in enumerate(loops):
                if position == len(loops) - 1:
                    self.start_loop(scope, loop, rest)
                    break
                inner = self.number(("inner", position), f"inner{position}_", math.prod(self._trip_count(n) for n in loops[position + 1 :]))
                scope.add(f"u_{loop} = {rest} // {inner}")
                scope.add(f"rest{position} = {rest} - u_{loop} * {inner}")
                self.start_loop(scope, loop, f"u_{loop}")
                rest = f"rest{position}"
        for loop in order[shared:]:
            scope = self._outer_loop(scope, loop)
        return scope

    def _trip_count(self, loop: str) -> int:
        return -(-self.kernel.loops[loop].extent // self.tile.get(loop, 1))

    def _outer_loop(self, scope: _Scope, loop: str) -> _Scope:
        inner = _Scope(scope, scope.bound | {loop}, scope.depth + 1)
        variable = loop if self.tile.get(loop, 1) == 1 else f"u_{loop}"
        scope_header = f"for {variable} in range({self._bound(loop) if variable == loop else self.trips(loop)}):"
        inner.lines.append("    " * scope.depth + scope_header)
        self.start_loop(inner, loop, variable)
        return inner

    def _bound(self, loop: str) -> str:
        """Iterations of a plain loop; a ragged one is cut short in its last block."""
        info = self.kernel.loops[loop]
        if info.ragged:
            total = self.number(("total", loop), f"n_{info.block}_all", info.total)
            return f"min({info.extent}, {total} - {info.block} * {info.extent})"
        return self.extent(loop)

    def open_loops(self, scope: _Scope, loops: list[str], clips: dict[str, list[str]] | None = None) -> _Scope:
        for loop in loops:
            inner = _Scope(scope, scope.bound | {loop}, scope.depth + 1)
            low, high = "0", self._bound(loop)
            for lower, upper in (clips or {}).get(loop, []):
                low, high = f"max({low}, {lower})", f"min({high}, {upper})"
            header = f"for {loop} in range({high}):" if low == "0" else f"for {loop} in range({low}, {high}):"
            inner.lines.append("    " * scope.depth + header)
            scope = inner
        return scope

    def close(self, scope: _Scope, until: _Scope) -> None:
        """Append finished inner scopes to the scopes around them."""
        while scope is not until:
            scope.parent.lines += scope.lines
            scope = scope.parent

    # ---- expressions

    def axes(self, expr: Expr) -> tuple[str, ...]:
        free = self.kernel.free(expr)
        return tuple(n for n in self.tile if n in free)

    def home(self, free: frozenset[str], scope: _Scope) -> _Scope:
        """The outermost scope that knows all `free` loops."""
        need = {n for n in free if n != self.lane and not (n in self.tile and n not in self.kernel.outer)}
        for candidate in scope.chain():
            if need <= candidate.bound:
                return candidate
        raise AssertionError(f"{self.kernel.name}: loops {sorted(need)} are not open here")

    def emit(self, expr: Expr, scope: _Scope, splat: bool = False) -> _Var:
        key = (id(expr), self.guard, splat and expr.op == "load")
        for known in scope.chain():
            if key in known.values:
                return known.values[key]
        home = self.home(self.kernel.free(expr), scope)
        if self.guard:
            home = scope
        method = getattr(self, f"_emit_{expr.op}", self._emit_call)
        value = method(expr, home, splat) if expr.op == "load" else method(expr, home)
        home.values[key] = value
        return value

    def _assign(self, scope: _Scope, base: str, text: str, axes: tuple[str, ...]) -> _Var:
        name = self.fresh(base + "_")
        scope.add(f"{name} = {text}")
        return _Var(name, axes)

    def _emit_constant(self, expr: Expr, scope: _Scope) -> _Var:
        value = expr.attributes["value"]
        if expr.dtype == "bool":
            return _Var(str(bool(value)), ())
        if expr.dtype.startswith("float"):
            value = float(value)
            text = repr(value) if math.isfinite(value) else f"v.{'nan' if math.isnan(value) else 'inf'}"
            if value == -math.inf:
                text = "-v.inf"
            if not math.isfinite(value):
                text = {"v.nan": self.factory("nan", 'float("nan")'), "v.inf": self.factory("inf", 'float("inf")')}.get(
                    text, self.factory("minus_inf", '-float("inf")')
                )
            return _Var(text, ())
        return _Var(str(int(value)), ())

    def _emit_call(self, expr: Expr, scope: _Scope) -> _Var:
        axes = self.axes(expr)
        operands = [self.spread(self.emit(a, scope), axes, scope) for a in expr.args]
        name = self.factory(expr.op, f"v.{expr.op}")
        return self._assign(scope, expr.op, f"{name}({', '.join(operands)})", axes)

    def _emit_cast(self, expr: Expr, scope: _Scope) -> _Var:
        operand = self.emit(expr.args[0], scope)
        name = self.factory(f"to_{expr.dtype}", f'v.cast("{expr.dtype}")')
        return self._assign(scope, "cast", f"{name}({operand.name})", operand.axes)

    def spread(self, value: _Var, axes: tuple[str, ...], scope: _Scope) -> str:
        """A value over fewer tile axes, repeated over `axes`. Values without axes broadcast by themselves."""
        if not value.axes or value.axes == axes:
            return value.name
        indices = self._positions(axes, value.axes)
        name = self.factory(f"spread_{len(indices)}", f"v.pick({indices})")
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

    # ---- memory

    def pointer(self, access: Access) -> str:
        self.pointers[access.buffer] = self.kernel.buffers[access.buffer].name
        return self.pointers[access.buffer]

    def address(self, access: Access, scope: _Scope) -> str:
        """The element offset of an access without its lane and unrolled parts, built up loop by loop."""
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
            parts.append(self.number(("offset", access.buffer, access.offset), "offset", access.offset))
        parts += [n if terms[n] == 1 else f"{n} * {self.stride(access, n)}" for n in new]
        if len(parts) == 1 and not new:
            name = parts[0]
        elif not parts:
            name = "0"
        else:
            name = self.fresh(f"at_{self.kernel.buffers[access.buffer].name}_")
            home.add(f"{name} = {' + '.join(parts)}")
        home.addresses[key] = name
        return name

    def _unrolled(self, loop: str) -> bool:
        return loop in self.tile and loop not in self.kernel.outer

    def _memory(self, access: Access, axes: tuple[str, ...], vector: bool, scope: _Scope, splat: bool = False):
        """(kind, address, strides, extra arguments) of a load or store."""
        address = self.address(access, scope)
        if self.guard:
            safe = self.fresh("safe")
            scope.add(f"{safe} = {address} if {self.guard} else 0")
            address = safe
        if not vector:
            kind, extra = ("splat" if splat and self.lane else "scalar"), []
        else:
            stride = access.stride(self.lane)
            kind, extra = ("vector", []) if stride == 1 else ("strided", [self.stride(access, self.lane)])
            if self.kernel.loops[self.lane].ragged and access.padded != self.lane:
                kind += "_tail"
                extra.append(self.tail(scope))
        strides = [self.stride(access, n) for n in axes]
        fixed = tuple(int(s) if s.lstrip("-").isdigit() else None for s in strides)
        return kind, address, f"({', '.join(strides)},)" if strides else "", fixed, extra

    def tail(self, scope: _Scope) -> str:
        """How many lanes of the current vector hold elements."""
        info = self.kernel.loops[self.lane]
        home = self.home(frozenset({info.block}), scope)
        key = ("tail",)
        for known in scope.chain():
            if key in known.addresses:
                return known.addresses[key]
        total = self.number(("total", self.lane), f"n_{info.block}_all", info.total)
        home.add(f"tail = {total} - {info.block} * {info.extent}")
        home.addresses[key] = "tail"
        return "tail"

    def _emit_load(self, expr: Expr, scope: _Scope, splat: bool = False) -> _Var:
        access, axes = expr.attributes["access"], self.axes(expr)
        vector = self.lane in self.kernel.free(expr)
        kind, address, strides, fixed, extra = self._memory(access, axes, vector, scope, splat)
        pointer = self.pointer(access)
        if not axes:
            suffix = "" if kind == "vector" else f"_{kind}".replace("_vector_tail", "_tail")
            name = self.factory(f"load{suffix}", f"v.load{suffix}")
            return self._assign(scope, pointer, f"{name}({', '.join([pointer, address, *extra])})", ())
        if self._ends_within(kind, axes):
            name = self.factory("load_tail", "v.load_tail")
            parts = [f"{name}({pointer}, {at}, {n})" for at, n in self._tails(access, axes, address, extra[-1])]
            return self._assign(scope, pointer, f"({', '.join(parts)},)", axes)
        counts = self._counts(axes)
        label = "x".join(map(str, counts))
        name = self.factory(f"load_{kind}_{label}", f'v.load_tile({counts}, "{kind}", fixed={fixed})')
        return self._assign(scope, pointer, f"{name}({', '.join([pointer, address, strides, *extra])})", axes)

    def store(self, access: Access, expr: Expr, value: _Var, scope: _Scope) -> None:
        axes = tuple(n for n in self.tile if access.stride(n) or n in value.axes)
        vector = bool(self.lane) and access.stride(self.lane) != 0
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
        name = self.factory(f"store_{kind}_{label}", f'v.store_tile({counts}, "{kind}", fixed={fixed})')
        scope.add(f"{name}({', '.join([pointer, address, strides, full, *extra])})")

    def _ends_within(self, kind: str, axes: tuple[str, ...]) -> bool:
        """Whether the vectors of one tile have tails of different lengths."""
        return kind == "vector_tail" and self.kernel.loops[self.lane].block in axes

    def _tails(self, access: Access, axes: tuple[str, ...], address: str, tail: str) -> list[tuple[str, str]]:
        """Address and number of elements of each vector of a tile that runs over the ragged end."""
        block = self.kernel.loops[self.lane].block
        result = []
        for digits in self._digits(axes):
            steps = [f" + {d} * {self.stride(access, n)}" for n, d in digits.items() if d]
            used = digits[block] * self.lanes
            result.append((address + "".join(steps), f"{tail} - {used}" if used else tail))
        return result

    # ---- positions and bounds

    def integer(self, index: Index, scope: _Scope) -> str:
        """A loop-variable expression for the part of an index that is known as plain integers."""
        parts = [n if c == 1 else f"{n} * {c}" for n, c in index.terms if n != self.lane and not self._unrolled(n)]
        if index.constant or not parts:
            parts.append(str(index.constant))
        return " + ".join(parts).replace("+ -", "- ")

    def _emit_position(self, expr: Expr, scope: _Scope) -> _Var:
        index: Index = expr.attributes["index"]
        cast = self.factory("to_int32", 'v.cast("int32")')
        terms, axes = dict(index.terms), self.axes(expr)
        base = self.integer(index, scope)
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
        if terms.get(self.lane):
            add, mul = self.factory("add", "v.add"), self.factory("mul", "v.mul")
            lane = self.factory("lane_index", "v.lane_index")
            text = f"{add}({mul}({lane}(), {terms[self.lane]}), {text})"
        return self._assign(scope, "position", text, axes)

    def _emit_within(self, expr: Expr, scope: _Scope) -> _Var:
        conditions = []
        for number, (index, extent) in enumerate(expr.attributes["bounds"]):
            if (id(expr), number) in self.clipped:
                continue
            name = self.fresh("at")
            scope.add(f"{name} = {self.integer(index, scope)}")
            conditions.append(f"0 <= {name} < {extent}" if extent != 1 else f"{name} == 0")
        if not conditions:
            return self.emit(expr.args[0], scope)
        ok = self.fresh("inside")
        outer = f"{self.guard} and " if self.guard else ""
        scope.add(f"{ok} = {outer}{' and '.join(conditions)}")
        before, self.guard = self.guard, ok
        inside = self.emit(expr.args[0], scope)
        self.guard = before
        outside = self.emit(expr.args[1], scope)
        axes = self.axes(expr)
        select = self.factory("select", "v.select")
        a, b = self.spread(inside, axes, scope), self.spread(outside, axes, scope)
        return self._assign(scope, "within", f"{select}({ok}, {a}, {b})", axes)

    # ---- reductions

    def _reduces_below(self, expr: Expr) -> frozenset[int]:
        found: set[int] = set()

        def visit(e: Expr) -> None:
            for arg in e.args:
                if arg.op == "reduce":
                    found.add(id(arg))
                visit(arg)

        visit(expr)
        return frozenset(found)

    def _together(self, first: Expr, home: _Scope, scope: _Scope) -> list[Expr]:
        """Reductions that can share the loops of `first`."""
        group = [first]
        loops = first.attributes["loops"]
        for other in self.reduces:
            if other is first or other.attributes["loops"] != loops or self.guard:
                continue
            if any((id(other), "", False) in s.values for s in scope.chain()):
                continue
            try:
                same = self.home(self.kernel.free(other), scope) is home
            except AssertionError:
                continue
            free_of_group = all(id(m) not in self.depends[id(other)] and id(other) not in self.depends[id(m)] for m in group)
            if same and free_of_group:
                group.append(other)
        return group

    def _emit_reduce(self, expr: Expr, scope: _Scope) -> _Var:
        loops = expr.attributes["loops"]
        if any(self._unrolled(n) for n in loops):
            return self._reduce_unrolled(expr, scope)
        group = self._together(expr, scope, scope)
        plain = [n for n in loops if n != self.lane]
        accumulators = []
        for member in group:
            accumulators.append(self._start(member, scope))
        inner = self.open_loops(scope, plain, self._clips(group, loops, scope))
        for member, names in zip(group, accumulators, strict=True):
            self._accumulate(member, names, inner)
        self.close(inner, scope)
        for member, names in zip(group, accumulators, strict=True):
            scope.values[(id(member), self.guard, False)] = self._finish_reduce(member, names, scope)
        return scope.values[(id(expr), self.guard, False)]

    def _start(self, expr: Expr, scope: _Scope) -> list[_Var]:
        """Declare accumulators: one, or best value and its position for argmax."""
        body, axes = expr.args[0], self.axes(expr)
        vector = self.lane in self.kernel.free(body)
        combine = expr.attributes["combine"]

        def declare(value: str, dtype: str) -> _Var:
            cast = self.factory(f"to_{dtype}", f'v.cast("{dtype}")')
            text = f"{cast}({value})"
            if vector:
                text = f"{self.factory('splat', 'v.splat')}({text})"
            if axes:
                n = math.prod(self._counts(axes))
                text = f"{self.factory(f'full_{n}', f'v.full({n})')}({text})"
            return self._assign(scope, "acc", text, axes)

        if combine == "argmax":
            low = self._emit_constant(Expr("constant", (), body.dtype, {"value": _lowest(body.dtype)}), scope).name
            return [declare(low, body.dtype), declare("-1", "int32")]
        if body.dtype == "bool":
            raise AssertionError("bool reductions are cast before")
        identity = _IDENTITY[combine]
        if not body.dtype.startswith("float"):
            identity = {"max": -(2**31), "min": 2**31 - 1}.get(combine, int(identity) if math.isfinite(identity) else 0)
        start = self._emit_constant(Expr("constant", (), body.dtype, {"value": identity}), scope).name
        return [declare(start, body.dtype)]

    def _accumulate(self, expr: Expr, names: list[_Var], scope: _Scope) -> None:
        body, axes, combine = expr.args[0], self.axes(expr), expr.attributes["combine"]
        product = self._product(body) if combine == "sum" and body.dtype.startswith("float") else None
        if product:
            # The factor that does not vary over lanes is loaded as a splat: one instruction with memory operand.
            left, right = (self.emit(f, scope, splat=self.lane in self.kernel.free(body)) for f in product)
            if axes:
                a = self._operand(left, axes, scope)
                b = self._operand(right, axes, scope)
                fma = self.factory(f"fma_{len(a[1])}", f"v.tile_fma({a[1]}, {b[1]})")
                scope.add(f"{names[0].name} = {fma}({names[0].name}, {a[0]}, {b[0]})")
            else:
                fma = self.factory("fma", "v.fma")
                value = self._masked(f"{fma}({left.name}, {right.name}, {names[0].name})", names[0].name, scope, body)
                scope.add(f"{names[0].name} = {value}")
            return
        value = self.emit(body, scope)
        text = self.spread(value, axes, scope)
        if combine == "argmax":
            position = self._argmax_position(expr, scope)
            better = self._assign(scope, "better", f"{self.factory('gt', 'v.gt')}({text}, {names[0].name})", axes)
            select = self.factory("select", "v.select")
            # A first NaN wins and stays: it is better than any number, and nothing is better than it.
            isnan = f"{self.factory('and_', 'v.and_')}({self.factory('ne', 'v.ne')}({text}, {text}), {self.factory('eq', 'v.eq')}({names[0].name}, {names[0].name}))"
            first = f"{self.factory('lt', 'v.lt')}({names[1].name}, 0)"
            or_ = self.factory("or_", "v.or_")
            win = self._assign(scope, "win", f"{or_}({or_}({better.name}, {isnan}), {first})", axes)
            scope.add(f"{names[0].name} = {select}({win.name}, {text}, {names[0].name})")
            scope.add(f"{names[1].name} = {select}({win.name}, {position}, {names[1].name})")
            return
        function = self.factory(_COMBINE[combine], f"v.{_COMBINE[combine]}")
        update = self._masked(f"{function}({names[0].name}, {text})", names[0].name, scope, body)
        scope.add(f"{names[0].name} = {update}")

    def _masked(self, update: str, keep: str, scope: _Scope, body: Expr) -> str:
        """Lanes past the end of a ragged vector keep what they have."""
        if self.lane in self.kernel.free(body) and self.kernel.loops[self.lane].ragged and self._lane_is_reduced:
            select, mask = self.factory("select", "v.select"), self.factory("tail_mask", "v.tail_mask")
            return f"{select}({mask}({self.tail(scope)}), {update}, {keep})"
        return update

    @property
    def _lane_is_reduced(self) -> bool:
        return self.lane is not None and self.lane not in self.kernel.outer

    def _product(self, body: Expr) -> tuple[Expr, Expr] | None:
        """The two factors of a body that is one product, a bounds check that loops were cut to apart."""
        while body.op == "within" and all((id(body), i) in self.clipped for i in range(len(body.attributes["bounds"]))):
            body = body.args[0]
        if body.op != "mul" or not (self.axes(body) or not self._lane_is_reduced or True):
            return None
        return body.args[0], body.args[1]

    def _operand(self, value: _Var, axes: tuple[str, ...], scope: _Scope) -> tuple[str, tuple[int, ...]]:
        if not value.axes:
            one = self.factory("full_1", "v.full(1)")
            return f"{one}({value.name})", (0,) * math.prod(self._counts(axes))
        return value.name, self._positions(axes, value.axes)

    def _argmax_position(self, expr: Expr, scope: _Scope) -> str:
        index, stride = Index(), 1
        for name in reversed(expr.attributes["loops"]):
            index = index + Index.of(name) * stride
            stride *= self.kernel.loops[name].extent
        cast = self.factory("to_int32", 'v.cast("int32")')
        return f"{cast}({self.integer(index, scope)})"

    def _finish_reduce(self, expr: Expr, names: list[_Var], scope: _Scope) -> _Var:
        combine = expr.attributes["combine"]
        result = names[-1]
        if self.lane in self.kernel.free(expr.args[0]) and self.lane in expr.attributes["loops"]:
            name = self.factory(f"{combine}_of_lanes", f'v.reduce_lanes("{combine}")')
            return self._assign(scope, combine, f"{name}({result.name})", result.axes)
        return result

    def _reduce_unrolled(self, expr: Expr, scope: _Scope) -> _Var:
        """A reduction whose loops are register-tile axes: a fold over elements of the tile."""
        body, combine = expr.args[0], expr.attributes["combine"]
        axes = self.axes(expr)
        factors = known_factor(body) if combine == "sum" else None
        if factors and axes:
            return self._linear(expr, *factors, scope)
        value = self.emit(body, scope)
        all_axes = tuple(n for n in self.tile if n in axes or n in expr.attributes["loops"])
        full = self.spread(value, all_axes, scope)
        groups: list[list[tuple[int, int]]] = [[] for _ in range(math.prod(self._counts(axes)))]
        kept = self._positions(all_axes, axes)
        order = self._positions(all_axes, expr.attributes["loops"])
        for flat, target in enumerate(kept):
            groups[target].append((order[flat], flat))
        chosen = tuple(tuple(flat for _, flat in sorted(g)) for g in groups)
        if combine == "argmax":
            name = self.factory("argmax_of_tile", f"v.tile_argmax({chosen})")
            result = self._assign(scope, "argmax", f"{name}({full})[1]", axes)
        else:
            name = self.factory(f"{combine}_of_tile", f'v.tile_combine("{combine}", {chosen})')
            result = self._assign(scope, combine, f"{name}({full})", axes)
        if not axes:
            result = self._assign(scope, combine, f"{result.name}[0]", ())
        return result

    def _linear(self, expr: Expr, matrix: Expr, other: Expr, scope: _Scope) -> _Var:
        """A sum over tile axes of products with a constant matrix: its entries are written into the code."""
        value, axes = self.emit(other, scope), self.axes(expr)
        access, data = matrix.attributes["access"], matrix.attributes["known"].reshape(-1)
        rows = []
        for out in self._digits(axes):
            row = []
            for element in self._digits(value.axes):
                meets = all(element[n] == out[n] for n in value.axes if n in out)
                place = {**out, **element}
                at = access.offset + sum(s * place[n] for n, s in access.strides)
                row.append(float(data[at]) if meets else 0.0)
            rows.append(tuple(row))
        name = self.factory("linear", f"v.tile_linear({tuple(rows)})")
        return self._assign(scope, "sum", f"{name}({value.name})", axes)

    def _digits(self, axes: tuple[str, ...]) -> list[dict[str, int]]:
        """Tile positions by axis, in the order of a tile's elements."""
        counts = [range(self.tile[n]) for n in axes]
        return [dict(zip(axes, digits, strict=True)) for digits in itertools.product(*counts)]

    def _clips(self, group: list[Expr], loops: tuple[str, ...], scope: _Scope) -> dict[str, list[tuple[str, str]]]:
        """Turn bounds checks that cannot add to the result into loop limits."""
        if len(group) > 1:
            return {}
        clips: dict[str, list[tuple[str, str]]] = {}
        for expr in _clippable(group[0]):
            for number, (index, extent) in enumerate(expr.attributes["bounds"]):
                inner = [n for n in loops if n in dict(index.terms) and n != self.lane]
                if not inner or any(n in self.tile or n == self.lane for n, _ in index.terms):
                    continue
                loop = inner[-1]
                coefficient = dict(index.terms)[loop]
                rest = Index(tuple((n, c) for n, c in index.terms if n != loop), index.constant)
                text = f"({self.integer(rest, scope)})"
                if coefficient > 0:
                    low = f"-({text} // {coefficient})"
                    high = f"({extent - 1} - {text}) // {coefficient} + 1"
                else:
                    low = f"-(({extent - 1} - {text}) // {-coefficient})"
                    high = f"{text} // {-coefficient} + 1"
                clips.setdefault(loop, []).append((low, high))
                self.clipped.add((id(expr), number))
        return clips


def known_factor(body: Expr) -> tuple[Expr, Expr] | None:
    """(constant matrix, other factor) of a product in which the compiler knows one operand's contents."""
    if body.op != "mul":
        return None
    for matrix, other in (body.args, body.args[::-1]):
        if matrix.op == "load" and "known" in matrix.attributes:
            return matrix, other
    return None


def _lowest(dtype: str) -> float | int:
    return -math.inf if dtype.startswith("float") else -(2**31)


def _clippable(reduction: Expr) -> list[Expr]:
    """`within` nodes whose outside value leaves the reduction unchanged."""
    combine = reduction.attributes["combine"]
    found: list[Expr] = []

    def visit(expr: Expr) -> None:
        if expr.op == "within":
            outside = expr.args[1]
            neutral = {"sum": 0, "max": -math.inf, "argmax": -math.inf, "min": math.inf, "prod": 1}[combine]
            if outside.op == "constant" and outside.attributes["value"] == neutral:
                found.append(expr)
                if combine != "sum":
                    visit(expr.args[0])
        if combine == "sum" and expr.op in ("mul", "within"):
            for arg in expr.args[: 1 if expr.op == "within" else 2]:
                visit(arg)

    visit(reduction.args[0])
    return found

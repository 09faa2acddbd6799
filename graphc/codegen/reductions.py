"""Emit reductions.

Loops that carry accumulators, register tiles that fold, bounds that become limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from graphc.codegen.core import registers
from graphc.codegen.emit import Emitter, Scope, Var
from graphc.codegen.kernel import Access, Ahead, Kernel, Schedule, expressions
from graphc.codegen.read_ahead import LINE
from graphc.expr import Expr, Index

# Most iterations of an innermost loop that are written out.
_WRITTEN = 7
_IDENTITY = {"sum": 0.0, "prod": 1.0, "max": -math.inf, "min": math.inf}
_COMBINE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


class ReductionEmitter(Emitter):
    """Emits `reduce` expressions; everything else is `Emitter`'s."""

    def __init__(self, kernel: Kernel, schedule: Schedule, lanes: int):
        super().__init__(kernel, schedule, lanes)
        self.reduces = [e for e in kernel.expressions() if e.op == "reduce"]
        self.depends = {id(r): _reduces_below(r) for r in self.reduces}
        self.unfinished: set[int] = set()  # reductions whose loops are open

    def _together(self, first: Expr, home: Scope, scope: Scope) -> list[Expr]:
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
            needs = self.depends[id(other)]
            free_of_group = all(
                id(m) not in needs and id(other) not in self.depends[id(m)] for m in group
            )
            if same and free_of_group and not needs & self.unfinished:
                group.append(other)
        return group

    def _emit_reduce(self, expr: Expr, scope: Scope) -> Var:
        loops = expr.attributes["loops"]
        if any(self._unrolled(n) for n in loops):
            return self._reduce_unrolled(expr, scope)
        group = self._together(expr, scope, scope)
        plain = [n for n in loops if n != self.lane]
        accumulators = [self._start(member, scope) for member in group]
        clips = self._clips(group, loops)
        written = [n for n in plain[-1:] if n not in clips and self._is_written_out(n, group)]
        inner = self.open_loops(scope, plain[: len(plain) - len(written)], clips)
        self._read_ahead(expr, plain, inner)
        for step in self._written_out(inner, written[0]) if written else [inner]:
            self._accumulate_all(group, accumulators, step)
            self.close(step, inner)
        self.close(inner, scope)
        for member, names in zip(group, accumulators, strict=True):
            scope.values[(id(member), self.guard, False)] = self._finish_reduce(
                member, names, scope
            )
        return scope.values[(id(expr), self.guard, False)]

    def _read_ahead(self, expr: Expr, loops: list[str], inner: Scope) -> None:
        """Fetch shares of what `Schedule.ahead` says, in the loops of the sum that reads it."""
        aheads = {ahead.buffer: ahead for ahead in self.schedule.ahead}
        for factor in (self._product(expr.args[0]) or ()) if aheads else ():
            if factor.op == "load" and factor.attributes["access"].buffer in aheads:
                access: Access = factor.attributes["access"]
                self._fetch(access, aheads[access.buffer], loops, inner)

    def _fetch(self, access: Access, ahead: Ahead, loops: list[str], inner: Scope) -> None:
        """One share of what an access reads next; `loops` are those of its sum."""
        shares, counts = (*ahead.inside, *ahead.sums), dict(self.schedule.tile)
        scope = next(s for s in inner.chain() if s.bound.issuperset(shares))
        parts, step = [self._next(access, ahead, loops, inner)], ahead.step
        for loop in reversed(shares):
            if loop in ahead.leaps:
                parts.append(f"{loop} * {self.stride(access, loop)}")
                continue
            trip = f"u_{loop}" if loop in counts else loop
            parts.append(f"{trip} * {self.number(('share', ahead.buffer, loop), 'share', step)}")
            step *= -(-self.kernel.loops[loop].extent // counts.get(loop, 1))
        share = self.fresh("share")
        scope.add(f"{share} = {' + '.join(parts)}")
        fetch, pointer = self.factory("prefetch", "v.prefetch"), self.pointer(access)
        for digits in self._digits(tuple(n for n in self.tile if n in ahead.leaps)):
            steps = [f" + {d} * {self.stride(access, n)}" for n, d in digits.items() if d]
            for line in range(-(-ahead.step // LINE)):
                offset = f" + {line * LINE}" if line else ""
                scope.add(f"{fetch}({pointer}, {share}{''.join(steps)}{offset})")

    def _next(self, access: Access, ahead: Ahead, loops: list[str], inner: Scope) -> str:
        """Where the elements of `ahead` begin; after the last ones those at hand: what lies behind
        them may be what another thread writes."""
        within = {self.lane, *ahead.inside, *loops}
        here = replace(access, strides=tuple((n, s) for n, s in access.strides if n not in within))
        scope = next(s for s in inner.chain() if s.bound.issuperset(n for n, _ in ahead.nest))
        key = ("ahead", access.buffer)
        if key not in scope.addresses:
            text, counts = "0", dict(self.schedule.tile)
            for loop, distance in reversed(ahead.nest):
                last = self.kernel.loops[loop].extent - counts.get(loop, 1)
                end = self.number(("end", loop), f"e_{loop}_", last)
                onward = self.number(("ahead", ahead.buffer, loop), "ahead", distance)
                text = f"({onward} if {loop} < {end} else {text})"
            at = self.address(here, scope)
            scope.addresses[key] = self.fresh("next")
            scope.add(f"{scope.addresses[key]} = {at} + {text}")
        return scope.addresses[key]

    def _start(self, expr: Expr, scope: Scope) -> list[Var]:
        """Declare accumulators: one, or best value and its position for argmax."""
        body, axes = expr.args[0], self.axes(expr)
        vector = self._in_lanes(expr)
        combine = expr.attributes["combine"]

        def declare(value: str, dtype: str) -> Var:
            cast = self.factory(f"to_{dtype}", f'v.cast("{dtype}")')
            text = f"{cast}({value})"
            if vector:
                text = f"{self.factory('splat', 'v.splat')}({text})"
            if axes:
                n = math.prod(self._counts(axes))
                text = f"{self.factory(f'full_{n}', f'v.full({n})')}({text})"
            return self._assign(scope, "acc", text, axes)

        if combine == "argmax":
            low = self._emit_constant(
                Expr("constant", (), body.dtype, {"value": _lowest(body.dtype)}), scope
            ).name
            return [declare(low, body.dtype), declare("-1", "int32")]
        if body.dtype == "bool":
            raise AssertionError("bool reductions are cast before")
        identity = _IDENTITY[combine]
        if not body.dtype.startswith("float"):
            identity = {"max": -(2**31), "min": 2**31 - 1}.get(
                combine, int(identity) if math.isfinite(identity) else 0
            )
        start = self._emit_constant(
            Expr("constant", (), body.dtype, {"value": identity}), scope
        ).name
        return [declare(start, body.dtype)]

    def _is_written_out(self, loop: str, group: list[Expr]) -> bool:
        """Whether a kernel's few taps are lines of code; a loop would cost too much."""
        info, product = self.kernel.loops[loop], self._product(group[0].args[0])
        if len(group) > 1 or product is None or not info.extent <= _WRITTEN:
            return False
        if info.ragged or info.block is not None or not self.axes(group[0]):
            return False
        # Registers to spare for operands of the next line, which LLVM loads early.
        values = [math.prod(self._counts(self.axes(factor))) for factor in product]
        used = math.prod(self._counts(self.axes(group[0]))) + min(values) + 1
        return used + 2 <= registers(self.lanes)

    def _written_out(self, scope: Scope, loop: str) -> Iterator[Scope]:
        """A scope for each iteration of a loop, one after the other in the code."""
        for position in range(self.kernel.loops[loop].extent):
            step = Scope(scope, scope.bound | {loop}, scope.depth)
            step.add(f"{loop} = {position}")
            yield step

    def _accumulate_all(self, group: list[Expr], names: list[list[Var]], scope: Scope) -> None:
        """One iteration of the loops that reductions share."""
        self.unfinished |= {id(member) for member in group}
        for member, own in zip(group, names, strict=True):
            self._accumulate(member, own, scope)
        self.unfinished -= {id(member) for member in group}

    def _accumulate(self, expr: Expr, names: list[Var], scope: Scope) -> None:
        body, axes, combine = expr.args[0], self.axes(expr), expr.attributes["combine"]
        product = (
            self._product(body) if combine == "sum" and body.dtype.startswith("float") else None
        )
        if product:
            # The factor that does not vary over lanes is loaded as a splat: one instruction with a
            # memory operand.
            left, right = (self.emit(f, scope, splat=self._in_lanes(expr)) for f in product)
            if axes:
                a = self._operand(left, axes)
                b = self._operand(right, axes)
                fma = self.factory(f"fma_{len(a[1])}", f"v.tile_fma({a[1]}, {b[1]})")
                update = f"{fma}({names[0].name}, {a[0]}, {b[0]})"
            else:
                fma = self.factory("fma", "v.fma")
                update = f"{fma}({left.name}, {right.name}, {names[0].name})"
            update = self._masked(update, names[0].name, scope, expr)
            scope.add(f"{names[0].name} = {update}")
            return
        value = self.emit(body, scope)
        text = self.spread(value, axes, scope)
        if combine == "argmax":
            position = self._argmax_position(expr)
            better = self._assign(
                scope, "better", f"{self.factory('gt', 'v.gt')}({text}, {names[0].name})", axes
            )
            select = self.factory("select", "v.select")
            # A first NaN wins and stays: it is better than any number, nothing is better than it.
            and_, ne = self.factory("and_", "v.and_"), self.factory("ne", "v.ne")
            eq, best = self.factory("eq", "v.eq"), names[0].name
            isnan = f"{and_}({ne}({text}, {text}), {eq}({best}, {best}))"
            first = f"{self.factory('lt', 'v.lt')}({names[1].name}, 0)"
            or_ = self.factory("or_", "v.or_")
            win = self._assign(scope, "win", f"{or_}({or_}({better.name}, {isnan}), {first})", axes)
            scope.add(f"{names[0].name} = {select}({win.name}, {text}, {names[0].name})")
            scope.add(f"{names[1].name} = {select}({win.name}, {position}, {names[1].name})")
            return
        function = self.factory(_COMBINE[combine], f"v.{_COMBINE[combine]}")
        update = self._masked(f"{function}({names[0].name}, {text})", names[0].name, scope, expr)
        scope.add(f"{names[0].name} = {update}")

    def _masked(self, update: str, keep: str, scope: Scope, expr: Expr) -> str:
        """Lanes past the end of a ragged vector keep what they have."""
        ragged = self.lane is not None and self.kernel.loops[self.lane].ragged
        if ragged and self._in_lanes(expr) and self._lane_is_reduced:
            select, mask = (
                self.factory("select", "v.select"),
                self.factory("tail_mask", "v.tail_mask"),
            )
            return f"{select}({mask}({self.tail(scope)}), {update}, {keep})"
        return update

    def _in_lanes(self, expr: Expr) -> bool:
        """Whether a reduction gathers a vector: its body varies over the lanes, or they are among
        its loops, and each of them counts where the body does not."""
        return self.lane in self.kernel.free(expr.args[0]) or self.lane in expr.attributes["loops"]

    @property
    def _lane_is_reduced(self) -> bool:
        return self.lane is not None and self.lane not in self.kernel.outer

    def _product(self, body: Expr) -> tuple[Expr, Expr] | None:
        """The two factors of a body that is one product; None if it is not.

        The product may stand in a bounds check that loops were cut to."""
        while body.op == "within" and all(
            (id(body), i) in self.clipped for i in range(len(body.attributes["bounds"]))
        ):
            body = body.args[0]
        return (body.args[0], body.args[1]) if body.op == "mul" else None

    def _operand(self, value: Var, axes: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
        """A factor as a tile, and for each element over `axes` its element in it."""
        if not value.axes:
            one = self.factory("full_1", "v.full(1)")
            return f"{one}({value.name})", (0,) * math.prod(self._counts(axes))
        return value.name, self._positions(axes, value.axes)

    def _argmax_position(self, expr: Expr) -> str:
        index, stride = Index(), 1
        for name in reversed(expr.attributes["loops"]):
            index = index + Index.of(name) * stride
            stride *= self.kernel.loops[name].extent
        cast = self.factory("to_int32", 'v.cast("int32")')
        return f"{cast}({self.integer(index)})"

    def _finish_reduce(self, expr: Expr, names: list[Var], scope: Scope) -> Var:
        combine = expr.attributes["combine"]
        result = names[-1]
        if self.lane in expr.attributes["loops"]:
            name = self.factory(f"{combine}_of_lanes", f'v.reduce_lanes("{combine}")')
            return self._assign(scope, combine, f"{name}({result.name})", result.axes)
        return result

    def _reduce_unrolled(self, expr: Expr, scope: Scope) -> Var:
        """A reduction whose loops are register-tile axes: a fold over elements of the tile."""
        body, combine = expr.args[0], expr.attributes["combine"]
        axes = self.axes(expr)
        factors = known_factor(body) if combine == "sum" else None
        if factors and axes and all(self._whole(n) for n in self.kernel.free(factors[0])):
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

    def _whole(self, loop: str) -> bool:
        """Whether one tile covers a loop: positions in the tile are then positions of the loop."""
        return self.tile.get(loop) == self.kernel.loops[loop].extent

    def _linear(self, expr: Expr, matrix: Expr, other: Expr, scope: Scope) -> Var:
        """A sum over tile axes of products with a constant matrix.

        The matrix's entries are written into the code."""
        value, axes = self.emit(other, scope), self.axes(expr)
        access, data = matrix.attributes["access"], matrix.attributes["known"].reshape(-1)
        # Over loops that the other factor does not depend on, the matrix alone is summed.
        alone = tuple(n for n in expr.attributes["loops"] if n not in value.axes)
        # [outputs, elements of the value, loops of the matrix alone]
        parts = (axes, value.axes, alone)
        out, element, rest = (self._grid(part, axis) for axis, part in enumerate(parts))
        place = out | element | rest
        at = np.full([math.prod(self._counts(part)) for part in parts], access.offset)
        for n, stride in access.strides:
            at += stride * place[n]
        entries = data[at].sum(axis=2)
        for n in set(out) & set(element):
            entries[(out[n] != element[n])[..., 0]] = 0.0
        name = self.factory("linear", f"v.tile_linear({tuple(map(tuple, entries.tolist()))})")
        return self._assign(scope, "sum", f"{name}({self._tile_of(value)})", axes)

    def _grid(self, axes: tuple[str, ...], along: int) -> dict[str, np.ndarray]:
        """The position of every tile element by axis, to be broadcast: `along` one of 3 axes."""
        shape = [-1 if axis == along else 1 for axis in range(3)]
        return dict(
            zip(axes, (p.reshape(shape) for p in np.indices(self._counts(axes))), strict=True)
        )

    def _tile_of(self, value: Var) -> str:
        """A value as a tile, of one element if it has no axes."""
        return value.name if value.axes else f"{self.factory('full_1', 'v.full(1)')}({value.name})"

    def _clips(self, group: list[Expr], loops: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
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
                text = f"({self.integer(rest)})"
                if coefficient == 1:
                    low, high = f"-{text}", f"{extent} - {text}"
                elif coefficient > 0:
                    low = f"-({text} // {coefficient})"
                    high = f"({extent - 1} - {text}) // {coefficient} + 1"
                else:
                    low = f"-(({extent - 1} - {text}) // {-coefficient})"
                    high = f"{text} // {-coefficient} + 1"
                clips.setdefault(loop, []).append((low, high))
                self.clipped.add((id(expr), number))
        return clips


def _reduces_below(expr: Expr) -> frozenset[int]:
    return frozenset(id(e) for e in expressions(expr.args) if e.op == "reduce")


def known_factor(body: Expr) -> tuple[Expr, Expr] | None:
    """(constant matrix, other factor) of a product.

    None unless the compiler knows one operand's contents."""
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
            neutral = {"sum": 0, "max": -math.inf, "argmax": -math.inf, "min": math.inf, "prod": 1}[
                combine
            ]
            if outside.op == "constant" and outside.attributes["value"] == neutral:
                found.append(expr)
                if combine != "sum":
                    visit(expr.args[0])
        if combine == "sum" and expr.op in ("mul", "within"):
            for arg in expr.args[: 1 if expr.op == "within" else 2]:
                visit(arg)

    visit(reduction.args[0])
    return found

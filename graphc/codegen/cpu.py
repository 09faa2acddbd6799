"""Render a scheduled kernel as Python source in the SIMD vocabulary of `graphc.codegen.simd`.

One statement computes one node of an expression for a whole register tile. Sizes and strides are
arguments; only what the register tile needs is written into the code, so that one kernel serves
layers and networks of every size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from graphc.codegen.emit import Scope
from graphc.codegen.kernel import Kernel, Schedule
from graphc.codegen.reductions import ReductionEmitter


@dataclass(frozen=True)
class CompiledCall:
    """Source of a kernel and arguments of one launch: `buffers` addresses first, then `numbers`."""

    source: str
    buffers: int
    numbers: tuple[int, ...]


def render(kernel: Kernel, schedule: Schedule, lanes: int) -> CompiledCall:
    return _KernelEmitter(kernel, schedule, lanes).render()


class _KernelEmitter(ReductionEmitter):
    """The function around the expressions: arguments, loops shared between threads, stores."""

    def render(self) -> CompiledCall:
        root = Scope(None, frozenset(), 1)
        order, whole = self.schedule.order, self.schedule.whole
        around = self.outer_scopes(root, order if whole else order[:-1])
        for body in [around] if whole else self._tiles(around, order[-1]):
            self.stores(body)
            self.close(body, around)
        self.close(around, root)
        return self.finish(root)

    def stores(self, body: Scope) -> None:
        """What the kernel computes, for one register tile."""
        groups: dict[tuple[str, ...], list] = {}
        for store in self.kernel.stores:
            groups.setdefault(store.loops, []).append(store)
        for loops, stores in groups.items():
            scope = self.open_loops(body, [n for n in loops if n not in (self.lane, *self.tile)])
            # All values before the first store: a result may lie in an operand's memory.
            values = [self.emit(s.expr, scope) for s in stores]
            for store, value in zip(stores, values, strict=True):
                self.store(store.access, value, scope)
            self.close(scope, body)

    def _tiles(self, around: Scope, loop: str) -> Iterator[Scope]:
        """The scope of the loop's whole tiles, then that of what is left, as a smaller tile."""
        count, extent = self.tile[loop], self.kernel.loops[loop].extent
        whole = Scope(around, around.bound | {loop}, around.depth + 1)
        trips = self.number(("trips", loop), f"t_{loop}_", extent // count)
        whole.lines.append("    " * around.depth + f"for u_{loop} in range({trips}):")
        whole.add(f"{loop} = u_{loop} * {count}")
        yield whole
        left = Scope(around, around.bound | {loop}, around.depth)
        left.add(f"u_{loop} = {trips}")
        left.add(f"{loop} = u_{loop} * {count}")
        self.tile[loop] = extent % count
        if self.tile[loop] == 1:
            del self.tile[loop]
        yield left

    def finish(self, root: Scope) -> CompiledCall:
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

    def trips(self, loop: str) -> str:
        """How many iterations an outer loop makes."""
        extent, count = self.kernel.loops[loop].extent, self.tile.get(loop, 1)
        if count == 1:
            return self.extent(loop)
        return self.number(("trips", loop), f"t_{loop}_", -(-extent // count))

    def start_loop(self, scope: Scope, loop: str, source: str) -> None:
        """Bind a loop variable to trip number `source`.

        The last tile is moved back to end with the loop."""
        count = self.tile.get(loop, 1)
        if count == 1:
            if source != loop:
                scope.add(f"{loop} = {source}")
        elif self.kernel.loops[loop].extent % count == 0:
            scope.add(f"{loop} = {source} * {count}")
        else:
            last = self.number(("last", loop), f"l_{loop}_", self.kernel.loops[loop].extent - count)
            scope.add(f"{loop} = {self.smaller(f'{source} * {count}', last)}")

    def outer_scopes(self, root: Scope, order: tuple[str, ...]) -> Scope:
        shared = self.schedule.parallel
        scope = root
        for loop in self.schedule.around:
            scope = self._outer_loop(scope, loop)
        if shared:
            around, loops = scope, order[:shared]
            trips = [self.trips(n) for n in loops]
            if shared > 1:
                units = self.number(
                    ("units",), "units", math.prod(self._trip_count(n) for n in loops)
                )
            else:
                units = trips[0]
            scope = Scope(around, around.bound | set(loops), around.depth + 1)
            share = f"{units} * thread // threads, {units} * (thread + 1) // threads"
            scope.lines.append("    " * around.depth + f"for unit in range({share}):")
            rest = "unit"
            for position, loop in enumerate(loops):
                if position == len(loops) - 1:
                    self.start_loop(scope, loop, rest)
                    break
                inner = self.number(
                    ("inner", position),
                    f"inner{position}_",
                    math.prod(self._trip_count(n) for n in loops[position + 1 :]),
                )
                scope.add(f"u_{loop} = {rest} // {inner}")
                scope.add(f"rest{position} = {rest} - u_{loop} * {inner}")
                self.start_loop(scope, loop, f"u_{loop}")
                rest = f"rest{position}"
        for loop in order[shared:]:
            scope = self._outer_loop(scope, loop)
        return scope

    def _trip_count(self, loop: str) -> int:
        return -(-self.kernel.loops[loop].extent // self.tile.get(loop, 1))

    def _outer_loop(self, scope: Scope, loop: str) -> Scope:
        inner = Scope(scope, scope.bound | {loop}, scope.depth + 1)
        variable = loop if self.tile.get(loop, 1) == 1 else f"u_{loop}"
        bound = self._bound(loop) if variable == loop else self.trips(loop)
        inner.lines.append("    " * scope.depth + f"for {variable} in range({bound}):")
        self.start_loop(inner, loop, variable)
        return inner

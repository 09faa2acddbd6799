"""Render any kernel for CUDA, each point of its outer loops by a thread, a warp or a block.

- *thread*: a thread computes one point after another, a grid apart; where memory is contiguous it
  takes four neighbours at once in 128-bit accesses. Reductions are its own loops.
- *warp*, *block*: threads share a point. Reductions over the outer loops are shared out between
  them and folded, first by shuffles, then through shared memory; results that have loops of their
  own (softmax) are shared out in the same way.

Which one is a matter of how many points there are, how long the reductions are, and along which of
the two neighbouring threads read neighbouring memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphc.codegen.cuda import CudaLaunch, Rendering
from graphc.codegen.emit import Scope, Var
from graphc.codegen.kernel import Access, Kernel, Schedule, Store
from graphc.codegen.reductions import ReductionEmitter
from graphc.codegen.schedule import bounded, collapse, loads
from graphc.expr import Expr

WARP = 32
VECTOR = 4
BLOCK = 256
WIDE_BLOCK = 1024
# Points that fill a large GPU (132 multiprocessors of 2048 threads) a few times over in threads.
_MANY = 1 << 16
_MOST_BLOCKS = 1 << 15  # beyond them, each thread computes several points


@dataclass(frozen=True)
class Plan:
    """How points of the outer loops are given to threads: `group` of them share one point; alone,
    one computes `vector` neighbours at a time."""

    group: int
    vector: int = 1


def render(kernel: Kernel, precision: str) -> Rendering:
    """One launch of a kernel of any kind. The precision concerns contractions on tensor cores."""
    collapse(kernel, bounded(kernel))
    plan = _choose(kernel)
    points = kernel.trips(kernel.outer)
    emitter = CudaEmitter(kernel, plan)
    source = emitter.render()
    if plan.group > WARP:
        grid, block = points, plan.group
    else:
        threads = points * plan.group if plan.vector == 1 else -(-points // plan.vector)
        grid, block = -(-threads // BLOCK), BLOCK
    launch = CudaLaunch(
        source,
        tuple(range(len(kernel.buffers))),
        tuple(value for _, value in emitter.numbers.values()),
        (max(1, min(grid, _MOST_BLOCKS)), 1, 1),
        (block, 1, 1),
    )
    return Rendering((launch,))


# ---- who computes what


def _choose(kernel: Kernel) -> Plan:
    shared = _shared_loops(kernel)
    points = kernel.trips(kernel.outer)
    length = max((kernel.trips(loops) for loops in shared), default=0)
    if length < WARP:
        return Plan(1, _vector(kernel))
    if points >= _MANY and not _reads_along(kernel, [loops[-1] for loops in shared]):
        return Plan(1)
    if points * length < WARP * BLOCK or (points >= BLOCK and length < WIDE_BLOCK):
        return Plan(WARP)
    return Plan(WIDE_BLOCK if points < BLOCK and length >= 8 * WIDE_BLOCK else BLOCK)


def _shared_loops(kernel: Kernel) -> list[tuple[str, ...]]:
    """Loops that the threads of a group could share: of reductions that need no loop but the outer
    ones around them, and of results that have loops of their own."""
    found = [
        e.attributes["loops"]
        for e in kernel.expressions()
        if e.op == "reduce" and kernel.free(e) <= set(kernel.outer)
    ]
    return [*found, *(s.loops for s in kernel.stores if s.loops)]


def _reads_along(kernel: Kernel, loops: list[str]) -> bool:
    """Whether memory is contiguous along one of the loops, but not along the last outer loop."""
    accesses = _accesses(kernel)
    last = kernel.outer[-1] if kernel.outer else None
    return any(a.stride(n) == 1 for a in accesses for n in loops) and not any(
        a.stride(last) == 1 for a in accesses
    )


def _accesses(kernel: Kernel) -> list[Access]:
    return [e.attributes["access"] for e in loads(kernel)] + [s.access for s in kernel.stores]


def _vector(kernel: Kernel) -> int:
    """How many neighbours along the last outer loop one thread computes at once."""
    if not kernel.outer or any(s.loops for s in kernel.stores):
        return 1
    last = kernel.outer[-1]
    if any(e.op == "reduce" for e in kernel.expressions()) or last in bounded(kernel):
        return 1
    if any(kernel.loops[n].ragged for n in kernel.outer):
        return 1
    if len(kernel.outer) > 1 and kernel.loops[last].extent % VECTOR:
        return 1
    for access in _accesses(kernel):
        rest = [s for n, s in access.strides if n != last]
        if access.stride(last) not in (0, 1):
            return 1
        if access.stride(last) == 1 and any(s % VECTOR for s in (*rest, access.offset)):
            return 1
    if any(not s.access.stride(last) for s in kernel.stores):
        return 1
    return VECTOR


# ---- the function


class CudaEmitter(ReductionEmitter):
    """Writes the kernel function; expressions and reductions of one thread are the CPU's."""

    def __init__(self, kernel: Kernel, plan: Plan):
        super().__init__(kernel, Schedule(None, (), kernel.outer, 0), 1)
        self.plan = plan
        self.uniform: tuple[Scope, ...] = ()  # scopes that all threads of a group run together

    def render(self) -> str:
        root = Scope(None, frozenset(), 1)
        self.uniform = (root,)
        if self.plan.vector > 1:
            self._vectors(root)
        else:
            points = math.prod(self.kernel.loops[n].extent for n in self.kernel.outer)
            self._points(root, self.number(("points",), "points", points), self._first())
        parameters = [b.name for b in self.kernel.buffers]
        parameters += [name for name, _ in self.numbers.values()]
        factories = [f"{name} = {call}" for call, name in self.factories.items()]
        return "\n".join(
            [
                "from graphc.codegen import cuda_vocabulary as v",
                "",
                *factories,
                "",
                "",
                f"def kernel({', '.join(parameters)}):",
                *root.lines,
                "",
            ]
        )

    def _first(self) -> str:
        """The point that this thread, or its group, begins with."""
        names = {1: "thread", WARP: "warp"}
        name = names.get(self.plan.group, "block")
        return f"{self.factory(name, f'v.{name}')}()"

    def _step(self) -> str:
        """How many points, or groups of points, are computed at once."""
        names = {1: "threads", WARP: "warps"}
        name = names.get(self.plan.group, "blocks")
        return f"{self.factory(name, f'v.{name}')}()"

    def _vectors(self, root: Scope) -> None:
        """Four neighbours at a time; what is left of a flat loop one by one."""
        last = self.kernel.outer[-1]
        points = self.kernel.trips(self.kernel.outer)
        self.tile = {last: self.plan.vector}
        whole = self.number(("vectors",), "vectors", points // self.plan.vector)
        self._points(root, whole, self._first())
        self.tile = {}
        if len(self.kernel.outer) == 1:
            points_ = self.number(("points",), "points", points)
            self._points(root, points_, f"{whole} * {self.plan.vector} + {self._first()}")

    def _points(self, root: Scope, count: str, first: str) -> None:
        """The loop over the points of this thread or group, and what it computes for each."""
        outer = self.kernel.outer
        point = outer[0] if len(outer) == 1 and not self.tile else self.fresh("point")
        body = Scope(root, root.bound | set(outer), root.depth + 1)
        indent = "    " * root.depth  # a line of `body`: values of `root` are written above it
        body.lines += [
            f"{indent}{point} = {self.index(first)}",
            f"{indent}while {point} < {count}:",
        ]
        body.end = f"{point} = {self.index(f'{point} + {self._step()}')}"
        self._decode(body, point)
        self._skip_ends(body, outer)
        self.uniform = (root, body)
        groups: dict[tuple[str, ...], list[Store]] = {}
        for store in self.kernel.stores:
            groups.setdefault(store.loops, []).append(store)
        for loops, stores in groups.items():
            self._compute(body, loops, stores)
        self.close(body, root)

    def _skip_ends(self, scope: Scope, loops: tuple[str, ...]) -> None:
        """Go on with the next point past the end of a loop whose last block is short."""
        for loop in (self.kernel.loops[n] for n in loops):
            if loop.ragged:
                end = f"{self.total(loop)} - {loop.block} * {loop.extent}"
                scope.add(f"if {loop.name} >= {end}:")
                scope.add(f"    {scope.end}")
                scope.add("    continue")

    def _decode(self, scope: Scope, point: str) -> None:
        """Outer loop variables from the number of a point."""
        rest = point
        for position, loop in enumerate(self.kernel.outer):
            last = position == len(self.kernel.outer) - 1
            if last:
                text = f"{rest} * {self.tile[loop]}" if loop in self.tile else rest
                if text != loop:
                    scope.add(f"{loop} = {self.index(text)}")
                return
            inner = math.prod(
                self.kernel.loops[n].extent // self.tile.get(n, 1)
                for n in self.kernel.outer[position + 1 :]
            )
            size = self.number(("inner", position), f"inner{position}_", inner)
            quotient = self.factory("quotient", "v.quotient")
            scope.add(f"{loop} = {quotient}({rest}, {size})")
            following = self.fresh("rest")
            scope.add(f"{following} = {self.index(f'{rest} - {loop} * {size}')}")
            rest = following

    def _compute(self, body: Scope, loops: tuple[str, ...], stores: list[Store]) -> None:
        """Values of one group of stores, all before the first store: a result may lie in an
        operand's memory."""
        if loops and self.plan.group > 1:
            scope = self._shared_loop(body, loops)
        else:
            scope = self.open_loops(body, list(loops))
        values = [self.emit(s.expr, scope) for s in stores]
        if not loops and self.plan.group > 1:
            alone = Scope(body, body.bound, body.depth + 1)
            alone.lines.append("    " * body.depth + f"if {self._member()} == 0:")
            scope = alone
        for store, value in zip(stores, values, strict=True):
            self.store(store.access, value, scope)
        self.close(scope, body)

    # ---- sharing

    def _member(self) -> str:
        name = "lane" if self.plan.group == WARP else "member"
        return f"{self.factory(name, f'v.{name}')}()"

    def _shared_loop(self, scope: Scope, loops: tuple[str, ...]) -> Scope:
        """Nested loops whose iterations the threads of a group take in turn.

        The last loop alone where it is long enough to keep them all busy, else all as one."""
        kernel, group = self.kernel, self.plan.group
        shared = loops if kernel.loops[loops[-1]].extent < group else loops[-1:]
        scope = self.open_loops(scope, list(loops[: len(loops) - len(shared)]))
        flat = shared[0] if len(shared) == 1 else self.fresh("flat")
        inner = Scope(scope, scope.bound | set(shared), scope.depth + 1)
        total = (
            self.extent(flat)
            if len(shared) == 1
            else self.number(("total", shared), "total", kernel.trips(shared))
        )
        step = group if group == WARP else f"{self.factory('members', 'v.members')}()"
        indent = "    " * scope.depth
        inner.lines += [f"{indent}{flat} = {self._member()}", f"{indent}while {flat} < {total}:"]
        inner.end = f"{flat} = {self.index(f'{flat} + {step}')}"
        rest = flat
        for position, loop in enumerate(shared[:-1]):
            size = self.number(
                ("within", shared[position + 1 :]), "within", kernel.trips(shared[position + 1 :])
            )
            inner.add(f"{loop} = {self.factory('quotient', 'v.quotient')}({rest}, {size})")
            after = self.fresh("rest") if position < len(shared) - 2 else shared[-1]
            inner.add(f"{after} = {self.index(f'{rest} - {loop} * {size}')}")
            rest = after
        self._skip_ends(inner, shared)
        return inner

    def _emit_reduce(self, expr: Expr, scope: Scope) -> Var:
        if self.plan.group == 1 or self.guard or not any(scope is s for s in self.uniform):
            return super()._emit_reduce(expr, scope)
        loops = expr.attributes["loops"]
        together = self._together(expr, scope, scope)
        accumulators = [self._start(member, scope) for member in together]
        inner = self._shared_loop(scope, loops)
        self._accumulate_all(together, accumulators, inner)
        self.close(inner, scope)
        kind = "warp" if self.plan.group == WARP else "block"
        for member, partial in zip(together, accumulators, strict=True):
            combine = member.attributes["combine"]
            fold = self.factory(f"{kind}_{combine}", f'v.{kind}_fold("{combine}")')
            value = self._assign(
                scope, combine, f"{fold}({', '.join(p.name for p in partial)})", ()
            )
            scope.values[(id(member), self.guard, False)] = value
        return scope.values[(id(expr), self.guard, False)]

    # ---- statements

    def index(self, text: str) -> str:
        """In 32 bits: Numba computes in 64, LLVM narrows what is cut off again."""
        to_int32 = self.factory("to_int32", 'v.cast("int32")')
        return f"{to_int32}({text})"

    def head(self, inner: Scope, loop: str, low: str, high: str) -> list[str]:
        lines = [f"{loop} = {self.index(low)}"]
        if not high.isidentifier() and not high.isdigit():
            end = self.fresh(f"end_{loop}_")
            lines.append(f"{end} = {self.index(high)}")
            high = end
        inner.end = f"{loop} = {self.index(f'{loop} + 1')}"
        return [*lines, f"while {loop} < {high}:"]

    def _emit_load(self, expr: Expr, scope: Scope, splat: bool = False) -> Var:
        access, axes = expr.attributes["access"], self.axes(expr)
        address = self.safe_address(access, scope)
        word = "load_vector" if axes else "load"
        name, pointer = self.factory(word, f"v.{word}"), self.pointer(access)
        return self._assign(scope, pointer, f"{name}({pointer}, {address})", axes)

    def store(self, access: Access, value: Var, scope: Scope) -> None:
        axes = tuple(n for n in self.tile if access.stride(n))
        address = self.safe_address(access, scope)
        word = "store_vector" if axes else "store"
        name, pointer = self.factory(word, f"v.{word}"), self.pointer(access)
        scope.add(f"{name}({pointer}, {address}, {value.name})")

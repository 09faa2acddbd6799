"""Lower a fused region to a loop-level kernel by pulling scalar expressions through it.

Every operator's `lower` rule says what one element of its output is. Starting from the region's
results and following reads backwards gives one expression per result; operands of the region end as
loads of affine addresses. Where an axis must be cut in two (a blocked layout, a reshape, a pooling
window, groups) the loop over it is split and the pull starts again: indices stay affine throughout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from graphc import errors
from graphc.codegen.kernel import Access, Buffer, Kernel, Loop, Store
from graphc.expr import Expr, Index, reduce
from graphc.ir import Graph, Node, Value
from graphc.ops.registry import get


class CannotLower(errors.CompileError):
    """The region has an index that is not affine in any split of its loops."""


def _loop_names(extent: int) -> Iterator[str]:
    """Names for reductions over an extent: equal extents share names, so they may share loops."""
    return (f"r{extent}_{number}" for number in itertools.count())


class _Split(Exception):
    def __init__(self, loop: str, factor: int):
        self.loop, self.factor = loop, factor


def lower_region(name: str, body: Graph, outer: tuple[int, ...] | None = None) -> Kernel:
    """Lower `body` (inputs operand0.., outputs result0..) to a kernel.

    `outer`: the shape that the outer loops run over, 1 where results have loops of their own (by
    default the shape of the first result). Raises CannotLower."""
    splits: dict[str, int] = {}
    for _ in range(64):
        try:
            return _canonical(_Pull(name, body, splits, outer).kernel())
        except _Split as split:
            if split.loop in splits:
                raise CannotLower(f"{name}: loop {split.loop} would be split twice") from None
            splits[split.loop] = split.factor
    raise CannotLower(f"{name}: too many loop splits")


def _canonical(kernel: Kernel) -> Kernel:
    """Number the reduction and inner loops: kernels are shared if names do not depend on sizes."""
    bases = dict.fromkeys(n.rstrip("bl") for n in kernel.loops if n[0] == "r")
    fresh = {base: f"{base[0]}{i}" for i, base in enumerate(bases)}

    def rename(name: str) -> str:
        base = name.rstrip("bl")
        return fresh[base] + name[len(base) :] if base in fresh else name

    kernel.loops = {
        rename(n): Loop(
            rename(n), loop.extent, rename(loop.block) if loop.block else None, loop.total
        )
        for n, loop in kernel.loops.items()
    }
    kernel.substitute(
        {n: ((rename(n), 1),) for e in (kernel.outer, *_all_loops(kernel)) for n in e}
    )
    return kernel


def _all_loops(kernel: Kernel) -> list[tuple[str, ...]]:
    reductions = [e.attributes["loops"] for e in kernel.expressions() if e.op == "reduce"]
    return [*reductions, *(s.loops for s in kernel.stores)]


class _Pull:
    def __init__(
        self, name: str, body: Graph, splits: dict[str, int], outer: tuple[int, ...] | None
    ):
        self.name, self.body, self.splits = name, body, splits
        self.loops: dict[str, Loop] = {}
        self.memo: dict[tuple, Expr] = {}
        self.operands = {n.name: i for i, n in enumerate(body.inputs.values())}
        self.results = list(body.outputs.values())
        self.outer = tuple(int(d) for d in outer or self.results[0].shape)

    def kernel(self) -> Kernel:
        outer = self.outer
        index: list[Index] = []
        outer_loops: list[str] = []
        lane_axes = {
            v.layout.lane_axis: v.layout.lanes
            for v in self.results
            if v.layout.lane_axis is not None
        }
        if (
            any(outer[axis] != v.shape[axis] for axis in lane_axes for v in self.results)
            or len(lane_axes) > 1
        ):
            raise CannotLower(f"{self.name}: results disagree on the lane axis")
        for axis, extent in enumerate(outer):
            if extent == 1 and axis not in lane_axes:
                index.append(Index())
                continue
            name = f"i{axis}"
            if axis in lane_axes:
                self.splits.setdefault(name, lane_axes[axis])
            index.append(self.loop(name, extent))
            outer_loops += self.parts(name)
        stores = []
        for number, value in enumerate(self.results):
            position, inner, named = list(index), [], []
            for axis, extent in enumerate(value.sizes):
                if extent != outer[axis]:
                    # Named as reductions name theirs: what runs over an axis after its reduction
                    # (softmax) then has the same lanes.
                    name = next(n for n in _loop_names(extent) if n not in named)
                    named.append(name)
                    position[axis] = self.loop(name, extent)
                    inner += self.parts(name)
            expr = self.pull(value, tuple(position))
            access = self.address(len(self.operands) + number, value, tuple(position))
            stores.append(Store(access, expr, tuple(inner)))
        buffers = [
            Buffer(f"in{i}", n.types[0].dtype, False)
            for i, n in enumerate(self.body.inputs.values())
        ]
        buffers += [Buffer(f"out{i}", v.dtype, True) for i, v in enumerate(self.results)]
        return Kernel(self.name, self.loops, tuple(outer_loops), tuple(buffers), tuple(stores))

    # ---- loops

    def parts(self, name: str) -> list[str]:
        if name not in self.splits:
            return [name]
        return [*self.parts(f"{name}b"), *self.parts(f"{name}l")]

    def loop(self, name: str, extent: int) -> Index:
        """The index that runs over `extent`, as one loop or, where it was split, as several."""
        factor = self.splits.get(name)
        if factor is None:
            self.loops.setdefault(name, Loop(name, extent))
            return Index.of(name)
        blocks = -(-extent // factor)
        outer = self.loop(f"{name}b", blocks)
        inner = self.loop(f"{name}l", factor)
        if extent % factor:
            if f"{name}l" in self.splits or f"{name}b" in self.splits:
                raise CannotLower(f"{self.name}: a ragged loop {name} cannot be split further")
            self.loops[f"{name}l"] = Loop(f"{name}l", factor, f"{name}b", extent)
        return outer * factor + inner

    def divmod(self, index: Index, divisor: int) -> tuple[Index, Index]:
        if divisor == 1:
            return index, Index()
        quotient: list[tuple[str, int]] = []
        remainder: list[tuple[str, int]] = []
        for loop, coefficient in index.terms:
            (remainder if coefficient % divisor else quotient).append((loop, coefficient))
        low = index.constant % divisor
        reach = low + sum(c * (self.loops[n].extent - 1) for n, c in remainder)
        if reach < divisor and all(c > 0 for _, c in remainder):
            return (
                Index(tuple((n, c // divisor) for n, c in quotient), index.constant // divisor),
                Index(tuple(remainder), low),
            )
        for loop, coefficient in remainder:
            if 0 < coefficient < divisor and divisor % coefficient == 0:
                factor = divisor // coefficient
                if self.loops[loop].extent > factor:
                    raise _Split(loop, factor)
        raise CannotLower(f"{self.name}: index {index} divided by {divisor} is not affine")

    # ---- expressions

    def pull(self, value: Value, index: tuple[Index, ...]) -> Expr:
        key = (value, index)
        if key not in self.memo:
            node = value.node
            if node.op == "input":
                access = self.address(self.operands[node.name], value, index)
                attributes = {"access": access}
                # Its elements are looked up by row-major address.
                if "known" in node.attrs and value.layout.lane_axis is None:
                    attributes["known"] = node.attrs["known"]
                self.memo[key] = Expr("load", (), value.dtype, attributes)
            elif node.op == "constant":
                if value.type.size != 1:
                    raise CannotLower(
                        f"{node.describe()}: a constant of {value.type} must be an operand of "
                        f"the region"
                    )
                self.memo[key] = Expr(
                    "constant", (), value.dtype, {"value": node.attrs["value"].item()}
                )
            else:
                rule = get(node.op).lower
                if rule is None:
                    operands = ", ".join(f"{v.name!r} {v.type}" for v in node.inputs)
                    raise CannotLower(
                        f"{node.describe()}: operator {node.op!r} has no lowering for the CPU; "
                        f"give its OpDef a lower or a decompose rule, or use target='interpret' "
                        f"(operands: {operands})"
                    )
                self.memo[key] = self.without_idle_bounds(
                    rule(_Rule(self, node, index), node, value.index, index)
                )
        return self.memo[key]

    def without_idle_bounds(self, expr: Expr) -> Expr:
        """Drop checks that hold for every value of the loops."""
        if expr.op == "reduce":
            body = self.without_idle_bounds(expr.args[0])
            return (
                Expr("reduce", (body,), expr.dtype, expr.attributes)
                if body is not expr.args[0]
                else expr
            )
        if expr.op == "mul":
            parts = tuple(self.without_idle_bounds(a) for a in expr.args)
            return (
                expr
                if all(a is b for a, b in zip(parts, expr.args, strict=True))
                else Expr("mul", parts, expr.dtype)
            )
        if expr.op != "within":
            return expr
        bounds = tuple((i, n) for i, n in expr.attributes["bounds"] if not self.always_within(i, n))
        inside = self.without_idle_bounds(expr.args[0])
        if bounds == expr.attributes["bounds"] and inside is expr.args[0]:
            # The same object: a value with two uses stays one.
            return expr
        return (
            Expr("within", (inside, expr.args[1]), expr.dtype, {"bounds": bounds})
            if bounds
            else inside
        )

    def always_within(self, index: Index, extent: int) -> bool:
        reach = [(c * (self.loops[n].extent - 1), self.loops[n]) for n, c in index.terms]
        if any(loop.ragged for _, loop in reach):
            return False
        low = index.constant + sum(min(r, 0) for r, _ in reach)
        high = index.constant + sum(max(r, 0) for r, _ in reach)
        return 0 <= low and high < extent

    def address(self, buffer: int, value: Value, index: tuple[Index, ...]) -> Access:
        layout, total, padded = value.layout, Index(), None
        strides = layout.strides(value.sizes)
        for axis, (position, stride) in enumerate(zip(index, strides, strict=True)):
            if axis == layout.lane_axis:
                block, lane = self.divmod(position, layout.lanes)
                total = total + block * stride + lane
                if len(lane.terms) == 1:
                    padded = lane.terms[0][0]
            else:
                total = total + position * stride
        return Access(buffer, total.constant, total.terms, padded)


class _Rule:
    """What one operator's `lower` rule sees: graphc.ops.registry.Lowering."""

    def __init__(self, pull: _Pull, node: Node, index: tuple[Index, ...]):
        self._pull, self._node = pull, node
        self._taken = {loop for i in index for loop, _ in i.terms}
        self._open: set[str] = set()  # loops of this rule's reductions around the one being built

    def read(self, slot: int, index: Sequence[Index | int]) -> Expr:
        return self._pull.pull(self._node.inputs[slot], tuple(Index.lift(i) for i in index))

    def divmod(self, index: Index | int, divisor: int) -> tuple[Index, Index]:
        return self._pull.divmod(Index.lift(index), divisor)

    def reduce(self, combine: str, extents: Sequence[int], body: Callable[..., Expr]) -> Expr:
        # Reductions over equal extents get the same loop names, so that they can share one loop; a
        # name that the element's own index uses already would be captured, and gets another number.
        pull, names, indices = self._pull, [], []
        used: set[str] = set()
        for extent in extents:
            for name in _loop_names(int(extent)):
                parts = {p for p in pull.loops if p == name or p.rstrip("bl") == name}
                taken = self._taken | self._open
                if name not in used and not parts & taken and name not in taken:
                    break
            used.add(name)
            names.append(name)
            indices.append(pull.loop(name, int(extent)))
        before, self._open = self._open, self._open | {p for n in names for p in pull.parts(n)}
        inner = body(*indices)
        self._open = before
        loops = tuple(p for n in names for p in pull.parts(n))
        if not loops:
            return inner if combine != "argmax" else reduce(combine, inner, ())
        return Expr(
            "reduce",
            (inner,),
            "int32" if combine == "argmax" else inner.dtype,
            {"combine": combine, "loops": loops},
        )

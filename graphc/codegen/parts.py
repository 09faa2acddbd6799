"""Cut a long sum into parts whose operands stay in the first cache, added up in the result.

The gradient of a weight sums over the pixels of all images, a convolution over many channels.
Element by element, what a register tile reads would come from the second cache or further; part by
part (some rows of one image, some channels), the operands of a part are read by all register tiles
while they are near (Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication",
section 4, where the parts are panels).
"""

from __future__ import annotations

from collections.abc import Iterator

from graphc.codegen.emit import ENDLESS
from graphc.codegen.kernel import Kernel, Loop, Store
from graphc.expr import Expr, Index, within


def can_be_cut(kernel: Kernel, main: Expr) -> bool:
    """Whether the kernel's only result can hold what parts add up to.

    All that it computes is one sum, and functions of each element of it."""
    sums = [e for e in kernel.expressions() if e.op == "reduce"]
    if len(kernel.stores) != 1 or sums != [main]:
        return False
    (store,) = kernel.stores
    return (
        not store.loops
        and store.expr.dtype == main.dtype
        and {n for n, _ in store.access.strides} <= kernel.free(main)
    )


def ways_to_cut(kernel: Kernel, main: Expr, lane: str | None) -> Iterator[dict[str, int]]:
    """Iterations of each loop of a sum that stay in one part, smaller parts later.

    Leading loops leave it one by one; one that keeps more than one iteration is cut evenly."""
    loops = [n for n in main.attributes["loops"] if n != lane]
    whole = {n: kernel.loops[n].extent for n in loops}
    blocks = {loop.block for loop in kernel.loops.values() if loop.ragged}
    for place, name in enumerate(loops[:-1]):
        extent = whole[name]
        outside = dict.fromkeys(loops[:place], 1)
        if name in blocks or kernel.loops[name].ragged:
            return
        for count in range(extent // 2, 1, -1):
            if extent % count == 0:
                yield {**whole, **outside, name: count}
        if extent > 1:
            yield {**whole, **outside, name: 1}


def cut(kernel: Kernel, kept: dict[str, int]) -> tuple[str, ...]:
    """Move loops of the kernel's only sum outside, as one of `ways_to_cut` says; returns them."""
    outside = []
    for name, count in kept.items():
        extent = kernel.loops[name].extent
        if count == extent:
            continue
        if count > 1:
            block, inner = f"{name}b", f"{name}l"
            del kernel.loops[name]
            kernel.loops[block], kernel.loops[inner] = (
                Loop(block, extent // count),
                Loop(inner, count),
            )
            kernel.substitute({name: ((block, count), (inner, 1))})
            name = block
        outside.append(name)
    (store,) = kernel.stores
    (total,) = (e for e in kernel.expressions() if e.op == "reduce")
    loops = tuple(n for n in total.attributes["loops"] if n not in outside)
    part = Expr("reduce", total.args, total.dtype, {**total.attributes, "loops": loops})
    before = Expr("load", (), total.dtype, {"access": store.access})
    # Later parts find the sum of the earlier ones; the first one finds whatever lay there.
    later = sum((Index.of(n) for n in outside), Index((), -1))
    added = part + within(((later, ENDLESS),), before, 0)
    result = _replaced(store.expr, total, added)
    if result is not added:
        last = tuple((Index.of(n) - (kernel.loops[n].extent - 1), 1) for n in outside)
        result = within(last, result, added)
    kernel.stores = (Store(store.access, result, store.loops),)
    kernel.outer = (*kernel.outer, *outside)
    return tuple(outside)


def _replaced(expr: Expr, old: Expr, new: Expr) -> Expr:
    """`expr` with `new` in place of `old`."""
    known = {id(old): new}

    def visit(e: Expr) -> Expr:
        if id(e) not in known:
            known[id(e)] = Expr(e.op, tuple(map(visit, e.args)), e.dtype, e.attributes)
        return known[id(e)]

    return visit(expr)

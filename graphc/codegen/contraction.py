"""Recognise a contraction in a loop-level kernel, and see it as one matrix product.

A contraction is a sum of products of two factors. Its loops fall into four kinds by which factor
depends on them: an output loop of the left factor alone belongs to the rows, of the right factor
alone to the columns, of both to the batch; the loops of the sum are the inner ones. So the matrix
product, the convolution and both its gradients are one form, an implicit matrix product

    out[batch, row, column] = sum of left[batch, row, inner] * right[batch, inner, column]

whose operands are gathered from memory while they are read, never stored as matrices (Chetlur et
al. 2014, "cuDNN: efficient primitives for deep learning", section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from graphc.codegen.kernel import Kernel
from graphc.expr import Expr, Index

Bounds = tuple[tuple[Index, int], ...]
# A checked loop this short is the phase of a stride. One phase for a whole tile, as of the batch,
# is better than columns of several, with taps of their own each.
_PHASES = 4


@dataclass(frozen=True)
class Factor:
    """`expr` where every (index, extent) of `bounds` lies in [0, extent), else 0."""

    expr: Expr
    bounds: Bounds


@dataclass(frozen=True)
class Contraction:
    """A kernel as an implicit matrix product; every loop list is outermost first.

    `reduction` is the sum of products in `kernel`, whose stores hold one element of it each."""

    kernel: Kernel
    reduction: Expr
    left: Factor
    right: Factor
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    inner: tuple[str, ...]

    def extent(self, loops: tuple[str, ...]) -> int:
        return self.kernel.trips(loops)


def find_contraction(kernel: Kernel) -> Contraction | None:
    """The kernel as a contraction; None if it is something else.

    Results may use the sum in any elementwise expression (the epilogue)."""
    reductions = [e for e in kernel.expressions() if e.op == "reduce"]
    if len(reductions) != 1 or reductions[0].attributes["combine"] != "sum":
        return None
    if any(s.loops for s in kernel.stores) or _hides(kernel, reductions[0]):
        return None
    product, bounds = _unguarded(reductions[0].args[0])
    if product.op != "mul":
        return None
    sides = [_unguarded(arg) for arg in product.args]
    free = [kernel.free(expr) for expr, _ in sides]
    checks = [list(own) for _, own in sides]
    for bound in bounds:
        loops = {n for n, _ in bound[0].terms}
        owner = next((i for i in (0, 1) if loops <= free[i]), None)
        if owner is None:
            return None
        checks[owner].append(bound)
    needs = [f | {n for i, _ in c for n, _ in i.terms} for f, c in zip(free, checks, strict=True)]
    phases = {
        n for c in checks for i, _ in c for n, _ in i.terms if kernel.loops[n].extent <= _PHASES
    }
    alone = [
        tuple(n for n in kernel.outer if n in needs[i] - needs[1 - i] - phases) for i in (0, 1)
    ]
    # The factor whose loops walk through the result without gaps gives the columns: neighbouring
    # threads then write neighbouring elements.
    right = 0 if _gap(kernel, alone[0]) < _gap(kernel, alone[1]) else 1
    factors = [Factor(sides[i][0], tuple(checks[i])) for i in (0, 1)]
    return Contraction(
        kernel,
        reductions[0],
        factors[1 - right],
        factors[right],
        tuple(n for n in kernel.outer if n not in alone[0] + alone[1]),
        alone[1 - right],
        alone[right],
        reductions[0].attributes["loops"],
    )


def _unguarded(expr: Expr) -> tuple[Expr, Bounds]:
    """An expression without the checks around it, outside of which it is 0."""
    bounds: Bounds = ()
    while expr.op == "within" and expr.args[1].attributes.get("value") == 0:
        bounds += expr.attributes["bounds"]
        expr = expr.args[0]
    return expr, bounds


def _hides(kernel: Kernel, reduction: Expr) -> bool:
    """Whether the sum stands behind a bounds check, so that not every element has one."""
    above = {id(reduction)}  # expressions that the sum is part of, each looked at once
    for e in kernel.expressions():  # operands first
        if any(id(arg) in above for arg in e.args):
            if e.op == "within":
                return True
            above.add(id(e))
    return False


def _gap(kernel: Kernel, loops: tuple[str, ...]) -> int:
    """Elements between neighbours of the result along the innermost of the loops."""
    strides = [abs(kernel.stores[0].access.stride(n)) for n in loops if kernel.loops[n].extent > 1]
    return min((s for s in strides if s), default=1 << 62)

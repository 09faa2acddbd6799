"""Index arithmetic of generated CUDA kernels: flat indices, their digits, affine offsets.

All of it is in uint32: Python's signed indices would pay for wrapping negative ones, and a quotient
by a number that is known costs a multiplication. A flat index runs over several loops at once; the
value of one loop is a digit of it. Where an access walks through neighbouring loops without a gap,
they are one digit (a run), often the flat index itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from graphc.codegen.kernel import Kernel


@dataclass(frozen=True)
class Run:
    """Neighbouring loops first..last-1 of a flat index that one stride walks through."""

    first: int
    last: int
    stride: int


class Flat:
    """A flat index over loops of a kernel, outermost first; loops of one iteration are left out."""

    def __init__(self, kernel: Kernel, loops: tuple[str, ...]):
        self.loops = tuple(n for n in loops if kernel.loops[n].extent > 1)
        self.extents = tuple(kernel.loops[n].extent for n in self.loops)
        self.extent = math.prod(self.extents)

    def runs(self, strides: Mapping[str, int]) -> list[Run]:
        """The runs of an affine function of the loops; loops that it ignores are in none."""
        runs: list[Run] = []
        for place, (loop, extent) in enumerate(zip(self.loops, self.extents, strict=True)):
            stride = strides.get(loop, 0)
            if runs and runs[-1].stride == stride * extent:
                runs[-1] = Run(runs[-1].first, place + 1, stride)
            else:
                runs.append(Run(place, place + 1, stride))
        return [run for run in runs if run.stride]

    def span(self, run: Run) -> int:
        """How many values a run's digit has."""
        return math.prod(self.extents[run.first : run.last])

    def digit(self, index: str, run: Run) -> str:
        """The run's digit of the flat index named `index`."""
        below = math.prod(self.extents[run.last :])
        text = index if below == 1 else f"{index} // U({below})"
        if run.first:
            text += f" % U({self.span(run)})"
        return text if text == index else f"U({text})"

    def terms(self, index: str, strides: Mapping[str, int]) -> list[str]:
        """Signed terms whose sum is the affine function at the flat index."""
        return [term(self.digit(index, run), run.stride) for run in self.runs(strides)]


def term(value: str, stride: int) -> str:
    sign = "-" if stride < 0 else "+"
    return f"{sign} {value}" if abs(stride) == 1 else f"{sign} {value} * U({abs(stride)})"


def total(terms: list[str], constant: int = 0) -> str:
    """A sum of signed terms as an expression of type uint32."""
    if constant:
        terms = [*terms, f"{'-' if constant < 0 else '+'} U({abs(constant)})"]
    if not terms:
        return "U(0)"
    text = " ".join(terms)
    text = text[2:] if text.startswith("+ ") else f"U(0) {text}"
    return text if text.isidentifier() else f"U({text})"


# ---- tiles in shared memory that are stored line by line


def line_strides(depth: int) -> tuple[int, int, int]:
    """How far apart lines 1, 4 and 32 apart lie: in other banks where threads write neighbouring
    lines, or read every fourth one (`ldmatrix`)."""
    four = depth + 4
    one = 8 * four + 16
    return one, four, 4 * one


def line_place(line: int, depth: int) -> int:
    """Where a line begins."""
    one, four, many = line_strides(depth)
    return line % 4 * one + line // 4 % 8 * four + line // 32 * many

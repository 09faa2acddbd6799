"""Where threads must wait for each other: the flags of the launch table's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphc.codegen.program import Launch
from graphc.ir import Value
from graphc.runtime.driver import ALONE, BARRIER, GROUP_SHIFT

Range = tuple[int, int]


def row_flags(launches: Sequence[Launch], memory: Callable[[Value], Range]) -> list[int]:
    """Flags by row: who runs it, the length of a group at its first row, and a barrier after a row only
    where a later row touches memory that this or an earlier one since the last barrier has touched, at
    least one of the two writing it."""
    flags = [ALONE if launch.schedule.parallel == 0 else 0 for launch in launches]
    units = _units(launches)
    reads: list[Range] = []
    writes: list[Range] = []
    for number, unit in enumerate(units):
        if unit[1] - unit[0] > 1:
            flags[unit[0]] |= (unit[1] - unit[0]) << GROUP_SHIFT
        rows = launches[unit[0] : unit[1]]
        new_reads = [memory(v) for launch in rows for v in launch.node.inputs]
        new_writes = [memory(v) for launch in rows for v in launch.node.outputs]
        if _meet(new_reads, writes) or _meet(new_writes, writes) or _meet(new_writes, reads):
            flags[units[number - 1][1] - 1] |= BARRIER
            reads, writes = [], []
        reads += new_reads
        writes += new_writes
    return flags


def _units(launches: Sequence[Launch]) -> list[tuple[int, int]]:
    """Half-open ranges of rows: groups, and rows by themselves."""
    units: list[tuple[int, int]] = []
    for row, launch in enumerate(launches):
        if row and launch.blocks and launches[row - 1].blocks == launch.blocks:
            units[-1] = (units[-1][0], row + 1)
        else:
            units.append((row, row + 1))
    return units


def _meet(a: list[Range], b: list[Range]) -> bool:
    return any(low < high2 and low2 < high for low, high in a for low2, high2 in b)

"""The launch table of a program.

One row a kernel, its arguments, and where threads wait for each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from graphc.codegen.program import Launch
from graphc.ir import Value, root
from graphc.runtime.arena import aligned_zeros
from graphc.runtime.driver import (
    ALONE,
    BARRIER,
    CLAIM_BYTES,
    GROUP_SHIFT,
    STRIPS_SHIFT,
    launch_table,
)
from graphc.runtime.team import Program, Team, get_team

Range = tuple[int, int]
Unit = tuple[int, int]  # a half-open range of rows

# Blocks of a launch for each thread, where threads claim them, and the iterations of all its loops
# that are worth it, for each thread: about 20 us.
CLAIMS = 16
CLAIMED_WORK = 1_000_000


class LaunchTable:
    """Kernels in order with absolute addresses as arguments, ready to run.

    `patches` gives, by name of an input, the places in `arguments` that hold its address."""

    def __init__(
        self,
        rows: Sequence[tuple[Launch, int]],
        address: Callable[[Value, int], int],
        memory: Callable[[Value], Range],
        team: Team,
    ):
        self.launches, self.team = [launch for launch, _ in rows], team
        units = _units(self.launches)
        flags = row_flags(self.launches, units, memory)
        claimed, self._claims = _claims(self.launches, units, team.threads)
        places = self._write_arguments(address)
        table = []
        for number, (launch, function) in enumerate(rows):
            strips = launch.strips[0] << STRIPS_SHIFT | launch.strips[1]
            blocks, claims = claimed.get(number, (launch.blocks, 0))
            if blocks and not launch.blocks:
                flags[number] |= 1 << GROUP_SHIFT
            at, step = places[number]
            table.append((function, at, flags[number], blocks, step, strips, claims))
        self.rows = launch_table(table)
        self.run = _runner(self, team)

    def _write_arguments(self, address: Callable[[Value, int], int]) -> list[tuple[int, int]]:
        """Makes `arguments` and `patches`. Returns the address of each row's arguments, and the
        bytes from one thread's to the next one's, 0 where all threads have the same."""
        copies = [_copies(launch) for launch in self.launches]
        sizes = [launch.call.buffers + len(launch.call.numbers) for launch in self.launches]
        total = sum(c * s for c, s in zip(copies, sizes, strict=True))
        self.arguments = aligned_zeros(8 * max(1, total)).view(np.int64)
        base, position, places = self.arguments.ctypes.data, 0, []
        patches: dict[str, list[int]] = {}
        for launch, count, size in zip(self.launches, copies, sizes, strict=True):
            places.append((base + 8 * position, 8 * size if count > 1 else 0))
            for thread in range(count):
                for value in (*launch.node.inputs, *launch.node.outputs):
                    self.arguments[position] = address(value, thread)
                    source = root(value)
                    if source.node.op == "input":
                        patches.setdefault(source.node.name, []).append(position)
                    position += 1
                end = position + len(launch.call.numbers)
                self.arguments[position:end] = launch.call.numbers
                position = end
        self.patches = {name: np.array(slots) for name, slots in patches.items()}
        return places

    def together(self) -> Program:
        """The program of the whole team, also where `run` would leave a short one to one thread."""
        return self.team.program(self.rows.ctypes.data, len(self.rows))

    def run_timed(self) -> np.ndarray:
        """Run once; int64[threads, rows, 2]: begin and end of every row in ticks."""
        stamps = np.zeros((self.team.threads, len(self.rows), 2), np.int64)
        if len(self.rows):
            self.team.program(self.rows.ctypes.data, len(self.rows), stamps.ctypes.data).run()
        return stamps


def _runner(table: LaunchTable, team: Team) -> Callable[[], object]:
    """What runs a table: the whole team, or for a short program what is faster at the moment."""
    rows = table.rows
    if not len(rows):
        return lambda: None
    together = table.together()
    if team.threads == 1:
        return together.run
    return Adaptive(get_team(1).program(rows.ctypes.data, len(rows)), together).run


class Adaptive:
    """Runs a program with the whole team, but a short one alone while the team is slower.

    A few microseconds of work are lost many times over when a core that the team counts on is busy
    with something else. The first calls run alone and are timed; from then on a few calls of the
    team in a row that take longer than that (the driver itself looks at the clock) send the next
    calls back to one thread, twice as many each time. The same rows compute the same bits either
    way: no result depends on how the work is shared."""

    SHORT = 200e-6  # seconds; longer programs gain from the team even on a busy machine
    TRIALS = 4
    PATIENCE = 3
    LEAST, MOST = 16, 4096  # calls in a row that run alone

    def __init__(self, alone: Program, together: Program):
        self.alone, self.together = alone, together
        self.expected = math.inf
        self.trials = self.TRIALS
        self.pause, self.backoff, self.patience = 0, self.LEAST, self.PATIENCE
        self.strained = False  # whether patience or backoff are not what they were at first

    def run(self) -> None:
        if self.trials:
            self._try_alone()
        elif self.pause:
            self.pause -= 1
            self.alone.run()
        elif not self.together.run():
            self.strained = True
            # One slow call may have woken sleeping workers.
            self.patience -= 1
            if not self.patience:
                self.pause, self.backoff = self.backoff, min(2 * self.backoff, self.MOST)
                self.patience = self.PATIENCE
        elif self.strained:
            self.patience, self.backoff = self.PATIENCE, max(self.LEAST, self.backoff - 1)
            self.strained = self.backoff > self.LEAST

    def _try_alone(self) -> None:
        begin = time.perf_counter()
        self.alone.run()
        self.expected = min(self.expected, time.perf_counter() - begin)
        # Even a cold first call tells a program that is far too long to run alone.
        self.trials = 0 if self.expected > 10 * self.SHORT else self.trials - 1
        if not self.trials and self.expected <= self.SHORT:
            self.together.set_limit(self.expected)


def _claims(
    launches: Sequence[Launch], units: Sequence[Unit], threads: int
) -> tuple[dict[int, tuple[int, int]], np.ndarray]:
    """By the first row of a unit that threads claim block by block: into how many blocks it is cut,
    and the address of its claims. The memory they are in comes second."""
    memory = aligned_zeros(CLAIM_BYTES * threads * max(1, len(units)))
    claimed = {}
    for number, (begin, end) in enumerate(units):
        if blocks := _claimed_blocks(launches[begin:end], threads):
            claimed[begin] = blocks, memory.ctypes.data + CLAIM_BYTES * threads * number
    return claimed, memory


def _claimed_blocks(launches: Sequence[Launch], threads: int) -> int:
    """Into how many blocks a group, or a launch by itself, is cut that threads claim one by one; 0
    for equal shares.

    On a busy machine cores differ from one moment to the next, and whoever is done waits at the
    barrier. Who computes a block changes no bit of it."""
    work = sum(launch.kernel.trips(launch.kernel.loops) for launch in launches)
    if threads == 1 or work < CLAIMED_WORK * threads:
        return 0
    (first, *_) = launches
    if first.blocks:
        return first.blocks if first.blocks > threads else 0
    units = math.prod(
        -(-first.kernel.loops[n].extent // dict(first.schedule.tile).get(n, 1))
        for n in first.schedule.order[: first.schedule.parallel]
    )
    if first.schedule.parallel == 0 or units <= threads:
        return 0
    return min(units, CLAIMS * threads)


def _copies(launch: Launch) -> int:
    """How many threads have arguments of their own: those with scratch memory of their own."""
    values = (*launch.node.inputs, *launch.node.outputs)
    return max(1, *(v.layout.copies for v in values))


def row_flags(
    launches: Sequence[Launch], units: Sequence[Unit], memory: Callable[[Value], Range]
) -> list[int]:
    """Flags by row: who runs it, the length of a group at its first row, and a barrier after a row
    only where a later row touches memory that this or an earlier one since the last barrier has
    touched, at least one of the two writing it."""
    flags = [ALONE if launch.schedule.parallel == 0 else 0 for launch in launches]
    reads: list[Range] = []
    writes: list[Range] = []
    for number, unit in enumerate(units):
        if launches[unit[0]].blocks:
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


def _units(launches: Sequence[Launch]) -> list[Unit]:
    """Groups, and rows by themselves."""
    units: list[Unit] = []
    for row, launch in enumerate(launches):
        if launch.blocks and not launch.begins and units:
            units[-1] = (units[-1][0], row + 1)
        else:
            units.append((row, row + 1))
    return units


def _meet(a: list[Range], b: list[Range]) -> bool:
    return any(low < high2 and low2 < high for low, high in a for low2, high2 in b)

"""`compile(..., tune=True)`: choose by measurement what the cost model only predicts.

The model ranks the candidates; the first few run on this machine, in turns and on memory of their
own, and the fastest is kept. The choice is remembered as a note in the kernel cache, under a key of
the machine and of the candidates themselves: it never goes stale, serves every network that has the
same kernel, and gives the same program whenever it is read.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from graphc.codegen.program import Launch
from graphc.codegen.schedule import multiply_adds
from graphc.ir import Node, Value, block_bytes, root
from graphc.runtime.arena import Arena
from graphc.runtime.build import Progress
from graphc.runtime.cache import KernelCache, default_cache
from graphc.runtime.driver import load_driver
from graphc.runtime.linker import KernelSource, load_kernels
from graphc.runtime.table import LaunchTable
from graphc.runtime.team import Team, get_team

CANDIDATES: Final = 5  # of each kernel, the predicted one among them
SECONDS: Final = 60.0  # of measuring in one compilation
_HEAVY: Final = 10_000  # multiply-adds; for less it is not worth compiling candidates
_EACH_SECONDS: Final = 0.15
_ROUNDS: Final = (5, 200)  # least and most turns of each candidate
# What is predicted stays unless another candidate takes at most this share of its time.
_BETTER: Final = 0.95

Tile = tuple[tuple[str, int], ...]


@dataclass
class Tuning:
    """What `tune=True` did in one compilation.

    measured, recalled, skipped: kernels whose candidates ran, whose choice a note had, and for
    which no time was left, so that they are as predicted. changed: (predicted, chosen) register
    tile of the kernels for which the prediction was not the fastest.
    """

    measured: list[str] = field(default_factory=list)
    recalled: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    changed: dict[str, tuple[Tile, Tile]] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.measured)} kernels measured, {len(self.recalled)} known from before"
        if self.skipped:
            text += f", no time for {len(self.skipped)}"
        lines = [
            f"{name}: register tile {_text(chosen)} instead of {_text(predicted)}"
            for name, (predicted, chosen) in self.changed.items()
        ]
        return "\n".join([text, *lines])


def tuned_launches(
    ranked: Sequence[Sequence[Launch]],
    threads: int,
    compiling: Progress | None = None,
    measuring: Progress | None = None,
) -> tuple[list[Launch], Tuning]:
    """Of each kernel's candidates, ranked by predicted cost, the fastest.

    `compiling` and `measuring` hear how that goes."""
    tuning, cache = Tuning(), default_cache()
    ranked = [cs if multiply_adds(cs[0].kernel) >= _HEAVY else cs[:1] for cs in ranked]
    keys = [_key(cache, candidates, threads) for candidates in ranked]
    choices: dict[str, int] = {}
    pending: dict[str, Sequence[Launch]] = {}
    for key, candidates in zip(keys, ranked, strict=True):
        if len(candidates) == 1:
            choices[key] = 0
        elif key not in choices and key not in pending:
            known = _index(candidates, cache.get_note(key))
            if known is None:
                pending[key] = candidates
            else:
                choices[key] = known
                tuning.recalled.append(candidates[0].node.name)
    sources = [KernelSource("kernel", c.call.source) for cs in pending.values() for c in cs]
    addresses = iter(load_kernels(sources, progress=compiling).addresses if sources else ())
    begin = time.perf_counter()
    for number, (key, candidates) in enumerate(pending.items()):
        rows = [(candidate, next(addresses)) for candidate in candidates]
        name = candidates[0].node.name
        if time.perf_counter() - begin > SECONDS:
            tuning.skipped.append(name)
            choices[key] = 0
            continue
        seconds = _measure(rows, get_team(threads))
        choices[key] = _fastest(seconds)
        tuning.measured.append(name)
        chosen = candidates[choices[key]]
        cache.put_note(key, {"tile": chosen.schedule.tile, "seconds": seconds})
        if measuring is not None:
            measuring(number + 1, len(pending), time.perf_counter() - begin, name)
    launches = []
    for key, candidates in zip(keys, ranked, strict=True):
        launches.append(candidates[choices[key]])
        if choices[key]:
            tiles = candidates[0].schedule.tile, launches[-1].schedule.tile
            tuning.changed[launches[-1].node.name] = tiles
    return launches, tuning


def _key(cache: KernelCache, candidates: Sequence[Launch], threads: int) -> str:
    """Names the choice: the cache adds the machine and the versions of the compilers."""
    calls = sorted((c.call.source, c.call.numbers) for c in candidates)
    text = json.dumps([threads, candidates[0].blocks, calls])
    return cache.key(text, signature="fastest", name="kernel")


def _index(candidates: Sequence[Launch], note: object) -> int | None:
    """The candidate that a note names."""
    if not isinstance(note, dict):
        return None
    tiles = [[list(part) for part in c.schedule.tile] for c in candidates]
    return tiles.index(note["tile"]) if note.get("tile") in tiles else None


def _fastest(seconds: Sequence[float]) -> int:
    """The fastest candidate; the first, which is predicted to be, unless one is clearly faster."""
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return best if seconds[best] < _BETTER * seconds[0] else 0


def _measure(rows: Sequence[tuple[Launch, int]], team: Team) -> list[float]:
    """Seconds that each of several kernels for one region takes, run in turns.

    By the first quartile: interruptions shall not decide."""
    memory = _Memory(rows[0][0].node)
    tables = [LaunchTable([row], memory.address, memory.range, team) for row in rows]
    rate = load_driver().ticks_per_second()
    for table in tables:
        table.run_timed()
    taken: list[list[float]] = [[] for _ in rows]
    begin = time.perf_counter()
    least, most = _ROUNDS
    for turn in range(most):
        if turn >= least and time.perf_counter() - begin > _EACH_SECONDS:
            break
        for times, table in zip(taken, tables, strict=True):
            stamps = table.run_timed()
            times.append(float(stamps[..., 1].max() - stamps[..., 0].min()) / rate)
    return [statistics.quantiles(times, n=4, method="inclusive")[0] for times in taken]


class _Memory:
    """Zeros for the operands and results of one region, each in a place of its own."""

    def __init__(self, node: Node):
        self._places: dict[Value, int] = {}
        size = 0
        for value in (*node.inputs, *node.outputs):
            if root(value) not in self._places:
                self._places[root(value)] = size
                size += block_bytes(root(value)) * max(1, root(value).layout.copies)
        self._arena = Arena(size)

    def address(self, value: Value, thread: int = 0) -> int:
        value = root(value)
        each = block_bytes(value) if value.layout.copies else 0
        return self._arena.address(self._places[value] + thread * each)

    def range(self, value: Value) -> tuple[int, int]:
        first = self.address(value)
        return first, first + block_bytes(root(value)) * max(1, root(value).layout.copies)


def _text(tile: Tile) -> str:
    return " x ".join(f"{count} {loop}" for loop, count in tile) or "none"

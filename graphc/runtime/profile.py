"""Where the time of a step goes: every launch timed by the driver, beside the machine's limits."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc import errors
from graphc.runtime.work import kernel_flops, launch_bytes
from graphc.serialize import write_atomically

if TYPE_CHECKING:
    from graphc.bench.machine import Machine
    from graphc.runtime.cpu import CpuExecutable

WARM_UP = 3


@dataclass(frozen=True)
class LaunchTime:
    """One row of the launch table.

    seconds: median over the runs of the time of the slowest thread; of a kernel that runs block by
    block with others, the sum over its blocks. balance: mean over the threads of their time, as a
    share of the slowest's (1: equal). flops, bytes: see `graphc.runtime.work`. share: the least
    time that the machine needs for that work (its roofline) over `seconds`; `bound` says which
    limit that is, "arithmetic" or "memory". layers: the user's layers it computes for.
    """

    name: str
    kind: str
    phase: str
    layers: tuple[str, ...]
    file: str
    seconds: float
    balance: float
    flops: int
    bytes: int
    share: float
    bound: str

    @property
    def gflops(self) -> float:
        """Operations in 1e9 a second."""
        return self.flops / self.seconds * 1e-9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """Bytes moved in 1e9 a second."""
        return self.bytes / self.seconds * 1e-9 if self.seconds else 0.0


@dataclass(frozen=True)
class Profile:
    """The times of all launches of an executable; `print(profile)` shows them as a table.

    step: median seconds of a whole native step, barriers included, without stamps. call: the same
    with Python's part: checking and copying inputs and outputs. runs: how many steps were timed.
    """

    graph: str
    threads: int
    runs: int
    step: float
    call: float
    launches: tuple[LaunchTime, ...]
    machine: Machine
    _stamps: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def seconds(self) -> float:
        """Sum of the launches' times: `step` less what barriers and the walk of the table cost."""
        return sum(launch.seconds for launch in self.launches)

    def phases(self) -> dict[str, float]:
        """Seconds of forward, backward and update."""
        found: dict[str, float] = {}
        for launch in self.launches:
            found[launch.phase] = found.get(launch.phase, 0.0) + launch.seconds
        return found

    def __str__(self) -> str:
        head = ("launch", "kind", "layers", "us", "%", "GFLOP/s", "GB/s", "of roof", "balance")
        rows: list[tuple[str, ...]] = []
        whole = self.seconds or 1.0
        for launch in self.launches:
            rows.append(
                (
                    _cut(launch.name, 28),
                    _cut(launch.kind, 18),
                    _cut(", ".join(launch.layers), 26),
                    f"{1e6 * launch.seconds:.2f}",
                    f"{100 * launch.seconds / whole:.1f}",
                    f"{launch.gflops:.1f}",
                    f"{launch.gbytes:.1f}",
                    f"{100 * launch.share:.0f}% {launch.bound[:1]}",
                    f"{launch.balance:.2f}",
                )
            )
        gflops = self.flops / self.step * 1e-9 if self.step else 0.0
        phases = self.phases()
        lines = [
            f"{self.graph}: {len(self.launches)} launches, {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}, medians of {self.runs} runs",
            *table(head, rows, left=3),
            f"launches {1e6 * self.seconds:.1f} us, step {1e6 * self.step:.1f} us, "
            f"call from Python {1e6 * self.call:.1f} us",
            f"{self.flops * 1e-9:.3g} GFLOP, {gflops:.1f} GFLOP/s, "
            f"{100 * gflops / self.machine.gflops:.0f}% of the measured {self.machine.gflops:.0f}",
        ]
        if len(phases) > 1:
            lines.append(", ".join(f"{n} {1e6 * s:.1f} us" for n, s in phases.items()))
        return "\n".join(lines)

    def to_json(self) -> str:
        """The profile as a JSON document: fields as here, seconds and bytes as numbers."""
        launches = [
            {**dataclasses.asdict(row), "gflops": row.gflops, "gbytes": row.gbytes}
            for row in self.launches
        ]
        fields = {
            "graph": self.graph,
            "threads": self.threads,
            "runs": self.runs,
            "step_seconds": self.step,
            "call_seconds": self.call,
            "flops": self.flops,
            "bytes": self.bytes,
            "phases": self.phases(),
            "machine": dataclasses.asdict(self.machine),
            "launches": launches,
        }
        return json.dumps(fields, indent=1)

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the run nearest the median as a trace: one row a thread, one box a launch.

        To be opened with chrome://tracing or https://ui.perfetto.dev."""
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": t, "args": {"name": f"thread {t}"}}
            for t in range(self.threads)
        ]
        for thread in range(self.threads):
            ended, group = 0.0, -1.0
            for launch, (begin, end) in zip(self.launches, self._stamps[thread].tolist()):
                # Rows that run block by block all begin with their group: one after the other here.
                shift = ended - begin if begin == group else 0.0
                group, ended = begin, end + shift
                event = {
                    "name": launch.name,
                    "cat": launch.phase,
                    "ph": "X",
                    "pid": 0,
                    "tid": thread,
                    "ts": 1e6 * (begin + shift),
                    "dur": 1e6 * (end - begin),
                    "args": {
                        "kind": launch.kind,
                        "layers": ", ".join(launch.layers),
                        "gflop": launch.flops * 1e-9,
                        "bytes": launch.bytes,
                        "file": launch.file,
                    },
                }
                events.append(event)
        document = {"traceEvents": events, "displayTimeUnit": "ns"}
        write_atomically(path, json.dumps(document).encode())


def profile(executable: CpuExecutable, inputs: Mapping[str, Any], runs: int) -> Profile:
    """Run `runs` steps with timing. Parameters and states are as before when it returns.

    Raises InputError as a call does, GraphcError for an executable without kernels."""
    from graphc.bench.machine import measure_machine
    from graphc.runtime.inspect import kernels

    if runs < 1:
        raise errors.GraphcError(f"profile: runs={runs}: at least one run is needed")
    program, team = executable._every, executable._team
    if not program.launches:
        raise errors.GraphcError(
            f"profile: graph {executable.graph.name!r} has no kernels to time: its outputs are "
            "sources or empty"
        )
    machine = measure_machine(executable.threads)
    # Arrays of the right type, kept alive: the launch table points at the large ones.
    arrays = executable._checked(inputs)
    taken = np.zeros((runs, executable.threads, len(program.launches), 2), np.int64)
    calls, steps = np.zeros(max(WARM_UP, runs)), np.zeros(runs)
    with executable._lock:
        before = executable.state(optimizer=True)
        try:
            for run in range(len(calls)):
                start = time.perf_counter()
                executable.run(arrays)
                calls[run] = time.perf_counter() - start
            for run in range(runs):
                start = time.perf_counter()
                program.run()
                steps[run] = time.perf_counter() - start
            for run in range(runs):
                taken[run] = program.run_timed()
        finally:
            executable.load_state(before, strict=False)
    seconds = taken / team._driver.ticks_per_second(at_least=0.05)
    each = seconds[..., 1] - seconds[..., 0]  # [run, thread, row]
    slowest = each.max(axis=1)
    median = np.median(slowest, axis=0)
    balance = np.median(each.mean(axis=1) / np.maximum(slowest, 1e-12), axis=0)
    typical = int(np.argsort(slowest.sum(axis=1))[runs // 2])
    infos = {info.name: info for info in kernels(executable)}
    launches = []
    for launch, slow, even in zip(program.launches, median.tolist(), balance.tolist()):
        info = infos[launch.node.name]
        flops, nbytes = kernel_flops(launch.kernel), launch_bytes(launch)
        # Block by block, what the threads touch at a time is their blocks.
        together = nbytes * executable.threads / launch.blocks if launch.blocks else nbytes
        launches.append(
            LaunchTime(
                info.name,
                info.kind,
                info.phase,
                info.layers,
                info.file,
                slow,
                even,
                flops,
                nbytes,
                machine.seconds(flops, nbytes, together) / slow if slow else 0.0,
                machine.bound(flops, nbytes, together),
            )
        )
    return Profile(
        executable.graph.name,
        executable.threads,
        runs,
        float(np.median(steps)),
        float(np.median(calls)),
        tuple(launches),
        machine,
        seconds[typical] - seconds[typical].min(),
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Lines of a text table; the first `left` columns are aligned to the left."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: tuple[str, ...]) -> str:
        aligned = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return [line(head), line(tuple("-" * w for w in widths)), *(line(r) for r in rows)]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"

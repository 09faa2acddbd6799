"""Where the time of a step goes: every launch timed by the driver, beside the machine's limits."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc import errors
from graphc.inspect.text import shorten, size_text, table, time_text
from graphc.inspect.trace import chrome_trace
from graphc.serialize import write_atomically

if TYPE_CHECKING:
    from graphc.bench.machine import Machine
    from graphc.runtime.cpu import CpuExecutable

WARM_UP = 3


@dataclass(frozen=True)
class LaunchTime:
    """One row of the launch table.

    seconds   time of the slowest thread, as a mean over the middle runs (see `Profile`); of a
              kernel that runs block by block with others, the sum over its blocks
    median    the same time as the median over all runs
    waiting   what the other threads waited meanwhile: `seconds` less the mean of all threads
    layer     the user's layer it counts for; `layers`: all that it computes for
    flops, bytes  see `graphc.inspect.work`
    share     the least time that the machine needs for that work over `seconds`
    roof      what sets that least time: "arithmetic", or the level of memory that the kernel's
              data fit: "L1", "L2", "L3" or "memory"
    """

    name: str
    kind: str
    phase: str
    layer: str
    layers: tuple[str, ...]
    file: str
    seconds: float
    median: float
    waiting: float
    flops: int
    bytes: int
    share: float
    roof: str

    @property
    def gflops(self) -> float:
        """Operations in 1e9 a second."""
        return self.flops / self.seconds * 1e-9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """Bytes moved in 1e9 a second."""
        return self.bytes / self.seconds * 1e-9 if self.seconds else 0.0

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def balance(self) -> float:
        """Mean over the threads of their time, as a share of the slowest's: 1 is even."""
        return 1 - self.waiting / self.seconds if self.seconds else 1.0


@dataclass(frozen=True)
class Profile:
    """The times of all launches of an executable; `print(profile)` shows them as a table.

    A step is run with and without time stamps in turn. All times are means over the half of the
    runs whose step took neither shortest nor longest: unlike medians they add up.

    step      seconds of a whole native step without stamps
    timed     seconds of a step with stamps: less `step`, what measuring costs
    call      a step with Python's part: checking and copying inputs and outputs
    launches  in order; their `seconds` and `barriers` add up to `timed`
    """

    graph: str
    threads: int
    runs: int
    step: float
    timed: float
    call: float
    launches: tuple[LaunchTime, ...]
    machine: Machine
    # Seconds since the step's begin [thread, launch, (begin, end)] of the run nearest the median.
    stamps: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def seconds(self) -> float:
        """Sum of the launches' times."""
        return sum(launch.seconds for launch in self.launches)

    @property
    def waiting(self) -> float:
        """Of `seconds`, what the mean thread waited because kernels are not shared evenly."""
        return sum(launch.waiting for launch in self.launches)

    @property
    def barriers(self) -> float:
        """Starting the threads, walking the table and passing barriers; less where threads that no
        barrier held were in different kernels at once, so that the kernels' times overlap."""
        return self.timed - self.seconds

    def phases(self) -> dict[str, float]:
        """Seconds of forward, backward and update."""
        found: dict[str, float] = {}
        for launch in self.launches:
            found[launch.phase] = found.get(launch.phase, 0.0) + launch.seconds
        return found

    def layers(self) -> dict[str, dict[str, float]]:
        """Seconds by layer and phase, in the order of the layers' first kernels.

        A kernel that computes for several layers counts for the one that gives it its structure:
        a convolution with its epilogue for the convolution."""
        found: dict[str, dict[str, float]] = {}
        for launch in self.launches:
            phases = found.setdefault(launch.layer, {})
            phases[launch.phase] = phases.get(launch.phase, 0.0) + launch.seconds
        return found

    def kinds(self) -> dict[str, dict[str, float]]:
        """By kind of kernel, the longest first: the number of its launches, their `seconds`, and
        the least seconds that the machine needs for their work, `best`."""
        found: dict[str, dict[str, float]] = {}
        for launch in self.launches:
            kind = found.setdefault(launch.kind, {"launches": 0, "seconds": 0.0, "best": 0.0})
            kind["launches"] += 1
            kind["seconds"] += launch.seconds
            kind["best"] += launch.share * launch.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))

    # ---- as text, JSON, a trace

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        lines = [
            f"{self.graph}: {len(self.launches)} launches, {threads}, {self.runs} runs",
            *self._launch_table(),
            "",
            *self._layer_table(),
            "",
            *self._kind_table(),
            "",
            *self._summary(),
        ]
        return "\n".join(lines)

    def _launch_table(self) -> list[str]:
        head = (
            *("launch", "kind", "layers", "us", "%", "wait %", "MFLOP", "bytes"),
            *("GFLOP/s", "of peak", "GB/s", "of roof", "roof"),
        )
        rows = []
        for launch in self.launches:
            rows.append(
                (
                    shorten(launch.name, 28),
                    shorten(launch.kind, 18),
                    shorten(", ".join(launch.layers), 26),
                    f"{1e6 * launch.seconds:.2f}",
                    f"{100 * launch.seconds / (self.seconds or 1.0):.1f}",
                    f"{100 * (1 - launch.balance):.0f}",
                    f"{1e-6 * launch.flops:.3f}",
                    size_text(launch.bytes),
                    f"{launch.gflops:.1f}",
                    f"{100 * launch.gflops / self.machine.gflops:.0f}%",
                    f"{launch.gbytes:.1f}",
                    f"{100 * launch.share:.0f}%",
                    launch.roof,
                )
            )
        return table(head, rows, left=3)

    def _layer_table(self) -> list[str]:
        phases = [p for p in ("forward", "backward", "update") if p in self.phases()]
        whole = self.seconds or 1.0
        totals = {**self.layers(), "all layers": self.phases()}
        rows = [
            (
                shorten(layer or "-", 40),
                *(f"{1e6 * times[p]:.1f}" if p in times else "-" for p in phases),
                f"{1e6 * sum(times.values()):.1f}",
                f"{100 * sum(times.values()) / whole:.1f}",
            )
            for layer, times in totals.items()
        ]
        return table(("layer", *(f"{p} us" for p in phases), "us", "%"), rows, left=1)

    def _kind_table(self) -> list[str]:
        rows = [
            (
                shorten(kind, 40),
                str(totals["launches"]),
                f"{1e6 * totals['seconds']:.1f}",
                f"{100 * totals['seconds'] / (self.seconds or 1.0):.1f}",
                f"{1e6 * totals['best']:.1f}",
            )
            for kind, totals in self.kinds().items()
        ]
        return table(("kind", "launches", "us", "%", "at best us"), rows, left=1)

    def _summary(self) -> Iterable[str]:
        machine, gflops = self.machine, self.flops / (self.step or 1.0) * 1e-9
        yield (
            f"step {time_text(self.step)}: kernels {time_text(self.seconds)} "
            f"({100 * self.seconds / (self.step or 1.0):.1f}%), of which threads wait for the "
            f"slowest {time_text(self.waiting)}"
        )
        rest = f"{'-' if self.barriers < 0 else ''}{time_text(abs(self.barriers))}"
        yield (
            f"start, barriers and overlap {rest}; measuring adds "
            f"{1e6 * (self.timed - self.step):+.1f} us; a call from Python takes "
            f"{time_text(self.call)}"
        )
        yield (
            f"{self.flops * 1e-9:.3g} GFLOP, {gflops:.1f} GFLOP/s, "
            f"{100 * gflops / machine.gflops:.0f}% of the measured {machine.gflops:.0f}"
        )
        yield str(machine)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the stamps as plain values: seconds, bytes and operations as numbers."""
        rates = ("gflops", "gbytes", "intensity", "balance")
        return {
            "graph": self.graph,
            "threads": self.threads,
            "runs": self.runs,
            "step_seconds": self.step,
            "timed_seconds": self.timed,
            "call_seconds": self.call,
            "kernel_seconds": self.seconds,
            "waiting_seconds": self.waiting,
            "barrier_seconds": self.barriers,
            "flops": self.flops,
            "bytes": self.bytes,
            "phases": self.phases(),
            "layers": self.layers(),
            "kinds": self.kinds(),
            "machine": dataclasses.asdict(self.machine),
            "launches": [
                {**dataclasses.asdict(row), **{name: getattr(row, name) for name in rates}}
                for row in self.launches
            ],
        }

    def to_json(self) -> str:
        """`as_dict` as a JSON document."""
        return json.dumps(self.as_dict(), indent=1)

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the run nearest the median as a trace: one row a thread, one box a launch.

        To be opened with chrome://tracing or https://ui.perfetto.dev."""
        write_atomically(path, json.dumps(chrome_trace(self)).encode())


def profile(executable: CpuExecutable, inputs: Mapping[str, Any], runs: int) -> Profile:
    """Run `runs` steps with timing. Parameters and states are as before when it returns.

    Raises InputError as a call does, GraphcError for an executable without kernels."""
    if runs < 1:
        raise errors.GraphcError(f"profile: runs={runs}: at least one run is needed")
    program = executable._every
    if not program.launches:
        raise errors.GraphcError(
            f"profile: graph {executable.graph.name!r} has no kernels to time: its outputs are "
            "sources or empty"
        )
    calls, steps, timed, ticks = _measure(executable, inputs, runs)
    stamps = ticks / executable._team._driver.ticks_per_second(at_least=0.05)
    each = stamps[..., 1] - stamps[..., 0]  # [run, thread, row]
    slowest = each.max(axis=1)
    middle = _middle(timed)
    typical = int(np.argsort(timed)[runs // 2])
    seconds = slowest[middle].mean(axis=0)
    # Each thread's time since the first began, in the run nearest the median.
    shown = stamps[typical] - stamps[typical].min()
    return Profile(
        executable.graph.name,
        executable.threads,
        runs,
        float(steps[_middle(steps)].mean()),
        float(timed[middle].mean()),
        float(np.median(calls)),
        *_launches(
            executable,
            seconds,
            np.median(slowest, axis=0),
            seconds - each[middle].mean(axis=(0, 1)),
        ),
        shown,
    )


def _measure(
    executable: CpuExecutable, inputs: Mapping[str, Any], runs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of calls, of steps without and with stamps, and the stamps in ticks."""
    program = executable._every
    # Arrays of the right type, kept alive: the launch table points at the large ones.
    arrays = executable._checked(inputs)
    calls, steps, timed = np.zeros(max(WARM_UP, runs)), np.zeros(runs), np.zeros(runs)
    ticks = np.zeros((runs, executable.threads, len(program.launches), 2), np.int64)
    with executable._lock:
        before = executable.state(optimizer=True)
        try:
            for run in range(len(calls)):
                start = time.perf_counter()
                executable.run(arrays)
                calls[run] = time.perf_counter() - start
            together = program.together()
            for run in range(runs):  # in turn, so that a busy machine slows both alike
                start = time.perf_counter()
                together.run()
                steps[run] = time.perf_counter() - start
                start = time.perf_counter()
                ticks[run] = program.run_timed()
                timed[run] = time.perf_counter() - start
        finally:
            executable.load_state(before, strict=False)
    return calls, steps, timed, ticks


def _middle(seconds: np.ndarray) -> np.ndarray:
    """Indices of the runs between the quartiles, one at least."""
    count = len(seconds)
    return np.argsort(seconds)[count // 4 : max(count // 4 + 1, count - count // 4)]


def _launches(
    executable: CpuExecutable, seconds: np.ndarray, median: np.ndarray, waiting: np.ndarray
) -> tuple[tuple[LaunchTime, ...], Machine]:
    """Each launch with its times and how far it is from the machine's limits."""
    from graphc.bench.machine import machine_limits
    from graphc.inspect.kernels import kernels

    infos = [info for info in kernels(executable) if not info.prepared]

    def limits(machine: Machine) -> list[tuple[float, str]]:
        """The least seconds of each launch, and what sets them."""
        found = []
        for info in infos:
            # Block by block, what the threads touch at a time is their blocks.
            together = info.bytes * executable.threads / info.blocks if info.blocks else info.bytes
            work = (info.flops, info.bytes, together)
            found.append((machine.seconds(*work), machine.roof(*work)))
        return found

    machine = machine_limits(executable.threads)
    if any(least > took for (least, _), took in zip(limits(machine), seconds, strict=True)):
        machine = machine_limits(executable.threads, again=True)
    launches = []
    for info, mean, middle, wait, (least, roof) in zip(
        infos, seconds.tolist(), median.tolist(), waiting.tolist(), limits(machine), strict=True
    ):
        launches.append(
            LaunchTime(
                info.name,
                info.kind,
                info.phase,
                info.layer,
                info.layers,
                info.file,
                mean,
                middle,
                wait,
                info.flops,
                info.bytes,
                least / mean if mean else 0.0,
                roof,
            )
        )
    return tuple(launches), machine

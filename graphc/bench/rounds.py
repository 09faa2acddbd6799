"""Run the peers in turns, each in a process of its own, and collect what they measured.

Machines drift and are shared, so peers are never measured one after the other: in every round each
runs one short burst, in changing order, and ratios are taken within a round. Only one process runs
at a time, the others are blocked on their pipes. See `docs/benchmarks.md`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphc import errors
from graphc.bench.models import Work
from graphc.bench.peers import PEERS, Peer

OURS = "graphc"
BUILD_SECONDS = 900.0  # the longest a peer may take to compile
BURST_SECONDS = 600.0
SETTLE_SECONDS = 0.02  # threads that still spin after a burst go to sleep meanwhile
# A peer whose results differ by more than this, relative to the largest, is pointed out.
TOLERANCE = 1e-3

# Variables that would hold a library back, or that check more than users do.
_REMOVED = (
    "OPENBLAS_CORETYPE OPENBLAS_L2_SIZE MKL_DEBUG_CPU_TYPE MKL_ENABLE_INSTRUCTIONS "
    "ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA XLA_FLAGS GRAPHC_VERIFY GRAPHC_CACHE "
    "OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_PROC_BIND OMP_PLACES KMP_AFFINITY GOMP_CPU_AFFINITY"
).split()
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Plan:
    """How to measure.

    rounds: how often each peer has its turn. burst: seconds of one turn. again: the peers that are
    started twice, with an empty folder for compiled code and again; None: all that keep any.
    """

    rounds: int = 15
    burst: float = 0.15
    again: tuple[str, ...] | None = None


QUICK = Plan(rounds=5, again=(OURS,))


@dataclass
class Row:
    """What one peer did with one piece of work. Times in seconds, memory in bytes.

    median, low, high: of the rounds' medians, the middle half lies between low and high. best: the
    fastest single call. ratio: this peer's time over graphc's within a round (above 1: graphc is
    faster), with its middle half. gflops: operations of the network's convolutions and products,
    counted as direct ones; share: of the measured peak. cold, warm: time to build the step and run
    it once, with an empty folder for compiled code and with a filled one (None: it keeps none).
    peak: largest resident set; imported: the same once the library was imported; step: that of
    running steps alone, over the library's and the parameters.
    """

    model: str
    batch: int
    mode: str
    threads: int
    peer: str
    variant: str = ""
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    best: float = 0.0
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    gflops: float = 0.0
    share: float | None = None
    cold: float | None = None
    warm: float | None = None
    peak: int = 0
    imported: int = 0
    step: int = 0
    note: str = ""
    rounds: list[float] = field(default_factory=list)


class Worker:
    """A peer's process and the pipe to it."""

    def __init__(self, peer: Peer, work: Work, folder: str):
        root = str(Path(__file__).resolve().parents[2])
        search = [root, *(os.path.abspath(p) for p in sys.path if p)]
        environment = {k: v for k, v in os.environ.items() if k not in _REMOVED}
        environment |= dict.fromkeys(_THREADS, str(work.threads))
        environment |= peer.environment(folder)
        environment |= {"PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"}
        names = [peer.name, work.model, str(work.batch), work.mode, str(work.threads)]
        quiet = None if os.environ.get("GRAPHC_LOG") else subprocess.DEVNULL
        self.name = peer.name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graphc.bench.measure", *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=quiet,
            text=True,
            env=environment,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, seconds: float, **command: Any) -> dict[str, Any]:
        """Send a command and wait for the answer. Raises GraphcError: it failed, took too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise errors.GraphcError(f"{self.name} took longer than {seconds:.0f} s") from None
        except (OSError, ValueError):  # the pipe is broken, or closed
            line = ""
        if not line:
            status = self._process.wait()
            raise errors.GraphcError(
                f"{self.name}'s process ended with status {status}; GRAPHC_LOG=1 shows its output"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise errors.GraphcError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()


def measure_peak(threads: int) -> dict[str, Any]:
    """`graphc.bench.machine.Machine` of that many threads, measured in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="graphc-bench-") as folder:
        worker = Worker(PEERS[OURS], Work("lenet5", 1, "infer", threads), folder)
        try:
            return worker.ask(BUILD_SECONDS, do="machine")
        finally:
            worker.close()


def measure(
    work: Work,
    peers: Sequence[Peer],
    plan: Plan,
    peak_gflops: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure one piece of work with every peer that can do it; a row each, failures included."""
    rows: dict[str, Row] = {}
    workers: dict[str, Worker] = {}
    calls: dict[str, int] = {}
    reference: list[list[float]] | None = None
    flops = work.flops()
    with contextlib.ExitStack() as stack:
        for peer in peers:
            if work.mode not in peer.modes:
                continue
            row = rows[peer.name] = Row(work.model, work.batch, work.mode, work.threads, peer.name)
            try:
                worker, built = _build(peer, work, plan, row, stack)
            except errors.GraphcError as error:
                row.note = f"failed: {error}"
                say(f"{work}: {peer.title} failed: {error}")
                continue
            workers[peer.name] = worker
            calls[peer.name] = max(1, min(10_000, round(plan.burst / built["iteration"])))
            row.variant = built["variant"]
            reference = reference or built["check"]
            row.note = compare(built["check"], reference)
            if row.cold is not None:
                seconds = f"{row.cold:.2f} s" + ("" if row.warm is None else f", {row.warm:.2f} s")
                say(f"{work}: {peer.title} built in {seconds}")
        times: dict[str, list[float]] = {name: [] for name in workers}

        def ask(name: str, **command: Any) -> dict[str, Any] | None:
            """A peer's answer; one that fails is measured no further, and the others are."""
            try:
                return workers[name].ask(BURST_SECONDS, **command)
            except errors.GraphcError as error:
                rows[name].note = f"failed: {error}"
                say(f"{work}: {name} failed: {error}")
                del workers[name], times[name]
                return None

        for number in range(plan.rounds):
            for name in _order(list(workers), number):
                time.sleep(SETTLE_SECONDS)
                answer = ask(name, do="burst", calls=calls[name])
                if answer is not None:
                    times[name].append(answer["median"])
                    row = rows[name]
                    row.best = min(row.best or answer["best"], answer["best"])
            say(f"{work}: round {number + 1} of {plan.rounds}")
        for name in list(workers):
            memory = ask(name, do="memory")
            if memory is not None:
                row = rows[name]
                row.peak, row.imported = memory["peak"], memory["imported"]
                row.step = memory["running"] - memory["imported"] - work.weight_bytes()
    for name, taken in times.items():
        summarise(rows[name], taken, times.get(OURS), flops, peak_gflops)
    return list(rows.values())


def _build(
    peer: Peer, work: Work, plan: Plan, row: Row, stack: contextlib.ExitStack
) -> tuple[Worker, dict[str, Any]]:
    """A worker that has built its step; fills in the row's times for that."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphc-bench-"))
    worker = Worker(peer, work, folder)
    stack.callback(worker.close)
    built = worker.ask(BUILD_SECONDS, do="build")
    row.cold = built["setup"]
    warm = peer.keeps and (plan.again is None or peer.name in plan.again)
    if warm or built["variants"] > 1:
        worker.close()
        worker = Worker(peer, work, folder)
        stack.callback(worker.close)
        built = worker.ask(BUILD_SECONDS, do="build", variant=built["variant"])
        row.warm = built["setup"] if warm else None
    return worker, built


def _order(names: list[str], number: int) -> list[str]:
    """Another order each round, so that no peer always follows the same one."""
    start = number % max(1, len(names))
    turned = names[start:] + names[:start]
    return turned[::-1] if number % 2 else turned


def compare(results: list[list[float]], reference: list[list[float]]) -> str:
    """What is wrong with a peer's results, or "": the same weights must give the same numbers."""
    flat = [x for step in results for x in step]
    expected = [x for step in reference for x in step]
    scale = max((abs(x) for x in expected), default=0.0) or 1.0
    error = max((abs(a - b) / scale for a, b in zip(flat, expected)), default=0.0)
    if len(flat) != len(expected) or not error <= TOLERANCE:
        return f"results differ from the first peer's by {error:.1e}"
    return ""


def summarise(
    row: Row,
    taken: list[float],
    ours: list[float] | None,
    flops: int,
    peak_gflops: float | None,
) -> None:
    """Fill in a row from its rounds, `ours`: graphc's in the same rounds."""
    row.rounds = taken
    row.median, (row.low, row.high) = statistics.median(taken), middle_half(taken)
    row.gflops = flops / row.median * 1e-9
    row.share = row.gflops / peak_gflops if peak_gflops else None
    if ours:
        ratios = [a / b for a, b in zip(taken, ours, strict=True)]
        row.ratio, (row.ratio_low, row.ratio_high) = statistics.median(ratios), middle_half(ratios)


def middle_half(values: list[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 3:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third

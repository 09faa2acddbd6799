"""A peer's own process: `python -m graphc.bench.measure`, started by `graphc.bench.rounds`.

Reads commands, one JSON line each, from its standard input and answers with one line each. Between
commands it is blocked on the pipe, so that only the process that was asked runs:

    {"do": "build"}              {"setup": s, "variant": ..., "variants": n, "check": [...],
                                 "iteration": s}
    {"do": "burst", "calls": k}  {"median": s, "best": s}
    {"do": "memory"}             {"peak": bytes, "imported": bytes, "running": bytes}
    {"do": "machine"}            the fields of `graphc.bench.machine.Machine`

Times are in seconds. A command that fails is answered by {"error": ...}.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from typing import Any

CHECKED = 3  # steps whose results are reported
VARIANT_SECONDS = 0.3  # for each variant, to find the fastest and how long a call takes
TURNS = 3
# A processor that rested takes a tenth of a second to reach its clock again: the same products in
# the first cache took 3.0 ms at once and 1.4 ms after 0.1 s on the machine of the README.
WARM_SECONDS = 0.2


def main(arguments: list[str]) -> None:
    """`measure PEER MODEL BATCH MODE THREADS`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    peer_name, model, batch, mode, threads = arguments
    _take_cores(int(threads))
    worker = Worker(peer_name, model, int(batch), mode, int(threads))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, f"do_{command.pop('do')}")(**command)
        except Exception as error:
            if os.environ.get("GRAPHC_LOG"):
                traceback.print_exc()
            reason = " ".join(str(error).split())[:400]
            answer = {"error": f"{type(error).__name__}: {reason}"}
        answers.write(json.dumps(answer) + "\n")


def _take_cores(threads: int) -> None:
    """Give the process as many cores as threads: libraries that count cores then start as many."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Worker:
    """Answers the commands of one process."""

    def __init__(self, peer: str, model: str, batch: int, mode: str, threads: int):
        from graphc.bench.models import Work
        from graphc.bench.peers import PEERS

        self.work = Work(model, batch, mode, threads)
        self.peer = PEERS[peer]
        self.imported = 0

    def do_build(self, variant: str | None = None) -> dict[str, Any]:
        """Import the library, then make the step and run it once: that is `setup`.

        Of several variants the fastest is chosen, unless one is asked for; `variants` says how many
        there were to choose from. All of them stay in memory: who measures that starts again."""
        self.peer.load(self.work.threads)
        candidates = self.peer.candidates(self.work)
        if variant is not None:
            candidates = [c for c in candidates if c[0] == variant]
        self.imported = peak_memory()
        start = time.perf_counter()
        step = candidates[0][1]()
        first = step()
        setup = time.perf_counter() - start
        steps = [step, *(make() for _, make in candidates[1:])]
        checks = [[first, *(step() for _ in range(CHECKED - 1))]]
        checks += [[other() for _ in range(CHECKED)] for other in steps[1:]]
        # In turns and by the first quartile: an interruption shall not decide.
        taken: list[list[float]] = [[] for _ in steps]
        for _ in range(TURNS):
            for times, other in zip(taken, steps):
                times += _times(other, VARIANT_SECONDS / TURNS)
        usual = [sorted(times)[len(times) // 4] for times in taken]
        best = min(range(len(steps)), key=usual.__getitem__)
        self.step = steps[best]
        return {
            "setup": setup,
            "variant": candidates[best][0],
            "variants": len(candidates),
            "check": [_number(c) for c in checks[best]],
            "iteration": usual[best],
        }

    def do_burst(self, calls: int) -> dict[str, float]:
        """Time `calls` calls, after some that wake threads, caches and the clock up."""
        _times(self.step, WARM_SECONDS)
        taken = [_timed(self.step) for _ in range(calls)]
        return {"median": statistics.median(taken), "best": min(taken)}

    def do_memory(self) -> dict[str, int]:
        """Largest resident sets: so far, once the library was imported, and of more steps alone."""
        peak = peak_memory()
        forget_peak()
        for _ in range(CHECKED):
            self.step()
        return {"peak": peak, "imported": self.imported, "running": peak_memory()}

    def do_machine(self) -> dict[str, Any]:
        from dataclasses import asdict

        from graphc.bench.machine import measure_machine

        return asdict(measure_machine(self.work.threads))


def _times(step: Any, seconds: float) -> list[float]:
    """Seconds of each call made in a while, one at least."""
    taken: list[float] = []
    while not taken or (sum(taken) < seconds and len(taken) < 1000):
        taken.append(_timed(step))
    return taken


def _timed(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _number(result: Any) -> list[float]:
    """A result as a few numbers to compare peers by: a loss, or the first image's logits."""
    import numpy as np

    return [float(x) for x in np.atleast_1d(np.asarray(result, np.float64))[:1].ravel()[:16]]


def peak_memory() -> int:
    """Bytes of the largest resident set this process has had.

    Linux's ru_maxrss starts with what the parent had when it forked; VmHWM does not."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def forget_peak() -> None:
    """Let `peak_memory` start again from what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Driver, thread team and arena: order, sharing, interruption, fork and exit."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphc.errors import GraphcError
from graphc.runtime import team as team_module
from graphc.runtime.arena import Arena
from graphc.runtime.driver import ALONE, BARRIER, launch_table, load_driver
from graphc.runtime.linker import KernelSource, load_kernels
from graphc.runtime.table import Adaptive
from graphc.runtime.team import Program, Team, get_team

ROOT = Path(__file__).resolve().parents[1]

# Each thread has a slot of 16 words, so that threads do not share cache lines.
SOURCES = (
    # Counts the rounds of this thread.
    """
def write_own(a, thread, threads):
    a[thread * 16] += 1
""",
    # Every thread must be in the round that this one is in; else counts an error.
    """
def read_next(a, thread, threads):
    if a[(thread + 1) % threads * 16] != a[thread * 16]:
        a[thread * 16 + 1] += 1
""",
    # Runs by itself, with its own idea of the number of threads.
    """
def alone(a, thread, threads):
    a[2] += 10 * threads + thread
""",
    # Keeps this thread busy for a while.
    """
def work(a, thread, threads):
    x = a[thread * 16 + 3]
    for i in range(a[15]):
        x = x * 6364136223846793005 + i
    a[thread * 16 + 3] = x
    a[thread * 16] += 1
""",
    """
def fails(a, thread, threads):
    if thread == threads - 1:
        raise ValueError
""",
)


@pytest.fixture(scope="module")
def kernels() -> dict[str, int]:
    sources = [KernelSource(text.split("(")[0].split()[1], text) for text in SOURCES]
    return {
        source.name: address
        for source, address in zip(sources, load_kernels(sources).addresses, strict=True)
    }


class Run:
    """A program over one array of words, with what it refers to kept alive."""

    def __init__(self, team: Team, rows: list[tuple[int, int]], timing: int = 0) -> None:
        self.words = np.zeros((team.threads, 16), np.int64)
        address = self.words.ctypes.data
        self.table = launch_table([(function, address, flags) for function, flags in rows])
        self.program: Program = team.program(self.table.ctypes.data, len(self.table), timing)

    def __call__(self) -> None:
        self.program.run()

    @property
    def rounds(self) -> list[int]:
        return self.words[:, 0].tolist()


def lock_step(kernels: dict[str, int], rounds: int) -> list[tuple[int, int]]:
    return [(kernels["write_own"], BARRIER), (kernels["read_next"], BARRIER)] * rounds


def run_script(script: str, seconds: float = 30, **environment: str) -> str:
    prelude = """
        import os, sys, threading, time
        import numpy as np
        from graphc.runtime.driver import launch_table
        from graphc.runtime.linker import KernelSource, load_kernels
        from graphc.runtime.team import get_team
        text = "def work(a, t, n):\\n    for i in range(a[15]):\\n        a[t * 16] += a[i & 7]\\n"
        address = load_kernels([KernelSource("work", text)]).addresses[0]
        words = np.zeros((4, 16), np.int64)
        table = launch_table([(address, words.ctypes.data, 1)] * 3)
        team = get_team(2)
        program = team.program(table.ctypes.data, 3)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the driver


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_barrier_keeps_threads_in_step(kernels: dict[str, int], threads: int) -> None:
    run = Run(get_team(threads), lock_step(kernels, 2000 if threads <= 2 else 300))
    for _ in range(3):
        run()
    assert run.rounds == [3 * len(run.table) // 2] * threads
    assert not run.words[:, 1].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_alone_is_thread_zero_of_one(kernels: dict[str, int], threads: int) -> None:
    rows = [(kernels["alone"], ALONE), (kernels["alone"], ALONE | BARRIER)]
    run = Run(get_team(threads), rows)
    run()
    assert run.words[0, 2] == 2 * 10 and run.words[1:].sum() == 0


def test_empty_program() -> None:
    for threads in (1, 2):
        get_team(threads).run(0, 0)


def test_timing_stamps(kernels: dict[str, int]) -> None:
    team = get_team(2)
    rows = [(kernels["work"], BARRIER), (kernels["alone"], ALONE), (kernels["work"], 0)]
    stamps = np.zeros((2, 3, 2), np.int64)
    run = Run(team, rows, stamps.ctypes.data)
    run.words[0, 15] = 1_000_000
    rate = load_driver().ticks_per_second(0.05)
    begin = time.perf_counter()
    run()
    elapsed = time.perf_counter() - begin
    assert (stamps[:, :, 1] >= stamps[:, :, 0]).all()
    assert (stamps[:, 1:, 0] >= stamps[:, :-1, 1]).all()
    assert (stamps[:, 1, 0] >= stamps[:, 0, 1].max()).all()  # the barrier after the first row
    assert 0 < (stamps.max() - stamps.min()) / rate < 1.05 * elapsed
    assert load_driver().ticks_per_second() == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("threads", [1, 2])
def test_failed_kernel_is_reported_once(kernels: dict[str, int], threads: int) -> None:
    team = get_team(threads)
    rows = [(kernels["write_own"], BARRIER), (kernels["fails"], 0), (kernels["write_own"], BARRIER)]
    run = Run(team, rows)
    with pytest.raises(GraphcError, match="row 1"):
        run()
    assert run.rounds == [2] * threads
    fine = Run(team, rows[:1])
    fine()
    assert fine.rounds == [1] * threads


class Counted:
    """Stands for a program; `in_time` is what its runs return."""

    def __init__(self) -> None:
        self.runs, self.in_time, self.limit = 0, True, 0.0

    def run(self) -> bool:
        self.runs += 1
        return self.in_time

    def set_limit(self, seconds: float) -> None:
        self.limit = seconds


def test_short_programs_leave_a_slow_team_for_a_while() -> None:
    alone, together = Counted(), Counted()
    adaptive = Adaptive(alone, together)  # type: ignore[arg-type]

    def runs(calls: int) -> tuple[int, int]:
        before = alone.runs, together.runs
        for _ in range(calls):
            adaptive.run()
        return alone.runs - before[0], together.runs - before[1]

    assert runs(Adaptive.TRIALS) == (Adaptive.TRIALS, 0) and 0 < together.limit < Adaptive.SHORT
    assert runs(100) == (0, 100)
    together.in_time = False
    assert runs(1) == (0, 1)
    together.in_time = True  # one slow call is forgiven
    assert runs(100) == (0, 100)
    together.in_time = False
    for pause in (Adaptive.LEAST, 2 * Adaptive.LEAST, 4 * Adaptive.LEAST):
        assert runs(Adaptive.PATIENCE + pause) == (pause, Adaptive.PATIENCE)
    together.in_time = True
    assert runs(500) == (0, 500)
    together.in_time = False  # the pauses are short again
    assert runs(Adaptive.PATIENCE + Adaptive.LEAST) == (Adaptive.LEAST, Adaptive.PATIENCE)


# ---- the team


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_longer_than_its_limit_says_so(kernels: dict[str, int], threads: int) -> None:
    team = Team(threads)
    run = Run(team, [(kernels["work"], 0)])
    run.words[0, 15] = 100_000  # at least 50 us
    assert run.program.run() is True
    run.program.set_limit(1e-6)
    assert run.program.run() is False
    run.program.set_limit(60.0)
    assert run.program.run() is True
    run.program.set_limit(0)
    assert run.program.run() is True
    assert run.words[0, 0] == 4
    team.close()


def test_team_is_shared_and_checked() -> None:
    assert get_team(2) is get_team(2)
    for threads in (0, -1, 10**6):
        with pytest.raises(GraphcError, match="threads="):
            Team(threads)


@pytest.mark.parametrize("threads", [2, 4])
def test_sleeping_workers_wake(
    kernels: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pauses around the time at which workers go to sleep: where a wake-up would get lost."""
    monkeypatch.setenv("GRAPHC_SPIN_US", "50")
    team = Team(threads)
    run = Run(team, lock_step(kernels, 1))
    for turn in range(1500):
        until = time.perf_counter() + (turn % 100) * 1e-6
        while time.perf_counter() < until:
            pass
        run()
    assert run.rounds == [1500] * threads
    team.close()


def test_python_threads_take_turns(kernels: dict[str, int]) -> None:
    runs = [Run(get_team(threads), lock_step(kernels, 20)) for threads in (2, 2, 3, 1)]

    def repeat(run: Run) -> None:
        for _ in range(100):
            run()

    callers = [threading.Thread(target=repeat, args=(run,)) for run in runs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    for run in runs:
        assert set(run.rounds) == {2000} and not run.words[:, 1].any()


def test_close_and_start_again(kernels: dict[str, int]) -> None:
    team = Team(2)
    run = Run(team, lock_step(kernels, 5))
    for turn in range(1, 21):
        run()
        assert run.rounds == [5 * turn] * 2
        if turn % 2:
            time.sleep(0.001)  # so that the worker sleeps
        team.close()


def test_threads_that_cannot_start(
    kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Team(4)
    run = Run(team, lock_step(kernels, 5))
    start = team_module._thread.start_new_thread

    def refuse(function: Callable[[], int], arguments: tuple[()]) -> int:
        if function is team._requests[2].call:
            raise RuntimeError("can't start new thread")
        return start(function, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(team_module._thread, "start_new_thread", refuse)
        with pytest.raises(GraphcError, match="only 3 of 4 threads"):
            run()
    run()
    assert run.rounds == [5] * 4
    team.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX timers")
def test_interrupts_leave_the_team_whole(kernels: dict[str, int]) -> None:
    """A signal handler that raises, as Ctrl-C does, some hundred times at any moment."""

    class Interrupt(BaseException):
        pass

    def handler(*_: object) -> None:
        raise Interrupt

    team = Team(2)
    run = Run(team, lock_step(kernels, 50))
    interrupts = 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0003 + interrupts % 7 * 1e-4)
                while True:
                    run()
                    if interrupts % 10 == 0:
                        team.close()
            except Interrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 20
    run.words[:] = 0
    run()
    assert run.rounds == [50, 50] and not run.words[:, 1].any()
    team.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX fork")
@pytest.mark.parametrize("asleep", [False, True])
def test_fork(kernels: dict[str, int], asleep: bool) -> None:
    run = Run(get_team(2), lock_step(kernels, 100))
    run()
    if asleep:
        time.sleep(0.003)
    child = os.fork()
    if child == 0:
        try:
            for _ in range(3):
                run()
            team_module._close_all()
            os._exit(0 if run.rounds == [400] * 2 else 1)
        finally:
            os._exit(2)
    run()
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    assert done[1] == 0
    assert run.rounds == [200] * 2


EXITS = {
    "a worker polls": "program.run()",
    "a worker sleeps": "program.run(); time.sleep(0.01)",
    "system exit": "program.run(); sys.exit(0)",
    "a daemon thread runs programs": """
        words[0, 15] = 1000
        def forever():
            while True:
                program.run()
        threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.05)
        """,
    "a daemon thread is in a long kernel": """
        words[0, 15] = 300_000_000
        threading.Thread(target=program.run, daemon=True).start()
        time.sleep(0.05)
        """,
    "a run after the team was closed": """
        import atexit
        from graphc.runtime import team as module
        atexit.unregister(module._close_all)
        atexit.register(program.run)
        atexit.register(module._close_all)
        program.run()
        """,
}


@pytest.mark.parametrize("case", EXITS)
def test_exit_is_clean(case: str) -> None:
    begin = time.monotonic()
    script = textwrap.dedent(EXITS[case]) + "\nprint('end')\n"
    if case == "system exit":
        script = f"print('end')\n{script}"
    output = run_script(script, GRAPHC_SPIN_US="20000000" if case == "a worker polls" else "")
    assert output == "end\n"
    assert time.monotonic() - begin < 10


def test_busy_machine_is_slow_but_not_stuck(kernels: dict[str, int]) -> None:
    """Every core is taken by another process, as on a shared machine."""
    run = Run(get_team(2), lock_step(kernels, 20))
    run()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.1)
        begin = time.monotonic()
        turns = 0
        while time.monotonic() - begin < 1.0:
            run()
            turns += 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert turns >= 5  # 200 barriers a second at the least


# ---- arenas


@pytest.mark.parametrize(("nbytes", "alignment"), [(0, 64), (100, 64), (1 << 20, 4096)])
def test_arena(nbytes: int, alignment: int) -> None:
    arena = Arena(nbytes)
    assert arena.address(0) % alignment == 0
    assert not arena.view(0, (nbytes,), np.uint8).any()
    arena.poison()
    slack = np.ctypeslib.as_array(
        (np.ctypeslib.ctypes.c_uint8 * (nbytes + 512)).from_address(arena.address(-256))
    )
    assert (slack == 255).all()
    if nbytes >= 100:
        value = arena.view(64, (3, 2))
        assert value.dtype == np.float32 and np.isnan(value).all()
        assert value.ctypes.data == arena.address(64)
        value[...] = 1
        assert arena.view(64, (6,)).tolist() == [1] * 6
        assert arena.view(64, (), np.float64).shape == ()
    for offset, shape in ((-4, (1,)), (nbytes, (1,)), (0, (nbytes,))):
        if shape[0]:
            with pytest.raises(IndexError, match="outside an arena"):
                arena.view(offset, shape)
    for offset in (-257, nbytes + 257):
        with pytest.raises(IndexError, match="outside an arena"):
            arena.address(offset)
    with pytest.raises(ValueError, match="-1 bytes"):
        Arena(-1)

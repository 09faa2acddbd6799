"""A team of threads that runs programs together, in place of OpenMP.

The thread that calls `run` is thread 0. The others are Python threads that stay inside the native
driver, without the GIL. Programs are split statically, so the same number of threads gives the
same bits.

A thread that waits, for a program, at a barrier, or for the others to finish, polls for a while
and then blocks on the team's condition variable. It polls for at most 100 us, or
`GRAPHC_SPIN_US` (300) for a program, and less where polling has failed lately. This matters on
shared machines: with both cores of two taken by other processes, polling with `sched_yield` made
a program of 20 barriers 25 times slower, this leaves it its fair share of the cores.

Why no wake-up is lost. A waiter that goes to sleep does, with the mutex held: (1) add 1 to
SLEEPERS, (2) compare the word it waits for with the old value, (3) if equal wait on the condition,
which releases the mutex. Who changes the word does: (a) change it, (b) load SLEEPERS, (c) if not 0
lock the mutex, wake all, unlock. All of these are in one sequentially consistent order. If (b)
reads 0, then (1) comes after (b), so (2) comes after (a) and sees the new value: the waiter does
not sleep. Otherwise (c) locks the mutex: either before the waiter did, and then (2) sees the new
value, or after the waiter has released it in (3), and then the waiter is woken.

Why an interrupted call harms nothing. Posting a program, waking, running and waiting for all
workers is one native call; Python acts on a Ctrl-C before or after it, never inside.

After `fork` the child has no workers: the control block is set up anew, and they start with the
next `run`. At interpreter exit workers are told to leave; one that cannot (it is in a kernel that
another thread's `run` waits for) is harmless, since control block and code are never freed.
"""

import _thread
import atexit
import ctypes
import itertools
import os
import sys
import threading
import time
import weakref
from typing import Any, Final

import numpy as np

from graphc.errors import GraphcError
from graphc.runtime import control as c
from graphc.runtime.arena import aligned_zeros
from graphc.runtime.driver import Request, load_driver

WAIT_US: Final = 100.0  # about what it costs to block and be woken
IDLE_US: Final = 300.0
MAX_THREADS: Final = 256
_EXIT_SECONDS: Final = 1.0


def available_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Program:
    """A launch table, prepared to be run by a team."""

    def __init__(self, team: "Team", table: int, rows: int, timing: int = 0) -> None:
        self._team = team
        # The request owns the words that the call points to.
        self._request = Request(team._participate, team._control, 0, table, rows, timing)
        self._call = self._request.call

    def set_limit(self, seconds: float) -> None:
        """`run` returns False from now on where it takes longer than that."""
        self._request.set_limit(int(seconds * self._team._driver.ticks_per_second()))

    def run(self) -> bool:
        """Runs every row with all threads and returns when all have finished: True unless that took
        longer than the limit, should there be one.

        The GIL is released. Programs of one team take turns; those of a team of one thread do
        not need to. Raises GraphcError if a kernel returned an error status.
        """
        team = self._team
        if team.threads == 1:
            status = self._call()
        else:
            with team._lock:
                if not team._running:
                    team._start()
                status = self._call()
        if not status:
            return True
        row = self._request.failed_row
        if row is not None:
            raise GraphcError(f"the kernel of row {row} of a launch table returned an error status")
        return False


class Team:
    """`threads` threads, the caller among them. Use `get_team`: teams are for the whole process."""

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise GraphcError(f"threads={threads}: use 1 to {MAX_THREADS}")
        self.threads = threads
        self._driver = load_driver()
        self._participate = self._driver.participate
        self._words = aligned_zeros(c.CONTROL_BYTES, 128).view(np.int64)
        self._control: int = self._words.ctypes.data
        self._requests = [
            Request(self._participate, self._control, thread) for thread in range(1, threads)
        ]
        for used_by_workers in (self._words, self._requests):  # never freed, see above
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(used_by_workers))
        self._lock = threading.Lock()
        self._running = False
        self._workers: list[int] = []  # identifiers of running threads
        self._set_control()
        _teams.add(self)

    def program(self, table: int, rows: int, timing: int = 0) -> Program:
        """Prepares a launch table at an address; the caller keeps its memory alive.

        With `timing`, the address of int64[threads, rows, 2], each run stamps begin and end of
        every row in ticks (see `Driver.ticks_per_second`).
        """
        return Program(self, table, rows, timing)

    def run(self, table: int, rows: int, timing: int = 0) -> None:
        """Runs a table once; `program` is faster for one that is run again."""
        Program(self, table, rows, timing).run()

    def close(self) -> None:
        """Ends the workers; the next `run` starts new ones. Waits for a run to finish first."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        """Sets up the control block and starts the workers. With the lock held."""
        self._stop()  # what an interrupted start or stop has left
        self._set_control()
        calls = [request.call for request in self._requests]
        try:
            # All in one call of a C function: a signal handler that raises cannot come between
            # the start of a thread and its entry in the list. (`threading.Thread` can lose it.)
            self._workers.extend(map(_thread.start_new_thread, calls, itertools.repeat(())))
        except RuntimeError as error:
            started = len(self._workers)
            self._stop()
            raise GraphcError(
                f"only {started + 1} of {self.threads} threads can be started ({error}): "
                "compile with a smaller threads="
            ) from error
        self._running = True

    def _stop(self) -> None:
        """Makes the workers leave the driver. They run no program now, so that takes no time."""
        self._running = False
        if self._workers:
            self._words[c.STOP // 8] = 1
            stop = Request(self._participate, self._control, 0)
            stop.call()
            while self._words[c.LEFT // 8] < len(self._workers):
                time.sleep(0.0001)
            self._workers.clear()

    def _set_control(self) -> None:
        """The control block of a team at rest. No worker may be running."""
        words = self._words
        words[:] = 0
        words[c.THREADS // 8] = self.threads
        # With more threads than cores the one waited for is likely not running.
        wait_us = WAIT_US if self.threads <= available_cores() else WAIT_US / 20
        idle_us = float(os.environ.get("GRAPHC_SPIN_US") or IDLE_US)
        for offset, microseconds in ((c.PATIENCE, wait_us), (c.IDLE_PATIENCE, idle_us)):
            ticks = int(microseconds * 1e-6 * self._driver.ticks_per_second())
            words[offset // 8 : offset // 8 + 2] = ticks
        for offset, address in _system_functions(self._control).items():
            words[offset // 8] = address

    def _forget_workers(self) -> None:
        """In the child of a fork: only the thread that called `fork` exists there."""
        self._lock = threading.Lock()
        self._running = False
        self._workers.clear()


def _system_functions(control: int) -> dict[int, int]:
    """Addresses of the system's yield, mutex and condition variable functions, by control offset.

    Initialises mutex and condition variable in the control block.
    """

    def address(function: Any) -> int:
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32")
        kernel.InitializeSRWLock(ctypes.c_void_p(control + c.MUTEX))
        kernel.InitializeConditionVariable(ctypes.c_void_p(control + c.CONDITION))
        return {
            c.LOCK: address(kernel.AcquireSRWLockExclusive),
            c.UNLOCK: address(kernel.ReleaseSRWLockExclusive),
            c.WAIT: address(kernel.SleepConditionVariableSRW),
            c.WAKE_ALL: address(kernel.WakeAllConditionVariable),
        }
    system = ctypes.CDLL(None)
    system.pthread_mutex_init(ctypes.c_void_p(control + c.MUTEX), None)
    system.pthread_cond_init(ctypes.c_void_p(control + c.CONDITION), None)
    return {
        c.LOCK: address(system.pthread_mutex_lock),
        c.UNLOCK: address(system.pthread_mutex_unlock),
        c.WAIT: address(system.pthread_cond_wait),
        c.WAKE_ALL: address(system.pthread_cond_broadcast),
    }


_teams: "weakref.WeakSet[Team]" = weakref.WeakSet()
_by_threads: dict[int, Team] = {}
_lock = threading.Lock()


def get_team(threads: int) -> Team:
    """The process's team of that many threads."""
    with _lock:
        team = _by_threads.get(threads)
        if team is None:
            team = _by_threads[threads] = Team(threads)
        return team


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for team in list(_teams):
        team._forget_workers()


def _close_all() -> None:
    for team in list(_teams):
        # A daemon thread may be in a long program, or start one after the other: let it.
        if team._lock.acquire(timeout=_EXIT_SECONDS):
            try:
                team._stop()
            finally:
                team._lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)

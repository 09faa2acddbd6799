"""Run CUDA kernels on the CPU, thread by thread: no GPU, no driver, no C compiler.

`emulate_ir.py` turns the NVVM IR of a kernel, exactly what libnvvm would get, into native code in
which each thread is a coroutine; `_emulate_native.py` schedules them. What it finds that a GPU may
hide: a missing barrier (threads run in the order asked for, one until it waits, then the next), a
barrier that not all threads reach, shared memory that is read before it is written (it holds NaN
when a block begins).

What it does not model: the order in which a GPU makes writes to global memory visible, blocks that
run at the same time, and time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from graphc import errors
from graphc.runtime import emulate_record as r
from graphc.runtime.arena import aligned_zeros
from graphc.runtime.linker import KernelSource, load_kernels

ORDERS = ("forward", "reverse", "shuffled")
MOST_THREADS = 1024  # of a block
Dimensions = tuple[int, int, int]
# One launch at a time in a process: the current thread is a global variable of each kernel.
_lock = threading.Lock()


@functools.cache
def _scheduler() -> Callable[..., int]:
    """The native function that runs a launch."""
    folder = Path(__file__).parent
    others = ("emulate_record.py", "_driver_native.py")
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in others)).hexdigest()
    text = (folder / "_emulate_native.py").read_text(encoding="utf-8")
    source = KernelSource("run_grid", f"{text}\n# {', '.join(others)}: {digest}\n", "void(int64)")
    (address,) = load_kernels([source]).addresses
    # Numba's convention: int32 f(result**, exception**, arguments...)
    return ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, ctypes.c_int64)(address)


def thread_order(order: str, threads: int) -> np.ndarray:
    """Numbers of a block's threads in the order in which they run, int32."""
    numbers = np.arange(threads, dtype=np.int32)
    if order == "reverse":
        return numbers[::-1].copy()
    if order == "shuffled":
        return np.random.default_rng(threads).permutation(numbers).astype(np.int32)
    return numbers


class Emulator:
    """Runs launches of kernels whose threads take turns in one of ORDERS."""

    def __init__(self, order: str = "forward") -> None:
        self.order = order
        self._run = _scheduler()
        self._records = aligned_zeros(4 * r.WORDS * MOST_THREADS).view(np.int32)
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    @property
    def order(self) -> str:
        """Who runs before whom: "forward", "reverse" or "shuffled" (the same in every launch)."""
        return self._order

    @order.setter
    def order(self, order: str) -> None:
        if order not in ORDERS:
            raise errors.GraphcError(
                f"order of emulated threads {order!r}: use {', '.join(map(repr, ORDERS))}"
            )
        self._order = order

    def launch(
        self, name: str, entry: int, grid: Dimensions, block: Dimensions, parameters: np.ndarray
    ) -> None:
        """Run the kernel at address `entry` with `parameters`, an int64 each.

        Raises GraphcError naming the block in which threads wait for each other for ever."""
        threads = block[0] * block[1] * block[2]
        if not 1 <= threads <= MOST_THREADS:
            raise errors.GraphcError(
                f"kernel {name}: {threads} threads a block, at most {MOST_THREADS} can be"
            )
        key = (self.order, threads)
        if key not in self._orders:
            self._orders[key] = thread_order(*key)
        job = np.zeros(r.JOB_WORDS, np.int64)
        job[r.JOB_ENTRY] = entry
        job[r.JOB_PARAMETERS] = parameters.ctypes.data
        job[r.JOB_RECORDS] = self._records.ctypes.data
        job[r.JOB_ORDER] = self._orders[key].ctypes.data
        job[r.JOB_GRID : r.JOB_GRID + 3] = grid
        job[r.JOB_BLOCK : r.JOB_BLOCK + 3] = block
        words = (ctypes.c_void_p * 2)()
        with _lock:
            self._run(ctypes.addressof(words), ctypes.addressof(words) + 8, job.ctypes.data)
        if job[r.JOB_STUCK]:
            raise errors.GraphcError(_stuck(name, job, threads))


def _stuck(name: str, job: np.ndarray, threads: int) -> str:
    place = tuple(int(n) for n in job[r.JOB_FAILED : r.JOB_FAILED + 3])
    barrier, warp, done = (int(job[w]) for w in (r.JOB_BARRIER, r.JOB_WARP, r.JOB_DONE))
    waiting = [f"{barrier} wait at a barrier"] if barrier else []
    waiting += [f"{warp} wait at a warp operation"] if warp else []
    return (
        f"kernel {name}, block {place}: of {threads} threads {' and '.join(waiting)} for ever, "
        f"{done} have finished; a barrier must be reached by all threads of a block, a warp "
        f"operation by all lanes of its mask"
    )

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphc import errors
from graphc.runtime import emulate_record as r
from graphc.runtime.arena import aligned_zeros
from graphc.runtime.cache import Entry, KernelCache, default_cache
from graphc.runtime.linker import KernelSource, link, load_kernels

ORDERS = ("forward", "reverse", "shuffled")
MOST_THREADS = 1024
_lock = threading.Lock()  # one block runs at a time: the current thread is a global of each kernel


@dataclass(frozen=True)
class EmulatedKernel:
    """Native code of one kernel: the address of its entry, and whether threads wait for others."""

    name: str
    entry: int
    suspends: bool


@functools.cache
def _scheduler():
    """The native function that runs a launch."""
    folder = Path(__file__).parent
    others = ("emulate_record.py", "_driver_native.py")
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in others)).hexdigest()
    text = (folder / "_emulate_native.py").read_text(encoding="utf-8")
    source = KernelSource("run_grid", f"{text}\n# {', '.join(others)}: {digest}\n", "void(int64)")
    (address,) = load_kernels([source]).addresses
    # Numba's convention: int32 f(result**, exception**, arguments...)
    return ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, ctypes.c_int64)(address)


def compile_emulated(
    name: str, lowered: tuple[str, Sequence[str]], key: str, shared: int = 0
) -> tuple[Entry, bool]:
    """Object code of a kernel given as (entry, NVVM IR modules), and whether its threads wait.

    Raises CompileError for what the emulation does not know."""
    from graphc.runtime.emulate_ir import compile_module, native_module

    module = native_module(lowered[0], lowered[1], f"emulated_{key[:32]}", shared)
    try:
        return Entry(module.symbol, compile_module(module)), module.suspends
    except RuntimeError as error:
        raise errors.CompileError(f"kernel {name} cannot be emulated: {error}") from error


def load_emulated(name: str, entry: Entry, suspends: bool) -> EmulatedKernel:
    code = link([entry])
    code.keep_forever()
    return EmulatedKernel(name, code.address(entry.symbol), suspends)


def order_of_threads(order: str, threads: int) -> np.ndarray:
    """Numbers of a block's threads in the order in which they run."""
    numbers = np.arange(threads, dtype=np.int32)
    if order == "reverse":
        return numbers[::-1].copy()
    if order == "shuffled":
        return np.random.default_rng(threads).permutation(numbers).astype(np.int32)
    return numbers


class Emulator:
    """Runs launches. One at a time in a process, as kernels keep their current thread globally."""

    def __init__(self, order: str = "forward"):
        if order not in ORDERS:
            raise errors.CompileError(
                f"order of emulated threads {order!r}: use {', '.join(map(repr, ORDERS))}"
            )
        self.order = order
        self._run = _scheduler()
        self._records = aligned_zeros(4 * r.WORDS * MOST_THREADS).view(np.int32)
        self._orders: dict[int, np.ndarray] = {}

    def launch(
        self,
        kernel: EmulatedKernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: np.ndarray,
    ) -> None:
        """Run a kernel: `parameters` are its arguments, an int64 each (pointers, integers).

        Raises GraphcError naming the block in which threads wait for each other for ever."""
        threads = block[0] * block[1] * block[2]
        if not 1 <= threads <= MOST_THREADS:
            raise errors.GraphcError(
                f"kernel {kernel.name}: {threads} threads a block, at most {MOST_THREADS} can be"
            )
        order = self._orders.setdefault(threads, order_of_threads(self.order, threads))
        job = np.zeros(r.JOB_WORDS, np.int64)
        job[r.JOB_ENTRY], job[r.JOB_SUSPENDS] = kernel.entry, kernel.suspends
        job[r.JOB_PARAMETERS] = parameters.ctypes.data
        job[r.JOB_RECORDS], job[r.JOB_ORDER] = self._records.ctypes.data, order.ctypes.data
        job[r.JOB_GRID : r.JOB_GRID + 3] = grid
        job[r.JOB_BLOCK : r.JOB_BLOCK + 3] = block
        words = (ctypes.c_void_p * 2)()
        with _lock:
            self._run(ctypes.addressof(words), ctypes.addressof(words) + 8, job.ctypes.data)
        if job[r.JOB_ERROR]:
            raise errors.GraphcError(_stuck(kernel, job, threads))


def _stuck(kernel: EmulatedKernel, job: np.ndarray, threads: int) -> str:
    place = tuple(int(n) for n in job[r.JOB_FAILED : r.JOB_FAILED + 3])
    barrier, warp, done = (int(job[w]) for w in (r.JOB_BARRIER, r.JOB_WARP, r.JOB_DONE))
    waiting = [f"{barrier} at a barrier"] if barrier else []
    waiting += [f"{warp} at a warp operation whose other lanes do not come"] if warp else []
    return (
        f"kernel {kernel.name}, block {place}: of {threads} threads {' and '.join(waiting)} wait "
        f"for ever; {done} have finished. A barrier must be reached by all threads of the block, a "
        f"warp operation by all lanes of its mask"
    )


__all__ = [
    "ORDERS",
    "EmulatedKernel",
    "Emulator",
    "KernelCache",
    "compile_emulated",
    "default_cache",
    "load_emulated",
]

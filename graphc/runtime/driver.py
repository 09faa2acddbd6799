"""The native driver as Python sees it: its sources, its call, its clock, and launch tables.

A program is a table of int64 rows (`control.py`). Flag BARRIER makes all threads finish a row
before any goes on; ALONE leaves the row to thread 0.
`_driver_native.py` holds the code that walks it.
"""

import ctypes
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from graphc.runtime import control as c
from graphc.runtime.arena import aligned_zeros
from graphc.runtime.cache import KernelCache
from graphc.runtime.linker import KernelSource, load_kernels

BARRIER = c.BARRIER
ALONE = c.ALONE
GROUP_SHIFT = c.GROUP_SHIFT
STRIPS_SHIFT = c.STRIPS_SHIFT
CLAIM_BYTES = c.CLAIM_BYTES

_Native = Callable[..., int]


@functools.cache
def driver_sources() -> tuple[KernelSource, ...]:
    """The driver's two native functions, as sources for the kernel cache."""
    folder = Path(__file__).parent
    layout = hashlib.sha256((folder / "control.py").read_bytes()).hexdigest()
    text = (folder / "_driver_native.py").read_text(encoding="utf-8")
    source = f"{text}\n# control.py: {layout}\n"
    return (
        KernelSource("participate", source, "void(int64)"),
        KernelSource("clock", source, "void(int64)"),
    )


def launch_table(rows: Iterable[tuple[int, ...]]) -> np.ndarray:
    """int64[rows, 7], 64-byte aligned, from rows (function, arguments, flags[, blocks[, step[,
    strips[, claims]]]])."""
    rows = list(rows)
    memory = aligned_zeros(max(1, len(rows)) * c.ROW_BYTES).view(np.int64)
    table = memory.reshape(-1, c.ROW_BYTES // 8)[: len(rows)]
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


class Request:
    """One prepared call of the driver: `call()` returns 0, or not 0 if a kernel failed or the run
    took longer than `limit` ticks.

    Trap: `call` points into this object and does not keep it alive.

    Everything is converted to C beforehand, which leaves 0.3 us a call: each argument converted
    by ctypes would cost 0.1 us. The GIL is released meanwhile.
    """

    def __init__(
        self,
        participate: _Native,
        control: int,
        thread: int,
        table: int = 0,
        rows: int = 0,
        timing: int = 0,
    ) -> None:
        self._block = aligned_zeros(c.REQUEST_BYTES).view(np.int64)
        self._block[:5] = control, thread, table, rows, timing
        address = self._block.ctypes.data
        self.call: Callable[[], int] = functools.partial(
            participate,
            ctypes.c_void_p(address + c.REQUEST_RESULT),
            ctypes.c_void_p(address + c.REQUEST_EXCEPTION),
            ctypes.c_void_p(address),
        )

    @property
    def failed_row(self) -> int | None:
        """After a call that did not return 0: the row of a kernel that failed, if one did."""
        failed = int(self._block[c.REQUEST_FAILED // 8])
        return failed - 1 if failed else None

    def set_limit(self, ticks: int) -> None:
        """Calls return another status than 0 from now on where they take longer. 0: any length."""
        self._block[c.REQUEST_LIMIT // 8] = ticks


class Driver:
    """The driver's native functions, linked."""

    def __init__(self, cache: KernelCache | None = None) -> None:
        loaded = load_kernels(driver_sources(), cache)
        # Numba's convention: int32 f(result**, exception**, arguments...)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 3)
        self.participate: _Native = prototype(loaded.address("participate"))
        self._clock: _Native = prototype(loaded.address("clock"))
        self._begin = self._pair()

    def ticks(self) -> int:
        """The tick counter that timing stamps are taken from."""
        words = (ctypes.c_int64 * 3)()
        address = ctypes.addressof(words)
        self._clock(address + 8, address + 16, address)
        return words[0]

    def ticks_per_second(self, at_least: float = 0.002) -> float:
        """Rate of the tick counter, measured against Python's clock since the driver was loaded.

        Waits until `at_least` seconds lie between. Longer is more exact: 1 us in the whole.
        """
        while True:
            seconds, ticks = self._pair()
            elapsed = seconds - self._begin[0]
            if elapsed >= at_least:
                return (ticks - self._begin[1]) / elapsed
            time.sleep(at_least - elapsed)

    def _pair(self) -> tuple[float, int]:
        """(seconds, ticks) of one moment: the closest of a few readings."""
        best = (float("inf"), 0.0, 0)
        for _ in range(5):
            before = time.perf_counter()
            ticks = self.ticks()
            after = time.perf_counter()
            best = min(best, (after - before, (before + after) / 2, ticks))
        return best[1], best[2]


_driver: Driver | None = None
_lock = threading.Lock()


def load_driver(cache: KernelCache | None = None) -> Driver:
    """The process's driver."""
    global _driver
    with _lock:
        if _driver is None:
            _driver = Driver(cache)
        return _driver

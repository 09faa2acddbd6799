"""What this machine can do at most: its multiply-add peak and its bandwidth at every cache level.

Measured with kernels in the vocabulary of our own generated code, by the same team of threads, so
that "share of the peak" compares like with like. `python -m graphc.bench.machine` prints it.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from graphc.runtime.cache import default_cache

_MULTIPLY_ADDS = """\
from graphc.codegen import simd

v = simd.vocabulary({lanes})
arguments = v.arguments(3)
pointer = v.pointer("float32")
load_1 = v.load_tile((1,), "vector", fixed=(0,))
load_tile = v.load_tile(({tile},), "vector", fixed=({lanes},))
store_tile = v.store_tile(({tile},), "vector", fixed=({lanes},))
fma = v.tile_fma({numbers}, {zeros})


def kernel(args, thread, threads):
    a_data, a_out, steps = arguments(args)
    data = pointer(a_data)
    out = pointer(a_out)
    y = load_1(data, 0, (0,))
    sums = load_tile(data, 0, (0,))
    for step in range(steps):
        sums = fma(sums, y, y)
    store_tile(out, thread * {stored}, (0,), sums)
"""

_READ = """\
from graphc.codegen import simd

v = simd.vocabulary({lanes})
arguments = v.arguments(4)
pointer = v.pointer("float32")
load_tile = v.load_tile(({tile},), "vector", fixed=({lanes},))
store_tile = v.store_tile(({tile},), "vector", fixed=({lanes},))
add = v.add


def kernel(args, thread, threads):
    a_data, a_out, steps, repeats = arguments(args)
    data = pointer(a_data)
    out = pointer(a_out)
    start = thread * steps * {stored}
    sums = load_tile(data, start, (0,))
    for repeat in range(repeats):
        for step in range(steps):
            sums = add(sums, load_tile(data, start + step * {stored}, (0,)))
    store_tile(out, thread * {stored}, (0,), sums)
"""

LEVELS = ("L1", "L2", "L3", "memory")
_CACHES = (32 << 10, 512 << 10, 8 << 20)  # L1 and L2 of a core, L3 of all, where none are told
_MOST = 256 << 20
_TRIES = 15
_SECONDS = 0.002  # one measurement takes about this long: short ones fall between interruptions


@dataclass(frozen=True)
class Machine:
    """Measured limits of `threads` threads together.

    gflops: multiply-adds counted as two operations, in 1e9 a second. read: (largest working set
    in bytes, bytes read in 1e9 a second) of L1, L2, L3 and memory.
    """

    name: str
    cores: int
    threads: int
    lanes: int
    gflops: float
    read: tuple[tuple[int, float], ...]

    @property
    def level_names(self) -> tuple[str, ...]:
        """What the entries of `read` are limits of."""
        return LEVELS

    def bandwidth(self, nbytes: float) -> float:
        """GB/s at which a working set of `nbytes` is read: that of the cache that it fits."""
        return self.read[LEVELS.index(self.level(nbytes))][1]

    def seconds(self, flops: float, nbytes: float, together: float | None = None) -> float:
        """The least time for that work: the roofline (Williams, Waterman & Patterson 2009).

        together: bytes that are in use at the same time, where that is not all of `nbytes`."""
        return max(self._limits(flops, nbytes, together))

    def roof(self, flops: float, nbytes: float, together: float | None = None) -> str:
        """Which limit that work meets first: "arithmetic", or the level of memory that it fits."""
        arithmetic, memory = self._limits(flops, nbytes, together)
        return (
            self.level(nbytes if together is None else together)
            if memory > arithmetic
            else ("arithmetic")
        )

    def level(self, nbytes: float) -> str:
        """The smallest level of memory that holds a working set: "L1", "L2", "L3" or "memory"."""
        sizes = [size for size, _ in self.read[:-1]]
        return next((n for n, size in zip(LEVELS, sizes) if nbytes <= size), LEVELS[-1])

    def _limits(self, flops: float, nbytes: float, together: float | None) -> tuple[float, float]:
        speed = self.bandwidth(nbytes if together is None else together)
        return flops / self.gflops * 1e-9, nbytes / speed * 1e-9

    def __str__(self) -> str:
        levels = ", ".join(f"up to {_size(n)} {s:.0f} GB/s" for n, s in self.read[:-1])
        return (
            f"{self.name}, {self.threads} of {self.cores} cores, {self.lanes} float32 lanes: "
            f"{self.gflops:.0f} GFLOP/s, reads {levels}, memory {self.read[-1][1]:.0f} GB/s"
        )


_known: dict[int, Machine] = {}


def machine_limits(threads: int, again: bool = False) -> Machine:
    """The limits of `threads` threads, measured once and kept in the folder of compiled kernels.

    again: measure once more and keep the better figures. Something was faster than the limits
    known, so the machine was busy when they were measured."""
    machine = _known.get(threads) or _load_limits(threads)
    if machine is None or again:
        fresh = measure_machine(threads)
        machine = fresh if machine is None else _best_of(machine, fresh)
        default_cache().put_note(_limits_key(threads), asdict(machine))
    _known[threads] = machine
    return machine


def _best_of(a: Machine, b: Machine) -> Machine:
    read = tuple((size, max(x, y)) for (size, x), (_, y) in zip(a.read, b.read, strict=True))
    return replace(a, gflops=max(a.gflops, b.gflops), read=read)


def _limits_key(threads: int) -> str:
    """Under which the cache keeps the limits: by processor, cores and what measures them."""
    from graphc.codegen.simd_host import host_lanes
    from graphc.runtime.team import available_cores

    facts = (cpu_name(), host_lanes(), available_cores(), threads, cache_sizes())
    return default_cache().key(Path(__file__).read_text(encoding="utf-8"), repr(facts), "limits")


def _load_limits(threads: int) -> Machine | None:
    fields = default_cache().get_note(_limits_key(threads))
    if fields is None:
        return None
    return Machine(**{**fields, "read": tuple((n, s) for n, s in fields["read"])})


def measure_machine(threads: int) -> Machine:
    """Measure the limits of `threads` threads: 0.3 s. See `machine_limits`."""
    from graphc.codegen.core import registers
    from graphc.codegen.simd_host import host_lanes
    from graphc.runtime.arena import aligned_zeros
    from graphc.runtime.linker import KernelSource, load_kernels
    from graphc.runtime.team import available_cores

    lanes = host_lanes()
    tile = 3 * registers(lanes) // 4  # fills them, but for operands, and hides the latency
    fma = _MULTIPLY_ADDS.format(
        lanes=lanes, tile=tile, stored=tile * lanes, numbers=(0,) * tile, zeros=(0,) * tile
    )
    read = _READ.format(lanes=lanes, tile=8, stored=8 * lanes)
    sources = [KernelSource("kernel", source) for source in (fma, read)]
    addresses = load_kernels(sources).addresses
    out = np.zeros(threads * tile * lanes + 64, np.float32)

    data = aligned_zeros(4 * tile * lanes).view(np.float32)
    steps = 100_000
    seconds = _best(addresses[0], threads, lambda n: (data, out, steps * n))
    gflops = 2.0 * steps * tile * lanes * threads / seconds * 1e-9

    block = 8 * lanes
    first, second, third = cache_sizes()
    private, shared = (first * threads, second * threads), (third, min(4 * third, _MOST))
    data = aligned_zeros(max(shared) + 4 * threads * block).view(np.float32)
    data += 0  # touch every page: untouched ones all show the same page of zeros
    levels = []
    for nbytes in (*private, *shared):
        # Half of a cache, so that code and other data find room; all of what is larger than any.
        used = nbytes if nbytes == shared[1] else nbytes // 2
        each = max(1, used // (4 * block * threads))
        arrays = functools.partial(_read_arguments, data, out, each)
        seconds = _best(addresses[1], threads, arrays, nbytes in shared)
        levels.append((nbytes, 4.0 * block * each * threads / seconds * 1e-9))
    name = cpu_name()
    return Machine(name, available_cores(), threads, lanes, gflops, tuple(levels))


def _read_arguments(data: np.ndarray, out: np.ndarray, steps: int, repeats: int) -> tuple:
    return data, out, steps, repeats


def cache_sizes() -> tuple[int, int, int]:
    """Bytes of the L1 data and L2 cache of a core and of the L3 that cores share.

    From Linux's description of the first core; elsewhere common sizes."""
    sizes = list(_CACHES)
    for index in range(8):
        folder = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}")
        try:
            level, kind, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "size")
            )
            if kind != "Instruction" and level in "123":
                scale = {"K": 10, "M": 20}[size[-1]]
                sizes[int(level) - 1] = int(size[:-1]) << scale
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return sizes[0], sizes[1], max(sizes[2], 2 * sizes[1])


def _best(
    address: int, threads: int, arguments: Callable[[int], tuple], shared: bool = False
) -> float:
    """Seconds of one repeat of a kernel, the best of some tries: other programs only slow it down.

    `arguments(repeats)` are the kernel's: arrays and integers. Each thread's best try counts, which
    may be another one: on a busy machine all are rarely free at once. What threads share (L3,
    memory) would look too fast so: there, `shared`, the best try of all together counts."""
    from graphc.runtime.arena import aligned_zeros
    from graphc.runtime.driver import BARRIER, launch_table, load_driver
    from graphc.runtime.team import get_team

    words = aligned_zeros(64).view(np.int64)
    table = launch_table([(address, words.ctypes.data, BARRIER)])
    stamps = np.zeros((threads, 1, 2), np.int64)
    program = get_team(threads).program(table.ctypes.data, 1, stamps.ctypes.data)

    def run(repeats: int) -> np.ndarray:
        given = arguments(repeats)
        words[: len(given)] = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in given]
        program.run()
        if shared:
            return np.full(threads, stamps[..., 1].max() - stamps[..., 0].min())
        return stamps[:, 0, 1] - stamps[:, 0, 0]

    second = load_driver().ticks_per_second()
    repeats = 1
    while min(run(repeats).max(), run(repeats).max()) < second * _SECONDS / 2:
        repeats *= 2
    best = np.min([run(repeats) for _ in range(_TRIES)], axis=0)
    return float(threads / np.sum(1.0 / best) / second / repeats)


def cpu_name() -> str:
    """The processor's name as its maker writes it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def main(arguments: list[str]) -> None:
    """`python -m graphc.bench.machine [THREADS]`: the measurement as one line of JSON."""
    threads = int(arguments[0]) if arguments else 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: max(1, threads)])
    print(json.dumps(asdict(measure_machine(threads))))


if __name__ == "__main__":
    main(sys.argv[1:])

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
from dataclasses import asdict, dataclass

import numpy as np

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

# Bytes that all threads read together: one that stays in L1 and L2 of each core, in L3, in none.
_PRIVATE = (16 << 10, 256 << 10)
_SHARED = (8 << 20, 128 << 20)
_TRIES = 15
_SECONDS = 0.002  # one measurement takes about this long: short ones fall between interruptions


@dataclass(frozen=True)
class Machine:
    """Measured limits of `threads` threads together.

    gflops: multiply-adds counted as two operations, in 1e9 a second. read: (bytes of the working
    set, bytes read in 1e9 a second) from the smallest to the largest working set.
    """

    name: str
    cores: int
    threads: int
    lanes: int
    gflops: float
    read: tuple[tuple[int, float], ...]

    def bandwidth(self, nbytes: float) -> float:
        """GB/s at which a working set of `nbytes` can be read: that of the next larger one measured."""
        for size, speed in self.read:
            if nbytes <= size:
                return speed
        return self.read[-1][1]

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for that work: the roofline (Williams, Waterman & Patterson 2009)."""
        return max(flops / self.gflops, nbytes / self.bandwidth(nbytes)) * 1e-9

    def bound(self, flops: float, nbytes: float) -> str:
        """Which limit work meets first: "arithmetic" or "memory"."""
        slower = nbytes / self.bandwidth(nbytes) > flops / self.gflops
        return "memory" if slower else "arithmetic"

    def __str__(self) -> str:
        levels = ", ".join(f"{_size(n)}: {s:.0f} GB/s" for n, s in self.read)
        return (
            f"{self.name}, {self.threads} of {self.cores} cores, {self.lanes} float32 lanes: "
            f"{self.gflops:.0f} GFLOP/s, reads {levels}"
        )


@functools.lru_cache(maxsize=16)
def measure_machine(threads: int) -> Machine:
    """Measure the limits of `threads` threads: 0.3 s, once a process."""
    from graphc.codegen.simd_host import host_lanes
    from graphc.runtime.arena import aligned_zeros
    from graphc.runtime.linker import KernelSource, load_kernels
    from graphc.runtime.team import available_cores

    lanes = host_lanes()
    tile = 24 if lanes in (4, 16) else 12  # fills 32 or 16 registers and hides the latency
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

    levels = []
    block = 8 * lanes
    data = aligned_zeros(max(_SHARED) + 4 * threads * block).view(np.float32)
    data += 0  # touch every page: untouched ones all show the same page of zeros
    for nbytes in (*(threads * n for n in _PRIVATE), *_SHARED):
        each = max(1, nbytes // (4 * block * threads))
        seconds = _best(
            addresses[1], threads, lambda n, each=each: (data, out, each, n), nbytes in _SHARED
        )
        levels.append((nbytes, 4.0 * block * each * threads / seconds * 1e-9))
    name = cpu_name()
    return Machine(name, available_cores(), threads, lanes, gflops, tuple(levels))


def _best(address: int, threads: int, arguments, shared: bool = False) -> float:
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

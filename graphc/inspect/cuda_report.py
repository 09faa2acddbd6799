"""What NVIDIA's assembler says of a kernel, without a GPU: registers, occupancy, instructions.

`ptxas` assembles the PTX of a kernel for a compute capability and reports its resources, `nvdisasm`
lists the instructions. They bound what a GPU can do and do not measure it: a share of instructions
is not a speed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from graphc import errors
from graphc.codegen.cuda_build import EXTRA, CudaSignature
from graphc.inspect.cuda_sass import Loop, hot_loop, parse_instructions
from graphc.runtime.linker import KernelSource, fetch_kernels

if TYPE_CHECKING:
    from graphc.codegen.cuda_program import CudaStep

CAPABILITIES = ("8.0", "9.0", "12.0")


# ---- tools


def tool(name: str) -> Path:
    """Path of `ptxas` or `nvdisasm`: of the Python packages, else of an installed toolkit.

    Raises MissingExtraError."""
    package = find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "cu13" / "bin" / name
        if path.exists():
            return path
    if (found := shutil.which(name)) is not None:
        return Path(found)
    raise errors.MissingExtraError(
        f"static reports of CUDA kernels need NVIDIA's {name}: {EXTRA} or a CUDA toolkit on PATH"
    )


def _run(*command: str | Path) -> str:
    """What a tool prints. Raises CompileError with its complaint."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise errors.CompileError(f"{Path(command[0]).name}: {done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


# ---- resources


@dataclass(frozen=True)
class Resources:
    """What ptxas gives a kernel: registers a thread; bytes of its stack, and written to and read
    from it because registers ran out; bytes of static shared memory a block; barriers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    barriers: int


def parse_resources(text: str) -> Resources:
    """From the output of `ptxas -v` for a module with one kernel."""

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes smem"),
        number(r"used (\d+) barriers"),
    )


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"): threads, blocks, bytes of shared memory. All have 64 Ki registers, given out to
    warps in units of 256, and keep 1 KiB of shared memory of every block for themselves."""

    threads: int
    blocks: int
    shared: int


_LIMITS = {
    (8, 0): Multiprocessor(2048, 32, 164 * 1024),
    (8, 6): Multiprocessor(1536, 16, 100 * 1024),
    (8, 7): Multiprocessor(1536, 16, 164 * 1024),
    (8, 9): Multiprocessor(1536, 24, 100 * 1024),
    (9, 0): Multiprocessor(2048, 32, 228 * 1024),
    (10, 0): Multiprocessor(2048, 32, 228 * 1024),
    (12, 0): Multiprocessor(1536, 24, 100 * 1024),
}
_REGISTERS, _UNIT, _RESERVED = 64 * 1024, 256, 1024
_WARP = 32


def resident_blocks(
    capability: tuple[int, int], threads: int, registers: int, shared: int
) -> tuple[int, str]:
    """How many blocks a multiprocessor holds at once, and what does not let it hold more.

    Raises CompileError for a capability whose limits are not known."""
    if capability not in _LIMITS:
        known = ", ".join(f"{a}.{b}" for a, b in _LIMITS)
        raise errors.CompileError(
            f"capability {capability[0]}.{capability[1]}: limits are known for {known}"
        )
    limits = _LIMITS[capability]
    warps = -(-threads // _WARP)
    of_warp = -(-max(registers, 1) * _WARP // _UNIT) * _UNIT
    bounds = {
        "threads": limits.threads // (warps * _WARP),
        "blocks": limits.blocks,
        "registers": _REGISTERS // of_warp // warps,
        "shared memory": limits.shared // (shared + _RESERVED),
    }
    limit = min(bounds, key=lambda name: bounds[name])
    return bounds[limit], limit


# ---- a report


@dataclass(frozen=True)
class StaticReport:
    """One kernel, assembled for one compute capability.

    threads    of a block
    shared     bytes of shared memory of a block, static and dynamic
    blocks     that a multiprocessor holds at once, and `limit`: why not more
    occupancy  the share of a multiprocessor's threads that this is
    loop       where most of the arithmetic is
    """

    capability: str
    threads: int
    resources: Resources
    shared: int
    blocks: int
    limit: str
    occupancy: float
    loop: Loop | None

    @property
    def spills(self) -> int:
        """Bytes that pass between registers and a stack in memory."""
        return self.resources.spill_stores + self.resources.spill_loads

    def __str__(self) -> str:
        own = self.resources
        text = (
            f"capability {self.capability}: {own.registers} registers, {self.spills} bytes "
            f"spilled, {own.stack} bytes of stack, {self.shared} bytes of shared memory; "
            f"{self.blocks} blocks of {self.threads} threads a multiprocessor, "
            f"{self.occupancy:.0%} of its threads (limit: {self.limit})"
        )
        if self.loop is not None:
            mix = ", ".join(f"{count} {kind}" for kind, count in self.loop.mix[:6])
            text += f"; hot loop of {self.loop.instructions} instructions: {mix}"
            if self.loop.intensity is not None:
                text += f"; {self.loop.intensity:.1f} operations a byte of global memory"
        return text


def _parsed(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)


def report(ptx: str, capability: str, threads: int, shared: int = 0) -> StaticReport:
    """Assemble PTX with one kernel, for blocks of `threads` with `shared` bytes of dynamic memory.

    Raises MissingExtraError without NVIDIA's tools, CompileError with their complaint."""
    major, minor = _parsed(capability)
    with tempfile.TemporaryDirectory(prefix="graphc-ptx-") as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        printed = _run(tool("ptxas"), "-v", f"-arch=sm_{major}{minor}", source, "-o", binary)
        listing = _run(tool("nvdisasm"), "-c", binary)
    resources = parse_resources(printed)
    total = resources.shared + shared
    blocks, limit = resident_blocks((major, minor), threads, resources.registers, total)
    occupancy = blocks * threads / _LIMITS[major, minor].threads
    loop = hot_loop(*parse_instructions(listing))
    return StaticReport(capability, threads, resources, total, blocks, limit, occupancy, loop)


def report_steps(
    steps: Sequence[CudaStep], capabilities: Sequence[str] = CAPABILITIES
) -> list[dict[str, tuple[StaticReport, ...]]]:
    """Reports on the launches of every step, by capability; equal kernels are compiled and
    assembled once, several at a time. Raises as `report` does."""
    tool("ptxas")  # before anything is compiled in vain
    wanted = [_parsed(capability) for capability in capabilities]
    launches = [row for step in steps for row in step.launches]
    sources = [
        KernelSource("kernel", row[0].source, CudaSignature.of(*row, "ptx", *wanted).text())
        for row in launches
    ]
    jobs = [
        (text, capability, launch.threads, launch.shared)
        for entry, (launch, _) in zip(fetch_kernels(sources).entries, launches, strict=True)
        for text, capability in zip(entry.object_bytes.decode().split("\0"), capabilities)
    ]
    distinct = list(dict.fromkeys(jobs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # which waits for the tools' processes
        done = dict(zip(distinct, pool.map(lambda job: report(*job), distinct), strict=True))
    found = (done[job] for job in jobs)
    table = []
    for step in steps:
        rows = [[next(found) for _ in capabilities] for _ in step.launches]
        table.append(dict(zip(capabilities, zip(*rows, strict=True), strict=True)))
    return table

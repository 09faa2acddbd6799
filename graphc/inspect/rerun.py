"""Runs one kernel of a dump by itself, on one thread and random data: `python kernels/07_conv1.py`.

A dumped kernel is its generated source between two lines, and below them what it is launched with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from graphc.codegen.program import Launch
from graphc.inspect.text import time_text
from graphc.inspect.work import kernel_bytes, kernel_flops
from graphc.ir import Graph, format_node

_BEGIN = "# ---- the kernel ----\n"
_END = "# ---- run it by itself ----\n"
_SECONDS = 0.5

# (name of the value, its element type, its shape in memory), in the order of the arguments
Buffer = tuple[str, str, tuple[int, ...]]


def runnable_source(launch: Launch) -> str:
    """The file of a launch: the graph it computes as a comment, its source, and how to run it."""
    node = launch.node
    comment = [f"# {line}" for line in format_node(node).splitlines()]
    body = node.attrs.get("body")
    if isinstance(body, Graph):
        comment += [f"# {line}" for line in str(body).splitlines()]
    values = [*node.inputs, *node.outputs]
    buffers = [(v.name, v.dtype, v.layout.physical_shape(v.sizes)) for v in values]
    lines = [
        *comment,
        _BEGIN,
        launch.call.source.rstrip(),
        "\n",
        f"{_END}if __name__ == '__main__':",
        "    from graphc.inspect.rerun import rerun\n",
        "    rerun(",
        "        __file__,",
        "        buffers=[",
        *(f"            {buffer!r}," for buffer in buffers),
        "        ],",
        f"        numbers={tuple(launch.call.numbers)!r},",
        f"        blocks={launch.blocks},",
        f"        flops={kernel_flops(launch.kernel, node)},",
        f"        nbytes={kernel_bytes(launch.kernel, node)},",
        "    )\n",
    ]
    return "\n".join(lines)


def rerun(
    path: str,
    buffers: Sequence[Buffer],
    numbers: Sequence[int],
    blocks: int,
    flops: int,
    nbytes: int,
) -> float:
    """Compile the kernel in a dumped file, run it for half a second and print its speed.

    Floating-point operands are uniform in [0, 1), integers 0. Returns the least seconds of a run.
    """
    from graphc.runtime.arena import aligned_zeros
    from graphc.runtime.driver import BARRIER, GROUP_SHIFT, launch_table
    from graphc.runtime.linker import KernelSource, load_kernels
    from graphc.runtime.team import get_team

    text = Path(path).read_text(encoding="utf-8")
    source = text.split(_BEGIN, 1)[1].split(_END, 1)[0].strip() + "\n"
    (address,) = load_kernels([KernelSource("kernel", source)]).addresses
    rng, arrays = np.random.default_rng(0), []
    for _, dtype, shape in buffers:
        count = int(np.prod(shape, dtype=np.int64))
        array = aligned_zeros(max(64, count * np.dtype(dtype).itemsize)).view(dtype)
        if dtype.startswith("float"):
            array[:count] = rng.random(count)
        arrays.append(array)
    words = aligned_zeros(8 * max(1, len(arrays) + len(numbers))).view(np.int64)
    words[: len(arrays) + len(numbers)] = [*(a.ctypes.data for a in arrays), *numbers]
    flags = BARRIER | (1 << GROUP_SHIFT if blocks else 0)
    table = launch_table([(address, words.ctypes.data, flags, blocks, 0)])
    program = get_team(1).program(table.ctypes.data, 1)
    best, ends = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < ends:
        start = time.perf_counter()
        program.run()
        best = min(best, time.perf_counter() - start)
    print(
        f"{Path(path).stem}: {time_text(best)} on one thread, {1e-9 * flops / best:.1f} GFLOP/s, "
        f"{1e-9 * nbytes / best:.1f} GB/s"
    )
    return best

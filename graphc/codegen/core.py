"""The core that kernels are chosen for: its caches, its registers, and what it does in a cycle.

No machine in particular, but a usual one (x86-64 of 2020: Zen 3, Ice Lake): choices depend on
ratios, and the same network gives the same kernels everywhere. `graphc.bench.machine` measures what
the machine at hand can do. Passes know nothing of code generation: the compiler tells them.
"""

from __future__ import annotations

from typing import Final

LINE_BYTES: Final = 64
# What a kernel may keep in a core's own two caches, less than all: others need some of them too.
L1_BYTES: Final = 28_000
L2_BYTES: Final = 400_000
# What stays in the cache that the cores share while a whole batch goes through.
L3_BYTES: Final = 4_000_000
# What a core gets from its second cache and from the shared one.
L2_BYTES_PER_CYCLE: Final = 24.0
L3_BYTES_PER_CYCLE: Final = 9.0
MULTIPLY_ADDS_PER_CYCLE: Final = 2  # of whole vectors; as many loads
LATENCY: Final = 4  # cycles of a multiply-add
CLOCK: Final = 3e9


def registers(lanes: int) -> int:
    """Vector registers: AVX-512 and NEON have 32, AVX2 has 16."""
    return 32 if lanes in (4, 16) else 16

"""The SIMD width of this machine, without importing Numba."""

from __future__ import annotations

import os
from functools import cache

LANES = (4, 8, 16)


@cache
def _host_features() -> dict[str, bool]:
    import llvmlite.binding

    return dict(llvmlite.binding.get_host_cpu_features())


def host_lanes() -> int:
    """float32 lanes of this machine's vectors: 16 (AVX-512), 8 (AVX2 with FMA) or 4 (NEON, SSE).

    The environment variable GRAPHC_SIMD_LANES overrides it.
    """
    override = os.environ.get("GRAPHC_SIMD_LANES")
    if override:
        if override not in map(str, LANES):
            raise ValueError(f"GRAPHC_SIMD_LANES={override!r}, expected 4, 8 or 16")
        return int(override)
    features = _host_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") and features.get("fma") else 4

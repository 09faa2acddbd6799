"""The vocabulary of generated CPU kernels: SIMD vectors over raw pointers, for Numba.

A kernel source begins with

    from graphc.codegen import simd
    v = simd.vocabulary(8)
    load_4 = v.load_tile((4,), "vector", fixed=(8,))    # factories run at module level

and calls `v.fma(x, y, z)` or `load_4(p, i, (0,))` inside the function.  Functions take scalars,
vectors and tiles (uniform tuples of either) in any mixture: scalars take the vectors' dtype and are
spread over the lanes, single values are repeated over tiles.  Scalars among themselves meet in the
first of float32, float64, int32, int64 that occurs, because Numba cannot tell the literal 0.5 from
a float64.  Vectors of different dtypes are an error.

No fast-math anywhere: results follow IEEE 754, and products and sums are contracted only where
`fma` says so.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from graphc.codegen import simd_elementwise, simd_lanes, simd_memory, simd_tiles
from graphc.codegen.simd_host import LANES, host_lanes

__all__ = ["Vocabulary", "host_lanes", "vocabulary"]


def _static(argument):
    """Lists to tuples, so that factory arguments can be memoised."""
    return tuple(map(_static, argument)) if isinstance(argument, (list, tuple)) else argument


def _memoised(factory):
    factory = cache(factory)
    return lambda *arguments, **options: factory(
        *map(_static, arguments), **{name: _static(option) for name, option in options.items()}
    )


class Vocabulary(ModuleType):
    """All functions for one number of lanes; to Numba a module: kernels may write `v.fma(...)`.

    Attributes are intrinsics, to be called inside kernels, or factories, to be called at module
    level.
    """

    def __init__(self, lanes: int):
        super().__init__(f"simd{lanes}", self.__doc__)
        self.lanes = lanes
        for name, function in simd_elementwise.FUNCTIONS.items():
            setattr(self, name, function)

        self.splat = simd_tiles.splat(lanes)
        self.lane_index = simd_lanes.lane_index(lanes)
        self.tail_mask = simd_lanes.tail_mask_of(lanes)
        self.transpose_block = simd_lanes.transpose_block(lanes)
        self.prefetch = simd_memory.prefetch()
        for kind in ("splat", "strided", "scalar", "strided_tail"):
            setattr(self, f"load_{kind}", simd_memory.load(f"load_{kind}", kind, lanes))
        for kind in ("strided", "scalar", "strided_tail"):
            setattr(self, f"store_{kind}", simd_memory.store(f"store_{kind}", kind, lanes))
        self.load = simd_memory.load("load", "vector", lanes)
        self.load_tail = simd_memory.load("load_tail", "vector_tail", lanes)
        self.store = simd_memory.store("store", "vector", lanes)
        self.store_tail = simd_memory.store("store_tail", "vector_tail", lanes)

        # factories
        self.cast = simd_elementwise.cast
        self.pointer = _memoised(simd_memory.pointer)
        self.arguments = _memoised(simd_memory.arguments)
        self.load_tile = _memoised(
            lambda counts, kind, fixed=None: simd_memory.load_tile(lanes, counts, kind, fixed)
        )
        self.store_tile = _memoised(
            lambda counts, kind, fixed=None: simd_memory.store_tile(lanes, counts, kind, fixed)
        )
        self.pick = _memoised(simd_tiles.pick)
        self.full = _memoised(simd_tiles.full)
        self.join = _memoised(simd_tiles.join)
        self.tile_fma = _memoised(simd_tiles.tile_fma)
        self.tile_linear = _memoised(simd_tiles.tile_linear)
        self.tile_combine = _memoised(simd_tiles.tile_combine)
        self.tile_argmax = _memoised(simd_tiles.tile_argmax)
        self.reduce_lanes = _memoised(simd_lanes.reduce_lanes)


@cache
def vocabulary(lanes: int) -> Vocabulary:
    """The vocabulary of vectors of 4, 8 or 16 lanes; any of them works on any machine."""
    if lanes not in LANES:
        raise ValueError(f"vocabulary: {lanes} lanes, expected 4, 8 or 16")
    return Vocabulary(lanes)

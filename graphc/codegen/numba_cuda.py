"""Everything graphc takes from numba-cuda: no other module imports `numba.cuda`.

numba-cuda gets only critical fixes; its successor keeps the language and changes how it is
extended. This file is what would change. Nothing here asks for a driver or a device: kernels are
plain functions, compiled for a compute capability that the caller names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from numba import cuda
from numba.core import types
from numba.cuda import compiler
from numba.cuda.extending import intrinsic

from graphc.codegen.simd_operands import pointer_type

__all__ = ["Lowered", "compile_ptx", "cuda", "intrinsic", "lower", "signature", "types"]

Capability = tuple[int, int]


class Lowered(NamedTuple):
    """A kernel as Numba lowers it: the symbol of its entry, and NVVM IR, a module a string."""

    symbol: str
    modules: tuple[str, ...]


def signature(buffers: Sequence[str], numbers: int):
    """The type of a kernel: a pointer for each buffer's dtype, then int32 numbers."""
    return types.void(*map(pointer_type, buffers), *[types.int32] * numbers)


def _library(kernel: Callable, typed, capability: Capability, **options):
    """A kernel as Numba lowers it: NVVM IR, and what libnvvm makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_function = compiler._compile_pyfunc_with_fixup  # type: ignore[attr-defined]
        library, _ = compile_function(
            kernel, typed, device=False, abi="numba", cc=capability, fastmath=False, **options
        )
    return library


def compile_ptx(
    kernel: Callable, typed, capabilities: Sequence[Capability], threads: int, resident: int = 1
) -> tuple[str, list[str]]:
    """(symbol, PTX text for each capability) of a kernel for blocks of at most `threads` threads.

    `resident` blocks should fit on a multiprocessor at once. Products and sums are contracted only
    where the kernel says fma: libnvvm would round differently from one GPU to the next."""
    library = _library(kernel, typed, capabilities[0], launch_bounds=(threads, resident))
    texts = []
    for capability in capabilities:  # lowering, which takes longest, is the same for all
        (text,) = library.get_asm_strs(cc=capability)
        texts.append(text)
    found = re.search(r"\.entry\s+([^\s(]+)\(", texts[0])
    assert found, "the PTX has no entry"
    return found[1], texts


def lower(kernel: Callable, typed, capability: Capability) -> Lowered:
    """A kernel's NVVM IR, as it is handed to libnvvm."""
    modules = tuple(_library(kernel, typed, capability).llvm_strs)
    for text in modules:
        if found := re.search(r'@"([^"]+)"\s*,\s*!"kernel"', text):
            return Lowered(found[1], modules)
    raise AssertionError("no module names a kernel")

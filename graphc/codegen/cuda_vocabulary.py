"""The vocabulary of generated CUDA kernels: what one thread does, for numba-cuda.

A kernel source begins with

    from graphc.codegen import cuda_vocabulary as v
    to_float32 = v.cast("float32")     # factories run at module level

Arithmetic is the CPU's (`graphc.codegen.simd_elementwise`), one definition of every function for
both targets: values are scalars, or tuples of scalars that a thread holds in registers. No
fast-math: results follow IEEE 754, and products and sums are contracted only where `fma` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from graphc.codegen import simd_elementwise, simd_values
from graphc.codegen.numba_cuda import cuda, intrinsic, types
from graphc.codegen.simd_operands import (
    describe,
    element_values,
    make_tile,
    named_intrinsic,
    numba_type,
    pointee,
    tile_type,
)
from graphc.codegen.simd_tiles import FOLDS
from graphc.codegen.simd_values import BYTES, ELEMENT, I8, I32, I64, Emitter, Value

WARP = 32
VECTOR = 4  # elements of one 128-bit access of 4-byte elements
_SHARED = 3  # LLVM's address space of a block's shared memory
_ALL_LANES = ir.Constant(I32, 0xFFFFFFFF)

globals().update(simd_elementwise.functions(intrinsic))
barrier = cuda.syncthreads


@cache
def cast(dtype: str):
    """The intrinsic that converts to `dtype`, as on the CPU."""
    return simd_elementwise.cast(dtype, intrinsic)  # type: ignore[arg-type]  # it is hashable


# ---- where a thread is


def _register(builder: ir.IRBuilder, name: str) -> ir.Value:
    kind = ir.FunctionType(I32, [])
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.nvvm.read.ptx.sreg.{name}"
    )
    return builder.call(function, [])


def _position(name: str, emit) -> Any:
    """An int32 function of a thread's position in a one-dimensional grid."""

    def typing():
        return types.int32(), lambda context, builder, signature, values: emit(builder)

    return named_intrinsic(name, "", typing, intrinsic)


def _thread(builder):
    block = builder.mul(_register(builder, "ctaid.x"), _register(builder, "ntid.x"))
    return builder.add(block, _register(builder, "tid.x"))


def _threads(builder):
    return builder.mul(_register(builder, "nctaid.x"), _register(builder, "ntid.x"))


def _shifted(emit):
    return lambda builder: builder.lshr(emit(builder), ir.Constant(I32, 5))


def _lane(builder):
    return builder.and_(_register(builder, "tid.x"), ir.Constant(I32, WARP - 1))


thread = _position("thread", _thread)  # number of this thread in the grid
threads = _position("threads", _threads)  # of the grid
warp = _position("warp", _shifted(_thread))
warps = _position("warps", _shifted(_threads))
lane = _position("lane", _lane)  # of this thread in its warp
block = _position("block", lambda builder: _register(builder, "ctaid.x"))
blocks = _position("blocks", lambda builder: _register(builder, "nctaid.x"))
member = _position("member", lambda builder: _register(builder, "tid.x"))
members = _position("members", lambda builder: _register(builder, "ntid.x"))


@intrinsic
def quotient(typing_context, a, b):
    """a // b of int32 that are not negative, in one unsigned division."""

    def emit(context, builder, signature, values):
        return builder.udiv(*values)

    return types.int32(types.int32, types.int32), emit


# ---- memory: element `i` of the pointer `p`


def _address(builder, pointer, index, dtype: str, count: int = 1):
    """The address of `count` elements; an index that is not negative, below 2^31."""
    address = builder.gep(pointer, [builder.zext(index, I64)])
    element = I8 if dtype == "bool" else ELEMENT[dtype]
    whole = element if count == 1 else ir.VectorType(element, count)
    return builder.bitcast(address, whole.as_pointer())


def _aligned(dtype: str, count: int) -> int:
    return min(16, count * BYTES[dtype])


def _load(name: str, count: int):
    def typing(p, i):
        dtype = pointee(p, name)

        def emit(context, builder, signature, values):
            address = _address(builder, values[0], values[1], dtype, count)
            memory = builder.load(address, align=_aligned(dtype, count))
            parts = [memory]
            if count > 1:
                parts = [builder.extract_element(memory, ir.Constant(I32, k)) for k in range(count)]
            if dtype == "bool":
                parts = [builder.icmp_unsigned("!=", part, ir.Constant(I8, 0)) for part in parts]
            return parts[0] if count == 1 else make_tile(context, builder, dtype, None, parts)

        result = numba_type(dtype, None) if count == 1 else tile_type(dtype, None, count)
        return result(p, types.int32), emit

    return named_intrinsic(name, "p i", typing, intrinsic)


def _store(name: str, count: int):
    def typing(p, i, x):
        dtype, operand = pointee(p, name), describe(x, name)

        def emit(context, builder, signature, values):
            elements = element_values(builder, values[2], operand)
            parts = [element.convert(dtype).ll for element in elements]
            if dtype == "bool":
                parts = [builder.zext(part, I8) for part in parts]
            memory = parts[0]
            if count > 1:
                memory = ir.Constant(ir.VectorType(memory.type, count), ir.Undefined)
                for k in range(count):
                    part = parts[k if len(parts) > 1 else 0]
                    memory = builder.insert_element(memory, part, ir.Constant(I32, k))
            address = _address(builder, values[0], values[1], dtype, count)
            builder.store(memory, address, align=_aligned(dtype, count))
            return context.get_dummy_value()

        return types.void(p, types.int32, x), emit

    return named_intrinsic(name, "p i x", typing, intrinsic)


load = _load("load", 1)
store = _store("store", 1)
load_vector = _load("load_vector", VECTOR)  # in one access: i is a multiple of VECTOR
store_vector = _store("store_vector", VECTOR)


# ---- between threads


def shuffle_xor(x: Value, distance: int) -> Value:
    """The value of the lane whose number differs in the bit `distance`. All lanes take part."""
    builder = x.emitter.builder
    double = x.emitter.dtype in ("float64", "int64")
    whole = builder.bitcast(x.ll, I64 if double else I32)
    halves = [whole]
    if double:
        halves = [
            builder.trunc(whole, I32),
            builder.trunc(builder.lshr(whole, ir.Constant(I64, 32)), I32),
        ]
    kind = ir.FunctionType(ir.LiteralStructType([I32, ir.IntType(1)]), [I32] * 5)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.shfl.sync.i32")
    mode, clamp = ir.Constant(I32, 3), ir.Constant(I32, WARP - 1)
    halves = [
        builder.extract_value(
            builder.call(function, [_ALL_LANES, mode, half, ir.Constant(I32, distance), clamp]), 0
        )
        for half in halves
    ]
    if double:
        high = builder.shl(builder.zext(halves[1], I64), ir.Constant(I64, 32))
        halves = [builder.or_(high, builder.zext(halves[0], I64))]
    return Value(x.emitter, builder.bitcast(halves[0], x.emitter.type))


# What a thread has folded: one value, or for "argmax" a value and its position, -1 before any.
Partial = tuple[Value, ...]


def _combined(x: Partial, y: Partial, combine: str) -> Partial:
    """Two partial results as one. For "argmax", NaN exceeds every number, and of equal values the
    first wins, so that the order in which threads meet does not matter."""
    if combine != "argmax":
        return (FOLDS[combine](x[0], y[0]),)
    (best, place), (other, position) = x, y
    better, equal = other > best, other.equals(best)
    if other.emitter.is_float:
        better = better | (other.is_nan() & ~best.is_nan())
        equal = equal | (other.is_nan() & best.is_nan())
    better = (place < 0) | better | (equal & (position < place))
    better = better & ~(position < 0)
    choose = simd_values.select
    return choose(better, other, best), choose(better, position, place)


def _fold_warp(x: Partial, combine: str) -> Partial:
    """The fold over a warp, in every lane; lane l meets l xor 16, then 8, 4, 2, 1."""
    distance = WARP // 2
    while distance:
        x = _combined(x, tuple(shuffle_xor(part, distance) for part in x), combine)
        distance //= 2
    return x


def _fold_block(x: Partial, combine: str) -> Partial:
    """The fold over a block, in every thread. Warps fold themselves, leave their results in shared
    memory, and each folds those again, so that no result crosses a second barrier."""
    builder = x[0].emitter.builder
    x = _fold_warp(x, combine)
    number, own = _shifted(lambda b: _register(b, "tid.x"))(builder), _lane(builder)
    arrays = [_shared_array(builder, k, part.emitter.dtype) for k, part in enumerate(x)]
    with builder.if_then(builder.icmp_unsigned("==", own, ir.Constant(I32, 0))):
        for array, part in zip(arrays, x, strict=True):
            builder.store(part.ll, _element(builder, array, number))
    _barrier(builder)
    # Lanes past the last warp hold what changes nothing.
    last = _shifted(lambda b: _register(b, "ntid.x"))(builder)
    inside = builder.icmp_unsigned("<", own, last)
    at = builder.select(inside, own, ir.Constant(I32, 0))
    found = []
    for array, part in zip(arrays, x, strict=True):
        identity = part.emitter.constant(_IDENTITY[combine](part.emitter.dtype)).ll
        element = builder.load(_element(builder, array, at))
        found.append(Value(part.emitter, builder.select(inside, element, identity)))
    result = _fold_warp(tuple(found), combine)
    _barrier(builder)
    return result


def _fold_word(name: str, combine: str, fold: Callable[[Partial, str], Partial]) -> Any:
    def typing(x, *position):
        dtypes = [describe(x, name).dtype, *("int32" for _ in position)]

        def emit(context, builder, signature, values):
            parts = zip(dtypes, values, strict=True)
            partial = tuple(Value(Emitter(builder, dtype, None), ll) for dtype, ll in parts)
            return fold(partial, combine)[-1].ll

        return numba_type(dtypes[-1], None)(x, *position), emit

    parameters = "x position" if combine == "argmax" else "x"
    return named_intrinsic(name, parameters, typing, intrinsic)


@cache
def warp_fold(combine: str):
    """f(x): "sum", "prod", "max" or "min" over the warp, the same in every lane; "argmax" is
    f(x, position), the int32 position of the first maximum.

    Every lane of the warp must call it."""
    return _fold_word(f"warp_{combine}", combine, _fold_warp)


@cache
def block_fold(combine: str):
    """As `warp_fold` over the block. Every thread of a block of whole warps must call it."""
    return _fold_word(f"block_{combine}", combine, _fold_block)


def _limit(dtype: str, sign: int) -> float | int:
    if dtype.startswith("float"):
        return sign * float("inf")
    top = 2 ** (8 * BYTES[dtype] - 1)
    return top - 1 if sign > 0 else -top


_IDENTITY = {
    "sum": lambda dtype: 0,
    "prod": lambda dtype: 1,
    "max": lambda dtype: _limit(dtype, -1),
    "min": lambda dtype: _limit(dtype, 1),
    "argmax": lambda dtype: -1,  # a position that is none; its value does not matter
}


def _shared_array(builder, number: int, dtype: str):
    """One element a warp of shared memory, for one part of a partial result; folds of the same
    dtypes take turns, barriers between."""
    name, kind = f"graphc_fold{number}_{dtype}", ir.ArrayType(ELEMENT[dtype], WARP)
    found = builder.module.globals.get(name)
    if found is None:
        found = ir.GlobalVariable(builder.module, kind, name, addrspace=_SHARED)
        found.linkage = "internal"
        found.initializer = ir.Constant(kind, ir.Undefined)
        found.align = BYTES[dtype]
    return found


def _element(builder, array, index):
    return builder.gep(array, [ir.Constant(I32, 0), index], inbounds=True)


def _barrier(builder):
    kind = ir.FunctionType(ir.VoidType(), [])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.barrier0")
    builder.call(function, [])

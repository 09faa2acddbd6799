"""Loads and stores of the SIMD vocabulary on raw pointers, of single vectors and of tiles.

Each types its arguments and leaves the emission to `simd_access.Access`.  Addresses are aligned to
the element only.  Indices and strides count elements.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError

from graphc.codegen.simd_access import Access, i64
from graphc.codegen.simd_operands import (
    Vector,
    adapt,
    common_dtype,
    describe,
    element_values,
    make_tile,
    named_intrinsic,
    numba_type,
    pointee,
    pointer_type,
    tile_type,
    tuple_elements,
)
from graphc.codegen.simd_values import I8, I32

# kind -> the run-time arguments it adds
LOAD_KINDS = {
    "vector": "",
    "splat": "",
    "scalar": "",
    "strided": "lane_stride",
    "vector_tail": "n",
    "strided_tail": "lane_stride n",
}
STORE_KINDS = {kind: extra for kind, extra in LOAD_KINDS.items() if kind != "splat"}


def _check_index(function: str, **arguments):
    for name, argument in arguments.items():
        if not isinstance(argument, types.Integer):
            raise TypingError(f"simd.{function}: {name} must be an integer, not {argument}")


def load(name: str, kind: str, lanes: int):
    """The intrinsic that loads one vector or scalar: f(p, i[, lane_stride][, n])."""
    extra = LOAD_KINDS[kind].split()
    result_lanes = None if kind == "scalar" else lanes

    def typing(p, i, *rest):
        dtype = pointee(p, name)
        _check_index(name, i=i, **dict(zip(extra, rest)))

        def codegen(context, builder, signature, values):
            access = Access(builder, dtype, lanes)
            pointer = access.offset(values[0], values[1])
            return getattr(access, f"load_{kind}")([pointer], *values[2:])[0]

        return numba_type(dtype, result_lanes)(p, *[types.int64] * (1 + len(rest))), codegen

    return named_intrinsic(name, f"p i {LOAD_KINDS[kind]}", typing)


def _stored(name: str, dtype: str, kind: str, x):
    """The shape of a value to be stored, checked against the memory's dtype."""
    operand = describe(x, name)
    memory = describe(Vector(dtype, operand.lanes or 1), name)
    common_dtype([operand, memory], name)
    if kind == "scalar" and operand.lanes is not None:
        raise TypingError(f"simd.{name}: expected a scalar, not {x}")
    return operand


def store(name: str, kind: str, lanes: int):
    """The intrinsic that stores one vector or scalar: f(p, i, [lane_stride,] x[, n])."""
    strided, tail = kind.startswith("strided"), kind.endswith("tail")
    parameters = f"p i {'lane_stride ' if strided else ''}x{' n' if tail else ''}"
    x_position = 3 if strided else 2
    value_lanes = None if kind == "scalar" else lanes

    def typing(*arguments):
        p, x = arguments[0], arguments[x_position]
        dtype = pointee(p, name)
        operand = _stored(name, dtype, kind, x)
        if operand.count is not None:
            raise TypingError(f"simd.{name}: tiles are stored by store_tile")
        _check_lanes(name, operand, lanes)

        def codegen(context, builder, signature, values):
            values = list(values)
            access = Access(builder, dtype, lanes)
            (x,) = element_values(builder, values.pop(x_position), operand)
            pointer = access.offset(values[0], values[1])
            vector = adapt(x, dtype, value_lanes).ll
            getattr(access, f"store_{kind}")([pointer], [vector], *values[2:])
            return context.get_dummy_value()

        expected = [types.int64] * len(arguments)
        expected[0], expected[x_position] = p, x
        return types.void(*expected), codegen

    return named_intrinsic(name, parameters, typing)


def _check_lanes(name, operand, lanes):
    if operand.lanes not in (None, lanes):
        raise TypingError(f"simd.{name}: a vector of {operand.lanes} lanes, expected {lanes}")


def _check_strides(name: str, strides: Any, counts: tuple[int, ...]) -> list[types.Type]:
    if not isinstance(strides, types.BaseTuple) or len(strides) != len(counts):
        raise TypingError(
            f"simd.{name}: counts {counts} need {len(counts)} integer strides, not {strides}"
        )
    stride_types = tuple_elements(strides)
    for stride in stride_types:
        _check_index(name, stride=stride)
    return stride_types


def _stride_values(context, builder, ll, stride_types, fixed):
    if not stride_types:
        return []
    values = cgutils.unpack_tuple(builder, ll, len(stride_types))
    strides = []
    for value, stride_type, constant in zip(values, stride_types, fixed):
        if constant is not None:
            strides.append(constant)
        else:
            strides.append(context.cast(builder, value, stride_type, types.int64))
    return strides


def _check_factory(name, counts, kind, kinds, fixed):
    if kind not in kinds:
        raise ValueError(f"{name}: unknown kind {kind!r}, expected one of {', '.join(kinds)}")
    if any(count < 1 for count in counts):
        raise ValueError(f"{name}: counts must be positive, not {counts}")
    if fixed is not None and len(fixed) != len(counts):
        raise ValueError(f"{name}: fixed strides {fixed} do not match counts {counts}")
    return (None,) * len(counts) if fixed is None else fixed


def load_tile(lanes: int, counts, kind: str, fixed=None):
    """f(p, i, strides[, lane_stride][, n]) -> tile of prod(counts) elements, row-major."""
    name = "load_tile"
    fixed = _check_factory(name, counts, kind, LOAD_KINDS, fixed)
    extra = LOAD_KINDS[kind].split()
    result_lanes = None if kind == "scalar" else lanes

    def typing(p, i, strides, *rest):
        dtype = pointee(p, name)
        _check_index(name, i=i, **dict(zip(extra, rest)))
        stride_types = _check_strides(name, strides, counts)

        def codegen(context, builder, signature, values):
            access = Access(builder, dtype, lanes)
            base = access.offset(values[0], values[1])
            steps = _stride_values(context, builder, values[2], stride_types, fixed)
            pointers = access.addresses(base, counts, steps)
            results = getattr(access, f"load_{kind}")(pointers, *values[3:])
            return make_tile(context, builder, dtype, result_lanes, results)

        result = tile_type(dtype, result_lanes, math.prod(counts))
        return result(p, types.int64, strides, *[types.int64] * len(rest)), codegen

    return named_intrinsic(name, f"p i strides {LOAD_KINDS[kind]}", typing)


def store_tile(lanes: int, counts, kind: str, fixed=None):
    """f(p, i, strides, x[, lane_stride][, n]): inverse of load_tile; scalars in x are spread."""
    name = "store_tile"
    fixed = _check_factory(name, counts, kind, STORE_KINDS, fixed)
    extra = STORE_KINDS[kind].split()
    value_lanes = None if kind == "scalar" else lanes

    def typing(p, i, strides, x, *rest):
        dtype = pointee(p, name)
        _check_index(name, i=i, **dict(zip(extra, rest)))
        stride_types = _check_strides(name, strides, counts)
        operand = _stored(name, dtype, kind, x)
        if operand.count != math.prod(counts):
            raise TypingError(
                f"simd.{name}: expected a tile of {math.prod(counts)} elements, not {x}"
            )
        _check_lanes(name, operand, lanes)

        def codegen(context, builder, signature, values):
            access = Access(builder, dtype, lanes)
            base = access.offset(values[0], values[1])
            steps = _stride_values(context, builder, values[2], stride_types, fixed)
            pointers = access.addresses(base, counts, steps)
            tile = [
                adapt(x, dtype, value_lanes).ll for x in element_values(builder, values[3], operand)
            ]
            getattr(access, f"store_{kind}")(pointers, tile, *values[4:])
            return context.get_dummy_value()

        return types.void(p, types.int64, strides, x, *[types.int64] * len(rest)), codegen

    return named_intrinsic(name, f"p i strides x {STORE_KINDS[kind]}", typing)


def pointer(dtype: str):
    """f(address: int64) -> pointer to elements of the dtype."""
    result = pointer_type(dtype)

    def typing(address):
        _check_index("pointer", address=address)

        def codegen(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(result))

        return result(types.int64), codegen

    return named_intrinsic(f"pointer_{dtype}", "address", typing)


def arguments(count: int):
    """f(args: pointer to int64) -> the first `count` of them as a tuple."""

    def typing(args):
        if pointee(args, "arguments") != "int64":
            raise TypingError(f"simd.arguments: expected a pointer to int64, not {args}")
        result = types.UniTuple(types.int64, count)

        def codegen(context, builder, signature, values):
            loaded = [builder.load(builder.gep(values[0], [i64(k)])) for k in range(count)]
            return context.make_tuple(builder, result, loaded)

        return result(args), codegen

    return named_intrinsic("arguments", "args", typing)


def prefetch():
    """f(p, i): bring the line of an element into the second cache, for reading."""

    def typing(p, i):
        pointee(p, "prefetch")
        _check_index("prefetch", i=i)

        def codegen(context, builder, signature, values):
            address = builder.bitcast(builder.gep(values[0], [values[1]]), I8.as_pointer())
            operands = [address, *(ir.Constant(I32, flag) for flag in (0, 2, 1))]
            kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, operands)
            return context.get_dummy_value()

        return types.void(p, types.int64), codegen

    return named_intrinsic("prefetch", "p i", typing)

"""Functions across lanes: reductions, transposition, lane numbers and tail masks."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError

from graphc.codegen.simd_access import Access, lane_numbers, tail_mask
from graphc.codegen.simd_operands import (
    Vector,
    describe,
    element_values,
    make_tile,
    named_intrinsic,
    numba_type,
    pointee,
    tile_type,
)
from graphc.codegen.simd_tiles import FOLDS
from graphc.codegen.simd_values import I32, Emitter, Value, shuffle


def _reduce_vectors(values: list[Value], combine) -> list[Value]:
    """The fold over the lanes of each of up to `lanes` vectors, by one tree of shuffles for all.

    Each level joins two vectors into one that holds half as many partial results of each (hsum in
    the BLAS literature); lane l of a vector always meets lane l + h, whatever its companions, so a
    result does not depend on the tile it is in.
    """
    emitter = values[0].emitter
    lanes = emitter.lanes
    assert lanes is not None
    # sources[v][lane]: the input vector whose partial result is in this lane
    sources = [[k] * lanes for k in range(len(values))]
    half = lanes // 2
    while half:
        low = [lane if not lane & half else lanes + (lane ^ half) for lane in range(lanes)]
        high = [lane ^ half if not lane & half else lanes + lane for lane in range(lanes)]
        joined, joined_sources = [], []
        for k in range(0, len(values), 2):
            x, y = values[k], values[min(k + 1, len(values) - 1)]
            both = sources[k] + sources[min(k + 1, len(values) - 1)]
            lower, upper = (Value(emitter, shuffle(x, y, order)) for order in (low, high))
            joined.append(combine(lower, upper))
            joined_sources.append([both[lane] for lane in low])
        values, sources, half = joined, joined_sources, half // 2
    builder = emitter.builder
    scalar = Emitter(builder, emitter.dtype, None)
    (vector,), (owners,) = values, sources
    return [
        Value(scalar, builder.extract_element(vector.ll, ir.Constant(I32, owners.index(k))))
        for k in range(max(owners) + 1)
    ]


def _reduce_mask(mask: Value, name: str) -> Value:
    """any or all of a mask: its lanes as the bits of one integer (vmovmskps)."""
    builder, lanes = mask.emitter.builder, mask.emitter.lanes
    assert lanes is not None
    integer = ir.IntType(lanes)
    bits = builder.bitcast(mask.ll, integer)
    expected = ir.Constant(integer, 0 if name == "any" else 2**lanes - 1)
    test = builder.icmp_unsigned("!=" if name == "any" else "==", bits, expected)
    return Value(Emitter(builder, "bool", None), test)


def reduce_lanes(name: str):
    """f(x): "sum", "prod", "max" or "min" over the lanes of numbers, "any" or "all" of masks.

    A vector gives a scalar, a tile a tile of scalars.
    """
    if name not in FOLDS and name not in ("any", "all"):
        raise ValueError(f"reduce_lanes: unknown fold {name!r}")
    function = "reduce_lanes"

    def typing(x):
        operand = describe(x, function)
        if operand.lanes is None:
            raise TypingError(f"simd.{function}: expected a vector or a tile of vectors, not {x}")
        if (operand.dtype == "bool") != (name in ("any", "all")):
            raise TypingError(f"simd.{function}: {name} is not defined for {operand.dtype}")

        def codegen(context, builder, signature, values):
            parts = element_values(builder, values[0], operand)
            if operand.dtype == "bool":
                results = [_reduce_mask(part, name) for part in parts]
            else:
                results = []
                step = operand.lanes or 1
                for start in range(0, len(parts), step):
                    results += _reduce_vectors(parts[start : start + step], FOLDS[name])
            if operand.count is None:
                return results[0].ll
            return make_tile(
                context, builder, operand.dtype, None, [result.ll for result in results]
            )

        if operand.count is None:
            result = numba_type(operand.dtype, None)
        else:
            result = tile_type(operand.dtype, None, operand.count)
        return result(x), codegen

    return named_intrinsic(f"reduce_lanes_{name}", "x", typing)


def transpose_block(lanes: int):
    """f(p_src, i, stride_src, p_dst, j, stride_dst): dst[c][r] = src[r][c], lanes x lanes.

    log2(lanes) levels of two-vector shuffles (Eklundh's transposition).  Source and destination may
    be the same block: all is loaded before anything is stored.
    """
    function = "transpose_block"

    def typing(p_src, i, stride_src, p_dst, j, stride_dst):
        dtype = pointee(p_src, function)
        if pointee(p_dst, function) != dtype or dtype == "bool":
            raise TypingError(f"simd.{function}: cannot transpose {p_src} into {p_dst}")

        def codegen(context, builder, signature, values):
            source, i, source_stride, target, j, target_stride = values
            access = Access(builder, dtype, lanes)
            emitter = Emitter(builder, dtype, lanes)

            def rows(pointer, start, stride):
                return access.addresses(access.offset(pointer, start), (lanes,), [stride])

            values = access.load_vector(rows(source, i, source_stride))
            half = lanes // 2
            while half:
                low = [lane if not lane & half else lanes + (lane ^ half) for lane in range(lanes)]
                high = [lane ^ half if not lane & half else lanes + lane for lane in range(lanes)]
                for row in range(lanes):
                    if not row & half:
                        x, y = Value(emitter, values[row]), Value(emitter, values[row | half])
                        values[row], values[row | half] = shuffle(x, y, low), shuffle(x, y, high)
                half //= 2
            access.store_vector(rows(target, j, target_stride), values)
            return context.get_dummy_value()

        index = types.int64
        return types.void(p_src, index, index, p_dst, index, index), codegen

    return named_intrinsic(function, "p_src i stride_src p_dst j stride_dst", typing)


def lane_index(lanes: int):
    """f() -> the int32 vector 0, 1, ..., lanes-1."""

    def typing():
        return Vector("int32", lanes)(), lambda context, builder, signature, values: lane_numbers(
            lanes
        )

    return named_intrinsic("lane_index", "", typing)


def tail_mask_of(lanes: int):
    """f(n) -> mask of the lanes below n."""

    def typing(n):
        if not isinstance(n, types.Integer):
            raise TypingError(f"simd.tail_mask: n must be an integer, not {n}")

        def codegen(context, builder, signature, values):
            return tail_mask(builder, values[0], lanes)

        return Vector("bool", lanes)(types.int64), codegen

    return named_intrinsic("tail_mask", "n", typing)

"""Functions on tiles: permutation, joining, outer products, folds over groups of elements."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types
from numba.core.errors import TypingError

from graphc.codegen import simd_elementwise
from graphc.codegen.simd_operands import (
    adapt,
    common_dtype,
    common_shape,
    describe,
    element_values,
    make_tile,
    named_intrinsic,
    numba_type,
    tile_type,
)
from graphc.codegen.simd_values import NUMBERS, Value, fma, select

FOLDS: dict[str, Callable[[Value, Value], Value]] = {
    "sum": lambda x, y: x + y,
    "prod": lambda x, y: x * y,
    "max": simd_elementwise.maximum,
    "min": simd_elementwise.minimum,
}


def _tile(argument, function: str, count: int | None = None):
    """Describe an argument that must be a tile, of `count` elements where given."""
    operand = describe(argument, function)
    if operand.count is None or count not in (None, operand.count):
        expected = "a tile" if count is None else f"a tile of {count}"
        raise TypingError(f"simd.{function}: expected {expected}, not {argument}")
    return operand


def _check_indices(indices, operand, function: str):
    for index in indices:
        if not 0 <= index < operand.count:
            raise TypingError(f"simd.{function}: index {index} in a tile of {operand.count}")


def pick(indices: tuple[int, ...]):
    """f(tile) -> the elements at `indices`, in that order; repeats broadcast."""

    def typing(tile):
        operand = _tile(tile, "pick")
        _check_indices(indices, operand, "pick")

        def codegen(context, builder, signature, values):
            parts = [value.ll for value in element_values(builder, values[0], operand)]
            chosen = [parts[index] for index in indices]
            return make_tile(context, builder, operand.dtype, operand.lanes, chosen)

        return tile_type(operand.dtype, operand.lanes, len(indices))(tile), codegen

    return named_intrinsic("pick", "tile", typing)


def full(count: int):
    """f(x) -> a tile of `count` copies of a scalar or vector."""

    def typing(x):
        operand = describe(x, "full")
        if operand.count is not None:
            raise TypingError(f"simd.full: expected a scalar or a vector, not {x}")

        def codegen(context, builder, signature, values):
            return make_tile(context, builder, operand.dtype, operand.lanes, [values[0]] * count)

        return tile_type(operand.dtype, operand.lanes, count)(x), codegen

    return named_intrinsic("full", "x", typing)


def splat(lanes: int):
    """f(x) -> a vector of copies of a scalar."""

    def typing(x):
        operand = describe(x, "splat")
        if operand.count is not None or operand.lanes is not None:
            raise TypingError(f"simd.splat: expected a scalar, not {x}")

        def codegen(context, builder, signature, values):
            (value,) = element_values(builder, values[0], operand)
            return adapt(value, operand.dtype, lanes).ll

        return numba_type(operand.dtype, lanes)(x), codegen

    return named_intrinsic("splat", "x", typing)


def join(first: int, second: int):
    """f(a, b) -> the elements of a tile of `first` followed by those of a tile of `second`."""

    def typing(a, b):
        operands = [_tile(a, "join", first), _tile(b, "join", second)]
        dtype = common_dtype(operands, "join")
        lanes = operands[0].lanes or operands[1].lanes
        common_shape(
            [describe(numba_type(one.dtype, one.lanes), "join") for one in operands], "join"
        )

        def codegen(context, builder, signature, values):
            parts = [
                adapt(value, dtype, lanes).ll
                for ll, operand in zip(values, operands)
                for value in element_values(builder, ll, operand)
            ]
            return make_tile(context, builder, dtype, lanes, parts)

        return tile_type(dtype, lanes, first + second)(a, b), codegen

    return named_intrinsic("join", "a b", typing)


def tile_fma(a_index: tuple[int, ...], b_index: tuple[int, ...]):
    """f(acc, a, b) -> acc[k] + a[a_index[k]] * b[b_index[k]] for every k, each rounded once."""
    if len(a_index) != len(b_index):
        raise ValueError(f"tile_fma: {len(a_index)} indices into a, {len(b_index)} into b")

    def typing(acc, a, b):
        operands = [
            _tile(acc, "tile_fma", len(a_index)),
            _tile(a, "tile_fma"),
            _tile(b, "tile_fma"),
        ]
        _check_indices(a_index, operands[1], "tile_fma")
        _check_indices(b_index, operands[2], "tile_fma")
        dtype = common_dtype(operands, "tile_fma")
        lanes, _ = common_shape(
            [describe(numba_type(one.dtype, one.lanes), "tile_fma") for one in operands], "tile_fma"
        )

        def codegen(context, builder, signature, values):
            sums, left, right = (
                [adapt(value, dtype, lanes) for value in element_values(builder, ll, operand)]
                for ll, operand in zip(values, operands)
            )
            # One value of the larger operand at a time, the smaller stays in registers: LLVM keeps
            # the order, and a tile that just fits the registers does not spill.
            streamed = a_index if len(set(a_index)) > len(set(b_index)) else b_index
            results = [None] * len(sums)
            for k in sorted(range(len(sums)), key=streamed.__getitem__):
                results[k] = fma(left[a_index[k]], right[b_index[k]], sums[k]).ll
            return make_tile(context, builder, dtype, lanes, results)

        return tile_type(dtype, lanes, len(a_index))(acc, a, b), codegen

    return named_intrinsic("tile_fma", "acc a b", typing)


def tile_linear(rows: tuple[tuple[float, ...], ...]):
    """f(tile) -> the product of a constant matrix with a tile, row by row; zeros cost nothing."""

    def typing(tile):
        operand = _tile(tile, "tile_linear", len(rows[0]))

        def codegen(context, builder, signature, values):
            parts = element_values(builder, values[0], operand)
            sums: list[Value | None] = [None] * len(rows)
            # One element of the tile at a time: the sums stay in registers.
            for column, part in enumerate(parts):
                for row, coefficients in enumerate(rows):
                    factor = coefficients[column]
                    if factor == 0:
                        continue
                    before = sums[row]
                    if abs(factor) == 1:
                        signed = part if factor > 0 else -part
                        sums[row] = (
                            signed
                            if before is None
                            else (before + part if factor > 0 else before - part)
                        )
                    else:
                        constant = Value(part.emitter, part.emitter.value(factor).ll)
                        sums[row] = (
                            constant * part if before is None else fma(constant, part, before)
                        )
            zero = parts[0].emitter.value(0.0).ll
            results = [zero if s is None else s.ll for s in sums]
            return make_tile(context, builder, operand.dtype, operand.lanes, results)

        return tile_type(operand.dtype, operand.lanes, len(rows))(tile), codegen

    return named_intrinsic("tile_linear", "tile", typing)


def _fold_pairs(values: list[Value], combine) -> Value:
    """Balanced fold in a fixed order: ((0 1) (2 3)) ..., short chains of dependent operations."""
    while len(values) > 1:
        pairs = [combine(x, y) for x, y in zip(values[::2], values[1::2])]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


def tile_combine(name: str, groups: tuple[tuple[int, ...], ...]):
    """f(tile) -> for each group the "sum", "prod", "max" or "min" of its elements."""
    if name not in FOLDS:
        raise ValueError(f"tile_combine: unknown fold {name!r}, expected one of {', '.join(FOLDS)}")

    def typing(tile):
        operand = _tile(tile, "tile_combine")
        _check_numbers(operand, "tile_combine")
        for group in groups:
            _check_indices(group, operand, "tile_combine")

        def codegen(context, builder, signature, values):
            parts = element_values(builder, values[0], operand)
            results = [_fold_pairs([parts[k] for k in group], FOLDS[name]).ll for group in groups]
            return make_tile(context, builder, operand.dtype, operand.lanes, results)

        return tile_type(operand.dtype, operand.lanes, len(groups))(tile), codegen

    return named_intrinsic("tile_combine", "tile", typing)


def _check_numbers(operand, function: str):
    if operand.dtype not in NUMBERS:
        raise TypingError(f"simd.{function} is not defined for {operand.dtype}")


def tile_argmax(groups: tuple[tuple[int, ...], ...]):
    """f(tile) -> (maxima, positions), one of each a group.

    The int32 position within the group is that of the first maximum; NaN exceeds everything and the
    first NaN wins, as in numpy.argmax.
    """

    def typing(tile):
        operand = _tile(tile, "tile_argmax")
        _check_numbers(operand, "tile_argmax")
        for group in groups:
            _check_indices(group, operand, "tile_argmax")
        best_type = tile_type(operand.dtype, operand.lanes, len(groups))
        index_type = tile_type("int32", operand.lanes, len(groups))
        result = types.Tuple([best_type, index_type])

        def codegen(context, builder, signature, values):
            parts = element_values(builder, values[0], operand)
            maxima, positions = [], []
            for group in groups:
                best = parts[group[0]]
                position = best.emitter.of("int32").constant(0)
                for k, index in enumerate(group[1:], 1):
                    x = parts[index]
                    if x.emitter.is_float:
                        # unordered or greater, and the best so far is no NaN
                        better = x.exceeds_or_unordered(best) & ~best.is_nan()
                    else:
                        better = x > best
                    best, position = select(better, x, best), select(better, k, position)
                maxima.append(best.ll)
                positions.append(position.ll)
            best_tile = make_tile(context, builder, operand.dtype, operand.lanes, maxima)
            index_tile = make_tile(context, builder, "int32", operand.lanes, positions)
            return context.make_tuple(builder, result, [best_tile, index_tile])

        return result(tile), codegen

    return named_intrinsic("tile_argmax", "tile", typing)

"""The Numba side of the SIMD vocabulary: vector types and what mixtures of operands mean.

Three kinds of operand occur: a *scalar* (a Numba number or bool), a *vector* of `lanes` elements
and a *tile*, a `UniTuple` of either.  `common_dtype` and `common_shape` find what a mixture
results in; `elementwise` turns a function on `Value`s into a Numba intrinsic for any mixture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model

from graphc.codegen.simd_values import DTYPES, FLOATS, INTEGERS, Emitter, Value, llvm_type, splat

_SCALAR: dict[str, types.Type] = {
    "float32": types.float32,
    "float64": types.float64,
    "int32": types.int32,
    "int64": types.int64,
    "bool": types.boolean,
}
# uint64 appears as the type of some range() indices; its bits are those of int64.
_DTYPE_OF: dict[Any, str] = {numba: name for name, numba in _SCALAR.items()}
_DTYPE_OF[types.uint64] = "int64"
# A Python literal is float64 or int64 to Numba and must not widen what it meets.
_SCALAR_PRECEDENCE = ("float32", "float64", "int32", "int64")


class Vector(types.Type):
    """The Numba type of `lanes` elements of `dtype` in registers; a bool vector is a mask of i1."""

    def __init__(self, dtype: str, lanes: int):
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(name=f"{dtype}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, llvm_type(vector.dtype, vector.lanes))


def numba_type(dtype: str, lanes: int | None) -> types.Type:
    """The Numba type of a vector, or of a scalar where `lanes` is None."""
    return _SCALAR[dtype] if lanes is None else Vector(dtype, lanes)


def pointer_type(dtype: str) -> types.CPointer:
    """The pointer to a dtype's memory, where bool lies as uint8, and uint8 always means bool."""
    return types.CPointer(types.uint8 if dtype == "bool" else _SCALAR[dtype])


_POINTEE: dict[Any, str] = {pointer_type(name): name for name in DTYPES}


def pointee(pointer: types.Type, function: str) -> str:
    """The dtype a pointer type points at."""
    dtype = _POINTEE.get(pointer)
    if dtype is None:
        raise TypingError(
            f"simd.{function}: expected a pointer made by pointer(dtype), not {pointer}"
        )
    return dtype


@dataclass(frozen=True, slots=True)
class Operand:
    """What an argument's type says: `count` is None unless a tile, `lanes` None for scalars."""

    dtype: str
    lanes: int | None
    count: int | None


def tuple_elements(argument: Any) -> list[types.Type]:
    """The element types of a tuple type, literals as their types."""
    return [types.unliteral(element) for element in argument]


def describe(argument: Any, function: str) -> Operand:
    """Read the type of an argument; tuples must be uniform."""
    count = None
    if isinstance(argument, types.BaseTuple):
        elements = tuple_elements(argument)
        if not elements or any(element != elements[0] for element in elements):
            raise TypingError(
                f"simd.{function}: a tile has one or more elements of one type, not {argument}"
            )
        count, argument = len(elements), elements[0]
    if isinstance(argument, Vector):
        return Operand(argument.dtype, argument.lanes, count)
    dtype = _DTYPE_OF.get(types.unliteral(argument))
    if dtype is None:
        raise TypingError(
            f"simd.{function}: expected a number, bool, vector or a tile of them, not {argument}"
        )
    return Operand(dtype, None, count)


def common_dtype(operands, function: str) -> str:
    """The dtype operands meet in: that of the vectors, which must agree; scalars adapt to it."""
    vectors = {operand.dtype for operand in operands if operand.lanes is not None}
    scalars = {operand.dtype for operand in operands if operand.lanes is None}
    if len(vectors) > 1:
        raise TypingError(
            f"simd.{function}: vectors of different dtypes ({', '.join(sorted(vectors))}); "
            "cast one of them"
        )
    if vectors:
        (target,) = vectors
    elif "bool" in scalars:
        target = "bool"
    else:
        target = next(name for name in _SCALAR_PRECEDENCE if name in scalars)
    for dtype in scalars:
        lossy = (dtype == "bool") != (target == "bool") or (dtype in FLOATS and target in INTEGERS)
        if lossy:
            raise TypingError(f"simd.{function}: a {dtype} scalar meets {target}; cast one of them")
    return target


def common_shape(operands, function: str) -> tuple[int | None, int | None]:
    """(lanes, count) of an element-wise result: scalars and single vectors broadcast."""
    lanes = {operand.lanes for operand in operands} - {None}
    counts = {operand.count for operand in operands} - {None}
    if len(lanes) > 1 or len(counts) > 1:
        what = "lanes" if len(lanes) > 1 else "tiles"
        sizes = sorted(lanes if len(lanes) > 1 else counts)
        raise TypingError(f"simd.{function}: operands have different numbers of {what}: {sizes}")
    return (lanes.pop() if lanes else None), (counts.pop() if counts else None)


def element_values(builder, ll, operand: Operand) -> list[Value]:
    """The elements of a tile, or the one of a vector or scalar, as Values."""
    emitter = Emitter(builder, operand.dtype, operand.lanes)
    parts = [ll] if operand.count is None else cgutils.unpack_tuple(builder, ll, operand.count)
    return [Value(emitter, part) for part in parts]


def adapt(value: Value, dtype: str, lanes: int | None) -> Value:
    """A scalar converted to the dtype and spread over the lanes; a vector as it is."""
    if value.emitter.lanes is not None:
        return value
    value = value.convert(dtype)
    if lanes is None:
        return value
    builder = value.emitter.builder
    return Value(Emitter(builder, dtype, lanes), splat(builder, value.ll, lanes))


def make_tile(context, builder, dtype: str, lanes: int | None, values: list) -> ir.Value:
    """A Numba tuple of LLVM values."""
    return context.make_tuple(builder, tile_type(dtype, lanes, len(values)), values)


def tile_type(dtype: str, lanes: int | None, count: int) -> types.UniTuple:
    """The Numba type of a tile."""
    return types.UniTuple(numba_type(dtype, lanes), count)


def named_intrinsic(name: str, parameters: str, typing: Callable, decorator=intrinsic) -> Any:
    """Numba's @intrinsic with a given name and parameters (names separated by spaces).

    `typing(*argument_types)` returns (signature, codegen); Numba caches it by the argument types.
    `decorator` is the @intrinsic of the target: the CPU's, or that of `numba.cuda`.
    """

    def definition(typingctx, *arguments):
        return typing(*(types.unliteral(argument) for argument in arguments))

    definition.__name__ = definition.__qualname__ = name
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["typingctx", *parameters.split()]
    # Numba reads the arity here; a starred parameter would be packed into a tuple.
    signature = inspect.Signature([inspect.Parameter(one, kind) for one in names])
    definition.__signature__ = signature  # type: ignore[attr-defined]
    return decorator(definition)


def elementwise(
    name: str,
    parameters: str,
    emit: Callable[..., Value],
    accepts: tuple[str, ...],
    result: str | None = None,
    masks: int = 0,
    decorator=intrinsic,
):
    """An intrinsic that applies `emit` to each element of its operands.

    `accepts` lists the dtypes of the operands, `result` is the dtype of the result where it is not
    that of the operands.  The first `masks` operands are bool and take part in the shape only.
    """

    def typing(*arguments):
        operands = [describe(argument, name) for argument in arguments]
        for operand in operands[:masks]:
            if operand.dtype != "bool":
                raise TypingError(f"simd.{name}: the mask is {operand.dtype}, expected bool")
        dtype = common_dtype(operands[masks:], name)
        if dtype not in accepts:
            raise TypingError(
                f"simd.{name} is not defined for {dtype}, only for {', '.join(accepts)}"
            )
        lanes, count = common_shape(operands, name)
        result_dtype = result or dtype
        if count is None:
            result_type = numba_type(result_dtype, lanes)
        else:
            result_type = tile_type(result_dtype, lanes, count)

        def codegen(context, builder, signature, values):
            columns = []
            for position, (ll, operand) in enumerate(zip(values, operands)):
                column = element_values(builder, ll, operand)
                if position >= masks:
                    column = [adapt(value, dtype, lanes) for value in column]
                columns.append(column if operand.count is not None else column * (count or 1))
            results = [emit(*row).ll for row in zip(*columns)]
            if count is None:
                return results[0]
            return make_tile(context, builder, result_dtype, lanes, results)

        return result_type(*arguments), codegen

    return named_intrinsic(name, parameters, typing, decorator)

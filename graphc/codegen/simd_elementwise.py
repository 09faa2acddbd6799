"""Element-wise arithmetic, comparison, selection and bit functions of the SIMD vocabulary.

One table, `FUNCTIONS`: name -> intrinsic.  None of them depends on the number of lanes (the
operands' types carry it), so all vocabularies share them, and so does the CUDA vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba.extending import intrinsic

from graphc.codegen import simd_math
from graphc.codegen.simd_operands import elementwise
from graphc.codegen.simd_values import DTYPES, FLOATS, INTEGERS, NUMBERS, Value, fma, select


def maximum(x: Value, y: Value) -> Value:
    """The larger, NaN if either is NaN: `x > y ? x : y` is vmaxps, which passes a NaN in y only."""
    larger = select(x > y, x, y)
    return select(x.is_nan(), x, larger) if x.emitter.is_float else larger


def minimum(x: Value, y: Value) -> Value:
    """The smaller, NaN if either is NaN."""
    smaller = select(x < y, x, y)
    return select(x.is_nan(), x, smaller) if x.emitter.is_float else smaller


def relu(x: Value) -> Value:
    """0 where x < 0, else x: a single vmaxps, in the operand order that passes NaN."""
    zero = x.emitter.constant(0)
    return select(zero > x, zero, x)


def absolute(x: Value) -> Value:
    """|x|; the most negative integer stays as it is."""
    return x.emitter.call("fabs", x) if x.emitter.is_float else select(x < 0, -x, x)


def sign(x: Value) -> Value:
    """-1, 0 or 1, NaN for NaN; adding 0 turns -0.0 into 0.0, as numpy.sign does."""
    return select(x > 0, 1, select(x < 0, -1, x + 0))


def _unary(llvm_name: str):
    return lambda x: x.emitter.call(llvm_name, x)


def rotate_left(x: Value, n: Value) -> Value:
    """Bits moved left by n modulo the width; those leaving at the top come in at the bottom."""
    return x.emitter.call("fshl", x, x, n)


def uint32_to_unit(x: Value) -> Value:
    """A float32 in [0, 1) from the top 24 bits of a uint32: exact, every value equally likely."""
    return (x >> 8).convert("float32") * 2.0**-24


_MASKS = ("bool",)
_BITS = _MASKS + INTEGERS

_TABLE: list[tuple] = [
    # name, parameters, emit, accepted dtypes[, result dtype[, mask operands]]
    ("add", "x y", lambda x, y: x + y, NUMBERS),
    ("sub", "x y", lambda x, y: x - y, NUMBERS),
    ("mul", "x y", lambda x, y: x * y, NUMBERS),
    ("div", "x y", lambda x, y: x / y, FLOATS),
    ("neg", "x", lambda x: -x, NUMBERS),
    ("fma", "x y z", fma, NUMBERS),
    ("maximum", "x y", maximum, NUMBERS),
    ("minimum", "x y", minimum, NUMBERS),
    ("relu", "x", relu, NUMBERS),
    ("abs", "x", absolute, NUMBERS),
    ("sign", "x", sign, NUMBERS),
    ("sqrt", "x", _unary("sqrt"), FLOATS),
    ("reciprocal", "x", lambda x: 1 / x, FLOATS),
    ("rsqrt", "x", lambda x: 1 / x.emitter.call("sqrt", x), FLOATS),
    ("floor", "x", _unary("floor"), FLOATS),
    ("ceil", "x", _unary("ceil"), FLOATS),
    ("rint", "x", _unary("rint"), FLOATS),
    ("lt", "x y", lambda x, y: x < y, NUMBERS, "bool"),
    ("le", "x y", lambda x, y: x <= y, NUMBERS, "bool"),
    ("gt", "x y", lambda x, y: x > y, NUMBERS, "bool"),
    ("ge", "x y", lambda x, y: x >= y, NUMBERS, "bool"),
    ("eq", "x y", lambda x, y: x.equals(y), DTYPES, "bool"),
    ("ne", "x y", lambda x, y: x.differs(y), DTYPES, "bool"),
    ("and_", "x y", lambda x, y: x & y, _BITS),
    ("or_", "x y", lambda x, y: x | y, _BITS),
    ("xor_", "x y", lambda x, y: x ^ y, _BITS),
    ("not_", "x", lambda x: ~x, _BITS),
    ("select", "mask x y", select, DTYPES, None, 1),
    ("bit_xor", "x y", lambda x, y: x ^ y, INTEGERS),
    ("shift_left", "x n", lambda x, n: x << n, INTEGERS),
    ("shift_right", "x n", lambda x, n: x >> n, INTEGERS),
    ("rotate_left", "x n", rotate_left, INTEGERS),
    ("uint32_to_unit", "x", uint32_to_unit, ("int32",), "float32"),
]
_TABLE += [
    (name, "x y" if name == "pow" else "x", getattr(simd_math, name), FLOATS)
    for name in "exp log log1p expm1 tanh erf sigmoid sin cos pow".split()
]


def functions(decorator=intrinsic) -> dict[str, Any]:
    """Every function by name, for the target whose @intrinsic is given."""
    options = {"decorator": decorator}
    return {row[0]: elementwise(*row, **options) for row in _TABLE}


FUNCTIONS = functions()


@cache
def cast(dtype: str, decorator: Any = intrinsic):
    """The intrinsic that converts to `dtype`: float to int truncates, to bool is `!= 0`.

    A float outside the integer's range, or NaN, gives an unspecified integer.
    """
    if dtype not in DTYPES:
        raise ValueError(f"cast: unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    return elementwise(
        f"cast_{dtype}", "x", lambda x: x.convert(dtype), DTYPES, dtype, decorator=decorator
    )

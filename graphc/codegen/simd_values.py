"""LLVM values with Python operators: how the SIMD vocabulary's functions write their formulas.

An `Emitter` builds IR for one dtype and shape, a `Value` is one LLVM value of it.  Shapes are
`lanes` elements or, where lanes is None, a scalar; formulas need not care which.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils

FLOATS = ("float32", "float64")
INTEGERS = ("int32", "int64")
NUMBERS = FLOATS + INTEGERS
DTYPES = NUMBERS + ("bool",)

I1, I8, I32, I64 = (ir.IntType(width) for width in (1, 8, 32, 64))
ELEMENT = {
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
    "int32": I32,
    "int64": I64,
    "bool": I1,
}
SUFFIX = {"float32": "f32", "float64": "f64", "int32": "i32", "int64": "i64", "bool": "i1"}
# Intrinsics of LLVM that libnvvm refuses; its own library has them by these names.
LIBDEVICE = ("fabs", "rint", "copysign")
BYTES = {"float32": 4, "float64": 8, "int32": 4, "int64": 8, "bool": 1}


def llvm_type(dtype: str, lanes: int | None) -> ir.Type:
    """The LLVM type of a value of `lanes` elements, or of a scalar where `lanes` is None."""
    return ELEMENT[dtype] if lanes is None else ir.VectorType(ELEMENT[dtype], lanes)


class Emitter:
    """Emits LLVM IR for values of one dtype and one shape (`lanes` elements, or a scalar: None)."""

    __slots__ = ("builder", "dtype", "lanes", "type", "is_float", "is_bool")

    def __init__(self, builder: ir.IRBuilder, dtype: str, lanes: int | None):
        self.builder = builder
        self.dtype = dtype
        self.lanes = lanes
        self.type = llvm_type(dtype, lanes)
        self.is_float = dtype in FLOATS
        self.is_bool = dtype == "bool"

    def of(self, dtype: str) -> Emitter:
        """The emitter of another dtype and the same shape."""
        return self if dtype == self.dtype else Emitter(self.builder, dtype, self.lanes)

    def constant(self, number) -> Value:
        """A constant; float32 constants are rounded from Python's float64 once."""
        if self.dtype == "float32":
            number = float(np.float32(number))
        element = number if self.is_float else int(number)
        if self.lanes is None:
            return Value(self, ir.Constant(self.type, element))
        return Value(self, ir.Constant(self.type, [element] * self.lanes))

    def value(self, operand) -> Value:
        """A Python number as a constant; a Value as it is."""
        return operand if isinstance(operand, Value) else self.constant(operand)

    def call(self, name: str, *operands: Value) -> Value:
        """Call the overloaded intrinsic `llvm.<name>` of this type."""
        suffix = SUFFIX[self.dtype]
        if self.lanes is not None:
            suffix = f"v{self.lanes}{suffix}"
        arguments = [operand.ll for operand in operands]
        signature = ir.FunctionType(self.type, [argument.type for argument in arguments])
        module, symbol = self.builder.module, f"llvm.{name}.{suffix}"
        if name in LIBDEVICE and module.triple.startswith("nvptx"):
            symbol = f"__nv_{name}{'f' if self.dtype == 'float32' else ''}"
        function = cgutils.get_or_insert_function(module, signature, symbol)
        return Value(self, self.builder.call(function, arguments))


class Value:
    """An LLVM value with Python operators, so that formulas read as in the books.

    Python numbers on either side become constants.  Comparisons give bool Values.  Integer `>>` is
    logical, all integer arithmetic wraps.  Nothing is contracted or reassociated: `fma` is
    explicit.
    """

    __slots__ = ("emitter", "ll")

    def __init__(self, emitter: Emitter, ll: ir.Value):
        self.emitter = emitter
        self.ll = ll

    def _binary(self, other, float_name: str | None, integer_name: str | None) -> Value:
        emitter = self.emitter
        name = float_name if emitter.is_float else integer_name
        assert name is not None, f"no such operation on {emitter.dtype}"
        return Value(emitter, getattr(emitter.builder, name)(self.ll, emitter.value(other).ll))

    def _compare(self, operator: str, other, unordered: bool = False) -> Value:
        emitter = self.emitter
        if emitter.is_float:
            name = "fcmp_unordered" if unordered else "fcmp_ordered"
        else:
            name = "icmp_signed"
        mask = getattr(emitter.builder, name)(operator, self.ll, emitter.value(other).ll)
        return Value(emitter.of("bool"), mask)

    def __add__(self, other):
        return self._binary(other, "fadd", "add")

    def __sub__(self, other):
        return self._binary(other, "fsub", "sub")

    def __mul__(self, other):
        return self._binary(other, "fmul", "mul")

    def __truediv__(self, other):
        return self._binary(other, "fdiv", None)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other):
        return self.emitter.constant(other) - self

    def __rtruediv__(self, other):
        return self.emitter.constant(other) / self

    def __neg__(self):
        emitter = self.emitter
        if emitter.is_float:
            # As -0.0 - x, which LLVM knows for a negation; libnvvm has no fneg.
            return Value(emitter, emitter.builder.fsub(emitter.constant(-0.0).ll, self.ll))
        return 0 - self

    def __and__(self, other):
        return self._binary(other, None, "and_")

    def __or__(self, other):
        return self._binary(other, None, "or_")

    def __xor__(self, other):
        return self._binary(other, None, "xor")

    def __invert__(self):
        return self ^ (1 if self.emitter.is_bool else -1)

    def __lshift__(self, other):
        return self._binary(other, None, "shl")

    def __rshift__(self, other):
        return self._binary(other, None, "lshr")

    def __lt__(self, other):
        return self._compare("<", other)

    def __le__(self, other):
        return self._compare("<=", other)

    def __gt__(self, other):
        return self._compare(">", other)

    def __ge__(self, other):
        return self._compare(">=", other)

    def equals(self, other) -> Value:
        """Ordered equality: false where either is NaN."""
        return self._compare("==", other)

    def differs(self, other) -> Value:
        """The negation of `equals`: true where either is NaN."""
        return self._compare("!=", other, unordered=True)

    def exceeds_or_unordered(self, other) -> Value:
        """True where self > other or either is NaN."""
        return self._compare(">", other, unordered=True)

    def is_nan(self) -> Value:
        """True in the lanes that hold NaN."""
        return self.differs(self)

    def bits(self) -> Value:
        """The bit pattern of a float as an integer of its width."""
        emitter = self.emitter.of("int32" if self.emitter.dtype == "float32" else "int64")
        return Value(emitter, emitter.builder.bitcast(self.ll, emitter.type))

    def as_float(self) -> Value:
        """The float of its width with this integer's bit pattern."""
        emitter = self.emitter.of("float32" if self.emitter.dtype == "int32" else "float64")
        return Value(emitter, emitter.builder.bitcast(self.ll, emitter.type))

    def convert(self, dtype: str) -> Value:
        """The same number in another dtype: float to int truncates, to bool compares with 0."""
        source, target = self.emitter, self.emitter.of(dtype)
        return Value(target, _convert(source.builder, self.ll, source.dtype, dtype, target.type))


def _convert(builder, ll, source: str, target: str, target_type):
    if source == target:
        return ll
    if target == "bool":
        zero = ir.Constant(ll.type, None)
        if source in FLOATS:
            return builder.fcmp_unordered("!=", ll, zero)
        return builder.icmp_signed("!=", ll, zero)
    if source == "bool":
        return (builder.uitofp if target in FLOATS else builder.zext)(ll, target_type)
    if source in FLOATS:
        if target in FLOATS:
            return (builder.fpext if target == "float64" else builder.fptrunc)(ll, target_type)
        return builder.fptosi(ll, target_type)
    if target in FLOATS:
        return builder.sitofp(ll, target_type)
    return (builder.sext if target == "int64" else builder.trunc)(ll, target_type)


def fma(x, y, z) -> Value:
    """x*y + z rounded once; any of the three may be a Python number, but not all."""
    emitter = next(operand.emitter for operand in (x, y, z) if isinstance(operand, Value))
    x, y, z = emitter.value(x), emitter.value(y), emitter.value(z)
    if emitter.is_float:
        return emitter.call("fma", x, y, z)
    return x * y + z


def select(mask: Value, x, y) -> Value:
    """x where the mask is set, else y; a scalar mask chooses between whole vectors."""
    emitter = next(operand.emitter for operand in (x, y) if isinstance(operand, Value))
    x, y = emitter.value(x), emitter.value(y)
    return Value(emitter, emitter.builder.select(mask.ll, x.ll, y.ll))


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector with the scalar in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


def shuffle(x: Value, y: Value, indices: list[int]) -> ir.Value:
    """Lanes chosen from the concatenation of two vectors, by constant indices."""
    mask = ir.Constant(ir.VectorType(I32, len(indices)), indices)
    return x.emitter.builder.shuffle_vector(x.ll, y.ll, mask)

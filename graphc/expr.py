"""Scalar expressions: what one element of a value is, as a function of its index.

An operator's lowering is written in this language (`OpDef.lower`), so that one definition serves
every target: `graphc.codegen` renders the same tree as SIMD statements for a CPU and as scalar code
for a GPU thread. Nothing here knows about memory: `read` is "that operand's element at this index".
"""

from __future__ import annotations

from dataclasses import dataclass, field

Number = int | float | bool

# name -> result dtype rule: "same" as the operands, or a fixed one.
FUNCTIONS: dict[str, str] = {
    **dict.fromkeys(
        "add sub mul div fma maximum minimum neg relu abs sqrt reciprocal rsqrt floor ceil rint "
        "sign pow exp log log1p expm1 tanh erf sigmoid sin cos select "
        "bit_xor shift_left shift_right rotate_left and_ or_ not_ xor_".split(),
        "same",
    ),
    **dict.fromkeys("lt le gt ge eq ne".split(), "bool"),
    "uint32_to_unit": "float32",
}


@dataclass(frozen=True)
class Index:
    """An affine index: `constant + sum(coefficient * loop)`, loops by name."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(loop: str) -> Index:
        return Index(((loop, 1),))

    @staticmethod
    def lift(value: Index | int) -> Index:
        return value if isinstance(value, Index) else Index((), value)

    def __add__(self, other: Index | int) -> Index:
        other = Index.lift(other)
        terms = dict(self.terms)
        for loop, coefficient in other.terms:
            terms[loop] = terms.get(loop, 0) + coefficient
        return Index(tuple((k, c) for k, c in terms.items() if c), self.constant + other.constant)

    __radd__ = __add__

    def __mul__(self, factor: int) -> Index:
        if factor == 0:
            return Index()
        return Index(tuple((k, c * factor) for k, c in self.terms), self.constant * factor)

    __rmul__ = __mul__

    def __sub__(self, other: Index | int) -> Index:
        return self + Index.lift(other) * -1

    def __neg__(self) -> Index:
        return self * -1


@dataclass(frozen=True, eq=False)
class Expr:
    """One scalar value.

    `op` is a name of FUNCTIONS or one of: constant, position, read, reduce, within.

    - constant: attribute `value`
    - position: attribute `index`, the numeric value of an affine index (int32)
    - read: attributes `value` (an ir.Value) and `index` (tuple of Index): an element in memory
    - reduce: one argument; attributes `combine` (sum prod max min argmax) and `loops`
      ((name, extent), ...)
    - within: `args[0]` where every (Index, extent) of attribute `bounds` lies in [0, extent), else
      `args[1]`; `args[0]` is not evaluated (memory is not touched) elsewhere
    """

    op: str
    args: tuple[Expr, ...]
    dtype: str
    attributes: dict = field(default_factory=dict)

    def __add__(self, other):
        return call("add", self, other)

    def __radd__(self, other):
        return call("add", other, self)

    def __sub__(self, other):
        return call("sub", self, other)

    def __rsub__(self, other):
        return call("sub", other, self)

    def __mul__(self, other):
        return call("mul", self, other)

    def __rmul__(self, other):
        return call("mul", other, self)

    def __truediv__(self, other):
        return call("div", self, other)

    def __rtruediv__(self, other):
        return call("div", other, self)

    def __neg__(self):
        return call("neg", self)

    def __lt__(self, other):
        return call("lt", self, other)

    def __le__(self, other):
        return call("le", self, other)

    def __gt__(self, other):
        return call("gt", self, other)

    def __ge__(self, other):
        return call("ge", self, other)


def constant(value: Number, dtype: str) -> Expr:
    return Expr("constant", (), dtype, {"value": value})


def call(name: str, *args: Expr | Number) -> Expr:
    """Apply a function of FUNCTIONS; Python numbers take the dtype of the other operands."""
    rule = FUNCTIONS[name]
    values = args[1:] if name == "select" else args
    dtype = next((a.dtype for a in values if isinstance(a, Expr)), None)
    if dtype is None:
        raise TypeError(f"{name}: at least one operand must be an expression")
    lifted = tuple(a if isinstance(a, Expr) else constant(a, dtype) for a in args)
    return Expr(name, lifted, dtype if rule == "same" else rule)


def select(condition: Expr, a: Expr | Number, b: Expr | Number) -> Expr:
    return call("select", condition, a, b)


def cast(x: Expr, dtype: str) -> Expr:
    return x if x.dtype == dtype else Expr("cast", (x,), dtype)


def position(index: Index | int) -> Expr:
    """The value of an index as an int32 number."""
    return Expr("position", (), "int32", {"index": Index.lift(index)})


def reduce(combine: str, body: Expr, loops: tuple[tuple[str, int], ...]) -> Expr:
    dtype = "int32" if combine == "argmax" else body.dtype
    return (
        Expr("reduce", (body,), dtype, {"combine": combine, "loops": loops})
        if loops or combine == "argmax"
        else body
    )


def within(bounds: tuple[tuple[Index, int], ...], inside: Expr, outside: Expr | Number) -> Expr:
    outside = outside if isinstance(outside, Expr) else constant(outside, inside.dtype)
    return Expr("within", (inside, outside), inside.dtype, {"bounds": bounds})

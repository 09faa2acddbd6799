"""Runs `lower` rules in plain Python, one element at a time: the scalar language's meaning."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np

from graphc.expr import Expr, Index, constant
from graphc.ir import Node
from graphc.ops.registry import get


def _unsigned(function: Callable) -> Callable:
    """A function of 32-bit patterns, which the language keeps in int32."""
    return lambda *words: np.uint32(
        function(*(int(w) & 0xFFFFFFFF for w in words)) & 0xFFFFFFFF
    ).astype(np.int32)


FUNCTIONS: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "fma": lambda x, y, z: x * y + z,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "neg": operator.neg,
    "relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "abs": abs,
    "sqrt": np.sqrt,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "sign": np.sign,
    "pow": np.power,
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "erf": math.erf,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sin": np.sin,
    "cos": np.cos,
    "select": lambda condition, a, b: a if condition else b,
    "bit_xor": operator.xor,
    "shift_left": _unsigned(operator.lshift),
    "shift_right": _unsigned(operator.rshift),
    "rotate_left": _unsigned(lambda x, n: (x << n) | (x >> (32 - n))),
    "and_": np.logical_and,
    "or_": np.logical_or,
    "not_": np.logical_not,
    "xor_": np.logical_xor,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "cast": lambda x: x,
    "uint32_to_unit": lambda x: np.float32((int(x) & 0xFFFFFFFF) >> 8) * np.float32(2**-24),
}
COMBINE: dict[str, tuple[Callable, float]] = {
    "sum": (operator.add, 0),
    "prod": (operator.mul, 1),
    "max": (np.maximum, -math.inf),
    "min": (np.minimum, math.inf),
}


def _number(index: Index | int) -> int:
    index = Index.lift(index)
    assert not index.terms, f"{index} is not bound"
    return index.constant


class ScalarEvaluator:
    """The `Lowering` of one node on given operand arrays. Every index is a constant here."""

    def __init__(self, node: Node, operands: Sequence[np.ndarray]):
        self.node = node
        self.operands = operands

    def element(self, output: int, index: Sequence[int]) -> np.generic:
        """One element of an output, computed from the node's `lower` rule."""
        rule = get(self.node.op).lower
        assert rule is not None
        with np.errstate(all="ignore"):
            bound = tuple(Index((), i) for i in index)
            expression = rule(self, self.node, output, bound)
            assert expression.dtype == self.node.types[output].dtype, (
                f"{self.node.op}: lower gives {expression.dtype} for {self.node.types[output]}"
            )
            return self._value(expression, {})

    # ---- Lowering

    def read(self, slot: int, index: Sequence[Index | int]) -> Expr:
        array, at = self.operands[slot], tuple(_number(i) for i in index)
        assert len(at) == array.ndim, f"{self.node.op}: operand {slot} read at {at}"
        return Expr("read", (), array.dtype.name, {"slot": slot, "index": at})

    def reduce(self, combine: str, extents: Sequence[int], body: Callable[..., Expr]) -> Expr:
        spaces = list(itertools.product(*(range(e) for e in extents)))
        parts = [body(*(Index((), i) for i in at)) for at in spaces]
        if combine == "argmax":
            values = [self._value(p, {}) for p in parts]
            return constant(int(np.argmax(values)), "int32")
        function, start = COMBINE[combine]
        if not parts:
            dtype = body(*(Index() for _ in extents)).dtype
            return constant(start, dtype)
        total = self._value(parts[0], {})
        for part in parts[1:]:
            total = function(total, self._value(part, {}))
        return constant(total, parts[0].dtype)

    def divmod(self, index: Index, divisor: int) -> tuple[Index, Index]:
        quotient, remainder = divmod(_number(index), divisor)
        return Index((), quotient), Index((), remainder)

    # ---- expressions

    def _value(self, e: Expr, known: dict[int, np.generic]) -> np.generic:
        if id(e) not in known:
            known[id(e)] = np.asarray(self._compute(e, known)).astype(e.dtype)[()]
        return known[id(e)]

    def _compute(self, e: Expr, known: dict[int, np.generic]):
        if e.op == "constant":
            return e.attributes["value"]
        if e.op == "position":
            return _number(e.attributes["index"])
        if e.op == "read":
            at, array = e.attributes["index"], self.operands[e.attributes["slot"]]
            assert all(0 <= i < d for i, d in zip(at, array.shape, strict=True)), (
                f"{self.node.op}: operand {e.attributes['slot']} of {array.shape} read at {at}"
            )
            return array[at]
        if e.op == "within":
            inside = all(0 <= _number(i) < extent for i, extent in e.attributes["bounds"])
            return self._value(e.args[0 if inside else 1], known)
        return FUNCTIONS[e.op](*(self._value(a, known) for a in e.args))


class LoopRecorder:
    """The `Lowering` that keeps loops as names: shows that a rule's indices are affine in them."""

    def __init__(self, node: Node):
        self.node = node
        self.loops = 0

    def fresh(self) -> Index:
        self.loops += 1
        return Index.of(f"loop{self.loops}")

    def lower(self, output: int) -> Expr:
        rule = get(self.node.op).lower
        assert rule is not None
        return rule(
            self, self.node, output, tuple(self.fresh() for _ in self.node.types[output].shape)
        )

    def read(self, slot: int, index: Sequence[Index | int]) -> Expr:
        value = self.node.inputs[slot]
        at = tuple(Index.lift(i) for i in index)
        assert len(at) == value.rank, (
            f"{self.node.op}: operand {slot} of rank {value.rank} read at {at}"
        )
        return Expr("read", (), value.dtype, {"value": value, "index": at})

    def reduce(self, combine: str, extents: Sequence[int], body: Callable[..., Expr]) -> Expr:
        inner = body(*(self.fresh() for _ in extents))
        dtype = "int32" if combine == "argmax" else inner.dtype
        return Expr("reduce", (inner,), dtype, {"combine": combine, "loops": tuple(extents)})

    def divmod(self, index: Index, divisor: int) -> tuple[Index, Index]:
        assert isinstance(index, Index) and divisor > 0
        return self.fresh(), self.fresh()

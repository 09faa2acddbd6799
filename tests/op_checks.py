"""Checks that hold for every operator of the registry, one function each, for test_ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scalar_evaluator import LoopRecorder, ScalarEvaluator

import graphc.ops  # noqa: F401  (fills the registry)
from graphc.interpreter import interpret
from graphc.ir import Graph, Node, TensorType, Value
from graphc.ops.elementwise import add, mul
from graphc.ops.reduce import sum as reduce_sum
from graphc.ops.registry import Sample, all_ops, get
from passes.autodiff import differentiate

# Outputs that carry no gradient by definition: batch norm's running statistics.
DETACHED = {"batch_norm": (1, 2)}
# Operators that block the gradient on purpose: their chain rule is not the function's derivative.
BLOCKING = {"stop_gradient"}


@dataclass(frozen=True)
class Case:
    """One sample of one operator."""

    op: str
    number: int
    sample: Sample

    def __str__(self) -> str:
        shapes = "x".join("_".join(map(str, a.shape)) or "scalar" for a in self.sample.inputs)
        return f"{self.op}-{self.number}-{shapes}"

    def operands(self, dtype: str) -> list[np.ndarray]:
        """The sample's arrays, floats in `dtype`."""
        arrays = [np.asarray(a) for a in self.sample.inputs]
        return [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]

    def build(self, dtype: str) -> tuple[Graph, Node]:
        """A graph of inputs operand0, operand1, ... and the operator."""
        graph = Graph(str(self))
        inputs = [
            graph.input(f"operand{i}", a.shape, a.dtype.name)
            for i, a in enumerate(self.operands(dtype))
        ]
        return graph, graph.add(self.op, inputs, self.sample.attrs)

    def evaluate(self, dtype: str) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            return [
                np.asarray(a)
                for a in get(self.op).evaluate(self.operands(dtype), self.sample.attrs)
            ]

    def gradient_slots(self) -> list[int]:
        if self.sample.grad is not None:
            return list(self.sample.grad)
        return [i for i, a in enumerate(self.operands("float64")) if a.dtype.kind == "f"]


def cases() -> list[Case]:
    """Every sample of every operator."""
    return [
        Case(name, i, sample)
        for name, op in all_ops().items()
        for i, sample in enumerate(op.samples())
    ]


def check_types(case: Case, dtype: str) -> None:
    """The type rule says what the reference gives, and the reference leaves its operands alone."""
    arrays = case.operands(dtype)
    before = [a.copy() for a in arrays]
    with np.errstate(all="ignore"):
        results = list(get(case.op).evaluate(arrays, case.sample.attrs))
    _, node = case.build(dtype)
    assert len(results) == len(node.types)
    for result, declared in zip(results, node.types, strict=True):
        result = np.asarray(result)
        assert (result.shape, result.dtype.name) == (declared.shape, declared.dtype)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)


def check_decompose(case: Case) -> None:
    """The decomposition computes what the reference does."""
    graph, node = case.build("float64")
    rule = get(case.op).decompose
    assert rule is not None
    parts = list(rule(node, node.inputs))
    assert [p.type for p in parts] == list(node.types)
    found = interpret(graph, named(case.operands("float64")), values=parts).values
    for part, expected in zip(parts, case.evaluate("float64"), strict=True):
        np.testing.assert_allclose(found[part], expected, rtol=1e-12, atol=1e-12)


def check_lower(case: Case, dtype: str, limit: int = 48) -> None:
    """The compute definition gives the reference's elements (up to `limit` of them)."""
    _, node = case.build(dtype)
    evaluator = ScalarEvaluator(node, case.operands(dtype))
    tolerance = 1e-10 if dtype == "float64" else 2e-5
    for output, expected in enumerate(case.evaluate(dtype)):
        assert LoopRecorder(node).lower(output).dtype == node.types[output].dtype
        for flat in _some(expected.size, limit):
            at = np.unravel_index(flat, expected.shape)
            element = evaluator.element(output, [int(i) for i in at])
            np.testing.assert_allclose(
                element, expected[at], rtol=tolerance, atol=tolerance, err_msg=f"element {at}"
            )


def _some(size: int, limit: int) -> Sequence[int]:
    """All positions, or `limit` of them with both ends."""
    if size <= limit:
        return range(size)
    middle = np.random.default_rng(size).choice(np.arange(1, size - 1), limit - 2, replace=False)
    return [0, *sorted(int(i) for i in middle), size - 1]


def named(arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"operand{i}": a for i, a in enumerate(arrays)}


class Projection:
    """A scalar made of an operator's outputs by fixed random weights, and its gradients.

    `loss` = sum of weight_j * output_j; `second` = sum over operands of the gradient of `loss`
    weighted by fixed random arrays, plus a linear term, so that it depends on every operand.
    """

    def __init__(self, case: Case, order: int):
        self.graph, node = case.build("float64")
        rng = np.random.default_rng(7)
        self.arrays = named(case.operands("float64"))
        self.wrt = [node.inputs[slot] for slot in case.gradient_slots()]

        def weigh(values: list[Value], base: str) -> Value:
            terms = []
            for i, value in enumerate(values):
                name = f"{base}{i}"
                weight = self.graph.input(name, value.shape, value.dtype)
                self.arrays[name] = rng.uniform(-1, 1, value.shape)
                terms.append(reduce_sum(mul(value, weight)))
            total = terms[0]
            for term in terms[1:]:
                total = add(total, term)
            return total

        detached = DETACHED.get(case.op, ())
        floats = [v for v in node.outputs if v.type.is_float and v.index not in detached]
        self.loss = weigh(floats, "weight")
        if order == 2:
            weights = [self.graph.value(f"weight{i}") for i in range(len(floats))]
            first = differentiate(self.graph, self.loss, self.wrt)
            self.loss = add(
                weigh([g for g in first if g is not None], "probe"), weigh(self.wrt, "line")
            )
            self.wrt = [*self.wrt, *weights]
        self.gradients = differentiate(self.graph, self.loss, self.wrt)

    def run(self, values: list[Value], moved: dict[str, np.ndarray]) -> dict[Value, np.ndarray]:
        """Values with some operands moved; casts to float32 stay smooth."""
        return interpret(
            self.graph, {**self.arrays, **moved}, values=values, dtype="float64"
        ).values

    def __call__(self, moved: dict[str, np.ndarray]) -> float:
        return float(self.run([self.loss], moved)[self.loss])

    def check(self, step: float, rtol: float) -> None:
        """Derivatives along random directions against central differences."""
        exact = self.run(self.gradients, {})
        rng = np.random.default_rng(11)
        for value, gradient in zip(self.wrt, self.gradients, strict=True):
            assert gradient.type == value.type
            for _ in range(2):
                direction = rng.uniform(-1, 1, value.shape)
                here = self.arrays[value.name]
                ahead = self({value.name: here + step * direction})
                behind = self({value.name: here - step * direction})
                numeric = (ahead - behind) / (2 * step)
                analytic = float(np.sum(exact[gradient] * direction))
                np.testing.assert_allclose(
                    analytic, numeric, rtol=rtol, atol=rtol, err_msg=f"with respect to {value.name}"
                )


def check_gradient(case: Case, order: int) -> None:
    """The chain rule against finite differences in float64; order 2: the chain rule of it."""
    Projection(case, order).check(step=1e-6 if order == 1 else 1e-5, rtol=2e-6)


def check_linear_type(case: Case) -> None:
    """Every cotangent has its operand's type, in float32 as well."""
    graph, node = case.build("float32")
    rule = get(case.op).vjp
    assert rule is not None
    cotangents = [
        graph.input(f"cotangent{i}", t.shape, t.dtype) if t.is_float else None
        for i, t in enumerate(node.types)
    ]
    for operand, cotangent in zip(node.inputs, rule(node, cotangents), strict=True):
        expected: TensorType = operand.type
        assert cotangent is None or cotangent.type == expected

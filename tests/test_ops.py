"""The registry, walked: every operator's rules agree with each other, calculus and PyTorch."""

from __future__ import annotations

import importlib
import math

import numpy as np
import op_checks
import pytest
import torch_functions
from hypothesis import given
from hypothesis import strategies as st
from op_checks import Case

from graphc import ops
from graphc.ops.registry import Sample, all_ops

# Without a chain rule, on purpose: a position is no smooth function of the operand.
NOT_DIFFERENTIABLE = {"argmax", "batch_parts"}
CASES = op_checks.cases()


def where_op(test) -> list[Case]:
    return [case for case in CASES if test(all_ops()[case.op])]


@pytest.mark.parametrize("name", all_ops())
def test_definition_is_whole(name):
    op = all_ops()[name]
    assert op.samples(), "no samples"
    assert (op.vjp is None) == (name in NOT_DIFFERENTIABLE), "no chain rule"
    assert (op.lower is None) != (op.decompose is None), "needs either lower or decompose"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_types(case, dtype):
    op_checks.check_types(case, dtype)


@pytest.mark.parametrize("case", where_op(lambda op: op.decompose), ids=str)
def test_decompose(case):
    op_checks.check_decompose(case)


@pytest.mark.parametrize("case", where_op(lambda op: op.lower), ids=str)
def test_lower(case):
    op_checks.check_lower(case, "float64")


@pytest.mark.parametrize("case", where_op(lambda op: op.lower), ids=str)
def test_lower_float32(case):
    op_checks.check_lower(case, "float32", limit=5)


GRADIENT_CASES = [c for c in where_op(lambda op: op.vjp) if c.gradient_slots()]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_cotangent_types(case):
    op_checks.check_linear_type(case)


def has_derivative(case: Case) -> bool:
    """Finite float results (not the mean of nothing, not padding with infinity)."""
    results = case.evaluate("float64")
    floats = [a for a in results if a.dtype.kind == "f"]
    finite = all(np.isfinite(a).all() for a in floats)
    return bool(floats) and finite and case.op not in op_checks.BLOCKING


SMOOTH_CASES = [case for case in GRADIENT_CASES if has_derivative(case)]


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=str)
def test_gradient(case):
    op_checks.check_gradient(case, order=1)


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=str)
def test_second_derivative(case):
    op_checks.check_gradient(case, order=2)


@pytest.mark.parametrize("case", [c for c in CASES if c.op in torch_functions.FUNCTIONS], ids=str)
def test_torch(case, torch):
    torch_functions.check(torch, case)


@pytest.mark.parametrize("case", torch_functions.EDGE_CASES, ids=str)
def test_torch_at_the_edges(case, torch):
    torch_functions.check(torch, case)


FACTORS = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4)


@given(FACTORS, st.randoms(use_true_random=False))
def test_reshape_lowers_between_any_two_shapes(shape, random):
    # Group the prime factors, in another order, into another shape of the same volume.
    factors = list(shape)
    random.shuffle(factors)
    target = [1]
    for factor in factors:
        if random.random() < 0.5:
            target.append(factor)
        else:
            target[-1] *= factor
    array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    op_checks.check_lower(Case("reshape", 0, Sample((array,), {"shape": tuple(target)})), "float64")


def test_all_names_are_exported():
    modules = sorted({op.infer.__module__ for op in all_ops().values()} - {"graphc.ops.pointwise"})
    assert len(modules) > 8
    for module in [*modules, "graphc.ops.elementwise", "graphc.ops.activation"]:
        for name in importlib.import_module(module).__all__:
            assert name in ops.__all__, f"graphc.ops does not export {module}.{name}"
            assert callable(getattr(ops, name))
            assert getattr(ops, name).__doc__, f"{name} has no docstring"


def test_float32_results_stay_close_to_float64():
    for case in where_op(lambda op: op.lower or op.decompose):
        for low, high in zip(case.evaluate("float32"), case.evaluate("float64"), strict=True):
            if low.dtype.kind == "f" and case.op not in ("floor", "ceil"):
                np.testing.assert_allclose(low, high, rtol=1e-4, atol=1e-4, err_msg=str(case))

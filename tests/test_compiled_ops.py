"""Every operator, compiled: forward and every gradient against the interpreter."""

from __future__ import annotations

import compile_checks
import op_checks
import pytest
from op_checks import Case

import graphc as gc

CASES = op_checks.cases()
# Operators of more than one kernel, or whose kernels depend on what they are fused with.
COMPOSITE = {
    "softmax",
    "log_softmax",
    "logsumexp",
    "softmax_cross_entropy",
    "var",
    "mean",
    "batch_norm",
    "max_pool2d",
    "matmul",
    "gelu",
}


def representative(most: int = 4) -> list[Case]:
    """The largest sample of every operator for each set of attributes and operand kinds, at most
    `most` of an operator: the first, the last and some between them."""
    best: dict[tuple, tuple[int, Case]] = {}
    for case in CASES:
        kinds = tuple(a.dtype.kind for a in case.sample.inputs)
        key = (case.op, repr(sorted(case.sample.attrs.items(), key=str)), kinds)
        size = sum(a.size for a in case.sample.inputs)
        if key not in best or size > best[key][0]:
            best[key] = (size, case)
    chosen: dict[str, list[Case]] = {}
    for _, case in best.values():
        chosen.setdefault(case.op, []).append(case)
    found = []
    for cases in chosen.values():
        last = len(cases) - 1
        steps = min(most, len(cases))
        picks = sorted({round(i * last / max(steps - 1, 1)) for i in range(steps)})
        found += [cases[i] for i in picks]
    return found


def pipeline(fused: bool):
    return gc.default_pipeline().with_options("fuse", enabled=fused)


def test_every_operator_is_represented():
    from graphc.ops.registry import all_ops

    assert {case.op for case in representative()} == set(all_ops())


def test_forward_and_gradients():
    found = compile_checks.Samples(representative(), "float32", gradients=True).failures()
    assert not found


def test_composites_without_fusion():
    cases = [case for case in representative(most=1) if case.op in COMPOSITE]
    samples = compile_checks.Samples(cases, "float32", gradients=True)
    assert not samples.failures(pipeline=pipeline(fused=False))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_sample(dtype, fused):
    samples = compile_checks.Samples(CASES, dtype, gradients=True)
    assert not samples.failures(pipeline=pipeline(fused))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_empty_operands(dtype):
    """Samples with a dimension of 0: no kernel, or one whose result is its identity."""
    cases = [case for case in CASES if any(a.size == 0 for a in case.sample.inputs)]
    assert len({case.op for case in cases}) > 8
    assert not compile_checks.Samples(cases, dtype, gradients=True).failures()

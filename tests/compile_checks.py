"""Compiled against interpreted: one joint graph, run both ways, compared array by array."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from op_checks import DETACHED, Case

import graphc as gc
from graphc.ir import Graph, Value
from graphc.ops.registry import get
from graphc.runtime.executable import Executable

# Relative to the largest magnitude of the array: both sides round, in another order.
TOLERANCE = {"float32": 3e-5, "float64": 1e-12}


def difference(got: np.ndarray, expected: np.ndarray, tolerance: float | None = None) -> str:
    """What tells a compiled array from the interpreter's, or "".

    Floats may differ by `tolerance` of the largest finite magnitude, infinities and NaN must agree;
    integers and bools are equal.
    """
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"{got.dtype}{got.shape} instead of {expected.dtype}{expected.shape}"
    if expected.dtype.kind != "f":
        wrong = int((got != expected).sum())
        return f"{wrong} of {got.size} elements differ" if wrong else ""
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return "infinities or NaN differ"
    if not np.isfinite(got[finite]).all():
        return f"{int((~np.isfinite(got[finite])).sum())} elements are not finite"
    if not finite.any():
        return ""
    scale = max(float(np.abs(expected[finite]).max()), 1e-6)
    error = float(np.abs(got[finite].astype(np.float64) - expected[finite]).max())
    limit = TOLERANCE[expected.dtype.name] if tolerance is None else tolerance
    return f"by {error:.3g} of {scale:.3g}" if error > limit * scale else ""


def differences(
    got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance=None
) -> dict[str, str]:
    """What differs, by output name; empty if all agree."""
    assert list(got) == list(expected)
    found = {name: difference(got[name], expected[name], tolerance) for name in expected}
    return {name: text for name, text in found.items() if text}


def both(graph: Graph, **options: Any) -> tuple[Executable, Executable]:
    """The compiled executable, its arena poisoned, and the interpreted one."""
    reference = {k: v for k, v in options.items() if k not in ("pipeline", "threads", "check")}
    compiled = gc.compile(graph, **options)
    compiled.poison()
    return compiled, gc.compile(graph, target="interpret", **reference)


def assert_same(
    graph: Graph,
    feeds: Mapping[str, Any],
    steps: int = 1,
    tolerance: float | None = None,
    **options: Any,
) -> tuple[Executable, Executable]:
    """Compile, run `steps` times both ways on the same arrays, compare outputs and the state."""
    compiled, reference = both(graph, **options)
    for step in range(steps):
        compiled.poison()
        got, expected = compiled.run(feeds), reference.run(feeds)
        found = differences(got, expected, tolerance)
        assert not found, f"step {step}: {found}"
    found = differences(compiled.state(True), reference.state(True), tolerance)
    assert not found, f"state after {steps} steps: {found}"
    return compiled, reference


# ---- samples of operators, many in one graph


class Samples:
    """Many samples of operators in one graph: independent inputs, outputs and gradients.

    Outputs `<case>/<number>`; the scalar `loss` is the sum of all differentiable outputs, weighted
    by fixed random inputs, so that one compile call gives every gradient.
    """

    def __init__(self, cases: Iterable[Case], dtype: str, gradients: bool):
        self.graph = Graph("samples")
        self.feeds: dict[str, np.ndarray] = {}
        self.wrt: list[str] = []
        rng = np.random.default_rng(3)
        terms: list[Value] = []
        for number, case in enumerate(cases):
            label = f"{case.op}_{case.number}"
            arrays = case.operands(dtype)
            operands = []
            for slot, array in enumerate(arrays):
                name = f"{label}.operand{slot}"
                operands.append(self.graph.input(name, array.shape, array.dtype.name))
                self.feeds[name] = array
            node = self.graph.add(case.op, operands, case.sample.attrs, name=label)
            self.graph.output(**{f"{label}/{v.index}": v for v in node.outputs})
            if not gradients or not differentiable(case):
                continue
            detached = DETACHED.get(case.op, ())
            for value in node.outputs:
                if value.type.is_float and value.index not in detached:
                    name = f"weight{number}_{value.index}"
                    weight = self.graph.input(name, value.shape, dtype)
                    self.feeds[name] = rng.uniform(-1, 1, value.shape).astype(dtype)
                    cast = value if value.dtype == dtype else gc.cast(value, dtype)
                    terms.append(gc.sum(gc.mul(cast, weight)))
            self.wrt += [operands[slot].name for slot in case.gradient_slots()]
        if terms:
            self.graph.output(loss=gc.sum(gc.stack(terms)))

    def options(self) -> dict[str, Any]:
        outputs = [name for name in self.graph.outputs if name != "loss"]
        if self.wrt:
            return {"outputs": outputs, "loss": "loss", "gradients": self.wrt}
        return {"outputs": outputs}

    def failures(self, **options: Any) -> dict[str, str]:
        """Outputs and gradients that differ from the interpreter's."""
        compiled, reference = both(self.graph, **self.options(), **options)
        feeds = {name: self.feeds[name] for name in compiled.inputs}
        return differences(compiled.run(feeds), reference.run(feeds))


def differentiable(case: Case) -> bool:
    """Whether a sample has a gradient and finite results (so that the summed loss stays finite)."""
    if get(case.op).vjp is None or not case.gradient_slots():
        return False
    results = [a for a in case.evaluate("float64") if a.dtype.kind == "f"]
    return bool(results) and all(np.isfinite(a).all() for a in results)


def layers(graph: Graph) -> Sequence[str]:
    """Names of the regions of a compiled graph, for messages."""
    return [node.name for node in graph if node.op == "fused"]

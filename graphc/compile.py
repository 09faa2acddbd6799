"""The whole pipeline on one screen: a declared graph in, an executable out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphc import errors
from graphc.ir import Graph, Value
from graphc.runtime.executable import Executable, InterpretedExecutable
from passes.assign_layouts import AssignLayouts
from passes.autodiff import differentiate
from passes.base import Pipeline
from passes.explicit_padding import ExplicitPadding
from passes.fuse import Fuse
from passes.pipeline import BACKWARD, FORWARD, MEMORY
from passes.set_mode import SetMode

TARGETS = ("cpu", "interpret")


def compile(
    graph: Graph,
    *,
    outputs: Sequence[str],
    dims: Mapping[str, int] | None = None,
    loss: str | None = None,
    gradients: Sequence[str] = (),
    optimizer=None,
    target: str = "cpu",
    threads: int | None = None,
    mode: str | None = None,
    check: bool = False,
    seed: int = 0,
    pipeline: Pipeline | None = None,
) -> Executable:
    bound, records = transform(graph, outputs, dims or {}, loss, gradients, optimizer, mode, seed)
    if target == "interpret":
        return InterpretedExecutable(bound, seed)
    from graphc.codegen import simd
    from graphc.codegen.program import can_lower, lower_graph, plan_launches
    from graphc.runtime.cpu import CpuExecutable
    from graphc.runtime.team import available_cores

    lanes, threads = simd.host_lanes(), threads or available_cores()
    passes = (ExplicitPadding(), Fuse(), AssignLayouts(lanes, can_lower=can_lower))
    fused, more = Pipeline(passes).run(bound)
    kernels = lower_graph(fused)
    planned, final = MEMORY.run(fused)
    launches = plan_launches(planned, kernels, lanes, threads)
    executable = CpuExecutable(planned, launches, threads, seed)
    executable.records = (*records, *more, *final)
    return executable


def transform(graph, outputs, dims, loss, gradients, optimizer, mode, seed):
    """Bind, differentiate, add the optimizer and simplify: everything before targets differ."""
    training = mode == "train" if mode else bool(loss or gradients or optimizer)
    wanted = {name: graph.value(name) for name in [*outputs, *([loss] if loss else [])]}
    g = graph.copy()
    g.outputs = {name: g.value(value.name) for name, value in wanted.items()}
    symbolic = next((n.types[0].shape[0] for n in g.inputs.values() if n.types[0].rank and isinstance(n.types[0].shape[0], str)), None)
    g = g.bind(dims)
    g.annotations["batch"] = dims.get(symbolic)
    g, records = (Pipeline((SetMode(training, seed),)) + FORWARD).run(g)
    start = len(g)
    if gradients or optimizer:
        if loss is None:
            raise errors.GradientError("gradients or an optimizer need loss=...: the name of the scalar to differentiate")
        trained = [n for n, p in g.parameters.items() if optimizer and p.attrs["trainable"]]
        names = list(dict.fromkeys([*gradients, *trained]))
        values = differentiate(g, g.value(loss), [g.value(n) for n in names])
        _mark(g, start, "backward")
        found: dict[str, Value] = dict(zip(names, values, strict=True))
        for name in gradients:
            g.outputs[f"grad:{name}"] = found[name]
        if optimizer:
            start = len(g)
            optimizer.apply(g, {n: found[n] for n in trained})
            _mark(g, start, "update")
    g.outputs = {k: v for k, v in g.outputs.items() if k in outputs or k.startswith("grad:")}
    g, more = BACKWARD.run(g)
    return g, (*records, *more)


def _mark(graph: Graph, start: int, phase: str) -> None:
    for node in graph.nodes[start:]:
        node.origin = replace(node.origin, phase=phase)

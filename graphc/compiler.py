"""The whole pipeline on one screen: a declared graph in, an executable out."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from graphc import errors
from graphc.collector import collector_paused
from graphc.init import InitialValues
from graphc.ir import Graph, Node, Value, called_from, caller
from graphc.optim import Optimizer
from graphc.runtime.executable import Executable, InterpretedExecutable
from graphc.runtime.programs import Program, ProgramFile
from graphc.runtime.team import available_cores
from passes.assign_layouts import AssignLayouts
from passes.autodiff import differentiate
from passes.base import Observer, PassRecord, Pipeline, report
from passes.choose_convolutions import Choose, ChooseConvolutions, predicted_best
from passes.explicit_padding import ExplicitPadding
from passes.fold_batch_norm import FoldBatchNorm
from passes.fuse import Fuse
from passes.gather_updates import GatherUpdates
from passes.hoist_parameters import HoistParameters
from passes.parallelize import Parallelize
from passes.pipeline import BACKWARD, FORWARD
from passes.plan_memory import PlanMemory
from passes.read_padded import ReadPadded
from passes.receive_padded import ReceivePadded
from passes.rematerialize import Rematerialize
from passes.repeat_affine import RepeatAffine
from passes.repeat_padding import RepeatPadding
from passes.schedule import Schedule
from passes.set_mode import SetMode
from passes.share_scratch import ShareScratch
from passes.sum_by_blocks import SumByBlocks
from passes.winograd_convolutions import WinogradConvolutions

TARGETS = ("cpu", "cuda", "cuda-emulated", "interpret")
PRECISIONS = ("float32", "strict")
TENSOR_PRECISIONS = ("tf32", "bfloat16")  # of the CUDA targets
log = logging.getLogger("graphc.kernels")


def compile(
    graph: Graph,
    *,
    outputs: Sequence[str],
    dims: Mapping[str, int] | None = None,
    loss: str | None = None,
    gradients: Sequence[str] = (),
    optimizer: Optimizer | None = None,
    target: str = "cpu",
    threads: int | None = None,
    memory_limit: int | str | None = None,
    precision: str = "float32",
    mode: str | None = None,
    tune: bool = False,
    check: bool = False,
    seed: int = 0,
    pipeline: Pipeline | None = None,
) -> Executable:
    """Compile a graph into an executable that computes `outputs` in one native call.

    outputs    names of outputs (or of any values) to return
    dims       sizes of the symbolic dimensions, e.g. {"N": 64}
    loss       name of the scalar to differentiate; needed for `gradients` and `optimizer`
    gradients  names of parameters or inputs; each adds an output "grad:<name>"
    optimizer  an optimizer of `gc.optim`: one call is a whole training step
    target     "cpu" (native code), "cuda" (an NVIDIA GPU), "cuda-emulated" (its kernels, thread by
               thread on the CPU) or "interpret" (NumPy references, the oracle)
    threads    threads of one call; default: every core this process may use
    memory_limit  most bytes of activations, e.g. "200MB"; the cheapest values are computed again
                  until the plan fits, or the graph is refused with the least that is possible
    precision  "float32"; "strict" forbids algorithms that round more than a direct convolution;
               "tf32" and "bfloat16" (CUDA targets): large products on tensor cores, their factors
               rounded to 10 or 7 bits after the point, sums in float32
    mode       "train" or "infer", for batch norm and dropout; default: train where a loss is
               differentiated, else infer
    tune       measure algorithms and register tiles instead of predicting them; remembers what was
               fastest, so that the next compilation measures nothing (docs/tuning.md)
    check      compare every kernel's results with the interpreter at each call; raises CheckError
    seed       of initial parameters and dropout
    pipeline   the passes between the joint graph and the plan, instead of `default_pipeline()`

    Raises GraphcError subclasses, each naming the node and what to change.
    """
    _check_options(target, threads, precision, mode, outputs, gradients, optimizer, check, tune)
    if check and memory_limit is not None:
        raise errors.CompileError(
            "check=True keeps every value in memory of its own: leave memory_limit out"
        )
    here, declared, limit = caller(), graph.copy(), _bytes(memory_limit)
    training = bool(gradients or optimizer)
    first = InitialValues(seed)
    first.draw(declared.parameters.values(), threads or available_cores())
    backend: _Backend | None = None
    if target == "cpu":
        backend = _cpu_backend(threads, precision, check, training, tune)
    elif target != "interpret":
        backend = _cuda_backend(target, precision, check, training)

    @called_from(here)
    def shaped(
        observer: Observer | None = None,
    ) -> tuple[Graph, tuple[PassRecord, ...]]:
        """Every pass; `Executable.dump` runs them again, with an observer."""
        joint, records = transform(
            declared,
            outputs,
            dims or {},
            loss,
            gradients,
            optimizer,
            mode,
            seed,
            backend.algorithms if backend else None,
            observer,
        )
        if backend is None:
            return joint, records
        fused, more = (pipeline or backend.shape).run(joint, observer=observer, consume=True)
        backend.lower(fused)
        planned, final = backend.place.run(fused, observer=observer, consume=limit is None)
        if limit is not None and planned.annotations["memory"].arena_bytes > limit:
            planned, final = _placed_within(limit, backend, fused, observer)
        return planned, (*records, *more, *final)

    if backend is None:
        joint, records = shaped()
        executable: Executable = InterpretedExecutable(joint, first)
    else:
        kept: ProgramFile | None = None
        if backend.machine is not None and pipeline is None:
            options = {
                "outputs": list(outputs),
                "dims": dict(dims or {}),
                "loss": loss,
                "gradients": list(gradients),
                "optimizer": optimizer,
                "limit": limit,
                "precision": precision,
                "mode": mode,
                "check": check,
                "seed": seed if any("seed" in node.attrs for node in declared) else None,
            }
            kept = ProgramFile(declared, here, options | backend.machine)
        program = kept.load() if kept else None
        if program is None:
            with collector_paused():
                planned, records = shaped()
            program = Program(planned, backend.plan(planned), records)
            if kept:
                kept.store(program)
        executable, records = backend.build(program.graph, program.launches, first), program.records
    executable.records, executable.replay = records, shaped
    if log.isEnabledFor(logging.INFO):
        for info in executable.kernels():
            log.info("%s", info)
    return executable


def _placed_within(
    limit: int, backend: _Backend, fused: Graph, observer: Observer | None
) -> tuple[Graph, tuple[PassRecord, ...]]:
    """The plan of a graph that computes values again. Raises CompileError.

    Groups must not move what is computed again, and must go where they make the plan too large, as
    all values of a group live at once."""
    repeat = Rematerialize(limit, backend.seconds, updates_in_place=True)
    place = backend.place
    if repeat.name in place.names:
        place = place.without(repeat.name)
    last = "gather_updates" if "gather_updates" in place.names else "schedule"
    small = place.with_inserted(repeat, after=last)
    if "parallelize" not in small.names:
        return small.run(fused, observer=observer)
    planned, records = small.with_options("parallelize", reorder=False).run(
        fused, observer=observer
    )
    if planned.annotations["memory"].arena_bytes > limit:
        planned, records = small.without("parallelize").run(fused, observer=observer)
    return planned, records


def _bytes(limit: int | str | None) -> int | None:
    """A number of bytes, from a number or a text such as "200MB" or "1.5 GiB"."""
    if limit is None or (isinstance(limit, int) and limit > 0):
        return limit
    number = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    match = re.fullmatch(rf"\s*{number}\s*([kMG]?)(i?)B?\s*", str(limit))
    if isinstance(limit, int) or match is None:
        raise errors.CompileError(f'memory_limit={limit!r}: use bytes or a text such as "200MB"')
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " kMG".index(match[2] or " "))


@dataclass(frozen=True)
class _Backend:
    """What a target that compiles kernels does with a graph, in this order.

    algorithms  rewrites before and after differentiation
    shape       passes that decide what becomes a kernel, and layouts
    lower       renders kernels, or refuses; marks what the memory plan has to know
    place       passes that order kernels and place values
    seconds     what a region costs, for choosing what is computed again under a memory limit
    plan        the launches of a planned graph
    build       the executable of a planned graph and its launches, from the values it starts with
    machine     what else the plan and the launches depend on; None where they are not kept on disk
    """

    algorithms: tuple[Pipeline, Pipeline]
    shape: Pipeline
    lower: Callable[[Graph], Any]
    place: Pipeline
    seconds: Callable[[Node], float]
    plan: Callable[[Graph], list[Any]]
    build: Callable[[Graph, list[Any], InitialValues], Executable]
    machine: dict[str, int] | None = None


def _cpu_backend(
    threads: int | None, precision: str, check: bool, training: bool, tune: bool
) -> _Backend:
    from graphc.codegen import target as cpu_target
    from graphc.inspect.work import predicted_seconds
    from graphc.runtime.cpu import CpuExecutable
    from graphc.runtime.linker import start_compiling

    start_compiling()
    cores, lanes = threads or available_cores(), cpu_target.host_lanes()
    seconds = partial(predicted_seconds, lanes=lanes, threads=cores)
    choose, tuner = predicted_best, None
    if tune:
        from graphc.tuning import Tuner

        tuner = Tuner(cores, training, _progress(), _progress("choices measured"))
        choose = tuner.algorithm

    def plan(planned: Graph) -> list[Any]:
        if tuner:
            return tuner.launches(planned)
        with collector_paused():
            return cpu_target.plan_launches(planned, lanes, cores)

    def build(planned: Graph, launches: list[Any], first: InitialValues) -> Executable:
        executable = CpuExecutable(planned, launches, cores, first, _progress(), check=check)
        executable.tuning = tuner.tuning if tuner else None
        return executable

    return _Backend(
        algorithms("cpu", precision, training, choose),
        default_pipeline(),
        cpu_target.lower_graph,
        memory_pipeline(cores, check, seconds if training else None),
        seconds,
        plan,
        build,
        None if tune else {"cores": cores, "lanes": lanes},
    )


def _cuda_backend(target: str, precision: str, check: bool, training: bool) -> _Backend:
    from graphc.codegen import cuda_program
    from graphc.inspect.work import predicted_seconds
    from graphc.runtime.cuda import CudaExecutable, open_device

    device = open_device(target)

    def build(planned: Graph, steps: list[Any], first: InitialValues) -> Executable:
        return CudaExecutable(target, planned, steps, device, first, _progress(), check=check)

    return _Backend(
        algorithms(target, precision, training),
        default_pipeline(target=target),
        lambda graph: cuda_program.lower_graph(graph, precision),
        Pipeline(
            (
                HoistParameters(),
                Schedule(updates_in_place=True),
                PlanMemory(updates_in_place=not check, reuse=not check),
            )
        ),
        # Of a CPU with many lanes: only the ratios count.
        partial(predicted_seconds, lanes=16, threads=1),
        lambda graph: cuda_program.plan_steps(graph, precision),
        build,
    )


def default_pipeline(layout: str | None = None, target: str = "cpu") -> Pipeline:
    """Shape the work: padding, fusion; for the CPU, layouts.

    Edit it as data and pass `pipeline=`."""
    if target != "cpu":  # values are rows: threads read neighbours, not vectors
        return Pipeline((ExplicitPadding(rows=True), Fuse(pooled=False)))
    from graphc.codegen import core
    from graphc.codegen import target as cpu_target

    return Pipeline(
        (
            ExplicitPadding(),
            SumByBlocks(cpu_target.host_lanes(), core.L3_BYTES),
            RepeatPadding(),
            ReadPadded(),
            RepeatAffine(),
            Fuse(),
            AssignLayouts(cpu_target.host_lanes(), layout, can_lower=cpu_target.can_lower),
        )
    )


def memory_pipeline(
    threads: int, check: bool = False, seconds: Callable[[Node], float] | None = None
) -> Pipeline:
    """Order the kernels, group those that go block by block, and place every value, for the CPU.

    With predicted `seconds` of regions, a large graph computes again what takes next to no time."""
    from graphc.codegen import core
    from graphc.codegen import target as cpu_target
    from graphc.runtime.cpu import COPY_BYTES

    return Pipeline(
        (
            HoistParameters(),
            *(() if check else (ReceivePadded(COPY_BYTES),)),
            Schedule(updates_in_place=True),
            GatherUpdates(),
            # Not all of a group is live at once: a little more than the cache.
            Parallelize(cpu_target.blocks, 3 * core.L2_BYTES // 2, threads),
            *(() if check else (ShareScratch(threads),)),
            *(() if check or seconds is None else (_spare_memory(seconds),)),
            PlanMemory(updates_in_place=not check, reuse=not check),
        )
    )


def _spare_memory(seconds: Callable[[Node], float]) -> Rematerialize:
    """Half a percent of the time, which nobody can measure, for a tenth of the memory or more."""
    return Rematerialize(None, seconds, 0.005, from_bytes=64_000_000, updates_in_place=True)


def algorithms(
    target: str,
    precision: str,
    training: bool,
    choose: Choose = predicted_best,
    layout: str | None = None,
) -> tuple[Pipeline, Pipeline]:
    """Rewrites to faster algorithms that round a little more than the definition.

    Those before and those after the graph is differentiated. `choose` decides for each convolution;
    `layout`, "batch" or "channels", says what lies in the lanes, by default what is cheaper."""
    if target == "interpret" or precision == "strict":
        return Pipeline(), Pipeline()
    if target != "cpu":
        return Pipeline(() if training else (FoldBatchNorm(),)), Pipeline()
    from graphc.codegen.target import host_lanes

    first = ChooseConvolutions(host_lanes(), training, choose, layout)
    before = Pipeline((first,) if training else (FoldBatchNorm(), first))
    return before, Pipeline((WinogradConvolutions(host_lanes(), training, choose),))


def transform(
    graph: Graph,
    outputs: Sequence[str],
    dims: Mapping[str, int],
    loss: str | None = None,
    gradients: Sequence[str] = (),
    optimizer: Optimizer | None = None,
    mode: str | None = None,
    seed: int = 0,
    algorithms: tuple[Pipeline, Pipeline] | None = None,
    observer: Observer | None = None,
) -> tuple[Graph, tuple[PassRecord, ...]]:
    """Bind, choose algorithms, differentiate, add the optimizer and simplify."""
    if (gradients or optimizer) and loss is None:
        raise errors.GradientError(
            "gradients and optimizers need loss=...: the name of the scalar to differentiate"
        )
    names = [*outputs, *([loss] if loss else [])]
    wanted = {name: graph.value(name).name for name in names}
    g = graph.copy()
    g.outputs = {name: g.value(value) for name, value in wanted.items()}
    batch = _batch_dimension(g)
    g = _bind(g, dims)
    g.annotations["batch"] = dims.get(batch) if batch else None

    training = mode == "train" if mode else bool(gradients or optimizer)
    if observer:
        observer(PassRecord("declared", 0.0, len(graph), len(graph)), graph)
        observer(PassRecord("bind", 0.0, len(graph), len(g)), g)
    before, after = algorithms or (Pipeline(), Pipeline())
    forward = Pipeline((SetMode(training, seed),)) + FORWARD + before
    g, records = forward.run(g, observer=observer, consume=True)
    if loss is not None and (gradients or optimizer):
        began, declared = time.perf_counter(), len(g)
        trained = [n for n, p in g.parameters.items() if optimizer and p.attrs["trainable"]]
        wrt = list(dict.fromkeys([*gradients, *trained]))
        start, values = len(g), [_source(g, graph, n) for n in wrt]
        found = dict(zip(wrt, differentiate(g, g.value(loss), values), strict=True))
        _mark(g, start, "backward")
        g.outputs |= {f"grad:{name}": found[name] for name in gradients}
        if optimizer:
            start = len(g)
            optimizer.apply(g, {n: found[n] for n in trained})
            _mark(g, start, "update")
        records += (PassRecord("differentiate", time.perf_counter() - began, declared, len(g)),)
        report(records[-1], g, observer)
    keep = {*outputs, *(f"grad:{name}" for name in gradients)}
    g.outputs = {k: v for k, v in g.outputs.items() if k in keep}
    g, more = (after + BACKWARD).run(g, observer=observer, consume=True)
    g.annotations["unneeded_inputs"] = tuple(name for name in graph.inputs if name not in g.inputs)
    return g, (*records, *more)


def _source(g: Graph, declared: Graph, name: str) -> Value:
    """The value to differentiate by; the declared graph's error if there is none of that name."""
    return g.value(name) if name in g or name in g.outputs else declared.value(name)


def _bind(g: Graph, dims: Mapping[str, int]) -> Graph:
    known = {d for n in g for t in n.types for d in t.shape if isinstance(d, str)}
    unknown = sorted(set(dims) - known)
    if unknown:
        names = ", ".join(sorted(known)) or "no symbolic dimension"
        raise errors.UnboundDimensionError(
            f"dims has {unknown[0]!r}, but graph {g.name!r} has {names}"
        )
    return g.bind(dims)


def _batch_dimension(g: Graph) -> str | None:
    """The symbolic leading dimension of the inputs: the batch."""
    leading = [n.types[0].shape[0] for n in g.inputs.values() if n.types[0].rank]
    return next((d for d in leading if isinstance(d, str)), None)


def _mark(graph: Graph, start: int, phase: str) -> None:
    for node in graph.nodes[start:]:
        node.origin = replace(node.origin, phase=phase)


def _check_options(
    target: str,
    threads: Any,
    precision: str,
    mode: str | None,
    outputs: Sequence[str],
    gradients: Sequence[str],
    optimizer: Any,
    check: bool,
    tune: bool,
) -> None:
    if target not in TARGETS:
        raise errors.CompileError(
            f"target={target!r}: this version compiles for {', '.join(map(repr, TARGETS))}"
        )
    known = (*PRECISIONS, *(TENSOR_PRECISIONS if target.startswith("cuda") else ()))
    if precision not in known:
        raise errors.CompileError(
            f"precision={precision!r}: target={target!r} has {', '.join(map(repr, known))}"
        )
    if check and precision in TENSOR_PRECISIONS:
        raise errors.CompileError(
            f"check=True compares kernels in float32, precision={precision!r} rounds their "
            "operands: leave one of them out"
        )
    if mode not in (None, "train", "infer"):
        raise errors.CompileError(f"mode={mode!r}: use 'train', 'infer' or None")
    if tune and target != "cpu":
        raise errors.CompileError(
            f"tune=True measures kernels of target='cpu' only, not of {target!r}: leave one of "
            "them out"
        )
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= 256):
        raise errors.CompileError(f"threads={threads!r}: use 1 to 256, or None for every core")
    for what, names in (("outputs", outputs), ("gradients", gradients)):
        if isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise errors.CompileError(
                f"{what}={names!r}: pass a list of names, e.g. {what}=['loss']"
            )
    if not (outputs or gradients or optimizer):
        raise errors.CompileError(
            "nothing to compute: name outputs=[...], gradients=[...] or an optimizer"
        )
    if optimizer is not None and not hasattr(optimizer, "apply"):
        raise errors.CompileError(
            f"optimizer={optimizer!r}: pass an optimizer, e.g. gc.optim.SGD(lr=0.1)"
        )


def _progress(what: str = "kernels compiled") -> Callable[[int, int, float, str], None]:
    """On a terminal, one line that counts what is done, once that takes a while.

    A total of 0 is one that is not known."""
    started = time.perf_counter()

    def report(done: int, total: int, seconds: float, name: str) -> None:
        count = f"{done}/{total}" if total else str(done)
        log.info("%s %s after %.1f s: %s", count, what, seconds, name)
        if sys.stderr.isatty() and time.perf_counter() - started > 0.5:
            end = "\n" if done == total else "\r"
            sys.stderr.write(f"graphc: {count} {what}, {seconds:.1f} s{end}")
            sys.stderr.flush()

    return report

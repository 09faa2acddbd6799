"""`compile(..., tune=True)`: choose by measurement what the cost models only predict.

The models rank the candidates; the first few run on this machine, in turns and on memory of their
own, and the fastest is kept: first the algorithm of each convolution, then the register tile of
each heavy kernel. A choice is remembered as a note in the kernel cache, under a key of the machine
and of all that the candidates are made from: it never goes stale, serves every network that has the
same layer or kernel, and gives the same program whenever it is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import networkx as nx

from graphc.codegen.program import Launch, lower_graph, plan_launches, rank_launches
from graphc.codegen.schedule import multiply_adds
from graphc.codegen.simd_host import host_lanes
from graphc.init import InitialValues
from graphc.ir import Graph, Node, Value, block_bytes, root
from graphc.ops.reduce import sum as sum_of
from graphc.ops.registry import apply
from graphc.runtime.arena import Arena
from graphc.runtime.build import Progress
from graphc.runtime.cache import default_cache
from graphc.runtime.cpu import CpuExecutable
from graphc.runtime.driver import load_driver
from graphc.runtime.linker import KernelSource, load_kernels
from graphc.runtime.table import LaunchTable
from graphc.runtime.team import get_team

TILES: Final = 5  # candidates of each kernel, the predicted one among them
ALGORITHMS: Final = 3  # candidates of each convolution, the direct one among them
SECONDS: Final = 120.0  # for one compilation; what is left over then stays as predicted
_EACH_SECONDS: Final = 0.15
_ROUNDS: Final = (5, 200)  # least and most turns of each candidate
_HEAVY: Final = 10_000  # multiply-adds; for less it is not worth compiling candidates
# What is predicted stays unless another candidate takes at most this share of its time.
_BETTER: Final = 0.95
# Algorithms predicted to cost so many times the best are not tried.
_HOPELESS: Final = 2.5

Run = Callable[[], float]  # runs a candidate once; the seconds that took


@dataclass
class Tuning:
    """What `tune=True` did in one compilation.

    measured, recalled, skipped: choices ("conv1 algorithm", "fc1 tile") whose candidates ran, that
    a note had, and for which no time was left, so that they are as predicted. changed: (predicted,
    chosen) where the prediction was not the fastest.
    """

    measured: list[str] = field(default_factory=list)
    recalled: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.measured)} choices measured, {len(self.recalled)} known from before"
        if self.skipped:
            text += f", no time for {len(self.skipped)}"
        lines = [f"{n}: {chosen} instead of {old}" for n, (old, chosen) in self.changed.items()]
        return "\n".join([text, *lines])


class Tuner:
    """Chooses by measurement for one compilation.

    threads, training: of the program. compiling, measuring: hear how that goes."""

    def __init__(
        self,
        threads: int,
        training: bool,
        compiling: Progress | None = None,
        measuring: Progress | None = None,
    ):
        self.tuning = Tuning()
        self._threads, self._training = threads, training
        self._compiling, self._measuring = compiling, measuring
        self._cache = default_cache()
        self._begin = time.perf_counter()
        self._chosen: dict[str, str] = {}  # by key
        self._seen: set[str] = set()

    # ---- algorithms

    def algorithm(self, node: Node, costs: dict[str, float], mode: str) -> str:
        """The fastest algorithm of a convolution, or of one of its gradients.

        `costs` are predicted; `mode` says what lies in the lanes. A `passes.Choose`."""
        from graphc.compiler import predicted_best

        predicted = predicted_best(node, costs, mode)
        hopeless = _HOPELESS * min(costs.values())
        ranked = sorted((a for a in costs if costs[a] <= hopeless), key=costs.__getitem__)
        candidates = list(dict.fromkeys([predicted, *ranked]))[:ALGORITHMS]
        types = [str(v.type) for v in node.inputs]
        facts = [node.op, repr(sorted(node.attrs.items())), types, _learned(node.inputs[0])]
        facts += [mode, self._training, sorted(candidates), sorted(costs), _compiler_digest()]
        key = self._key(*facts)

        def build() -> list[Run]:
            return [_LayerRun(self._program(node, a, costs, mode)) for a in candidates]

        return self._choose(key, f"{node.name} algorithm", candidates, build)

    def _program(
        self, node: Node, algorithm: str, costs: dict[str, float], mode: str
    ) -> CpuExecutable:
        """A program of one convolution alone; where it is differentiated after the choice, with its
        gradients."""
        from graphc import compiler

        by_rows = any(a.endswith("rows") for a in costs)  # chosen before autodiff

        def choose(other: Node, others: dict[str, float], mode: str) -> str:
            """The algorithm where it is this choice; the gradients have choices of their own."""
            if others.keys() == costs.keys():
                return algorithm
            return compiler.predicted_best(other, others, mode) if by_rows else "direct"

        g, images = Graph("candidate"), node.inputs[0].sizes[0]
        # Gradients have the sizes they were made for in their attributes.
        batch = "N" if node.op == "conv2d" else images
        batched = [True, node.op == "conv2d_weight_grad"]  # whether an operand is images
        operands = []
        for slot, value in enumerate(node.inputs):
            name, (first, *rest) = f"operand{slot}", value.type.sizes
            shape = (batch if batched[slot] else first, *rest)
            if batched[slot] or self._training:
                operands.append(g.input(name, shape, value.dtype))
            else:  # weights, which are transformed when they are loaded
                operands.append(g.parameter(name, value.type.sizes, dtype=value.dtype))
        y = apply(node.op, *operands, **node.attrs)[0]
        g.output(y=y)
        gradients: list[str] = []
        if self._training and by_rows:
            cotangent = g.input("cotangent", y.shape, y.dtype)
            g.output(loss=sum_of(y * cotangent))
            gradients = [v.name for v in operands[0 if _learned(node.inputs[0]) else 1 :]]
        joint, _ = compiler.transform(
            g,
            ["y"],
            {"N": images} if batch == "N" else {},
            "loss" if gradients else None,
            gradients,
            algorithms=compiler.algorithms("cpu", "float32", self._training, choose, mode),
        )
        joint.annotations["batch"] = images
        fused, _ = compiler.default_pipeline().run(joint)
        lower_graph(fused)
        planned, _ = compiler.memory_pipeline(self._threads).run(fused)
        launches = plan_launches(planned, host_lanes(), self._threads)
        return CpuExecutable(planned, launches, self._threads, InitialValues(0), self._compiling)

    # ---- register tiles

    def launches(self, graph: Graph) -> list[Launch]:
        """The launches of a planned graph, each with the fastest of the tiles ranked first."""
        ranked = rank_launches(graph, host_lanes(), self._threads, TILES)
        heavy = [ways if multiply_adds(ways[0].kernel) >= _HEAVY else ways[:1] for ways in ranked]
        keys, tiles = [self._tiles_key(ways) for ways in heavy], [_tiles(ways) for ways in heavy]
        if not self._late():
            # All together, so that compiling processes share the work.
            unknown = [
                KernelSource("kernel", way.call.source)
                for key, names, ways in zip(keys, tiles, heavy, strict=True)
                if len(ways) > 1 and self._known(key, names) is None
                for way in ways
            ]
            load_kernels(unknown, progress=self._compiling)
        chosen = []
        for key, names, ways in zip(keys, tiles, heavy, strict=True):
            build = functools.partial(_kernel_runs, ways, self._threads)
            name = f"{ways[0].node.name} tile"
            best = self._choose(key, name, names, build) if len(ways) > 1 else names[0]
            chosen.append(ways[names.index(best)])
        return chosen

    def _tiles_key(self, ways: Sequence[Launch]) -> str:
        calls = sorted((way.call.source, way.call.numbers) for way in ways)
        return self._key("tile", ways[0].blocks, calls)

    # ---- choices

    def _key(self, *facts: Any) -> str:
        """Names a choice; the cache adds the machine and the versions of the compilers."""
        return self._cache.key(json.dumps([self._threads, *facts]), "choice")

    def _known(self, key: str, candidates: Sequence[str]) -> str | None:
        """What was chosen before, in this compilation or, as a note says, in another."""
        if key not in self._chosen:
            note = self._cache.get_note(key)
            if not isinstance(note, dict) or note.get("choice") not in candidates:
                return None
            self._chosen[key] = note["choice"]
        return self._chosen[key]

    def _choose(
        self, key: str, name: str, candidates: Sequence[str], build: Callable[[], list[Run]]
    ) -> str:
        """The choice for `name`; of `candidates` the first is the predicted one."""
        seen = key in self._seen
        self._seen.add(key)
        choice = self._known(key, candidates)
        if choice is not None:
            log = self.tuning.recalled
        elif self._late():
            choice, log = candidates[0], self.tuning.skipped
        else:
            seconds = _in_turns(build())
            choice, log = candidates[_fastest(seconds)], self.tuning.measured
            self._chosen[key] = choice
            self._cache.put_note(key, {"choice": choice, "seconds": seconds})
        if not seen:
            log.append(name)
            if self._measuring is not None:
                done = len(self.tuning.measured)
                self._measuring(done, 0, time.perf_counter() - self._begin, name)
        if choice != candidates[0]:
            self.tuning.changed[name] = (candidates[0], choice)
        return choice

    def _late(self) -> bool:
        return time.perf_counter() - self._begin > SECONDS


def _fastest(seconds: Sequence[float]) -> int:
    """The fastest candidate; the first, which is predicted to be, unless one is clearly faster."""
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return best if seconds[best] < _BETTER * seconds[0] else 0


def _in_turns(runs: Sequence[Run]) -> list[float]:
    """Seconds of each candidate. The first quartile: interruptions shall not decide."""
    for run in runs:
        run()
    taken: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    least, most = _ROUNDS
    for turn in range(most):
        if turn >= least and time.perf_counter() - begin > _EACH_SECONDS:
            break
        for times, run in zip(taken, runs, strict=True):
            times.append(run())
    return [statistics.quantiles(times, n=4, method="inclusive")[0] for times in taken]


def _kernel_runs(ways: Sequence[Launch], threads: int) -> list[Run]:
    """Kernels of one region, on the same memory."""
    memory = _Memory(ways[0].node)
    loaded = load_kernels([KernelSource("kernel", way.call.source) for way in ways])
    team = get_team(threads)
    return [
        _KernelRun(LaunchTable([row], memory.address, memory.range, team), memory)
        for row in zip(ways, loaded.addresses, strict=True)
    ]


@dataclass
class _KernelRun:
    """A kernel, with the memory that the table has addresses of."""

    table: LaunchTable
    memory: _Memory

    def __call__(self) -> float:
        stamps = self.table.run_timed()
        return float(stamps[..., 1].max() - stamps[..., 0].min()) / load_driver().ticks_per_second()


@dataclass
class _LayerRun:
    """The program of a layer.

    Its time is that from call to return, as launches and barriers count, but without the
    conversions of what is its neighbours' in a network."""

    program: CpuExecutable

    def __call__(self) -> float:
        table = self.program._every
        begin = time.perf_counter()
        stamps = table.run_timed()
        seconds = time.perf_counter() - begin
        around = [la.node.attrs["kind"] == "convert_layout" for la in table.launches]
        ticks = (stamps[..., 1] - stamps[..., 0]).max(axis=0)[around].sum()
        return seconds - float(ticks) / load_driver().ticks_per_second()


class _Memory:
    """Zeros for the operands and results of one region, each in a place of its own."""

    def __init__(self, node: Node):
        self._places: dict[Value, int] = {}
        size = 0
        for value in (*node.inputs, *node.outputs):
            if root(value) not in self._places:
                self._places[root(value)] = size
                size += _all_copies(root(value))
        self._arena = Arena(size)

    def address(self, value: Value, thread: int = 0) -> int:
        value = root(value)
        each = block_bytes(value) if value.layout.copies else 0
        return self._arena.address(self._places[value] + thread * each)

    def range(self, value: Value) -> tuple[int, int]:
        first = self.address(value)
        return first, first + _all_copies(root(value))


def _learned(images: Value) -> bool:
    """Whether images depend on parameters, so that training needs their gradient."""
    graph = images.node.graph
    before = nx.ancestors(graph.nx, images.node.name)
    return any(graph.node(name).op == "parameter" for name in before)


def _all_copies(value: Value) -> int:
    return block_bytes(value) * max(1, value.layout.copies)


def _tiles(ways: Sequence[Launch]) -> list[str]:
    return [
        " x ".join(f"{count} {loop}" for loop, count in way.schedule.tile) or "none" for way in ways
    ]


@functools.cache
def _compiler_digest() -> str:
    """Of all that shapes the program of a convolution."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("graphc/codegen", "graphc/ops", "passes"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

"""What an executable is made of, for people: kernels, memory, the compiler's choices, a dump."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import errors
from graphc.codegen.program import Launch
from graphc.ir import SOURCES, Graph, Node, Value, format_node, root
from graphc.runtime.profile import table
from graphc.runtime.work import kernel_flops, launch_bytes, stored_bytes

if TYPE_CHECKING:
    from graphc.runtime.executable import Executable


@dataclass(frozen=True)
class KernelInfo:
    """One row of the launch table: a kernel and what it is launched for.

    name      of the launch's node in the compiled graph
    kind      the operator that gives the kernel its structure (conv2d, matmul, sum, ...)
    phase     "forward", "backward" or "update"
    nodes     operators that the kernel computes, as "name: op"
    layers    the user's layers they come from
    file      readable source; equal kernels share one file
    loops     (loop, extent) of the loop nest, reductions included
    lane      the loop in SIMD lanes, None for scalar code
    tile      (loop, count): unrolled into registers
    order     outer loops as nested, outermost first
    parallel  how many of `order` are shared between the threads; 0: one thread runs it alone
    blocks    of the batch, where it runs block by block with its neighbours; 0: by itself
    prepared  whether it depends on parameters alone and runs only when they are loaded
    flops, bytes  work of one launch
    """

    name: str
    kind: str
    phase: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    file: str
    loops: tuple[tuple[str, int], ...]
    lane: str | None
    tile: tuple[tuple[str, int], ...]
    order: tuple[str, ...]
    parallel: int
    blocks: int
    prepared: bool
    flops: int
    bytes: int

    def __str__(self) -> str:
        extents = dict(self.loops)
        loops = " ".join(f"{n}:{e}" for n, e in self.loops) or "none"
        tile = " x ".join(f"{c} {n}" for n, c in self.tile) or "none"
        shared = " ".join(self.order[: self.parallel]) or "none (one thread)"
        if self.blocks:
            shared = f"{self.blocks} blocks of the batch, each with the whole group"
        when = "; runs when parameters are loaded" if self.prepared else ""
        lane = f"{self.lane} ({extents[self.lane]})" if self.lane else "none (scalar)"
        return (
            f"{self.name} ({self.kind}, {self.phase}): {', '.join(self.nodes)}\n"
            f"  loops {loops}\n"
            f"  lanes {lane}; register tile {tile}; order {' '.join(self.order) or '-'}; "
            f"shared by threads {shared}{when}\n"
            f"  {self.flops:,} operations, {size_text(self.bytes)}; {self.file}"
        )


@dataclass(frozen=True)
class MemoryReport:
    """Memory of an executable in bytes; `print(report)` shows it.

    arena_bytes: what the plan needs for all activations and workspaces. lower_bound: the largest
    set of values alive at once; no plan for this order needs less. total_without_reuse: if every
    value had its own memory. parameter_bytes, prepared_bytes (what is computed from parameters
    alone), state_bytes (running statistics, optimizer), input_bytes, constant_bytes: outside the
    arena, for as long as the executable lives.
    plan: the `MemoryPlan`, with every value's offset and lifetime.
    """

    arena_bytes: int
    lower_bound: int
    total_without_reuse: int
    parameter_bytes: int
    prepared_bytes: int
    state_bytes: int
    input_bytes: int
    constant_bytes: int
    plan: Any

    @property
    def total_bytes(self) -> int:
        """All memory that the executable holds."""
        learned = self.parameter_bytes + self.prepared_bytes + self.state_bytes
        return self.arena_bytes + learned + self.input_bytes + self.constant_bytes

    def __str__(self) -> str:
        saved = 1 - self.arena_bytes / self.total_without_reuse if self.total_without_reuse else 0.0
        over = self.arena_bytes / self.lower_bound - 1 if self.lower_bound else 0.0
        lines = [
            f"activations   {size_text(self.arena_bytes):>10}  {100 * over:.1f}% above the bound, "
            f"{size_text(self.lower_bound)}; without reuse {size_text(self.total_without_reuse)} "
            f"({100 * saved:.0f}% saved)",
            f"parameters    {size_text(self.parameter_bytes):>10}",
            f"prepared      {size_text(self.prepared_bytes):>10}  computed from parameters alone",
            f"states        {size_text(self.state_bytes):>10}  running statistics, optimizer",
            f"inputs        {size_text(self.input_bytes):>10}",
            f"constants     {size_text(self.constant_bytes):>10}",
            f"in all        {size_text(self.total_bytes):>10}",
        ]
        if self.plan is not None and self.plan.lifetimes:
            lines += ["largest activations (offset, size, live from..to step):"]
            lines += self.plan.report(rows=12).splitlines()[1:]
        return "\n".join(lines)


# ---- kernels


def launched(executable: Executable) -> list[Launch]:
    """The launches that are rows of the table: those that compute something."""
    launches: list[Launch] = getattr(executable, "launches", [])
    return [launch for launch in launches if any(v.type.size for v in launch.node.outputs)]


def kernels(executable: Executable) -> list[KernelInfo]:
    """One entry a launch, in order; empty for an interpreted executable."""
    paths: dict[str, str] = getattr(executable, "kernel_paths", {})
    found = []
    for launch in launched(executable):
        node, schedule = launch.node, launch.schedule
        found.append(
            KernelInfo(
                node.name,
                str(node.attrs.get("kind", node.op)),
                node.origin.phase or "forward",
                tuple(f"{n.name}: {n.op}" for n in _operators(node)),
                _layers(node),
                paths.get(node.name, ""),
                tuple((loop.name, loop.extent) for loop in launch.kernel.loops.values()),
                schedule.lane,
                tuple(schedule.tile),
                tuple(schedule.order),
                schedule.parallel,
                launch.blocks,
                "prepared" in node.attrs,
                kernel_flops(launch.kernel),
                launch_bytes(launch),
            )
        )
    return found


def _operators(node: Node) -> list[Node]:
    body = node.attrs.get("body")
    return [n for n in body if n.op not in SOURCES] if isinstance(body, Graph) else [node]


def _layers(node: Node) -> tuple[str, ...]:
    converted = node.attrs.get("kind") == "convert_layout"  # its body has no origin of the user's
    nodes = [node] if converted else [node, *_operators(node)]
    return tuple(dict.fromkeys(n.origin.layer for n in nodes if n.origin.layer))


# ---- memory


def memory(executable: Executable) -> MemoryReport:
    """What the executable's memory consists of. Raises GraphcError for an interpreted one."""
    plan = executable.graph.annotations.get("memory")
    if plan is None:
        raise errors.GraphcError(_no_kernels(executable, "memory", "memory plan"))
    held = dict.fromkeys((*SOURCES, "prepared"), 0)
    for node in executable.graph:
        kind = "prepared" if "prepared" in node.attrs else node.op
        if kind in held:
            held[kind] += sum(stored_bytes(value) for value in node.outputs)
    return MemoryReport(
        plan.arena_bytes,
        plan.lower_bound,
        plan.total_without_reuse,
        held["parameter"],
        held["prepared"],
        held["state"],
        held["input"],
        held["constant"],
        plan,
    )


def _no_kernels(executable: Executable, method: str, what: str) -> str:
    return (
        f"{method}: target={executable.target!r} runs NumPy references and has no {what}: "
        "compile with target='cpu'"
    )


def require_kernels(executable: Executable, method: str) -> None:
    """Raises GraphcError for an executable that has no launch table."""
    if not hasattr(executable, "launches"):
        raise errors.GraphcError(_no_kernels(executable, method, "kernels"))


# ---- explain


def explain(executable: Executable) -> str:
    """Why the program is as it is: layouts, conversions, what was not fused, tiles."""
    graph = executable.graph
    sections = [_headline(executable)]
    if executable.records:
        sections.append("Passes\n" + "\n".join(f"  {record}" for record in executable.records))
    if hasattr(executable, "launches"):
        sections += [
            "Convolution algorithms\n"
            + "\n".join(f"  {line}" for line in _convolution_lines(executable)),
            "Layouts\n" + "\n".join(f"  {line}" for line in _layout_lines(graph)),
            "Layout conversions\n" + "\n".join(f"  {line}" for line in _conversion_lines(graph)),
            "Neighbours kept apart\n" + "\n".join(f"  {line}" for line in _apart_lines(graph)),
            "Groups\n" + "\n".join(f"  {line}" for line in _group_lines(graph)),
            "Kernels\n" + "\n".join(_indent(str(info)) for info in kernels(executable)),
        ]
    return "\n\n".join(sections) + "\n"


def _headline(executable: Executable) -> str:
    graph = executable.graph
    if not hasattr(executable, "launches"):
        count = sum(n.op not in SOURCES for n in graph)
        return (
            f"{graph.name}: {count} operators, each run by its NumPy reference "
            f"(target={executable.target!r}): there are no layouts, regions or kernels to explain"
        )
    rows = kernels(executable)
    threads = getattr(executable, "threads", 1)
    return (
        f"{graph.name} on {executable.target}: {len(rows)} launches of "
        f"{len({info.file for info in rows})} kernels, {threads} thread{'s' if threads > 1 else ''}"
    )


def _convolution_lines(executable: Executable) -> Iterator[str]:
    """The algorithm of each convolution that had a choice, and all predicted costs."""
    choices: dict[str, dict[str, float]] = executable.graph.annotations.get("convolutions", {})
    chosen = dict(
        text.split(": ", 1)
        for record in executable.records
        if record.name == "choose_convolutions"
        for text in record.notes
    )
    for name, costs in choices.items():
        ranked = sorted(costs.items(), key=lambda item: item[1])
        text = ", ".join(f"{algorithm} {cost:,.0f}" for algorithm, cost in ranked)
        yield f"{name}: {chosen.get(name, 'direct')}; predicted costs {text}"
    if not choices:
        yield "all direct: no other algorithm applies"


def _layout_lines(graph: Graph) -> Iterator[str]:
    chosen = graph.annotations.get("layouts")
    if isinstance(chosen, tuple) and len(chosen) == 2 and isinstance(chosen[1], dict):
        mode, costs = chosen
        yield f"chosen: {_mode_text(mode)}"
        for name, cost in sorted(costs.items(), key=lambda item: item[1]):
            text = "cannot be used here" if math.isinf(cost) else f"predicted cost {cost:,.0f}"
            yield f"{_mode_text(name)}: {text} (weighted multiply-adds)"
    elif chosen is not None:
        yield str(chosen)
    counts: dict[str, int] = {}
    for node in graph:
        for value in node.outputs:
            counts[str(value.layout)] = counts.get(str(value.layout), 0) + 1
    yield "values by layout: " + ", ".join(f"{n} {layout}" for layout, n in counts.items())


def _mode_text(mode: str) -> str:
    return "rows" if mode == "rows" else f"{mode} in lanes"


def _conversion_lines(graph: Graph) -> Iterator[str]:
    found = False
    for node in graph:
        if node.attrs.get("kind") != "convert_layout":
            continue
        found = True
        before, after = node.inputs[0], node[0]
        readers = [f"{user.name} ({_kind(user)})" for user, _ in graph.users(after)]
        readers += [f"output {name!r}" for name, v in graph.outputs.items() if v == after]
        readers += [f"update of {name!r}" for name, v in graph.updates.items() if v == after]
        yield (
            f"{node.name}: {before.name} {before.type} from {before.layout} to {after.layout}, "
            f"{size_text(stored_bytes(after))}, read by {', '.join(readers) or 'nothing'}"
        )
    if not found:
        yield "none"


def _kind(node: Node) -> str:
    return str(node.attrs.get("kind", node.op))


def _apart_lines(graph: Graph) -> Iterator[str]:
    reasons: dict[tuple[str, str], str] = graph.annotations.get("not_fused", {})
    for (producer, consumer), reason in reasons.items():
        yield f"{producer} -> {consumer}: {reason}"
    if not reasons:
        yield "none"


def _group_lines(graph: Graph) -> Iterator[str]:
    """Kernels that run together on one block of the batch after the other, without barriers."""
    groups: tuple[tuple[int, tuple[str, ...]], ...] = graph.annotations.get("groups", ())
    for blocks, names in groups:
        yield f"{blocks} blocks: {', '.join(names)}"
    if not groups:
        yield "none: every kernel is shared between the threads by itself"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


# ---- dump


def dump(executable: Executable, folder: str | os.PathLike[str]) -> Path:
    """Write everything about an executable into a new folder, which appears whole or not at all.

    `passes/NN_name.txt` and `.dot`: the graph as declared and after each pass; `passes.txt`: what
    they did; `explain.txt`; and of compiled executables `launches.txt`, `memory.txt` and
    `kernels/NN_name.py`. Raises GraphcError if the folder exists and holds something.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise errors.GraphcError(
            f"dump: {target} exists already: choose a folder that is new or empty"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_dump(executable, unfinished)
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _write_dump(executable: Executable, folder: Path) -> None:
    from graphc.viz.formats import to_dot

    passes = folder / "passes"
    passes.mkdir()
    records: list[Any] = []

    def observe(record: Any, graph: Graph) -> None:
        base = passes / f"{len(records):02d}_{_file_name(record.name)}"
        base.with_suffix(".txt").write_text(graph_text(graph), encoding="utf-8")
        base.with_suffix(".dot").write_text(to_dot(graph), encoding="utf-8")
        records.append(record)

    if executable.replay is not None:
        executable.replay(observe)
    lines = [f"{number:02d} {record}" for number, record in enumerate(records)]
    _write(folder / "passes.txt", "\n".join(lines))
    _write(folder / "explain.txt", explain(executable).rstrip())
    if not hasattr(executable, "launches"):
        return
    _write(folder / "memory.txt", str(memory(executable)))
    _write(folder / "launches.txt", "\n".join(_launch_lines(executable)))
    (folder / "kernels").mkdir()
    for number, launch in enumerate(launched(executable)):
        name = f"{number:02d}_{_file_name(launch.node.name)}.py"
        comment = "".join(f"# {line}\n" for line in format_node(launch.node).splitlines())
        body = launch.node.attrs.get("body")
        if isinstance(body, Graph):
            comment += "".join(f"# {line}\n" for line in str(body).splitlines())
        _write(folder / "kernels" / name, f"{comment}\n{launch.call.source.rstrip()}")


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60]


def graph_text(graph: Graph) -> str:
    """A graph as text, with the body of each fused node below the graph."""
    parts = [str(graph)]
    for node in graph:
        body = node.attrs.get("body")
        if isinstance(body, Graph):
            parts.append(f"{node.name}: {body}")
    return "\n\n".join(parts) + "\n"


def _launch_lines(executable: Executable) -> list[str]:
    """The launch table as text: kernel, who runs it, buffers with their places, numbers."""
    plan = executable.graph.annotations["memory"]
    rows: list[tuple[str, ...]] = []
    infos = kernels(executable)
    for number, (info, launch) in enumerate(zip(infos, launched(executable), strict=True)):
        buffers = [*launch.node.inputs, *launch.node.outputs]
        places = " ".join(_place(v, plan) for v in buffers)
        alone = "thread 0" if info.parallel == 0 else "all"
        values = " ".join(map(str, launch.call.numbers))
        digest = Path(info.file).stem[:12]
        rows.append((f"{number:02d}", info.name, info.kind, digest, alone, places, values))
    head = ("row", "node", "kind", "digest", "threads", "buffers (name@offset)", "numbers")
    return table(head, rows, left=len(head))


def _place(value: Value, plan: Any) -> str:
    offset = plan.offset(value)
    if offset is None:
        owner = root(value)
        prepared = "prepared" if "prepared" in owner.node.attrs else "in-place"
        return f"{owner.name}@{owner.node.op if owner.node.op in SOURCES else prepared}"
    return f"{value.name}@{offset}"


def size_text(nbytes: int) -> str:
    """`nbytes` with a decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"

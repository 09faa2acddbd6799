"""Why a program is as it is: algorithms, layouts, what was not fused, what is computed twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from graphc.inspect.cuda import headline as cuda_headline
from graphc.inspect.kernels import kernels
from graphc.inspect.recomputed import recomputed
from graphc.inspect.text import size_text, time_text
from graphc.inspect.work import stored_bytes
from graphc.ir import SOURCES, Graph, Node, root
from graphc.viz.formats import fused_operators

if TYPE_CHECKING:
    from graphc.runtime.executable import Executable


def explain(executable: Executable) -> str:
    """The compiler's choices as text, one line each, in sections."""
    parts = [_headline(executable)]
    for title, lines in sections(executable).items():
        parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def sections(executable: Executable) -> dict[str, list[str]]:
    """The lines of an explanation by title of their section."""
    graph = executable.graph
    found: dict[str, Iterable[str]] = {}
    if executable.records:
        found["Passes"] = map(str, executable.records)
    if executable.tuning:
        found["Tuning"] = str(executable.tuning).split("\n")
    if hasattr(executable, "launches"):
        found |= {
            "Convolution algorithms": _convolution_lines(executable),
            "Layouts": _layout_lines(graph),
            "Layout conversions": _conversion_lines(graph),
            "Computed again instead of stored": _recomputed_lines(graph),
            "Neighbours kept apart": _apart_lines(graph),
            "Groups": _group_lines(graph),
            "Kernels": (line for i in kernels(executable) for line in str(i).split("\n")),
        }
    elif hasattr(executable, "steps"):
        found |= {
            "Computed again instead of stored": _recomputed_lines(graph),
            "Neighbours kept apart": _apart_lines(graph),
            "Kernels": (line for i in executable.kernels() for line in str(i).split("\n")),
        }
    return {title: list(lines) for title, lines in found.items()}


def _headline(executable: Any) -> str:
    graph = executable.graph
    if hasattr(executable, "steps"):
        return cuda_headline(executable)
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


# ---- algorithms


def convolution_choices(executable: Executable) -> dict[str, tuple[str, dict[str, float]]]:
    """By layer: the algorithm chosen, and the predicted seconds of each that was considered.

    The cost model counts multiply-adds; these seconds are what they take at the measured peak."""
    costs: dict[str, dict[str, float]] = executable.graph.annotations.get("convolutions", {})
    chosen = dict(
        text.split(": ", 1)
        for record in executable.records
        if record.name in ("choose_convolutions", "winograd_convolutions")
        for text in record.notes
        if ": " in text
    )
    if not costs:
        return {}
    from graphc.bench.machine import machine_limits

    gflops = machine_limits(getattr(executable, "threads", 1)).gflops
    return {
        name: (
            chosen.get(name, "direct"),
            {algorithm: 2e-9 * cost / gflops for algorithm, cost in considered.items()},
        )
        for name, considered in costs.items()
    }


def _convolution_lines(executable: Executable) -> Iterator[str]:
    choices = convolution_choices(executable)
    for name, (chosen, predicted) in choices.items():
        ranked = sorted(predicted.items(), key=lambda item: item[1])
        text = ", ".join(f"{algorithm} {time_text(seconds)}" for algorithm, seconds in ranked)
        yield f"{name}: {chosen}; predicted {text}"
    if not choices:
        yield "all direct: no other algorithm applies"


# ---- layouts


def _layout_lines(graph: Graph) -> Iterator[str]:
    chosen = graph.annotations.get("layouts")
    if isinstance(chosen, tuple) and len(chosen) == 2 and isinstance(chosen[1], dict):
        mode, costs = chosen
        yield f"chosen: {mode_text(mode)}"
        for name, cost in sorted(costs.items(), key=lambda item: item[1]):
            text = "cannot be used here" if math.isinf(cost) else f"predicted cost {cost:,.0f}"
            yield f"{mode_text(name)}: {text} (weighted multiply-adds)"
    elif chosen is not None:
        yield str(chosen)
    counts: dict[str, int] = {}
    for node in graph:
        for value in node.outputs:
            counts[str(value.layout)] = counts.get(str(value.layout), 0) + 1
    yield "values by layout: " + ", ".join(f"{n} {layout}" for layout, n in counts.items())


def mode_text(mode: str) -> str:
    """A layout of the whole graph in words: which axis lies in the lanes of a vector."""
    return "rows" if mode == "rows" else f"{mode} in lanes"


def _conversion_lines(graph: Graph) -> Iterator[str]:
    found = False
    for node in graph:
        if node.attrs.get("kind") == "convert_layout":
            found = True
            before, after = node.inputs[0], node[0]
            yield (
                f"{node.name}: {before.name} {before.type} from {before.layout} to {after.layout}, "
                f"{size_text(stored_bytes(after))}: {conversion_reason(node)}"
            )
    if not found:
        yield "none"


def conversion_reason(node: Node) -> str:
    """Why a layout conversion is there: who wants its result that way."""
    graph, after = node.graph, node[0]
    reasons = [
        f"{user.name} ({_kind(user)}) "
        + ("renumbers the elements of rows" if user.op == "reshape" else f"reads {after.layout}")
        for user, _ in graph.users(after)
    ]
    reasons += [
        f"output {n!r} is handed out in rows" for n, v in graph.outputs.items() if v == after
    ]
    reasons += [
        f"parameter or state {n!r} is kept as {after.layout}"
        for n, v in graph.updates.items()
        if v == after
    ]
    return ", ".join(reasons) or "nothing reads it"


def _kind(node: Node) -> str:
    return str(node.attrs.get("kind", node.op))


# ---- fusion


def _recomputed_lines(graph: Graph) -> Iterator[str]:
    found = recomputed(graph)
    for name, where in found.items():
        yield f"{name}: by {', '.join(where)}: predicted to cost less than to keep and read it"
    if not found:
        yield "nothing"


def kept_apart(graph: Graph) -> dict[tuple[str, str], str]:
    """Why neighbours are kernels of their own: (producer, consumer) -> reason, for every such pair.

    The fusing pass gives reasons by operator; the other pairs are separated by what later passes
    did, or by a reshape, which gives memory another shape and so has to be memory."""
    reasons: dict[tuple[str, str], str] = graph.annotations.get("not_fused", {})
    by_producer: dict[str, list[tuple[str, str]]] = {}
    for (first, second), reason in reasons.items():
        by_producer.setdefault(first, []).append((second, reason))
    found: dict[tuple[str, str], str] = {}
    for consumer in graph:
        if consumer.op != "fused":
            continue
        inside = {n.name for n in fused_operators(consumer)}
        for value in consumer.inputs:
            producer = root(value).node
            pair = (producer.name, consumer.name)
            if producer.op != "fused" or pair in found:
                continue
            found[pair] = next(
                (
                    reason
                    for inner in fused_operators(producer)
                    for name, reason in by_producer.get(inner.name, ())
                    if name in inside
                ),
                "",
            ) or _other_reason(producer, consumer, value.node)
    return found


def _other_reason(producer: Node, consumer: Node, between: Node) -> str:
    for node in (consumer, producer):
        if _kind(node) == "convert_layout":
            return f"{node.name!r} changes the layout"
    if between is not producer:
        return f"{between.name!r} renumbers the elements, so they are read from memory"
    if "prepared" in producer.attrs:
        return f"{producer.name!r} runs only when parameters are loaded"
    return "fusion is switched off or was not tried"


def _apart_lines(graph: Graph) -> Iterator[str]:
    pairs = kept_apart(graph)
    for (producer, consumer), reason in pairs.items():
        yield f"{producer} -> {consumer}: {reason}"
    if not pairs:
        yield "none"


def _group_lines(graph: Graph) -> Iterator[str]:
    """Kernels that run together on one block of the batch after the other, without barriers."""
    groups: tuple[tuple[int, tuple[str, ...]], ...] = graph.annotations.get("groups", ())
    for blocks, names in groups:
        yield f"{blocks} blocks: {', '.join(names)}"
    if not groups:
        yield "none: every kernel is shared between the threads by itself"

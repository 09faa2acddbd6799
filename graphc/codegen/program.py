"""From a fused graph to kernels.

Lower every region, choose schedules, render source, collect launches. Networks repeat themselves,
and passes ask how a region would be lowered before the layouts are settled: regions of one
structure are lowered and scheduled once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Final

from graphc import errors
from graphc.codegen import core
from graphc.codegen.cpu import CompiledCall, render
from graphc.codegen.kernel import Access, Kernel, Schedule
from graphc.codegen.lower import CannotLower, lower_region
from graphc.codegen.schedule import rank_schedules
from graphc.ir import SOURCES, Graph, Node, label_body, root, strips
from graphc.ops.registry import get


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the region it computes and how."""

    node: Node
    kernel: Kernel
    schedule: Schedule
    call: CompiledCall
    blocks: int = 0  # of a group that runs block by block; 0: by itself
    begins: bool = False  # whether it is the first of its group
    # Where a run within a group begins that goes through each block strip by strip: the number of
    # strips, and of launches.
    strips: tuple[int, int] = (0, 0)


_Key = tuple[Hashable, ...]
_Scheduled = tuple[Kernel, Schedule, CompiledCall]
# By structure, for the life of the process; emptied when full. A structure has a number.
_numbers = itertools.count()
_structures: dict[_Key, int] = {}
_lowered: dict[_Key, Kernel] = {}
_scheduled: dict[_Key, list[_Scheduled]] = {}
_MOST: Final = 4096


def structure(node: Node, whole: bool = False) -> _Key:
    """What the kernel of a fused region depends on; `whole` as for `lower_node`."""
    body: Graph = node.attrs["body"]
    if "_structure" not in body.annotations:
        rules = frozenset(get(n.op).lower for n in body if n.op not in SOURCES)
        structure = (body.structure(), rules)
        number = _structures.get(structure)
        if number is None:
            number = next(_numbers)
            remember(_structures, structure, number)
        body.annotations["_structure"] = number
    layouts = (*(v.layout for v in node.inputs), *node.layouts)
    if whole:
        layouts = tuple(replace(layout, copies=0) for layout in layouts)
    return (body.annotations["_structure"], node.attrs["outer"], layouts)


def lower_node(node: Node, whole: bool = False) -> Kernel:
    """The kernel of one fused region, for the layouts its operands and results have; `whole`: as if
    all blocks of each were kept.

    Regions of one structure share it: it is not to be changed. Raises CannotLower."""
    key = structure(node, whole)
    kernel = _lowered.get(key)
    if kernel is None:
        label_body(node, whole)
        kernel = lower_region(node.name, node.attrs["body"], node.attrs["outer"])
        remember(_lowered, key, kernel)
    return kernel


def _schedules(node: Node, lanes: int, threads: int, count: int, most: int) -> list[_Scheduled]:
    """The kernel of a region as it may run, the best `most` ways as predicted; `count`: blocks of
    the group it is in, or 0."""
    key = (*structure(node), strips(node), lanes, threads, count, most)
    scheduled = _scheduled.get(key)
    if scheduled is None:
        blocks = _block_loops(node) if count else ()
        kernel = lower_node(node).copy()
        together = kernel.trips(blocks) // count if strips(node) == 1 and count else 1
        scheduled = [
            (kernel, schedule, render(kernel, schedule, lanes))
            for schedule in rank_schedules(kernel, lanes, threads, blocks, together, most)
        ]
        remember(_scheduled, key, scheduled)
    return scheduled


def _block_loops(node: Node) -> tuple[str, ...]:
    """The outer loops over blocks of a region in a group: over images, or over all their strips."""
    if strips(node) == 1:
        return lower_node(node).outer[:1]
    kernel = lower_node(node, whole=True)
    values = (*node.inputs, *node.outputs)
    number, value = next((i, v) for i, v in enumerate(values) if "strips" in root(v).node.attrs)
    strip = math.prod(value.layout.physical_shape(value.sizes)[1:])
    accesses = [e.attributes["access"] for e in kernel.expressions() if e.op == "load"]
    accesses += [store.access for store in kernel.stores]
    access = next(a for a in accesses if a.buffer == number)
    return tuple(n for n in kernel.outer if access.stride(n) and access.stride(n) % strip == 0)


def remember(memory: dict[Any, Any], key: Hashable, value: Any) -> None:
    """Keep a value for the life of the process, beside others of its kind."""
    if len(memory) >= _MOST:
        memory.clear()
    memory[key] = value


def can_lower(node: Node) -> bool:
    try:
        lower_node(node)
    except CannotLower:
        return False
    return True


def lower_graph(graph: Graph) -> None:
    """Mark the regions that may overwrite an operand.

    Raises CompileError listing every region that cannot be lowered."""
    failures = []
    for node in graph:
        if node.op == "fused":
            try:
                node.attrs["inplace"] = overwritable(lower_node(node), node)
            except CannotLower as error:
                failures.append(f"{node.describe()}: {error}")
    if failures:
        if len(failures) == 1:
            raise errors.CompileError(f"cannot be compiled: {failures[0]}")
        raise errors.CompileError(
            f"{len(failures)} nodes cannot be compiled:\n  " + "\n  ".join(failures)
        )


def overwritable(kernel: Kernel, node: Node) -> tuple[tuple[int, int], ...]:
    """(result, operand) pairs that may share memory: each element is read before it is written, and
    only by the iteration that writes it."""
    if (
        any(e.op == "reduce" for e in kernel.expressions())
        or len({s.loops for s in kernel.stores}) != 1
    ):
        return ()
    pairs = []
    operands = len(node.inputs)
    for number, store in enumerate(kernel.stores):
        for slot in range(operands):
            loads = [
                e.attributes["access"]
                for e in kernel.expressions()
                if e.op == "load" and e.attributes["access"].buffer == slot
            ]
            same = all(
                dict(a.strides) == dict(store.access.strides) and a.offset == store.access.offset
                for a in loads
            )
            if (
                loads
                and same
                and kernel.buffers[slot].dtype == kernel.buffers[operands + number].dtype
            ):
                pairs.append((number, slot))
    return tuple(pairs)


def blocks(node: Node) -> int | None:
    """Into how many blocks of the batch a region falls apart, if no block reads what others write.

    A block is a vector of images where the batch lies in the lanes, else one image, or a strip of
    the only one. Regions whose weights neither stay in the cache that cores share nor are small
    beside a block's own values are better off with the whole batch at once."""
    batch_lanes = {v.layout.lane_axis == 0 for v in node.outputs}
    if len(batch_lanes) != 1 or not node.attrs.get("batched"):
        return None
    kernel = lower_node(node)
    if not kernel.outer:
        return None
    loop, cut = kernel.outer[0], strips(node)
    trips = kernel.loops[loop].extent
    if cut == 1:
        count = trips if loop == ("i0b" if batch_lanes.pop() else "i0") else 1
    else:
        count = node.types[0].sizes[0] // node.attrs.get("strips", 1)
        if count == 1:
            return cut
    if count < 2 or trips % count:
        return None
    values = [*node.inputs, *node.outputs]
    guarded = any(e.op == "within" for e in kernel.expressions())
    loads = [e.attributes["access"] for e in kernel.expressions() if e.op == "load"]
    own = weights = 0
    seen: set[int] = set()
    for access in [*loads, *(s.access for s in kernel.stores)]:
        value = values[access.buffer]
        size = value.type.nbytes
        if access.buffer not in seen:
            seen.add(access.buffer)
            if access.stride(loop):
                own += size // count
            else:
                weights += size
        producer = root(value).node
        if producer.op in SOURCES:
            continue
        if not access.stride(loop):
            if producer.attrs.get("batched"):  # every block reads what all blocks write
                return None
            continue
        steps = _reach(kernel, access, loop)
        low = access.offset + sum(s for s in steps if s < 0)
        high = access.offset + sum(s for s in steps if s > 0)
        stride = value.layout.strides(value.sizes)[0]
        if cut > 1:
            stride *= value.sizes[0] // trips
        if access.stride(loop) != stride:
            return None
        # Behind a bounds check an access may start in another block, which padding makes it do, but
        # an offset of whole blocks belongs to another image.
        if not (-stride < access.offset < stride if guarded else 0 <= low <= high < stride):
            return None
    # Weights that fit stay in a core's cache from block to block.
    return None if weights > max(own, core.L3_BYTES) else count


def _reach(kernel: Kernel, access: Access, block: str) -> list[int]:
    """How far an access moves over each loop but `block`; ragged ones end with their elements."""
    steps = {n: s * (kernel.loops[n].extent - 1) for n, s in access.strides if n != block}
    for name, loop in kernel.loops.items():
        step = access.stride(name)
        if loop.total is None or loop.block is None or not step:
            continue
        if access.stride(loop.block) == step * loop.extent:
            steps[loop.block], steps[name] = 0, step * (loop.total - 1)
    return list(steps.values())


def plan_launches(graph: Graph, lanes: int, threads: int) -> list[Launch]:
    """Schedules and sources in execution order."""
    return [ranked[0] for ranked in rank_launches(graph, lanes, threads, most=1)]


def rank_launches(graph: Graph, lanes: int, threads: int, most: int) -> list[list[Launch]]:
    """In execution order, up to `most` ways of each launch, the best as predicted first."""
    groups = graph.annotations.get("groups", ())
    grouped = {name: count for count, names in groups for name in names}
    first = {names[0] for _, names in groups}
    runs = graph.annotations.get("strips", {})
    launches = []
    for node in graph:
        if node.op == "fused":
            count = grouped.get(node.name, 0)
            ways = _schedules(node, lanes, threads, count, most)
            label_body(node)  # as it was lowered, or one like it
            place = count, node.name in first, runs.get(node.name, (0, 0))
            launches.append([Launch(node, *way, *place) for way in ways])
    return launches

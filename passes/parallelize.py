"""Run images through whole regions, a block at a time, without barriers between the kernels."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphc.ir import SOURCES, Graph, Node, root, strips
from passes.base import Pass, note
from passes.liveness import storage_bytes
from passes.schedule import edges, readers

# A group must be worth its simultaneous lifetimes.
SHORTEST = 2


@dataclass(frozen=True)
class Parallelize(Pass):
    """Put kernels that work on separate blocks of the batch next to each other, and group them.

    Requires: layouts assigned. `blocks(node)` says into how many blocks of the batch a region falls
    apart, or None. Ensures: the same nodes in an order that respects operands;
    `graph.annotations["groups"]` is a tuple of (number of blocks, node names): the nodes of a group
    follow each other, and thread t may run all of them on its first block, then on its second,
    while the block is still in its cache. `graph.annotations["strips"]` has runs within groups that
    go through an image strip by strip: by the name of the first node (number of strips, of nodes).
    The strips of a batch of one image are its blocks.
    """

    blocks: Callable[[Node], int | None]
    cache_bytes: int  # what values of a share may take together to stay in a core's own cache
    threads: int = 1
    reorder: bool = True  # False: only kernels that follow each other already

    def run(self, graph: Graph) -> Graph:
        counts = {n.name: self.blocks(n) for n in graph if _runs(n)}
        for node in reversed(graph.nodes):
            if counts.get(node.name) and _expands_for_all(graph, node, counts):
                counts[node.name] = None
        new = graph.reordered(_Order(graph, counts).run() if self.reorder else graph.nodes)
        groups = _groups(new, counts)
        new.annotations["groups"] = tuple(
            (self._shares(new, blocks, names), names) for blocks, names in groups
        )
        new.annotations["strips"] = {
            name: run for _, names in groups for name, run in _strip_runs(new, names)
        }
        note(new, f"{sum(len(names) for _, names in groups)} kernels run block by block")
        return new

    def _shares(self, graph: Graph, blocks: int, names: tuple[str, ...]) -> int:
        """Into how many shares a group is cut.

        Two blocks a share let a register tile read each weight once for both; they pay where their
        values stay in the cache and every thread still gets as many."""
        if any(strips(graph.node(name)) > 1 for name in names):
            return blocks
        total = sum(storage_bytes(v) for name in names for v in graph.node(name).outputs)
        fits = 2 * total // blocks <= self.cache_bytes
        return blocks // 2 if fits and blocks % (2 * self.threads) == 0 else blocks


class _Order:
    """List scheduling that stays with kernels of one number of blocks while any is ready.

    A kernel without blocks that a group waits for, and that does not wait for the group, runs
    before it. Else it runs where no group can go on, one by one in the old order: what is ready
    early, such as transformed weights, would be kept until it is read."""

    def __init__(self, graph: Graph, counts: dict[str, int | None]):
        self.nodes = graph.nodes
        self.counts = [counts.get(n.name) for n in self.nodes]
        self.successors, self.waiting = edges(graph)
        self.delay_recomputed(graph)
        self.free: list[int] = []
        self.ready: dict[int | None, list[int]] = {}
        self.order: list[int] = []
        self.group = 0  # groups are numbered from 1; the one that runs now began at `start`
        self.start = 0
        self.behind = [0] * len(self.nodes)  # the last group that a node waits for

    def run(self) -> list[Node]:
        for i, count in enumerate(self.waiting):
            if count == 0:
                self.release(i)
        current: int | None = None
        while self.free or any(self.ready.values()):
            if self.free:
                self.emit(heapq.heappop(self.free))
                continue
            if current is not None and not self.ready.get(current):
                before = next((i for i in sorted(self.ready.get(None, ())) if self.leads(i)), None)
                if before is not None:
                    self.ready[None].remove(before)
                    heapq.heapify(self.ready[None])
                    self.emit(before, at=self.start)
                    self.start += 1
                    continue
            if current is None or not self.ready.get(current):
                current = _blocked(self.ready)
                self.group += 1
                self.start = len(self.order)
            i = heapq.heappop(self.ready[current])
            if current is not None:
                self.behind[i] = self.group
            self.emit(i)
        return [self.nodes[i] for i in self.order]

    def delay_recomputed(self, graph: Graph) -> None:
        """Let a recomputed value wait for the last of the other operands of its first reader.

        It could be made in the forward pass already, and would have to be kept. Where nothing else
        reads it, it waits for what its reader waits for, if that is recomputed as well."""
        position = {node.name: i for i, node in enumerate(self.nodes)}
        read_by = {n.name: [r for v in n.outputs for r in readers(graph, v)] for n in self.nodes}
        depth: dict[str, int] = {}  # in the backward pass
        recomputed: set[str] = set()
        for node in self.nodes:
            operands = [root(v).node for v in node.inputs]
            if node.origin.phase == "backward":
                depth[node.name] = 1 + max((depth.get(n.name, 0) for n in operands), default=0)
            alone = {n.name for n in operands if n.name in recomputed and len(read_by[n.name]) == 1}
            forward = all(n.origin.phase == "" or n.name in alone for n in operands)
            if forward and _is_repeated(node, operands):
                recomputed.add(node.name)
        waits: dict[str, str] = {}
        for node in reversed(self.nodes):
            if node.name not in recomputed or not read_by[node.name]:
                continue
            first = min(read_by[node.name], key=lambda reader: position[reader.name])
            last = max((root(v).node.name for v in first.inputs), key=lambda n: depth.get(n, 0))
            if depth.get(last, 0) > depth[node.name]:
                waits[node.name] = last
            elif first.name in waits and len(read_by[node.name]) == 1:
                waits[node.name] = waits[first.name]
        for name, other in waits.items():
            self.successors[position[other]].append(position[name])
            self.waiting[position[name]] += 1

    def release(self, i: int) -> None:
        if not _runs(self.nodes[i]):
            heapq.heappush(self.free, i)
        else:
            heapq.heappush(self.ready.setdefault(self.counts[i], []), i)

    def emit(self, i: int, at: int | None = None) -> None:
        self.order.insert(len(self.order) if at is None else at, i)
        for follower in self.successors[i]:
            self.behind[follower] = max(self.behind[follower], self.behind[i])
            self.waiting[follower] -= 1
            if self.waiting[follower] == 0:
                self.release(follower)

    def leads(self, i: int) -> bool:
        """Whether a node that waits for no kernel of the group is all that one of them waits for,
        directly or through other such nodes."""
        if self.behind[i] == self.group:
            return False
        count = self.counts[self.order[self.start]]
        return any(
            self.waiting[s] == 1
            and (self.counts[s] == count or (self.counts[s] is None and self.leads(s)))
            for s in self.successors[i]
        )


def _is_repeated(node: Node, operands: list[Node]) -> bool:
    """Whether the backward pass makes a value of images and not of parameters alone."""
    known = all(n.op in SOURCES and n.op != "input" for n in operands)
    return node.origin.phase == "backward" and _runs(node) and not known


def _runs(node: Node) -> bool:
    """Whether a node is a kernel of the step: it may be a source, an alias, or run beforehand."""
    return node.op == "fused" and "prepared" not in node.attrs


def _expands_for_all(graph: Graph, node: Node, counts: dict[str, int | None]) -> bool:
    """Whether a node makes more than it reads, of what is kept anyway, for kernels of the whole
    batch alone: better made just before them than kept through a group."""
    made = sum(storage_bytes(v) for v in node.outputs)
    read = sum(storage_bytes(v) for v in node.inputs)
    users = [n for v in node.outputs for n in readers(graph, v)]
    return (
        made > read
        and all(len(readers(graph, root(v))) > 1 for v in node.inputs if v.node.op != "constant")
        and bool(users)
        and all(counts.get(n.name) is None for n in users)
    )


def _blocked(ready: dict[int | None, list[int]]) -> int | None:
    """The number of blocks whose first ready kernel comes first in the old order."""
    found = [(queue[0], count) for count, queue in ready.items() if queue and count is not None]
    return min(found)[1] if found else None


def _groups(graph: Graph, counts: dict[str, int | None]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    groups: list[tuple[int, tuple[str, ...]]] = []
    run: list[str] = []
    current: int | None = None
    for node in graph:
        if not _runs(node):
            continue
        count = counts[node.name]
        if count != current or count is None or (_one_image(node) and _begins_strips(node)):
            if current is not None and len(run) >= SHORTEST:
                groups.append((current, tuple(run)))
            run, current = [], count
        run.append(node.name)
    if current is not None and len(run) >= SHORTEST:
        groups.append((current, tuple(run)))
    return tuple(groups)


def _begins_strips(node: Node) -> bool:
    """Whether a node cuts whole images into strips."""
    return "strips" in node.attrs and not any("strips" in root(v).node.attrs for v in node.inputs)


def _one_image(node: Node) -> bool:
    return strips(node) > 1 and node.types[0].sizes[0] == node.attrs.get("strips", 1)


def _strip_runs(graph: Graph, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(first node, (number of strips, of nodes)) of the runs of a group that go strip by strip."""
    first, length, count = "", 0, 1
    for name in (*names, ""):
        node = graph.node(name) if name else None
        if node and length and strips(node) == count and not _begins_strips(node):
            length += 1
            continue
        if length > 1:
            yield first, (count, length)
        length = 0
        if node and _begins_strips(node) and not _one_image(node):
            first, length, count = name, 1, strips(node)

"""Run images through whole regions, a block at a time, without barriers between the kernels."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from graphc.ir import Graph, Node, root
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
    while the block is still in its cache.
    """

    blocks: Callable[[Node], int | None]
    threads: int = 1
    # A little more than a core's own cache: not all of a group is live at once.
    cache_bytes: int = 600_000

    def run(self, graph: Graph) -> Graph:
        counts = {n.name: self.blocks(n) for n in graph if _runs(n)}
        for node in reversed(graph.nodes):
            if counts.get(node.name) and _expands_for_all(graph, node, counts):
                counts[node.name] = None
        new = graph.reordered(_order(graph, counts))
        groups = _groups(new, counts)
        new.annotations["groups"] = tuple(
            (self._shares(new, blocks, names), names) for blocks, names in groups
        )
        note(new, f"{sum(len(names) for _, names in groups)} kernels run block by block")
        return new

    def _shares(self, graph: Graph, blocks: int, names: tuple[str, ...]) -> int:
        """Into how many shares a group is cut.

        Two blocks a share let a register tile read each weight once for both; they pay where their
        values stay in the cache and every thread still gets as many."""
        total = sum(storage_bytes(v) for name in names for v in graph.node(name).outputs)
        fits = 2 * total // blocks <= self.cache_bytes
        return blocks // 2 if fits and blocks % (2 * self.threads) == 0 else blocks


def _order(graph: Graph, counts: dict[str, int | None]) -> list[Node]:
    """List scheduling that stays with kernels of one number of blocks while any is ready."""
    nodes = graph.nodes
    successors, waiting = edges(graph)
    free: list[int] = []
    ready: dict[int | None, list[int]] = {}

    def release(i: int) -> None:
        if not _runs(nodes[i]):
            heapq.heappush(free, i)
        else:
            heapq.heappush(ready.setdefault(counts.get(nodes[i].name), []), i)

    for i, count in enumerate(waiting):
        if count == 0:
            release(i)
    order: list[Node] = []
    current: int | None = None
    while free or any(ready.values()):
        if free:
            i = heapq.heappop(free)
        else:
            # What has no blocks runs only where no group can go on, one by one in the old order:
            # what is ready early, such as transformed weights, would be kept until it is read.
            if current is None or not ready.get(current):
                current = _blocked(ready)
            i = heapq.heappop(ready[current])
        order.append(nodes[i])
        for follower in successors[i]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                release(follower)
    return order


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
        if count != current or count is None:
            if current is not None and len(run) >= SHORTEST:
                groups.append((current, tuple(run)))
            run, current = [], count
        run.append(node.name)
    if current is not None and len(run) >= SHORTEST:
        groups.append((current, tuple(run)))
    return tuple(groups)

"""Order the nodes so that little memory is live at once."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from graphc.ir import SOURCES, Graph, Node, Value, is_view, root
from passes.base import Pass, note
from passes.liveness import SizeOf, peak_bytes, storage_bytes, storages


@dataclass(frozen=True)
class Schedule(Pass):
    """Reorder nodes for a low peak of live bytes, or keep the order where that is lower.

    Requires: int dimensions; layouts assigned and fusion done, as both change sizes and lifetimes.
    Ensures: the same nodes in an order that respects operands: the best of three. Two are list
    schedules, O(L log L), where ties go to the original order. One takes of the nodes that are
    ready the one that adds least to the live bytes (frees most); the other keeps the original
    order, but takes what frees memory as soon as it is ready: gradients do not outlive the update
    of their parameter.
    With `updates_in_place`, a node that computes the last value of a parameter comes after the
    parameter's readers, so that the update needs no copy.
    Notes both peaks, and leaves them in annotations["peak_bytes"] = (before, after).
    """

    size_of: SizeOf = storage_bytes
    outputs_live: bool = True
    updates_in_place: bool = False

    def run(self, graph: Graph) -> Graph:
        orders = [self._order(graph, False), self._order(graph, True), graph.nodes]
        peaks = [self._peak(graph, order) for order in orders]
        best = peaks.index(min(peaks))
        new = graph.reordered(orders[best])
        note(new, f"peak of live bytes {peaks[-1]} -> {peaks[best]}")
        new.annotations["peak_bytes"] = (peaks[-1], peaks[best])
        return new

    def _peak(self, graph: Graph, order: list[Node]) -> int:
        pieces = storages(
            graph,
            self.size_of,
            outputs_live=self.outputs_live,
            updates_in_place=self.updates_in_place,
            order=order,
        )
        return peak_bytes(pieces)

    def _order(self, graph: Graph, greedy: bool) -> list[Node]:
        nodes = graph.nodes
        operands = [
            () if is_view(node) else tuple(dict.fromkeys(root(v) for v in node.inputs))
            for node in nodes
        ]
        readers: dict[Value, list[int]] = {}
        for i, values in enumerate(operands):
            for value in values:
                readers.setdefault(value, []).append(i)
        pending = {value: len(indices) for value, indices in readers.items()}
        pinned = {root(v) for v in graph.results} if self.outputs_live else set()
        elsewhere = set(graph.updates.values()) if self.updates_in_place else set()
        made = [
            0
            if node.op in SOURCES or is_view(node)
            else sum(self.size_of(v) for v in node.outputs if v not in elsewhere)
            for node in nodes
        ]
        sizes = {v: 0 if v.node.op in SOURCES or v in pinned else self.size_of(v) for v in pending}

        def added(i: int) -> float:
            if nodes[i].op in SOURCES or is_view(nodes[i]):
                return -math.inf  # costs nothing, and others wait for it
            more = made[i] - sum(sizes[v] for v in operands[i] if pending[v] == 1)
            return more if greedy or more < 0 else 0

        successors, waiting = edges(graph, self.updates_in_place)
        ready = [(added(i), i) for i in range(len(nodes)) if not waiting[i]]
        heapq.heapify(ready)
        done = [False] * len(nodes)
        order: list[Node] = []
        while ready:
            _, i = heapq.heappop(ready)
            if done[i]:
                continue
            done[i] = True
            order.append(nodes[i])
            for value in operands[i]:
                pending[value] -= 1
                if pending[value] == 1:
                    # The one reader left now frees the value: if it is ready, it moves up. The
                    # stale entry stays in the heap and is skipped.
                    for j in readers[value]:
                        if not done[j] and not waiting[j]:
                            heapq.heappush(ready, (added(j), j))
            for j in successors[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    heapq.heappush(ready, (added(j), j))
        return order


def edges(graph: Graph, updates_in_place: bool = True) -> tuple[list[list[int]], list[int]]:
    """For each node, those that wait for it, and how many it waits for.

    With `updates_in_place`, a node that computes the last value of a parameter waits for the
    parameter's readers too."""
    nodes = graph.nodes
    position = {node.name: i for i, node in enumerate(nodes)}
    successors: list[list[int]] = [[] for _ in nodes]
    waiting = [0] * len(nodes)

    def edge(a: int, b: int) -> None:
        successors[a].append(b)
        waiting[b] += 1

    for i, node in enumerate(nodes):
        for producer in dict.fromkeys(position[v.node.name] for v in node.inputs):
            edge(producer, i)
    if updates_in_place:
        for name, value in graph.updates.items():
            node = value.node
            # Only a node that nothing waits for: more edges into it can never close a cycle.
            if not graph.is_read(node) and node.op not in SOURCES:
                for reader in readers(graph, graph.node(name)[0]):
                    if reader is not node:
                        edge(position[reader.name], position[node.name])
    return successors, waiting


def readers(graph: Graph, value: Value) -> list[Node]:
    """Nodes that read a value, directly or through views, each once."""
    found: dict[str, Node] = {}
    stack = [value]
    while stack:
        for node, _ in graph.users(stack.pop()):
            if is_view(node):
                stack.append(node[0])
            else:
                found[node.name] = node
    return list(found.values())

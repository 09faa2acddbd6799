"""Compute values again instead of keeping them, until the memory plan fits a limit.

A step is an order of executions in which a node may come more than once: readers take what the
latest execution before them made. Between its last reader before a position and the first one after
it, a value that is computed again need not exist. This is the view of Checkmate (Jain et al. 2020);
the choice is greedy, as in XLA's rematerialization: whatever frees most bytes at the fullest
position for the time it takes, over and over, so that a chain of layers falls apart into segments
that are computed again one after the other (Chen et al. 2016, Training Deep Nets with Sublinear
Memory Cost).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphc import errors
from graphc.ir import SOURCES, Graph, Node, Value, is_view, root
from passes.base import Pass, note
from passes.liveness import (
    SizeOf,
    group_limits,
    live_bytes,
    storage_bytes,
    storages,
    updated_in_place,
)
from passes.plan_memory import place

# An operand of at most this share of the bytes that are freed is kept longer, not computed again.
_SMALL = 1 / 8
# What frees less than this share of the peak is not worth a step.
_LEAST = 1 / 1000
# Seconds that a launch takes whatever it does.
_LAUNCH = 2e-6


@dataclass(frozen=True)
class Recomputation:
    """What is computed again in a step.

    nodes: names of the first executions, one for each repetition. seconds: predicted time of the
    repetitions; share: of the step's predicted time without them. peak_before: largest sum of live
    bytes without them.
    """

    nodes: tuple[str, ...]
    seconds: float
    share: float
    peak_before: int

    def __str__(self) -> str:
        return (
            f"{len(self.nodes)} regions, predicted to take {1e3 * self.seconds:.2f} ms a step "
            f"(+{100 * self.share:.1f}%); without, {self.peak_before} bytes live at the peak"
        )


@dataclass(frozen=True)
class Rematerialize(Pass):
    """Repeat nodes of a graph until its arena has at most `limit` bytes.

    Requires: layouts and the final order. `seconds(node)` predicts the time of a node. Ensures:
    results are equal bit for bit, as a repeated region is the same kernel; a graph whose arena fits
    is left as it is. Groups stay together: a region is repeated before the group that reads it. A
    repetition has the origin of the first execution with the phase of its reader.
    `annotations["recomputed"]` is a `Recomputation`. No pass may change the order afterwards.
    Without a limit, where more than `from_bytes` are live at once, repeats what lowers the peak
    most for the time it takes, in at most `longest` times the time of the step.
    Raises CompileError for a limit out of reach, saying the least that is within reach: that of the
    smallest plan found by repeating until nothing lowers the peak any more, or until repetitions
    would take more than `longest` times the predicted time of the step.
    """

    limit: int | None
    seconds: Callable[[Node], float]
    longest: float = 1.0
    from_bytes: int = 0
    size_of: SizeOf = storage_bytes
    updates_in_place: bool = False

    def run(self, graph: Graph) -> Graph:
        graph.released = False  # more than one graph is made of it
        start = _State(graph, graph.nodes, self.size_of, self.updates_in_place)
        if self.limit is None and start.peak <= self.from_bytes:
            return graph
        seconds = {n.name: self.seconds(n) for n in graph if n.op not in SOURCES and not is_view(n)}
        if self.limit is None:
            return self._finished(start, self._lowest(start, seconds), seconds)
        found = self._reduced(start, self.limit, self.limit, seconds)
        if found.arena > self.limit:
            # Steps of another size reach another end: the least is what the largest ones reach.
            found = self._reduced(start, self.limit, 0, seconds)
        if found.arena > self.limit:
            raise errors.CompileError(
                f"memory_limit of {self.limit} bytes: graph {graph.name!r} needs {found.arena} "
                f"bytes of activations at least ({found.arena / 1e6:.1f} MB) even when it computes "
                f"values again for {100 * self.longest:.0f}% more time; {found.fullest_values()}; "
                f"use a smaller batch or raise the limit"
            )
        return self._finished(start, found, seconds)

    def _lowest(self, state: _State, seconds: dict[str, float]) -> _State:
        """The last state that `longest` allows."""
        while (following := self._step(state, 0, seconds)) is not None:
            state.program.dissolve()
            state = following
        return state

    def _reduced(self, state: _State, limit: int, goal: int, seconds: dict[str, float]) -> _State:
        """The first state whose arena has at most `limit` bytes, else the one with the smallest."""
        best = state
        while best.arena > limit:
            following = self._step(state, goal, seconds)
            if following is None:
                break
            state = following
            if state.peak < best.arena and state.arena < best.arena:
                best = state
        return best

    def _step(self, state: _State, goal: int, seconds: dict[str, float]) -> _State | None:
        """A state with less at the fullest position and less than that everywhere, of repetitions
        that take no more than `longest` allows."""
        left = (self.longest - state.share(seconds)) * sum(seconds.values())

        def takes(candidate: _Candidate) -> float:
            return sum(_LAUNCH + seconds[n.name] for n in candidate.nodes)

        ranked = [c for c in state.candidates() if takes(c) <= left]
        ranked.sort(key=lambda c: c.freed / takes(c), reverse=True)
        chosen: list[_Candidate] = []
        freed = 0
        for candidate in ranked:
            if freed >= max(1, state.peak - goal):
                break
            if takes(candidate) <= left and all(map(candidate.independent, chosen)):
                chosen.append(candidate)
                freed += candidate.freed
                left -= takes(candidate)
        for attempt in (chosen, *([c] for c in ranked)):
            if attempt:
                following = state.after(attempt)
                if following.fullness < state.fullness:
                    return following
                following.program.dissolve()
        return None

    def _finished(self, start: _State, found: _State, seconds: dict[str, float]) -> Graph:
        """The program, its repetitions labelled."""
        graph = found.program
        repeated: list[str] = []
        for i in reversed(range(len(found.order))):
            node, first = found.nodes[i], found.order[i]
            if i == found.executions[first.name][0]:
                continue
            phases = [user.origin.phase for v in node.outputs for user, _ in graph.users(v)]
            node.origin = replace(node.origin, phase=(phases or [node.origin.phase])[0])
            if "body" in node.attrs:
                node.attrs["body"] = node.attrs["body"].copy()
            if first.name in seconds:
                repeated.append(first.name)
        again = sum(seconds[name] for name in repeated)
        done = Recomputation(tuple(reversed(repeated)), again, found.share(seconds), start.peak)
        if repeated:
            graph.annotations["recomputed"] = done
        note(graph, f"computed again: {done}")
        return graph


@dataclass(frozen=True)
class _Candidate:
    """Nodes to repeat before a position, in order; `freed` bytes at the fullest one.

    `dropped` are the nodes whose values need not be kept, `needed` those whose values the
    repetition reads: first executions by name, views left out."""

    nodes: tuple[Node, ...]
    position: int
    freed: int
    dropped: frozenset[str]
    needed: frozenset[str]

    def independent(self, other: _Candidate) -> bool:
        """Whether both may be done in one step."""
        repeated = {n.name for n in self.nodes}
        return not (
            self.dropped & other.needed
            or self.needed & other.dropped
            or repeated & {n.name for n in other.nodes}
        )


class _State:
    """An order of executions of a graph's nodes, with what it needs of memory.

    `program` is the graph with a node for each execution: `program.nodes[i]` is an execution of
    `order[i]`."""

    def __init__(self, graph: Graph, order: Sequence[Node], size_of: SizeOf, in_place: bool):
        self.graph, self.order = graph, list(order)
        self.size_of, self.in_place = size_of, in_place
        self.program = graph.reordered(self.order)
        self.nodes = self.program.nodes
        self.pieces = storages(self.program, size_of, updates_in_place=in_place)
        self.live = live_bytes(self.pieces, len(self.nodes))
        self.peak = max(self.live)
        self.fullest = self.live.index(self.peak)
        self.fullness = (self.peak, self.live.count(self.peak))

    @cached_property
    def arena(self) -> int:
        """Bytes of the arena of its plan."""
        offsets = place(self.pieces)
        return max((o + p.size for o, p in zip(offsets, self.pieces, strict=True)), default=0)

    @cached_property
    def position(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.nodes)}

    @cached_property
    def readers(self) -> dict[Value, list[int]]:
        """Positions that read a value, directly or through views; the end for results."""
        found: dict[Value, list[int]] = {}
        for i, node in enumerate(self.nodes):
            if not is_view(node):
                for value in dict.fromkeys(map(root, node.inputs)):
                    found.setdefault(value, []).append(i)
        for value in dict.fromkeys(map(root, self.program.results)):
            found.setdefault(value, []).append(len(self.nodes))
        return found

    @cached_property
    def executions(self) -> dict[str, list[int]]:
        """Positions of a node of the graph."""
        found: dict[str, list[int]] = {}
        for i, node in enumerate(self.order):
            found.setdefault(node.name, []).append(i)
        return found

    @cached_property
    def groups(self) -> tuple[dict[int, int], dict[int, int]]:
        """First and last position of the group that a position is in."""
        return group_limits(self.program, self.nodes)

    @cached_property
    def overwritten(self) -> dict[Value, int]:
        """Where parameters and states take their new value, if that happens in place."""
        if not self.in_place:
            return {}
        updates = updated_in_place(self.program)
        return {self.program.node(n)[0]: self.position[v.node.name] for n, v in updates.items()}

    @cached_property
    def views(self) -> dict[str, list[Node]]:
        """Nodes of the graph that show a node's values under other shapes, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.graph:
            if is_view(node):
                found.setdefault(root(node[0]).node.name, []).append(node)
        return found

    def last(self, value: Value) -> int:
        """Position up to which a value exists."""
        return max(self.readers.get(value, ()), default=self.position[value.node.name])

    def share(self, seconds: dict[str, float]) -> float:
        """Time of the repetitions, as a share of the time of one execution of each node."""
        once = sum(seconds.values())
        return sum(seconds.get(n.name, 0.0) for n in self.order) / once - 1.0 if once else 0.0

    def fullest_values(self) -> str:
        """Where most is live, and the largest values that are."""
        here = self.fullest
        live = [p.values[0] for p in self.pieces if p.first <= here <= p.last and p.values]
        largest = sorted(live, key=self.size_of, reverse=True)[:3]
        named = ", ".join(f"{v.name!r} {v.type}" for v in largest)
        return f"most is live at {self.nodes[here].describe()}, the largest of it {named}"

    def candidates(self) -> Iterator[_Candidate]:
        """What may be repeated so that less is live at the fullest position."""
        begin, end = (limits.get(self.fullest, self.fullest) for limits in self.groups)
        idle: dict[int, list[Value]] = {}
        for piece in self.pieces:
            if piece.first < begin and end < piece.last and piece.values:
                made = [v for v in piece.values if self.position[v.node.name] < begin]
                readers = self.readers[made[-1]]
                busy = any(begin <= r <= end for r in readers)
                if not busy and end < max(readers) < len(self.nodes):
                    idle.setdefault(self.position[made[-1].node.name], []).append(made[-1])
        for execution, values in idle.items():
            reader = min(r for v in values for r in self.readers[v] if r > end)
            position = self.groups[0].get(reader, reader)
            freed = sum(self.size_of(v) for v in values)
            found = self._repetition(execution, position, freed)
            if found is not None and found.freed > _LEAST * self.peak:
                yield found

    def _repetition(self, execution: int, position: int, freed: int) -> _Candidate | None:
        """How to repeat an execution before `position`, repeating also what it needs of the dead.

        None where a parameter has taken its new value or what is needed never leaves its group."""
        repetition = _Repetition(self, position, freed)
        if not repetition.add(execution):
            return None
        held = repetition.held.items()
        kept = sum(size for v, size in held if self.last(v) < self.fullest)
        return _Candidate(
            tuple(self.order[number] for number in repetition.repeated),
            position,
            freed - kept,
            frozenset({self.order[execution].name}),
            frozenset(repetition.needed),
        )

    def after(self, chosen: Sequence[_Candidate]) -> _State:
        """The state with repetitions added.

        Where the next execution of a repeated node is so near that its values can as well be kept
        until there, the new one takes its place."""
        added: dict[int, list[Node]] = {}
        dropped: set[int] = set()
        for candidate in chosen:
            again = [n for node in candidate.nodes for n in (node, *self.views.get(node.name, ()))]
            added.setdefault(candidate.position, []).extend(again)
            for node in candidate.nodes:
                for later in self.executions[node.name]:
                    if later < candidate.position:
                        continue
                    between = max(self.live[candidate.position : later + 1])
                    if between + sum(map(self.size_of, node.outputs)) < self.peak:
                        dropped.add(later)
                    break
        order: list[Node] = []
        for i, node in enumerate(self.order):
            order += added.get(i, ())
            order += () if i in dropped else (node,)
        grouped = {n for _, names in self.graph.annotations.get("groups", ()) for n in names}
        order = _useful(order, self.graph.results, grouped)
        return _State(self.graph, order, self.size_of, self.in_place)


class _Repetition:
    """What is repeated before a position: executions in order, values that have to be `held` until
    then, with their bytes, and the nodes that are `needed` for it."""

    def __init__(self, state: _State, position: int, freed: int):
        self.state, self.position = state, position
        self.small = _SMALL * freed
        self.repeated: dict[int, None] = {}
        self.held: dict[Value, int] = {}
        self.needed: set[str] = set()

    def add(self, number: int) -> bool:
        """Repeat an execution, and before it what it reads of the dead; False if that cannot be."""
        state, node = self.state, self.state.nodes[number]
        if any(v.layout.copies for v in (*node.inputs, *node.outputs)):
            return False  # memory of one block at a time
        for value in dict.fromkeys(map(root, node.inputs)):
            if value.node.op in SOURCES or "prepared" in value.node.attrs:
                if state.overwritten.get(value, math.inf) < self.position:
                    return False
                continue
            name = state.order[state.position[value.node.name]].name
            latest = max(run for run in state.executions[name] if run < self.position)
            current = state.nodes[latest][value.index]
            if state.last(current) >= self.position or state.size_of(value) <= self.small:
                self.needed.add(name)
                self.held[current] = state.size_of(value)
            elif latest not in self.repeated and not self.add(latest):
                return False
        self.repeated[number] = None
        return True


def _useful(
    order: Sequence[Node], results: Sequence[Value], grouped: Collection[str]
) -> list[Node]:
    """The executions whose values are read before the next one of the same node, sources, and the
    first executions of members of groups."""
    first = {node.name: i for i, node in reversed(list(enumerate(order)))}
    wanted = {v.node.name for v in results}
    kept = []
    for i, node in reversed(list(enumerate(order))):
        member = node.name in grouped and first[node.name] == i
        if node.op in SOURCES or member or node.name in wanted:
            wanted.discard(node.name)
            wanted.update(v.node.name for v in node.inputs)
            kept.append(node)
    return kept[::-1]

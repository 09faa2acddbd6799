"""Which values occupy an arena, which share storage, and from when to when each lives.

Sources (inputs, parameters, states, constants) live outside the arena for as long as the executable
does. Every other value has a storage of its own, unless it is a view or is computed in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from graphc.ir import ALIGNMENT, SOURCES, Graph, Node, Value, block_bytes, is_view, root

SizeOf = Callable[[Value], int]
_Limits = tuple[dict[int, int], dict[int, int]]  # first and last position, by position


def storage_bytes(value: Value) -> int:
    """Bytes a value occupies in its layout, for all threads, rounded up to the alignment."""
    return block_bytes(value) * max(1, value.layout.copies)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class Storage:
    """One piece of arena memory: `values` live in it one after another or as views of each other.

    `first` and `last` are positions in the execution order, both inclusive: the storage is written
    at `first` and read up to `last`, so two storages may share bytes only if these ranges are
    disjoint. What a group keeps for the block at hand alone (layouts with `copies`) is one storage:
    each thread's share holds the same `parts`, whose own ranges lie within the group.
    """

    name: str
    size: int
    first: int
    last: int
    values: list[Value] = field(default_factory=list)
    parts: list[Storage] = field(default_factory=list)
    copies: int = 1


def storages(
    graph: Graph,
    size_of: SizeOf = storage_bytes,
    *,
    outputs_live: bool = True,
    updates_in_place: bool = False,
    order: list[Node] | None = None,
) -> list[Storage]:
    """The arena storages of a graph in its execution order, or in another `order` of its nodes, in
    order of their first position.

    A node's attribute `inplace`, ((output number, operand slot), ...), allows that output to
    overwrite that operand: it does where the operand dies there and both have the same size. A
    node's attribute `workspace_bytes` is a storage that lives at its position alone. The size of
    scratch memory is the least that its parts need.
    outputs_live: outputs and updates stay readable until the end of the step (else until the last
    node that reads them: the caller copies them out as they are made).
    updates_in_place: leave out updates that can be computed straight into the parameter or state
    they update (`updated_in_place`).
    """
    nodes = graph.nodes if order is None else order
    elsewhere = set(updated_in_place(graph, nodes).values()) if updates_in_place else set()
    pinned = {root(v) for v in graph.results} if outputs_live else set()
    last_use = _last_uses(nodes)
    owner: dict[Value, Storage] = {}
    result: list[Storage] = []
    for position, node in enumerate(nodes):
        if node.op in SOURCES or is_view(node) or "prepared" in node.attrs:
            continue
        for value in node.outputs:
            if value in elsewhere:
                continue
            last = len(nodes) if value in pinned else last_use.get(value, position)
            size = size_of(value)
            storage = _overwritten(node, value, size, position, owner)
            if storage is None:
                storage = Storage(value.name, size, position, last)
                result.append(storage)
            storage.last = max(last, position)
            storage.values.append(value)
            owner[value] = storage
        workspace = node.attrs.get("workspace_bytes", 0)
        if workspace:
            name = f"{node.name}.workspace"
            result.append(Storage(name, aligned(workspace), position, position))
    return _in_groups(result, group_limits(graph, nodes), _run_limits(graph, nodes))


def _in_groups(pieces: list[Storage], groups: _Limits, runs: _Limits) -> list[Storage]:
    """Let storages of groups live through all of it; those of one thread become parts of one.

    A thread runs the kernels of its block in their order, so there they follow each other, but for
    runs that go through the block strip by strip."""
    begin, end = groups
    result: list[Storage] = []
    scratch: dict[int, Storage] = {}
    for piece in pieces:
        copies = piece.values[0].layout.copies if piece.values else 0
        first, last = begin.get(piece.first, piece.first), end.get(piece.last, piece.last)
        if not copies:
            piece.first, piece.last = first, last
            result.append(piece)
            continue
        piece.size //= copies
        piece.first = runs[0].get(piece.first, piece.first)
        piece.last = runs[1].get(piece.last, piece.last)
        if first not in scratch:
            scratch[first] = Storage(f"{piece.name}.scratch", 0, first, last, copies=copies)
            result.append(scratch[first])
        scratch[first].parts.append(piece)
    for whole in scratch.values():
        whole.size = whole.copies * peak_bytes(whole.parts)
    return result


def group_limits(graph: Graph, nodes: list[Node]) -> _Limits:
    """First and last position of the group that a position belongs to.

    A group runs block by block: its first kernel writes its last block after its last kernel has
    read the first one, so all its values live at once."""
    position = {node.name: i for i, node in enumerate(nodes)}
    groups = graph.annotations.get("groups", ())
    return _limits([[position[name] for name in names] for _, names in groups])


def _run_limits(graph: Graph, nodes: list[Node]) -> _Limits:
    """The same of runs within groups that go through a block strip by strip."""
    position = {node.name: i for i, node in enumerate(nodes)}
    return _limits([[position[name] for name in run] for run in strip_runs(graph)])


def strip_runs(graph: Graph) -> Iterator[tuple[str, ...]]:
    """The nodes of each run within a group that goes through a block strip by strip, in order."""
    runs = graph.annotations.get("strips", {})
    for _, names in graph.annotations.get("groups", ()):
        for begin, name in enumerate(names):
            if name in runs:
                _, length = runs[name]
                yield names[begin : begin + length]


def _limits(members: list[list[int]]) -> _Limits:
    begin: dict[int, int] = {}
    end: dict[int, int] = {}
    for first, *_, last in members:
        begin.update(dict.fromkeys(range(first, last + 1), first))
        end.update(dict.fromkeys(range(first, last + 1), last))
    return begin, end


def _last_uses(nodes: list[Node]) -> dict[Value, int]:
    """Position of the last reader of each storage root; views read nothing themselves."""
    last: dict[Value, int] = {}
    for position, node in enumerate(nodes):
        if not is_view(node):
            for value in node.inputs:
                last[root(value)] = position
    return last


def _overwritten(
    node: Node, value: Value, size: int, position: int, owner: dict[Value, Storage]
) -> Storage | None:
    """The storage of an operand that this output may take over."""
    allowed = {slot for output, slot in node.attrs.get("inplace", ()) if output == value.index}
    roots = [root(v) for v in node.inputs] if allowed else []
    for slot in sorted(allowed):
        storage = owner.get(roots[slot])
        if storage is None or storage.size != size or storage.last != position:
            continue
        # A thread's own block is no place for a value of the whole batch, even one as large.
        if roots[slot].layout.copies != value.layout.copies:
            continue
        # An earlier output of this node may have taken it, or another slot may read it in another
        # way.
        if any(v.node is node for v in storage.values):
            continue
        if all(owner.get(r) is not storage or s in allowed for s, r in enumerate(roots)):
            return storage
    return None


def uses(graph: Graph, value: Value) -> Iterator[tuple[Node, int]]:
    """(consumer, operand slot) of every use of a value, directly or through views."""
    for node, slot in graph.users(value):
        if is_view(node):
            yield from uses(graph, node[0])
        else:
            yield node, slot


def updated_in_place(graph: Graph, order: list[Node] | None = None) -> dict[str, Value]:
    """Updates that may be written straight into the parameter or state they update, by its name.

    Holds where nothing reads the old contents after the node that computes the new ones, and that
    node itself reads them either not at all or in slots that its attribute `inplace` pairs with the
    output.
    """
    nodes = graph.nodes if order is None else order
    position = {node.name: i for i, node in enumerate(nodes)}
    results = {root(v) for v in graph.results}
    taken: dict[str, Value] = {}
    used: set[Value] = set()
    for name, value in graph.updates.items():
        old, node = graph.node(name)[0], value.node
        if node.op in SOURCES or is_view(node) or old in results or value in used:
            continue
        if value.layout != old.layout:
            continue
        allowed = {slot for output, slot in node.attrs.get("inplace", ()) if output == value.index}
        if all(
            position[reader.name] < position[node.name] or (reader is node and slot in allowed)
            for reader, slot in uses(graph, old)
        ):
            taken[name] = value
            used.add(value)
    return taken


def live_bytes(storage: Sequence[Storage], positions: int, start: int = 0) -> list[int]:
    """Bytes live at each position from `start` to `positions`, the one after the last."""
    change = [0] * (positions - start + 2)
    for s in storage:
        change[s.first - start] += s.size
        change[s.last - start + 1] -= s.size
    return list(itertools.accumulate(change[:-1]))


def peak_bytes(storage: Sequence[Storage]) -> int:
    """Bytes of the largest set of storages that live at the same time."""
    if not storage:
        return 0
    return max(live_bytes(storage, max(s.last for s in storage), min(s.first for s in storage)))

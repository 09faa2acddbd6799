"""Fuse: group operators into regions that become one kernel each.

A region is a set of nodes whose values stay in registers: elementwise chains, the epilogue of a
convolution or a product, pooling over a convolution, reductions with what feeds them and what
follows them. Each region becomes one node `fused` whose attribute `body` is the region as a graph.
"""

from __future__ import annotations

import heapq
import logging
from collections import defaultdict
from dataclasses import dataclass

from graphc.ir import SOURCES, Graph, Node, Value
from graphc.ops.registry import get
from passes.base import Pass

log = logging.getLogger("graphc.fusion")
CONTRACTIONS = frozenset(
    "matmul conv2d conv2d_input_grad conv2d_weight_grad tile_transform tile_transform_grad "
    "toom_conv toom_conv_input_grad toom_conv_weight_grad "
    "patch_transform patch_transform_grad patch_product patch_weight_grad batch_parts".split()
)
WINDOWS = frozenset({"max_pool2d", "max_pool2d_argmax", "avg_pool2d"})
# Their lowerings cut the spatial loops at the stride, from position 0 on.
TRANSPOSED_WINDOWS = frozenset({"max_unpool2d", "avg_pool2d_grad"})
REDUCTIONS = frozenset({"sum", "max", "min", "prod", "argmax"})
# Index maps: they cost nothing where they are read, so every reader gets its own copy.
VIEWS = frozenset({"transpose", "expand", "squeeze", "unsqueeze", "slice", "depth_to_space"})
# Channels of one phase that fill whole vectors of any machine.
_WHOLE = 16
# Functions of one element that cost no more than reading their result would.
CHEAP = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "logical_not", "cast", "one_hot"})
UPDATE = "update"
# A reduction of fewer elements may as well wait for the whole batch.
_MANY = 16
# Operators of a region: expressions are walked recursively, level by level.
MOST = 64
# Constants of at most so many elements are known to the code generator (transform matrices).
KNOWN = 256


@dataclass(frozen=True)
class Fuse(Pass):
    """Group the nodes of a decomposed graph into `fused` nodes.

    Precondition: shapes are bound and composite operators are decomposed. Postcondition: every node
    is a source, a `reshape` (an alias of its operand) or `fused`. `enabled=False` puts each node by
    itself. `pooled=False` never puts a window over a convolution: where threads compute a
    convolution's tile, a window across it is more than one of them has. The reasons why neighbours
    were kept apart are in `graph.annotations["not_fused"]`.
    """

    enabled: bool = True
    pooled: bool = True

    def run(self, graph: Graph) -> Graph:
        kept = _keep_axes(graph)
        fused = _Fuser(kept, self).run()
        kept.dissolve()
        return fused


def _keep_axes(graph: Graph) -> Graph:
    """Reductions keep their axes as 1 and a view drops them: all values of a region align."""

    def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
        if node.op not in REDUCTIONS or node.attrs["keepdims"] or not node.inputs[0].rank:
            return None
        kept = new.add(node.op, inputs, {**node.attrs, "keepdims": True}, name=node.name)
        return new.add(
            "reshape", kept.outputs, {"shape": node.types[0].shape}, name=f"{node.name}.squeeze"
        ).outputs

    return graph.rebuild(visit)


def is_view(node: Node) -> bool:
    """Whether a node's readers can as well read its operand.

    It renames indices, or compares or casts."""
    if node.op in CHEAP:
        return sum(not _is_scalar_constant(v) for v in node.inputs) == 1
    if node.op == "space_to_depth":  # phases that share vectors are stored, and fill them then
        return node.inputs[0].sizes[1] % _WHOLE == 0
    return node.op in VIEWS or (node.op == "reshape" and _only_ones_differ(node))


def viewed(node: Node) -> Value:
    """The operand that a view shows."""
    if node.op not in CHEAP:
        return node.inputs[0]
    return next(v for v in node.inputs if not _is_scalar_constant(v))


def _is_scalar_constant(value: Value) -> bool:
    return value.node.op == "constant" and value.type.size == 1


def is_alias(node: Node) -> bool:
    """Whether a node's value is its operand's memory under another shape."""
    return node.op == "reshape" and not _only_ones_differ(node)


def _only_ones_differ(node: Node) -> bool:
    before = [d for d in node.inputs[0].shape if d != 1]
    after = [d for d in node.types[0].shape if d != 1]
    return before == after


@dataclass(eq=False)
class _Group:
    """Nodes that become one region.

    first, last: positions of its first and last member. reads, read_by: names of the other nodes
    whose values it reads, sources left out, and that read its own, both behind views. results: its
    values that must be stored, as they are results or read from outside. ops: the operators of its
    members. update: whether they are the optimizer's."""

    members: list[Node]
    first: int
    last: int
    reads: set[str]
    read_by: set[str]
    results: list[Value]
    ops: set[str]
    update: bool


class _Fuser:
    def __init__(self, graph: Graph, options: Fuse):
        self.graph, self.options = graph, options
        self.nodes = [n for n in graph.nodes if n.op not in SOURCES]
        self.position = {n.name: i for i, n in enumerate(graph.nodes)}
        self.users: dict[Value, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for value in dict.fromkeys(node.inputs):
                self.users[value].append(node)
        self.kept = set(graph.results)
        # Names of the nodes that read a value, directly or through views, which are no kernels of
        # their own; and the values that are results, or have a view that is one.
        self.read_by: dict[Value, frozenset[str]] = {}
        self.shown = set(self.kept)
        for node in reversed(self.nodes):
            if is_view(node) and node[0] in self.shown:
                self.shown.add(viewed(node))
            self.read_by.update((v, self._readers(v)) for v in node.outputs)
        # What a node reads: each operand, and the node that makes it behind views.
        self.sources = {
            n.name: [(v, self.through_views(v.node)) for v in n.inputs] for n in self.nodes
        }
        self.group = {n.name: self.alone(n) for n in self.nodes}
        self.reasons: dict[tuple[str, str], str] = {}
        self.summed: dict[str, bool] = {}

    def run(self) -> Graph:
        if self.options.enabled:
            self.merge_siblings()
            for node in self.nodes:
                if not self.boundary(node):
                    for value in node.inputs:
                        self.try_merge(value.node, node)
        result = self.build()
        result.annotations["not_fused"] = dict(self.reasons)
        for (producer, consumer), reason in self.reasons.items():
            log.info("%s -> %s: %s", producer, consumer, reason)
        return result

    # ---- grouping

    def alone(self, node: Node) -> _Group:
        """The group of one node."""
        position, update = self.position[node.name], node.origin.phase == UPDATE
        reads = {s.name for _, s in self.sources[node.name] if s.op not in SOURCES}
        read_by = set().union(*[self.read_by[v] for v in node.outputs])
        results = [v for v in node.outputs if v in self.shown or self.read_by[v]]
        return _Group([node], position, position, reads, read_by, results, {node.op}, update)

    def boundary(self, node: Node) -> bool:
        return node.op in SOURCES or is_alias(node) or is_view(node)

    def merge_siblings(self) -> None:
        """Reductions and windows of one operand with equal geometry share their loops."""
        seen: dict[tuple, Node] = {}
        for node in self.nodes:
            if node.op in WINDOWS | REDUCTIONS and node.op != "argmax":
                key = (node.inputs, tuple(sorted((k, repr(v)) for k, v in node.attrs.items())))
                if key in seen and not self.path_outside(
                    self.group[seen[key].name], self.group[node.name]
                ):
                    self.join(seen[key], node)
                else:
                    seen[key] = node

    def try_merge(self, producer: Node, consumer: Node) -> None:
        producer = self.through_views(producer)
        if self.boundary(producer):
            return
        a, b = self.group[producer.name], self.group[consumer.name]
        if a is b:
            return
        reason = self.refuse(a, b)
        if reason:
            self.reasons[producer.name, consumer.name] = reason
        else:
            self.join(producer, consumer)

    def through_views(self, node: Node) -> Node:
        while is_view(node):
            node = viewed(node).node
        return node

    def join(self, first: Node, second: Node) -> None:
        a, b = self.group[first.name], self.group[second.name]
        if len(a.members) < len(b.members):
            a, b = b, a
        a.results = self.joint_results(a, b)
        a.first, a.last = min(a.first, b.first), max(a.last, b.last)
        a.ops |= b.ops
        a.members += b.members
        for node in b.members:
            self.group[node.name] = a
        a.reads = {name for name in a.reads | b.reads if self.group[name] is not a}
        a.read_by = {name for name in a.read_by | b.read_by if self.group[name] is not a}

    def refuse(self, a: _Group, b: _Group) -> str:
        """Why two groups cannot be one region, or "" if they can."""
        if len(a.members) + len(b.members) > MOST:
            return f"one kernel holds {MOST} operators at most"
        if a.update != b.update:
            return "the update runs after every use of the old value"
        ops = a.ops | b.ops
        heavy = not CONTRACTIONS.isdisjoint(ops)
        if not (CONTRACTIONS.isdisjoint(a.ops) or CONTRACTIONS.isdisjoint(b.ops)):
            return "one kernel holds one contraction"
        if heavy and "pad" in ops:
            return "padding writes around a contraction's register tile"
        if heavy and "max_unpool2d" in ops:
            return "unpooling reads each element of a contraction several times"
        if "pad" in ops and (reason := self.pads_reduced([*a.members, *b.members])):
            return reason
        # The members of each that read the other.
        across = [name for name in b.read_by if self.group[name] is a]
        across += [name for name in a.read_by if self.group[name] is b]
        for name in sorted(across, key=self.position.__getitem__):
            node, other = self.graph.node(name), b if self.group[name] is a else a
            for value, source in self.sources[node.name]:
                if self.group.get(source.name) is not other:
                    continue
                if node.op in CONTRACTIONS:
                    return f"each element of {source.name!r} is read many times by {node.name!r}"
                pooled = source.op == "conv2d" and self.options.pooled
                if node.op in WINDOWS and not (pooled and _disjoint(node)):
                    return (
                        f"overlapping or stored windows of {source.name!r} would be computed again"
                    )
                if node.op in REDUCTIONS and source.op in CONTRACTIONS | WINDOWS:
                    return f"{node.name!r} reduces across the register tile of {source.name!r}"
                if source.op in TRANSPOSED_WINDOWS and (node.op == "pad" or is_view(value.node)):
                    return f"{node.name!r} reads {source.name!r} across the stride of its windows"
                if node.op in REDUCTIONS and _ends_block(node, source):
                    return f"{source.name!r} ends with its block of the batch, {node.name!r} later"
                if source.op in CONTRACTIONS and self.is_summed(node):
                    return f"{node.name!r} is summed, which {source.name!r} cannot do in its tile"
                if source.op in CONTRACTIONS and is_view(value.node):
                    return f"{value.node.name!r} reorders the register tile of {source.name!r}"
                if not (
                    node.op in REDUCTIONS | WINDOWS | {"max_unpool2d", "pad"}
                    or get(node.op).elementwise
                ):
                    return f"{node.name!r} ({node.op}) reads its operand from memory"
                if node.op == "pad" and source.op in CONTRACTIONS | WINDOWS | REDUCTIONS:
                    return f"{node.name!r} writes around the register tile of {source.name!r}"
                if node.op == "max_unpool2d" and not get(source.op).elementwise:
                    return f"each element of {source.name!r} is read several times by {node.name!r}"
        results = self.joint_results(a, b)
        if not results:
            return ""
        reduced = REDUCTIONS & ops
        reductions = [n for n in (*a.members, *b.members) if n.op in reduced] if reduced else []
        if reason := self.shapes_differ(reductions, results, ops):
            return reason
        if self.path_outside(a, b):
            return "another kernel between them needs the one and feeds the other"
        return ""

    def pads_reduced(self, nodes: list[Node]) -> str:
        """Why nodes cannot be one region, or "": one pads what another has reduced."""
        reduced: set[str] = set()  # reductions, and what depends on them
        for node in sorted(nodes, key=lambda n: self.position[n.name]):
            late = [source for _, source in self.sources[node.name] if source.name in reduced]
            if late and node.op == "pad":
                return f"{late[0].name!r} would be reduced again for each element padded"
            if late or node.op in REDUCTIONS:
                reduced.add(node.name)
        return ""

    def shapes_differ(self, reductions: list[Node], results: list[Value], ops: set[str]) -> str:
        """Why a region of these reductions, results and operators cannot share loops, or ""."""
        shapes = {v.sizes for v in results}
        if len(shapes) == 1 and not reductions:
            return ""
        if len({len(s) for s in shapes}) > 1:
            return f"results of different ranks {sorted(shapes)}"
        outer, reduced = _outer(reductions, shapes)
        if any(d != o and o != 1 for s in shapes for d, o in zip(s, outer, strict=True)):
            return f"results of different shapes {sorted(shapes)}"
        if all(s == outer for s in shapes) and not reduced:
            return ""
        if not ops.isdisjoint(WINDOWS | CONTRACTIONS | {"max_unpool2d"}):
            return f"results of different shapes {sorted(shapes)}"
        if not reductions:
            return (
                f"a broadcast value {list(outer)} is stored once, its readers run over other axes"
            )
        if 0 in reduced and any(s != outer for s in shapes):
            return "a sum over the batch ends before what follows it can begin"
        for node in reductions:
            if node.inputs[0].rank != len(outer):
                return f"{node.name!r} reduces a value of another rank"
        return ""

    def is_summed(self, node: Node) -> bool:
        """Whether an elementwise result, or one of such results alone, is reduced image by image:
        what is reduced is then made in the loops that reduce it."""
        if node.name not in self.summed:
            self.summed[node.name] = get(node.op).elementwise and any(
                0 not in user.attrs["axis"]
                if user.op in REDUCTIONS
                else not is_view(user) and self.is_summed(user)
                for value in node.outputs
                for user in self.users[value]
            )
        return self.summed[node.name]

    def results(self, nodes: list[Node]) -> list[Value]:
        """The values of a region that must be stored: results, or read by a node outside it."""
        inside = {n.name for n in nodes}
        values = [v for n in nodes for v in n.outputs]
        return [v for v in values if v in self.shown or not self.read_by[v] <= inside]

    def joint_results(self, a: _Group, b: _Group) -> list[Value]:
        """The results of two groups as one, in no order."""
        union = (a, b)
        return [
            v
            for v in (*a.results, *b.results)
            if v in self.shown or any(self.group[name] not in union for name in self.read_by[v])
        ]

    def path_outside(self, a: _Group, b: _Group) -> bool:
        """Whether a path leaves the union of two groups and comes back.

        Fusing would make a cycle. Searched from both ends, and over when one of them has nowhere to
        go: what the backward pass reads of a layer has thousands of groups on its one side, and few
        on the other. Groups that begin after the union's end are not in any group's way to it, as
        consumers are merged in order."""
        union, last = {a, b}, max(a.last, b.last)
        front = {g for g in self.readers(a) | self.readers(b) if g.first <= last} - union
        back = (self.producers(a) | self.producers(b)) - union if front else set()
        reached, needed = set(front), set(back)
        while front and back and reached.isdisjoint(needed):
            if len(reached) < len(needed):
                found = {r for g in front for r in self.readers(g) if r.first <= last}
                front = found - reached - union
                reached |= front
            else:
                back = {p for g in back for p in self.producers(g)} - needed - union
                needed |= back
        return not reached.isdisjoint(needed)

    def readers(self, group: _Group) -> set[_Group]:
        """The groups that read a group's values."""
        return {self.group[name] for name in group.read_by}

    def producers(self, group: _Group) -> set[_Group]:
        """The groups whose values a group reads."""
        return {self.group[name] for name in group.reads}

    def _readers(self, value: Value) -> frozenset[str]:
        names: set[str] = set()
        for user in self.users[value]:
            names |= self.read_by[user[0]] if is_view(user) else {user.name}
        return frozenset(names)

    # ---- building the fused graph

    def build(self) -> Graph:
        order = self.group_order()
        new = Graph(self.graph.name)
        new.annotations = dict(self.graph.annotations)
        mapping: dict[Value, Value] = {}
        for item in order:
            if isinstance(item, Node):
                node = new.copy_node(item, tuple(mapping[v] for v in item.inputs))
                mapping.update(zip(item.outputs, node.outputs, strict=True))
            else:
                self.emit_region(new, item, mapping)
        new.outputs = {k: mapping[v] for k, v in self.graph.outputs.items()}
        new.updates = {k: mapping[v] for k, v in self.graph.updates.items()}
        return new

    def emit_region(self, new: Graph, nodes: list[Node], mapping: dict[Value, Value]) -> None:
        results = self.results(nodes)
        region = _Region(nodes)
        body, local = region.body, region.local
        lead, shapes = _lead(nodes), {v.sizes for v in results}
        with body.origin(lead.origin):
            for node in nodes:
                copy = body.copy_node(node, tuple([region.value(v) for v in node.inputs]))
                local.update(zip(node.outputs, copy.outputs, strict=True))
        body.output(**{f"result{i}": local[v] for i, v in enumerate(results)})
        with new.origin(lead.origin):
            fused = new.add(
                "fused",
                [mapping[v] for v in region.operands],
                {"body": body, "kind": lead.op, "outer": _outer(nodes, shapes)[0]},
                name=lead.name,
            )
        for value, result in zip(results, fused.outputs, strict=True):
            mapping[value] = result

    def group_order(self) -> list[Node | list[Node]]:
        """Sources, aliases and regions in an executable order.

        The order is stable with respect to the original."""
        needed_views = {
            n.name
            for n in self.nodes
            if is_view(n) and any(v in self.kept or self.read_as_memory(v) for v in n.outputs)
        }
        unit_of: dict[str, int] = {}
        units: list[Node | list[Node]] = []
        for node in self.graph.nodes:
            if node.name in unit_of:
                continue  # of a region that has begun
            if node.op in SOURCES or is_alias(node):
                unit_of[node.name] = len(units)
                units.append(node)
            elif not is_view(node) or node.name in needed_views:
                region = sorted(self.group[node.name].members, key=lambda n: self.position[n.name])
                unit_of.update((member.name, len(units)) for member in region)
                units.append(region)
        return self.sorted_units(units, unit_of)

    def read_as_memory(self, value: Value) -> bool:
        return any(is_alias(u) for u in self.users[value])

    def sorted_units(
        self, units: list[Node | list[Node]], unit_of: dict[str, int]
    ) -> list[Node | list[Node]]:
        after: list[set[int]] = [set() for _ in units]
        waiting = [0] * len(units)
        for number, unit in enumerate(units):
            needs = {
                unit_of[p.name]
                for node in (unit if isinstance(unit, list) else [unit])
                for _, p in self.sources.get(node.name, ())  # behind views, stored or not
                if unit_of[p.name] != number
            }
            waiting[number] = len(needs)
            for need in needs:
                after[need].add(number)
        ready = [i for i, w in enumerate(waiting) if w == 0]
        heapq.heapify(ready)
        result = []
        while ready:
            number = heapq.heappop(ready)
            result.append(units[number])
            for follower in after[number]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    heapq.heappush(ready, follower)
        assert len(result) == len(units), "fusion made a cycle"
        return result


class _Region:
    """The graph of a region under way, and its values by those of the whole graph."""

    def __init__(self, nodes: list[Node]):
        self.inside = {n.name for n in nodes}
        self.body = Graph(nodes[0].name)
        self.local: dict[Value, Value] = {}
        self.operands: list[Value] = []

    def value(self, value: Value) -> Value:
        """What stands for a value: what the region has made of it, its copy, or an operand."""
        node, body, local = value.node, self.body, self.local
        if value in local:
            return local[value]
        if node.op == "constant" and value.type.size == 1:
            copy = body.copy_node(node, ())
            local[value] = copy[0]
        elif is_view(node) and node.name not in self.inside:
            copy = body.copy_node(node, tuple(map(self.value, node.inputs)))
            local.update(zip(node.outputs, copy.outputs, strict=True))
        else:
            name = f"operand{len(self.operands)}"
            local[value] = body.add("input", (), {"type": value.type}, name=name)[0]
            local[value].node.layouts = (value.layout,)
            if node.op == "constant" and value.type.size <= KNOWN:
                local[value].node.attrs["known"] = node.attrs["value"]
            self.operands.append(value)
        return local[value]


def _outer(nodes: list[Node], shapes: set[tuple[int, ...]]) -> tuple[tuple[int, ...], set[int]]:
    """The loops that results of these shapes share (1: no loop), and the axes that nodes reduce."""
    outer = tuple(map(min, zip(*shapes, strict=True)))
    reduced: set[int] = set()
    for node in nodes:
        if node.op in REDUCTIONS and node.inputs[0].rank == len(outer):
            source, target = node.inputs[0].shape, node.types[0].shape
            reduced |= {
                axis for axis, (s, t) in enumerate(zip(source, target, strict=True)) if s != t
            }
    return tuple(1 if axis in reduced else d for axis, d in enumerate(outer)), reduced


def _ends_block(node: Node, source: Node) -> bool:
    """Whether a reduction over the batch follows one of many elements of each image."""
    if source.op not in REDUCTIONS or 0 not in node.attrs["axis"] or 0 in source.attrs["axis"]:
        return False
    return source.inputs[0].type.size >= _MANY * source.types[0].size


def _disjoint(node: Node) -> bool:
    """Windows that touch every input element at most once and need no padding."""
    attrs = node.attrs
    return (
        tuple(attrs["stride"]) == tuple(attrs["kernel"])
        and not any(
            p for pair in attrs["padding"] for p in (pair if isinstance(pair, tuple) else (pair,))
        )
        and all(d == 1 for d in attrs.get("dilation", (1, 1)))
    )


def _lead(nodes: list[Node]) -> Node:
    """The node a region is called after: its contraction, window, reduction, else its last."""
    for kinds in (CONTRACTIONS, WINDOWS, REDUCTIONS):
        for node in nodes:
            if node.op in kinds:
                return node
    return nodes[-1]


__all__ = ["Fuse", "is_alias", "is_view"]

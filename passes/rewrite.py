"""Rewriting: small named rules, applied until none fits.

A rule looks at one operator application, a `Match`, and returns the value that replaces its result,
or None. Rules are tables by operator; a sweep visits every node once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphc.ir import SOURCES, Graph, Node, TensorType, Value
from graphc.ops import registry
from passes.eliminate_dead import EliminateDead, remove_dead

# Nested rewrites of one node. Each rule makes its node smaller, so that real graphs stay far below.
_DEPTH = 32


def rewrite(
    graph: Graph, rules: Rules, everywhere: tuple[Rule, ...] = (), sweeps: int = 8
) -> tuple[Graph, Counter[str]]:
    """Apply rules to a fixpoint, in at most `sweeps` sweeps, each linear in the number of nodes.

    rules: by operator, tried in order; the rules `everywhere` are then tried on every operator.
    Only operators with one output are matched. Returns the new graph, without dead nodes but with
    all inputs, and how often each rule was applied.

    Rules look at operands, which a sweep has finished by then. Another one can only find more where
    `Match.take` has refused a value that other nodes read: they may be dead by now.
    """
    fired: Counter[str] = Counter()
    given, graph = graph, EliminateDead(keep_inputs=True).run(graph)
    for _ in range(sweeps):
        sweep = _Sweep(graph, rules, everywhere)
        before, graph = graph, graph.rebuild(sweep.visit)
        remove_dead(graph, keep_inputs=True)
        if before is not given:
            before.dissolve()
        fired += sweep.fired
        if not sweep.fired or not sweep.unfinished(graph):
            break
    return graph, fired


@dataclass(slots=True)
class Match:
    """An operator application that rules look at: operands are values of the graph being built."""

    sweep: _Sweep
    graph: Graph
    node: Node
    op: str
    inputs: tuple[Value, ...]
    attrs: dict[str, Any]
    type: TensorType
    depth: int

    def emit(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        """Append an operator in the matched node's place; rules apply to it too."""
        return self.sweep.emit(self.graph, self.node, op, inputs, attrs, self.depth + 1)

    def again(self, node: Node, *inputs: Value) -> Value:
        """Append `node` once more with other operands, under its own name and origin."""
        with self.graph.origin(node.origin):
            return self.sweep.emit(self.graph, node, node.op, inputs, node.attrs, self.depth + 1)

    def take(self, value: Value) -> Node | None:
        """The node of `value` if only the matched node uses it, to be replaced; else None.

        It is removed from the graph, so that the rule must not fail after."""
        node, sweep = value.node, self.sweep
        if sweep.uses[value] != 1 or sweep.reads[value] != 0:
            sweep.refused.add(value.name)
            return None
        self.graph.remove(node)
        sweep.reads.subtract(node.inputs)
        return node


@dataclass
class _Sweep:
    """One visit of every node. `uses` counts readers in the old graph by value of the new one,
    `reads` those in the new one; `refused` names values that other nodes read as well."""

    old: Graph
    rules: Rules
    everywhere: tuple[Rule, ...]
    uses: Counter[Value] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    reads: Counter[Value] = field(default_factory=Counter)
    refused: set[str] = field(default_factory=set)
    too_deep: bool = False

    def __post_init__(self) -> None:
        self.readers = Counter(v for node in self.old for v in node.inputs)
        self.readers.update(self.old.results)

    def visit(self, new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        value = None
        if node.op not in SOURCES and len(node.types) == 1:
            value = self.rewritten(new, node, node.op, inputs, node.attrs, node.types[0], 0)
        if value is None:
            values = new.adopt(node, inputs).outputs
            self.reads.update(inputs)
        else:
            values = (value,)
        for old, result in zip(node.outputs, values, strict=True):
            self.uses[result] += self.readers[old]
        return values

    def emit(
        self,
        graph: Graph,
        node: Node,
        op: str,
        inputs: tuple[Value, ...],
        attrs: dict[str, Any],
        depth: int,
    ) -> Value:
        types = tuple(registry.get(op).infer([v.type for v in inputs], attrs))
        value = self.rewritten(graph, node, op, inputs, attrs, types[0], depth)
        if value is None:
            value = graph.add(op, inputs, attrs, name=node.name)[0]
            self.reads.update(inputs)
        return value

    def unfinished(self, graph: Graph) -> bool:
        """Whether another sweep may find more. `graph`: the result, without dead nodes."""
        found = [*graph.results, *(v for node in graph for v in node.inputs)]
        left = Counter(v.name for v in found if v.name in self.refused)
        return self.too_deep or 1 in left.values()

    def rewritten(
        self,
        graph: Graph,
        node: Node,
        op: str,
        inputs: tuple[Value, ...],
        attrs: dict[str, Any],
        kind: TensorType,
        depth: int,
    ) -> Value | None:
        if depth > _DEPTH:
            self.too_deep = True
            return None
        match = Match(self, graph, node, op, inputs, attrs, kind, depth)
        for rule in (*self.rules.get(op, ()), *self.everywhere):
            value = rule(match)
            if value is not None:
                assert value.type == kind, f"rule {rule.__name__}: {value.type} for {kind}"
                self.fired[rule.__name__] += 1
                return value
        return None


Rule = Callable[[Match], Value | None]
Rules = Mapping[str, tuple[Rule, ...]]

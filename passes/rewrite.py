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
from passes.eliminate_dead import EliminateDead

# Nested rewrites of one node. Each rule makes its node smaller, so that real graphs stay far below.
_DEPTH = 32


def rewrite(
    graph: Graph, rules: Rules, everywhere: tuple[Rule, ...] = (), sweeps: int = 8
) -> tuple[Graph, Counter[str]]:
    """Apply rules to a fixpoint, in at most `sweeps` sweeps, each linear in the number of nodes.

    rules: by operator, tried in order; the rules `everywhere` are then tried on every operator.
    Only operators with one output are matched. Returns the new graph, without dead nodes but with
    all inputs, and how often each rule was applied.
    """
    fired: Counter[str] = Counter()
    for _ in range(sweeps):
        graph = EliminateDead(keep_inputs=True).run(graph)
        sweep = _Sweep(graph, rules, everywhere)
        rebuilt = graph.rebuild(sweep.visit)
        if not sweep.fired:
            return graph, fired
        graph = rebuilt
        fired += sweep.fired
    return EliminateDead(keep_inputs=True).run(graph), fired


@dataclass
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
        node = value.node
        if self.sweep.uses[value] != 1 or self.graph.nx.out_degree(node.name) != 0:
            return None
        self.graph.remove(node)
        return node


@dataclass
class _Sweep:
    """One visit of every node. `uses` counts readers in the old graph by value of the new one."""

    old: Graph
    rules: Rules
    everywhere: tuple[Rule, ...]
    uses: Counter[Value] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.readers = Counter(v for node in self.old for v in node.inputs)
        self.readers.update(self.old.results)

    def visit(self, new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        value = None
        if node.op not in SOURCES and len(node.types) == 1:
            value = self.rewritten(new, node, node.op, inputs, node.attrs, node.types[0], 0)
        values = new.copy_node(node, inputs).outputs if value is None else (value,)
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
        return graph.add(op, inputs, attrs, name=node.name)[0] if value is None else value

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

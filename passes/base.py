"""What a pass is, how passes are chained, and the rules that every graph between two must meet."""

from __future__ import annotations

import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from graphc import errors
from graphc.ir import SOURCES, Graph, Node, Origin
from graphc.ops import registry

log = logging.getLogger("graphc.passes")
_NOTES = "notes"


class InvalidGraphError(errors.GraphcError, AssertionError):
    """A pass returned a graph that breaks the IR's rules; names the pass and the node."""


class Pass(ABC):
    """A function from a valid graph to a valid graph, with options.

    Subclasses are frozen dataclasses whose fields are the options. Their docstring says what `run`
    requires of the graph and what holds afterwards. `run` never changes the graph it is given, but
    for the nodes that a released graph hands on.
    """

    @property
    def name(self) -> str:
        """The pass's verb: its class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def run(self, graph: Graph) -> Graph:
        """The transformed graph."""


def note(graph: Graph, text: str) -> None:
    """Attach a line to the record of the running pass (`graph`: the graph it will return)."""
    graph.annotations[_NOTES] = (*graph.annotations.get(_NOTES, ()), text)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: wall time in seconds, node counts, and what the pass noted."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.nodes_before} -> {self.nodes_after} nodes, "
            f"{1e3 * self.seconds:.1f} ms"
        )
        return "; ".join((text, *self.notes))


Observer = Callable[[PassRecord, Graph], None]


def report(record: PassRecord, graph: Graph, observer: Observer | None = None) -> None:
    """Log what a pass did, and tell an observer."""
    log.info("%s", record)
    log.debug("after %s:\n%s", record.name, graph)
    if observer:
        observer(record, graph)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. A pipeline is data: the editing methods return a new one."""

    passes: tuple[Pass, ...] = ()

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline((*self.passes, *other.passes))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.passes)

    def run(
        self,
        graph: Graph,
        verify: bool | None = None,
        observer: Observer | None = None,
        consume: bool = False,
    ) -> tuple[Graph, tuple[PassRecord, ...]]:
        """Run every pass. Returns the last graph and one record per pass.

        verify: check the graph before the first and after each pass (default: whether the
        environment has GRAPHC_VERIFY=1). `observer(record, graph)` is called after each pass: it
        serves dumping and progress alike, and may keep what it is given. `consume`: nobody needs
        `graph` any more. Raises InvalidGraphError naming the pass that broke the graph.
        """
        check = os.environ.get("GRAPHC_VERIFY") == "1" if verify is None else verify
        if check:
            verify_graph(graph, "before the first pass")
        given, records = graph, []
        for step in self.passes:
            before = graph
            needed = observer is not None or (before is given and not consume)
            before.released = not needed
            start = time.perf_counter()
            graph = step.run(before)
            seconds = time.perf_counter() - start
            graph.released = False
            notes = graph.annotations.pop(_NOTES, ())
            record = PassRecord(step.name, seconds, len(before), len(graph), notes)
            records.append(record)
            if check:
                verify_graph(graph, f"after pass {step.name}", {n.origin for n in before})
            report(record, graph, observer)
            if graph is not before and not needed:
                before.dissolve()
        return graph, tuple(records)

    def with_inserted(
        self, step: Pass, *, after: str | None = None, before: str | None = None
    ) -> Pipeline:
        """A pipeline with `step` after (or before) every pass of that name.

        With neither, `step` comes last. Raises NameLookupError where no pass has the name.
        """
        if after is None and before is None:
            return Pipeline((*self.passes, step))
        anchor = after if after is not None else before
        self._require(anchor)
        result: list[Pass] = []
        for p in self.passes:
            group = (p, step) if after is not None else (step, p)
            result.extend(group if p.name == anchor else (p,))
        return Pipeline(tuple(result))

    def without(self, name: str) -> Pipeline:
        """A pipeline without the passes called `name`. Raises NameLookupError."""
        self._require(name)
        return Pipeline(tuple(p for p in self.passes if p.name != name))

    def replaced(self, name: str, step: Pass) -> Pipeline:
        """A pipeline with `step` in place of every pass called `name`. Raises NameLookupError."""
        self._require(name)
        return Pipeline(tuple(step if p.name == name else p for p in self.passes))

    def with_options(self, name: str, **options: object) -> Pipeline:
        """A pipeline where passes called `name` have other options. Raises NameLookupError."""
        self._require(name)
        changed: list[Any] = list(self.passes)
        return Pipeline(tuple(replace(p, **options) if p.name == name else p for p in changed))

    def _require(self, name: str | None) -> None:
        if name not in self.names:
            raise errors.NameLookupError(
                f"the pipeline has no pass {name!r}; it has {', '.join(self.names) or 'none'}"
            )


def verify_graph(graph: Graph, when: str = "", origins: set[Origin] | None = None) -> None:
    """The IR's rules as a function. Raises InvalidGraphError naming the node, and `when`.

    Checks that nodes are keyed by their names and belong to the graph, operands are defined before
    their use, edges say what `Node.inputs` says, type rules agree with the types kept, every value
    has a layout, every node an origin (one of `origins`, where given, in any phase), and that
    outputs and updates are values of the graph with the types of what they update.
    """
    lines = None if origins is None else {replace(origin, phase="") for origin in origins}
    where = f"{when}: " if when else ""

    def fail(node: Node, reason: str) -> None:
        raise InvalidGraphError(f"{where}{node.describe()}: {reason}")

    defined: set[str] = set()
    for key, node in graph.nx.nodes(data="node"):
        if node.name != key or node.graph is not graph:
            fail(node, f"is filed as {key!r} or belongs to another graph")
        for slot, value in enumerate(node.inputs):
            if value.graph is not graph:
                fail(node, f"operand {slot} {value.name!r} belongs to another graph")
            if value.node.name not in defined:
                fail(node, f"operand {slot} {value.name!r} is used before it is defined")
            if value.index >= len(value.node.types):
                fail(node, f"operand {slot}: {value.node.name!r} has no output {value.index}")
        edges = sorted(
            (data["slot"], producer, data["output"])
            for producer, _, data in graph.nx.in_edges(key, data=True)
        )
        if edges != [(slot, v.node.name, v.index) for slot, v in enumerate(node.inputs)]:
            fail(node, f"its edges {edges} differ from its operands")
        _verify_types(node, fail)
        if len(node.layouts) != len(node.types):
            fail(node, f"{len(node.layouts)} layouts for {len(node.types)} outputs")
        if not node.origin.layer:
            fail(node, "has no origin")
        if lines is not None and replace(node.origin, phase="") not in lines:
            fail(node, f"has the origin {node.origin}, which no node had before the pass")
        defined.add(key)
    _verify_results(graph, where)


def _verify_types(node: Node, fail: Callable[[Node, str], None]) -> None:
    if node.op in SOURCES:
        if node.inputs or node.types != (node.attrs["type"],):
            fail(node, "a source has operands, or another type than its attribute says")
        return
    if node.op == "fused":
        body: Graph = node.attrs["body"]
        verify_graph(body, f"body of {node.name}")
        if [n.types[0] for n in body.inputs.values()] != [v.type for v in node.inputs]:
            fail(node, "its body's inputs have other types than its operands")
        if tuple(v.type for v in body.outputs.values()) != node.types:
            fail(node, "its body's outputs have other types than its results")
        return
    try:
        types = tuple(registry.get(node.op).infer([v.type for v in node.inputs], node.attrs))
    except errors.GraphcError as error:
        fail(node, f"its type rule refuses it: {error}")
        return
    if types != node.types:
        fail(node, f"its type rule gives {types}, the node has {node.types}")


def _verify_results(graph: Graph, where: str) -> None:
    for kind, values in (("output", graph.outputs), ("update", graph.updates)):
        for name, value in values.items():
            if graph.nx.nodes.get(value.node.name, {}).get("node") is not value.node:
                raise InvalidGraphError(
                    f"{where}{kind} {name!r}: {value.name!r} is not in the graph"
                )
            if value.index >= len(value.node.types):
                raise InvalidGraphError(
                    f"{where}{kind} {name!r}: {value.node.name!r} has no output {value.index}"
                )
    for name, value in graph.updates.items():
        target = graph.nx.nodes.get(name, {}).get("node")
        if target is None or target.op not in ("parameter", "state"):
            raise InvalidGraphError(f"{where}update {name!r}: there is no such parameter or state")
        if target.types[0] != value.type:
            raise InvalidGraphError(
                f"{where}update {name!r}: {target.types[0]} takes {value.name!r} {value.type}"
            )

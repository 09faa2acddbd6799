"""The graph: typed values flowing between operator nodes, held in a `networkx.MultiDiGraph`.

A `Graph` is an ordered list of `Node`s in static single assignment form: iteration order is
insertion order and every operand is defined before its use. Edges of `Graph.nx` carry the operand
slot and the producer's output index, so that `x * x` and operand order survive any networkx
algorithm. They are entered when `Graph.nx` is asked for: most graphs between two passes never are.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import networkx
import numpy as np

from graphc import errors
from graphc.node import Node, Value
from graphc.origins import called_from, caller
from graphc.text import format_node, freeze
from graphc.types import (
    ALIGNMENT,
    DTYPES,
    ROWS,
    Axis,
    Dimension,
    Layout,
    Origin,
    TensorType,
    block_bytes,
    checked_type,
)

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "NAMED_SOURCES",
    "ROWS",
    "SOURCES",
    "Axis",
    "Dimension",
    "Graph",
    "Layout",
    "Node",
    "Origin",
    "TensorType",
    "Value",
    "block_bytes",
    "called_from",
    "caller",
    "format_node",
    "is_view",
    "label_body",
    "root",
]

# Nodes that hold data rather than compute it.
SOURCES = ("input", "parameter", "state", "constant")
# Sources that callers address by name: no pass may rename them.
NAMED_SOURCES = ("input", "parameter", "state")


def is_view(node: Node) -> bool:
    """Whether the node's result is its operand's memory under another shape."""
    return node.op == "reshape"


def root(value: Value) -> Value:
    """The value whose memory `value` is, looking through views."""
    while is_view(value.node):
        value = value.node.inputs[0]
    return value


def strips(node: Node) -> int:
    """Into how many strips of each image the work of a region falls: the first axis of what a node
    with the attribute `strips` makes counts the strips of all images."""
    values = (*map(root, node.inputs), *node.outputs)
    return max((v.node.attrs.get("strips", 1) for v in values), default=1)


class Graph:
    """A static dataflow graph under construction or transformation.

    `outputs` maps output names to values; `updates` maps the name of a parameter or state to the
    value it takes at the end of a step. Of a graph that is `released` nothing is needed but one
    transformed graph: its nodes move there instead of being copied.
    """

    def __init__(self, name: str = "graph"):
        self.name = name
        self._nodes: dict[str, Node] = {}
        self._nx: networkx.MultiDiGraph | None = None  # made when it is asked for
        # Who reads a value, among the first `_entered` nodes.
        self._users: dict[Value, list[tuple[Node, int]]] = {}
        self._entered = 0
        self.outputs: dict[str, Value] = {}
        self.updates: dict[str, Value] = {}
        self.annotations: dict[str, Any] = {}
        self.released = False
        self._counters: dict[str, int] = {}
        # Names that only named sources may take: those a rebuild has yet to copy.
        self._reserved: frozenset[str] = frozenset()
        self._origin: Origin | None = None

    # ---- reading

    @property
    def nx(self) -> networkx.MultiDiGraph:
        """The graph for networkx's algorithms; to be read, not changed."""
        if self._nx is None:
            self._nx = networkx.MultiDiGraph(name=self.name)
        for node in self._last(len(self._nodes) - len(self._nx)):
            self._nx.add_node(node.name, node=node)
            for slot, value in enumerate(node.inputs):
                self._nx.add_edge(value.node.name, node.name, slot=slot, output=value.index)
        return self._nx

    @property
    def nodes(self) -> list[Node]:
        """All nodes in execution order."""
        return list(self._nodes.values())

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def node(self, name: str) -> Node:
        """The node called `name`. Raises NameLookupError with the nearest names."""
        if name not in self._nodes:
            import difflib

            known = list(dict.fromkeys([*self.outputs, *self._nodes]))
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise errors.NameLookupError(
                f"graph {self.name!r} has no output and no node {name!r}{hint}"
            )
        return self._nodes[name]

    def value(self, name: str) -> Value:
        """The value called `name`: an output name, a node name, or `node:index`."""
        if name in self.outputs:
            return self.outputs[name]
        base, _, index = name.rpartition(":")
        if base in self._nodes and index.isdigit():
            return self.node(base)[int(index)]
        return self.node(name)[0]

    def _sources(self, op: str) -> dict[str, Node]:
        return {n.name: n for n in self._nodes.values() if n.op == op}

    @property
    def inputs(self) -> dict[str, Node]:
        return self._sources("input")

    @property
    def parameters(self) -> dict[str, Node]:
        return self._sources("parameter")

    @property
    def states(self) -> dict[str, Node]:
        return self._sources("state")

    def users(self, value: Value) -> list[tuple[Node, int]]:
        """(consumer, operand slot) of every use of a value, in execution order."""
        return [*self._all_users().get(value, ())]

    def is_read(self, node: Node) -> bool:
        """Whether another node reads what a node makes."""
        users = self._all_users()
        return any(users.get(v) for v in node.outputs)

    def _all_users(self) -> dict[Value, list[tuple[Node, int]]]:
        if self._entered != len(self._nodes):
            for node in self._last(len(self._nodes) - self._entered):
                for slot, value in enumerate(node.inputs):
                    self._users.setdefault(value, []).append((node, slot))
            self._entered = len(self._nodes)
        return self._users

    def _last(self, count: int) -> list[Node]:
        """The last nodes, in order."""
        return [*itertools.islice(reversed(self._nodes.values()), count)][::-1]

    @property
    def results(self) -> list[Value]:
        """Every value that must exist after a step: outputs, then updates."""
        return [*self.outputs.values(), *self.updates.values()]

    # ---- declaring

    def input(self, name: str, shape: Iterable[Dimension], dtype: str = "float32") -> Value:
        """Declare an array given at each call. Dimensions may be names, e.g. "N"."""
        return self.add("input", (), {"type": checked_type(name, shape, dtype)}, name=name)[0]

    def parameter(
        self,
        name: str,
        shape: Iterable[int],
        init: Any = None,
        dtype: str = "float32",
        trainable: bool = True,
    ) -> Value:
        """Declare a learned array.

        `init` is an initialiser of `graphc.nn.init`, an array, or None (zeros)."""
        attrs = {"type": checked_type(name, shape, dtype), "init": init, "trainable": trainable}
        return self.add("parameter", (), attrs, name=name)[0]

    def state(
        self,
        name: str,
        shape: Iterable[int],
        init: Any = None,
        dtype: str = "float32",
        persistent: bool = True,
    ) -> Value:
        """Declare an array that a step reads and updates and no gradient flows to.

        Such are running statistics. `persistent=False` keeps it out of `Executable.state()`'s
        network weights (optimizer state)."""
        attrs = {"type": checked_type(name, shape, dtype), "init": init, "persistent": persistent}
        return self.add("state", (), attrs, name=name)[0]

    def constant(self, array: Any, dtype: str | None = None, name: str | None = None) -> Value:
        """Declare fixed data. float64 arrays become float32 unless `dtype` says otherwise."""
        data = np.asarray(array)
        if dtype is None:
            dtype = {"f": "float32", "i": "int32", "u": "int32", "b": "bool"}.get(
                data.dtype.kind, "float32"
            )
        data = np.ascontiguousarray(data, dtype=dtype).reshape(data.shape)
        data.flags.writeable = False
        return self.add(
            "constant", (), {"type": TensorType(data.shape, dtype), "value": data}, name=name
        )[0]

    def output(self, **values: Value) -> None:
        """Name values that executables may return."""
        for name, value in values.items():
            if value.graph is not self:
                self._refuse(value, f"output {name!r}")
            self.outputs[name] = value

    def update(self, name: str, value: Value) -> None:
        """At the end of a step the parameter or state `name` takes `value`."""
        target = self.node(name)
        if target.op not in ("parameter", "state"):
            raise errors.DeclarationError(
                f"{target.describe()}: only parameters and states can be updated"
            )
        if value.type != target.types[0]:
            raise errors.ShapeError(
                f"{target.describe()}: {target.types[0]} cannot be updated with "
                f"{value.name!r} {value.type}"
            )
        self.updates[name] = value

    def add(
        self,
        op: str,
        inputs: Iterable[Value],
        attrs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Node:
        """Append a node. Its type rule runs now, so an error points at the user's line."""
        inputs, attrs = tuple(inputs), dict(attrs or {})
        origin = self._origin or caller()
        base = name or op
        unique = self._unique(base, exact=name is not None and op in NAMED_SOURCES)
        node = Node(
            self,
            unique,
            op,
            inputs,
            attrs,
            (),
            origin if origin.layer else replace(origin, layer=unique),
        )
        for slot, value in enumerate(inputs):
            if not isinstance(value, Value):
                raise errors.DeclarationError(
                    f"{node.describe()}: operand {slot} is {type(value).__name__}, "
                    f"not a value of the graph"
                )
            if value.graph is not self:
                self._refuse(value, f"operand {slot} of {node.describe()}")
        node.set_types(self._infer(node))
        return self._append(node)

    def _append(self, node: Node) -> Node:
        self._nodes[node.name] = node
        return node

    def remove(self, node: Node) -> None:
        """Remove a node that nothing reads."""
        if self._entered:
            users = self._all_users()
            for value in node.inputs:
                users[value] = [(user, slot) for user, slot in users[value] if user is not node]
            self._entered -= 1
        del self._nodes[node.name]
        if self._nx is not None and node.name in self._nx:
            self._nx.remove_node(node.name)

    def _infer(self, node: Node) -> tuple[TensorType, ...]:
        if node.op in SOURCES:
            return (node.attrs["type"],)
        if node.op == "fused":
            return tuple(v.type for v in node.attrs["body"].outputs.values())
        from graphc.ops.registry import get

        types = [v.type for v in node.inputs]
        try:
            return tuple(get(node.op).infer(types, node.attrs))
        except errors.DeclarationError as error:
            operands = ", ".join(f"{v.name!r} {v.type}" for v in node.inputs)
            raise type(error)(f"{node.describe()}: {error} (operands: {operands})") from None

    def _refuse(self, value: Value, what: str) -> NoReturn:
        raise errors.DeclarationError(
            f"{what}: {value.name!r} belongs to graph {value.graph.name!r}, not to {self.name!r}"
        )

    def _unique(self, base: str, exact: bool = False) -> str:
        if base not in self._nodes and (exact or base not in self._reserved):
            return base
        if exact:
            raise errors.DeclarationError(
                f"graph {self.name!r} already has a node called {base!r}: choose another name"
            )
        while True:
            self._counters[base] = self._counters.get(base, 0) + 1
            candidate = f"{base}_{self._counters[base]}"
            if candidate not in self._nodes and candidate not in self._reserved:
                return candidate

    @contextlib.contextmanager
    def origin(self, origin: Origin | None) -> Iterator[None]:
        """Nodes added inside take this origin (passes: the node they replace or differentiate)."""
        before, self._origin = self._origin, origin
        try:
            yield
        finally:
            self._origin = before

    @contextlib.contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """Nodes added inside belong to the user's layer `name`."""
        with self.origin(replace(self._origin or caller(), layer=name)):
            yield

    # ---- transforming

    def rebuild(
        self,
        visit: Callable[[Graph, Node, tuple[Value, ...]], Iterable[Value] | None] | None = None,
        *,
        name: str | None = None,
    ) -> Graph:
        """A new graph made by visiting every node in order.

        `visit(new_graph, node, new_inputs)` returns the values that stand for the node's outputs,
        or None to adopt the node as it is. Origins and layouts are kept; outputs and updates are
        carried over.
        """
        new = Graph(name or self.name)
        new.annotations = dict(self.annotations)
        new._reserved = frozenset(n.name for n in self.nodes if n.op in NAMED_SOURCES)
        changed: dict[Value, Value] = {}
        for node in self.nodes:
            inputs = node.inputs
            if not changed.keys().isdisjoint(inputs):
                inputs = tuple([changed.get(v, v) for v in inputs])
            new._origin = node.origin
            values = visit(new, node, inputs) if visit else None
            if values is None:
                values = new.adopt(node, inputs).outputs
            if values is not node.outputs:
                changed.update(zip(node.outputs, values, strict=True))
        new._origin, new._reserved = None, frozenset()
        new.outputs = {k: changed.get(v, v) for k, v in self.outputs.items()}
        new.updates = {k: changed.get(v, v) for k, v in self.updates.items()}
        return new

    def adopt(self, node: Node, inputs: tuple[Value, ...], name: str | None = None) -> Node:
        """Append a node of another graph with operands of this one, keeping its origin and layouts,
        and its name where that is free: the node itself if its graph is released, else a copy."""
        if not node.graph.released or (inputs != node.inputs and not self._takes(node, inputs)):
            return self.copy_node(node, inputs, name)
        node.name, node.graph, node.inputs = self._free(name or node.name, node), self, inputs
        return self._append(node)

    def copy_node(self, node: Node, inputs: tuple[Value, ...], name: str | None = None) -> Node:
        """Append a copy of a node of another graph, as `adopt` does."""
        if self._takes(node, inputs):
            return self._append(node.copied(self, self._free(name or node.name, node), inputs))
        with self.origin(node.origin):
            copy = self.add(node.op, inputs, node.attrs, name=name or node.name)
        copy.layouts = node.layouts
        return copy

    def _takes(self, node: Node, inputs: tuple[Value, ...]) -> bool:
        """Whether operands of this graph have the types that a node of another graph reads."""
        same = True
        for value, old in zip(inputs, node.inputs, strict=True):
            producer, before = value.node, old.node
            if producer.graph is not self:
                self._refuse(value, f"operand {inputs.index(value)} of {node.describe()}")
            if producer.types is not before.types or value.index != old.index:
                same = same and value.type == old.type
        return same

    def _free(self, name: str, node: Node) -> str:
        """The name that a node of another graph gets here."""
        if name in self._nodes or name in self._reserved:
            return self._unique(name, exact=node.op in NAMED_SOURCES)
        return name

    def copy(self) -> Graph:
        return self.reordered(self.nodes)

    def subgraph(self, keep: Iterable[Value]) -> Graph:
        """A new graph of the nodes that `keep` needs, inputs included, order preserved."""
        needed: set[str] = set()
        stack = [v.node for v in keep]
        while stack:
            node = stack.pop()
            if node.name not in needed:
                needed.add(node.name)
                stack.extend(v.node for v in node.inputs)
        return self.reordered(node for node in self.nodes if node.name in needed)

    def reordered(self, order: Iterable[Node]) -> Graph:
        """A new graph of these nodes, operands before their readers, and of their results.

        A node may come more than once: readers take what its latest copy makes. The first has its
        name, another is called `<name>.again`."""
        new = Graph(self.name)
        new.annotations = dict(self.annotations)
        made: dict[Value, Value] = {}
        for node in order:
            name = f"{node.name}.again" if node.name in new else node.name
            copy = new.adopt(node, tuple([made[v] for v in node.inputs]), name)
            made.update(zip(node.outputs, copy.outputs, strict=True))
        new.outputs = {k: made[v] for k, v in self.outputs.items() if v in made}
        new.updates = {k: made[v] for k, v in self.updates.items() if v in made}
        return new

    def bind(self, dims: Mapping[str, int]) -> Graph:
        """A new graph with every symbolic dimension replaced.

        Type rules run again on the bound shapes. Raises UnboundDimensionError."""
        names = {
            d for node in self.nodes for t in node.types for d in t.shape if isinstance(d, str)
        }
        missing = sorted(names - set(dims))
        if missing:
            name = missing[0]
            which = next(n for n in self.nodes if any(name in t.shape for t in n.types))
            raise errors.UnboundDimensionError(
                f"{which.describe()}: dimension {name!r} of {which.types[0]} is unbound; "
                f"pass dims={{{name!r}: size}}"
            )
        for key, size in dims.items():
            if not isinstance(size, (int, np.integer)) or size < 0:
                raise errors.UnboundDimensionError(
                    f"dims[{key!r}] = {size!r}: a size must be a non-negative int"
                )

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            def resolve(item: Any) -> Any:
                if isinstance(item, TensorType):
                    return TensorType(
                        tuple(int(dims[d]) if isinstance(d, str) else d for d in item.shape),
                        item.dtype,
                    )
                if isinstance(item, tuple):
                    return tuple(
                        int(dims[d]) if isinstance(d, str) and d in dims else d for d in item
                    )
                return item

            attrs = {k: resolve(v) for k, v in node.attrs.items()}
            return new.add(node.op, inputs, attrs, name=node.name).outputs

        return self.rebuild(visit)

    def dissolve(self) -> None:
        """Take apart a graph that nothing refers to any more, nor to its nodes and values, but for
        nodes that another graph has adopted.

        They refer to one another: else only the collector of cycles would find them, and look
        through all that a compilation keeps."""
        for node in self._nodes.values():
            if node.graph is self:
                node.dissolve()
        if self._nx is not None:
            self._nx.clear()
        self._nodes, self._users, self._entered = {}, {}, 0
        self._nx, self.outputs, self.updates = None, {}, {}

    # ---- text, equality, bytes

    def __str__(self) -> str:
        lines = [f"graph {self.name} {{"]
        lines += [f"  {format_node(node)}" for node in self.nodes]
        lines += [f"  output {name} = %{value.name}" for name, value in self.outputs.items()]
        lines += [f"  update {name} = %{value.name}" for name, value in self.updates.items()]
        return "\n".join([*lines, "}"])

    def structure(self) -> tuple:
        """A name-free description, equal for graphs that compute the same in the same order."""
        number: dict[Value, int] = {}
        rows = []
        for node in self.nodes:
            for value in node.outputs:
                number[value] = len(number)
            keep = node.name if node.op in ("input", "parameter", "state") else ""
            # The attribute `type` of a source is among its types.
            attrs = tuple(sorted([(k, freeze(v)) for k, v in node.attrs.items() if k != "type"]))
            operands = tuple(number[v] for v in node.inputs)
            rows.append((node.op, keep, operands, attrs, node.types, node.layouts))
        outputs = tuple((k, number[v]) for k, v in self.outputs.items())
        updates = tuple((k, number[v]) for k, v in self.updates.items())
        return (tuple(rows), outputs, updates)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self is other or self.structure() == other.structure())

    def __hash__(self) -> int:
        return int(self.fingerprint()[:15], 16)

    def fingerprint(self) -> str:
        """Hex digest of `structure()`, the same in every process."""
        return hashlib.sha256(repr(self.structure()).encode()).hexdigest()

    def __getstate__(self) -> tuple[Any, ...]:
        """A flat table, so that no depth of a graph is one of pickle's recursion. Annotations that
        hold for this process alone, those with a leading underscore, stay behind."""
        number = {v: i for i, v in enumerate(v for node in self.nodes for v in node.outputs)}
        rows = [
            (n.name, n.op, [number[v] for v in n.inputs], n.attrs, n.types, n.layouts, n.origin)
            for n in self.nodes
        ]
        outputs = {name: number[v] for name, v in self.outputs.items()}
        updates = {name: number[v] for name, v in self.updates.items()}
        notes = {k: v for k, v in self.annotations.items() if not k.startswith("_")}
        return self.name, rows, outputs, updates, notes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        name, rows, outputs, updates, notes = state
        self.__init__(name)  # type: ignore[misc]
        values: list[Value] = []
        for name, op, operands, attrs, types, layouts, origin in rows:
            inputs = tuple([values[i] for i in operands])
            node = self._append(Node(self, name, op, inputs, attrs, types, origin))
            node.layouts = layouts
            values += node.outputs
        self.outputs = {name: values[i] for name, i in outputs.items()}
        self.updates = {name: values[i] for name, i in updates.items()}
        self.annotations = notes

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def label_body(node: Node, whole: bool = False) -> None:
    """Give the operands and results inside a region the layouts they have outside; `whole`: as if
    all of each were kept."""
    body: Graph = node.attrs["body"]

    def label(layout: Layout) -> Layout:
        return replace(layout, copies=0) if whole else layout

    for source, operand in zip(body.inputs.values(), node.inputs, strict=True):
        source.layouts = (label(operand.layout),)
    for value, layout in zip(body.outputs.values(), node.layouts, strict=True):
        layouts = list(value.node.layouts)
        layouts[value.index] = label(layout)
        value.node.layouts = tuple(layouts)

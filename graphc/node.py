"""What a graph is made of: operator applications and the values they give."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from graphc import errors
from graphc.text import format_node
from graphc.types import ROWS, Axis, Dimension, Layout, Origin, TensorType

if TYPE_CHECKING:
    from graphc.ir import Graph


class Node:
    """One operator application. Created by `Graph.add` only; treat its fields as read-only."""

    __slots__ = ("graph", "name", "op", "inputs", "attrs", "types", "origin", "layouts", "outputs")

    def __init__(
        self,
        graph: Graph,
        name: str,
        op: str,
        inputs: tuple[Value, ...],
        attrs: dict[str, Any],
        types: tuple[TensorType, ...],
        origin: Origin,
    ):
        self.graph = graph
        self.name = name
        self.op = op
        self.inputs = inputs
        self.attrs = attrs
        self.origin = origin
        self.types: tuple[TensorType, ...] = ()
        self.layouts: tuple[Layout, ...] = ()
        self.outputs: tuple[Value, ...] = ()
        if types:
            self.set_types(types)

    def copied(self, graph: Graph, name: str, inputs: tuple[Value, ...]) -> Node:
        """The same application in another graph, on operands of the same types."""
        copy = Node.__new__(Node)
        copy.graph, copy.name, copy.op, copy.inputs = graph, name, self.op, inputs
        copy.attrs, copy.origin = dict(self.attrs), self.origin
        copy.types, copy.layouts = self.types, self.layouts
        copy.outputs = copy._values()
        return copy

    def dissolve(self) -> None:
        """Take apart a node that nothing refers to any more, nor to its values."""
        self.inputs = self.outputs = ()

    def set_types(self, types: tuple[TensorType, ...]) -> None:
        self.types = types
        self.layouts = (ROWS,) * len(types)
        self.outputs = self._values()

    def _values(self) -> tuple[Value, ...]:
        if len(self.types) == 1:
            return (Value(self),)
        return tuple([Value(self, i) for i in range(len(self.types))])

    def __getitem__(self, index: int) -> Value:
        return self.outputs[index]

    def describe(self) -> str:
        """`conv2 (conv2d, lenet.py:31)`: how errors name this node."""
        where = f", {self.origin}" if self.origin.file else ""
        return f"{self.name} ({self.op}{where})"

    def __repr__(self) -> str:
        return format_node(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.graph).node, (self.graph, self.name)  # which holds all of it


class Value:
    """One output of a node; what users compute with. Compared by identity: a node makes each of its
    values once."""

    __slots__ = ("node", "index")

    def __init__(self, node: Node, index: int = 0):
        self.node = node
        self.index = index

    @property
    def type(self) -> TensorType:
        return self.node.types[self.index]

    @property
    def shape(self) -> tuple[Dimension, ...]:
        return self.type.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        """`shape` where every dimension is bound. Raises UnboundDimensionError."""
        return self.type.sizes

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def rank(self) -> int:
        return len(self.type.shape)

    @property
    def graph(self) -> Graph:
        return self.node.graph

    @property
    def name(self) -> str:
        return self.node.name if len(self.node.types) == 1 else f"{self.node.name}:{self.index}"

    @property
    def layout(self) -> Layout:
        return self.node.layouts[self.index]

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, (self.node, self.index)

    def __bool__(self) -> bool:
        raise self._refused("has no truth value while the graph is declared; use gc.where")

    def __iter__(self) -> NoReturn:
        raise self._refused("cannot be iterated; use slices or gc.split")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise self._refused("holds no data; compile and run the graph")

    def _refused(self, reason: str) -> errors.DeclarationError:
        return errors.DeclarationError(
            f"{self.node.describe()}: a value of a static graph {reason}"
        )

    # Operators are methods of the op library: graphc.ops.operators binds them when it is imported.
    # `==` and `!=` stay identity.
    if TYPE_CHECKING:
        __array_ufunc__: ClassVar[None]

        def __add__(self, other: Any) -> Value: ...
        def __radd__(self, other: Any) -> Value: ...
        def __sub__(self, other: Any) -> Value: ...
        def __rsub__(self, other: Any) -> Value: ...
        def __mul__(self, other: Any) -> Value: ...
        def __rmul__(self, other: Any) -> Value: ...
        def __truediv__(self, other: Any) -> Value: ...
        def __rtruediv__(self, other: Any) -> Value: ...
        def __pow__(self, other: Any) -> Value: ...
        def __rpow__(self, other: Any) -> Value: ...
        def __matmul__(self, other: Any) -> Value: ...
        def __rmatmul__(self, other: Any) -> Value: ...
        def __lt__(self, other: Any) -> Value: ...
        def __le__(self, other: Any) -> Value: ...
        def __gt__(self, other: Any) -> Value: ...
        def __ge__(self, other: Any) -> Value: ...
        def __neg__(self) -> Value: ...
        def __abs__(self) -> Value: ...
        def __getitem__(self, key: Any) -> Value: ...
        def sum(self, axis: Axis = None, keepdims: bool = False) -> Value: ...
        def mean(self, axis: Axis = None, keepdims: bool = False) -> Value: ...
        def max(self, axis: Axis = None, keepdims: bool = False) -> Value: ...
        def min(self, axis: Axis = None, keepdims: bool = False) -> Value: ...
        def reshape(self, *sizes: Dimension | Iterable[Dimension]) -> Value: ...
        def transpose(self, *axes: int | Iterable[int]) -> Value: ...
        def astype(self, dtype: str) -> Value: ...

"""The oracle: runs any graph, node by node, with the operators' NumPy references.

Slow and plain on purpose: kernels, passes and chain rules are all compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphc import errors
from graphc.ir import SOURCES, Dimension, Graph, Node, TensorType, Value
from graphc.ops.registry import get


@dataclass(frozen=True)
class Results:
    """What one run of a graph gives.

    `outputs` and `updates` by name, as in `Graph`; `values` holds the values asked for (all of them
    with `keep=True`).
    """

    outputs: dict[str, np.ndarray]
    updates: dict[str, np.ndarray]
    values: dict[Value, np.ndarray] = field(default_factory=dict)


def interpret(
    graph: Graph,
    inputs: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    values: Iterable[Value] | None = None,
    dtype: str | None = None,
    keep: bool = False,
) -> Results:
    """Evaluate a graph on arrays.

    - `inputs`: one array for each input node's name; an input with a `default` may be left out.
    - `state`: one array for each parameter's and state's name.
    - `values`: compute these and only what they need. By default: the outputs and the updates.
    - `dtype`: "float64" or "float32" replaces every float dtype of the graph, casts included.
    - `keep`: compute and return every value of the graph.

    Symbolic dimensions take the sizes that the arrays have. Only sources that are needed must be
    given. Raises InputError or StateError for arrays that are missing or do not fit.
    """
    wanted = list(graph.results if values is None else values)
    nodes = graph.nodes if keep else _needed(graph, wanted)
    dims = _bind_dims(nodes, inputs, state or {})
    last_use = {value: node for node in nodes for value in node.inputs}
    kept = set(wanted)
    env: dict[Value, np.ndarray] = {}
    # Kernels follow IEEE arithmetic without traps; so does the reference.
    with np.errstate(all="ignore"):
        for node in nodes:
            arrays: tuple[np.ndarray, ...]
            if node.op in SOURCES:
                arrays = (_source(node, inputs, state or {}, dims, dtype),)
            else:
                arrays = _evaluate(node, [env[v] for v in node.inputs], dims, dtype)
            env.update(zip(node.outputs, arrays, strict=True))
            if not keep:
                for value in node.inputs:
                    if last_use[value] is node and value not in kept:
                        env.pop(value, None)
    return Results(
        outputs={k: env[v] for k, v in graph.outputs.items() if v in env},
        updates={k: env[v] for k, v in graph.updates.items() if v in env},
        values=env if keep else {v: env[v] for v in (wanted if values is not None else ())},
    )


def _needed(graph: Graph, wanted: list[Value]) -> list[Node]:
    found: set[str] = set()
    stack = [v.node for v in wanted]
    while stack:
        node = stack.pop()
        if node.name not in found:
            found.add(node.name)
            stack.extend(v.node for v in node.inputs)
    return [node for node in graph.nodes if node.name in found]


def _evaluate(
    node: Node, operands: list[np.ndarray], dims: Mapping[str, int], dtype: str | None
) -> tuple[np.ndarray, ...]:
    if node.op == "fused":
        body: Graph = node.attrs["body"]
        named = {f"operand{i}": array for i, array in enumerate(operands)}
        outputs = interpret(body, named, dtype=dtype).outputs
        return tuple(outputs[f"result{i}"] for i in range(len(node.types)))
    attrs = {k: _resolve(v, dims) for k, v in node.attrs.items()}
    if dtype is not None and attrs.get("dtype") in ("float32", "float64"):
        attrs["dtype"] = dtype
    return tuple(_as_float(np.asarray(a), dtype) for a in get(node.op).evaluate(operands, attrs))


def _as_float(array: np.ndarray, dtype: str | None) -> np.ndarray:
    return array.astype(dtype, copy=False) if dtype and array.dtype.kind == "f" else array


def _resolve(item: Any, dims: Mapping[str, int]) -> Any:
    """An attribute with its symbolic dimensions bound, by the rule of `Graph.bind`."""
    if isinstance(item, TensorType):
        return TensorType(
            tuple(dims[d] if isinstance(d, str) else d for d in item.shape), item.dtype
        )
    if isinstance(item, tuple):
        return tuple(dims.get(d, d) if isinstance(d, str) else d for d in item)
    return item


def _given(node: Node, inputs: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """The array for a source node, as it was given."""
    if node.op == "constant":
        return node.attrs["value"]
    if node.op == "input":
        if node.name in inputs:
            return inputs[node.name]
        if node.attrs.get("default") is not None:
            return node.attrs["default"]
        raise errors.InputError(
            f"input {node.name!r} {node.types[0]} is missing: pass {node.name}=..."
        )
    if node.name in state:
        return state[node.name]
    raise errors.StateError(
        f"{node.op} {node.name!r} {node.types[0]} has no value: pass state={{{node.name!r}: ...}}"
    )


def _bind_dims(
    nodes: list[Node], inputs: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, int]:
    """Sizes of the symbolic dimensions, read off the arrays given."""
    dims: dict[str, int] = {}
    for node in nodes:
        if node.op in SOURCES and any(isinstance(d, str) for d in node.types[0].shape):
            shape = np.shape(_given(node, inputs, state))
            if len(shape) == node.types[0].rank:
                for name, size in zip(node.types[0].shape, shape, strict=True):
                    if isinstance(name, str):
                        dims.setdefault(name, size)
    return dims


def _source(
    node: Node,
    inputs: Mapping[str, Any],
    state: Mapping[str, Any],
    dims: Mapping[str, int],
    dtype: str | None,
) -> np.ndarray:
    declared = node.types[0]
    array = np.asarray(
        _given(node, inputs, state), dtype=dtype if dtype and declared.is_float else declared.dtype
    )
    expected: tuple[Dimension, ...] = tuple(
        dims.get(d, d) if isinstance(d, str) else d for d in declared.shape
    )
    if array.shape != expected:
        kind = errors.InputError if node.op == "input" else errors.StateError
        raise kind(
            f"{node.op} {node.name!r} is {declared}; got an array of shape {list(array.shape)}"
            + (f" with {', '.join(f'{k}={v}' for k, v in dims.items())}" if dims else "")
        )
    return array

"""The text form of a node, and the form of an attribute that equality compares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc.types import ROWS

if TYPE_CHECKING:
    from graphc.ir import Node


def format_node(node: Node) -> str:
    """One line of static single assignment form.

    `%y: f32[N,6] = relu(%x) {attrs}  # conv1, lenet.py:12`"""
    left = ", ".join(
        f"%{v.name}: {v.type}" + ("" if v.layout == ROWS else f" @{v.layout}") for v in node.outputs
    )
    attrs = ", ".join(f"{key}={text}" for key, text in shown_attributes(node))
    operands = ", ".join(f"%{v.name}" for v in node.inputs)
    comment = ", ".join(
        p
        for p in (node.origin.layer if node.origin.layer != node.name else "", str(node.origin))
        if p
    )
    return (
        f"{left} = {node.op}({operands})"
        + (f" {{{attrs}}}" if attrs else "")
        + (f"  # {comment}" if comment else "")
    )


def shown_attributes(node: Node) -> Iterator[tuple[str, str]]:
    """Name and text of the attributes that the types do not tell."""
    for key, value in node.attrs.items():
        if key != "type" and not (key == "init" and value is None):
            yield key, _format_attribute(value)


def _format_attribute(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return (
            f"{value.item()!r}" if value.size == 1 else f"<{value.dtype} array {list(value.shape)}>"
        )
    from graphc.ir import Graph

    if isinstance(value, Graph):
        return f"<graph of {len(value)} nodes>"
    return str(value)


def freeze(value: Any) -> Any:
    """An attribute as nested tuples of plain values, the same in every process."""
    if isinstance(value, (int, str, float)):
        return repr(value)
    from graphc.ir import Graph

    if isinstance(value, np.ndarray):
        return (
            value.dtype.str,
            value.shape,
            hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest(),
        )
    if isinstance(value, Graph):
        return value.structure()
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, freeze(v)) for k, v in value.items()))
    return repr(value)

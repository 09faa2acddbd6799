"""Decide how every value lies in memory, and insert the conversions that follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from graphc.ir import ROWS, Graph, Layout, Node, Value
from graphc.ops.batch_parts import undivided
from passes.base import Pass, note
from passes.cache_sets import spread
from passes.fuse import CONTRACTIONS

BATCH, CHANNELS, PLAIN = "batch", "channels", "rows"


@dataclass(frozen=True)
class AssignLayouts(Pass):
    """Choose row-major, batch-in-lanes or channels-in-lanes layouts for values of a fused graph.

    Requires: fused regions, int dimensions; `graph.annotations["batch"]` is the batch size.
    Ensures: every value has a layout in which its kernel can be lowered; inputs and outputs are
    row-major; conversions are regions of kind `convert_layout`. Parameters and states keep their
    layout from step to step: only reading and loading them converts.

    The modes (`mode=None` takes the cheapest by `_cost`):
    - batch: images of a batch side by side in the lanes. Every channel count fills the vectors and
      weights are scalars; needs a batch that is a multiple of the lanes.
    - channels: output channels in the lanes; weights lie in blocks of output channels.
    - rows: all row-major.
    """

    lanes: int
    mode: str | None = None
    can_lower: Callable[[Node], bool] = lambda node: True

    def run(self, graph: Graph) -> Graph:
        batch = graph.annotations.get("batch")
        costs = {m: _cost(graph, m, self.lanes, batch) for m in (BATCH, CHANNELS, PLAIN)}
        cheapest = min(costs, key=costs.__getitem__)
        mode = self.mode or graph.annotations.get("layout_mode") or cheapest
        new = _Assign(graph, mode, self.lanes, batch, self.can_lower).run()
        new.annotations["layouts"] = (mode, costs)
        note(
            new,
            f"{mode} in lanes; predicted " + ", ".join(f"{m} {c:.3g}" for m, c in costs.items()),
        )
        return new


def contraction(node: Node) -> Node | None:
    """The contraction inside a fused region."""
    if node.op != "fused" or node.attrs["kind"] not in CONTRACTIONS:
        return None
    return next(n for n in node.attrs["body"] if n.op in CONTRACTIONS)


def _strips(node: Node, inputs: tuple[Value, ...]) -> int:
    """How many strips of each image the first axis of what a region makes counts."""
    inner = contraction(node)
    if inner is None or inner.op == "patch_transform_grad":
        return 1
    if inner.op != "matmul":
        return inner.attrs.get("strips", 1)
    return max((v.node.attrs.get("strips", 1) for v in inputs), default=1)


def _cost(graph: Graph, mode: str, lanes: int, batch: int | None) -> float:
    """Multiply-adds, weighted by how badly a layout fills the lanes.

    Infinite where it cannot be used."""
    if mode == BATCH and (not batch or batch % lanes):
        return math.inf
    total = 0.0
    for node in graph:
        inner = contraction(node)
        if inner is None:
            continue
        work = _multiply_adds(inner)
        if mode == BATCH:
            total += work
        elif inner.op == "matmul":
            total += work * (1.15 if mode == CHANNELS else 1.6)
        elif mode == PLAIN or "groups" not in inner.attrs:
            total += work * 1.6
        else:
            weight = inner.attrs.get("weight_shape") or inner.inputs[1].sizes
            channels = (
                weight[1] * inner.attrs["groups"] if inner.op == "conv2d_input_grad" else weight[0]
            )
            grouped = 4.0 if inner.attrs["groups"] > 1 else 1.0
            # Below the lanes' width batch in lanes wins; for wide layers its working set is larger.
            total += work * grouped * (-(-channels // lanes) * lanes / channels) * 0.95
    return total


def _multiply_adds(node: Node) -> float:
    out = node.types[0].size
    first, second = node.inputs[:2]
    if node.op == "patch_transform":
        return 4.0 * out
    if node.op == "patch_transform_grad":
        return 4.0 * first.type.size
    if node.op == "tile_transform":
        return out * second.sizes[1]
    if node.op == "tile_transform_grad":
        return first.type.size * second.sizes[1]
    if node.op == "toom_conv":
        return out * math.prod(second.sizes[2:4])
    if node.op == "toom_conv_input_grad":
        return first.type.size * math.prod(second.sizes[2:4])
    if node.op == "toom_conv_weight_grad":
        return second.type.size * math.prod(node.types[0].sizes[2:4])
    if node.op == "matmul":
        return out * first.sizes[-1]
    if node.op == "batch_parts":
        return _multiply_adds(undivided(node))
    if node.op == "patch_product":
        return out * first.sizes[2]
    if node.op == "patch_weight_grad":
        return out * first.sizes[0] * first.sizes[3]
    if node.op == "conv2d":
        return out * math.prod(second.sizes[1:])
    if node.op == "conv2d_weight_grad":
        return second.type.size * math.prod(node.attrs["weight_shape"][1:])
    return first.type.size * math.prod(second.sizes[1:])


class _Assign:
    def __init__(
        self,
        graph: Graph,
        mode: str,
        lanes: int,
        batch: int | None,
        can_lower: Callable[[Node], bool],
    ):
        self.graph, self.mode, self.lanes = graph, mode, lanes
        self.batch, self.can_lower = batch, can_lower
        self.new = Graph(graph.name)
        self.new.annotations = dict(graph.annotations)
        self.mapping: dict[Value, Value] = {}
        self.batched: set[Value] = set()
        self.converted: dict[tuple[Value, Layout], Value] = {}
        self.weights = self._weight_layouts()

    def run(self) -> Graph:
        updates = {v: self.graph.node(name) for name, v in self.graph.updates.items()}
        for node in self.graph:
            inputs = tuple(self.mapping[v] for v in node.inputs)
            if node.op == "fused":
                copy = self._region(node, inputs, updates)
            elif node.op == "reshape":
                copy = self._alias(node, inputs)
            else:
                copy = self.new.copy_node(node, inputs)
                copy.layouts = (self._source_layout(node),)
            for old, value in zip(node.outputs, copy.outputs, strict=True):
                self.mapping[old] = value
                if self._is_batched(node, old):
                    self.batched.add(value)
            if node.op == "fused":
                inner = contraction(node)
                parts = inner is not None and inner.op == "batch_parts"
                copy.attrs["batched"] = parts or all(v in self.batched for v in copy.outputs)
                strips = _strips(node, copy.inputs)
                if strips > 1:
                    copy.attrs["strips"] = strips
        for name, value in self.graph.outputs.items():
            self.new.outputs[name] = self.convert(self.mapping[value], ROWS)
        for name, value in self.graph.updates.items():
            target = self.new.node(name)[0].layout
            self.new.updates[name] = self.convert(self.mapping[value], target)
        return self.new

    def _is_batched(self, node: Node, value: Value) -> bool:
        """Whether axis 0 of a value counts the images of the batch."""
        if self.batch is None or not value.shape:
            return False
        inner = contraction(node)
        made_of = tuple(self.mapping[v] for v in node.inputs)
        if value.shape[0] != self.batch * _strips(node, made_of):
            return False
        if node.op == "input":
            return True
        if node.op in ("parameter", "state", "constant"):
            return False
        if inner is not None and inner.op.endswith(("weight_grad", "batch_parts")):
            return False
        if inner is not None and inner.op == "matmul" and inner.types[0].rank == 2:
            left = inner.inputs[0]
            return left.node.op == "input" and self._operand(node, left) in self.batched
        return any(v in self.batched for v in made_of)

    def _operand(self, node: Node, value: Value) -> Value:
        names = list(node.attrs["body"].inputs)
        return self.mapping[node.inputs[names.index(value.node.name)]]

    # ---- layouts

    def _lane(self, axis: int) -> Layout:
        return Layout(axis, self.lanes)

    def _source_layout(self, node: Node) -> Layout:
        kind = node.types[0]
        if node.op == "input":
            # A vector with full blocks lies in memory the same way in both layouts.
            vector = kind.rank == 1 and self.mode == BATCH and kind.shape[0] == self.batch
            return self._lane(0) if vector and kind.sizes[0] % self.lanes == 0 else ROWS
        return self.weights.get(node.name, ROWS)

    def _weight_layouts(self) -> dict[str, Layout]:
        """Parameters that contractions read with output channels in lanes.

        With them, the optimizer states that are updated with them."""
        if self.mode != CHANNELS:
            return {}
        found: dict[str, Layout] = {}
        for node in self.graph:
            inner = contraction(node)
            if inner is None or inner.op not in ("conv2d", "matmul", "patch_transform"):
                continue
            right = inner.inputs[0 if inner.op == "patch_transform" else 1]
            if inner.op == "matmul":
                if right.node.op != "transpose" or right.rank != 2:
                    continue
                right = right.node.inputs[0]
            if right.node.op != "input":
                continue
            names = list(node.attrs["body"].inputs)
            operand = node.inputs[names.index(right.node.name)]
            if operand.node.op == "parameter" and operand.sizes[0] > 1:
                found[operand.node.name] = self._lane(0)
        for name in list(found):
            for state in self.graph.states:
                if state.startswith(f"optimizer.{name}."):
                    found[state] = self._lane(0)
        return found

    def _alias(self, node: Node, inputs: tuple[Value, ...]) -> Node:
        (value,) = inputs
        before, after = value.shape, node.types[0].shape
        keeps = value.layout.lane_axis == 0 and after and before[0] == after[0]
        if value.layout != ROWS and not keeps:
            value = self.convert(value, ROWS)
        copy = self.new.copy_node(node, (value,))
        copy.layouts = (value.layout,)
        return copy

    def _region(self, node: Node, inputs: tuple[Value, ...], updates: dict[Value, Node]) -> Node:
        inner = contraction(node)
        if inner is not None:
            inputs = self._contraction_operands(node, inner, inputs)
        copy = self.new.copy_node(node, inputs)
        copy.layouts = tuple(self._result_layout(node, value, updates) for value in node.outputs)
        if not self.can_lower(copy):
            copy.layouts = (ROWS,) * len(copy.types)
            if not self.can_lower(copy):
                plain = tuple(self.convert(v, ROWS) for v in inputs)
                # The region is added again with row-major operands; the first copy has no readers.
                copy = self._again(copy, plain)
        return copy

    def _again(self, copy: Node, inputs: tuple[Value, ...]) -> Node:
        self.new.remove(copy)
        fresh = self.new.copy_node(copy, inputs)
        fresh.layouts = (ROWS,) * len(fresh.types)
        return fresh

    def _result_layout(self, node: Node, value: Value, updates: dict[Value, Node]) -> Layout:
        if value in updates:
            return self.weights.get(updates[value].name, ROWS)
        shape = value.sizes
        inner = contraction(node)
        if self.mode == BATCH:
            if not self._is_batched(node, value):
                return ROWS
            # A weight's gradient sums over the same pixels of all images.
            patches = inner is not None and inner.op == "patch_transform"
            return spread(self._lane(0), shape, along=0) if patches else self._lane(0)
        if self.mode == CHANNELS:
            if inner is not None:
                if inner.op == "conv2d_weight_grad":
                    return self._lane(0) if shape[0] > 1 else ROWS
                if inner.op == "patch_transform" or self._is_point_product(node, inner):
                    points = self._lane(2 if self._is_batched(node, value) else 0)
                    return spread(points, shape, along=1)
                if inner.op in ("patch_weight_grad", "patch_transform_grad") and shape[0] > 1:
                    if not self._is_batched(node, value):
                        if inner.op == "patch_weight_grad":
                            return spread(self._lane(0), shape, along=1)
                        return self._lane(0)
            if len(shape) == 4 and self._fills_lanes(shape[1]) and self._is_batched(node, value):
                return self._lane(1)
            target = self._gradient_of(value)
            if target is not None:
                return target
        return ROWS

    def _is_point_product(self, node: Node, inner: Node) -> bool:
        """Whether a product multiplies transformed weights [P, O, I] with images [N, P, I, T]."""
        if inner.op != "matmul" or inner.types[0].rank != 4 or inner.inputs[1].node.op != "input":
            return False
        return self._operand(node, inner.inputs[1]).layout.lane_axis == 2

    def _fills_lanes(self, channels: int) -> bool:
        """Whether blocks of channels are more than half full: three colours are not."""
        return channels > 1 and 2 * channels > self.lanes

    def _gradient_of(self, value: Value) -> Layout | None:
        """The layout of the parameter whose update reads a value of the same shape."""
        for user, _ in self.graph.users(value):
            for operand in user.inputs:
                if operand.node.name in self.weights and operand.shape == value.shape:
                    return self.weights[operand.node.name]
        return None

    def _contraction_operands(
        self, node: Node, inner: Node, inputs: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        """Bring images that a contraction reads into the lanes of the mode."""
        names = list(node.attrs["body"].inputs)
        images = {v.node.name for v in inner.inputs if v.node.op == "input"}
        converted = []
        for name, value in zip(names, inputs, strict=True):
            if inner.op == "matmul" and self.mode == BATCH and value in self.batched:
                # A weight gradient sums over the batch: its lanes run along rows of the right one.
                left, right = inner.inputs
                if (
                    left.node.op == "transpose"
                    and right.node.name == name
                    and right.sizes[-1] >= 2 * self.lanes
                ):
                    converted.append(self.convert(value, ROWS))
                    continue
            if self.mode == CHANNELS and value not in self.batched and value.layout == ROWS:
                # Weights lie with their output channels in the lanes.
                second = inner.inputs[1] if inner.op == "conv2d" else None
                if second is not None and second.node.name == name and value.sizes[0] > 1:
                    value = self.convert(value, self._lane(0))
            if self.mode == CHANNELS and inner.op == "patch_transform":
                value = self._patched_weight(inner.inputs[0], name, value)
            if inner.op == "conv2d_input_grad" and inner.inputs[1].node.name == name:
                value = self._tap_by_tap(value, inner)
            if name in images and value in self.batched and value.layout == ROWS:
                if self.mode == BATCH:
                    value = self.convert(value, self._lane(0))
                elif self.mode == CHANNELS and value.rank == 4 and value.sizes[1] >= self.lanes:
                    value = self.convert(value, self._lane(1))
            converted.append(value)
        return tuple(converted)

    def _patched_weight(self, read: Value, name: str, value: Value) -> Value:
        """A weight that is transformed as an image: lanes along the first axis of its patches."""
        axis = 0
        if read.node.op == "transpose":
            axis = read.node.attrs["axes"][0]
            read = read.node.inputs[0]
        if read.node.name != name or value in self.batched or value.sizes[axis] == 1:
            return value
        return self.convert(value, self._lane(axis))

    def _tap_by_tap(self, weight: Value, inner: Node) -> Value:
        """Weights of a data gradient, as it reads them: each input channel's taps one after the
        other, and for each of them all output channels side by side."""
        channels, order = weight.sizes[1], (1, 2, 3, 0)
        if self.mode == BATCH:
            return self.convert(weight, Layout(order=order))
        if self.mode == CHANNELS and (inner.attrs["groups"] == 1 or channels % self.lanes == 0):
            return self.convert(weight, Layout(1, self.lanes, order=order))
        return weight

    def convert(self, value: Value, layout: Layout) -> Value:
        """The same value in another layout, through a copy that all readers share."""
        if value.layout == layout or (
            layout == ROWS and value.rank == 1 and value.sizes[0] % value.layout.lanes == 0
        ):
            return value
        key = (value, layout)
        if key not in self.converted:
            body = Graph("convert_layout")
            operand = body.input("operand0", value.shape, value.dtype)
            body.output(result0=body.add("expand", (operand,), {"shape": value.shape})[0])
            with self.new.origin(value.node.origin):
                attrs = {"body": body, "kind": "convert_layout", "outer": value.shape}
                attrs["batched"] = value in self.batched
                node = self.new.add(
                    "fused",
                    (value,),
                    attrs,
                    name=f"{value.node.name}.{'rows' if layout == ROWS else 'lanes'}",
                )
            node.layouts = (layout,)
            self.converted[key] = node[0]
            if value in self.batched:
                self.batched.add(node[0])
        return self.converted[key]

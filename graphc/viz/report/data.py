"""The data of a report: the graph after each pass, kernels, memory, times and reasons.

Whatever repeats is stored once: `text` holds every string, `nodes` every node as it stands after
one or more passes, `cells` the nodes of one layer and phase in rows. Elsewhere are their numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.inspect.explain import (
    conversion_reason,
    convolution_choices,
    kept_apart,
    sections,
)
from graphc.inspect.kernels import kernels, launched
from graphc.inspect.memory import memory
from graphc.inspect.recomputed import recomputed
from graphc.inspect.trace import boxes
from graphc.inspect.work import stored_bytes
from graphc.ir import Graph, Node, Value
from graphc.text import shown_attributes
from graphc.viz.formats import fused_operators
from graphc.viz.outline import Cells, Group, is_inlined, place_of
from graphc.viz.phases import PHASES

if TYPE_CHECKING:
    from graphc.inspect.profile import Profile
    from graphc.runtime.executable import Executable

_LONGEST_ATTRIBUTE = 200


class _Table:
    """Items by number; equal ones have one number."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._number: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, item: Any = None) -> int:
        number = self._number.get(key)
        if number is None:
            number = self._number[key] = len(self.items)
            self.items.append(key if item is None else item)
        return number


class ReportData:
    """Collects a report's data: `observe` for each pass, then `finish`."""

    def __init__(self, cells: Cells) -> None:
        self.text, self.nodes, self.bodies, self.cells = _Table(), _Table(), _Table(), _Table()
        self.passes: list[dict[str, Any]] = []
        self._cells_of = cells

    def observe(self, record: Any, graph: Graph, same: bool = False) -> None:
        """Add the graph after a pass; `same`: it is as it was after the one before."""
        self.passes.append(
            {
                "name": record.name,
                "seconds": record.seconds,
                "before": record.nodes_before,
                "after": record.nodes_after,
                "notes": list(record.notes),
                "outputs": self._named(graph.outputs),
                "updates": self._named(graph.updates),
                **(self._same(self.passes[-1]) if same else self._members(graph)),
            }
        )

    def _members(self, graph: Graph) -> dict[str, list[int]]:
        numbers = {node.name: self._node(node) for node in graph}
        cells = []
        for (layer, phase), rows in self._cells_of(graph).items():
            members = tuple(tuple(numbers[node.name] for node in row) for row in rows)
            cells.append(self.cells((self.text(layer), PHASES.index(phase), members)))
        inlined = [numbers[node.name] for node in graph if is_inlined(node)]
        return {"cells": runs(cells), "inlined": runs(inlined)}

    @staticmethod
    def _same(before: dict[str, Any]) -> dict[str, list[int]]:
        return {key: before[key] for key in ("cells", "inlined")}

    def _named(self, values: dict[str, Value]) -> list[list[int]]:
        return [[self.text(name), self.text(value.name)] for name, value in values.items()]

    def _node(self, node: Node) -> int:
        layer, phase = place_of(node)
        attributes = "\n".join(
            f"{key} = {text[:_LONGEST_ATTRIBUTE]}" for key, text in shown_attributes(node)
        )
        row = (
            self.text(node.name),
            self.text(node.op),
            self.text(layer),
            PHASES.index(phase),
            self.text(", ".join(map(str, node.types))),
            self.text(", ".join(map(str, node.layouts))),
            self.text(str(node.origin)),
            self.text(attributes),
            _bytes(node),
            self._body(node),
            tuple(self.text(value.name) for value in node.inputs),
        )
        return self.nodes(row)

    def _body(self, node: Node) -> int:
        """The operators of a fused node as (name, operator, type, operands), or -1."""
        inner = fused_operators(node)
        if not inner:
            return -1
        return self.bodies(
            tuple(
                (
                    self.text(n.name),
                    self.text(n.op),
                    self.text(", ".join(map(str, n.types))),
                    tuple(self.text(v.name) for v in n.inputs),
                )
                for n in inner
            )
        )

    def finish(self, executable: Executable, tree: Group) -> dict[str, Any]:
        """Everything, ready to be written as JSON."""
        data: dict[str, Any] = {
            "name": executable.graph.name,
            "target": executable.target,
            "phases": PHASES,
            "threads": getattr(executable, "threads", 1),
            "outline": self._group(tree),
            "explain": {
                title: lines
                for title, lines in sections(executable).items()
                if title not in ("Kernels", "Passes")
            },
        }
        if hasattr(executable, "launches"):
            data |= self._compiled(executable)
        if executable.last_profile is not None:
            data["profile"] = profile_data(executable.last_profile)
        return data | {
            "passes": self.passes,
            "cells": self.cells.items,
            "nodes": self.nodes.items,
            "bodies": self.bodies.items,
            "text": self.text.items,
        }

    def _group(self, group: Group) -> list[Any]:
        """[path, name, repeats, rows of groups]"""
        rows = [[self._group(child) for child in row] for row in group.rows]
        return [self.text(group.path), self.text(group.name), group.repeats, rows]

    def _compiled(self, executable: Any) -> dict[str, Any]:
        from graphc.inspect.dump import kernel_file, place_text

        graph, plan = executable.graph, executable.plan
        sources = _Table()
        launches = []
        for number, (info, launch) in enumerate(
            zip(kernels(executable), launched(executable), strict=True)
        ):
            arguments = [
                [value.name, str(value.type), place_text(value, plan), stored_bytes(value)]
                for value in (*launch.node.inputs, *launch.node.outputs)
            ]
            launches.append(
                {
                    **dataclasses.asdict(info),
                    "file": f"kernels/{kernel_file(number, launch)}",
                    "digest": Path(info.file).stem[:16],
                    "source": sources(launch.call.source),
                    "arguments": arguments,
                    "results": len(launch.node.outputs),
                    "numbers": list(launch.call.numbers),
                }
            )
        report = memory(executable)
        facts = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
        del facts["plan"]
        return {
            "launches": launches,
            "sources": sources.items,
            "memory": {
                **facts,
                "total_bytes": report.total_bytes,
                "steps": [self.text(node.name) for node in graph],
                # [name, bytes, first and last step, offset, values that share it]
                "lifetimes": [
                    [
                        self.text(p.name),
                        p.bytes,
                        p.first,
                        p.last,
                        p.offset,
                        [self.text(name) for name in p.shares],
                    ]
                    for p in plan.lifetimes
                ],
            },
            "apart": [
                [self.text(a), self.text(b), self.text(reason)]
                for (a, b), reason in kept_apart(graph).items()
            ],
            "conversions": {
                node.name: conversion_reason(node)
                for node in graph
                if node.attrs.get("kind") == "convert_layout"
            },
            "recomputed": recomputed(graph),
            "algorithms": convolution_choices(executable),
        }


def profile_data(profile: Profile) -> dict[str, Any]:
    """A profile's figures, and the boxes of its timeline: [thread, launch, begin, end] in us."""
    fields = profile.as_dict()
    kept = "name seconds median waiting share roof gflops gbytes intensity".split()
    fields["launches"] = [{key: row[key] for key in kept} for row in fields["launches"]]
    fields["levels"] = dict(
        zip(profile.machine.level_names, fields["machine"]["read"], strict=True)
    )
    fields["boxes"] = [
        [thread, number, round(1e6 * begin, 3), round(1e6 * end, 3)]
        for thread, number, begin, end in boxes(profile)
    ]
    return fields


def runs(numbers: Iterable[int]) -> list[int]:
    """Numbers as [first, count, first, count, ...] of runs that go up by one."""
    found: list[int] = []
    for number in numbers:
        if found and number == found[-2] + found[-1]:
            found[-1] += 1
        else:
            found += [number, 1]
    return found


def _bytes(node: Node) -> int | None:
    """Bytes of all results as they lie in memory; None while a dimension is symbolic."""
    if any(isinstance(d, str) for t in node.types for d in t.shape):
        return None
    return sum(stored_bytes(value) for value in node.outputs)

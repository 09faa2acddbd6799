"""The CPU executable: parameters and activations in arenas, one native call a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graphc.codegen.program import Launch
from graphc.ir import SOURCES, Graph, Node, Value
from graphc.runtime.arena import Arena, aligned_zeros
from graphc.runtime.driver import ALONE, BARRIER, launch_table
from graphc.runtime.executable import Executable
from graphc.runtime.layout import read_layout, write_layout
from graphc.runtime.linker import KernelSource, load_kernels
from graphc.runtime.team import get_team

_ALIGN = 64
Progress = Callable[[int, int, float, str], None]


class CpuExecutable(Executable):
    """Runs a launch table. See `graphc.runtime.executable.Executable` for what users call."""

    target = "cpu"

    def __init__(
        self,
        graph: Graph,
        launches: list[Launch],
        threads: int,
        seed: int,
        progress: Progress | None = None,
    ):
        super().__init__(graph, seed)
        self.threads = threads
        self.launches = launches
        self.plan = graph.annotations["memory"]
        self._place_sources()
        self._arena = Arena(max(_ALIGN, self.plan.arena_bytes))
        self._build_table(progress)
        self._initialise()

    # ---- memory

    def _place_sources(self) -> None:
        offset, self._source_offset = 0, {}
        for node in self.graph:
            if node.op in SOURCES:
                self._source_offset[node.name] = offset
                shape = node.layouts[0].physical_shape(node.types[0].shape)
                size = int(np.prod(shape, dtype=np.int64)) * node.types[0].itemsize
                offset += -(-size // _ALIGN) * _ALIGN
        self._sources = Arena(max(_ALIGN, offset))
        self._in_place = set(self.plan.in_place_updates)
        updated = {self.graph.updates[n]: n for n in self._in_place}
        self._owner: dict[Value, str] = updated
        for node in self.graph:
            if node.op == "constant":
                write_layout(self._view(node[0]), node.attrs["value"], node.layouts[0])

    def _root(self, value: Value) -> Value:
        while value.node.op == "reshape":
            value = value.node.inputs[0]
        return value

    def _locate(self, value: Value) -> tuple[Arena, int]:
        value = self._root(value)
        if value in self._owner:
            return self._sources, self._source_offset[self._owner[value]]
        if value.node.op in SOURCES:
            return self._sources, self._source_offset[value.node.name]
        return self._arena, self.plan.offset(value)

    def _address(self, value: Value) -> int:
        arena, offset = self._locate(value)
        return arena.address(offset)

    def _view(self, value: Value) -> np.ndarray:
        arena, offset = self._locate(value)
        return arena.view(offset, value.layout.physical_shape(value.shape), value.dtype)

    # ---- program

    def _build_table(self, progress: Progress | None) -> None:
        rows = [launch for launch in self.launches if all(v.type.size for v in launch.node.outputs)]
        sources = [KernelSource("kernel", launch.call.source) for launch in rows]
        loaded = load_kernels(sources, progress=progress)
        total = sum(launch.call.buffers + len(launch.call.numbers) for launch in rows)
        self._arguments = aligned_zeros(max(8, 8 * total)).view(np.int64)
        base = self._arguments.ctypes.data
        position, table = 0, []
        patches: dict[str, list[int]] = {}
        for launch, address in zip(rows, loaded.addresses, strict=True):
            values = [*launch.node.inputs, *launch.node.outputs]
            for slot, value in enumerate(values):
                self._arguments[position + slot] = self._address(value)
                root = self._root(value)
                if root.node.op == "input":
                    patches.setdefault(root.node.name, []).append(position + slot)
            end = position + len(values)
            self._arguments[end : end + len(launch.call.numbers)] = launch.call.numbers
            alone = ALONE if launch.schedule.parallel == 0 else 0
            table.append((address, base + 8 * position, BARRIER | alone))
            position = end + len(launch.call.numbers)
        self._table = launch_table(table)
        self._patches = {name: np.array(slots) for name, slots in patches.items()}
        self.kernel_paths = dict(zip([launch.node.name for launch in rows], loaded.paths, strict=True))
        self.compiled_kernels = loaded.compiled
        self._team = get_team(self.threads)
        self._program = self._team.program(self._table.ctypes.data, len(table)) if table else None
        self._outputs = [(name, self._root(v), v) for name, v in self.graph.outputs.items()]
        self._copied = [(n, v) for n, v in self.graph.updates.items() if n not in self._in_place]

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        arrays = self._checked(inputs)
        if out is not None:
            self._checked_out(out)
        with self._lock:
            for name, array in arrays.items():
                if name in self._patches:
                    self._arguments[self._patches[name]] = array.ctypes.data
            if self._program is not None:
                self._program.run()
            outputs = {}
            for name, root, value in self._outputs:
                if root.node.op == "input":
                    outputs[name] = arrays[root.node.name].reshape(value.shape).copy()
                else:
                    outputs[name] = read_layout(self._view(value), value.shape, value.layout)
            fresh = [(n, self._view(v).copy()) for n, v in self._copied if self._root(v).node.op != "input"]
            for name, contents in fresh:
                self._view(self.graph.node(name)[0])[...] = contents
        if out is not None:
            for name, array in out.items():
                array[...] = outputs[name]
                outputs[name] = array
        return outputs

    def _read(self, name: str) -> np.ndarray:
        node: Node = self.state_nodes[name]
        return read_layout(self._view(node[0]), node.types[0].shape, node.layouts[0])

    def _write(self, name: str, array: np.ndarray) -> None:
        node = self.state_nodes[name]
        write_layout(self._view(node[0]), array, node.layouts[0])

    def poison(self) -> None:
        """Fill the activation arena with NaN: tests prove that no kernel reads what none has written."""
        self._arena.poison()

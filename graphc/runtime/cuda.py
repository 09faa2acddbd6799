"""The CUDA executable: parameters and activations on a device, a step as one program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graphc import errors
from graphc.codegen.cuda_program import CudaStep
from graphc.interpreter import interpret
from graphc.ir import ALIGNMENT, SOURCES, Graph, Value, block_bytes, root
from graphc.runtime.build import Progress
from graphc.runtime.cpu import difference
from graphc.runtime.cuda_device import Device, DeviceCall, DeviceCopy, Operation
from graphc.runtime.executable import Executable
from graphc.runtime.inputs import checked_array, missing_input


class CudaExecutable(Executable):
    """Runs on a GPU, or on the CPU that emulates one. See `Executable` for what users call."""

    def __init__(
        self,
        target: str,
        graph: Graph,
        steps: list[CudaStep],
        device: Device,
        seed: int,
        progress: Progress | None = None,
        check: bool = False,
    ):
        super().__init__(graph, seed)
        self.target, self.device, self.check = target, device, check
        self.steps = steps
        self.plan = graph.annotations["memory"]
        self._place_sources()
        self._arena = device.allocate(max(ALIGNMENT, self.plan.arena_bytes))
        self._build(progress)
        self._initialise()

    # ---- memory

    def _place_sources(self) -> None:
        offset = 0
        self._source_offset: dict[Value, int] = {}
        for node in self.graph:
            if node.op in SOURCES or "prepared" in node.attrs:
                for value in node.outputs:
                    self._source_offset[value] = offset
                    offset += block_bytes(value)
        self._sources = self.device.allocate(max(ALIGNMENT, offset))
        self._in_place = set(self.plan.in_place_updates)
        # Where an update is computed straight into the parameter it updates.
        self._owner = {self.graph.updates[n]: self.graph.node(n)[0] for n in self._in_place}
        for node in self.graph:
            if node.op == "constant":
                self._put(node[0], node.attrs["value"])

    def _address(self, value: Value) -> int:
        value = root(value)
        value = self._owner.get(value, value)
        if value in self._source_offset:
            return self._sources + self._source_offset[value]
        return self._arena + self.plan.offset(value)

    def _put(self, value: Value, array: Any) -> None:
        self.device.write(
            self._address(value), np.ascontiguousarray(array, value.dtype).reshape(value.sizes)
        )

    def _get(self, value: Value) -> np.ndarray:
        array = np.empty(value.sizes, value.dtype)
        self.device.read(self._address(value), array)
        return array

    # ---- program

    def _build(self, progress: Progress | None) -> None:
        """Compile or fetch every kernel, and lay out two programs.

        One runs when parameters change, the other at every call."""
        rows = [(step, launch) for step in self.steps for launch in step.rendering.launches]
        wanted = []
        for step, launch in rows:
            types = [*(b.dtype for b in step.kernel.buffers), "float32"]
            wanted.append((step.node.name, launch, tuple(types[b] for b in launch.buffers)))
        loaded = self.device.load(wanted, progress)
        self.compiled_kernels = loaded.compiled
        self.kernel_paths: dict[str, str] = {}
        once: list[Operation] = []
        every: list[Operation] = []
        for (step, launch), kernel, path in zip(rows, loaded.kernels, loaded.paths, strict=True):
            node = step.node
            self.kernel_paths.setdefault(node.name, path)
            addresses = [self._address(v) for v in (*node.inputs, *node.outputs)]
            if step.rendering.workspace:
                addresses.append(self._arena + self.plan.workspace_offset(node))
            parameters = np.array(
                [*(addresses[b] for b in launch.buffers), *launch.numbers], np.int64
            )
            call = DeviceCall(
                node.name, kernel, launch.grid, launch.block, launch.shared, parameters
            )
            (once if "prepared" in node.attrs else every).append(call)
        self._once = self.device.program(once)
        self._every = self.device.program([*every, *self._updates()])
        self._stale = True

    def _updates(self) -> list[Operation]:
        """Copies of updates that were not computed in place: all are read before one is written."""
        pairs = [
            (self.graph.node(n)[0], v)
            for n, v in self.graph.updates.items()
            if n not in self._in_place
        ]
        staging = self.device.allocate(max(ALIGNMENT, sum(block_bytes(v) for _, v in pairs)))
        reads: list[Operation] = []
        writes: list[Operation] = []
        for target, value in pairs:
            reads.append(DeviceCopy(staging, self._address(value), value.type.nbytes))
            writes.append(DeviceCopy(self._address(target), staging, value.type.nbytes))
            staging += block_bytes(value)
        return [*reads, *writes]

    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        if out is not None:
            self._checked_out(out)
        if misnamed := self._misnamed(inputs):
            raise misnamed
        with self._lock:
            for name, node in self.inputs.items():
                array = inputs.get(name, node.attrs.get("default"))
                if array is None:
                    raise missing_input(node)
                self.device.stage(self._address(node[0]), checked_array(node, array))
            if self.check:
                self._run_checked()
            else:
                self._prepare()
                self._every.run()
            return self._results(out)

    def _prepare(self) -> None:
        """Run what depends on parameters alone, if they have changed."""
        if self._stale:
            self._once.run()
            self._stale = False

    def _results(self, out: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        outputs = {}
        for name, value in self.graph.outputs.items():
            array = out[name] if out is not None and name in out else None
            if array is None:
                array = np.empty(value.sizes, value.dtype)
            self.device.read(self._address(value), array)
            outputs[name] = array
        return outputs

    def _run_checked(self) -> None:
        """Run, then compare every region with the interpreter on the operands that its kernel had.

        The plan of a checked executable never reuses memory: everything can still be looked at."""
        before = {n.name: self._get(n[0]) for n in self.graph if n.op in SOURCES}
        self.poison()
        self._stale = True
        self._prepare()
        self._every.run()
        for step in self.steps:
            node = step.node
            named = {}
            for i, value in enumerate(node.inputs):
                owner = root(value)
                source = before[owner.node.name] if owner.node.op in SOURCES else self._get(owner)
                named[f"operand{i}"] = source.reshape(value.shape)
            expected = interpret(node.attrs["body"], named).outputs
            for i, value in enumerate(node.outputs):
                if found := difference(self._get(value), expected[f"result{i}"]):
                    path = self.kernel_paths.get(node.name, "-")
                    raise errors.CheckError(
                        f"{node.describe()}: the kernel's {value.name!r} {value.type} differs from "
                        f"the interpreter: {found}; kernel source: {path}"
                    )

    def _read(self, name: str) -> np.ndarray:
        return self._get(self.state_nodes[name][0])

    def _write(self, name: str, array: np.ndarray) -> None:
        self._put(self.state_nodes[name][0], array)
        self._stale = True

    def poison(self) -> None:
        """Fill the activation arena with NaN.

        Tests prove with it that no kernel reads what none has written."""
        self.device.fill(self._arena, max(ALIGNMENT, self.plan.arena_bytes), 0xFF)


def open_device(target: str) -> Device:
    """The device that a target runs on. Raises MissingExtraError, DeviceError."""
    if target == "cuda-emulated":
        from graphc.runtime.cuda_emulated import EmulatedDevice

        return EmulatedDevice()
    from graphc.runtime.cuda_driver import GpuDevice

    return GpuDevice()

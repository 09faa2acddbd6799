"""The CUDA executable: parameters and activations on a device, a step as one program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc import errors
from graphc.codegen.cuda_program import CudaStep
from graphc.init import InitialValues
from graphc.interpreter import interpret
from graphc.ir import ALIGNMENT, SOURCES, Graph, Node, Value, block_bytes, root
from graphc.runtime.arena import source_offsets
from graphc.runtime.build import Progress
from graphc.runtime.cpu import difference
from graphc.runtime.cuda_device import Device, DeviceCall, DeviceCopy, Operation
from graphc.runtime.cuda_interop import Borrowed, DeviceArray, borrow, borrow_input
from graphc.runtime.executable import Executable
from graphc.runtime.inputs import checked_array, missing_input

if TYPE_CHECKING:
    from graphc.inspect.cuda import CudaKernelInfo


class CudaExecutable(Executable):
    """Runs on a GPU, or on the CPU that emulates one. See `Executable` for what users call."""

    def __init__(
        self,
        target: str,
        graph: Graph,
        steps: list[CudaStep],
        device: Device,
        first: InitialValues,
        progress: Progress | None = None,
        check: bool = False,
    ):
        super().__init__(graph)
        self.target, self.device, self.check = target, device, check
        self.steps = steps
        self.plan = graph.annotations["memory"]
        self._place_sources()
        self._arena = device.allocate(max(ALIGNMENT, self.plan.arena_bytes))
        self._build(progress)
        self._initialise(first)

    # ---- memory

    def _place_sources(self) -> None:
        self._source_offset, end = source_offsets(self.graph)
        self._sources = self.device.allocate(max(ALIGNMENT, end))
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
        wanted = [(step.node.name, *row) for step in self.steps for row in step.launches]
        loaded = self.device.load(wanted, progress)
        self.compiled_kernels = loaded.compiled
        self.kernel_files: dict[str, tuple[str, ...]] = {}
        once: list[Operation] = []
        every: list[Operation] = []
        for (step, launch), kernel, path in zip(rows, loaded.kernels, loaded.paths, strict=True):
            node = step.node
            self.kernel_files[node.name] = (*self.kernel_files.get(node.name, ()), path)
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
        self, inputs: Mapping[str, Any], out: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run one step.

        Inputs and `out` may be arrays of other libraries on the device (`__cuda_array_interface__`,
        DLPack): they are copied there, never through the host."""
        targets = self._targets(out or {})
        if misnamed := self._misnamed(inputs):
            raise misnamed
        with self._lock:
            for name, node in self.inputs.items():
                array = inputs.get(name, node.attrs.get("default"))
                if array is None:
                    raise missing_input(node)
                self._receive(node, array)
            if self.check:
                self._run_checked()
            else:
                self._prepare()
                self._every.run()
            return self._results(out or {}, targets)

    def _receive(self, node: Node, array: Any) -> None:
        address, nbytes = self._address(node[0]), node.types[0].nbytes
        borrowed = borrow_input(node, array)
        if borrowed is None:
            self.device.stage(address, checked_array(node, array))
            return
        self.device.copy(address, borrowed.address, nbytes, borrowed.stream)
        self.device.synchronize()  # the owner may reuse the memory from now on
        borrowed.release()

    def _targets(self, out: Mapping[str, Any]) -> dict[str, Borrowed]:
        """Those of `out` that lie on the device; the others are checked."""
        found = {}
        for name, array in out.items():
            if name in self.graph.outputs:
                borrowed = borrow(f"out[{name!r}]", self.graph.outputs[name].type, array)
                if borrowed is not None:
                    found[name] = borrowed
        self._checked_out({n: array for n, array in out.items() if n not in found})
        return found

    def device_array(self, name: str) -> DeviceArray:
        """An output, input, parameter or state where it lies on the device, without a copy.

        Raises InputError for a name that the executable does not have."""
        nodes = {**self.inputs, **self.state_nodes}
        if name in self.graph.outputs:
            value = self.graph.outputs[name]
        elif name in nodes:
            value = nodes[name][0]
        else:
            known = ", ".join([*self.graph.outputs, *nodes])
            raise errors.InputError(f"there is no {name!r} on the device, but {known}")
        return DeviceArray(
            self,
            self._address(value),
            value.sizes,
            value.dtype,
            self.device.on_cpu,
            self.device.synchronize,
        )

    def _prepare(self) -> None:
        """Run what depends on parameters alone, if they have changed."""
        if self._stale:
            self._once.run()
            self._stale = False

    def _results(self, out: Mapping[str, Any], targets: dict[str, Borrowed]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for name, value in self.graph.outputs.items():
            array = out[name] if name in out else np.empty(value.sizes, value.dtype)
            if name in targets:
                target = targets[name]
                self.device.copy(
                    target.address, self._address(value), value.type.nbytes, target.stream
                )
                self.device.synchronize()
                target.release()
            else:
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
                    raise errors.CheckError(
                        f"{node.describe()}: the kernel's {value.name!r} {value.type} differs from "
                        f"the interpreter: {found}; kernel source: "
                        f"{', '.join(self.kernel_files[node.name])}"
                    )

    def _read(self, name: str) -> np.ndarray:
        return self._get(self.state_nodes[name][0])

    def _write(self, name: str, array: np.ndarray) -> None:
        self._put(self.state_nodes[name][0], array)
        self._stale = True

    def kernels(self) -> list[CudaKernelInfo]:  # type: ignore[override]  # the CPU's have lanes
        """What each kernel of a step computes and how it is launched, in order."""
        from graphc.inspect.cuda import kernels

        return kernels(self)

    def profile(self, *args: Any, **kwargs: Any) -> Any:
        """Not for this target.

        Raises GraphcError: emulated threads take turns, and a step of a GPU is one launch."""
        raise errors.GraphcError(
            f"profile: launches of target={self.target!r} are not timed one by one; a GPU's are "
            "seen by Nsight Systems, and compile with target='cpu' to profile a CPU"
        )

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

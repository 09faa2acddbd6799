"""The CPU executable: parameters and activations in arenas, one native call a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graphc import errors
from graphc.codegen.program import Launch
from graphc.init import InitialValues
from graphc.interpreter import interpret
from graphc.ir import ALIGNMENT, SOURCES, Graph, Node, Value, block_bytes, root
from graphc.runtime.arena import Arena, source_offsets
from graphc.runtime.executable import Executable
from graphc.runtime.inputs import checked_array, missing_input
from graphc.runtime.layout import read_layout, write_layout
from graphc.runtime.linker import KernelSource, load_kernels
from graphc.runtime.table import LaunchTable
from graphc.runtime.team import get_team

COPY_BYTES = 16384  # inputs up to this size are copied; kernels read larger ones where they are
Progress = Callable[[int, int, float, str], None]


class CpuExecutable(Executable):
    """Runs a launch table. See `graphc.runtime.executable.Executable` for what users call."""

    target = "cpu"

    def __init__(
        self,
        graph: Graph,
        launches: list[Launch],
        threads: int,
        first: InitialValues,
        progress: Progress | None = None,
        check: bool = False,
    ):
        super().__init__(graph)
        self.check = check
        self.threads = threads
        self.launches = launches
        self.plan = graph.annotations["memory"]
        self._place_sources()
        self._arena = Arena(max(ALIGNMENT, self.plan.arena_bytes))
        self._build_tables(progress)
        self._prepare_inputs()
        self._initialise(first, threads)

    # ---- memory

    def _place_sources(self) -> None:
        self._source_offset, end = source_offsets(self.graph)
        self._sources = Arena(max(ALIGNMENT, end))
        self._in_place = set(self.plan.in_place_updates)
        # Where an update is computed straight into the parameter it updates.
        self._owner = {self.graph.updates[n]: self.graph.node(n)[0] for n in self._in_place}
        for node in self.graph:
            if node.op == "constant":
                write_layout(self._view(node[0]), node.attrs["value"], node.layouts[0])

    def _locate(self, value: Value) -> tuple[Arena, int]:
        value = root(value)
        value = self._owner.get(value, value)
        if value in self._source_offset:
            return self._sources, self._source_offset[value]
        return self._arena, self.plan.offset(value)

    def _address(self, value: Value, thread: int = 0) -> int:
        """Address of a value; of one thread's copy, where threads have memory of their own."""
        arena, offset = self._locate(value)
        return arena.address(offset + thread * self.plan.step(root(value)))

    def _memory_range(self, value: Value) -> tuple[int, int]:
        """First and last byte of a value's memory; inputs are memory that no kernel writes."""
        owner = root(value)
        if owner.node.op == "input":
            return (0, 0)
        first = self._address(owner)
        last = self._address(owner, max(0, owner.layout.copies - 1))
        return first, last + block_bytes(owner)

    def _view(self, value: Value) -> np.ndarray:
        arena, offset = self._locate(value)
        return arena.view(offset, value.layout.physical_shape(value.sizes), value.dtype)

    # ---- program

    def _build_tables(self, progress: Progress | None) -> None:
        """Compile or fetch every kernel, and lay out two programs.

        One runs when parameters change, the other at every call."""
        rows = [launch for launch in self.launches if any(v.type.size for v in launch.node.outputs)]
        loaded = load_kernels(
            [KernelSource("kernel", launch.call.source) for launch in rows], progress=progress
        )
        self.kernel_paths = dict(
            zip([launch.node.name for launch in rows], loaded.paths, strict=True)
        )
        self.compiled_kernels = loaded.compiled
        self._team = get_team(self.threads)
        pairs = list(zip(rows, loaded.addresses, strict=True))
        once = [pair for pair in pairs if "prepared" in pair[0].node.attrs]
        self._once = LaunchTable(once, self._address, self._memory_range, self._team)
        self._every = LaunchTable(
            [pair for pair in pairs if "prepared" not in pair[0].node.attrs],
            self._address,
            self._memory_range,
            self._team,
        )
        self._stale = True
        self._outputs = [
            (name, self._view(v), None if v.layout.lane_axis is None else v)
            for name, v in self.graph.outputs.items()
        ]
        self._copied = [
            (self._view(self.graph.node(n)[0]), self._view(v))
            for n, v in self.graph.updates.items()
            if n not in self._in_place
        ]

    def _prepare(self) -> None:
        """Run what depends on parameters alone, and write the borders of inputs."""
        self._once.run()
        self._stale = False

    def _prepare_inputs(self) -> None:
        """What a call does for each input.

        (name, node, shape, dtype, default, memory to copy to, slots to patch). Small inputs are
        copied into the executable's memory, which is cheaper than asking NumPy for an address;
        kernels read large ones where they are."""
        self._calls = []
        padded = {n.inputs[0].node.name: n for n in self.graph if "interior" in n.attrs}
        # An output or update that is an input is read from the executable's memory.
        results = {root(value).node.name for value in self.graph.results}
        for name, node in self.inputs.items():
            shape, dtype = node.types[0].shape, np.dtype(node.types[0].dtype)
            default = node.attrs.get("default")
            default = None if default is None else np.asarray(default, dtype)
            copied = (
                node.types[0].nbytes <= COPY_BYTES
                or name not in self._every.patches
                or name in results
                or self.check
            )
            staging = self._view(node[0]).reshape(shape) if copied else None
            if name in padded:
                staging = self._view(padded[name][0])[padded[name].attrs["interior"]]
            self._calls.append(
                (name, node, shape, dtype, default, staging, self._every.patches.get(name))
            )

    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        # A small network takes ten microseconds: what this does counts.
        keep = []
        given = 0
        if out is not None:
            self._checked_out(out)
        with self._lock:
            if self._stale:
                self._prepare()
            for name, node, shape, dtype, default, staging, slots in self._calls:
                array = inputs.get(name)
                if array is None:
                    if default is None:
                        raise self._misnamed(inputs) or missing_input(node)
                    array = default
                else:
                    given += 1
                    right = (
                        type(array) is np.ndarray and array.dtype == dtype and array.shape == shape
                    )
                    if not (right and (staging is not None or array.flags.c_contiguous)):
                        array = checked_array(node, array)
                if staging is None:
                    keep.append(array)
                    self._every.arguments[slots] = array.ctypes.data
                else:
                    staging[...] = array
            if given != len(inputs) and (misnamed := self._misnamed(inputs)):
                raise misnamed
            if self.check:
                return self._run_checked(out)
            self._every.run()
            return self._results(out)

    def _results(self, out: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        outputs = {}
        for name, view, blocked in self._outputs:
            contents = view if blocked is None else read_layout(view, blocked.sizes, blocked.layout)
            if out is not None and name in out:
                outputs[name] = out[name]
                out[name][...] = contents
            else:
                outputs[name] = view.copy() if blocked is None else contents
        if self._copied:
            # All are read before the first is written.
            fresh = [(target, view.copy()) for target, view in self._copied]
            for target, contents in fresh:
                target[...] = contents
        return outputs

    def _run_checked(self, out: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Run, then compare every region with the interpreter on the operands that its kernel had.

        The plan of a checked executable never reuses memory: everything can still be looked at."""
        before = {n.name: self._logical(n[0]) for n in self.graph if n.op in SOURCES}
        self._arena.poison()
        self._prepare()
        self._every.run()
        for launch in self.launches:
            node = launch.node
            named = {}
            for i, value in enumerate(node.inputs):
                owner = root(value)
                source = (
                    before[owner.node.name] if owner.node.op in SOURCES else self._logical(owner)
                )
                named[f"operand{i}"] = source.reshape(value.shape)
            expected = interpret(node.attrs["body"], named).outputs
            for i, value in enumerate(node.outputs):
                if found := difference(self._logical(value), expected[f"result{i}"]):
                    path = self.kernel_paths.get(node.name, "-")
                    raise errors.CheckError(
                        f"{node.describe()}: the kernel's {value.name!r} {value.type} differs from "
                        f"the interpreter: {found}; kernel source: {path}"
                    )
        return self._results(out)

    def _logical(self, value: Value) -> np.ndarray:
        return read_layout(self._view(value), value.sizes, value.layout)

    def _read(self, name: str) -> np.ndarray:
        node: Node = self.state_nodes[name]
        return read_layout(self._view(node[0]), node.types[0].sizes, node.layouts[0])

    def _write(self, name: str, array: np.ndarray) -> None:
        node = self.state_nodes[name]
        write_layout(self._view(node[0]), array, node.layouts[0])
        self._stale = True

    def poison(self) -> None:
        """Fill the activation arena with NaN.

        Tests prove with it that no kernel reads what none has written."""
        self._arena.poison()


def difference(got: np.ndarray, expected: np.ndarray) -> str:
    """What is wrong with a kernel's result, or "".

    Rounding differs: a value within 1e-4 of the largest is equal. The position of a maximum may
    differ where two elements are equal up to rounding."""
    if got.shape != expected.shape or got.size == 0:
        return (
            "" if got.shape == expected.shape else f"shape {got.shape} instead of {expected.shape}"
        )
    if expected.dtype.kind != "f":
        wrong = int((got != expected).sum())
        return f"{wrong} of {got.size} elements differ" if wrong > 0.01 * got.size else ""
    both = np.isfinite(expected)
    if not np.array_equal(both, np.isfinite(got)):
        return f"{int((both != np.isfinite(got)).sum())} elements are finite in one only"
    scale = max(float(np.abs(expected[both]).max(initial=0.0)), 1e-6)
    error = np.abs(got[both].astype(np.float64) - expected[both])
    if error.size and float(error.max()) > 1e-4 * scale:
        return f"by up to {error.max():.3g}, where the largest element is {scale:.3g}"
    return ""

"""A compiled program: arenas, a launch table, and what users call."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphc import errors
from graphc.init import InitialValues
from graphc.interpreter import interpret
from graphc.ir import Graph, Node
from graphc.runtime.inputs import checked_array, missing_input, unknown_input

if TYPE_CHECKING:
    from graphc.inspect.kernels import KernelInfo
    from graphc.inspect.memory import MemoryReport
    from graphc.inspect.profile import Profile
    from graphc.tuning import Tuning


class Executable(ABC):
    """What `gc.compile` returns: call it with the inputs by name, get the outputs by name.

    Calls from several Python threads take turns. Returned arrays are fresh; they never alias the
    executable's memory."""

    graph: Graph
    target: str

    def __init__(self, graph: Graph):
        self.graph = graph
        self.inputs: dict[str, Node] = graph.inputs
        self.output_names = tuple(graph.outputs)
        self._declared = {
            name: (value.sizes, np.dtype(value.dtype)) for name, value in graph.outputs.items()
        }
        self.state_nodes: dict[str, Node] = {**graph.parameters, **graph.states}
        self.records: tuple[Any, ...] = ()  # of the passes, when they ran
        self.tuning: Tuning | None = None  # what `tune=True` measured
        # Runs the passes once more for an observer of (record, graph): cheaper than to keep every
        # graph.
        self.replay: Callable[[Callable[[Any, Graph], None]], Any] | None = None
        self.last_profile: Profile | None = None
        self._lock = threading.RLock()

    # ---- running

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        return self.run(inputs)

    @abstractmethod
    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run one step.

        `out` gives arrays to write outputs into (C-contiguous, of the output's type)."""

    def _misnamed(self, inputs: Mapping[str, Any]) -> errors.InputError | None:
        """The error for the first name that is no input of this executable."""
        for name in inputs:
            if name not in self.inputs:
                unneeded = name in self.graph.annotations.get("unneeded_inputs", ())
                return unknown_input(name, list(self.inputs), unneeded)
        return None

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if misnamed := self._misnamed(inputs):
            raise misnamed
        arrays = {}
        for name, node in self.inputs.items():
            if name in inputs:
                arrays[name] = checked_array(node, inputs[name])
            elif node.attrs.get("default") is not None:
                arrays[name] = np.asarray(node.attrs["default"], node.types[0].dtype)
            else:
                raise missing_input(node)
        return arrays

    def _checked_out(self, out: Mapping[str, np.ndarray]) -> None:
        for name, array in out.items():
            if name not in self._declared:
                raise errors.InputError(
                    f"there is no output {name!r}; the outputs are {', '.join(self.output_names)}"
                )
            shape, dtype = self._declared[name]
            if (
                not isinstance(array, np.ndarray)
                or array.shape != shape
                or array.dtype != dtype
                or not (array.flags.c_contiguous and array.flags.writeable)
            ):
                declared = self.graph.outputs[name].type
                raise errors.InputError(
                    f"out[{name!r}] must be a writable C-contiguous array {declared}"
                )

    # ---- state

    @abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """A copy of a parameter or state, in its logical shape."""

    @abstractmethod
    def _write(self, name: str, array: np.ndarray) -> None:
        """Set a parameter or state from an array of its logical shape."""

    def state(self, optimizer: bool = False) -> dict[str, np.ndarray]:
        """Copies of the parameters and running statistics by name, in PyTorch's names and layouts.

        `optimizer=True` adds the optimizer's moments and counters, to resume training."""
        with self._lock:
            return {
                n: self._read(n)
                for n, node in self.state_nodes.items()
                if optimizer or _persistent(node)
            }

    def load_state(self, state: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Set parameters and states from arrays by name.

        Nothing changes if one of them does not fit.
        Raises StateError: unknown or missing names (unless `strict=False`), wrong shapes."""
        known = self.state_nodes
        extra = [n for n in state if n not in known and not _ignored(n)]
        absent = [n for n, node in known.items() if n not in state and _persistent(node)]
        if strict and extra:
            raise errors.StateError(
                f"load_state: the network has no {', '.join(map(repr, extra))} (strict=False skips)"
            )
        if strict and absent:
            raise errors.StateError(
                f"load_state: missing {', '.join(map(repr, absent))} (strict=False keeps them)"
            )
        arrays = {}
        for name in known.keys() & state.keys():
            declared = known[name].types[0]
            array = np.asarray(state[name])
            if array.shape != declared.shape:
                raise errors.StateError(
                    f"load_state: {name!r} is {declared}, got shape {list(array.shape)}"
                )
            if array.dtype.kind not in "biuf":
                raise errors.StateError(
                    f"load_state: {name!r} is {declared}, got {array.dtype}: pass numbers"
                )
            arrays[name] = array.astype(declared.dtype)
        with self._lock:
            for name, array in arrays.items():
                self._write(name, array)

    # ---- looking inside; the imports wait, as most programs never look

    def kernels(self) -> list[KernelInfo]:
        """What each launch of a step computes and how: one entry a launch, in order."""
        from graphc.inspect.kernels import kernels

        return kernels(self)

    def memory(self) -> MemoryReport:
        """Planned memory, its lower bound, and what lies outside the plan. Print it.

        Raises GraphcError for `target="interpret"`, which plans none."""
        from graphc.inspect.memory import memory

        return memory(self)

    def explain(self) -> str:
        """Why the program is as it is: algorithms, layouts, conversions, what is computed again,
        what was not fused and why, tiles."""
        from graphc.inspect.explain import explain

        return explain(self)

    def dump(self, folder: str | os.PathLike[str]) -> Path:
        """Write all there is to see into a new folder; open its `index.html` in a browser.

        The graph after each pass, kernels, launch table, memory plan and the last profile.
        Raises GraphcError if the folder has something in it."""
        from graphc.inspect.dump import dump

        return dump(self, folder)

    def profile(
        self, inputs: Mapping[str, Any] | None = None, /, *, runs: int = 50, **named: Any
    ) -> Profile:
        """Time every launch over `runs` steps on inputs as for a call; `print` the result.

        Parameters and states are put back afterwards; `last_profile` keeps the result.
        Raises GraphcError for `target="interpret"`."""
        from graphc.inspect.kernels import no_kernels
        from graphc.inspect.profile import profile

        if not hasattr(self, "launches"):
            raise no_kernels(self, "profile")
        native: Any = self
        self.last_profile = profile(native, {**(inputs or {}), **named}, runs)
        return self.last_profile

    def _initialise(self, first: InitialValues, threads: int = 1) -> None:
        """Fill parameters and states."""
        with ThreadPoolExecutor(threads) as pool:
            nodes = self.state_nodes.items()
            writes = [pool.submit(self._write, name, first.take(node)) for name, node in nodes]
        for write in writes:
            write.result()  # raises what the thread has raised


def _ignored(name: str) -> bool:
    """Whether an unknown entry is no error: what only another executable of the network has (an
    optimizer's moments), and PyTorch's count of batches, which batch norm with a momentum never
    reads."""
    return (
        name.startswith("optimizer.")
        or name.endswith(".num_batches_tracked")
        or name == "dropout.step"
    )


def _persistent(node: Node) -> bool:
    return node.op == "parameter" or node.attrs.get("persistent", True)


class InterpretedExecutable(Executable):
    """`target="interpret"`: every call runs the NumPy references."""

    target = "interpret"

    def __init__(self, graph: Graph, first: InitialValues):
        super().__init__(graph)
        self._state: dict[str, np.ndarray] = {}
        self._initialise(first)

    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        arrays = self._checked(inputs)
        with self._lock:
            results = interpret(self.graph, arrays, self._state)
            self._state.update({k: np.array(v) for k, v in results.updates.items()})
        outputs = {k: np.array(v) for k, v in results.outputs.items()}
        if out is not None:
            self._checked_out(out)
            for name, array in out.items():
                array[...] = outputs[name]
                outputs[name] = array
        return outputs

    def _read(self, name: str) -> np.ndarray:
        return self._state[name].copy()

    def _write(self, name: str, array: np.ndarray) -> None:
        self._state[name] = np.array(array)

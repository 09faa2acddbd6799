"""The emulated GPU: memory of the host, kernels run by `graphc.runtime.emulate`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from graphc.codegen.cuda import CudaLaunch
from graphc.codegen.cuda_build import CudaSignature, require_numba_cuda
from graphc.runtime.arena import Arena
from graphc.runtime.build import Progress
from graphc.runtime.cuda_device import Device, DeviceCall, Loaded, Operation, Program
from graphc.runtime.emulate import Emulator
from graphc.runtime.linker import KernelSource, load_kernels

# What kernels are lowered for; nothing that is emulated depends on it.
CAPABILITY = (8, 0)


class EmulatedDevice(Device):
    """Runs everything at once, in the thread that asks for it."""

    name = "emulated on the CPU"
    on_cpu = True

    def __init__(self) -> None:
        require_numba_cuda()
        self.emulator = Emulator()
        self._arenas: list[Arena] = []

    def allocate(self, nbytes: int) -> int:
        arena = Arena(nbytes)
        arena.poison()
        self._arenas.append(arena)
        ctypes.memset(arena.address(0), 0, nbytes)
        return arena.address(0)

    def load(
        self,
        launches: Sequence[tuple[str, CudaLaunch, tuple[str, ...]]],
        progress: Progress | None = None,
    ) -> Loaded:
        sources = []
        for _, launch, buffers in launches:
            wanted = CudaSignature.of(launch, buffers, "emulated", CAPABILITY)
            sources.append(KernelSource("kernel", launch.source, wanted.text()))
        found = load_kernels(sources, progress=progress)
        return Loaded(found.addresses, found.paths, found.compiled)

    def write(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    stage = write

    def copy(self, target: int, source: int, nbytes: int, stream: int | None = None) -> None:
        ctypes.memmove(target, source, nbytes)

    def read(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        ctypes.memset(address, byte, nbytes)

    def synchronize(self) -> None:
        pass  # every call returns when its work is done

    def program(self, operations: Sequence[Operation]) -> Program:
        return _EmulatedProgram(self.emulator, tuple(operations))


class _EmulatedProgram(Program):
    def __init__(self, emulator: Emulator, operations: tuple[Operation, ...]) -> None:
        self._emulator, self._operations = emulator, operations

    def run(self) -> None:
        for operation in self._operations:
            if isinstance(operation, DeviceCall):
                self._emulator.launch(
                    operation.name,
                    operation.kernel,
                    operation.grid,
                    operation.block,
                    operation.parameters,
                )
            else:
                ctypes.memmove(operation.target, operation.source, operation.nbytes)

"""Where CUDA kernels run: what an executable needs of a GPU, and of the CPU that emulates one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphc.codegen.cuda import CudaLaunch, Dimensions
from graphc.runtime.build import Progress


@dataclass(frozen=True)
class DeviceCall:
    """One launch with everything bound: `parameters` are addresses and numbers, an int64 each."""

    name: str
    kernel: int  # what `Device.load` returned for its source
    grid: Dimensions
    block: Dimensions
    shared: int
    parameters: np.ndarray


@dataclass(frozen=True)
class DeviceCopy:
    """Bytes moved from one address of the device to another, between launches."""

    target: int
    source: int
    nbytes: int


Operation = DeviceCall | DeviceCopy


@dataclass(frozen=True)
class Loaded:
    """Kernels ready to be launched, in the order of the launches they were asked for."""

    kernels: tuple[int, ...]
    paths: tuple[str, ...]  # the readable source of each
    compiled: tuple[str, ...]  # names of those that were in no cache


class Device(ABC):
    """Memory, and a stream of work in order. Addresses are plain integers."""

    name: str
    on_cpu = False  # whether its memory is the host's

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Address of zeroed memory, aligned to 256 bytes, for as long as the device object lives.

        Raises GraphcError if there is too little."""

    @abstractmethod
    def load(
        self,
        launches: Sequence[tuple[str, CudaLaunch, tuple[str, ...]]],
        progress: Progress | None = None,
    ) -> Loaded:
        """Compile or fetch kernels, given as (name, launch, element types of the pointers)."""

    @abstractmethod
    def write(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array of the host to the device, after all work before."""

    @abstractmethod
    def stage(self, address: int, array: np.ndarray) -> None:
        """The same for what is written again and again, without waiting for the device.

        The array may change as soon as this returns."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int, stream: int | None = None) -> None:
        """Copy memory of the device, in stream order, after the work of another stream."""

    @abstractmethod
    def read(self, address: int, array: np.ndarray) -> None:
        """Fill a C-contiguous array of the host, after all work before."""

    @abstractmethod
    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte, in stream order."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work is done."""

    @abstractmethod
    def program(self, operations: Sequence[Operation]) -> Program:
        """Operations prepared to be run again and again in one go."""


class Program(ABC):
    """A sequence of launches and copies."""

    @abstractmethod
    def run(self) -> None:
        """Start it, in stream order."""

"""The GPU: NVIDIA's driver interface through `cuda.bindings`, one stream, steps as CUDA graphs.

Kernels are compiled to PTX for the device's compute capability, kept in the kernel cache, and
finished by the driver, which has a cache of its own. A step is captured once as a CUDA graph and is
then a single launch, whatever it consists of. Names of functions are those of the CUDA Driver API.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.codegen.cuda import CudaLaunch
from graphc.codegen.cuda_build import EXTRA, CudaSignature, require_numba_cuda
from graphc.runtime.build import Progress
from graphc.runtime.cuda_device import Device, DeviceCall, Loaded, Operation, Program
from graphc.runtime.linker import KernelSource, fetch_kernels

OLDEST = (8, 0)  # the first compute capability with asynchronous copies to shared memory
_INSTEAD = "use target='cpu', or target='cuda-emulated' to run its kernels on the CPU"
_STATIC_SHARED = 48 * 1024  # bytes of shared memory that a kernel has without asking


def load_driver() -> Any:
    """The module of driver functions. Raises MissingExtraError, DeviceError."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise errors.MissingExtraError(f"target='cuda' needs cuda-bindings: {EXTRA}") from error
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # cuda.bindings has an error of its own for a missing library
        raise errors.DeviceError(f"target='cuda': no NVIDIA driver is installed; {_INSTEAD}") from (
            error
        )
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        raise errors.DeviceError(f"target='cuda': the driver finds no NVIDIA GPU; {_INSTEAD}")
    _check(driver, status, "cuInit")
    return driver


def _check(driver: Any, status: Any, what: str) -> None:
    """Raises DeviceError if the driver reports anything but success."""
    if status == driver.CUresult.CUDA_SUCCESS:
        return
    known = driver.CUresult
    if status == known.CUDA_ERROR_OUT_OF_MEMORY:
        text = "the GPU has too little free memory; use a smaller batch or memory_limit="
    elif status == known.CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
        text = "the NVIDIA driver is older than the compiler: update the driver"
    elif status == known.CUDA_ERROR_NO_BINARY_FOR_GPU:
        text = "the kernel was compiled for another compute capability"
    else:
        _, description = driver.cuGetErrorString(status)
        text = description.decode() if isinstance(description, bytes) else str(description)
    raise errors.DeviceError(f"{what}: {text} ({getattr(status, 'name', status)})")


class GpuDevice(Device):
    """The first GPU that the driver lists (CUDA_VISIBLE_DEVICES chooses).

    Raises DeviceError: no driver, no device, a compute capability below OLDEST, any failure."""

    def __init__(self, driver: Any = None) -> None:
        if driver is None:
            require_numba_cuda()
            driver = load_driver()
        self._driver = driver
        if self._call("cuDeviceGetCount") == 0:
            raise errors.DeviceError(f"target='cuda': the driver finds no NVIDIA GPU; {_INSTEAD}")
        device = self._call("cuDeviceGet", 0)
        name = self._call("cuDeviceGetName", 128, device)
        self.name = name.split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        self.capability = (
            self._call(
                "cuDeviceGetAttribute",
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                device,
            ),
            self._call(
                "cuDeviceGetAttribute",
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                device,
            ),
        )
        if self.capability < OLDEST:
            found, oldest = (".".join(map(str, c)) for c in (self.capability, OLDEST))
            raise errors.DeviceError(
                f"target='cuda': {self.name} has compute capability {found}, {oldest} is the "
                f"oldest supported; {_INSTEAD}"
            )
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._call("cuCtxSetCurrent", self._context)
        self._stream = self._call(
            "cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        )
        self._memory: list[Any] = []  # what `close` frees
        self._pinned: dict[int, tuple[int, Any]] = {}  # by address: host memory, event of its copy
        self._functions: dict[int, Any] = {}

    def facts(self) -> list[tuple[str, str]]:
        """What `graphc doctor` says of the device, as (name, fact)."""
        self.activate()
        driver = self._call("cuDriverGetVersion")
        free, total = self._call("cuMemGetInfo")
        capability = ".".join(map(str, self.capability))
        return [
            ("device", f"{self.name}, compute capability {capability}"),
            ("driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}"),
            ("memory", f"{free / 1e6:,.0f} MB free of {total / 1e6:,.0f} MB"),
        ]

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver: its result, a tuple if it has several, None if none."""
        status, *results = getattr(self._driver, name)(*arguments)
        _check(self._driver, status, name)
        return results[0] if len(results) == 1 else tuple(results) or None

    def activate(self) -> None:
        """Make the device's context that of this thread: any thread may call an executable."""
        self._call("cuCtxSetCurrent", self._context)

    # ---- memory

    def allocate(self, nbytes: int) -> int:
        self.activate()
        free, total = self._call("cuMemGetInfo")
        if nbytes > free:
            raise errors.DeviceError(
                f"{self.name} has {free / 1e6:,.0f} MB of memory free (of {total / 1e6:,.0f}), "
                f"{nbytes / 1e6:,.0f} MB are needed: use a smaller batch or memory_limit="
            )
        memory = self._call("cuMemAlloc", nbytes)
        self._memory.append(memory)
        self.fill(int(memory), nbytes, 0)
        return int(memory)

    def write(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            self.activate()
            self._call("cuStreamSynchronize", self._stream)
            self._call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)

    def stage(self, address: int, array: np.ndarray) -> None:
        if not array.nbytes:
            return
        self.activate()
        if address not in self._pinned:
            memory = self._call("cuMemAllocHost", array.nbytes)
            flags = self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
            self._pinned[address] = int(memory), self._call("cuEventCreate", flags)
        memory, copied = self._pinned[address]
        self._call("cuEventSynchronize", copied)  # the last copy may still read the memory
        ctypes.memmove(memory, array.ctypes.data, array.nbytes)
        self._call("cuMemcpyHtoDAsync", address, memory, array.nbytes, self._stream)
        self._call("cuEventRecord", copied, self._stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int | None = None) -> None:
        self.activate()
        if stream is not None:
            self._call("cuStreamSynchronize", stream)
        if nbytes:
            self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def read(self, address: int, array: np.ndarray) -> None:
        self.activate()
        self._call("cuStreamSynchronize", self._stream)
        if array.nbytes:
            self._call("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        self.activate()
        if nbytes:
            self._call("cuMemsetD8Async", address, byte, nbytes, self._stream)

    def synchronize(self) -> None:
        self.activate()
        self._call("cuStreamSynchronize", self._stream)

    # ---- kernels

    def load(
        self,
        launches: Sequence[tuple[str, CudaLaunch, tuple[str, ...]]],
        progress: Progress | None = None,
    ) -> Loaded:
        self.activate()
        sources = []
        for _, launch, buffers in launches:
            wanted = CudaSignature.of(launch, buffers, "ptx", self.capability)
            sources.append(KernelSource("kernel", launch.source, wanted.text()))
        fetched = fetch_kernels(sources, progress=progress)
        functions: dict[str, int] = {}
        for key, entry, (_, launch, _) in zip(fetched.keys, fetched.entries, launches, strict=True):
            if key not in functions:
                functions[key] = self._function(entry.symbol, entry.object_bytes, launch.shared)
        return Loaded(
            tuple(functions[key] for key in fetched.keys), fetched.paths, fetched.compiled
        )

    def _function(self, symbol: str, ptx: bytes, shared: int) -> int:
        module = self._call("cuModuleLoadData", ptx + b"\0")
        function = self._call("cuModuleGetFunction", module, symbol.encode())
        if shared > _STATIC_SHARED:
            kind = self._driver.CUfunction_attribute
            limit = kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, limit, shared)
        self._functions[int(function)] = function
        return int(function)

    def program(self, operations: Sequence[Operation]) -> Program:
        return _GpuProgram(self, operations)

    def enqueue(self, operation: Operation) -> None:
        """Put a launch or copy into the stream."""
        if not isinstance(operation, DeviceCall):
            self.copy(operation.target, operation.source, operation.nbytes)
            return
        first = operation.parameters.ctypes.data
        places = first + 8 * np.arange(len(operation.parameters), dtype=np.int64)
        self._call(
            "cuLaunchKernel",
            self._functions[operation.kernel],
            *operation.grid,
            *operation.block,
            operation.shared,
            self._stream,
            places.ctypes.data,
            0,
        )

    def capture(self, operations: Sequence[Operation]) -> Any:
        """The operations as an executable graph."""
        self.activate()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            for operation in operations:
                self.enqueue(operation)
        finally:
            graph = self._call("cuStreamEndCapture", self._stream)
        executable = self._call("cuGraphInstantiate", graph, 0)
        self._call("cuGraphDestroy", graph)
        return executable

    def launch_graph(self, graph: Any) -> None:
        self.activate()
        self._call("cuGraphLaunch", graph, self._stream)


class _GpuProgram(Program):
    """A CUDA graph, captured when it is first run."""

    def __init__(self, device: GpuDevice, operations: Sequence[Operation]) -> None:
        self._device, self._operations = device, tuple(operations)
        self._graph: Any = None

    def run(self) -> None:
        if not self._operations:
            return
        if self._graph is None:
            self._graph = self._device.capture(self._operations)
        self._device.launch_graph(self._graph)

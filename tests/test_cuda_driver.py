"""target="cuda" without a GPU: errors, and what the driver is asked to do, by a driver of Python.

The driver below keeps device memory on the host and records launches; it runs no kernel."""

from __future__ import annotations

import ctypes
import enum
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba.cuda.cudadrv", reason="numba-cuda is not installed")

import graphc as gc
from graphc import errors
from graphc.runtime.cuda_driver import GpuDevice, load_driver


class Status(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_UNKNOWN = 999


OK = Status.CUDA_SUCCESS


class FakeDriver:
    CUresult = Status
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=SimpleNamespace(value=1))
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=SimpleNamespace(value=2))
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, devices=1, capability=(8, 0), free=10**8, load=OK):
        self.devices, self.capability, self.free, self.load = devices, capability, free, load
        self.memory: dict[int, ctypes.Array] = {}
        self.modules: list[bytes] = []
        self.recorded: list[tuple] | None = None  # operations of a capture that is under way
        self.graphs: list[list[tuple]] = []
        self.launched: list[int] = []
        self.calls: list[str] = []
        self.numbers = itertools.count(1)

    def __getattr__(self, name):  # what only has to succeed
        assert name.startswith("cu"), name
        self.calls.append(name)
        return lambda *arguments: (OK,)

    def cuDeviceGetCount(self):
        return OK, self.devices

    def cuDeviceGet(self, number):
        return OK, number

    def cuDeviceGetName(self, size, device):
        return OK, b"Fake GPU".ljust(size, b"\0")

    def cuDeviceGetAttribute(self, attribute, device):
        return OK, self.capability[attribute]

    def cuDriverGetVersion(self):
        return OK, 13050

    def cuGetErrorString(self, status):
        return OK, b"unknown error"

    def cuMemGetInfo(self):
        return OK, self.free, 2 * self.free

    def cuMemAlloc(self, nbytes):
        memory = ctypes.create_string_buffer(nbytes + 256)
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.memory[address] = memory
        return OK, address

    cuMemAllocHost = cuMemAlloc

    def _move(self, target, source, nbytes, stream=None):
        if self.recorded is not None:
            self.recorded.append(("copy", target, source, nbytes))
        else:
            ctypes.memmove(target, source, nbytes)
        return (OK,)

    cuMemcpyHtoD = cuMemcpyDtoH = cuMemcpyHtoDAsync = cuMemcpyDtoDAsync = _move

    def cuMemsetD8Async(self, address, byte, nbytes, stream):
        ctypes.memset(address, byte, nbytes)
        return (OK,)

    def _number(self, *arguments):
        return OK, next(self.numbers)

    cuStreamCreate = cuEventCreate = cuDevicePrimaryCtxRetain = cuModuleGetFunction = _number

    def cuModuleLoadData(self, image):
        self.modules.append(image)
        return (self.load, len(self.modules)) if self.load is OK else (self.load,)

    def cuStreamBeginCapture(self, stream, mode):
        self.recorded = []
        return (OK,)

    def cuStreamEndCapture(self, stream):
        self.graphs.append(self.recorded)
        self.recorded = None
        return OK, len(self.graphs) - 1

    def cuGraphInstantiate(self, graph, flags):
        return OK, graph

    def cuGraphLaunch(self, graph, stream):
        self.launched.append(graph)
        return (OK,)

    def cuLaunchKernel(self, function, *rest):
        *sizes, shared, stream, places, extra = rest
        assert self.recorded is not None and extra == 0
        self.recorded.append(("launch", function, tuple(sizes), places))
        return (OK,)


def network():
    g = gc.Graph("linear")
    x = g.input("x", ("N", 6))
    h = gc.softmax(gc.relu(gc.nn.linear(x, 40, name="fc1")), -1)
    g.output(loss=gc.mean(gc.square(gc.nn.linear(h, 3, name="fc2"))), y=h)
    return g


@pytest.fixture
def executable(monkeypatch):
    """`gc.compile` for the device of a fake driver."""

    def build(driver, **options):
        monkeypatch.setattr("graphc.runtime.cuda_driver.load_driver", lambda: driver)
        return gc.compile(network(), target="cuda", dims={"N": 4}, **options)

    return build


TRAINING = {"outputs": ["loss"], "loss": "loss", "optimizer": gc.optim.SGD(0.1)}


def test_a_step_is_one_graph(rng, executable):
    driver = FakeDriver()
    exe = executable(driver, **TRAINING)
    launches = [launch for step in exe.steps for launch in step.rendering.launches]
    assert len(driver.modules) == len({launch.source for launch in launches})
    assert all(b".target sm_80" in module and module.endswith(b"\0") for module in driver.modules)
    for _ in range(3):
        exe(x=rng.standard_normal((4, 6)))
    (graph,) = driver.graphs
    assert driver.launched == [0, 0, 0]
    kernels = [operation for operation in graph if operation[0] == "launch"]
    assert [sizes for _, _, sizes, _ in kernels] == [(*la.grid, *la.block) for la in launches]


def test_parameters_of_a_launch(executable):
    """cuLaunchKernel gets an address for each parameter, of memory that lives: read one back."""
    driver = FakeDriver()
    exe = executable(driver, **TRAINING)
    seen = []
    driver.cuLaunchKernel = lambda function, *rest: seen.append(values(rest[-2])) or (OK,)

    def values(places):
        count = len(call.parameters)
        addresses = np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(places))
        return [ctypes.c_int64.from_address(int(a)).value for a in addresses]

    for call in [op for op in exe._every._operations if hasattr(op, "parameters")]:
        exe.device.enqueue(call)
        assert seen[-1] == call.parameters.tolist()


def test_state_goes_to_the_device_and_back(rng, executable):
    exe = executable(FakeDriver(), **TRAINING)
    state = {n: rng.standard_normal(a.shape).astype("f4") for n, a in exe.state().items()}
    exe.load_state(state)
    assert all(np.array_equal(exe.state()[n], a) for n, a in state.items())


class OnDevice:
    """An array of another library, in the memory of the fake device."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None,
            "version": 3,
            **changes,
        }


def test_arrays_on_the_device_are_copied_there(rng, executable):
    driver = FakeDriver()
    exe = executable(driver, outputs=["y"])
    x, y = rng.standard_normal((4, 6)).astype("f4"), np.zeros((4, 40), "f4")
    given, wanted = OnDevice(x, stream=2), OnDevice(y)
    assert exe.run({"x": given}, out={"y": wanted})["y"] is wanted
    memory = exe.device_array("x")
    found = (ctypes.c_float * 24).from_address(memory.__cuda_array_interface__["data"][0])
    assert np.array_equal(np.array(found).reshape(4, 6), x)
    assert memory.__dlpack_device__() == (2, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": (4, 5)}, r"expects f32\[4,6\], got float32\[4, 5\]"),
        ({"typestr": "<f8"}, "got float64"),
        ({"strides": (4, 16)}, "C-contiguous"),
    ],
)
def test_wrong_arrays_on_the_device(executable, changes, message):
    exe = executable(FakeDriver(), outputs=["y"])
    with pytest.raises(errors.InputError, match=message):
        exe(x=OnDevice(np.zeros((4, 6), "f4"), **changes))


def test_dlpack_of_an_emulated_device(rng):
    """Without a copy: NumPy sees what the next call writes, and keeps the executable alive."""
    exe = gc.compile(network(), outputs=["y"], dims={"N": 4}, target="cuda-emulated")
    x = rng.standard_normal((4, 6)).astype("f4")
    first = exe(x=x)["y"]
    view = np.from_dlpack(exe.device_array("y"))
    assert np.array_equal(view, first)
    second = exe(x=2 * x)["y"]
    assert np.array_equal(view, second) and not np.array_equal(first, second)
    with pytest.raises(errors.InputError, match="there is no 'z' on the device, but y, x, fc1"):
        exe.device_array("z")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"devices": 0}, "finds no NVIDIA GPU"),
        ({"capability": (7, 0)}, "Fake GPU has compute capability 7.0, 8.0 is the oldest"),
        ({"free": 1000}, "0 MB of memory free .* use a smaller batch or memory_limit="),
        ({"load": Status.CUDA_ERROR_UNSUPPORTED_PTX_VERSION}, "update the driver"),
        ({"load": Status.CUDA_ERROR_UNKNOWN}, "cuModuleLoadData: unknown error"),
    ],
)
def test_errors_say_what_to_do(executable, options, message):
    with pytest.raises(errors.DeviceError, match=message):
        executable(FakeDriver(**options), **TRAINING)


def test_no_driver():
    try:
        load_driver()
    except errors.DeviceError as error:
        assert "no NVIDIA" in str(error)
    else:
        pytest.skip("there is a driver")
    with pytest.raises(errors.DeviceError, match="use target='cpu', or target='cuda-emulated'"):
        gc.compile(network(), outputs=["y"], dims={"N": 1}, target="cuda")


def test_doctor_names_the_device():
    facts = dict(GpuDevice(FakeDriver()).facts())
    assert facts == {
        "device": "Fake GPU, compute capability 8.0",
        "driver": "for CUDA 13.5",
        "memory": "100 MB free of 200 MB",
    }

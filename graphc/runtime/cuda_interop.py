"""Arrays on the device, shared with other libraries: `__cuda_array_interface__` and DLPack.

The protocols: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html (version 3) and
https://dmlc.github.io/dlpack/latest/c_api.html (unversioned capsules, which every library takes).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc import errors
from graphc.ir import Node

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode by NumPy's kind


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_NAME, _USED = b"dltensor", b"used_dltensor"

# What consumers of our capsules still hold, by address of the managed tensor.
_exported: dict[int, tuple[Any, ...]] = {}


@_DELETER
def _delete(address: int) -> None:
    _exported.pop(address, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _drop_capsule(capsule: int) -> None:
    """The end of a capsule that nobody has taken."""
    held = ctypes.cast(capsule, ctypes.py_object)
    if _is_valid(held, _NAME):
        _delete(_pointer(held, _NAME))


class DeviceArray:
    """A value of an executable where it lies: C-contiguous, never copied, written by the next call.

    Other libraries take it as it is: `cupy.asarray(a)`, `torch.from_dlpack(a)`; for an emulated
    device `numpy.from_dlpack(a)`. It keeps the executable alive."""

    def __init__(
        self,
        owner: Any,
        address: int,
        shape: tuple[int, ...],
        dtype: str,
        on_cpu: bool,
        synchronize: Callable[[], None],
    ) -> None:
        self.address, self.shape, self.dtype = address, shape, np.dtype(dtype)
        self._owner, self._on_cpu, self._synchronize = owner, on_cpu, synchronize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self._on_cpu:
            raise AttributeError("memory of an emulated device is the host's: use DLPack")
        self._synchronize()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CPU if self._on_cpu else CUDA), 0

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        """A capsule; all work so far is done, so that any stream may use it."""
        self._synchronize()
        shape = (ctypes.c_int64 * max(1, len(self.shape)))(*self.shape)
        managed = _DLManagedTensor()
        tensor = managed.tensor
        tensor.data, (tensor.device_type, tensor.device_id) = self.address, self.__dlpack_device__()
        tensor.ndim, tensor.lanes = len(self.shape), 1
        tensor.code, tensor.bits = _CODES[self.dtype.kind], 8 * self.dtype.itemsize
        tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        managed.deleter = ctypes.cast(_delete, ctypes.c_void_p)
        address = ctypes.addressof(managed)
        _exported[address] = (managed, shape, self._owner)
        return _new(address, _NAME, ctypes.cast(_drop_capsule, ctypes.c_void_p))


@dataclass(frozen=True)
class Borrowed:
    """Memory of the device that belongs to an array of another library, until `release`."""

    address: int
    stream: int | None  # whose work must be done before the memory is touched; None: all is done
    release: Callable[[], None] = lambda: None


def borrow(what: str, node_type: Any, array: Any) -> Borrowed | None:
    """The device memory of an array of another library; None for arrays of the host.

    Raises InputError if it is not C-contiguous, or not of the type `node_type`; `what` names it."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        dtype = np.dtype(interface["typestr"])
        _check(what, node_type, shape, dtype, _in_elements(strides, dtype))
        return Borrowed(int(interface["data"][0]), interface.get("stream"))
    device = getattr(array, "__dlpack_device__", None)
    if device is None or device()[0] not in (CUDA, CUDA_MANAGED):
        return None
    # Stream 1 is the legacy default stream, which waits for the producer's.
    capsule = array.__dlpack__(stream=1)
    managed = _DLManagedTensor.from_address(_pointer(capsule, _NAME))
    tensor = managed.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    kind = next((k for k, code in _CODES.items() if code == tensor.code), "?")
    described = kind + str(tensor.bits // 8)
    dtype = np.dtype(bool) if kind == "b" else np.dtype(described) if kind != "?" else np.dtype("O")

    def release() -> None:
        _rename(capsule, _USED)
        if managed.deleter:
            _DELETER(managed.deleter)(ctypes.addressof(managed))

    try:
        _check(what, node_type, shape, dtype, strides)
    except errors.InputError:
        release()
        raise
    return Borrowed(int(tensor.data or 0) + tensor.byte_offset, 1, release)


def borrow_input(node: Node, array: Any) -> Borrowed | None:
    return borrow(f"input {node.name!r}", node.types[0], array)


def _in_elements(strides: Any, dtype: np.dtype) -> tuple[int, ...] | None:
    return None if strides is None else tuple(s // dtype.itemsize for s in strides)


def _check(what: str, expected: Any, shape: tuple[int, ...], dtype: np.dtype, strides: Any) -> None:
    if shape != expected.shape or dtype != np.dtype(expected.dtype):
        raise errors.InputError(
            f"{what} expects {expected}, got {dtype}{list(shape)} on the device"
        )
    step, contiguous = 1, True
    for size, stride in zip(reversed(shape), reversed(strides or ())):
        contiguous &= size == 1 or stride == step
        step *= size
    if not contiguous:
        raise errors.InputError(f"{what} expects a C-contiguous array: copy it on the device first")

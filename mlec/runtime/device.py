"""Moves arrays to the memory that kernels run in, and results back: host memory as it lies, CUDA memory by copies."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlec.errors import RuntimeUnavailableError
from mlec.runtime.library import find_library, load_library

Array = NDArray[Any]

_CPU, _CUDA = 1, 2  # device types of DLPack
_POOLED = 2  # the allocator of the virtual machine that keeps freed buffers
_DLPACK_CHARS = frozenset("?bBhHiIlLqQefd")  # element types that numpy can describe in DLPack
_DLPACK_VERSION = (1, 0)  # the first version that can describe read-only memory

ALLOCATION_ALIGNMENT = 64
"""Bytes that the address of every buffer of the runtime is a multiple of."""


class HostMemory:
    """Memory of the CPU. Aligned contiguous inputs are passed as they lie; outputs are views that own their buffer.

    Args:
        alignment: bytes that the address of an input must be a multiple of to be passed without a copy.
    """

    vm_arguments: tuple[int, ...] = (_CPU, 0, _POOLED)

    def __init__(self, alignment: int = ALLOCATION_ALIGNMENT) -> None:
        ffi = load_library().ffi
        self._misaligned = alignment - 1
        self._from_dlpack = ffi.from_dlpack
        self._allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._view = ffi.get_global_func("runtime.TVMTensorCreateView")
        self._device = ffi.device("cpu")
        self._dtypes: dict[np.dtype[Any], Any] = {}

    def feed(self, array: Array) -> Any:
        """The array as a tensor that kernels can read: the same memory where it is fit for that, else a copy."""
        # An empty array says nothing useful about its strides, which the kernels check.
        if array.flags.c_contiguous and array.size and array.dtype.char in _DLPACK_CHARS:
            tensor = self._from_dlpack(array.__dlpack__(max_version=_DLPACK_VERSION))
            if not tensor.data_ptr() & self._misaligned:
                return tensor
        tensor = self._allocate(array.shape, self._dtype(array.dtype), self._device, None)
        np.copyto(self.fetch(tensor), array)
        return tensor

    def fetch(self, tensor: Any) -> Array:
        """The tensor as an array on the same memory, which lives as long as the array."""
        try:
            return np.from_dlpack(tensor)
        except RuntimeError:  # numpy itself has no bfloat16; asking for the dtype first would cost more than all this
            import ml_dtypes

        return np.from_dlpack(self._view(tensor, tensor.shape, "uint16", 0)).view(ml_dtypes.bfloat16)

    def synchronize(self) -> None:
        """Wait for kernels under way: on the CPU there are none, a call returns when its work is done."""

    def _dtype(self, dtype: np.dtype[Any]) -> Any:
        if dtype not in self._dtypes:
            self._dtypes[dtype] = load_library().ffi.dtype(dtype.name)
        return self._dtypes[dtype]


class CudaMemory:
    """Memory of another device: every input and constant is copied there, every output back.

    Args:
        device: a ``tvm_ffi`` device whose half of the runtime is loaded.
    """

    vm_arguments: tuple[int, ...] = (_CUDA, 0, _POOLED, _CPU, 0, _POOLED)

    def __init__(self, device: Any) -> None:
        ffi = load_library().ffi
        self._host = HostMemory()
        self._device = device
        self._allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._wait = ffi.get_global_func("runtime.Device_StreamSync")

    def feed(self, array: Array) -> Any:
        """A copy of the array in the device's memory."""
        source = self._host.feed(array)
        tensor = self._allocate(source.shape, source.dtype, self._device, None)
        self._copy(source, tensor)
        self.synchronize()  # the source may be a buffer of ours that dies here
        return tensor

    def fetch(self, tensor: Any) -> Array:
        """A copy of the tensor in host memory."""
        target = self._host._allocate(tensor.shape, tensor.dtype, self._host._device, None)
        self._copy(tensor, target)
        self.synchronize()
        return self._host.fetch(target)

    def synchronize(self) -> None:
        """Wait until the kernels and copies under way are done."""
        self._wait(self._device, 0)


def open_device(kind: str, alignment: int = ALLOCATION_ALIGNMENT) -> HostMemory | CudaMemory:
    """The memory of a device kind, ``"cpu"`` or ``"cuda"`` (its first device).

    Raises:
        RuntimeUnavailableError: CUDA has no driver, no runtime library or no device here; says which.
    """
    if kind == "cpu":
        return HostMemory(alignment)
    _load_cuda()
    return CudaMemory(load_library().ffi.device("cuda", 0))


def _cudart_of_wheel() -> list[Path]:
    """The CUDA runtime library of the wheel ``nvidia-cuda-runtime``, which the system's loader would not find."""
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name.startswith("libcudart.so")]


def _load_cuda() -> None:
    """Load the CUDA half of the runtime; says what is missing when that fails."""
    library = load_library()
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"this model was compiled for CUDA, and this machine has no CUDA driver: {error}",
            hint='install the NVIDIA driver, or compile the model with target="cpu"',
        ) from error
    for path in _cudart_of_wheel():
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(find_library("tvm_runtime_cuda")), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"the CUDA half of the runtime could not be loaded: {error}",
            hint="install the CUDA toolkit 13, or its runtime library alone: pip install 'nvidia-cuda-runtime>=13,<14'",
        ) from error
    exists = 0  # the attribute "is there such a device"
    if not library.ffi.get_global_func("runtime.GetDeviceAttr")(_CUDA, 0, exists):
        raise RuntimeUnavailableError(
            "this model was compiled for CUDA, and the driver finds no device",
            hint='check nvidia-smi and CUDA_VISIBLE_DEVICES, or compile the model with target="cpu"',
        )

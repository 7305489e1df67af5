"""Moves arrays to the memory that kernels run in, and results back.

What already lies there stays where it is: host arrays for the CPU, other libraries' tensors (by DLPack) for a CUDA device. What lies
elsewhere is copied.
"""

from __future__ import annotations

import ctypes
import math
import sys
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from mlec.errors import InputError, RuntimeUnavailableError
from mlec.runtime.library import find_library, load_ffi
from mlec.runtime.program import Array

_CPU, _CUDA = 1, 2  # device types of DLPack
_NAMES = {_CPU: "cpu", _CUDA: "cuda"}
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
        ffi = load_ffi()
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
            self._dtypes[dtype] = load_ffi().dtype(dtype.name)
        return self._dtypes[dtype]


class DLDevice(NamedTuple):
    """A device, as DLPack numbers them."""

    kind: int
    ordinal: int = 0

    @property
    def is_host(self) -> bool:
        """Whether it is the CPU."""
        return self.kind == _CPU

    @property
    def stream(self) -> int | None:
        """The stream that programs run on, for ``__dlpack__``: of CUDA the legacy default stream; the CPU has none."""
        return 1 if self.kind == _CUDA else None

    def __str__(self) -> str:
        return f"{_NAMES.get(self.kind, f'device type {self.kind}')}:{self.ordinal}"


DEVICES = {"cuda": DLDevice(_CUDA)}
"""By the device of a program: the one with memory of its own on which it runs, the first of its kind."""


class DeviceArray(msgspec.Struct, frozen=True, eq=False):
    """A contiguous input in the memory of a device, as the library that made it exported it.

    Attributes:
        tensor: the memory, as a ``tvm_ffi.Tensor``, which keeps it alive.
        shape: its extents.
        dtype: its element type by numpy's name.
        library: the module whose ``from_dlpack`` makes tensors of this kind; None for a kind that says none.
    """

    tensor: Any
    shape: tuple[int, ...]
    dtype: str
    library: ModuleType | None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * int(self.tensor.dtype.itemsize)


def device_of(value: Any) -> DLDevice | None:
    """Where the memory of a tensor or array lies; None for what DLPack does not describe."""
    try:
        kind, ordinal = value.__dlpack_device__()
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        return None
    return DLDevice(int(kind), int(ordinal))


def borrow(value: Any, name: str, device: DLDevice) -> DeviceArray:
    """A tensor of another library in the memory of the device, as it lies; one with gaps is first packed there by its library.

    The exporter is told the stream of `DLDevice.stream`, so that work under way on its own stream is done before ours begins.

    Raises:
        InputError: it lies on another device of this kind, cannot be exported, or has gaps and no method ``contiguous``.
    """
    where = device_of(value)
    if where != device:
        raise InputError(
            f"input {name!r}: expected an array on {device}, where the program runs, got one on {where}",
            code="E_INPUT_DEVICE",
            hint=f"copy it there, e.g. x.to('{device}'), or make its device the first one with CUDA_VISIBLE_DEVICES",
        )
    if hasattr(value, "detach"):
        value = value.detach()  # torch exports no tensor that records gradients
    try:
        tensor = _exported(value, device)
        if not tensor.is_contiguous():
            if not hasattr(value, "contiguous"):
                raise InputError(
                    f"input {name!r}: expected a contiguous array on {device}, got strides {tensor.strides}",
                    code="E_INPUT_SHAPE",
                    hint="make a contiguous copy there, e.g. cupy.ascontiguousarray(x)",
                )
            tensor = _exported(value.contiguous(), device)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"input {name!r}: {type(value).__name__} on {device} could not be taken by DLPack: {error}",
            code="E_INPUT_DTYPE",
            hint="pass a contiguous tensor that needs no gradient, e.g. x.detach().contiguous(), or a host array",
        ) from error
    return DeviceArray(tensor, tensor.shape, str(tensor.dtype), _library_of(value))


def lend(tensor: Any, library: ModuleType | None) -> Any:
    """A result on the device as a tensor of a library, on the same memory; without a library, as an object with ``__dlpack__``."""
    return tensor if library is None else library.from_dlpack(tensor)


def _exported(value: Any, device: DLDevice) -> Any:
    # Passing the tensor itself would let tvm_ffi fetch it without a word about streams.
    try:
        capsule = value.__dlpack__(stream=device.stream, max_version=_DLPACK_VERSION)
    except TypeError:  # a library older than versions of DLPack
        capsule = value.__dlpack__(stream=device.stream)
    return load_ffi().from_dlpack(capsule)


def _library_of(value: object) -> ModuleType | None:
    """The loaded library that a tensor's class, or the one it derives from, belongs to."""
    for kind in type(value).__mro__:
        library = sys.modules.get(kind.__module__.partition(".")[0])
        if hasattr(library, "from_dlpack"):
            return library
    return None


class DeviceMemory:
    """Memory of a device that has its own: host arrays and constants are copied there, results back or left there.

    Everything happens on the device's default stream.

    Args:
        device: one whose half of the runtime is loaded.
        alignment: bytes that the address of an input must be a multiple of to be passed without a copy.
    """

    def __init__(self, device: DLDevice, alignment: int = ALLOCATION_ALIGNMENT) -> None:
        ffi = load_ffi()
        self.vm_arguments: tuple[int, ...] = (*device, _POOLED, _CPU, 0, _POOLED)
        self._host = HostMemory()
        self._misaligned = alignment - 1
        self._device = ffi.device(device.kind, device.ordinal)
        self._allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._view = ffi.get_global_func("runtime.TVMTensorCreateView")
        self._copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._wait = ffi.get_global_func("runtime.Device_StreamSync")

    def feed(self, array: Array | DeviceArray) -> Any:
        """The array as a tensor in the device's memory: what lies there as it is if that is aligned, else a copy."""
        if isinstance(array, DeviceArray):
            if not array.nbytes:  # says nothing useful about its strides, which the kernels check
                return self._allocate(array.shape, array.tensor.dtype, self._device, None)
            # Nor do the strides of axes of one element: a view has those that kernels expect.
            tensor = self._view(array.tensor, array.shape, array.tensor.dtype, 0)
            return self.copy(tensor) if tensor.data_ptr() & self._misaligned else tensor
        source = self._host.feed(array)
        tensor = self.copy(source)
        self.synchronize()  # the source may be a buffer of ours that dies here
        return tensor

    def fetch(self, tensor: Any) -> Array:
        """A copy of the tensor in host memory."""
        target = self._host._allocate(tensor.shape, tensor.dtype, self._host._device, None)
        self._copy(tensor, target)
        self.synchronize()
        return self._host.fetch(target)

    def copy(self, tensor: Any) -> Any:
        """A copy of the tensor in the device's memory, made by the time of the next `synchronize`."""
        target = self._allocate(tensor.shape, tensor.dtype, self._device, None)
        self._copy(tensor, target)
        return target

    def synchronize(self) -> None:
        """Wait until the kernels and copies under way are done."""
        self._wait(self._device, 0)


def open_device(kind: str, alignment: int = ALLOCATION_ALIGNMENT) -> HostMemory | DeviceMemory:
    """The memory of a device kind, ``"cpu"`` or ``"cuda"`` (its first device).

    Raises:
        RuntimeUnavailableError: CUDA has no driver, no runtime library or no device here; says which.
    """
    if kind == "cpu":
        return HostMemory(alignment)
    _load_cuda()
    return DeviceMemory(DEVICES[kind], alignment)


def _cudart_of_wheel() -> list[str]:
    """The CUDA runtime library of the wheel ``nvidia-cuda-runtime``, which the system's loader would not find."""
    import importlib.metadata

    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name.startswith("libcudart.so")]


def _load_cuda() -> None:
    """Load the CUDA half of the runtime; says what is missing when that fails."""
    ffi = load_ffi()
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"this model was compiled for CUDA, and this machine has no CUDA driver: {error}",
            hint='install the NVIDIA driver, or compile the model with target="cpu"',
        ) from error
    for path in _cudart_of_wheel():
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(find_library("tvm_runtime_cuda"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"the CUDA half of the runtime could not be loaded: {error}",
            hint="install the CUDA toolkit 13, or its runtime library alone: pip install 'nvidia-cuda-runtime>=13,<14'",
        ) from error
    exists = 0  # the attribute "is there such a device"
    if not ffi.get_global_func("runtime.GetDeviceAttr")(_CUDA, 0, exists):
        raise RuntimeUnavailableError(
            "this model was compiled for CUDA, and the driver finds no device",
            hint='check nvidia-smi and CUDA_VISIBLE_DEVICES, or compile the model with target="cpu"',
        )

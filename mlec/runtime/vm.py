"""Runs programs whose calls are bytecode of TVM's virtual machine: those for CUDA devices."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from mlec.errors import MlecError, RuntimeUnavailableError, UsageError
from mlec.runtime.device import DEVICES, DeviceArray, DeviceMemory, lend, open_device
from mlec.runtime.library import link, load_ffi, use_threads
from mlec.runtime.objects import device_fault
from mlec.runtime.program import Array, Program
from mlec.runtime.threads import checked_num_threads

_COMPUTE_VERSION = 4  # the attribute of a device that says what code it runs, as "9.0"
_PAGE = 4096  # the memory pool hands out whole pages


class VirtualMachine:
    """A program for a device, ready to run, with the methods of an `Executable`; any number of threads may call `run` at once.

    Each call borrows a virtual machine of its own (one costs 0.2 ms to make; all share code and constants), so that
    concurrent callers never wait for each other.

    Args:
        program: what to call, and with which constants.
        objects: the object files.
        tensors: the constants by name; memory aligned to 64 bytes is used as it lies, anything else is copied once.
        num_threads: threads of one call; by default ``TVM_NUM_THREADS``, ``OMP_NUM_THREADS`` or every usable CPU.

    Raises:
        RuntimeUnavailableError: a library or the device is missing, or the objects don't fit this machine.
        UsageError: ``num_threads`` is below 1, or a constant is missing.
    """

    takes_out = True  # see `mlec.runtime.model.Runnable`

    def __init__(
        self,
        program: Program,
        objects: Sequence[bytes],
        tensors: Mapping[str, Array],
        num_threads: int | None = None,
    ) -> None:
        self.num_threads = checked_num_threads(num_threads)
        arrays = program.constants_in(tensors)
        ffi = load_ffi()
        self.program = program
        self._memory = open_device(program.device, program.alignment)
        self._feed: Callable[[Any], Any] = self._memory.feed
        self._tensor_type = ffi.Tensor
        self._item = ffi.get_global_func("ffi.ArrayGetItem")  # four times faster than iterating
        _check_device(program)
        self._load: Callable[..., Any] | None = link(objects, "vm_load_executable").call
        first = self._start()
        constants = open_device(program.device) if program.device == "cpu" else self._memory
        self._constants = tuple(map(constants.feed, arrays))
        self._constant_addresses = frozenset(tensor.data_ptr() for tensor in self._constants)
        self._idle = [first]
        self.weights_nbytes = sum(array.nbytes for array in arrays)

    def run(self, inputs: Sequence[Any], out: object = None) -> list[Any]:
        """Call the program once; when this returns, the device has finished with inputs and results.

        Args:
            inputs: one array for each graph input, of its dtype and shape; a `DeviceArray` is read where it lies.
            out: arrays to write to; none is, results always come in new ones, for which this asks in host memory.

        Returns:
            One array for each graph output; the caller owns them. Where every input is a `DeviceArray` and ``out`` is None, they
            stay in the device's memory, as tensors of the library of the first input (see `lend`).

        Raises:
            MlecError: ``E_RUN``, a kernel or a check of the program failed.
        """
        use_threads(self.num_threads)
        arguments = [self._feed(array) for array in inputs]
        idle = self._idle  # a list that `close` replaces
        try:
            call = idle.pop()
        except IndexError:
            call = self._start()
        try:
            result = call(*arguments, *self._constants)
            single = isinstance(result, self._tensor_type)
            tensors = [result] if single else [self._item(result, position) for position in range(len(result))]
            # A program may hand back an input, a constant or one tensor twice; the caller gets arrays of its own.
            taken = {argument.data_ptr() for argument in arguments} | self._constant_addresses
            stays = out is None and bool(inputs) and all(isinstance(array, DeviceArray) for array in inputs)
            outputs = self._left(tensors, taken) if stays else self._fetched(tensors, taken)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise MlecError(
                f"the compiled program failed: {error}",
                code="E_RUN",
                hint="load or compile the model again; if it fails again, report it with this text",
            ) from error
        idle.append(call)
        return [lend(tensor, inputs[0].library) for tensor in outputs] if stays else outputs

    def time_kernels(self, inputs: Sequence[Array], repeats: int = 10) -> dict[str, tuple[int, float]]:
        """Time every function that the program calls.

        The cost of the measurement itself, about 2 us, is taken from the cheapest bookkeeping call and subtracted.

        Returns:
            For each kernel symbol the number of calls in one run and their seconds in all (median of ``repeats`` runs).
        """
        runs: list[dict[str, list[float]]] = []
        begin = 0.0

        def observe(function: object, symbol: str, before: bool, result: object, *arguments: object) -> int:
            nonlocal begin
            self._memory.synchronize()
            if before:
                begin = time.perf_counter()
            else:
                runs[-1][symbol].append(time.perf_counter() - begin)
            return 0

        def measure(call: Callable[..., Any], arguments: Sequence[Any]) -> None:
            call(*arguments)  # not recorded: first touch of memory, start of threads
            for _ in range(repeats):
                runs.append(defaultdict(list))
                call(*arguments)

        runs.append(defaultdict(list))
        self._observed(inputs, observe, measure)
        del runs[0]
        bookkeeping = [
            seconds for run in runs for symbol, calls in run.items() if _internal(symbol) for seconds in calls
        ]
        cost = min(bookkeeping, default=0.0)
        return {
            symbol: (len(calls), median(sum(max(0.0, seconds - cost) for seconds in run[symbol]) for run in runs))
            for symbol, calls in runs[0].items()
            if not _internal(symbol)
        }

    def activation_nbytes(self, inputs: Sequence[Array]) -> int:
        """Bytes of intermediate and output buffers that one run with these inputs takes from the memory pool."""
        buffers: dict[int, int] = {}

        def observe(function: object, symbol: str, before: bool, result: Any, *arguments: Any) -> int:
            if not before and symbol == "vm.builtin.alloc_tensor":
                offset = arguments[1]
                size = offset + math.prod(result.shape) * result.dtype.itemsize
                base = result.data_ptr() - offset
                # A buffer that was freed and taken again has the same address, and counts once.
                buffers[base] = max(buffers.get(base, 0), -(-size // _PAGE) * _PAGE)
            return 0

        self._observed(inputs, observe, lambda call, arguments: call(*arguments))
        return sum(buffers.values())

    def close(self) -> None:
        """Drop code and constants, and give pooled memory back; calls that still run in other threads finish."""
        self._idle = []
        self._constants = ()
        self._load = None
        load_ffi().get_global_func("vm.builtin.memory_manager.clear")()

    def _fetched(self, tensors: Sequence[Any], taken: set[int]) -> list[Any]:
        """Results as host arrays, copied where their memory is taken."""
        outputs = []
        for tensor in tensors:
            array = self._memory.fetch(tensor)
            outputs.append(array.copy() if tensor.data_ptr() in taken else array)
            taken.add(tensor.data_ptr())
        return outputs

    def _left(self, tensors: Sequence[Any], taken: set[int]) -> list[Any]:
        """Results in the device's memory, copied where their memory is taken, and finished."""
        assert isinstance(self._memory, DeviceMemory)
        outputs = []
        for tensor in tensors:
            outputs.append(self._memory.copy(tensor) if tensor.data_ptr() in taken else tensor)
            taken.add(tensor.data_ptr())
        self._memory.synchronize()
        return outputs

    def _start(self) -> Any:
        """A new virtual machine, as the function to call."""
        return self._machine()[self.program.entry]

    def _machine(self) -> Any:
        if self._load is None:
            raise UsageError(
                "this model was closed", hint="open it again with mlec.load, or close it after its last use"
            )
        machine = self._load()
        machine["vm_initialization"](*self._memory.vm_arguments)
        return machine

    def _observed(
        self,
        inputs: Sequence[Array],
        observe: Callable[..., int],
        drive: Callable[[Callable[..., Any], Sequence[Any]], None],
    ) -> None:
        """Let ``drive`` call a virtual machine that tells ``observe`` before and after each of its calls."""
        use_threads(self.num_threads)
        machine = self._machine()
        machine["set_instrument"](observe)
        drive(machine[self.program.entry], [*map(self._feed, inputs), *self._constants])


def _internal(symbol: str) -> bool:
    """Whether a function that the program calls is bookkeeping of the virtual machine rather than a kernel."""
    return symbol.startswith("vm.builtin.") or symbol.startswith("shape_func")


def _check_device(program: Program) -> None:
    """The device can run the program's code; asked before any of it is handed to the driver.

    Raises:
        RuntimeUnavailableError: ``E_NO_VARIANT``.
    """
    archs, ptx = program.target.get("archs"), program.target.get("ptx")
    if program.device != "cuda" or not isinstance(archs, list):
        return
    attribute = load_ffi().get_global_func("runtime.GetDeviceAttr")
    capability = str(attribute(DEVICES["cuda"], 0, _COMPUTE_VERSION))
    if fault := device_fault([str(arch) for arch in archs], str(ptx or ""), capability):
        raise RuntimeUnavailableError(
            f"the model cannot run on this device: {fault}", code="E_NO_VARIANT",
            hint=f'compile it again with target="cuda:sm_{capability.replace(".", "")}"',
        )  # fmt: skip

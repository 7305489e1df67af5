"""Finds and loads the native libraries that run compiled models, without importing the compiler.

Three wheels take part: ``apache-tvm-ffi`` (calls and tensors), ``apache-tvm`` (only its ``libtvm_runtime``: virtual
machine, memory pool, thread pool) and, where `mlec.runtime.linker` does not do, ``apache-tvm-ffi-orcjit`` (links object files in memory).
``import tvm`` would cost two seconds and hundreds of megabytes, and ``import tvm_ffi`` would import torch where torch is installed:
neither happens for programs for the CPU (`mlec.runtime.ffi`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import sys
from _thread import _local, allocate_lock  # `threading` takes 0.6 ms to import
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import msgspec

from mlec.errors import MlecError, RuntimeUnavailableError
from mlec.hidden import Hidden
from mlec.runtime.ffi import ENTRY, FROM_PYTHON, Interface, Object
from mlec.runtime.linker import link_in_memory
from mlec.runtime.objects import address_of, check_objects
from mlec.runtime.threads import default_num_threads

_SLAB_BYTES = 0  # of the pieces of memory that linked code lies in: the default, near enough to each other to be called
_THREAD_BYTES = 16 << 20  # of a new thread: its stack, what libraries keep in it, its own heap
_ALL_CPUS = -3  # affinity mode of the thread pool: threads share the cores listed


class Library(msgspec.Struct, frozen=True):
    """The loaded native libraries.

    Attributes:
        ffi: the C interface of tvm-ffi.
        runtime: handle of ``libtvm_runtime``.
    """

    ffi: Interface
    runtime: ctypes.CDLL


@functools.cache
def load_ffi() -> ModuleType:
    """Import the package ``tvm_ffi``, which programs for devices need; torch stays out unless the process has imported it already.

    Raises:
        RuntimeUnavailableError: the wheel is missing or broken.
    """
    load_library()
    try:
        # tvm_ffi imports torch only to speed up passing torch tensors, which the runtime takes by plain DLPack.
        with Hidden("torch"):
            import tvm_ffi
    except (ImportError, OSError, RuntimeError) as error:
        raise _missing("apache-tvm-ffi", error) from error
    return tvm_ffi


@functools.cache
def _interface() -> Interface:
    try:
        return Interface()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise _missing("apache-tvm-ffi", error) from error


def runtime_abi() -> str:
    """The binary interface between compiled code and the libraries here, e.g. ``"tvm-ffi 0.1"``: of the same one, all releases fit.

    Raises:
        RuntimeUnavailableError: the wheel is missing or broken.
    """
    with _loading:
        major, minor, _ = _interface().version
    return f"tvm-ffi {major}.{minor}"


_loading = allocate_lock()


def load_library() -> Library:
    """Load everything that running a model on the CPU needs; the first call takes some 3 ms.

    The thread pool takes its settings from the environment, so those that are unset there are set:

    * ``TVM_NUM_THREADS``: the CPUs this process may use, where the pool would count half of those it sees.
    * ``TVM_BIND_THREADS=0``: else the pool pins the callers of every process to the same cores.
    * ``TVM_THREAD_POOL_SPIN_COUNT``: an idle worker looks for work for some 5 ms before it sleeps, rather than 0.1 s.

    Raises:
        RuntimeUnavailableError: a wheel is missing or broken.
    """
    with _loading:
        return _load_library()


@functools.cache
def _load_library() -> Library:
    os.environ.setdefault("TVM_NUM_THREADS", str(default_num_threads()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "15000")
    ffi = _interface()
    try:
        runtime = ctypes.CDLL(find_library("tvm_runtime"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise _missing("apache-tvm", error) from error
    return Library(ffi, runtime)


class Linked(msgspec.Struct, frozen=True):
    """A function of object files.

    Attributes:
        call: the function.
        code: what keeps it in memory; nothing where the function does that.
    """

    call: Callable[..., Any]
    code: object = None


def link(objects: Sequence[bytes], entry: str) -> Linked:
    """Link object files in memory.

    Returns:
        Their function ``entry``.

    Raises:
        RuntimeUnavailableError: they are damaged, made for another system, or need what is not there or not allowed.
        MlecError: ``E_NO_MEMORY``: there is not enough for them.
    """
    ffi = load_library().ffi  # with the libraries that the objects call
    check_objects(objects)
    try:
        image = link_in_memory(objects, address_of)
        if image is None:
            return Linked(_linked_by_llvm(ffi, objects, entry))
        native, address = map(image.functions.get, (FROM_PYTHON.format(entry), ENTRY.format(entry)))
        if native is not None:
            return Linked(ffi.native(native, image))
        if address is None:
            raise RuntimeError(f"it has no function {entry}")
        return Linked(_callable(ffi, ffi.function_at(address)), image)
    except MemoryError as error:
        raise MlecError(
            f"there is not enough memory for the compiled code: {error}", code="E_NO_MEMORY",
            hint="close other models, or end other programs",
        ) from error  # fmt: skip
    except PermissionError as error:
        raise RuntimeUnavailableError(
            f"the compiled code may not be executed: {error.strerror}",
            hint="allow this process to execute memory that it has written (execmem of SELinux, MemoryDenyWriteExecute of systemd)",
        ) from error
    except (RuntimeError, ValueError) as error:
        raise RuntimeUnavailableError(
            f"the compiled code could not be linked: {error}",
            hint="compile the model again on this machine: the file may come from another version or system",
        ) from error


def _linked_by_llvm(ffi: Interface, objects: Sequence[bytes], entry: str) -> Callable[..., Any]:
    """The function, which keeps its code.

    Raises:
        RuntimeError: the objects cannot be linked.
        RuntimeUnavailableError: the wheel is missing or broken.
    """
    with _loading:
        session = _session(ffi)
    # The objects are plain C, and need no library of C++.
    module = ffi.call("tvm_ffi_orcjit.SessionLoadModule", session, ffi.call("ffi.Array", *objects), "", None, None)
    function = ffi.call("ffi.ModuleGetFunction", module, entry, 0)
    if function is None:
        raise RuntimeError(f"it has no function {entry}")
    return _callable(ffi, function)


def _callable(ffi: Interface, function: Object) -> Callable[..., Any]:
    try:
        with _loading:
            return ffi.callable(function)
    except (ImportError, OSError, AttributeError) as error:
        raise _missing("apache-tvm-ffi", error) from error


@functools.cache
def _session(ffi: Interface) -> Object:
    """What links object files; one for the process."""
    linker = _find("tvm_ffi_orcjit", "libtvm_ffi_orcjit.so", "apache-tvm-ffi-orcjit")
    try:
        ffi.call("ffi.ModuleGlobalsAdd", ffi.call("ffi.ModuleLoadFromFile", linker))  # it stays until the process ends
        # One without the runtime library of ORC, which takes 2 ms to link: it unwinds, and runs what C++ begins with; objects need neither.
        session: Object = ffi.call("tvm_ffi_orcjit.ExecutionSession", None, _SLAB_BYTES).stay()
    except RuntimeError as error:
        raise _missing("apache-tvm-ffi-orcjit", error) from error
    return session


def find_library(name: str) -> str:
    """Path of one of the shared libraries in the installed ``apache-tvm`` wheel, e.g. ``"tvm_runtime"``.

    Raises:
        RuntimeUnavailableError: the wheel is not installed or does not hold the library.
    """
    file = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")
    return _find("tvm", file, "apache-tvm")


def _find(package: str, file: str, wheel: str) -> str:
    spec = importlib.util.find_spec(package)
    folders = [os.path.join(folder, "lib") for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if os.path.isfile(path := os.path.join(folder, file)):
            return path
    where = ", ".join(folders) or f"{package} is not installed"
    raise _missing(wheel, f"{file} not found ({where})")


def _missing(wheel: str, reason: object) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"the library that runs compiled models could not be loaded: {reason}",
        hint=f"install it: pip install {wheel}",
    )


class ThreadState:
    """What is known of an OS thread.

    Attributes:
        threads: that its kernels use, as far as it was told.
        room: bytes that were there for its kernels when that was asked.
        has_pool: whether it has started others.
        orphaned: whether it came out of a fork that left those behind.
    """

    __slots__ = ("has_pool", "orphaned", "room", "threads")

    def __init__(self) -> None:
        self.threads = 0
        self.room = 0
        self.has_pool = False
        self.orphaned = False


class _CallingThread(_local):
    """The OS thread that asks: one look at what is local to a thread takes as long as ten at ``state``."""

    def __init__(self) -> None:
        self.state = ThreadState()


calling_thread = _CallingThread()


def use_threads(count: int) -> None:
    """Let parallel kernels called from this OS thread use ``count`` threads, itself included; free if nothing changes.

    The thread pool belongs to the calling thread: it is made at the first call with more than one thread, and keeps the
    size it was made with. In a forked child, which has no threads but the one that forked, that one goes on alone.

    Raises:
        MemoryError: there is not enough for the threads.
    """
    calling = calling_thread.state
    if calling.threads == count or calling.orphaned:
        return
    if count == 1:
        _set_max_concurrency(1)
    else:
        size = max(count, default_num_threads())
        require_room(size * _THREAD_BYTES)
        ffi = load_library().ffi
        ffi.call("runtime.config_threadpool", _ALL_CPUS, count, ffi.call("ffi.Array", *map(str, range(size))))
        calling.has_pool = True
    calling.threads = count


def require_room(nbytes: int) -> None:
    """For what native code will take, which ends the process where it gets none.

    Raises:
        MemoryError: this process may not take so much more memory.
    """
    try:
        mmap.mmap(-1, nbytes).close()
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes more are needed") from error


def _set_max_concurrency(count: int) -> None:
    # The runtime offers this only as a C++ function; configuring the pool instead would start its threads.
    _load_library().runtime["_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"](ctypes.c_int(count))


def _after_fork() -> None:
    """Keep the child from waiting for threads that stayed with its parent. Other threads of the child make pools of their own."""
    if calling_thread.state.has_pool:
        _set_max_concurrency(1)
        calling_thread.state.orphaned = True


os.register_at_fork(after_in_child=_after_fork)

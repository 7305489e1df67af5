"""The part of tvm-ffi that running a model needs: its C interface, and how Python calls native functions.

``import tvm_ffi`` takes as long as all the rest of loading a model, for what only a compiler uses. Code that Python can call by itself
(`Interface.native`) needs none of it. Of other code, the extension module at its core makes functions: it is loaded without the package,
which other code finds as if nothing had happened. As the classes of objects (modules, arrays, sessions) belong to the package, no such
object reaches Python here: they are made and passed on through the C interface of ``tvm/ffi/c_api.h``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any, NoReturn

import msgspec

from mlec.hidden import Hidden

_NONE, _INT, _TEXT, _BYTES, _OBJECTS, _FUNCTION = 0, 1, 8, 9, 64, 68  # kinds of arguments; from _OBJECTS on, objects
_OBJECT_HEAD = 24  # bytes of a counted object before what it holds
_FAST_CALL = 0x80  # METH_FASTCALL: arguments come as an array

ENTRY = "__tvm_ffi_{}"
"""The symbol of a function that tvm-ffi finds under a name."""
FROM_PYTHON = "{}_from_python"
"""The symbol of a function that Python can call, by its name."""


class _Value(ctypes.Structure):
    """``TVMFFIAny``."""

    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("bits", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    """``TVMFFIByteArray``."""

    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """The begin of ``TVMFFIErrorCell``."""

    _fields_ = (
        ("kind", ctypes.c_void_p), ("kind_size", ctypes.c_size_t), ("text", ctypes.c_void_p), ("text_size", ctypes.c_size_t),
    )  # fmt: skip


class _Method(ctypes.Structure):
    """``PyMethodDef``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("code", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("text", ctypes.c_char_p),
    )


class _Held(msgspec.Struct, gc=False):
    """What a native function is bound to, so that it lasts as long: where Python looks it up, and its code. Called when it failed.

    The garbage collector does not see into it: it would take the method of a function in a cycle apart before the function, which looks at
    it once more when it goes.
    """

    method: _Method
    code: object
    error: Callable[[], Exception]

    def __call__(self) -> NoReturn:
        raise self.error()


class Object:
    """A counted object, kept as long as this is."""

    def __init__(self, kind: int, address: int, release: Callable[[int], object]) -> None:
        self.kind = kind
        self.address = address
        self._release = release

    def stay(self) -> Object:
        """This object, which is kept until the process ends, whatever the interpreter takes apart before that."""
        self._release = lambda address: None
        return self

    def __del__(self) -> None:
        if self.address:
            self._release(self.address)


class Interface:
    """The C interface of the installed tvm-ffi.

    Raises:
        ImportError, OSError: it is not installed, or broken.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("tvm_ffi")
        folders = tuple(spec.submodule_search_locations or ()) if spec else ()
        if not folders:
            raise ImportError("No module named 'tvm_ffi'", name="tvm_ffi")
        library = ctypes.CDLL(os.path.join(folders[0], "lib", "libtvm_ffi.so"), ctypes.RTLD_GLOBAL)
        self._global = library.TVMFFIFunctionGetGlobal
        self._set_global = library.TVMFFIFunctionSetGlobal
        self._call = library.TVMFFIFunctionCall
        self._create = library.TVMFFIFunctionCreate
        self._move_error = library.TVMFFIErrorMoveFromRaised
        self._release = library.TVMFFIObjectDecRef
        self._release.argtypes = (ctypes.c_void_p,)
        version = (ctypes.c_uint32 * 3)()
        library.TVMFFIGetVersion(version)
        self.version: tuple[int, ...] = tuple(version)
        """Major, minor, patch."""
        self._folders = folders
        self._functions: dict[str, ctypes.c_void_p] = {}  # that were called: few, and kept as long as the process lasts

    def call(self, name: str, *arguments: Object | int | str | bytes | None) -> Any:
        """What a global function returns: an `Object`, a number, or None.

        Raises:
            RuntimeError: it failed, or there is no function of that name.
        """
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._function(name)
        kept: list[object] = []
        values = (_Value * len(arguments))(*(_value(argument, kept) for argument in arguments))
        result = _Value()
        self._check(self._call(function, values, len(arguments), ctypes.byref(result)))
        if result.kind >= _OBJECTS:
            return Object(result.kind, result.bits, self._release)
        return None if result.kind == _NONE else result.bits

    def _function(self, name: str) -> ctypes.c_void_p:
        text = name.encode()
        function = ctypes.c_void_p()
        self._check(self._global(ctypes.byref(_Bytes(text, len(text))), ctypes.byref(function)))
        if not function.value:
            raise RuntimeError(f"tvm-ffi has no function {name}")
        return function

    def function_at(self, address: int) -> Object:
        """Code of the calling convention ``TVMFFISafeCallType`` as a function object, which does not keep the code.

        Raises:
            RuntimeError: there is no memory for it.
        """
        made = ctypes.c_void_p()
        self._check(self._create(None, ctypes.c_void_p(address), None, ctypes.byref(made)))
        return Object(_FUNCTION, made.value or 0, self._release)

    def native(self, address: int, code: object) -> Callable[..., Any]:
        """Code of Python's own calling convention (``PyCFunctionFast``) as a function.

        Args:
            address: of the code. Where it returns what it gets by calling its first argument, the function raises what tvm-ffi says.
            code: what keeps it in memory; the function keeps that.
        """
        method = _Method(b"native", address, _FAST_CALL, None)
        made: Callable[..., Any] = _new_function(ctypes.addressof(method), _Held(method, code, self._error), None)
        return made

    def callable(self, function: Object) -> Callable[..., Any]:
        """A function object as one that Python can call; the first one loads the extension module, so that takes turns.

        Raises:
            ImportError, OSError: the extension module is broken.
        """
        get_global = _core(self._folders)._get_global_func
        # Python gets functions by their global names alone, so it has one for the moment.
        name = f"mlec.{function.address:x}"
        text = name.encode()
        self._check(self._set_global(ctypes.byref(_Bytes(text, len(text))), ctypes.c_void_p(function.address), 0))
        try:
            made: Callable[..., Any] = get_global(name, False)
        finally:
            self.call("ffi.FunctionRemoveGlobal", name)
        return made

    def _check(self, failed: int) -> None:
        if failed:
            raise self._error()

    def _error(self) -> Exception:
        """Of what failed last in this thread."""
        error = ctypes.c_void_p()
        self._move_error(ctypes.byref(error))
        if not error.value:
            return RuntimeError("tvm-ffi failed and does not say why")
        message = _Message.from_address(error.value + _OBJECT_HEAD)
        kind = ctypes.string_at(message.kind, message.kind_size)
        text = ctypes.string_at(message.text, message.text_size).decode(errors="replace")
        self._release(error)
        return MemoryError(text) if kind == b"MemoryError" else RuntimeError(text)


_new_function = ctypes.pythonapi["PyCFunction_NewEx"]  # not an attribute, which others in this process get, too
_new_function.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
_new_function.restype = ctypes.py_object


def _value(argument: Object | int | str | bytes | None, kept: list[object]) -> _Value:
    """An argument as the C interface takes it; ``kept`` holds what it refers to."""
    if argument is None:
        return _Value(_NONE, 0, 0)
    if isinstance(argument, Object):
        return _Value(argument.kind, 0, argument.address)
    if isinstance(argument, int):
        return _Value(_INT, 0, argument)
    if isinstance(argument, str):
        text = ctypes.c_char_p(argument.encode())
        kept.append(text)
        return _Value(_TEXT, 0, ctypes.cast(text, ctypes.c_void_p).value or 0)
    data = _Bytes(argument, len(argument))
    kept.append(data)
    return _Value(_BYTES, 0, ctypes.addressof(data))


@functools.cache
def _core(folders: tuple[str, ...]) -> Any:
    """The module ``tvm_ffi.core``: as the package has it, or without that."""
    if "tvm_ffi" in sys.modules:
        return importlib.import_module("tvm_ffi.core")
    name = "tvm_ffi.core"
    spec = PathFinder.find_spec(name, folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"No module named {name!r}", name=name)
    core: Any = importlib.util.module_from_spec(spec)
    # It imports torch only to speed up passing torch tensors, which the runtime takes by plain DLPack.
    with Hidden("torch"):
        spec.loader.exec_module(core)
    # Out of the way of the package, which gets the same module when it is imported, and then makes it an attribute of its own.
    sys.modules.pop(name, None)
    package = sys.modules.get("tvm_ffi")
    if package is not None:  # imported by another thread meanwhile
        sys.modules[name] = package.core = core  # type: ignore[attr-defined]
    if core._WITH_APPEND_BACKTRACE is None:  # the package sets these two
        core._WITH_APPEND_BACKTRACE = lambda error, backtrace: error
        core.ERROR_NAME_TO_TYPE.setdefault("MemoryError", MemoryError)
    return core

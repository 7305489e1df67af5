"""From a Relax module with GPU kernels to an executable that holds machine code for every architecture asked for."""

from __future__ import annotations

import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlec.backends.tvm.assembly import data
from mlec.backends.tvm.compat import IRModule, Target, tvm
from mlec.backends.tvm.pipeline import RELAX_PASSES
from mlec.errors import LoweringError, TargetError

DEFAULT_ARCHS = ("sm_80", "sm_90")
"""Architectures that get machine code when the target names none; newer ones use the PTX that comes along."""

PackImports = Callable[[Any, bool, str, str], str]


def compile_for_cuda(module: IRModule, host: Target, archs: Sequence[str]) -> Any:
    """A Relax module with kernels bound to GPU threads, as a ``relax.VMExecutable`` that holds them as CUDA source."""
    target = Target({"kind": "cuda", "arch": min(archs, key=_version)}, host=host)
    return tvm.compile(module, target, relax_pipeline=tvm.transform.Sequential(RELAX_PASSES))


def pack_device_code(compiler: Callable[[str], bytes]) -> PackImports:
    """For `to_objects`: packs device code as machine code instead of source, so that running it needs no compiler."""

    def pack(module: Any, system_library: bool, prefix: str, folder: str) -> str:
        blob = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        name = str(tvm.get_global_func("runtime.ModuleImportsBlobName")())
        path = Path(folder) / "devc.o"
        path.write_bytes(data(name, with_binary(blob, compiler)))
        return str(path)

    return pack


def with_binary(blob: bytes, compiler: Callable[[str], bytes]) -> bytes:
    """The serialized imports of a module, CUDA source in them replaced by what the compiler makes of it.

    All texts and lists there begin with their length. The blob begins with its own length (less the eight bytes that say it);
    a module stands in it as its kind and its bytes; those of a CUDA module are a format, a table of functions, and the code.
    """
    kind = _text(b"cuda")
    position = 0
    while (start := blob.find(kind, position)) >= 0:
        begin = start + len(kind)
        (size,) = _LENGTH.unpack_from(blob, begin)
        content = blob[begin + 8 : begin + 8 + size]
        source = _source_of(content)
        if source is None:
            position = begin
            continue
        table = content[len(kind) : -len(_text(source))]
        made = _text(b"cubin") + table + _text(compiler(source.decode()))
        blob = blob[:begin] + _text(made) + blob[begin + 8 + size :]
        position = begin + len(made)
    return _LENGTH.pack(len(blob) - 8) + blob[8:]


def _source_of(content: bytes) -> bytes | None:
    """The CUDA source at the end of a serialized module; None if it is something else."""
    if not content.startswith(_text(b"cuda")):
        return None
    start = content.find(b"\n#ifdef __CUDACC_RTC__")
    if start < 8 or _LENGTH.unpack_from(content, start - 8)[0] != len(content) - start:
        raise LoweringError(
            "TVM serializes CUDA modules in a way that this version of mlec does not know",
            hint="install the version of apache-tvm that this mlec was made for: see constraints.txt",
        )
    return content[start:]


_LENGTH = struct.Struct("<Q")


def _text(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


@dataclass(frozen=True)
class DeviceCompiler:
    """Turns CUDA source into a fat binary: machine code for each architecture, and PTX for those to come.

    Attributes:
        name: which compiler, and its version.
        archs: the architectures that get machine code.
        run: the compiler itself; called with the source, ``archs`` and the architecture of the PTX.
    """

    name: str
    archs: tuple[str, ...]
    run: Callable[[str, Sequence[str], str], bytes]

    @property
    def ptx(self) -> str:
        """The architecture of the PTX, which drivers compile for any device from this one on: the newest of `archs`."""
        return f"compute_{max(map(_version, self.archs))}"

    def __call__(self, source: str) -> bytes:
        return self.run(source, self.archs, self.ptx)


def device_compiler(archs: Sequence[str]) -> DeviceCompiler:
    """nvcc where it and the C++ compiler that it needs are installed, else NVRTC.

    Raises:
        TargetError: saying what to install.
    """
    chosen = tuple(dict.fromkeys(archs))
    nvcc = shutil.which("nvcc")
    if nvcc is not None and (shutil.which("gcc") or os.environ.get("NVCC_CCBIN")):
        return DeviceCompiler(f"nvcc {_nvcc_version(nvcc)}", chosen, functools.partial(_by_nvcc, nvcc))
    try:
        nvrtc = Nvrtc()
    except (ImportError, RuntimeError) as error:  # no package, or one that finds no library
        reasons = (
            f"nvcc: {'gcc, which it needs, ' if nvcc else ''}is not on the PATH",
            f"NVRTC: {(str(error).strip() or repr(error)).splitlines()[0]}",
        )
        raise TargetError(
            "compiling for CUDA needs nvcc or NVRTC, and neither works here",
            notes=reasons,
            hint="pip install 'mlec[cuda]', or install the CUDA toolkit",
        ) from error
    return DeviceCompiler(f"NVRTC {nvrtc.version}", chosen, nvrtc.compile)


def _nvcc_version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release ([\d.]+)", done.stdout)
    return found.group(1) if found else "of unknown version"


def _by_nvcc(nvcc: str, source: str, archs: Sequence[str], ptx: str) -> bytes:
    code = [f"-gencode=arch=compute_{_number(a)},code=sm_{_number(a)}" for a in archs]
    code.append(f"-gencode=arch={ptx},code={ptx}")
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        path.write_text(source)
        command = [nvcc, "-fatbin", "-O3", "-std=c++17", *code, "-o", str(result), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _refused("nvcc", done.stderr or done.stdout, archs)
        return result.read_bytes()


class Nvrtc:
    """NVRTC and its companion nvFatbin: a CUDA compiler as libraries, which needs no C++ compiler beside it.

    Raises:
        ImportError: the package ``cuda-bindings`` is not installed.
        RuntimeError: the package finds no library of NVRTC.
    """

    def __init__(self) -> None:
        from cuda import pathfinder
        from cuda.bindings import nvfatbin, nvrtc

        self._nvrtc, self._fatbin, self._pathfinder = nvrtc, nvfatbin, pathfinder
        _, major, minor = nvrtc.nvrtcVersion()
        nvfatbin.version()
        self.version = f"{major}.{minor}"

    def compile(self, source: str, archs: Sequence[str], ptx: str) -> bytes:
        """A fat binary with machine code for each architecture and with PTX.

        Raises:
            TargetError: for an architecture that this version does not know, or without the headers of CUDA.
            LoweringError: the code was refused.
        """
        _, known = self._nvrtc.nvrtcGetSupportedArchs()
        if unknown := [arch for arch in archs if _version(arch) not in known]:
            raise TargetError(
                f"NVRTC {self.version} does not compile for {', '.join(unknown)}",
                hint=f"it knows {', '.join(f'sm_{number}' for number in known)}",
            )
        handle = self._fatbin.create(["-64"], 1)
        try:
            for arch in archs:
                code = self.code(source, arch)
                self._fatbin.add_cubin(handle, code, len(code), _number(arch), "kernels")
            code = self.code(source, ptx)
            self._fatbin.add_ptx(handle, code, len(code), ptx.removeprefix("compute_"), "kernels", "")
            result = bytearray(self._fatbin.size(handle))
            self._fatbin.get(handle, result)
        finally:
            self._fatbin.destroy(handle)
        return bytes(result)

    def code(self, source: str, arch: str) -> bytes:
        """Machine code for an architecture like ``"sm_90"``, PTX for one like ``"compute_90"``."""
        includes = [f"--include-path={folder}" for folder in self._headers()]
        options = [f"--gpu-architecture={arch}", "--std=c++17", *includes]
        _, program = self._nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
        try:
            (status,) = self._nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            if int(status):
                log = self._text("ProgramLog", program).decode(errors="replace")
                raise _refused(f"NVRTC {self.version}", log, [arch])
            return self._text("CUBIN" if arch.startswith("sm_") else "PTX", program)
        finally:
            self._nvrtc.nvrtcDestroyProgram(program)

    def _text(self, what: str, program: Any) -> bytes:
        _, size = getattr(self._nvrtc, f"nvrtcGet{what}Size")(program)
        content = bytearray(size)
        getattr(self._nvrtc, f"nvrtcGet{what}")(program, content)
        return bytes(content)

    def _headers(self) -> list[str]:
        """The folders of ``cuda_fp16.h`` and of ``cuda/std``, in wheels or in an installed toolkit."""
        folders = {name: self._pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")}
        if missing := [name for name, folder in folders.items() if folder is None]:
            raise TargetError(
                f"NVRTC finds no headers of CUDA's {' and '.join(missing)}",
                hint="pip install 'mlec[cuda]', or name the CUDA toolkit in CUDA_HOME",
            )
        return list(folders.values())


def _refused(compiler: str, log: str, archs: Sequence[str]) -> LoweringError:
    lines = tuple(line for line in log.splitlines() if "error" in line.lower() or "fatal" in line.lower())[:7]
    if any(re.search("gpu[ -]architecture", line, re.I) for line in lines):
        return TargetError(
            f"{compiler} does not compile for {', '.join(archs)}",
            notes=lines,
            hint="install a newer CUDA toolkit, or name an architecture that it knows, e.g. --target cuda:sm_80",
        )
    return LoweringError(
        f"{compiler} refused the generated code",
        notes=lines,
        hint="this is a defect of mlec or of a package that extends it: report it with the model",
    )


def _number(arch: str) -> str:
    return arch.removeprefix("sm_")


def _version(arch: str) -> int:
    return int(_number(arch).rstrip("af"))

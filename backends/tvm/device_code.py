"""From a Relax module with GPU kernels to an executable that holds machine code for every architecture asked for."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlec.backends.tvm.compat import IRModule, Target, tvm
from mlec.backends.tvm.pipeline import RELAX_PASSES
from mlec.errors import LoweringError, TargetError

DEFAULT_ARCHS = ("sm_80", "sm_90")
"""Architectures that get machine code when the target names none; newer ones use the PTX that comes along."""

_one_at_a_time = threading.Lock()


def compile_for_cuda(module: IRModule, host: Target, archs: Sequence[str]) -> Any:
    """A Relax module with kernels bound to GPU threads, as a ``relax.VMExecutable``; needs no device.

    Raises:
        TargetError: no CUDA compiler is installed, or it does not know an architecture.
    """
    oldest = min(archs, key=_version)
    target = Target({"kind": "cuda", "arch": oldest}, host=host)
    compiler = device_compiler(archs)
    # TVM asks a global function for the machine code of its CUDA source.
    with _one_at_a_time:
        default = tvm.get_global_func("tvm_callback_cuda_compile")
        tvm.register_global_func("tvm_callback_cuda_compile", compiler, override=True)
        try:
            return tvm.compile(module, target, relax_pipeline=tvm.transform.Sequential(RELAX_PASSES))
        finally:
            tvm.register_global_func("tvm_callback_cuda_compile", default, override=True)


def device_compiler(archs: Sequence[str]) -> Callable[[str], bytes]:
    """What turns CUDA source into binary code: nvcc if there is one, else NVRTC.

    Raises:
        TargetError: saying what to install.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return lambda source: _by_nvcc(nvcc, source, archs)
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise TargetError(
            "compiling for CUDA needs nvcc or NVRTC, and neither is installed",
            hint="install the CUDA toolkit, or: pip install 'mlec[cuda]'",
        ) from error
    return lambda source: _by_nvrtc(nvrtc, source, min(archs, key=_version))


def _by_nvcc(nvcc: str, source: str, archs: Sequence[str]) -> bytes:
    """A fat binary: machine code for each architecture, and PTX of the newest for those to come."""
    newest = max(archs, key=_version)
    code = [f"-gencode=arch=compute_{_number(a)},code=sm_{_number(a)}" for a in archs]
    code.append(f"-gencode=arch=compute_{_number(newest)},code=compute_{_number(newest)}")
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        path.write_text(source)
        command = [nvcc, "-fatbin", "-O3", "-std=c++17", *code, "-o", str(result), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _refused("nvcc", done.stderr or done.stdout, archs)
        return result.read_bytes()


def _by_nvrtc(nvrtc: Any, source: str, arch: str) -> bytes:
    """PTX, which the driver compiles for any device from this architecture on."""
    options = [f"--gpu-architecture=compute_{_number(arch)}".encode(), b"--std=c++17", b"-default-device"]
    include = _wheel_headers()
    if include is not None:
        options.append(f"--include-path={include}".encode())
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise _refused("NVRTC", bytes(log).decode(errors="replace"), [arch])
    _, size = nvrtc.nvrtcGetPTXSize(program)
    code = bytearray(size)
    nvrtc.nvrtcGetPTX(program, code)
    return bytes(code)


def _wheel_headers() -> Path | None:
    """Where the wheels keep ``cuda_fp16.h``."""
    import importlib.metadata

    for wheel in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "cuda_fp16.h":
                return Path(str(file.locate())).parent
    return None


def _refused(compiler: str, log: str, archs: Sequence[str]) -> LoweringError:
    lines = tuple(line for line in log.splitlines() if "error" in line.lower() or "fatal" in line.lower())[:7]
    if any("arch" in line or "nsupported gpu" in line.lower() for line in lines):
        return TargetError(f"{compiler} does not compile for {', '.join(archs)}", notes=lines)
    return LoweringError(f"{compiler} refused the generated code", notes=lines)


def _number(arch: str) -> str:
    return arch.removeprefix("sm_")


def _version(arch: str) -> int:
    return int(_number(arch).rstrip("af"))

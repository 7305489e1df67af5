"""Object files written from LLVM assembly: data, and second names for functions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlec.backends.tvm.compat import llvm, tvm
from mlec.backends.tvm.elf import compact
from mlec.runtime.ffi import ENTRY

_TYPE = "(ptr, ptr, i32, ptr)"


def object_of(text: str, triple: str | None = None) -> bytes:
    """The object file of a module of LLVM assembly, for the most general processor of a triple's kind (by default this machine's)."""
    with tempfile.TemporaryDirectory(prefix="mlec-") as folder:
        source, result = Path(folder) / "module.ll", Path(folder) / "module.o"
        source.write_text(f'target triple = "{triple or llvm.llvm_get_system_triple()}"\n{text}')
        tvm.runtime.load_module(str(source)).write_to_file(str(result))
        return compact(result.read_bytes())


def data(symbol: str, content: bytes) -> bytes:
    """An object file that holds one constant."""
    escaped = "".join(f"\\{byte:02X}" for byte in content)
    return object_of(f'@{symbol} = constant [{len(content)} x i8] c"{escaped}", align 16\n')


def second_names(aliases: Mapping[str, str]) -> bytes:
    """An object file with functions that do nothing but call another one.

    Args:
        aliases: name of each new function, and of the kernel that it calls. Kernels have the calling convention of tvm-ffi.
    """
    lines = [f"declare i32 @{ENTRY.format(name)}{_TYPE}" for name in dict.fromkeys(aliases.values())]
    for alias, name in aliases.items():
        lines.append(
            f"define i32 @{ENTRY.format(alias)}(ptr %0, ptr %1, i32 %2, ptr %3) {{\n"
            f"  %5 = tail call i32 @{ENTRY.format(name)}(ptr %0, ptr %1, i32 %2, ptr %3)\n  ret i32 %5\n}}"
        )
    return object_of("\n".join(lines) + "\n")

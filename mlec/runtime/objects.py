"""What is looked at in an object file before it is linked: that it is one, for this processor, and that all it calls is there.

The linker would say less about it, or trap on the first instruction. The code itself was decided about before (`mlec.artifact.trust`).
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from mlec.errors import RuntimeUnavailableError
from mlec.runtime import elf

_HEADER, _SECTION, _SYMBOL = (elf.packed(fields) for fields in (elf.HEADER, elf.SECTION, elf.SYMBOL))
_ELF64_LITTLE: Final = b"\x7fELF\x02\x01\x01"
_SYSTEMS: Final = {0: "System V", 3: "Linux"}
_WRITABLE_CODE: Final = elf.SHF_WRITE | elf.SHF_EXECINSTR
"""No compiler of ours makes a section that is both written to and executed."""
_MACHINES: Final = {elf.EM_X86_64: ("x86_64", "AMD64"), elf.EM_AARCH64: ("aarch64", "arm64")}

_OFFERED: Final = ("__tvm_ffi_", "__TVM", "_GLOBAL_OFFSET_TABLE_", "__dso_handle")
"""Starts of names that the linker itself, or another object file, provides."""


def check_objects(objects: Sequence[bytes]) -> None:
    """Whether object files can be linked into this process.

    Raises:
        RuntimeUnavailableError: ``E_OBJECT``: one is damaged or for another processor or system; ``E_OBJECT_SYMBOL``: it needs a function
            that no library here has.
    """
    needed: set[str] = set()
    defined: set[str] = set()
    for number, data in enumerate(objects):
        try:
            for name, is_defined, is_weak in _symbols(data):
                if is_defined:
                    defined.add(name)
                elif not is_weak:
                    needed.add(name)
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise _unfit(
                f"the compiled code could not be linked: object file {number} is none for this machine: {error}"
            ) from None
    missing = sorted(
        name for name in needed - defined if name and not name.startswith(_OFFERED) and not address_of(name)
    )
    if missing:
        raise RuntimeUnavailableError(
            f"the compiled code could not be linked: it calls what no library here has: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            code="E_OBJECT_SYMBOL",
            hint="it was compiled with another version of mlec or for another system: compile the model again on this machine",
        )


_process = ctypes.CDLL(None)
"""Whatever this process has loaded so that others can call it, also later on."""


def address_of(function: str) -> int:
    """Of a function of a library in this process; 0 if there is none of that name."""
    try:
        found = ctypes.c_char.in_dll(_process, function)  # not an attribute: some of these are no functions
    except ValueError:
        return 0
    return ctypes.addressof(found)


def _symbols(data: bytes) -> Iterator[tuple[str, bool, bool]]:
    """Name of each symbol that other files see, whether it is defined, whether it is weak.

    Raises:
        ValueError, struct.error, IndexError: it is no object file for this machine.
    """
    identity, kind, machine, version, _, _, sections, _, _, _, _, entry, count, _ = _HEADER.unpack_from(data)
    if not identity.startswith(_ELF64_LITTLE) or version != 1:
        raise ValueError(f"it starts with {identity[:7].hex(' ')}, expected {_ELF64_LITTLE.hex(' ')}")
    if identity[7] not in _SYSTEMS:
        raise ValueError(f"it is for the system {identity[7]}, expected {' or '.join(_SYSTEMS.values())}")
    if kind != elf.ET_REL:
        raise ValueError(f"it is an ELF file of type {kind}, expected {elf.ET_REL}: relocatable")
    names = _MACHINES.get(machine, (f"machine {machine}",))
    if platform.machine() not in names:
        raise ValueError(f"it is for {names[0]}, this processor is {platform.machine()}")
    if entry != _SECTION.size:
        raise ValueError(f"its section headers have {entry} bytes, expected {_SECTION.size}")
    table = [_SECTION.unpack_from(data, sections + i * entry) for i in range(count)]
    for _, section_kind, flags, _, offset, size, link, locals_, *_ in table:
        if flags & _WRITABLE_CODE == _WRITABLE_CODE:
            raise ValueError("a section of it is writable and executable")
        if section_kind != elf.SHT_SYMTAB:
            continue
        texts, length = table[link][4:6]
        if offset + size > len(data) or texts + length > len(data) or size % _SYMBOL.size:
            raise ValueError("its symbols lie outside of it")
        strings = data[texts : texts + length]
        first = locals_ * _SYMBOL.size  # behind the symbols that no other file sees
        if first > size:
            raise ValueError("its symbols lie outside of it")
        for name, info, _, section, _, _ in _SYMBOL.iter_unpack(data[offset + first : offset + size]):
            if info >> 4 != elf.STB_LOCAL:
                end = strings.index(b"\0", name)
                yield strings[name:end].decode(), section != elf.SHN_UNDEF, info >> 4 == elf.STB_WEAK


def _unfit(why: str) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        why, code="E_OBJECT", hint="compile the model again on this machine, or fetch the file again"
    )


def device_fault(archs: Sequence[str], ptx: str, capability: str) -> str:
    """Why code for GPUs does not run on a device; empty if it does.

    Args:
        archs: what there is machine code for, as ``"sm_90"``.
        ptx: the virtual architecture of the text that the driver compiles for later devices, as ``"compute_90"``; empty for none.
        capability: of the device, as ``"9.0"``.
    """
    major, _, minor = capability.partition(".")
    here = int(major) * 10 + int(minor or 0)
    for arch in archs:
        digits = arch.removeprefix("sm_").rstrip("af")
        exact = arch[-1] in "af"  # code for one architecture alone
        if digits.isdigit() and (
            int(digits) == here if exact else int(digits) // 10 == here // 10 and int(digits) <= here
        ):
            return ""
    later = ptx.removeprefix("compute_")
    if later.isdigit() and int(later) <= here:
        return ""
    return f"it holds device code for {', '.join((*archs, *([ptx] if ptx else [])))}, this device is sm_{here}"

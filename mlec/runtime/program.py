"""What a backend hands over for running, and what the artifact stores: plain data beside the object files."""

from __future__ import annotations

from typing import Literal

import msgspec


class KernelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One compiled kernel.

    Attributes:
        symbol: its name in the object files; the profiler finds it by this.
        op: the IR op it implements.
        location: where that op came from in the source model.
        flops: floating-point operations of one call: a number, or the text of an expression in the symbolic dims.
        bytes: bytes read and written by one call, as ``flops``.
    """

    symbol: str
    op: str
    location: str
    flops: int | str = 0
    bytes: int | str = 0


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled graph without its machine code and weights.

    Attributes:
        backend: which backend made it.
        device: where it runs.
        entry: the function to call, with the graph's inputs and then the constants.
        constants: names of the tensors passed after the inputs, in this order.
        kernels: the kernels it is made of.
        target: what it was compiled for: triple, cpu, features ...
        alignment: bytes that the address of each input must be a multiple of; other inputs are copied first.
    """

    backend: str
    device: Literal["cpu", "cuda"]
    entry: str = "main"
    constants: tuple[str, ...] = ()
    kernels: tuple[KernelInfo, ...] = ()
    target: dict[str, str | int | list[str]] = {}
    alignment: int = 64

"""What a backend hands over for running, and what the artifact stores: plain data beside the object files.

Everything here may come from a file, so each structure checks itself when it is made: what passes refers to nothing that does not
exist, and uses no memory before something was written there.
"""

# Annotations are not postponed here: msgspec would compile the text of each when the first file is loaded, which takes 1 ms.

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
import numpy as np

from mlec.errors import UsageError
from mlec.runtime.dims import symbols_of

Array = np.ndarray[Any, np.dtype[Any]]

Dim = int | str
"""An extent: a number, or the text of an expression in symbols."""

_MOST_AXES = 32

ElementType = Literal["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"]


class KernelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call of a kernel, as profile and report describe it.

    Attributes:
        symbol: its name, unique in the program.
        op: the IR op it implements.
        location: where that op came from in the source model; several places of a fused one, joined by " + ".
        flops: floating-point operations of one call: a number, or the text of an expression in the symbolic dims.
        bytes: bytes read and written by one call, as ``flops``.
    """

    symbol: str
    op: str
    location: str
    flops: int | str = 0
    bytes: int | str = 0


class Buffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One compact row-major array of a `CallSequence`.

    Attributes:
        dtype: element type, as in `mlec.signature.TensorSpec`.
        shape: its extents.
        view: number of the earlier buffer whose memory this one is, with another shape.
        offset: of a *part*: the element of that buffer at which this one, which may be smaller, begins.
        lines: of a part: where this is 1, it lies there; elsewhere it has memory of its own.
    """

    dtype: ElementType
    shape: tuple[Dim, ...]
    view: int | None = None
    offset: Dim | None = None
    lines: Dim = 1


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One call of a kernel, with its operands, then some extents, then its results.

    Attributes:
        code: symbol in the object files; calls of one symbol differ in nothing but their buffers.
        reads: numbers of the operands.
        writes: numbers of the results.
        extents: passed as integers.
        lines: of a call that copies between a buffer and its parts: it is not made where this is 1.
        over: those of ``reads`` in whose memory the one result may lie: no element of them is read after one of the result was written
            there, by whichever thread.
    """

    code: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    extents: tuple[Dim, ...] = ()
    lines: Dim | None = None
    over: tuple[int, ...] = ()


class CallSequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The kernel calls of a program for the CPU, one after the other.

    Attributes:
        inputs: how many inputs the graph has.
        constants: how many constants follow them.
        buffers: the inputs, the constants, then what calls write, views and parts. The symbols in their shapes are those that are an
            extent of an input by themselves.
        calls: in their order.
        outputs: numbers of the buffers that the program returns.
    """

    inputs: int
    constants: int
    buffers: tuple[Buffer, ...]
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]

    @property
    def codes(self) -> tuple[str, ...]:
        """The kernels, in the order in which they are called first."""
        return tuple(dict.fromkeys(call.code for call in self.calls))

    def roots(self) -> list[int]:
        """For each buffer the one whose memory it is, all of it: itself, unless it is a view that is no part."""
        roots: list[int] = []
        for number, buffer in enumerate(self.buffers):
            roots.append(number if buffer.view is None or buffer.offset is not None else roots[buffer.view])
        return roots

    def __post_init__(self) -> None:
        given = self.inputs + self.constants
        if min(self.inputs, self.constants) < 0 or given > len(self.buffers):
            raise ValueError(f"{given} inputs and constants, but {len(self.buffers)} buffers")
        for number, buffer in enumerate(self.buffers):
            if len(buffer.shape) > _MOST_AXES:
                raise ValueError(f"buffer {number} has {len(buffer.shape)} axes, at most {_MOST_AXES} are possible")
            if buffer.view is not None and not 0 <= buffer.view < number >= given:
                raise ValueError(f"buffer {number} cannot be a view of buffer {buffer.view}")
            if buffer.view is not None and buffer.dtype != self.buffers[buffer.view].dtype:
                raise ValueError(f"buffer {number} is a view with another element type")
            if (buffer.offset is None and buffer.lines != 1) or (buffer.offset is not None and buffer.view is None):
                raise ValueError(f"buffer {number} is part of no other")
        self._check_dims()
        self._check_calls(given)

    def _check_calls(self, given: int) -> None:
        """What is read was written before, in part at least, and nothing is written twice, except for buffers of parts."""
        roots = self.roots()
        above = {
            number: roots[b.view]
            for number, b in enumerate(self.buffers)
            if b.view is not None and b.offset is not None
        }
        bottoms = list(range(len(roots)))
        for number in above:  # in the order of the buffers
            bottoms[number] = bottoms[above[number]]
        wholes = set(above.values())
        written = set(range(given))

        held: set[int] = set()  # parts of what was written, found once: a file may nest them as deep as it likes

        def holds(root: int) -> bool:
            parts = []
            while not (root in written or root in held) and root in above:
                parts.append(root)
                root = above[root]
            if found := root in written or root in held:
                held.update(parts)
            return found

        for position, call in enumerate(self.calls):
            for number in (*call.reads, *call.writes):
                if not 0 <= number < len(roots):
                    raise ValueError(f"call {position}: there is no buffer {number}")
            for number in call.reads:
                if not holds(roots[number]):
                    raise ValueError(f"call {position} reads buffer {number} before anything is written to it")
            if not set(call.over) <= set(call.reads) or (call.over and len(call.writes) != 1):
                raise ValueError(f"call {position} cannot have its result where it reads")
            for number in call.writes:
                mine = bottoms[number] >= given or (number >= given and call.lines == self.buffers[number].lines)
                again = number in written and number not in wholes
                if roots[number] != number or not mine or again:
                    raise ValueError(f"call {position} writes buffer {number}, which is not its to write")
                while number not in written:
                    written.add(number)
                    number = above.get(number, number)
        for number in self.outputs:
            if not 0 <= number < len(roots) or not holds(roots[number]):
                raise ValueError(f"nothing is written to the output, buffer {number}")
            if roots[number] in above:
                raise ValueError(f"the output, buffer {number}, is part of another one")

    @property
    def told(self) -> set[str]:
        """The symbols that are an extent of an input by themselves."""
        extents = {dim for buffer in self.buffers[: self.inputs] for dim in buffer.shape}
        return {dim for dim in extents if isinstance(dim, str) and dim.isidentifier()}

    def _check_dims(self) -> None:
        of_buffers = {dim for b in self.buffers for dim in (*b.shape, b.offset, b.lines)}
        of_calls = {dim for call in self.calls for dim in (*call.extents, call.lines)}
        check_dims((dim for dim in of_buffers | of_calls if dim is not None), self.told)
        constants = self.buffers[self.inputs : self.inputs + self.constants]
        if any(isinstance(dim, str) for buffer in constants for dim in buffer.shape):
            raise ValueError("the shape of a constant depends on the inputs")


def check_dims(dims: Iterable[Dim], told: set[str]) -> None:
    """Whether all of these are extents, in the symbols that inputs tell.

    Raises:
        ValueError: one is negative, no expression, or in another symbol.
    """
    for dim in dims:
        if isinstance(dim, int):
            if dim < 0:
                raise ValueError(f"an extent of {dim}")
            continue
        try:
            unknown = symbols_of(dim) - told
        except UsageError as error:
            raise ValueError(str(error)) from error
        if unknown:
            raise ValueError(f"no input tells {', '.join(sorted(unknown))} in the extent {dim}")


MOST_SCRATCH = 1 << 40
"""Bytes that no kernel takes for itself."""


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled graph without its machine code and weights.

    Attributes:
        backend: which backend made it.
        device: where it runs.
        entry: for programs of the virtual machine: the function to call, with the graph's inputs and then the constants.
        constants: names of the tensors that follow the inputs, in this order.
        kernels: one for each kernel call, in the order of the calls.
        target: what it was compiled for: triple, cpu, features ...
        alignment: bytes that the address of each input must be a multiple of; other inputs are copied first.
        sequence: the calls of a program for the CPU; None for programs of the virtual machine, which have them as bytecode in an
            object file.
        scratch: bytes that a kernel takes at most, in each thread, besides its operands and results: one number, or extents of which the
            largest counts.
    """

    backend: str
    device: Literal["cpu", "cuda"]
    entry: str = "main"
    constants: tuple[str, ...] = ()
    kernels: tuple[KernelInfo, ...] = ()
    target: dict[str, str | int | list[str]] = {}
    alignment: int = 64
    sequence: CallSequence | None = None
    scratch: int | tuple[Dim, ...] = 0

    @property
    def scratches(self) -> tuple[Dim, ...]:
        """`scratch` as extents, one at least."""
        return (self.scratch,) if isinstance(self.scratch, int) else (0, *self.scratch)

    def __post_init__(self) -> None:
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError(f"an alignment of {self.alignment} bytes")
        for nbytes in self.scratches:
            if isinstance(nbytes, int) and not 0 <= nbytes <= MOST_SCRATCH:
                raise ValueError(f"kernels that take {nbytes} bytes")
        sequence = self.sequence
        if sequence is None:
            return
        check_dims(self.scratches, sequence.told)
        if len(sequence.calls) != len(self.kernels) or sequence.constants != len(self.constants):
            raise ValueError(
                f"{len(sequence.calls)} calls of {len(self.kernels)} kernels with {sequence.constants} of "
                f"{len(self.constants)} constants"
            )

    def constants_in(self, tensors: Mapping[str, Array]) -> tuple[Array, ...]:
        """The tensors that follow the inputs, in their order.

        Raises:
            UsageError: naming those that are not there.
        """
        absent = [name for name in self.constants if name not in tensors]
        if absent:
            raise UsageError(
                f"the program needs the constants {', '.join(absent)}, which were not given",
                hint="give every constant that the program names",
            )
        return tuple(tensors[name] for name in self.constants)

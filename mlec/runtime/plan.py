"""Where the buffers of a call sequence lie in memory, for given shapes of the inputs.

Everything but inputs, constants and outputs shares one *arena*: buffers that are alive at the same time lie side by side, others on top
of each other. A result that may lie over an operand (`Call.over`) takes its memory where nothing else needs that any more.

Kernels over elements and norms of lines allow that. Products and convolutions with an operand in their epilogue, such as the residual,
do not: where their tiles do not fit, the last ones overlap, and elements are computed twice, by two threads maybe. Nor would it lower
the peak of ResNet-18 (4.0 MB), MobileNetV2 (6.0 MB) and pre-norm encoders, whose fused graphs leave no elementwise kernel either; of a
post-norm encoder it would take a sixth. What it saves is memory where elementwise ops stay kernels: a third of an encoder that is not
fused. Without ``noalias``, such kernels take the same time to 3%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

from mlec.errors import MlecError
from mlec.runtime.dims import evaluate
from mlec.runtime.edge import numpy_dtype
from mlec.runtime.program import Buffer, CallSequence, Dim

ARENA_ALIGNMENT = 64
"""Bytes that the address of each buffer in the arena is a multiple of."""

_MOST_BYTES = 1 << 47  # of one buffer or arena: the address space of today's processors

Shapes = tuple[tuple[int, ...], ...]


class Home(NamedTuple):
    """Whose memory a buffer lies in: the input, constant or output of that number, or the arena."""

    kind: Literal["input", "constant", "output", "arena"]
    number: int = 0


class Place(NamedTuple):
    """Where a buffer lies: in whose memory, from which byte on."""

    home: Home
    offset: int


class Layout:
    """What is known of a call sequence whatever the shapes.

    Args:
        scratches: bytes that kernels take in each thread, see `Program.scratches`.

    Attributes:
        homes: of the inputs, the constants and the buffers that outputs are; everything else lies in the arena.
        given: the inputs and constants.
        copies: outputs that must be copied at the end, from where: inputs, constants, and what another output holds already.
    """

    def __init__(self, sequence: CallSequence, scratches: Sequence[Dim] = (0,)) -> None:
        self.sequence = sequence
        self._scratches = scratches
        roots = sequence.roots()
        self.homes: dict[int, Home] = {i: Home("input", i) for i in range(sequence.inputs)}
        self.homes |= {sequence.inputs + i: Home("constant", i) for i in range(sequence.constants)}
        self.given = frozenset(self.homes)
        self.copies: list[tuple[int, Home]] = []
        for position, number in enumerate(sequence.outputs):
            root = roots[number]
            if root in self.homes:
                self.copies.append((position, self.homes[root]))
            else:
                self.homes[root] = Home("output", position)

    def plan(self, shapes: Shapes, in_place: bool = True) -> Plan:
        """The plan for inputs of these shapes.

        Args:
            in_place: results may lie over operands.

        Raises:
            MlecError: ``E_RUN``, the shapes are not those of the sequence's inputs, or need more memory than there can be.
        """
        sequence = self.sequence
        binding = _bind(sequence.buffers[: sequence.inputs], shapes)
        extents: dict[Dim, int] = {}

        def value(dim: Dim) -> int:
            if dim not in extents:
                found = evaluate(dim, binding)
                if found is None or not 0 <= found < _MOST_BYTES:
                    raise _failed(f"the extent {dim} has no value for inputs of shapes {_text(shapes)}")
                extents[dim] = found
            return extents[dim]

        of_buffers = [tuple(map(value, buffer.shape)) for buffer in sequence.buffers]
        of_calls = [tuple(map(value, call.extents)) for call in sequence.calls]
        if of_buffers[: sequence.inputs] != list(shapes):
            expected = _text(buffer.shape for buffer in sequence.buffers[: sequence.inputs])
            raise _failed(f"expected inputs of shapes {expected}, got {_text(shapes)}")
        nbytes: list[int] = []
        roots: list[tuple[int, int]] = []  # of each buffer the one whose memory it lies in, and where in it
        for number, (shape, buffer) in enumerate(zip(of_buffers, sequence.buffers, strict=True)):
            itemsize = numpy_dtype(buffer.dtype).itemsize
            nbytes.append(math.prod(shape) * itemsize)
            if nbytes[number] > _MOST_BYTES:
                raise _failed(f"a buffer of shape {shape} is larger than any memory")
            is_part = buffer.offset is not None
            if buffer.view is None or (is_part and value(buffer.lines) != 1):
                roots.append((number, 0))
                continue
            begin = value(buffer.offset or 0) * itemsize
            end, whole = begin + nbytes[number], nbytes[buffer.view]
            if end > whole or (end < whole and not is_part):
                raise _failed(f"a view of {nbytes[number]} bytes on a buffer of {whole}")
            root, offset = roots[buffer.view]
            roots.append((root, offset + begin))
        if sum(nbytes) > 1 << 62:  # beyond what `place` can add up
            raise _failed("its buffers are larger than any memory")
        made = [i for i, call in enumerate(sequence.calls) if call.lines is None or value(call.lines) != 1]
        lives: dict[int, tuple[int, int, int]] = {}
        for position in made:
            call = sequence.calls[position]
            for root in {roots[number][0] for number in (*call.reads, *call.writes)} - self.given:
                lives[root] = nbytes[root], lives.get(root, (0, position))[1], position
        holders = self._holders(made, roots, nbytes, lives) if in_place else {}
        homes = dict(self.homes)
        for root, holder in holders.items():
            size, first, _ = lives[holder]
            lives[holder] = size, first, lives.pop(root)[2]
            if root in homes:  # then what comes to lie in an output is computed there from the beginning
                homes[holder] = homes[root]
        lives = {root: life for root, life in lives.items() if root not in homes}
        offsets, arena_nbytes = place(lives)
        places = [
            Place(homes.get(holder, Home("arena")), offsets.get(holder, 0) + offset)
            for holder, offset in ((holders.get(root, root), offset) for root, offset in roots)
        ]
        outputs = [(of_buffers[number], numpy_dtype(sequence.buffers[number].dtype)) for number in sequence.outputs]
        output_nbytes = sum(nbytes[number] for number in sequence.outputs)
        live = live_nbytes(lives, len(sequence.calls))
        scratch_nbytes = max(map(value, self._scratches))
        return Plan(of_buffers, of_calls, made, places, arena_nbytes, live, outputs, output_nbytes, scratch_nbytes)

    def _holders(
        self,
        made: Sequence[int],
        roots: Sequence[tuple[int, int]],
        nbytes: Sequence[int],
        lives: Mapping[int, tuple[int, int, int]],
    ) -> dict[int, int]:
        """Of each buffer that lies over an operand of the call that makes it, the buffer whose memory that was at first; in their order.

        An operand gives its memory away where that call is the last to use it, the result needs as much, and nothing else that the
        call reads lies there. Inputs, constants and outputs keep theirs.
        """
        holders: dict[int, int] = {}
        for position in made:
            call = self.sequence.calls[position]
            for number in call.over:
                (result,), (root, offset) = call.writes, roots[number]
                owns = roots[result] == (result, 0) and lives[result][1] == position
                dies = root not in self.homes and lives[root][2] == position
                alone = all(roots[other][0] != root for other in call.reads if other != number)
                if owns and dies and alone and offset == 0 and nbytes[number] == nbytes[root] == nbytes[result]:
                    holders[result] = holders.get(root, root)
                    break
        return holders


class Plan(NamedTuple):
    """Memory for one set of input shapes.

    Attributes:
        shapes: of every buffer.
        extents: that each call passes.
        made: the numbers of the calls that are made, in order: those that would copy between a buffer and its parts may not be needed.
        places: of every buffer; those of buffers that no call is given mean nothing.
        arena_nbytes: its size.
        live: bytes in the arena that are in use during each call, those included that are not made: no arena can be smaller than the most.
        outputs: shape and element type of each output.
        output_nbytes: of all outputs together.
        scratch_nbytes: that kernels take in each thread, at most.
    """

    shapes: list[tuple[int, ...]]
    extents: list[tuple[int, ...]]
    made: list[int]
    places: list[Place]
    arena_nbytes: int
    live: list[int]
    outputs: list[tuple[tuple[int, ...], np.dtype[Any]]]
    output_nbytes: int
    scratch_nbytes: int

    @property
    def live_nbytes(self) -> int:
        """The most that is in use at one time."""
        return max(self.live, default=0)


def live_nbytes(buffers: Mapping[int, tuple[int, int, int]], moments: int) -> list[int]:
    """At each moment the bytes of the buffers that are alive; of each its bytes, first and last moment of life."""
    change = [0] * (moments + 1)
    for size, first, last in buffers.values():
        change[first] += size
        change[last + 1] -= size
    return list(accumulate(change[:-1]))


def place(buffers: Mapping[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets for buffers such that those alive at the same time do not overlap.

    The largest come first, each into the smallest gap that holds it between those that it lives together with.

    Args:
        buffers: bytes, first and last moment of life, by number.

    Returns:
        The offsets, multiples of `ARENA_ALIGNMENT`, and the bytes needed in all.
    """
    order = sorted(buffers, key=lambda number: (-buffers[number][0], number))
    first, last = (np.array([buffers[number][i] for number in order], np.int64) for i in (1, 2))
    begins, ends = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    for position, number in enumerate(order):
        size = -(-buffers[number][0] // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
        together = (first[:position] <= last[position]) & (last[:position] >= first[position])
        taken = sorted(zip(begins[:position][together].tolist(), ends[:position][together].tolist(), strict=True))
        offset, smallest, top = None, 0, 0
        for begin, end in taken:
            gap = begin - top
            if gap >= size and (offset is None or gap < smallest):
                offset, smallest = top, gap
            top = max(top, end)
        begins[position] = top if offset is None else offset
        ends[position] = begins[position] + size
    return dict(zip(order, begins.tolist(), strict=True)), int(ends.max(initial=0))


def _bind(inputs: Sequence[Buffer], shapes: Shapes) -> dict[str, int]:
    """Values of the symbols that are an extent of an input by themselves."""
    if [len(shape) for shape in shapes] != [len(buffer.shape) for buffer in inputs]:
        raise _failed(f"expected inputs of shapes {_text(b.shape for b in inputs)}, got {_text(shapes)}")
    return {
        dim: extent
        for buffer, shape in zip(inputs, shapes, strict=True)
        for dim, extent in zip(buffer.shape, shape, strict=True)
        if isinstance(dim, str) and dim.isidentifier()
    }


def _text(shapes: Any) -> str:
    return ", ".join(f"({', '.join(map(str, shape))})" for shape in shapes) or "none"


def _failed(why: str) -> MlecError:
    return MlecError(
        f"the compiled program failed: {why}",
        code="E_RUN",
        hint="load or compile the model again; if it fails again, report it with this text",
    )

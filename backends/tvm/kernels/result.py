"""What a kernel writes: its result in memory, and the epilogue that every value goes through on its way there.

A value is in a register when it is finished, and is stored once, 4 bytes of float32: an epilogue adds its own operations, and 4 bytes for
each tensor of the result's size that it reads. By itself it would read the result again and write it twice, 12 bytes more with the line
that a store fetches. Measured after 512 x 64 by 64 x 512, 33 MFLOP and 1 MB of results, 192 us by one thread with a bias: a sum with
another tensor and relu, 1 MB read, make it 214 us, and 272 as a kernel of their own; gelu, 262144 of them, 280 and 298. After 512 x 512
by 512 x 512, 1.42 ms, the first cannot be measured, and takes 80 us by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlec.backends.tvm.compat import T
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.tile import buffer_dtype, epilogue_parameters, first_lanes, flat_view, parameter
from mlec.backends.tvm.kernels.vector import cast_to, dtype_of, lanes_of, ramp, store


@dataclass(frozen=True)
class Result:
    """Where finished values go; ``extra`` are the buffers that the epilogue reads."""

    buffer: Buffer
    epilogue: Epilogue
    extra: tuple[Buffer, ...]

    @classmethod
    def parameter(cls, name: str, shape: Sequence[Dim], dtype: str, epilogue: Epilogue) -> Result:
        """Declare the last parameters of the program: what the epilogue reads, then the result (``dtype`` unless it says another)."""
        extra = epilogue_parameters(epilogue)
        return cls(parameter(name, BufferSpec(shape, epilogue.out_dtype or dtype)), epilogue, extra)

    def viewed(self, shape: Sequence[Dim]) -> Result:
        """The same memory under another shape of as many elements."""
        return replace(self, buffer=flat_view(self.buffer, shape, buffer_dtype(self.buffer)))

    def put(
        self, prefix: tuple[Expr, ...], where: tuple[Expr, ...], column: Expr, n: Dim, values: Sequence[Expr]
    ) -> None:
        """Finish a block of consecutive values and store those that lie below ``n``, at ``buffer[*prefix, column:n]``.

        Args:
            where: indices before the last in the shape that the epilogue knows.
            column: a multiple of the block, which is all lanes of ``values``.
            n: where it is static, so is the part of the last block that exists: whole vectors, then one short one.
        """
        lanes = lanes_of(values[0])
        block = lanes * len(values)

        def write(value: Expr, at: Expr) -> None:
            finished = self.epilogue.apply(value, (*where, ramp(at, lanes_of(value))), self.extra)
            store(self.buffer, cast_to(buffer_dtype(self.buffer), finished), [*prefix, at])

        def write_columns(columns: int) -> None:
            for v in range(-(-columns // lanes)):
                width = min(lanes, columns - v * lanes)
                write(values[v] if width == lanes else first_lanes(values[v], width), column + v * lanes)

        if isinstance(n, int) and (n % block == 0 or isinstance(column, int)):
            write_columns(block if n % block == 0 else min(block, n - column))
            return
        with T.If(column + block <= n):
            with T.Then():
                write_columns(block)
            with T.Else():
                if isinstance(n, int):
                    write_columns(n % block)
                else:
                    spill = T.alloc_buffer((block,), dtype_of(values[0]))
                    for v, value in enumerate(values):
                        store(spill, value, [v * lanes])
                    with T.serial(n - column) as i:
                        write(spill[i], column + i)

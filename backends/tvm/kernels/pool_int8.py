"""The largest byte, or the sum of the bytes, of each window of an image with its channels last.

A vector is 64 channels of a pixel for the largest and 16 for a sum, as bytes are widened: of 3 x 3 elements, stride 2 and 112 x 112 x 64
(0.8 MB read, 0.2 MB or 0.8 MB written), 3136 windows take 9 loads and maxima each, or 36 times a load that widens, a subtraction and an
addition. At two loads a cycle the first is 4 us and as long again for finding out where a window lies; at 2.5 instructions a cycle the
second is 36 us (3.8 GHz). Measured by one thread 8.3 us and 37.2 us, 120 and 43 GB/s: the image is in L2, and instructions count.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.tile import (
    flat_view,
    otherwise,
    parallel_if_large,
    parameter,
    product,
    unflatten,
    vector_loop,
)
from mlec.backends.tvm.kernels.vector import Cell, cast_to, const_like, load, select, share
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.windows import Geometry

UNROLLED = 25
"""Elements of a window whose loop is unrolled."""


def pool_int8(
    x_shape: Sequence[Dim],
    kernel: Sequence[int],
    geometry: Geometry,
    out: Sequence[Dim],
    target: TargetInfo,
    zero_point: int | None = None,
    epilogue: Epilogue = IDENTITY,
    name: str = "pool_int8",
) -> tirx.PrimFunc:
    """``y[n, p, q, c]``: the largest of a window of ``x[n, h, w, c]``, u8; or, with a zero point, its sum of ``x - zero_point``, i32.

    Extents may be symbolic; ``out`` are p and q. Parameters of the program: x, the epilogue's inputs, y. A task is a row of the result.
    Vectors run over the channels: whole registers of bytes for the largest, of sums for the sum. A small window that lies in the image is
    unrolled: a load and a maximum (or a widening and an addition) for each element and vector. Each element of x is loaded as often
    as windows hold it, from L1 or L2.
    """
    n, h, w, c = x_shape
    (kh, kw), (sh, sw), (dh, dw), (top, left) = kernel, geometry.strides, geometry.dilations, geometry.before
    p, q = out
    dtype, lanes = ("uint8", target.lanes(8)) if zero_point is None else ("int32", target.lanes(32))
    with prim_func(name) as program:
        x = parameter("x", BufferSpec(x_shape, "uint8"))
        y = Result.parameter("y", (n, p, q, c), dtype, epilogue)
        x = flat_view(x, (product(x_shape),), "uint8")

        def row_of_windows(index: Expr) -> None:
            image, row = unflatten(index, (n, p))
            above = share(row * sh - top)

            def window(column: Expr) -> None:
                before = share(column * sw - left)
                corner = share(((image * h + above) * w + before) * c)
                ends = tirx.And(above + (kh - 1) * dh < h, before + (kw - 1) * dw < w)
                inside = share(tirx.And(tirx.And(above >= 0, before >= 0), ends))

                def elements(start: Expr, width: int) -> None:
                    found = Cell(dtype, width, 0)

                    def take(i: Expr, j: Expr) -> None:
                        value = share(load(x, [corner + (i * (dh * w) + j * dw) * c + start], width))
                        if zero_point is None:
                            found.set(select(found.value < value, value, found.value))
                        else:
                            wide = cast_to("int32", value)
                            found.set(found.value + (wide - const_like(zero_point, wide)))

                    def whole() -> None:
                        if kh * kw <= UNROLLED:
                            for i in range(kh):
                                for j in range(kw):
                                    take(i, j)
                        else:
                            with T.serial(kh) as i, T.serial(kw) as j:
                                take(i, j)

                    def part() -> None:
                        with T.serial(kh) as i, T.serial(kw) as j:
                            at = above + i * dh, before + j * dw
                            with T.If(tirx.all(at[0] >= 0, at[0] < h, at[1] >= 0, at[1] < w)), T.Then():
                                take(i, j)

                    otherwise([(inside, whole)], part)
                    where = (image, row, column)
                    y.put(where, where, start, c, [found.value])

                vector_loop(c, lanes, elements)

            with T.serial(q) as column:
                window(column)

        parallel_if_large(product((n, p)), q * c * kh * kw * 32 // lanes, row_of_windows)
    return program.func

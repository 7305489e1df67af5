"""Scaled dot-product attention that never holds more than a few rows of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.gemm import broadcast_lead, operand_indices
from mlec.backends.tvm.kernels.mathlib import exp
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    flat_view,
    parallel_if_large,
    parameter,
    product,
    tile_rows,
    unflatten,
    vector_loop,
)
from mlec.backends.tvm.kernels.vector import (
    Cell,
    broadcast,
    cast_to,
    const,
    const_like,
    dtype_of,
    load,
    maximum,
    ramp,
    reduce_lanes,
    select,
    share,
    store,
)
from mlec.backends.tvm.target import TargetInfo


def attention(
    q_shape: Sequence[Dim],
    k_shape: Sequence[Dim],
    v_shape: Sequence[Dim],
    mask: BufferSpec | None,
    scale: float,
    causal: bool,
    dtype: str,
    target: TargetInfo,
    name: str = "attention",
) -> tirx.PrimFunc:
    """``y = softmax(q k^T * scale + mask) v`` for q ``[.., m, d]``, k ``[.., t, d]``, v ``[.., t, e]``.

    Leading axes broadcast. A bool mask keeps where it is true, a float mask is added; it broadcasts to ``[.., m, t]``.
    ``causal`` hides positions after the row's own. d and e are static, all other extents may be symbolic. Parameters of
    the program: q, k, v, the mask if there is one, y.

    A task is one head. It transposes its keys into panels ``[d, block]`` once (``t * d`` elements, 32 KB for 128 x
    64), then for every 8 queries computes 8 rows of scores, their softmax and their sums of values, all of which stay
    in L1: 2 m t (d + e) FLOPs on ``(2 m + 2 t)(d + e) / 2`` elements of memory.
    """
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    *q_lead, m, d = q_shape
    *k_lead, t, _ = k_shape
    *v_lead, _, e = v_shape
    lead = broadcast_lead(broadcast_lead(q_lead, k_lead), v_lead)
    vectors = 2
    block, mr = lanes * vectors, tile_rows(target, vectors)
    panels = ceildiv(t, block)

    with prim_func(name) as kernel:
        q, k, v = (parameter(n, BufferSpec(s, dtype)) for n, s in (("q", q_shape), ("k", k_shape), ("v", v_shape)))
        given = parameter("mask", mask) if mask else None
        y = parameter("y", BufferSpec((*lead, m, e), dtype))
        # Booleans are bytes in memory; a vector of them is loaded as such.
        if mask and mask.dtype == "bool":
            given = flat_view(given, mask.shape, "int8")

        def head(index: Expr) -> None:
            where = unflatten(index, lead)
            q_at, k_at, v_at = (operand_indices(where, lead, own) for own in (q_lead, k_lead, v_lead))
            keys = T.alloc_buffer((panels, d, block), acc)
            scores = T.alloc_buffer((mr, panels * block), acc)
            transpose_keys(keys, k_at)
            with T.serial(ceildiv(m, mr)) as block_of_rows:
                row = share(block_of_rows * mr)
                count = share(tirx.min(mr, m - row))
                by_rows(count, lambda rows, i: score(rows, i, row + i, q_at, keys, scores))
                with T.serial(count) as i:
                    normalise(scores, i, row + i, where)
                by_rows(count, lambda rows, i: weigh(rows, i, row + i, where, v_at, scores))

        def by_rows(count: Expr, body: Callable[[int, Expr], None]) -> None:
            """Whole tiles of rows at once, the last rows one by one."""
            if isinstance(m, int) and m % mr == 0:
                body(mr, 0)
                return
            with T.If(count == mr):
                with T.Then():
                    body(mr, 0)
                with T.Else(), T.serial(count) as i:
                    body(1, i)

        def transpose_keys(keys: Buffer, k_at: tuple[Expr, ...]) -> None:
            with T.grid(panels, block) as (panel, column):
                position = share(panel * block + column)
                with T.If(position < t):
                    with T.Then(), T.serial(d) as j:
                        T.buffer_store(keys, cast_to(acc, k[(*k_at, position, j)]), [panel, j, column])
                    with T.Else(), T.serial(d) as j:
                        T.buffer_store(keys, const(0, acc), [panel, j, column])

        def score(rows: int, first: Expr, row: Expr, q_at: tuple[Expr, ...], keys: Buffer, scores: Buffer) -> None:
            """Scaled products of ``rows`` queries with every key."""
            with T.serial(panels) as panel:
                sums = RegisterTile(rows, vectors, lanes, acc)
                with T.serial(d) as j:
                    sums.multiply_add(
                        [cast_to(acc, q[(*q_at, row + i, j)]) for i in range(rows)],
                        [load(keys, [panel, j, u * lanes], lanes) for u in range(vectors)],
                    )
                for i in range(rows):
                    for u in range(vectors):
                        at = [first + i, panel * block + u * lanes]
                        store(scores, sums.value(i, u) * const(scale, acc, lanes), at)

        def normalise(scores: Buffer, i: Expr, row: Expr, where: Sequence[Expr]) -> None:
            """Softmax of one row of scores, in place."""
            if given is not None or causal:
                vector_loop(t, lanes, lambda start, width: hide(scores, i, row, where, start, width))
            with T.serial(t, panels * block) as beyond:  # weighs nothing, and makes the row whole vectors
                T.buffer_store(scores, const(-math.inf, acc), [i, beyond])
            largest, total = Cell(acc, lanes, -math.inf), Cell(acc, lanes, 0)
            with T.serial(panels * vectors) as j:
                largest.set(maximum(largest.value, share(load(scores, [i, j * lanes], lanes))))
            shift = share(reduce_lanes(largest.value, maximum))
            with T.serial(panels * vectors) as j:
                value = exp(load(scores, [i, j * lanes], lanes) - shift)
                store(scores, value, [i, j * lanes])
                total.set(total.value + value)
            whole = share(reduce_lanes(total.value, lambda a, b: a + b))
            with T.serial(panels * vectors) as j:
                store(scores, load(scores, [i, j * lanes], lanes) / whole, [i, j * lanes])

        def hide(scores: Buffer, i: Expr, row: Expr, where: Sequence[Expr], start: Expr, width: int) -> None:
            value = load(scores, [i, start], width)
            if given is not None and mask is not None:
                at = operand_indices((*where, row, start), (*lead, m, t), mask.shape)
                narrow = isinstance(mask.shape[-1], int) and mask.shape[-1] == 1
                seen = load(given, list(at), 1 if narrow else width)
                if mask.dtype == "bool":
                    value = select(tirx.NE(seen, const_like(0, seen)), value, -math.inf)
                else:
                    value = value + broadcast(cast_to(acc, seen), width)
            if causal:
                column = ramp(start, width)
                value = select(column <= broadcast(cast_to(dtype_of(column), row), width), share(value), -math.inf)
            store(scores, value, [i, start])

        def weigh(
            rows: int, first: Expr, row: Expr, where: Sequence[Expr], v_at: tuple[Expr, ...], scores: Buffer
        ) -> None:
            """The values summed with the weights of ``rows`` rows, some vectors of columns at a time."""

            def columns(start: Expr, count: int, width: int) -> None:
                sums = RegisterTile(rows, count, width, acc)
                with T.serial(t) as j:
                    sums.multiply_add(
                        [scores[first + i, j] for i in range(rows)],
                        [cast_to(acc, load(v, [*v_at, j, start + u * width], width)) for u in range(count)],
                    )
                for i in range(rows):
                    for u in range(count):
                        store(y, cast_to(dtype, sums.value(i, u)), [*where, row + i, start + u * width])

            strip = vectors * lanes
            if e >= strip:
                with T.serial(e // strip) as i:
                    columns(i * strip, vectors, lanes)
            if e % strip >= lanes:
                columns(e // strip * strip, e % strip // lanes, lanes)
            if e % lanes:
                columns(e // lanes * lanes, 1, e % lanes)

        work = math.prod(extent if isinstance(extent, int) else 32 for extent in (m, t)) * (d + e)
        parallel_if_large(product(lead), work, head, math.prod(extent for extent in lead if isinstance(extent, int)))
    return kernel.func

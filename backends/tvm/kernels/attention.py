"""Scaled dot-product attention that never holds more than a few rows of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.gemm import broadcast_lead, operand_indices
from mlec.backends.tvm.kernels.mathlib import exp
from mlec.backends.tvm.kernels.tile import (
    Fold,
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
    broadcast,
    cast_to,
    const,
    const_like,
    dtype_of,
    load,
    maximum,
    ramp,
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

    A task is one head. It transposes its keys into panels ``[d, block]`` once (``t * d`` elements, 32 KB for 128 x 64), then
    for every 8 queries computes 8 rows of scores, their softmax and their sums of values, all of which stay in L1: 2 m t
    (d + e) FLOPs on ``(2 m + 2 t)(d + e) / 2`` elements of memory.
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
    most_vectors = max(1, (target.vector_registers - 4) // mr - 1)

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
            with T.serial(m // mr) as i:
                rows_of(mr, share(i * mr), where, q_at, v_at, keys, scores)
            if mr > 1 and not (isinstance(m, int) and m % mr == 0):
                with T.serial(m % mr) as i:
                    rows_of(1, share(m // mr * mr + i), where, q_at, v_at, keys, scores)

        def transpose_keys(keys: Buffer, k_at: tuple[Expr, ...]) -> None:
            with T.grid(panels, block) as (panel, column):
                position = share(panel * block + column)
                with T.If(position < t):
                    with T.Then(), T.serial(d) as j:
                        T.buffer_store(keys, cast_to(acc, k[(*k_at, position, j)]), [panel, j, column])
                    with T.Else(), T.serial(d) as j:
                        T.buffer_store(keys, const(0, acc), [panel, j, column])

        def rows_of(
            rows: int,
            row: Expr,
            where: Sequence[Expr],
            q_at: tuple[Expr, ...],
            v_at: tuple[Expr, ...],
            keys: Buffer,
            scores: Buffer,
        ) -> None:
            with T.serial(panels) as panel:
                sums = RegisterTile(rows, vectors, lanes, acc)
                with T.serial(d) as j:
                    sums.multiply_add(
                        [cast_to(acc, q[(*q_at, row + i, j)]) for i in range(rows)],
                        [load(keys, [panel, j, u * lanes], lanes) for u in range(vectors)],
                    )
                for i in range(rows):
                    for u in range(vectors):
                        store(scores, sums.value(i, u) * const(scale, acc, lanes), [i, panel * block + u * lanes])
            with T.serial(rows) as i:
                normalise(scores, i, row + i, where)
            for first in range(0, e, most_vectors * lanes):
                weigh(rows, row, first, min(e, first + most_vectors * lanes), where, v_at, scores)

        def normalise(scores: Buffer, i: Expr, row: Expr, where: Sequence[Expr]) -> None:
            """Softmax of one row of scores, in place."""
            if given is not None or causal:
                vector_loop(t, lanes, lambda start, width: hide(scores, i, row, where, start, width))
            largest = Fold(lanes, acc, -math.inf, maximum)
            largest.over(t, lambda start, width: load(scores, [i, start], width))
            shift = largest.result()
            total = Fold(lanes, acc, 0, lambda a, b: a + b)

            def exponential(start: Expr, width: int) -> Expr:
                value = exp(load(scores, [i, start], width) - shift)
                store(scores, value, [i, start])
                return value

            total.over(t, exponential)
            whole = total.result()
            vector_loop(
                t, lanes, lambda start, width: store(scores, load(scores, [i, start], width) / whole, [i, start])
            )

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
            rows: int, row: Expr, first: int, last: int, where: Sequence[Expr], v_at: tuple[Expr, ...], scores: Buffer
        ) -> None:
            """Columns ``first`` to ``last`` of the values, summed with the weights of each row."""
            for start, vectors, width in (
                (first, (last - first) // lanes, lanes),
                (last - last % lanes, 1, last % lanes),
            ):
                if not vectors or not width or start >= last:
                    continue
                sums = RegisterTile(rows, vectors, width, acc)
                with T.serial(t) as j:
                    sums.multiply_add(
                        [scores[i, j] for i in range(rows)],
                        [cast_to(acc, load(v, [*v_at, j, start + u * width], width)) for u in range(vectors)],
                    )
                for i in range(rows):
                    for u in range(vectors):
                        store(y, cast_to(dtype, sums.value(i, u)), [*where, row + i, start + u * width])

        work = math.prod(extent if isinstance(extent, int) else 32 for extent in (m, t)) * (d + e)
        parallel_if_large(product(lead), work, head, math.prod(extent for extent in lead if isinstance(extent, int)))
    return kernel.func

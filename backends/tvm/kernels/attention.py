"""Scaled dot-product attention that never holds more than a few rows of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.gemm import broadcast_lead, operand_indices
from mlec.backends.tvm.kernels.mathlib import exp_of_negative
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
from mlec.backends.tvm.kernels.transpose import turn
from mlec.backends.tvm.kernels.vector import (
    Cell,
    broadcast,
    cast_to,
    const,
    const_like,
    dtype_of,
    load,
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
    orders: Sequence[Sequence[int]] = (),
) -> tirx.PrimFunc:
    """``y = softmax(q k^T * scale + mask) v`` for q ``[.., m, d]``, k ``[.., t, d]``, v ``[.., t, e]``.

    Leading axes broadcast. A bool mask keeps where it is true, a float mask is added; it broadcasts to ``[.., m, t]``.
    ``causal`` hides positions after the row's own. d and e are static, all other extents may be symbolic. Parameters of
    the program: q, k, v, the mask if there is one, y.

    ``orders`` says how q, k, v and y lie in memory: axis i of the tensor is axis ``order[i]`` of its buffer. The last axis
    stays the last, so that heads can be read from, and written to, the rows of the products around them.

    A task is one head. It transposes its keys into panels ``[d, block]`` once, squares of vectors in registers (``t * d``
    elements, 32 KB for 128 x 64), then for every 8 queries computes 8 rows of scores, their exponentials and the sums of
    values weighted by these, all of which stay in L1: 2 m t (d + e) FLOPs on ``(2 m + 2 t)(d + e) / 2`` elements of memory.
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

    y_shape = (*lead, m, e)
    shapes = (q_shape, k_shape, v_shape, y_shape)
    orders = orders or [tuple(range(len(shape))) for shape in shapes]
    q_order, k_order, v_order, y_order = orders

    with prim_func(name) as kernel:
        memory = [BufferSpec(placed(shape, order), dtype) for shape, order in zip(shapes, orders, strict=True)]
        q, k, v = (parameter(n, spec) for n, spec in zip("qkv", memory[:3], strict=True))
        given = parameter("mask", mask) if mask else None
        y = parameter("y", memory[3])
        # Booleans are bytes in memory; a vector of them is loaded as such.
        if mask and mask.dtype == "bool":
            given = flat_view(given, mask.shape, "int8")

        def head(index: Expr) -> None:
            where = unflatten(index, lead)
            q_at, k_at, v_at = (operand_indices(where, lead, own) for own in (q_lead, k_lead, v_lead))
            keys = T.alloc_buffer((panels, d, block), acc)
            scores = T.alloc_buffer((mr, panels * block), acc)
            totals = T.alloc_buffer((mr,), acc)
            transpose_keys(keys, k_at)
            with T.serial(ceildiv(m, mr)) as block_of_rows:
                row = share(block_of_rows * mr)
                count = share(tirx.min(mr, m - row))
                # No row of a causal block sees a key after its last row.
                seen = share(tirx.min(t, row + count)) if causal else t
                by_rows(count, lambda rows, i: score(rows, i, row + i, seen, q_at, keys, scores))
                with T.serial(count) as i:
                    exponentials(scores, totals, i, row + i, seen, where)
                by_rows(count, lambda rows, i: weigh(rows, i, row + i, seen, where, v_at, scores, totals))

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
            def element(panel: Expr, column: Expr, j: Expr) -> None:
                position = panel * block + column
                value = cast_to(acc, k[tuple(placed((*k_at, position, j), k_order))])
                T.buffer_store(keys, tirx.if_then_else(position < t, value, const(0, acc)), [panel, j, column])

            def square(panel: Expr, u: int, first: Expr) -> None:
                position = panel * block + u * lanes
                at = [placed((*k_at, position + i, first), k_order) for i in range(lanes)]
                columns = turn([share(cast_to(acc, load(k, where, lanes))) for where in at])
                for i, column in enumerate(columns):
                    store(keys, column, [panel, first + i, u * lanes])

            turned = d // lanes * lanes if lanes & (lanes - 1) == 0 else 0
            with T.serial(panels) as panel, T.If((panel + 1) * block <= t):
                with T.Then():
                    for u in range(vectors):
                        with T.serial(turned // lanes) as j:
                            square(panel, u, j * lanes)
                    with T.serial(block) as column, T.serial(turned, d) as j:
                        element(panel, column, j)
                with T.Else(), T.serial(block) as column, T.serial(d) as j:
                    element(panel, column, j)

        def score(
            rows: int, first: Expr, row: Expr, seen: Expr, q_at: tuple[Expr, ...], keys: Buffer, scores: Buffer
        ) -> None:
            """Scaled products of ``rows`` queries with every key that one of them may see."""
            with T.serial(ceildiv(seen, block)) as panel:
                sums = RegisterTile(rows, vectors, lanes, acc)
                with T.serial(d) as j:
                    sums.multiply_add(
                        [cast_to(acc, q[tuple(placed((*q_at, row + i, j), q_order))]) for i in range(rows)],
                        [load(keys, [panel, j, u * lanes], lanes) for u in range(vectors)],
                    )
                for i in range(rows):
                    for u in range(vectors):
                        at = [first + i, panel * block + u * lanes]
                        store(scores, sums.value(i, u) * const(scale, acc, lanes), at)

        def exponentials(scores: Buffer, totals: Buffer, i: Expr, row: Expr, seen: Expr, where: Sequence[Expr]) -> None:
            """Exponentials of one row of scores, in place, and what they add up to."""
            whole = share(ceildiv(seen, block) * vectors)
            if given is not None:
                vector_loop(seen, lanes, lambda start, width: mask_out(scores, i, row, where, start, width))
            if causal:
                with T.serial(row // lanes, whole) as j:
                    column, value = ramp(share(j * lanes), lanes), share(load(scores, [i, j * lanes], lanes))
                    shown = column <= broadcast(cast_to(dtype_of(column), row), lanes)
                    store(scores, select(shown, value, -math.inf), [i, j * lanes])
            with T.serial(seen, whole * lanes) as beyond:  # weighs nothing, and makes the row whole vectors
                T.buffer_store(scores, const(-math.inf, acc), [i, beyond])
            largest, total = Cell(acc, lanes, -math.inf), Cell(acc, lanes, 0)
            with T.serial(whole) as j:
                largest.set(larger(largest.value, share(load(scores, [i, j * lanes], lanes))))
            shift = share(reduce_lanes(largest.value, larger))
            with T.serial(whole) as j:
                value = exp_of_negative(load(scores, [i, j * lanes], lanes) - broadcast(shift, lanes))
                store(scores, value, [i, j * lanes])
                total.set(total.value + value)
            T.buffer_store(totals, reduce_lanes(total.value, lambda a, b: a + b), [i])

        def mask_out(scores: Buffer, i: Expr, row: Expr, where: Sequence[Expr], start: Expr, width: int) -> None:
            assert given is not None
            assert mask is not None
            value = load(scores, [i, start], width)
            at = operand_indices((*where, row, start), (*lead, m, t), mask.shape)
            narrow = isinstance(mask.shape[-1], int) and mask.shape[-1] == 1
            term = load(given, list(at), 1 if narrow else width)
            if mask.dtype == "bool":
                value = select(tirx.NE(term, const_like(0, term)), value, -math.inf)
            else:
                value = value + broadcast(cast_to(acc, term), width)
            store(scores, value, [i, start])

        def weigh(
            rows: int,
            first: Expr,
            row: Expr,
            seen: Expr,
            where: Sequence[Expr],
            v_at: tuple[Expr, ...],
            scores: Buffer,
            totals: Buffer,
        ) -> None:
            """The means of the values, weighted by ``rows`` rows of exponentials, some vectors of columns at a time."""

            def columns(start: Expr, count: int, width: int) -> None:
                sums = RegisterTile(rows, count, width, acc)
                with T.serial(seen) as j:
                    sums.multiply_add(
                        [scores[first + i, j] for i in range(rows)],
                        [
                            cast_to(acc, load(v, placed((*v_at, j, start + u * width), v_order), width))
                            for u in range(count)
                        ],
                    )
                for i in range(rows):
                    for u in range(count):
                        value = sums.value(i, u) / broadcast(totals[first + i], width)
                        store(y, cast_to(dtype, value), placed((*where, row + i, start + u * width), y_order))

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


def larger(a: Expr, b: Expr) -> Expr:
    """The larger value. Where one is NaN it may be lost: the exponentials find it again."""
    return select(a < b, b, a)


def placed(values: Sequence[Expr], order: Sequence[int]) -> list[Expr]:
    """Indices or extents of a tensor's axes, as the axes of its buffer."""
    found: list[Expr] = [None] * len(order)
    for value, axis in zip(values, order, strict=True):
        found[axis] = value
    return found

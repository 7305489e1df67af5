"""Scaled dot-product attention that never holds more than a few rows of scores.

m queries and t keys of d numbers, and values of e, take 2 m t (d + e) FLOPs and m t exponentials; q, k, v and y are m (d + e) + t (d + e)
elements of memory, scores none: a few rows of them stay in L1, with the transposed keys in L1 or L2 (4 t d bytes, 32 KB for 128 x 64).
Twelve heads of 128 x 128, d = e = 64, in float32: 50 MFLOP on 1.6 MB, 32 a byte, so FMAs count: 238 us at the 211 GFLOP/s that one thread
reaches with operands from L1. 12288 vectors of exponentials are 66 us more, the keys 5: six instructions for each vector of them, loads,
four shuffles, stores, beside the 2 * 128 FMAs of the queries. Predicted 309 us, measured 345 (torch 500); by two threads 175 (torch 290).

Heads that are fewer than two tasks for each thread are shared by their queries, 64 or more to a task; each task transposes the keys that it
sees for itself. One head of 1024 x 1024 took 1.75 ms by two threads as one task; in four parts it takes 0.84 (torch 1.06), and 1.84 by one
thread, which alone took 1.79. Where keys after a query are hidden, 0.93 and 0.48.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import exp_of_negative, tanh
from mlec.backends.tvm.kernels.operands import broadcast_lead, operand_indices
from mlec.backends.tvm.kernels.schedule import variations, vectors_across
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
    lanes_of,
    load,
    ramp,
    reduce_lanes,
    select,
    share,
    store,
)
from mlec.backends.tvm.target import TargetInfo

QUERIES = 64
"""Queries of a task at least: transposing the keys takes about as long as the products of two or three."""

CHAINS = 4
"""Rows of scores whose exponentials are taken side by side."""


@dataclass(frozen=True)
class AttentionSchedule:
    """How `attention` goes over a head.

    Attributes:
        rows: queries that are worked on together.
        vectors: of keys in a panel, and of columns of the values in a tile.
    """

    rows: int
    vectors: int

    @staticmethod
    def candidates(m: Dim, t: Dim, dtype: str, target: TargetInfo) -> Iterator[AttentionSchedule]:
        """For ``m`` queries and ``t`` keys, which may be symbolic. Tiles that leave no register for the operands do not fit."""
        vectors = 2
        rows = tile_rows(target, vectors)
        most = vectors_across(t, target.lanes(bits(accumulator_dtype(dtype))))

        def fits(schedule: AttentionSchedule) -> bool:
            return 4 <= schedule.rows * schedule.vectors < target.vector_registers - schedule.vectors

        return variations(
            AttentionSchedule(rows, vectors),
            fits,
            vectors=[v for v in (1, 2, 3, 4) if v <= most],
            rows=sorted((r for r in range(2, 13) if not isinstance(m, int) or r <= m), key=lambda r: abs(r - rows)),
        )


def attention(
    q_shape: Sequence[Dim],
    k_shape: Sequence[Dim],
    v_shape: Sequence[Dim],
    masks: Sequence[BufferSpec],
    scale: float,
    causal: bool,
    dtype: str,
    target: TargetInfo,
    name: str = "attention",
    orders: Sequence[Sequence[int]] = (),
    schedule: AttentionSchedule | None = None,
    fill: float = -math.inf,
    cap: float = math.inf,
) -> tirx.PrimFunc:
    """``y = softmax(q k^T * scale + mask) v`` for q ``[.., m, d]``, k ``[.., t, d]``, v ``[.., t, e]``.

    Leading axes broadcast. A bool mask keeps where it is true and puts ``fill`` elsewhere, a float mask is added, one after the other;
    each broadcasts to ``[.., m, t]``. Before that, ``cap`` makes ``cap * tanh(score / cap)`` of each score, if it is finite.
    ``causal`` hides positions after the row's own. d and e are static, all other extents may be symbolic. Parameters of
    the program: q, k, v, the masks, y.

    ``orders`` says how q, k, v and y lie in memory: axis i of the tensor is axis ``order[i]`` of its buffer. The last axis
    stays the last, so that heads can be read from, and written to, the rows of the products around them. Without a schedule,
    the first candidate is taken.

    A task is one head, or some of its queries where heads are few. It transposes the keys into panels ``[d, block]`` once, squares of
    vectors in registers, then for every few queries (8 by default) computes as many rows of scores, their exponentials and the sums of
    values weighted by these.
    """
    *q_lead, m, d = q_shape
    *k_lead, t, _ = k_shape
    *v_lead, _, e = v_shape
    lead = broadcast_lead(broadcast_lead(q_lead, k_lead), v_lead)
    shapes = (q_shape, k_shape, v_shape, (*lead, m, e))
    orders = orders or [tuple(range(len(shape))) for shape in shapes]
    schedule = schedule or next(AttentionSchedule.candidates(m, t, dtype, target))
    with prim_func(name) as kernel:
        specs = [BufferSpec(placed(shape, order), dtype) for shape, order in zip(shapes, orders, strict=True)]
        q, k, v = (
            _Operand(parameter(label, spec), shape[:-2], order)
            for label, spec, shape, order in zip("qkv", specs[:3], shapes[:3], orders[:3], strict=True)
        )
        given = [parameter(f"mask{i}", mask) for i, mask in enumerate(masks)]
        y = _Operand(parameter("y", specs[3]), lead, orders[3])
        masked = [_Mask(buffer, mask, fill) for buffer, mask in zip(given, masks, strict=True)]
        program = _Attention(q, k, v, y, masked, (m, t, d, e), scale, cap, causal, dtype, target, schedule)
        heads, known = product(lead), math.prod(extent for extent in lead if isinstance(extent, int))
        parts = program.parts(heads, known)
        work = m * t * (d + e) // parts

        def task(i: Expr) -> None:
            program.task(i // parts, i % parts, parts)

        parallel_if_large(heads * parts, work, task, known)
    return kernel.func


@dataclass(frozen=True)
class _Operand:
    """One of q, k, v and y: its buffer, its leading extents, and which axis of the buffer each axis of the tensor is."""

    buffer: Buffer
    lead: Sequence[Dim]
    order: Sequence[int]

    def at(self, head: Sequence[Expr], row: Expr, column: Expr) -> list[Expr]:
        """Indices into the buffer for an element of a matrix, ``head`` being its indices along the leading axes."""
        return placed((*head, row, column), self.order)


class _Mask:
    """A mask in memory; ``fill`` is what a bool mask puts in the place of scores."""

    def __init__(self, buffer: Buffer, spec: BufferSpec, fill: float) -> None:
        self.shape, self.keeps, self.fill = spec.shape, spec.dtype == "bool", fill
        # Booleans are bytes in memory; a vector of them is loaded as such.
        self.buffer = flat_view(buffer, spec.shape, "int8") if self.keeps else buffer

    def apply(self, score: Expr, where: Sequence[Expr], scores: Sequence[Dim]) -> Expr:
        """Consecutive scores, masked; ``where`` is the first one's position among all scores, whose extents are ``scores``."""
        at = operand_indices(where, scores, self.shape)
        narrow = isinstance(self.shape[-1], int) and self.shape[-1] == 1
        term = load(self.buffer, list(at), 1 if narrow else lanes_of(score))
        if self.keeps:
            return select(tirx.NE(term, const_like(0, term)), score, self.fill)
        return score + broadcast(cast_to(dtype_of(score), term), lanes_of(score))


@dataclass(frozen=True)
class _Attention:
    """The parts of the program, see `attention`; ``extents`` are m, t, d, e.

    Three buffers of a task go from part to part: ``keys`` ``[panels, d, block]``, ``scores`` ``[mr, panels * block]``, and
    ``factors`` ``[mr]``, by which the exponentials of each row of scores add up to 1.
    """

    q: _Operand
    k: _Operand
    v: _Operand
    y: _Operand
    masks: Sequence[_Mask]
    extents: tuple[Dim, Dim, int, int]
    scale: float
    cap: float
    causal: bool
    dtype: str
    target: TargetInfo
    schedule: AttentionSchedule

    @property
    def vectors(self) -> int:
        return self.schedule.vectors

    @property
    def acc(self) -> str:
        return accumulator_dtype(self.dtype)

    @property
    def lanes(self) -> int:
        return self.target.lanes(bits(self.acc))

    @property
    def block(self) -> int:
        """Keys of a panel."""
        return self.lanes * self.vectors

    @property
    def panels(self) -> Dim:
        return ceildiv(self.extents[1], self.block)

    def parts(self, heads: Dim, known: int) -> Dim:
        """In how many parts tasks share the queries of a head: more than one where heads are fewer than two for each thread.

        Their number is ``heads``, which is known to be a multiple of ``known`` if not 0.
        """
        m, wanted = self.extents[0], 2 * self.target.cores
        if known >= wanted or (isinstance(m, int) and m < 2 * QUERIES):
            return 1
        if isinstance(heads, int) and isinstance(m, int):
            return min(ceildiv(wanted, max(1, heads)), m // QUERIES)
        return tirx.max(1, tirx.min(ceildiv(wanted, tirx.max(1, heads)), m // QUERIES))

    def task(self, head: Expr, part: Expr, parts: Dim) -> None:
        """Some queries of a head: one of so many parts."""
        m, t, d, _ = self.extents
        mr, lead = self.schedule.rows, self.y.lead
        where = unflatten(head, lead)
        q_at, k_at, v_at = (operand_indices(where, lead, x.lead) for x in (self.q, self.k, self.v))
        keys = T.alloc_buffer((self.panels, d, self.block), self.acc)
        scores = T.alloc_buffer((mr, self.panels * self.block), self.acc)
        factors = T.alloc_buffer((mr,), self.acc)
        begin, end = self.blocks(part, parts)
        self.transpose_keys(keys, k_at, share(tirx.min(t, end * mr)) if self.causal else t)
        with T.serial(begin, end) as block_of_rows:
            row = share(block_of_rows * mr)
            count = share(tirx.min(mr, m - row))
            # No row of a causal block sees a key after its last row.
            seen = share(tirx.min(t, row + count)) if self.causal else t
            whole = isinstance(m, int) and m % mr == 0
            by_rows(mr, count, whole, lambda rows, i: self.score(rows, i, row + i, seen, q_at, keys, scores))
            with T.serial(count) as i:
                self.hide(scores, i, row + i, seen, where)
            by_rows(mr, count, whole, lambda rows, i: self.exponentials(rows, i, seen, scores, factors))
            by_rows(mr, count, whole, lambda rows, i: self.weigh(rows, i, row + i, seen, where, v_at, scores, factors))

    def blocks(self, part: Expr, parts: Dim) -> tuple[Expr, Expr]:
        """The first block of queries of a part, and the one after its last.

        Where later queries see more keys, an early part and a late one follow each other: threads, which take neighbours, get as much.
        """
        blocks = ceildiv(self.extents[0], self.schedule.rows)
        if isinstance(parts, int) and parts == 1:
            return 0, blocks
        if self.causal:
            part = share(tirx.Select(part % 2 == 0, part // 2, parts - 1 - part // 2))
        return share(blocks * part // parts), share(blocks * (part + 1) // parts)

    def transpose_keys(self, keys: Buffer, k_at: Sequence[Expr], seen: Expr) -> None:
        """Fills the panels of those ``seen``, with zeros beyond the last key: squares of vectors in registers, the rest one by one."""
        _, t, d, _ = self.extents
        acc, block, lanes, k = self.acc, self.block, self.lanes, self.k.buffer

        def element(panel: Expr, column: Expr, j: Expr) -> None:
            position = panel * block + column
            value = cast_to(acc, k[tuple(self.k.at(k_at, position, j))])
            T.buffer_store(keys, tirx.if_then_else(position < t, value, const(0, acc)), [panel, j, column])

        def square(panel: Expr, u: int, first: Expr) -> None:
            position = panel * block + u * lanes
            rows = [load(k, self.k.at(k_at, position + i, first), lanes) for i in range(lanes)]
            columns = turn([share(cast_to(acc, row)) for row in rows])
            for i, column in enumerate(columns):
                store(keys, column, [panel, first + i, u * lanes])

        turned = d // lanes * lanes if lanes & (lanes - 1) == 0 else 0
        with T.serial(ceildiv(seen, self.block)) as panel, T.If((panel + 1) * block <= t):
            with T.Then():
                for u in range(self.vectors):
                    with T.serial(turned // lanes) as j:
                        square(panel, u, j * lanes)
                with T.serial(block) as column, T.serial(turned, d) as j:
                    element(panel, column, j)
            with T.Else(), T.serial(block) as column, T.serial(d) as j:
                element(panel, column, j)

    def score(
        self, rows: int, first: Expr, row: Expr, seen: Expr, q_at: Sequence[Expr], keys: Buffer, scores: Buffer
    ) -> None:
        """Scaled products of ``rows`` queries with every key that one of them may see."""
        acc, lanes, d = self.acc, self.lanes, self.extents[2]
        with T.serial(ceildiv(seen, self.block)) as panel:
            sums = RegisterTile(rows, self.vectors, lanes, acc)
            with T.serial(d) as j:
                sums.multiply_add(
                    [cast_to(acc, self.q.buffer[tuple(self.q.at(q_at, row + i, j))]) for i in range(rows)],
                    [load(keys, [panel, j, u * lanes], lanes) for u in range(self.vectors)],
                )
            for i in range(rows):
                for u in range(self.vectors):
                    at = [first + i, panel * self.block + u * lanes]
                    store(scores, self.scaled(sums.value(i, u)), at)

    def scaled(self, score: Expr) -> Expr:
        """Products as scores, before any mask."""
        if math.isinf(self.cap):
            return score * const(self.scale, self.acc, self.lanes)
        return tanh(score * const(self.scale / self.cap, self.acc, self.lanes)) * const(self.cap, self.acc, self.lanes)

    def apply_mask(self, mask: _Mask, scores: Buffer, i: Expr, seen: Expr, row: Sequence[Expr]) -> None:
        """Masks one row of scores, in place; ``row`` is its position among all rows."""
        m, t, _, _ = self.extents

        def run(start: Expr, width: int) -> None:
            masked = mask.apply(load(scores, [i, start], width), (*row, start), (*self.y.lead, m, t))
            store(scores, masked, [i, start])

        vector_loop(seen, self.lanes, run)

    def hide(self, scores: Buffer, i: Expr, row: Expr, seen: Expr, where: Sequence[Expr]) -> None:
        """Masks one row of scores, and puts minus infinity where it sees nothing, up to whole panels."""
        lanes, whole = self.lanes, self.width(seen)
        for mask in self.masks:
            self.apply_mask(mask, scores, i, seen, (*where, row))
        if self.causal:
            with T.serial(row // lanes, whole) as j:
                column, value = ramp(share(j * lanes), lanes), share(load(scores, [i, j * lanes], lanes))
                shown = column <= broadcast(cast_to(dtype_of(column), row), lanes)
                store(scores, select(shown, value, -math.inf), [i, j * lanes])
        with T.serial(seen, whole * lanes) as beyond:  # weighs nothing, and makes the row whole vectors
            T.buffer_store(scores, const(-math.inf, self.acc), [i, beyond])

    def width(self, seen: Expr) -> Expr:
        """Vectors of a row of scores."""
        return share(ceildiv(seen, self.block) * self.vectors)

    def exponentials(self, rows: int, first: Expr, seen: Expr, scores: Buffer, factors: Buffer) -> None:
        """Exponentials of rows of scores, in place, and the factors by which they add up to 1.

        A row is a chain of a maximum, its exponentials and their sum, each of which waits for what comes before; so rows go side by side.
        """
        for begin in range(0, rows, CHAINS):
            self.chains([first + i for i in range(begin, min(rows, begin + CHAINS))], self.width(seen), scores, factors)

    def chains(self, rows: Sequence[Expr], whole: Expr, scores: Buffer, factors: Buffer) -> None:
        """The exponentials of these rows, side by side."""
        acc, lanes = self.acc, self.lanes
        largest = [Cell(acc, lanes, -math.inf) for _ in rows]
        sums = [Cell(acc, lanes, 0) for _ in rows]
        with T.serial(whole) as j:
            for i, cell in zip(rows, largest, strict=True):
                cell.set(larger(cell.value, share(load(scores, [i, j * lanes], lanes))))
        shifts = [share(reduce_lanes(cell.value, larger)) for cell in largest]
        with T.serial(whole) as j:
            for i, shift, total in zip(rows, shifts, sums, strict=True):
                value = exp_of_negative(load(scores, [i, j * lanes], lanes) - broadcast(shift, lanes))
                store(scores, value, [i, j * lanes])
                total.set(total.value + value)
        for i, total in zip(rows, sums, strict=True):
            # The largest score's exponential is 1: the sum is less where there is no key, and 0 / 1 is what such a row weighs.
            total_or_one = larger(share(reduce_lanes(total.value, lambda a, b: a + b)), const(1, acc))
            T.buffer_store(factors, const(1, acc) / total_or_one, [i])

    def weigh(
        self,
        rows: int,
        first: Expr,
        row: Expr,
        seen: Expr,
        where: Sequence[Expr],
        v_at: Sequence[Expr],
        scores: Buffer,
        factors: Buffer,
    ) -> None:
        """The means of the values, weighted by ``rows`` rows of exponentials, some vectors of columns at a time."""
        acc, lanes, e = self.acc, self.lanes, self.extents[3]

        def columns(start: Expr, count: int, width: int) -> None:
            sums = RegisterTile(rows, count, width, acc)
            with T.serial(seen) as j:
                places = [self.v.at(v_at, j, start + u * width) for u in range(count)]
                sums.multiply_add(
                    [scores[first + i, j] for i in range(rows)],
                    [cast_to(acc, load(self.v.buffer, place, width)) for place in places],
                )
            for i in range(rows):
                for u in range(count):
                    value = cast_to(self.dtype, sums.value(i, u) * broadcast(factors[first + i], width))
                    store(self.y.buffer, value, self.y.at(where, row + i, start + u * width))

        strip = self.block
        if e >= strip:
            with T.serial(e // strip) as i:
                columns(i * strip, self.vectors, lanes)
        if e % strip >= lanes:
            columns(e // strip * strip, e % strip // lanes, lanes)
        if e % lanes:
            columns(e // lanes * lanes, 1, e % lanes)


def by_rows(most: int, count: Expr, whole: bool, body: Callable[[int, Expr], None]) -> None:
    """``body(rows, first)``: all ``count`` rows at once if they are ``most``, as they are known to be if ``whole``, else one by one."""
    if whole:
        body(most, 0)
        return
    with T.If(count == most):
        with T.Then():
            body(most, 0)
        with T.Else(), T.serial(count) as i:
            body(1, i)


def larger(a: Expr, b: Expr) -> Expr:
    """The larger value. Where one is NaN it may be lost: the exponentials find it again."""
    return select(a < b, b, a)


def placed(values: Sequence[Expr], order: Sequence[int]) -> list[Expr]:
    """Indices or extents of a tensor's axes, as the axes of its buffer."""
    found: list[Expr] = [None] * len(order)
    for value, axis in zip(values, order, strict=True):
        found[axis] = value
    return found

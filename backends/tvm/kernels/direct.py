"""Plain loops, one task for each element or line of the result: the ops without a tuned template, and every op on a GPU.

A *task* computes one element (or one line along an axis) from beginning to end, in order, by itself. On a CPU tasks are a
loop, on a GPU threads; nothing else differs.

A task waits for each element before the next one: it is bound by the latency of a chain, not by bytes or FLOPs. A running sum of 100000
floats, 800 KB and one FLOP an element, is 100000 additions of 4 cycles, 115 us at 3.48 GHz; measured 113 us by one thread (bytes from L2
alone would be 15 us). Sorted, they take 17 passes, and a pass some 6 cycles for each element and a misprediction of 20 for every other
one, as random numbers decide nothing in advance: 27 million cycles, 7.8 ms; measured 8.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.tile import ceildiv, flat_view, if_, parallel_if_large, parameter, product
from mlec.backends.tvm.kernels.vector import (
    Cell,
    broadcast,
    cast_to,
    cells_in,
    const,
    dtype_of,
    int64,
    is_nan,
    lanes_all,
    lanes_of,
    maximum,
    minimum,
    select,
    share,
)


class Spread(Protocol):
    """Runs ``body(i)`` for each i below ``count``; ``work`` is what one task costs, in multiply-adds."""

    def __call__(self, count: Dim, work: float, body: Callable[[Expr], None]) -> None: ...


SCALAR_WORK = 32
"""What a multiply-add on single elements, one after the other, takes in the unit of `parallel_if_large`."""


def spread_on_cpu(count: Dim, work: float, body: Callable[[Expr], None]) -> None:
    """On all threads if there is enough to do."""
    parallel_if_large(count, work * SCALAR_WORK, body)


def spread_on_gpu(count: Dim, work: float, body: Callable[[Expr], None]) -> None:
    """One thread for each task, in blocks of 256."""
    wide = int64(count)
    with T.launch_thread("blockIdx.x", ceildiv(wide, 256)) as block, T.launch_thread("threadIdx.x", 256) as thread:
        index = T.bind(tirx.Cast("int64", block) * 256 + tirx.Cast("int64", thread))
        with if_(index < wide), cells_in("local"):
            body(index)


Task = Callable[[tuple[Buffer, ...], tuple[Buffer, ...], Expr], None]
"""``(flat inputs, flat outputs, number of the task)``: emits the statements of one task."""


def direct(
    name: str,
    inputs: Sequence[BufferSpec],
    outputs: Sequence[BufferSpec],
    tasks: Dim,
    work: float,
    task: Task,
    spread: Spread,
    symbols: Sequence[Expr] = (),
) -> Any:
    """A PrimFunc that runs ``tasks`` tasks. Its parameters: inputs, ``symbols`` (scalars), outputs."""
    with prim_func(name) as kernel:
        arguments = [parameter(f"x{i}", spec) for i, spec in enumerate(inputs)]
        for symbol in symbols:
            T.arg(symbol.name, symbol)
        arguments += [parameter(f"y{i}", spec) for i, spec in enumerate(outputs)]
        flat = [flat_view(b, (product(s.shape),), s.dtype) for b, s in zip(arguments, (*inputs, *outputs), strict=True)]
        sources, results = tuple(flat[: len(inputs)]), tuple(flat[len(inputs) :])
        if not (isinstance(tasks, int) and tasks == 0):
            spread(tasks, work, lambda i: task(sources, results, i))
    return kernel.func


def variable(initial: Expr) -> Cell:
    """A variable of a task."""
    return Cell(dtype_of(initial), 1, initial)


Read = Callable[[tuple[Expr, ...]], Expr]
"""The element of the operand at an index; emits what it needs."""

REDUCTIONS: dict[str, tuple[Callable[[str], Expr], Callable[[Expr, Expr], Expr]]] = {
    "sum": (lambda dtype: const(0, dtype), lambda a, b: a + b),
    "mean": (lambda dtype: const(0, dtype), lambda a, b: a + b),
    "prod": (lambda dtype: const(1, dtype), lambda a, b: a * b),
    "max": (lambda dtype: _lowest(dtype), maximum),
    "min": (lambda dtype: _highest(dtype), minimum),
    "any": (lambda dtype: const(False, "bool"), tirx.Or),
    "all": (lambda dtype: const(True, "bool"), tirx.And),
}
"""For each reduction: its start value, and how one more element joins."""


def reduce_element(op: str, extents: Sequence[Dim], dtype: str, read: Read) -> Expr:
    """The reduction over a box of these extents, element by element."""
    initial, combine = REDUCTIONS[op]
    total = variable(initial(dtype))
    over(extents, lambda indices: total.set(combine(total.value, share(cast_to(dtype, read(indices))))))
    if op != "mean":
        return total.value
    count = product(extents)
    return total.value / (const(float(count), dtype) if isinstance(count, int) else cast_to(dtype, count))


def arg_element(op: str, extent: Dim, dtype: str, read: Read) -> Expr:
    """Position of the first largest (``"argmax"``) or smallest element of a line; the first NaN wins."""
    best, at = variable(read((int64(0),))), variable(int64(0))
    with T.serial(int64(extent)) as i:
        x, old = share(read((i,))), share(best.value)
        better = share(x > old if op == "argmax" else x < old)
        if _is_float(dtype):
            better = tirx.Or(better, tirx.And(share(is_nan(x)), tirx.Not(share(is_nan(old)))))
        with if_(better if not _is_float(dtype) else tirx.And(better, tirx.Not(share(is_nan(old))))):
            best.set(x)
            at.set(i)
    return at.value


def scan_line(extent: Dim, dtype: str, read: Read, write: Callable[[Expr, Expr], None]) -> None:
    """Running sum of a line."""
    total = variable(const(0, dtype))
    with T.serial(int64(extent)) as i:
        total.set(total.value + read((i,)))
        write(i, total.value)


GROUP_VECTORS = 8
"""Vectors that `first_elements` passes over with one branch."""


def first_elements(
    extent: Dim,
    count: Dim,
    dtype: str,
    descending: bool,
    read: Read,
    values: Callable[[Expr], Expr],
    positions: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr, Expr], None],
    read_vector: Callable[[Expr], Expr] | None = None,
) -> None:
    """The ``count`` first elements of a line in sorted order, with their positions, by insertion: stable, NaN the largest.

    The result is built where it will stay: ``values(k)`` and ``positions(k)`` read it back, ``write(k, value, position)`` sets.
    With ``read_vector`` (consecutive floats from a position on), a group of vectors none of whose elements comes before the
    last one kept costs a comparison for each vector and one branch; in a line of random numbers, few groups hold one that does.
    """
    kept = variable(int64(0))

    def insert(i: Expr) -> None:
        x = share(read((i,)))
        slot = variable(share(kept.value))
        moving = variable(const(True, "bool"))
        with T.While(tirx.And(moving.value, slot.value > 0)):
            previous = share(slot.value - 1)
            with T.If(_before(x, share(values(previous)), dtype, descending)):
                with T.Then():
                    with if_(slot.value < int64(count)):
                        write(slot.value, values(previous), positions(previous))
                    slot.set(previous)
                with T.Else():
                    moving.set(const(False, "bool"))
        with if_(slot.value < int64(count)):
            write(slot.value, x, i)
        kept.set(tirx.min(kept.value + 1, int64(count)))

    if read_vector is None:
        with T.serial(int64(extent)) as i:
            insert(i)
        return
    width = lanes_of(read_vector(int64(0)))

    def wanted(vectors: Sequence[Expr]) -> Expr:
        """Whether an element of the vectors comes before the last one kept, or might: NaN is looked at one by one."""
        last = share(broadcast(share(values(int64(count) - 1)), width))
        masks = [x <= last if descending else x >= last for x in map(share, vectors)]
        return tirx.Not(share(lanes_all(reduce(tirx.And, masks))))

    def take(start: Expr, size: int) -> None:
        """Inserts ``size`` elements, whole vectors of them."""
        with T.If(kept.value < int64(count)):
            with T.Then(), T.serial(int64(size)) as j:
                insert(start + j)
            with T.Else(), if_(wanted([read_vector(start + v) for v in range(0, size, width)])):
                if size == width:
                    with T.serial(int64(size)) as j:
                        insert(start + j)
                else:
                    with T.serial(int64(size // width)) as v:
                        take(share(start + v * width), width)

    group = width * GROUP_VECTORS
    groups = int64(extent) // group
    with T.serial(groups) as g:
        take(share(g * group), group)
    vectors = (int64(extent) - groups * group) // width
    with T.serial(vectors) as v:
        take(share(groups * group + v * width), width)
    done = groups * group + vectors * width
    with T.serial(int64(extent) - done) as i:
        insert(done + i)


def merge_sort_line(
    extent: Dim,
    dtype: str,
    descending: bool,
    read: Read,
    values: Callable[[Expr], Expr],
    positions: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr, Expr], None],
) -> None:
    """A whole line sorted with its positions: stable, NaN the largest. Needs memory for one more line (CPU only).

    Runs of 1, 2, 4 ... elements are merged from the result into the spare line, which is then copied back.
    """
    length = int64(extent)
    spare = T.alloc_buffer((length,), dtype)
    spare_positions = T.alloc_buffer((length,), "int64")
    with T.serial(length) as i:
        write(i, read((i,)), i)
    run = variable(int64(1))
    with T.While(run.value < length):
        width = share(run.value)
        with T.serial(ceildiv_by(length, width * 2)) as pair:
            begin = share(pair * width * 2)
            middle = share(tirx.min(begin + width, length))
            end = share(tirx.min(begin + width * 2, length))
            a, b = variable(begin), variable(middle)
            with T.serial(end - begin) as i:
                use_b = variable(const(False, "bool"))
                with T.If(a.value >= middle):
                    with T.Then():
                        use_b.set(const(True, "bool"))
                    with T.Else(), if_(b.value < end):
                        left, right = share(values(a.value)), share(values(b.value))
                        use_b.set(_before(right, left, dtype, descending))
                with T.If(use_b.value):
                    for frame, cell in ((T.Then, b), (T.Else, a)):
                        with frame():
                            T.buffer_store(spare, values(cell.value), [begin + i])
                            T.buffer_store(spare_positions, positions(cell.value), [begin + i])
                            cell.set(cell.value + 1)
        with T.serial(length) as i:
            write(i, spare[i], spare_positions[i])
        run.set(width * 2)


def over(extents: Sequence[Dim], body: Callable[[tuple[Expr, ...]], None]) -> None:
    """Nested loops over a box."""

    def nest(done: tuple[Expr, ...]) -> None:
        if len(done) == len(extents):
            body(done)
            return
        with T.serial(int64(extents[len(done)])) as i:
            nest((*done, i))

    nest(())


def ceildiv_by(a: Expr, b: Expr) -> Expr:
    """Quotient rounded up, of two expressions."""
    return (a + b - 1) // b


# -- helpers ---------------------------------------------------------------------------------------------------------


def _before(x: Expr, y: Expr, dtype: str, descending: bool) -> Expr:
    """Whether x stands strictly before y; NaN counts as the largest."""
    if not _is_float(dtype):
        return share(x > y if descending else x < y)
    x_nan, y_nan = share(is_nan(x)), share(is_nan(y))
    later, earlier = (y_nan, x_nan) if descending else (x_nan, y_nan)
    ordered = share(x > y if descending else x < y)
    return share(tirx.Or(ordered, tirx.And(earlier, select(later, const(False, "bool"), const(True, "bool")))))


def _lowest(dtype: str) -> Expr:
    return const(-math.inf, dtype) if _is_float(dtype) else tirx.min_value(dtype)


def _highest(dtype: str) -> Expr:
    return const(math.inf, dtype) if _is_float(dtype) else tirx.max_value(dtype)


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))

"""ATen ops that move, pick, join and repeat elements, as IR ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlec.frontends.fx_context import Context, Number, lowers, to_numpy
from mlec.ir import Dim, DType, Value
from mlec.ir.op import Array

# -- views -----------------------------------------------------------------------------------------------------------


@lowers(
    "view.default", "_unsafe_view.default", "reshape.default", "view_copy.default", "squeeze.default", "squeeze.dim", "squeeze.dims",
    "unsqueeze.default", "flatten.using_ints", "unflatten.int",
)  # fmt: skip
def _reshape(c: Context, x: Value, *settings: Any, **named: Any) -> Value:
    return c.reshape(x, c.shape)


@lowers("permute.default")
def _permute(c: Context, x: Value, dims: Sequence[int]) -> Value:
    return c.transpose(x, [d % x.type.rank for d in dims])


@lowers("transpose.int", "t.default")
def _transpose(c: Context, x: Value, dim0: int = 0, dim1: int = 1) -> Value:
    return c.swap(x, dim0, dim1) if x.type.rank > 1 else x


@lowers("expand.default", "expand_as.default", "broadcast_to.default")
def _expand(c: Context, x: Value, *size: Any, **named: Any) -> Value:
    return c.broadcast(x, c.shape)


@lowers("flip.default")
def _flip(c: Context, x: Value, dims: Sequence[int]) -> Value:
    return c.b("flip", x, axes=tuple(dims)) if dims else x


# -- cutting ---------------------------------------------------------------------------------------------------------


def _position(index: Dim | None, extent: Dim, default: Dim) -> Dim:
    """A bound of a slice, counted from the front and within the axis where that can be told."""
    if index is None:
        return default
    if isinstance(index, int) and index < 0:
        index = index + extent
    if isinstance(index, int) and isinstance(extent, int):
        return min(max(index, 0), extent)
    return index


@lowers("slice.Tensor", "slice_copy.Tensor")
def _slice(
    c: Context, x: Value, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1
) -> Value:
    first = _position(start, x.type.shape[dim], 0)
    count = c.shape[dim]  # torch has worked out where the end is
    return c.take(x, dim, first, first + (count - 1) * step + 1 if count != 0 else first, step)


@lowers("select.int", "select_copy.int")
def _select(c: Context, x: Value, dim: int, index: Dim) -> Value:
    first = _position(index, x.type.shape[dim], 0)
    return c.reshape(c.take(x, dim, first, first + 1), c.shape)


@lowers(
    "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "tensor_split.sections", "split_copy.Tensor",
    "split_with_sizes_copy.default",
)  # fmt: skip
def _split(c: Context, x: Value, parts: Any, dim: int = 0) -> list[Value]:
    pieces: list[Value] = []
    at: Dim = 0
    for result in c.results:
        assert result is not None
        extent = result.shape[dim]
        pieces.append(c.take(x, dim, at, at + extent))
        at = at + extent
    return pieces


@lowers("unbind.int", "unbind_copy.int")
def _unbind(c: Context, x: Value, dim: int = 0) -> list[Value]:
    return [c.pick(x, dim, i) for i in range(len(c.results))]


@lowers("unfold.default")
def _unfold(c: Context, x: Value, dimension: int, size: int, step: int) -> Value:
    if not x.type.rank:
        return c.reshape(x, c.shape)
    axis = dimension % x.type.rank
    count = c.shape[axis]
    starts = c.b("mul", c.b("iota", shape=(count, 1), axis=0), step)
    windows = c.b("gather", x, c.b("add", starts, c.b("iota", shape=(1, size), axis=1)), axis=axis)
    order = [i for i in range(x.type.rank + 1) if i != axis + 1] + [axis + 1]
    return c.transpose(windows, order)


# -- joining ---------------------------------------------------------------------------------------------------------


@lowers("cat.default")
def _cat(c: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    # torch lets empty vectors join anything.
    parts = [c.cast(t, c.dtype) for t in tensors if t.type.shape != (0,) or c.type.rank == 1]
    return parts[0] if len(parts) == 1 else c.b("concat", *parts, axis=dim)


@lowers("stack.default")
def _stack(c: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % c.type.rank
    parts = [c.reshape(c.cast(t, c.dtype), (*t.type.shape[:axis], 1, *t.type.shape[axis:])) for t in tensors]
    return parts[0] if len(parts) == 1 else c.b("concat", *parts, axis=axis)


@lowers("slice_scatter.default")
def _slice_scatter(
    c: Context, x: Value, source: Value, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1
) -> Value:
    axis = dim % x.type.rank
    first = _position(start, x.type.shape[axis], 0)
    count = source.type.shape[axis]
    if step == 1 or count == 0:
        return _replaced(c, x, source, axis, first, first + count)
    # Where a step lands, before the end, stands what is assigned, elsewhere what was there.
    extent = x.type.shape[axis]
    ahead = c.b("sub", c.b("iota", shape=(extent,), axis=0), c.number(first, DType.I64))
    inside = c.b("logical_and", c.b("ge", ahead, 0), c.b("lt", ahead, c.number(count * step, DType.I64)))
    written = c.b("logical_and", inside, c.b("eq", c.b("mod", ahead, step), 0))
    source = c.cast(source, x.type.dtype)
    if not isinstance(count, int):  # it may be 0, and then there is nothing to pick from
        one = [int(i == axis) for i in range(x.type.rank)]
        source = c.b("pad", source, before=(0,) * x.type.rank, after=tuple(one), value=0.0, mode="constant")
    moved = c.b("gather", source, c.b("floordiv", ahead, step), axis=axis)
    return c.b("where", c.reshape(written, (extent, *[1] * (x.type.rank - axis - 1))), moved, x)


@lowers("select_scatter.default")
def _select_scatter(c: Context, x: Value, source: Value, dim: int, index: Dim) -> Value:
    axis = dim % x.type.rank
    first = _position(index, x.type.shape[axis], 0)
    row = c.reshape(source, (*x.type.shape[:axis], 1, *x.type.shape[axis + 1 :]))
    return _replaced(c, x, row, axis, first, first + 1)


def _replaced(c: Context, x: Value, source: Value, axis: int, start: Dim, stop: Dim) -> Value:
    """``x`` with ``source`` in place of ``[start, stop)``."""
    extent = x.type.shape[axis]
    pieces = [c.cast(source, x.type.dtype)]
    if start != 0:
        pieces.insert(0, c.take(x, axis, 0, start))
    if stop != extent:
        pieces.append(c.take(x, axis, stop, extent))
    return pieces[0] if len(pieces) == 1 else c.b("concat", *pieces, axis=axis)


@lowers("repeat.default", "tile.default")
def _repeat(c: Context, x: Value, repeats: Sequence[Dim]) -> Value:
    repeats = [1] * (x.type.rank - len(repeats)) + list(repeats)
    shape = (1,) * (len(repeats) - x.type.rank) + x.type.shape
    # Each axis becomes (repeat, extent), and the repeats are a broadcast.
    apart = c.reshape(x, [d for extent in shape for d in (1, extent)])
    return c.reshape(c.broadcast(apart, [d for pair in zip(repeats, shape, strict=True) for d in pair]), c.shape)


@lowers("repeat_interleave.self_int")
def _repeat_interleave(c: Context, x: Value, repeats: int, dim: int | None = None, output_size: Any = None) -> Value:
    if dim is None:
        x, dim = c.reshape(x, (x.type.size,)), 0
    axis = dim % x.type.rank
    head, extent, tail = x.type.shape[:axis], x.type.shape[axis], x.type.shape[axis + 1 :]
    apart = c.reshape(x, (*head, extent, 1, *tail))
    return c.reshape(c.broadcast(apart, (*head, extent, repeats, *tail)), c.shape)


@lowers("roll.default")
def _roll(c: Context, x: Value, shifts: Sequence[Dim], dims: Sequence[int] = ()) -> Value:
    shape = x.type.shape
    if not dims:
        x, dims = c.reshape(x, (x.type.size,)), [0]
    for shift, dim in zip(shifts, dims, strict=True):
        extent = x.type.shape[dim]
        if not isinstance(extent, int) or not isinstance(shift, int):
            places = c.b("sub", c.b("iota", shape=(extent,), axis=0), c.number(shift, DType.I64))
            x = c.b("gather", x, c.b("mod", places, c.number(extent, DType.I64)), axis=dim)
        elif extent and shift % extent:
            cut = extent - shift % extent
            x = c.b("concat", c.take(x, dim, cut, extent), c.take(x, dim, 0, cut), axis=dim)
    return c.reshape(x, shape)


@lowers("constant_pad_nd.default")
def _pad(c: Context, x: Value, pad: Sequence[Dim], value: Number = 0) -> Value:
    return _padded(c, x, pad, "constant", value)


@lowers(*(f"{kind}_pad{rank}d.default" for kind in ("reflection", "replication") for rank in (1, 2, 3)))
def _pad_mirror(c: Context, x: Value, padding: Sequence[Dim]) -> Value:
    return _padded(c, x, padding, "reflect" if "reflection" in c.target else "edge")


def _padded(c: Context, x: Value, pad: Sequence[Dim], mode: str, value: Number = 0) -> Value:
    """``pad``: (before, after) from the last axis to the first; a negative number crops."""
    before, after = [0] * x.type.rank, [0] * x.type.rank
    for i in range(len(pad) // 2):
        low, high = pad[2 * i], pad[2 * i + 1]
        if not isinstance(low, int) or not isinstance(high, int):
            raise c.unsupported(f"padding must be fixed, but it is {low}, {high}")
        axis = x.type.rank - 1 - i
        if low < 0 or high < 0:
            x = c.take(x, axis, max(-low, 0), x.type.shape[axis] - max(-high, 0))
        before[axis], after[axis] = max(low, 0), max(high, 0)
    if not any(before) and not any(after):
        return x
    if x.type.dtype.is_bool:
        wide = c.b("pad", c.cast(x, DType.U8), before=tuple(before), after=tuple(after), value=float(value), mode=mode)
        return c.cast(wide, DType.BOOL)
    return c.b("pad", x, before=tuple(before), after=tuple(after), value=float(value), mode=mode)


@lowers("pixel_shuffle.default")
def _pixel_shuffle(c: Context, x: Value, upscale_factor: int) -> Value:
    *batch, channels, height, width = x.type.shape
    r, rank = upscale_factor, len(batch)
    apart = c.reshape(x, (*batch, channels // (r * r), r, r, height, width))
    perm = [*range(rank), *(rank + i for i in (0, 3, 1, 4, 2))]
    return c.reshape(c.transpose(apart, perm), c.shape)


@lowers("pixel_unshuffle.default")
def _pixel_unshuffle(c: Context, x: Value, downscale_factor: int) -> Value:
    *batch, channels, height, width = x.type.shape
    r, rank = downscale_factor, len(batch)
    apart = c.reshape(x, (*batch, channels, height // r, r, width // r, r))
    perm = [*range(rank), *(rank + i for i in (0, 2, 4, 1, 3))]
    return c.reshape(c.transpose(apart, perm), c.shape)


@lowers("tril.default", "triu.default")
def _triangle(c: Context, x: Value, diagonal: int = 0) -> Value:
    rows, columns = x.type.shape[-2:]
    i = c.b("iota", shape=(rows, 1), axis=0)
    j = c.b("iota", shape=(1, columns), axis=1)
    kept = c.b("le" if "tril" in c.target else "ge", c.b("sub", j, i), diagonal)
    if x.type.dtype.is_bool:
        return c.b("logical_and", x, kept)
    return c.b("where", kept, x, c.number(0, x.type.dtype))


@lowers("col2im.default")
def _fold(
    c: Context, x: Value, output_size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Value:  # fmt: skip
    """Each element of the image is the sum of the entries that lie over it; which ones these are is known."""
    height, width = output_size
    lines = []  # for each axis: where an entry lies, [kernel, positions]
    for extent, k, d, p, s in zip(output_size, kernel, dilation, padding, stride, strict=True):
        count = (extent + 2 * p - d * (k - 1) - 1) // s + 1
        lines.append(np.arange(k)[:, None] * d + np.arange(count) * s - p)
    rows, columns = lines[0][:, None, :, None], lines[1][None, :, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    (entries,) = np.nonzero(inside.ravel())
    places = np.broadcast_to(rows * width + columns, inside.shape).ravel()[entries]
    order = np.argsort(places, kind="stable")
    entries, places = entries[order], places[order]
    depth = np.arange(len(places)) - np.searchsorted(places, places)
    over = np.full((int(depth.max(initial=0)) + 1, height * width), inside.size)  # the entry after the last one is 0
    over[depth, places] = entries
    batch, channels = c.shape[:-3], c.shape[-3]
    flat = c.reshape(x, (*batch, channels, inside.size))
    before = (0,) * flat.type.rank
    flat = c.b("pad", flat, before=before, after=(*before[:-1], 1), value=0.0, mode="constant")
    found = c.b("gather", flat, c.b.constant(over), axis=-1)
    return c.reshape(c.b("sum", found, axes=(-2,)), c.shape)


# -- indexing --------------------------------------------------------------------------------------------------------


@lowers("embedding.default")
def _embedding(c: Context, weight: Value, indices: Value, *settings: Any, **named: Any) -> Value:
    return c.b("gather", weight, indices, axis=0)


@lowers("_embedding_bag.default", "_embedding_bag_forward_only.default")
def _embedding_bag(
    c: Context, weight: Value, ids: Value, offsets: Value, scale_grad_by_freq: bool = False, mode: int = 0, sparse: bool = False,
    per_sample_weights: Value | None = None, include_last_offset: bool = False, padding_idx: int = -1,
) -> tuple[Value | None, ...]:  # fmt: skip
    """Bags one after another, of an exported program: every row for each bag, where those of other bags count for nothing."""
    if mode == 2:
        raise c.unsupported("the maximum of bags in an exported program", "compile the module itself")
    count, length = c.shape[0], ids.type.shape[0]
    place = c.b("iota", shape=(1, length), axis=1)
    begun = c.b("ge", place, c.reshape(c.cast(offsets, DType.I64), (offsets.type.shape[0], 1)))
    bag = c.b("sub", c.b("sum", c.cast(begun, DType.I64), axes=(0,)), 1)
    kept = c.b("eq", c.b("iota", shape=(count, 1), axis=0), bag)
    if padding_idx >= 0:
        kept = c.b("logical_and", kept, c.b("ne", ids, padding_idx))
    share = c.cast(kept, c.dtype)
    if per_sample_weights is not None:
        share = c.b("mul", share, c.cast(per_sample_weights, c.dtype))
    total = c.b("matmul", share, c.b("gather", weight, ids, axis=0))
    if mode == 1:
        total = c.b("div", total, c.b("maximum", c.b("sum", c.cast(kept, c.dtype), axes=(1,), keepdims=True), 1))
    return total, None, None, None


@lowers("index_select.default")
def _index_select(c: Context, x: Value, dim: int, index: Value) -> Value:
    if not x.type.rank:
        return x
    return c.reshape(c.b("gather", x, index, axis=dim), c.shape)


@lowers("gather.default")
def _gather(c: Context, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    if not x.type.rank:
        return c.broadcast(x, c.shape)
    axis = dim % x.type.rank
    if not index.type.rank:
        index = c.reshape(index, (1,) * x.type.rank)
    for other, extent in enumerate(index.type.shape):
        if other != axis and extent != x.type.shape[other]:
            x = c.take(x, other, 0, extent)  # torch reads only as far as the index goes
    return c.b("take_along_axis", x, index, axis=axis)


_MOST_PLACES = 1 << 20


@lowers("scatter.reduce", "scatter_reduce.two")
def _scatter_reduce(
    c: Context, x: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    """The entries that go to a place, and what is there, are reduced to one."""
    kind = {"add": "sum", "multiply": "prod", "amax": "max", "amin": "min"}.get(reduce, reduce)
    if not x.type.rank or index.type.rank != x.type.rank or not x.type.dtype.is_float:
        raise c.unsupported("needs floats with axes")
    axis = dim % x.type.rank
    for other, extent in enumerate(index.type.shape):
        if other != axis and extent != x.type.shape[other]:
            raise c.unsupported(f"the index reaches {extent} of {x.type.shape[other]} entries on axis {other}")
        source = c.take(source, other, 0, extent)
    placed = _placed(c, index, axis, x)
    neutral = c.number({"prod": 1, "max": -math.inf, "min": math.inf}.get(kind, 0), x.type.dtype)
    spread = c.b("where", placed, c.reshape(source, (*source.type.shape, 1)), neutral)
    back = _last_to(axis, x.type.rank)
    moved = c.transpose(c.b("sum" if kind == "mean" else kind, spread, axes=(axis,)), back)
    written = c.transpose(c.b("any", placed, axes=(axis,)), back)
    if include_self:
        op = {"prod": "mul", "max": "maximum", "min": "minimum"}.get(kind, "add")
        moved = c.b(op, x, moved)
    if kind == "mean":
        count = c.transpose(c.b("sum", c.cast(placed, x.type.dtype), axes=(axis,)), back)
        moved = c.b("div", moved, c.b("add", count, 1) if include_self else c.b("maximum", count, 1))
    return c.b("where", written, moved, x)


@lowers("scatter.src", "scatter.value", "scatter_add.default")
def _scatter(c: Context, x: Value, dim: int, index: Value, source: Value | Number) -> Value:
    """Which entry of ``source`` comes to stand at each place, if any, is a comparison of all entries with all places."""
    if not x.type.rank or index.type.rank != x.type.rank:
        raise c.unsupported("needs tensors with axes")
    axis = dim % x.type.rank
    for other, extent in enumerate(index.type.shape):
        if other != axis and extent != x.type.shape[other]:
            raise c.unsupported(f"the index reaches {extent} of {x.type.shape[other]} entries on axis {other}")
        if isinstance(source, Value):
            source = c.take(source, other, 0, extent)
    if not isinstance(source, Value):
        return c.b("where", _entry_at(c, index, axis, x)[0], c.number(source, x.type.dtype), x)
    if "add" in c.target:
        apart = c.reshape(source, (*source.type.shape, 1))
        moved = c.b("where", _placed(c, index, axis, x), apart, c.number(0, x.type.dtype))
        return c.b("add", x, c.transpose(c.b("sum", moved, axes=(axis,)), _last_to(axis, x.type.rank)))
    written, entry = _entry_at(c, index, axis, x)
    return c.b("where", written, c.b("take_along_axis", source, entry, axis=axis), x)


def _entry_at(c: Context, index: Value, axis: int, x: Value) -> tuple[Value, Value]:
    """For each place of ``x`` whether an entry of the index names it, and the last one that does."""
    number = c.b("add", c.b("iota", shape=(index.type.shape[axis],), axis=0, dtype=DType.I64), 1)
    number = c.reshape(number, (index.type.shape[axis], *[1] * (x.type.rank - axis)))
    last = c.b("max", c.b("where", _placed(c, index, axis, x), number, c.number(0, DType.I64)), axes=(axis,))
    last = c.transpose(last, _last_to(axis, x.type.rank))
    return c.b("gt", last, 0), c.b("maximum", c.b("sub", last, 1), 0)


def _placed(c: Context, index: Value, axis: int, x: Value) -> Value:
    """For each entry of the index and each place along the axis, which comes last, whether the entry names the place."""
    places, entries = x.type.shape[axis], index.type.shape[axis]
    if not isinstance(places, int):
        return c.b(
            "eq", c.reshape(index, (*index.type.shape, 1)), c.b("iota", shape=(places,), axis=0, dtype=index.type.dtype)
        )
    if isinstance(entries, int) and places * entries > _MOST_PLACES:
        raise c.unsupported(f"{entries} entries for {places} places are too many to compare")
    return c.b("one_hot", index, depth=places, dtype=DType.BOOL)


def _last_to(axis: int, rank: int) -> tuple[int, ...]:
    return (*range(axis), rank - 1, *range(axis, rank - 1))


@lowers("index_put.default")
def _index_put(c: Context, x: Value, indices: Sequence[Value | None], source: Value, accumulate: bool = False) -> Value:
    """``x[mask] = number``, and entries along one axis."""
    (at, *more) = [axis for axis, index in enumerate(indices) if index is not None]
    index = indices[at]
    assert index is not None
    if index.type.dtype.is_bool and not more:
        if at or accumulate or source.type.size != 1:
            raise c.unsupported("a mask picks as many elements as it has ones", "use torch.where")
        mask = c.reshape(index, (*index.type.shape, *[1] * (x.type.rank - index.type.rank)))
        return c.b("where", mask, c.reshape(source, ()), x)
    if more or index.type.rank != 1:
        raise c.unsupported("only one index, along one axis, can be written to")
    shape = (*x.type.shape[:at], *index.type.shape, *x.type.shape[at + 1 :])
    known, extent = c.constants.get(index), x.type.shape[at]
    if known is not None and isinstance(extent, int) and not accumulate:
        return _written(c, x, c.broadcast(source, shape), at, np.where(known < 0, known + extent, known), extent)
    index = _from_front(c, index, extent)
    spread = c.broadcast(c.reshape(index, (*index.type.shape, *[1] * (x.type.rank - at - 1))), shape)
    source = c.broadcast(source, shape)
    c.target = "aten.scatter_add.default" if accumulate else "aten.scatter.src"
    return _scatter(c, x, at, spread, source)


def _written(c: Context, x: Value, source: Value, axis: int, places: Array, extent: int) -> Value:
    """``x`` with entries of ``source`` at known places; of several at the same one, with the last."""
    if not places.size:
        return x
    first, stop = int(places[0]), int(places[0]) + places.size
    if np.array_equal(places, np.arange(first, stop)):
        return _replaced(c, x, source, axis, first, stop)
    entry = np.full(extent, -1)
    entry[places] = np.arange(places.size)
    moved = c.b("gather", source, c.b.constant(np.maximum(entry, 0)), axis=axis)
    if entry.min() >= 0:
        return moved
    return c.b("where", c.b.constant((entry >= 0).reshape(extent, *[1] * (x.type.rank - axis - 1))), moved, x)


@lowers("index.Tensor", "_unsafe_index.Tensor")
def _index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """Several index tensors become one index into their axes, laid out as one axis."""
    at = [axis for axis, index in enumerate(indices) if index is not None]
    picks = [index for index in indices if index is not None]
    for index in picks:
        if index.type.dtype in (DType.BOOL, DType.U8):
            raise c.unsupported(
                "indexing by a mask gives as many elements as the mask has ones",
                "shapes may not depend on values; use torch.where, or a multiplication by the mask",
            )
    adjacent = at == list(range(at[0], at[0] + len(at)))
    if not adjacent:  # then torch puts the picked axes in front
        x = c.transpose(x, [*at, *(i for i in range(x.type.rank) if i not in at)])
        at = list(range(len(at)))
    first = at[0]
    extents = x.type.shape[first : first + len(at)]
    flat: Value | None = None
    merged: Dim = 1
    for index, extent in zip(picks, extents, strict=True):
        position = _from_front(c, index, extent)
        flat = position if flat is None else c.b("add", c.b("mul", flat, c.number(extent, DType.I64)), position)
        merged = merged * extent
    assert flat is not None
    joined = c.reshape(x, (*x.type.shape[:first], merged, *x.type.shape[first + len(at) :]))
    return c.reshape(c.b("gather", joined, flat, axis=first), c.shape)


def _from_front(c: Context, index: Value, extent: Dim) -> Value:
    """Negative indices count from the end."""
    known, index = c.constants.get(index), c.cast(index, DType.I64)
    if known is not None and (known.size == 0 or known.min() >= 0):
        return index
    c.indexed.append((index, extent))
    return c.b("where", c.b("lt", index, 0), c.b("add", index, c.number(extent, DType.I64)), index)


@lowers("diagonal.default", "diagonal_copy.default")
def _diagonal(c: Context, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    first, second = dim1 % x.type.rank, dim2 % x.type.rank
    rest = [i for i in range(x.type.rank) if i not in (first, second)]
    rows, columns = c.static(x, first, "the height"), c.static(x, second, "the width")
    count = max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)
    start = max(-offset, 0) * columns + max(offset, 0)
    flat = c.reshape(c.transpose(x, [*rest, first, second]), (*(x.type.shape[i] for i in rest), rows * columns))
    places = c.b.constant(np.arange(count, dtype=np.int64) * (columns + 1) + start)
    return c.b("gather", flat, places, axis=-1)


# -- upsampling ------------------------------------------------------------------------------------------------------


@lowers(
    *(f"upsample_nearest{rank}d.vec" for rank in (1, 2, 3)),
    *(f"_upsample_nearest_exact{rank}d.vec" for rank in (1, 2, 3)),
)
def _nearest(c: Context, x: Value, output_size: Any, scale_factors: Sequence[float] | None) -> Value:
    result = x
    for i, size in enumerate(c.shape[2:]):
        extent = x.type.shape[2 + i]
        scale = scale_factors[i] if scale_factors else None
        if not isinstance(extent, int) or not isinstance(size, int):
            # As torch rounds: in float32, from the sizes or from the factor.
            pace = c.number(1 / scale, DType.F32) if scale else _ratio(c, extent, size)
            place = c.b("iota", shape=(size,), axis=0, dtype=DType.F32)
            place = c.b("add", place, 0.5) if "exact" in c.target else place
            line = c.cast(c.b("floor", c.b("mul", place, pace)), DType.I64)
            result = c.b("gather", result, line, axis=2 + i)  # which takes the last entry for one beyond it
            continue
        # torch itself says which element each position takes; its rounding is not a formula to repeat.
        numbers = torch.arange(extent, dtype=torch.float32).reshape(1, 1, -1)
        op = torch.ops.aten._upsample_nearest_exact1d if "exact" in c.target else torch.ops.aten.upsample_nearest1d
        index = to_numpy(op(numbers, None, [scale]) if scale else op(numbers, [size], None)).ravel().astype("int64")
        floors = [math.floor(j * (extent / len(index))) for j in range(len(index))]
        if index.tolist() == floors:
            target = (*result.type.shape[2 : 2 + i], size, *result.type.shape[3 + i :])
            result = c.b("resize", result, size=target, mode="nearest") if size != extent else result
        else:
            result = c.b("gather", result, c.b.constant(index), axis=2 + i)
    return result


@lowers("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec")
def _linear_resize(
    c: Context, x: Value, output_size: Any, align_corners: bool, scale_factors: Sequence[float] | None
) -> Value:
    for i, size in enumerate(c.shape[2:]):
        extent = x.type.shape[2 + i]
        scale = None if align_corners or not scale_factors else scale_factors[i]
        if not isinstance(extent, int) or not isinstance(size, int) or (scale and extent * scale != size):
            x = _interpolated(c, x, 2 + i, size, scale, align_corners)
    if x.type.shape == c.shape:
        return x
    return c.b("resize", x, size=c.shape[2:], mode="linear", align_corners=align_corners)


def _interpolated(c: Context, x: Value, axis: int, size: Dim, scale: float | None, align_corners: bool) -> Value:
    """Linear interpolation along one axis, of sizes that only the call tells, or by a factor that gives no whole number of elements."""
    extent = x.type.shape[axis]
    last = c.number(extent - 1, DType.F32)
    place = c.b("iota", shape=(size,), axis=0, dtype=DType.F32)
    if align_corners:
        steps = c.b("maximum", c.number(size - 1, DType.F32), 1)
        at = c.b("mul", place, c.b("div", last, steps))
    else:
        pace = c.number(1 / scale, DType.F32) if scale else _ratio(c, extent, size)
        at = c.b("relu", c.b("sub", c.b("mul", c.b("add", place, 0.5), pace), 0.5))
    low = c.b("minimum", c.b("floor", at), last)
    share = c.reshape(c.cast(c.b("sub", at, low), x.type.dtype), (size, *[1] * (x.type.rank - axis - 1)))
    first = c.cast(low, DType.I64)
    below, above = c.b("gather", x, first, axis=axis), c.b("gather", x, c.b("add", first, 1), axis=axis)
    rest = c.b("sub", c.number(1, x.type.dtype), share)
    return c.b("add", c.b("mul", below, rest), c.b("mul", above, share))


def _ratio(c: Context, extent: Dim, size: Dim) -> Value:
    return c.b("div", c.number(extent, DType.F32), c.number(size, DType.F32))

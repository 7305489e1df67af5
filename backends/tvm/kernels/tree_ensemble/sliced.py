"""Bit-sliced evaluation: every split of a tree is compared for a whole vector of rows, and the leaf is selected bottom-up.

The rows of a block lie column by column as ranks (see `ranks`), 64 rows of a column in one AVX-512 register. A tree is a
network of selections: the value of a split is that of its left child in the rows that go left, of its right child in the
others, and the value of a leaf is its number. There is no gather and no branch; the work grows with the number of splits, not
with the depth, which pays up to some 256 leaves. Two forms:

* complete: a tree filled up to 2**depth leaves. Which value is selected from which is then known when the program is built
  and everything stays in registers: per split one comparison, one selection and three loads.
* listed: any shape. The values lie in a table in the first-level cache, and a list says where: three further loads and a store
  for each split. For unbalanced trees, where filling up would multiply the splits.

A row is read once, 4 bytes a feature, and becomes a byte a column: 128 rows of 28 columns are 3.5 KB, in L1, and a split of a complete
tree is 8 bytes, which all rows of a block share. So neither counts but where trees lie in memory (see `SECTIONS`). 100 trees of depth 6
on 28 features, 5345 splits: 53 ns a row for the networks, 28 for ranks (two levels a column), 5 for sums, predicted 87 ns at 3 GHz,
measured 84 by one thread of 3.48; 500 trees of depth 8, 72877 splits, 1169 and 930.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, Ints, TreeEnsemble
from mlec.backends.tvm.kernels.tree_ensemble.ranks import Ranks, fill_ranks
from mlec.backends.tvm.kernels.tree_ensemble.sums import add_values
from mlec.backends.tvm.kernels.vector import Cell, broadcast, const, load, share, store, vector_type
from mlec.backends.tvm.target import TargetInfo

Expr: TypeAlias = Any
Buffer: TypeAlias = Any

VECTORS = 2
"""Vectors of rows evaluated together, so that the loads of a split serve both."""

SECTIONS = 4
"""Sections of a block, where the second-level cache has room for their ranks in its half. Expected of 16, for 26,000 trees, which are
read from memory for each block: three quarters of the time; measured: 0.98 of it (1,000 trees of depth 6: 0.93, 500 of depth 8: 1.0)."""

NETWORK_DEPTH = 6
"""Deepest network written out in full: 63 splits, each some 80 bytes of code for two vectors."""

COMPLETE_DEPTH = 8
"""Deepest tree in complete form: a loop over networks, and a small one on top."""

LISTED = 0
"""Form of a tree that is not complete; complete trees have their depth (at least 1) there."""

COMPLETE_SPLIT, LISTED_SPLIT, FAR_SPLIT = 0.0085, 0.0125, 0.022
"""Nanoseconds per split and row with 64 rows to a vector (measured at 3 GHz): complete, listed, and listed with a table of
values that is larger than half the first-level cache."""
SINGLE_VECTOR = 1.13
"""Time of a split and row where one vector is evaluated at a time, beside `VECTORS`."""
LOOKED_UP, ADDED = 0.05, 0.2
"""Nanoseconds to add the value of one tree to a row: looked up in registers by vectors, or loaded."""


@dataclass(frozen=True)
class Sliced:
    """Trees as selection networks.

    Attributes:
        ensemble, ranks: what is evaluated.
        lanes: rows to a vector.
        form: i64[T], `LISTED` or the depth of a complete tree.
        sections: of `VECTORS` vectors, in a block: so often a tree is used when it has been loaded.
        row_ns: expected time per row of a section, without that of the ranks.
    """

    ensemble: TreeEnsemble
    ranks: Ranks
    lanes: int
    form: Ints
    sections: int
    row_ns: float

    @classmethod
    def of(cls, ensemble: TreeEnsemble, ranks: Ranks | None, info: TargetInfo) -> Sliced | None:
        """None if a column has too many thresholds, or a tree too many leaves, for 16 bits."""
        layout = ensemble.layout
        most = int(layout.leaves.max(initial=0))
        if ranks is None or ensemble.trees == 0 or most > np.iinfo(np.uint16).max + 1:
            return None
        if most > np.iinfo(np.uint8).max + 1:
            ranks = replace(ranks, dtype="uint16")  # leaves are numbered in the dtype of the ranks
        lanes = info.lanes(8 * np.dtype(ranks.dtype).itemsize)
        depth = np.maximum(layout.depth, 1)
        complete = COMPLETE_SPLIT * (2.0 ** np.minimum(depth, 60) - 1)
        # Two rows of the table for each leaf: its number, and the value of a split.
        near = 2 * layout.leaves * lanes * VECTORS * np.dtype(ranks.dtype).itemsize <= info.l1_bytes // 2
        listed = np.maximum(np.where(near, LISTED_SPLIT, FAR_SPLIT) * (layout.leaves - 1), 2 * COMPLETE_SPLIT)
        form = np.where((depth <= COMPLETE_DEPTH) & (complete <= listed), depth, LISTED)
        splits_ns = float(np.where(form == LISTED, listed, complete).sum()) * 64 / lanes
        sum_ns = LOOKED_UP if _looks_up(ensemble, most, info) else ADDED * max(1, ensemble.width)
        row_ns = splits_ns + sum_ns * ensemble.trees
        section_bytes = max(1, ensemble.columns.count) * lanes * VECTORS * np.dtype(ranks.dtype).itemsize
        sections = max(1, min(SECTIONS, info.l2_bytes // 2 // section_bytes))
        return cls(ensemble, ranks, lanes, form, sections, row_ns)

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.lanes * VECTORS * self.sections

    def pack(self) -> dict[str, Array]:
        """``form`` i32[T]; ``split_at`` i32[T + 1]: where a tree's splits begin; ``splits`` i32; ``leaf_at`` i32[T + 1]: where
        its leaves begin in the table `leaf_order`.

        A split is its column (times the rows of a block) and its rank, repeated to fill 32 bits; a listed one also has the
        places of its children in the table of values. The splits of a complete tree stand level by level, first those above
        the networks, then network by network.
        """
        splits, leaves = self._parts
        return {
            "form": self.form.astype(np.int32),
            "split_at": _starts(splits),
            "leaf_at": _starts(leaves),
            "splits": np.concatenate(splits),
        }

    def leaf_order(self) -> Ints:
        """The leaf in each row of the table ``leaves``: tree by tree, those of a complete one repeated where it was filled up; then,
        because tables are loaded in whole vectors, rows that no tree uses."""
        return np.pad(np.concatenate(self._parts[1]), (0, 64))

    @cached_property
    def _parts(self) -> tuple[list[Array], list[Ints]]:
        """The words of the splits and the leaves of each tree."""
        trees = self.ensemble.trees
        split_parts: list[Array | None] = [None] * trees
        leaf_parts: list[Ints | None] = [None] * trees
        for form in np.unique(self.form):
            members = np.flatnonzero(self.form == form)
            parts = self._listed(members) if form == LISTED else self._complete(members, int(form))
            for tree, splits, leaves in zip(members, *parts, strict=True):
                split_parts[tree], leaf_parts[tree] = splits, leaves
        return [p for p in split_parts if p is not None], [p for p in leaf_parts if p is not None]

    def _split_words(self, node: Ints) -> tuple[Array, Array]:
        """Column and rank of nodes as `pack` stores them."""
        column = self.ensemble.columns.node_column[node] * self.block
        repeat = 0x01010101 if self.ranks.dtype == "uint8" else 0x00010001
        return column.astype(np.int32), (self.ranks.node_rank[node] * repeat).astype(np.uint32).view(np.int32)

    def _complete(self, trees: Ints, depth: int) -> tuple[list[Array], list[Ints]]:
        e = self.ensemble
        code = e.roots[trees].astype(np.int64)[:, None]
        levels = []
        for _ in range(depth):
            inner = code >= 0
            node = np.where(inner, code, 0)
            if e.nodes:
                levels.append(np.stack(self._split_words(node), axis=-1))
                children = np.stack([e.left[node], e.right[node]], axis=-1)
            else:
                levels.append(np.zeros((*code.shape, 2), np.int32))
                children = np.zeros((*code.shape, 2), np.int64)
            code = np.where(inner[..., None], children, code[..., None]).reshape(len(trees), -1)
        top = max(0, depth - NETWORK_DEPTH)
        networks = [level.reshape(len(trees), 2**top, -1, 2) for level in levels[top:]]
        parts = [*levels[:top], np.concatenate(networks, axis=2)]
        splits = np.concatenate([part.reshape(len(trees), -1) for part in parts], axis=1)
        return list(splits), list(~code)

    def _listed(self, trees: Ints) -> tuple[list[Array], list[Ints]]:
        layout, places = self.ensemble.layout, self.listed_leaves
        splits, leaves = [], []
        for tree in trees:
            slots = slice(layout.first[tree], layout.first[tree + 1])
            code, left = layout.code[slots], layout.left[slots] - layout.first[tree]
            leaf = code < 0
            inner = np.flatnonzero(~leaf)[::-1]  # children come before their parents, the root last
            place = np.empty(len(code), np.int64)
            place[leaf] = np.arange(leaf.sum())
            place[inner] = places + np.arange(len(inner))
            children = (place[left[inner] + side] * self.lanes * VECTORS for side in (0, 1))
            words = (*self._split_words(code[inner]), *children)
            splits.append(np.stack(words, axis=-1).astype(np.int32).reshape(-1))
            leaves.append(~code[leaf])
        return splits, leaves

    @property
    def listed_leaves(self) -> int:
        """Leaves of the largest listed tree: rows of the table of values before those of the splits."""
        return int(self.ensemble.layout.leaves[self.form == LISTED].max(initial=0))

    def emit(
        self, packed: dict[str, Buffer], x: Buffer, out: Buffer, first: Expr, rows: Expr, vectors: int, info: TargetInfo
    ) -> None:
        """Emit the evaluation of ``rows`` rows from ``first``: at most a block, in sections of `VECTORS` vectors, or at most
        one vector."""
        e, dtype = self.ensemble, self.ranks.dtype
        rows = T.bind(rows)
        section = vectors * self.lanes
        codes = T.alloc_buffer((max(1, e.columns.count) * self.block,), dtype)
        chosen = T.alloc_buffer((section,), dtype)
        sums = Sums(e, packed, self.block, info)
        fill_ranks(e, self.ranks, packed, info.lanes(np.dtype(e.dtype).itemsize * 8), x, first, rows, codes, self.block)
        sums.start(rows)
        listed = _Listed(self, vectors) if self.listed_leaves else None
        forms = [int(form) for form in np.unique(self.form)]
        with T.serial(e.trees) as tree:
            at, leaves, output = (T.bind(packed[name][tree]) for name in ("split_at", "leaf_at", "output"))

            def evaluate(form: int, row: Expr) -> None:
                network = _Network(self, packed["splits"], codes, row, vectors)
                if form == LISTED:
                    assert listed is not None
                    listed.emit(network, at, (packed["split_at"][tree + 1] - at) >> 2, chosen)
                else:
                    network.emit_complete(at, form, chosen)
                sums.add(chosen, row, section, leaves, output, 2**form if form != LISTED else self.listed_leaves)

            def evaluate_sections(form: int) -> None:
                if vectors == 1:
                    evaluate(form, 0)
                    return
                with T.serial((rows + (section - 1)) // section) as s:
                    evaluate(form, T.bind(s * section))

            def one_of(forms: list[int]) -> None:
                if len(forms) == 1:
                    evaluate_sections(forms[0])
                    return
                with T.If(packed["form"][tree] == forms[0]):
                    with T.Then():
                        evaluate_sections(forms[0])
                    with T.Else():
                        one_of(forms[1:])

            one_of(forms)
        sums.finish(out, first, rows)


class _Network:
    """The program that selects the leaves of ``vectors`` vectors of rows, from ``row`` of the block on."""

    def __init__(self, plan: Sliced, splits: Buffer, codes: Buffer, row: Expr, vectors: int) -> None:
        self.plan, self.splits, self.codes, self.row, self.vectors = plan, splits, codes, row, vectors
        self.dtype, self.lanes = plan.ranks.dtype, plan.lanes
        self.rank = Cell(self.dtype, self.lanes)

    def goes_left(self, at: Expr) -> list[Expr]:
        """Masks of the split at ``at``, one for each vector; overwrites ``rank``."""
        words = 4 // np.dtype(self.dtype).itemsize
        repeated = broadcast(self.splits[at + 1], self.lanes // words)
        self.rank.set(tirx.reinterpret(vector_type(self.dtype, self.lanes), repeated))
        # Not a bound name: TVM's time grows with the square of their number.
        rows = [self.splits[at] + self.row + v * self.lanes for v in range(self.vectors)]
        return [load(self.codes, [row], self.lanes) < self.rank.value for row in rows]

    def emit_complete(self, at: Expr, depth: int, chosen: Buffer) -> None:
        """Store the number of the leaf of each row."""
        top = max(0, depth - NETWORK_DEPTH)
        if top == 0:
            for v, number in enumerate(self._select(at, depth, self._number)):
                store(chosen, number, [v * self.lanes])
            return
        section = self.lanes * self.vectors
        parts = T.alloc_buffer((2**top * section,), self.dtype)
        words = 2 * (2**NETWORK_DEPTH - 1)
        with T.serial(2**top) as part:
            begin = T.bind(at + 2 * (2**top - 1) + part * words)
            leaves_before = broadcast(tirx.Cast(self.dtype, part << NETWORK_DEPTH), self.lanes)
            for v, number in enumerate(self._select(begin, NETWORK_DEPTH, self._number)):
                store(parts, number + leaves_before, [part * section + v * self.lanes])

        def part_value(leaf: int) -> list[Expr]:
            return [load(parts, [leaf * section + v * self.lanes], self.lanes) for v in range(self.vectors)]

        for v, number in enumerate(self._select(at, top, part_value)):
            store(chosen, number, [v * self.lanes])

    def _number(self, leaf: int) -> list[Expr]:
        return [const(leaf, self.dtype, self.lanes)] * self.vectors

    def _select(self, at: Expr, depth: int, leaf_value: Callable[[int], list[Expr]]) -> list[Expr]:
        """The value of the leaf each row ends at, of a complete tree whose splits begin at ``at``."""
        splits = 2**depth - 1
        # Depth first, two values are alive on each level, so that few cells do.
        cells = [[[Cell(self.dtype, self.lanes) for _ in range(self.vectors)] for _ in "lr"] for _ in range(depth)]

        def value(node: int, level: int) -> list[Expr]:
            if node >= splits:
                return leaf_value(node - splits)
            left, right = value(2 * node + 1, level + 1), value(2 * node + 2, level + 1)
            mine = cells[level][node % 2]
            for cell, mask, a, b in zip(mine, self.goes_left(at + 2 * node), left, right, strict=True):
                cell.set(tirx.Select(mask, a, b))
            return [cell.value for cell in mine]

        return value(0, 0)


class _Listed:
    """The table of values of listed trees: first the numbers of the leaves, then the values of the splits."""

    def __init__(self, plan: Sliced, vectors: int) -> None:
        self.plan = plan
        self.table = T.alloc_buffer((2 * plan.listed_leaves * plan.lanes * VECTORS,), plan.ranks.dtype)
        with T.serial(plan.listed_leaves) as leaf:
            number = broadcast(tirx.Cast(plan.ranks.dtype, leaf), plan.lanes)
            for v in range(vectors):
                store(self.table, number, [leaf * plan.lanes * VECTORS + v * plan.lanes])

    def emit(self, network: _Network, at: Expr, count: Expr, chosen: Buffer) -> None:
        """Store the number of the leaf of each row, of a tree of ``count`` splits."""
        lanes, table, splits = self.plan.lanes, self.table, network.splits
        first, pitch = self.plan.listed_leaves * lanes * VECTORS, lanes * VECTORS
        with T.serial(count) as i:
            word = T.bind(at + 4 * i)
            left, right = T.bind(splits[word + 2]), T.bind(splits[word + 3])
            for v, mask in enumerate(network.goes_left(word)):
                a, b = (load(table, [child + v * lanes], lanes) for child in (left, right))
                store(table, tirx.Select(mask, a, b), [first + i * pitch + v * lanes])
        for v in range(network.vectors):
            store(chosen, load(table, [first + (count - 1) * pitch + v * lanes], lanes), [v * lanes])


class Sums:
    """The sums of a block of rows: column by column for single values, row by row for vectors of values."""

    def __init__(self, ensemble: TreeEnsemble, packed: dict[str, Buffer], pitch: int, info: TargetInfo) -> None:
        self.ensemble, self.packed, self.pitch = ensemble, packed, pitch
        self.sums = T.alloc_buffer((ensemble.outputs * pitch,), ensemble.value_dtype)
        self.lanes = info.lanes(np.dtype(ensemble.value_dtype).itemsize * 8)
        self.info = info

    def _at(self, row: Expr, output: Expr) -> Expr:
        return output * self.pitch + row if self.ensemble.width == 1 else row * self.ensemble.outputs + output

    def start(self, rows: Expr) -> None:
        with T.serial(self.ensemble.outputs) as k, T.serial(rows) as r:
            T.buffer_store(self.sums, self.packed["base"][k], [self._at(r, k)])

    def add(self, chosen: Buffer, first: Expr, rows: int, leaves: Expr, output: Expr, count: int) -> None:
        """Emit the addition of leaf ``leaves + chosen[r]`` to each of ``rows`` rows from ``first`` on; ``count`` leaves can
        be chosen."""
        width, sums = self.ensemble.width, self.sums
        if _looks_up(self.ensemble, count, self.info):
            tables = [
                share(load(self.packed["leaves"], [leaves + i * self.lanes, 0], self.lanes))  # of rows of one value
                for i in range(-(-count // self.lanes))
            ]
            with T.serial(rows // self.lanes) as i:
                row = i * self.lanes
                number = share(tirx.Cast(vector_type(_INDEX[self.lanes], self.lanes), load(chosen, [row], self.lanes)))
                value = _look_up(tables, number, self.lanes, self.ensemble.value_dtype)
                at = self._at(first + row, output)
                store(sums, load(sums, [at], self.lanes) + value, [at])
            return
        with T.serial(rows) as r:
            leaf = T.bind(leaves + tirx.Cast("int32", chosen[r]))
            if "leaf_row" in self.packed:
                leaf = T.bind(tirx.Cast("int32", self.packed["leaf_row"][leaf]))
            at = self._at(first + r, output)
            add_values(sums, at, width, self.lanes, lambda v, n: load(self.packed["leaves"], [leaf, v], n))

    def finish(self, out: Buffer, first: Expr, rows: Expr) -> None:
        with T.serial(rows) as r, T.serial(self.ensemble.outputs) as k:
            T.buffer_store(out, self.sums[self._at(r, k)], [first + r, k])


def _looks_up(ensemble: TreeEnsemble, leaves: int, info: TargetInfo) -> bool:
    """Whether the values of a tree of so many leaves are looked up in registers."""
    lanes = info.lanes(np.dtype(ensemble.value_dtype).itemsize * 8)
    return ensemble.width == 1 and info.vector_bits == 512 and "avx512f" in info.features and leaves <= 4 * lanes


_INDEX = {16: "int32", 8: "int64"}
_PERMUTE = {16: ("llvm.x86.avx512.permvar.sf.512", "llvm.x86.avx512.vpermi2var.ps.512"),
            8: ("llvm.x86.avx512.permvar.df.512", "llvm.x86.avx512.vpermi2var.pd.512")}  # fmt: skip


def _look_up(tables: list[Expr], number: Expr, lanes: int, dtype: str) -> Expr:
    """Elements ``number`` of the concatenated vectors (at most four)."""
    one, two = _PERMUTE[lanes]
    kind = vector_type(dtype, lanes)
    if len(tables) == 1:
        return T.call_llvm_pure_intrin(kind, one, tables[0], number)
    pairs = [
        share(T.call_llvm_pure_intrin(kind, two, tables[i], number, tables[min(i + 1, len(tables) - 1)]))
        for i in range(0, len(tables), 2)
    ]
    if len(pairs) == 1:
        return pairs[0]
    return tirx.Select(number < const(2 * lanes, _INDEX[lanes], lanes), *pairs)


def _starts(parts: Sequence[Array]) -> Array:
    """Where each part begins in their concatenation, and where the last one ends."""
    return np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)

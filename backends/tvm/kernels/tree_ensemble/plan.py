"""Which strategy evaluates an ensemble, and the arrays it wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np

from mlec.backends.tvm.kernels.schedule import around
from mlec.backends.tvm.kernels.tile import SERIAL_WORK
from mlec.backends.tvm.kernels.tree_ensemble.columns import pack_columns
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, Ints, TreeEnsemble, narrow
from mlec.backends.tvm.kernels.tree_ensemble.ranked import Ranked
from mlec.backends.tvm.kernels.tree_ensemble.ranks import Ranks
from mlec.backends.tvm.kernels.tree_ensemble.sliced import LISTED, SINGLE_VECTOR, VECTORS, Sliced
from mlec.backends.tvm.kernels.tree_ensemble.times import TreeTimes
from mlec.backends.tvm.kernels.tree_ensemble.walk import LANES, pack_walk
from mlec.backends.tvm.target import TargetInfo
from mlec.wording import plural

# Measured on a 3 GHz AVX-512 processor with the tree in the first-level cache.
STEP_NS = 0.7  # one step of one walk, several in flight
ALONE_STEP_NS = 0.9  # the same where the walks are those of one row
ALONE_RANK_FACTOR = 2.0  # ranks of one row beside those of a row in a block
COLUMN_NS = 0.6  # copying a value into its column by itself
COPY_NS = 0.35  # and with those beside it, mostly the loads of a wide row
RANK_LEVEL_NS = 0.5  # one level of the search for a rank
LINE_NS = 0.15  # what a cache line takes longer from the second-level cache, with several walks in flight
FAR_LINE_NS = 1.6  # and from beyond it
LINE_BYTES = 64

DISPATCH_NS = SERIAL_WORK // 100
"""Nanoseconds below which waking threads costs more than it gains."""

MAX_BLOCK = 256
"""Rows for which a tree is loaded once by walks."""


@dataclass(frozen=True)
class TreeSchedule:
    """How an ensemble is evaluated.

    Attributes:
        strategy: of blocks: ``"walk"`` or ``"sliced"``.
        ranked: whether the walks of single rows compare ranks.
        block: rows of a block.
    """

    strategy: str
    ranked: bool
    block: int

    @staticmethod
    def candidates(plan: Plan, info: TargetInfo) -> Iterator[TreeSchedule]:
        """The plan's own, then those that its ensemble allows: ranks and networks need few thresholds to a column, networks few leaves."""
        own = plan.schedule
        yield own
        ranks = Ranks.of(plan.ensemble)
        sliced = Sliced.of(plan.ensemble, ranks, info)
        blocks = {"walk": _walk_block(plan.ensemble, info)} | ({} if sliced is None else {"sliced": sliced.block})
        unit = {"walk": LANES, "sliced": 1 if sliced is None else sliced.lanes * VECTORS}
        walks = (True, False) if Ranked.of(plan.ensemble, ranks) is not None else (False,)
        usual = [TreeSchedule(strategy, ranked, block) for strategy, block in blocks.items() for ranked in walks]
        wider = [replace(s, block=block) for s in usual for block in around(s.block) if block % unit[s.strategy] == 0]
        yield from sorted(
            {s: None for s in (*usual, *wider) if s != own},
            key=lambda s: sum(a != b for a, b in zip(astuple(s), astuple(own), strict=True)),
        )


@dataclass(frozen=True)
class Plan:
    """How an ensemble is evaluated.

    Attributes:
        ensemble: what is evaluated.
        sliced: the networks that evaluate blocks of rows; None: blocks are evaluated by walks.
        ranked: the walks over ranks that evaluate single rows; None: walks over numbers do.
        packed: further arguments of the kernel, in order, between the rows and the result.
        block: rows of a block; one thread works on a block at a time.
        block_rows: rows from which blocks are used; fewer go one by one.
        parallel_rows: rows from which blocks are given to several threads.
        walk_ns, sliced_ns: expected time per row in blocks, of both strategies.
        number_ns, ranked_ns: expected time of a row that goes alone, by walks over numbers and over ranks. What is impossible takes
            infinitely long.
        cores: of the processor.
    """

    ensemble: TreeEnsemble
    sliced: Sliced | None
    ranked: Ranked | None
    packed: dict[str, Array]
    block: int
    block_rows: int
    parallel_rows: int
    walk_ns: float
    sliced_ns: float
    number_ns: float
    ranked_ns: float
    cores: int

    @property
    def strategy(self) -> str:
        """``"walk"`` or ``"sliced"``."""
        return "walk" if self.sliced is None else "sliced"

    @property
    def schedule(self) -> TreeSchedule:
        """What was decided."""
        return TreeSchedule(self.strategy, self.ranked is not None, self.block)

    @property
    def row_times(self) -> TreeTimes:
        """What the kernel is expected to take."""
        alone = self.number_ns if self.ranked is None else self.ranked_ns
        splits = "slots" if self.sliced is None else "splits"
        read = self.packed[splits].nbytes if splits in self.packed else 0  # there need be no tree
        if self.sliced is None:
            block, tile, filled, row, single = (self.block, LANES), LANES, self.walk_ns, 0.0, 1.0
        else:
            lanes, filled = self.sliced.lanes, self.sliced.row_ns
            block, tile, row, single = (lanes, lanes), lanes * VECTORS, self.sliced_ns - filled, SINGLE_VECTOR
        return TreeTimes(
            alone, filled, row, self.block_rows, self.parallel_rows, self.block, tile, *block, single, read, self.cores
        )

    def explain(self) -> str:
        """What was picked and why, for the report: the choices with what each candidate is expected to take, then the facts."""
        e = self.ensemble
        depths = e.layout.depth
        depth = f"depth {int(depths.max(initial=0))} (mean {float(depths.mean()) if e.trees else 0.0:.1f})"
        blocks = {"interleaved walks": self.walk_ns, "bit-sliced networks": self.sliced_ns}
        alone = {"walks": self.number_ns, "walks over ranks": self.ranked_ns}
        parts = [
            f"{_chosen(blocks, self.sliced is not None)}, in blocks of {plural(self.block, 'row')}",
            f"fewer than {plural(self.block_rows, 'row')} one by one: {_chosen(alone, self.ranked is not None)}",
            f"threads from {plural(self.parallel_rows, 'row')}",
            f"{plural(e.trees, 'tree')}, {plural(e.nodes, 'split')}, {depth}",
            f"{plural(e.columns.count, 'column')} of {plural(e.features, 'feature')}, {plural(e.outputs, 'output')}, {e.dtype} rows",
        ]
        if self.sliced is not None:
            complete = int((self.sliced.form != LISTED).sum())
            parts.append(f"{self.sliced.ranks.dtype} ranks, {complete} complete and {e.trees - complete} listed trees")
        parts.append(f"{sum(a.nbytes for a in self.packed.values()) / 1024:.0f} KiB packed")
        return "; ".join(parts)


def _chosen(candidates: dict[str, float], second: bool) -> str:
    """The name of the candidate that was chosen and its expected time, and those of the other one."""
    (name, ns), (other, other_ns) = list(candidates.items())[:: -1 if second else 1]
    rest = f"{other} are impossible" if np.isinf(other_ns) else f"{other} {other_ns:.0f} ns"
    return f"{name} (expected {ns:.0f} ns a row, {rest})"


def prepare(
    ensemble: TreeEnsemble,
    info: TargetInfo,
    strategy: str | None = None,
    ranked: bool | None = None,
    block: int | None = None,
) -> Plan:
    """Choose a strategy for the processor ``info`` and pack the arrays for it. Linear in the number of nodes.

    Args:
        strategy: ``"walk"`` or ``"sliced"`` where blocks are not to be evaluated by expected time.
        ranked: the same for single rows: whether walks compare ranks (where there are any).
        block: rows of a block where caches are not to decide: a multiple of what the strategy takes at a time.

    Raises:
        LoweringError: ``E_TREE_ARRAYS`` for arrays that contradict each other.
    """
    steps = float(ensemble.layout.depth.sum())
    columns = ensemble.columns.count
    copies = (
        (COPY_NS if ensemble.columns.consecutive(a, b) else COLUMN_NS) * (b - a)
        for _, a, b in ensemble.columns.ranges()
    )
    columns_ns = sum(copies)
    walk_ns = STEP_NS * steps + columns_ns + 1
    slots = len(ensemble.layout.code)
    number_ns = ALONE_STEP_NS * steps + columns_ns + _misses_ns(ensemble, 16 * slots, info) + 1
    ranks = Ranks.of(ensemble)
    lanes = info.lanes(np.dtype(ensemble.dtype).itemsize * 8)
    rank_ns = RANK_LEVEL_NS * columns * ranks.levels(ensemble, lanes) if ranks is not None else 0.0
    sliced = Sliced.of(ensemble, ranks, info)
    sliced_ns = float("inf") if sliced is None else sliced.row_ns + rank_ns + 1
    if strategy == "walk" or (strategy is None and walk_ns <= sliced_ns):
        sliced = None
    elif block is not None and sliced is not None:
        sliced = replace(sliced, sections=block // (sliced.lanes * VECTORS))
    walks = Ranked.of(ensemble, ranks)
    ranked_ns = float("inf")
    if walks is not None:
        missed = _misses_ns(ensemble, walks.field // 2 * slots, info)
        ranked_ns = walks.row_ns + ALONE_RANK_FACTOR * rank_ns + missed + 1
    if ranked is False or (ranked is None and number_ns <= ranked_ns):
        walks = None
    row_ns = number_ns if walks is None else ranked_ns

    packed = pack_columns(ensemble)
    table, rows = _pack_leaves(ensemble, sliced, info)
    packed |= table
    packed["output"] = ensemble.output.astype(np.int32)
    packed["base"] = ensemble.base
    if sliced is None or walks is None:
        packed |= pack_walk(ensemble, rows)
    if sliced is not None:
        packed |= sliced.ranks.pack(ensemble, lanes) | sliced.pack()
    if walks is not None:
        packed |= walks.ranks.pack(ensemble, lanes) | walks.pack(rows)
    if sliced is None:
        block, block_rows, block_ns = block or _walk_block(ensemble, info), LANES, walk_ns
    else:
        block, block_ns = sliced.block, sliced_ns
        block_rows = 1 + int(sliced_ns * sliced.lanes / row_ns)  # what one vector of rows costs, in rows
    packed = {name: np.ascontiguousarray(a) for name, a in packed.items() if a.size}
    parallel = max(block_rows, 2 * LANES, int(DISPATCH_NS / block_ns) + 1)
    times = walk_ns, sliced_ns, number_ns, ranked_ns
    return Plan(ensemble, sliced, walks, packed, block, block_rows, parallel, *times, info.cores)


def _pack_leaves(ensemble: TreeEnsemble, sliced: Sliced | None, info: TargetInfo) -> tuple[dict[str, Array], Ints]:
    """``leaves`` [rows, V], the one table of leaves, and where each leaf is in it, i64[L].

    It is in the order of the networks, which is all that they know. Where few leaves differ, each is there once, and ``leaf_row``
    i16|i32 says where those of the networks are: one more load for a row and tree, but all leaves are in the first-level cache. (100
    trees of 155 leaves, 10 of which differ, 10 values each: 1.22 MiB -> 31 KiB; measured: a row alone 0.97 of the time, 4 rows 0.92,
    4096 rows 0.96.)
    """
    few = _few_leaves(ensemble, info)
    if few is not None and (sliced is None or ensemble.width > 1):
        table, rows = few
        of_networks = {} if sliced is None else {"leaf_row": narrow(rows[sliced.leaf_order()])}
        return {"leaves": table, **of_networks}, rows
    order = np.arange(ensemble.leaves) if sliced is None else sliced.leaf_order()
    rows = np.zeros(ensemble.leaves, np.int64)
    rows[order[::-1]] = np.arange(len(order))[::-1]
    return {"leaves": ensemble.values if sliced is None else ensemble.values[order]}, rows


def _few_leaves(ensemble: TreeEnsemble, info: TargetInfo) -> tuple[Array, Ints] | None:
    """The distinct leaves, and which of them each leaf is, where they are few: half of all at most, and an eighth of the first-level
    cache, which is for the ranks and the values of splits. (With two fifths of it, networks were not faster.)
    """
    table, rows = ensemble.distinct
    few = 2 * len(table) <= int(ensemble.layout.leaves.sum()) and 8 * table.nbytes <= info.l1_bytes
    return (table, rows) if few else None


def _misses_ns(ensemble: TreeEnsemble, slot_bytes: int, info: TargetInfo) -> float:
    """What a row that goes alone takes longer where its trees are not in the first-level cache: a line for each step and leaf."""
    few = _few_leaves(ensemble, info)
    whole = slot_bytes + (ensemble.values if few is None else few[0]).nbytes
    value_bytes = ensemble.width * ensemble.values.itemsize
    lines = float(ensemble.layout.depth.sum()) + ensemble.trees * (1 + value_bytes / LINE_BYTES)
    levels = ((LINE_NS, info.l1_bytes), (FAR_LINE_NS, info.l2_bytes))
    return lines * sum(ns * max(0.0, 1 - held / whole) for ns, held in levels if whole)


def _walk_block(ensemble: TreeEnsemble, info: TargetInfo) -> int:
    """Rows whose columns stay in a quarter of the second-level cache."""
    row_bytes = (ensemble.columns.count + 1) * ensemble.threshold.itemsize
    return max(2 * LANES, min(MAX_BLOCK, _power_of_two(info.l2_bytes // 4 // row_bytes)))


def _power_of_two(n: int) -> int:
    """The largest power of two up to ``n`` (1 for less)."""
    return 1 << max(n, 1).bit_length() - 1

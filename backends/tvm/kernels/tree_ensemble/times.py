"""How long an ensemble is expected to take, for any number of rows: the same steps as in `kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mlec.backends.base import Speeds


@dataclass(frozen=True)
class TreeTimes:
    """Nanoseconds, on a processor of 3 GHz with the trees of a block in its second-level cache.

    Attributes:
        alone_ns: of a row that goes alone.
        filled_ns: of a row of a tile, whether there is one or not.
        row_ns: of a row in a block, besides.
        block_rows, parallel_rows: rows from which blocks are used, and from which they are given to several threads.
        block, tile: rows of a block, and those that are evaluated together.
        single_block, single_tile: the same on one thread.
        single_factor: what ``filled_ns`` is to be multiplied with there.
        tree_bytes: of the splits, which are read for each block.
        cores: into so many shares the rows are cut at least.
    """

    alone_ns: float
    filled_ns: float
    row_ns: float
    block_rows: int
    parallel_rows: int
    block: int
    tile: int
    single_block: int
    single_tile: int
    single_factor: float
    tree_bytes: int
    cores: int

    def seconds(self, rows: int, threads: int, machine: Speeds) -> float:
        """Of one call, without the overhead of that."""
        if rows < self.block_rows:
            return 1e-9 * rows * self.alone_ns / machine.clock
        if rows < self.parallel_rows:
            size, tile, factor, threads = self.single_block, self.single_tile, self.single_factor, 1
        else:
            share = ceil(ceil(rows / self.cores) / self.tile) * self.tile
            size, tile, factor = min(share, self.block), self.tile, 1.0
        loading = self.tree_bytes / machine.traffic(self.tree_bytes)

        def of_block(count: int) -> float:
            ns = ceil(count / tile) * tile * factor * self.filled_ns + count * self.row_ns
            return 1e-9 * ns / machine.clock + loading

        blocks = ceil(rows / size)
        used = min(threads, blocks)
        if used > 1:
            return ceil(blocks / used) * of_block(size) + machine.dispatch_seconds
        return (blocks - 1) * of_block(size) + of_block(rows - (blocks - 1) * size)

"""Recurrent layers (LSTM, GRU, plain) over a whole sequence in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import sigmoid, tanh
from mlec.backends.tvm.kernels.tile import RegisterTile, bits, ceildiv, parallel_if_large, parameter
from mlec.backends.tvm.kernels.vector import const, load, select, share, store
from mlec.backends.tvm.target import TargetInfo

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
ROWS = 4
"""Sequences a task advances together: their sums times four gates fill 16 registers."""
STEPS = 8
"""Time steps whose input products are computed at once."""


def pack_recurrent(weights: npt.NDArray[np.generic], gates: int, lanes: int) -> npt.NDArray[np.generic]:
    """Weights ``[gates * h, k]`` as ``[ceil(h / lanes), k, gates * lanes]``: the gates of the same units side by side.

    Biases ``[gates * h]`` are packed as one-column weights, to ``[ceil(h / lanes), 1, gates * lanes]``.
    """
    columns = weights.reshape(weights.shape[0], -1)
    hidden, k = columns.shape[0] // gates, columns.shape[1]
    blocks = -(-hidden // lanes)
    padded = np.zeros((gates, blocks * lanes, k), weights.dtype)
    padded[:, :hidden] = columns.reshape(gates, hidden, k)
    return np.ascontiguousarray(padded.reshape(gates, blocks, lanes, k).transpose(1, 3, 0, 2).reshape(blocks, k, -1))


def recurrent_lanes(dtype: str, target: TargetInfo) -> int:
    """Units in a block of packed weights."""
    return target.lanes(bits(dtype))


def recurrent(
    kind: str,
    n: Dim,
    steps: Dim,
    features: int,
    hidden: int,
    reverse: bool,
    dtype: str,
    target: TargetInfo,
    activation: str = "tanh",
    name: str = "",
) -> tirx.PrimFunc:
    """One direction of one layer; ``kind`` is ``lstm``, ``gru`` or ``rnn``. float32 or float64; n and steps may be
    symbolic.

    Parameters of the program: x ``[n, steps, features]``, h0 ``[n, hidden]`` (lstm: c0 too), w_ih and w_hh packed by
    `pack_recurrent`, the biases packed (gru: b_ih and b_hh; else one), y ``[n, steps, hidden]``, h_n (lstm: c_n too).

    A task is up to four sequences. It first multiplies eight steps of input by w_ih (a tile of eight rows, so those
    weights are read once for eight steps), then advances step by step: for each block of units a tile ``rows x
    gates`` runs over the previous state, then the gate functions and the update of the state over rows and blocks.
    Fewer sequences run one by one, two blocks at once for enough independent sums. Threads share out sequences; a
    step reads ``gates * hidden²`` weights from L2 once for all rows of the task.
    """
    gates = GATES[kind]
    lanes = target.lanes(bits(dtype))
    blocks, wide = -(-hidden // lanes), gates * lanes
    biases = 2 if kind == "gru" else 1
    states = ("h", "c") if kind == "lstm" else ("h",)
    state_spec = BufferSpec((n, hidden), dtype)

    with prim_func(name or kind) as kernel:
        x = parameter("x", BufferSpec((n, steps, features), dtype))
        initial = [parameter(f"{s}0", state_spec) for s in states]
        w_ih = parameter("w_ih", BufferSpec((blocks, features, wide), dtype))
        w_hh = parameter("w_hh", BufferSpec((blocks, hidden, wide), dtype))
        bias = [parameter(f"b{i}", BufferSpec((blocks, 1, wide), dtype)) for i in range(biases)]
        y = parameter("y", BufferSpec((n, steps, hidden), dtype))
        final = [parameter(f"{s}n", state_spec) for s in states]

        def task(index: Expr) -> None:
            first = share(index * ROWS)
            # The state is held twice: a step reads one half and writes the other.
            state = [T.alloc_buffer((2, ROWS, blocks * lanes), dtype) for _ in states]
            fed = T.alloc_buffer((ROWS, STEPS, blocks, wide), dtype)
            back = T.alloc_buffer((ROWS, blocks, wide), dtype)
            rows = share(tirx.min(ROWS, n - first))
            for buffer, source in zip(state, initial, strict=True):
                with T.grid(rows, hidden) as (i, j):
                    T.buffer_store(buffer, source[first + i, j], [0, i, j])
            with T.serial(ceildiv(steps, STEPS)) as chunk:
                start = share(chunk * STEPS)
                count = share(tirx.min(STEPS, steps - start))
                with T.serial(rows) as i, T.serial(blocks) as block, T.If(count == STEPS):
                    with T.Then():
                        feed(fed, i, first + i, 0, start, block, STEPS)
                    with T.Else(), T.serial(count) as s:
                        feed(fed, i, first + i, s, start + s, block, 1)
                with T.serial(count) as s:
                    step(rows, first, state, fed, back, s, start + s)
            for buffer, result in zip(state, final, strict=True):
                with T.grid(rows, hidden) as (i, j):
                    T.buffer_store(result, buffer[steps % 2, i, j], [first + i, j])

        def time(turn: Expr) -> Expr:
            return steps - 1 - turn if reverse else turn

        def feed(fed: Buffer, i: Expr, row: Expr, s: Expr, turn: Expr, block: Expr, count: int) -> None:
            """Input products of ``count`` steps of one sequence, for one block of units."""
            vectors = 2 if gates % 2 == 0 else 1
            with T.serial(gates // vectors) as part:
                column = share(part * (vectors * lanes))
                sums = RegisterTile(count, vectors, lanes, dtype)
                with T.serial(features) as k:
                    sums.multiply_add(
                        [x[row, time(turn + r), k] for r in range(count)],
                        [load(w_ih, [block, k, column + g * lanes], lanes) for g in range(vectors)],
                    )
                for r in range(count):
                    for g in range(vectors):
                        at = column + g * lanes
                        store(fed, sums.value(r, g) + load(bias[0], [block, 0, at], lanes), [i, s + r, block, at])

        def step(rows: Expr, first: Expr, state: list[Buffer], fed: Buffer, back: Buffer, s: Expr, turn: Expr) -> None:
            old, new = share(turn % 2), share((turn + 1) % 2)
            recur(rows, state[0], old, back)
            with T.grid(rows, blocks) as (i, block):
                fed_back = [load(back, [i, block, g * lanes], lanes) for g in range(gates)]
                forward = [load(fed, [i, s, block, g * lanes], lanes) for g in range(gates)]
                before = [load(buffer, [old, i, block * lanes], lanes) for buffer in state]
                for buffer, value in zip(state, advance(forward, fed_back, before), strict=True):
                    store(buffer, value, [new, i, block * lanes])
            with T.serial(rows) as i:
                copy(y, [first + i, time(turn)], state[0], [new, i])

        def recur(rows: Expr, h: Buffer, old: Expr, back: Buffer) -> None:
            """Products of the previous state with w_hh: all rows of a full task at once, else one by one."""

            def units(first: Expr, count: int, block: Expr, group: int) -> None:
                sums = RegisterTile(count, group * gates, lanes, dtype)
                with T.serial(hidden) as k:
                    sums.multiply_add(
                        [h[old, first + i, k] for i in range(count)],
                        [load(w_hh, [block + b, k, g * lanes], lanes) for b in range(group) for g in range(gates)],
                    )
                for i in range(count):
                    for b in range(group):
                        for g in range(gates):
                            value = sums.value(i, b * gates + g)
                            if kind == "gru":
                                value = value + load(bias[1], [block + b, 0, g * lanes], lanes)
                            store(back, value, [first + i, block + b, g * lanes])

            with T.If(rows == ROWS):
                with T.Then(), T.serial(blocks) as block:
                    units(0, ROWS, block, 1)
                with T.Else(), T.serial(rows) as i:
                    if blocks > 1:
                        with T.serial(blocks // 2) as pair:
                            units(i, 1, pair * 2, 2)
                    if blocks % 2:
                        units(i, 1, blocks - 1, 1)

        def copy(target_buffer: Buffer, to: list[Expr], source: Buffer, origin: list[Expr]) -> None:
            if hidden >= lanes:
                with T.serial(hidden // lanes) as j:
                    store(target_buffer, load(source, [*origin, j * lanes], lanes), [*to, j * lanes])
            if hidden % lanes:
                at = hidden // lanes * lanes
                store(target_buffer, load(source, [*origin, at], hidden % lanes), [*to, at])

        def advance(forward: Sequence[Expr], back: Sequence[Expr], before: Sequence[Expr]) -> list[Expr]:
            """The new state: h, and c of an lstm."""
            if kind == "lstm":
                i, f, g, o = (share(a + b) for a, b in zip(forward, back, strict=True))
                c = share(sigmoid(f) * before[1] + sigmoid(i) * tanh(g))
                return [share(sigmoid(o) * tanh(c)), c]
            if kind == "gru":
                r, z = (sigmoid(a + b) for a, b in zip(forward[:2], back[:2], strict=True))
                candidate = tanh(forward[2] + r * back[2])
                return [share((const(1, dtype, lanes) - z) * candidate + z * before[0])]
            total = share(forward[0] + back[0])
            return [tanh(total) if activation == "tanh" else share(select(total < 0.0, 0.0, total))]

        work = ROWS * gates * hidden * (features + hidden) * (steps if isinstance(steps, int) else 16)
        parallel_if_large(ceildiv(n, ROWS), work, task)
    return kernel.func

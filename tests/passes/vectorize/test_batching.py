"""The rule of each op: many lanes at once give what the op gives for each lane, wherever the lane axes lie and whatever the lanes share."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from mlec.ir import DType, GraphBuilder, Node, TensorType, Value, lookup, run_graph
from mlec.ir.op import OPS, Array, OpDef, Trait
from mlec.passes.vectorize.batching import BATCHING, UNBATCHED, batching
from mlec.passes.vectorize.lanes import Batch, Lanes, inserted
from mlec.tolerance import approx

LANES = 3
lookup("add")  # fills the table
BATCHED = sorted(name for name, op in OPS.items() if batching(op) is not None)


def test_every_op_has_a_rule_or_a_reason() -> None:
    ours = {
        name for name, op in OPS.items() if op.reference.__module__.startswith("mlec.") or op.has(Trait.ELEMENTWISE)
    }
    assert {*BATCHED, *UNBATCHED} >= ours
    assert not {*BATCHING} & {*UNBATCHED}
    assert {*BATCHING, *UNBATCHED} <= {*OPS}


def of_lanes(
    op: OpDef, operands: tuple[Array, ...], varying: tuple[int, ...], rng: np.random.Generator
) -> list[list[Array]]:
    """For each operand its values in all lanes: the same, or the elements in another order in each."""
    return [
        [rng.permutation(x.reshape(-1)).reshape(x.shape) if i in varying else x for _ in range(LANES)]
        for i, x in enumerate(operands)
    ]


def check(op: OpDef, varying: tuple[int, ...], rng: np.random.Generator) -> None:
    case = op.sample(rng)
    while len(case.operands) <= max(varying):  # some operands are optional
        case = op.sample(rng)
    attrs = op.complete_attrs(case.attrs)
    lanes = of_lanes(op, case.operands, varying, rng)
    b = GraphBuilder("lanes")
    operands: list[Lanes] = []
    values: list[Array] = []
    for i, (first, *_) in enumerate(lanes):
        axis = int(rng.integers(first.ndim + 1)) if i in varying else None
        value = first if axis is None else np.stack(lanes[i], axis)
        kind = TensorType(first.shape if axis is None else inserted(first.shape, axis, LANES), DType.of(first.dtype))
        operands.append(Lanes(b.input(f"x{i}", kind), axis))
        values.append(value)
    types = [o.type for o in operands]
    node = Node(op, tuple(map(Value, types)), tuple(map(Value, op.result_types(types, attrs))), attrs)
    rule = batching(op)
    assert rule is not None
    results = rule.rule(Batch(b, LANES), node, operands)
    assert [r.type for r in results] == [v.type for v in node.outputs]
    found = run_graph(b.finish([r.value for r in results]), values)
    expected = [op.evaluate([column[i] for column in lanes], attrs, {}) for i in range(LANES)]
    for j, result in enumerate(results):
        wanted = np.stack([e[j] for e in expected], 0)
        got = np.moveaxis(found[j], result.lane_axis, 0)
        assert approx(1e-5, 1e-6).excess(wanted, got) <= 1, (
            f"{op.name} {dict(attrs)}, lanes at {[o.axis for o in operands]}"
        )


@pytest.mark.parametrize("name", BATCHED)
def test_lanes_are_what_the_op_gives_for_each(name: str) -> None:
    op, rule = OPS[name], batching(OPS[name])
    assert rule is not None
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    case = op.sample(rng)
    count = len(case.operands)
    choices = [c for size in range(1, min(count, 3) + 1) for c in itertools.combinations(range(count), size)]
    types = [TensorType(x.shape, DType.of(x.dtype)) for x in case.operands]
    node = Node(op, tuple(map(Value, types)), (), op.complete_attrs(case.attrs))
    allowed = [c for c in choices if not rule.refuses(node, c)]
    assert allowed
    for varying in allowed:
        for _ in range(6):
            with np.errstate(all="ignore"):
                check(op, varying, rng)

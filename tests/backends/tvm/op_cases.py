"""Graphs that call ops on the samples of the op table, for the tests of a backend."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

import mlec.ops  # noqa: F401  (fills the table)
from mlec.errors import TypeRuleError
from mlec.ir import OPS, Graph, GraphBuilder, TensorType, Value, run_graph
from mlec.ir.dim import Dim, SymDim
from mlec.ir.dtype import DType
from mlec.ir.op import SYMBOLIC_EXTENT, Array, Case
from tests.ops.special_values import special_case

CASES = 2
FAMILY = 12
SHOWN = 8
"""Wrong elements that a message shows."""
CONSTANT_OPERANDS = {
    "tree_ensemble": range(1, 12), "matmul_packed": (1,), "matmul_narrow": (1,), "matmul_narrow_packed": (1,),
    "conv": (1,), "conv2d_nchwc": (1,), "conv2d_narrow": (1,), "matmul_int8": (1,), "conv_int8": (1,),
}  # fmt: skip
"""Operands that are weights in practice; those of a tree ensemble must be."""

NAMES = sorted(name for name in OPS if name != "constant")


def families() -> list[list[str]]:
    return [NAMES[i : i + FAMILY] for i in range(0, len(NAMES), FAMILY)]


def symbolic(shape: Sequence[int]) -> tuple[Dim, ...]:
    """The first axis of the sampler's symbolic extent becomes ``n``."""
    found = tuple(shape).index(SYMBOLIC_EXTENT) if SYMBOLIC_EXTENT in shape else None
    return tuple(SymDim.named("n") if axis == found else extent for axis, extent in enumerate(shape))


def operand_types(case: Case, dynamic: bool) -> list[TensorType]:
    return [
        TensorType(symbolic(a.shape) if dynamic else a.shape, DType.of(a.dtype)) for a in map(np.asarray, case.operands)
    ]


def add_case(b: GraphBuilder, name: str, case: Case, dynamic: bool) -> tuple[list[Array], tuple[Value, ...]]:
    """One call of the op on inputs of its own; no results if it does not take these extents as symbolic."""
    operands: list[Value] = []
    arrays: list[Array] = []
    constant = CONSTANT_OPERANDS.get(name, ())
    for k, (array, kind) in enumerate(zip(map(np.asarray, case.operands), operand_types(case, dynamic), strict=True)):
        if k in constant:
            operands.append(b.constant(array))
        else:
            operands.append(b.input(f"{name}{k}", kind))
            arrays.append(array)
    attrs = dict(case.attrs)
    if dynamic:
        attrs = {k: symbolic(v) if k == "shape" and not isinstance(v[0], SymDim) else v for k, v in attrs.items()}
    try:
        return arrays, b.multi(name, *operands, **attrs)
    except TypeRuleError:
        assert dynamic
        return arrays, ()


def check(op: str, got: Array, wanted: Array, case: Case) -> None:
    """Compares the result of a call with the reference's; the message shows operands and results where they differ."""
    operands = [np.asarray(a) for a in case.operands]
    attrs = f" {dict(case.attrs)}" if case.attrs else ""
    call = f"{op}({', '.join(f'{DType.of(a.dtype)}{list(a.shape)}' for a in operands)}){attrs}"
    assert got.shape == wanted.shape, call
    assert got.dtype == wanted.dtype, call
    if wanted.dtype.kind in "fV":
        bound = OPS[op].tolerance * DType.of(wanted.dtype).eps
        ours, theirs = got.astype(np.float64), wanted.astype(np.float64)
        finite = np.isfinite(theirs)
        scale = np.maximum(np.abs(theirs), np.max(np.abs(theirs), initial=0, where=finite) * 0.1)
        with np.errstate(invalid="ignore"):  # inf - inf, where infinities are equal
            near = np.abs(ours - theirs) <= bound * np.maximum(scale, 1e-30)
        right = np.where(finite, near, (ours == theirs) | (np.isnan(ours) & np.isnan(theirs)))
    else:
        right = got == wanted
    wrong = np.flatnonzero(~right)
    if not wrong.size:
        return
    alike = [np.broadcast_to(a, got.shape) for a in operands if is_broadcast(a.shape, got.shape)]
    shown = [
        f"  {op}({', '.join(str(a.flat[at]) for a in alike) if len(alike) == len(operands) else '...'}) -> {got.flat[at]}, "
        f"expected {wanted.flat[at]}"
        for at in wrong[:SHOWN]
    ]
    allowed = f" (allowed: {OPS[op].tolerance:g} eps)" if wanted.dtype.kind in "fV" else ""
    pytest.fail("\n".join([f"{call}: {wrong.size} of {right.size} elements are wrong{allowed}", *shown]), pytrace=False)


def is_broadcast(shape: Sequence[int], to: Sequence[int]) -> bool:
    padded = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(padded) == len(to) and all(a in (1, b) for a, b in zip(padded, to, strict=True))


def graph_of(
    names: Sequence[str], dynamic: bool, cases: int = CASES
) -> tuple[Graph, list[Array], list[tuple[str, Case]]]:
    """A graph that calls each op on samples and special values, its inputs, and the call behind each output.

    Samples depend on an op's name only.
    """
    b = GraphBuilder("cases")
    arrays: list[Array] = []
    results: list[Value] = []
    calls: list[tuple[str, Case]] = []
    for name in names:
        rng = np.random.default_rng(zlib.crc32(name.encode()) + dynamic)
        drawn = [OPS[name].sample(rng) for _ in range(cases)]
        for case in (*drawn, special_case(OPS[name], rng)):
            if case is None:
                continue
            made = add_case(b, name, case, dynamic)
            arrays += made[0]
            results += made[1]
            calls += [(name, case)] * len(made[1])
    if dynamic:  # some samples have no operand that tells n
        b.input("n", TensorType((SymDim.named("n"),), DType.F32))
        arrays.append(np.zeros(SYMBOLIC_EXTENT, np.float32))
    return b.finish(results), arrays, calls


@dataclass(eq=False)
class OpTests:
    """Compares ops with their reference, one test for each, but compiles a family at a time, which is quicker.

    Attributes:
        run: compiles and runs a graph.
        cases: samples of each op.
    """

    run: Callable[[Graph, Sequence[Array]], Sequence[Array]]
    cases: int = CASES
    _results: dict[tuple[str, bool], list[tuple[Array, Array, Case]]] = field(default_factory=dict)
    _failed: set[tuple[str, bool]] = field(default_factory=set)

    def check(self, name: str, dynamic: bool) -> None:
        if (name, dynamic) not in self._results:
            family = next(names for names in families() if name in names)
            try:
                if (name, dynamic) not in self._failed:
                    self._run(family, dynamic)
            except Exception:  # one op of them: each that is by itself tells its own
                self._failed.update((other, dynamic) for other in family)
            if (name, dynamic) in self._failed:
                self._run([name], dynamic)
        found = self._results[name, dynamic]
        if not found:
            pytest.skip("no sample with symbolic extents")
        for got, wanted, case in found:
            check(name, got, wanted, case)

    def _run(self, names: Sequence[str], dynamic: bool) -> None:
        graph, arrays, calls = graph_of(names, dynamic, self.cases)
        got, wanted = self.run(graph, arrays), run_graph(graph, arrays)
        self._results.update({(name, dynamic): [] for name in names})
        for (name, case), ours, theirs in zip(calls, got, wanted, strict=True):
            self._results[name, dynamic].append((ours, theirs, case))

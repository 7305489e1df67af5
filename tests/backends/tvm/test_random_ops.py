"""Random graphs of any ops, on ordinary and on special values: compiled as they are and after every pass, against the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.errors import MlecError
from mlec.ir import Graph, GraphBuilder, TensorType, Trait, Value, run_graph, tensor
from mlec.ir.dtype import DType
from mlec.ir.op import OPS
from mlec.passes.pipelines import named_pipeline
from mlec.pipeline import PassContext, TargetFacts
from mlec.runtime.executable import Executable
from mlec.target import Target
from mlec.tolerance import random_inputs
from tests.backends.tvm.op_cases import symbolic

STEEP = {"log", "log1p", "sqrt", "rsqrt", "tan", "exp", "expm1", "pow", "cumsum", "prod"}
STEPS = {"floor", "ceil", "round", "sign", "trunc", "mod", "floordiv"}
OF_PASSES = {"constant", "fused", "matmul_packed", "matmul_narrow_packed", "conv2d_nchwc", "conv2d_narrow"}
BY_WIDTH = {"tree_ensemble"}
NAMES = [name for name in OPS if name not in STEEP | STEPS | OF_PASSES | BY_WIDTH]
"""Ops that magnify no rounding error beyond the bound below and that accept any operand of the right type."""

UNARY, BINARY = (
    [
        n
        for n in NAMES
        if OPS[n].has(Trait.ELEMENTWISE) and len(OPS[n].operands) == count and OPS[n].min_operands == count
    ]
    for count in (1, 2)
)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0)
SPECIAL = (np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, -1e-310)


def random_graph(seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    b = GraphBuilder(f"random{seed}")
    dtype = str(rng.choice(["f32", "f64"]))
    values = [b.input("x", tensor(dtype, ("n", int(rng.choice([1, 3, 8, 17])))))]
    if rng.random() < 0.4:
        values.append(b.input("image", tensor(dtype, ("n", int(rng.choice([1, 4, 8])), 6, 5))))
    for _ in range(int(rng.integers(2, 14))):
        try:
            made = _step(b, values, rng)
        except MlecError:  # the op takes no such operands
            continue
        values += [v for v in made if v.type.rank <= 5 and _extent(v.type) < 20_000]
    return b.finish(list(dict.fromkeys((values[-1], *(v for v in values[1:-1] if rng.random() < 0.25)))))


def _extent(kind: TensorType) -> int:
    return int(np.prod([extent if isinstance(extent, int) else 3 for extent in kind.shape]))


def _step(b: GraphBuilder, values: Sequence[Value], rng: np.random.Generator) -> Sequence[Value]:
    value = values[int(rng.integers(max(0, len(values) - 5), len(values)))]
    choice = rng.random()
    if choice < 0.25:
        return b.multi(str(rng.choice(UNARY)), value)
    if choice < 0.5:
        alike = [v for v in values if v.type == value.type]
        other = alike[int(rng.integers(len(alike)))]
        if rng.random() < 0.5:
            other = b.constant(np.asarray(rng.choice(NUMBERS)).astype(value.type.dtype.numpy))
        return b.multi(str(rng.choice(BINARY)), *((value, other) if rng.random() < 0.5 else (other, value)))
    op = OPS[str(rng.choice(NAMES))]
    case = op.sample(rng)
    operands: list[Value] = []
    for i, array in enumerate(map(np.asarray, case.operands)):
        kind = TensorType(symbolic(array.shape), DType.of(array))
        alike = [v for v in values if v.type == kind]
        if i == 0 and value.type.dtype == kind.dtype and rng.random() < 0.75:
            operands.append(value)
        else:
            operands.append(alike[-1] if alike else b.constant(array, "w"))
    return b.multi(op, *operands, **{k: symbolic(v) if k == "shape" else v for k, v in case.attrs.items()})


def inputs_of(graph: Graph, rows: int, special: Sequence[float]) -> list[np.ndarray]:
    return random_inputs(graph, np.random.default_rng(rows), dict.fromkeys(graph.symbols, rows), special)


def check(wanted: np.ndarray, got: np.ndarray, what: str) -> None:
    assert (wanted.shape, wanted.dtype) == (got.shape, got.dtype), what
    if wanted.dtype.kind not in "fV":
        np.testing.assert_array_equal(wanted, got, err_msg=what)
        return
    bound = {"float64": 1e-10, "float32": 2e-4}.get(wanted.dtype.name, 2e-2)
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    scale = np.max(np.abs(wanted), initial=1e-3, where=np.isfinite(wanted))
    np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound * scale, err_msg=what)


@pytest.mark.parametrize("seed", range(12))
def test_compiled_graphs_compute_what_the_interpreter_does(seed: int) -> None:
    graph = random_graph(seed)
    cases = [inputs_of(graph, rows, special) for rows, special in ((3, ()), (5, SPECIAL), (1, ()))]
    wanted = [run_graph(graph, arrays) for arrays in cases]
    for level in ("O0", "O3"):
        optimised, _ = named_pipeline(level).run(graph, PassContext(TargetFacts(vector_bytes=64)))
        module = TVMBackend().compile(optimised, Target())
        executable = Executable(module.program, module.objects, module.constants, num_threads=1)
        for arrays, results in zip(cases, wanted, strict=True):
            for i, (a, b) in enumerate(zip(results, executable.run(arrays), strict=True)):
                check(a, b, f"seed {seed}, {level}, {len(arrays[0])} rows, output {i}")


@pytest.mark.parametrize("seed", range(100, 130))
def test_each_pass_keeps_what_it_declares(seed: int) -> None:
    named_pipeline("O3").verified("numeric").run(random_graph(seed), PassContext(TargetFacts(vector_bytes=64)))

"""Results that lie where an operand lay: the same bits as apart from it, by any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from mlec.backends.base import CompiledModule
from mlec.backends.tvm.backend import TVMBackend, cpu_info
from mlec.backends.tvm.compat import IRModule
from mlec.backends.tvm.lowering import Lowering
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.ir import Graph, GraphBuilder, Value, tensor
from mlec.runtime.executable import Executable
from mlec.target import Target

Make = Callable[[GraphBuilder, Value], list[Value]]
COLUMNS = 37


def graph_of(make: Make) -> Graph:
    b = GraphBuilder()
    return b.finish(make(b, b.input("x", tensor("f32", ("n", COLUMNS)))))


def line(b: GraphBuilder) -> Value:
    return b.constant(np.random.default_rng(0).normal(size=COLUMNS).astype(np.float32))


def chain(b: GraphBuilder, x: Value) -> list[Value]:
    """All but the first lie over what they read; a line and a column are read along."""
    y = b("mul", b("exp", x), line(b))
    return [b("add", b("tanh", y), b("sum", x, axes=(1,), keepdims=True))]


def norms(b: GraphBuilder, x: Value) -> list[Value]:
    y = b("layer_norm", b("sqrt", b("exp", x)), line(b), line(b))
    return [b("neg", b("rms_norm", b("neg", y), line(b)))]


def turned(b: GraphBuilder, x: Value) -> list[Value]:
    """Norms of what is turned around first, and of a number everywhere: the result may lie where a kernel reads, after that."""
    lines = b("transpose", b("reshape", b("exp", x), shape=(x.type.shape[0], COLUMNS, 1)), perm=(2, 0, 1))
    columns = b("transpose", b("broadcast_to", b("exp", x), shape=(3, *x.type.shape)), perm=(1, 0, 2))
    constant = b("rms_norm", b("broadcast_to", b.constant(2.0, dtype=x.type.dtype), shape=(4, COLUMNS)), line(b))
    return [b("layer_norm", lines, line(b), line(b)), b("neg", b("rms_norm", columns, line(b))), constant]


def read_again(b: GraphBuilder, x: Value) -> list[Value]:
    """What is read twice by one call, by a later one, as a view, and turned around."""
    y = b("exp", x)
    z = b("mul", y, y)
    flipped = b("add", b("flip", z, axes=(1,)), z)
    return [b("sub", flipped, b("reshape", b("neg", z), shape=(x.type.shape[0], COLUMNS))), y]


def other_types(b: GraphBuilder, x: Value) -> list[Value]:
    small = b("cast", b("cast", b("gt", b("exp", x), 1.0), dtype="i32"), dtype="f32")
    return [b("neg", small)]


def apart(module: CompiledModule) -> CompiledModule:
    """The same code, every result in memory of its own."""
    assert module.program.sequence is not None
    calls = tuple(msgspec.structs.replace(call, over=()) for call in module.program.sequence.calls)
    sequence = msgspec.structs.replace(module.program.sequence, calls=calls)
    return replace(module, program=msgspec.structs.replace(module.program, sequence=sequence))


def executable(module: CompiledModule, threads: int) -> Executable:
    return Executable(module.program, module.objects, module.constants, num_threads=threads)


@pytest.mark.parametrize("make", [chain, norms, turned, read_again, other_types])
def test_results_are_those_of_memory_of_their_own(make: Make) -> None:
    module = TVMBackend().compile(graph_of(make), Target())
    expected = executable(apart(module), 1)
    for threads in (1, 2):
        model = executable(module, threads)
        for rows in (1, 0, 5, 3000, 64):
            x = np.random.default_rng(rows).normal(size=(rows, COLUMNS)).astype(np.float32)
            kept = x.copy()
            for got, wanted in zip(model.run([x]), expected.run([x]), strict=True):
                assert got.tobytes() == wanted.tobytes(), f"{rows} rows, {threads} threads"
            assert x.tobytes() == kept.tobytes()
        assert model.plan([x]).arena_nbytes < model.plan_apart([x]).arena_nbytes
        assert model.plan_apart([x]).arena_nbytes == expected.plan([x]).arena_nbytes


def test_an_output_may_be_the_array_of_an_input() -> None:
    """Where kernels would write over it, it is written at the end."""
    model = executable(TVMBackend().compile(graph_of(chain), Target()), 1)
    x = np.random.default_rng(0).normal(size=(9, COLUMNS)).astype(np.float32)
    (expected,) = model.run([x.copy()])
    (got,) = model.run([x], out=[x])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("make", [chain, norms])
def test_llvm_is_told_that_such_operands_may_overlap(make: Make) -> None:
    info = cpu_info(Target())
    lowered = Lowering(graph_of(make), info).run()
    marked = {}
    for call in lowered.calls:
        if call.function is not None:
            text = compile_for_cpu(IRModule({call.symbol: call.function}), info.tvm_target()).inspect_source("ll")
            marked[call.symbol] = "noalias" in text
            assert not (call.over and marked[call.symbol]), call.symbol
    assert all(call.over for call in lowered.calls if "sum" not in call.symbol)
    assert make is norms or any(marked.values())

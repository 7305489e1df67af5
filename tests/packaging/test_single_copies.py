"""Weights of 8 bits and leaves of trees that kernels read in another order are stored in that one alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pytest

from mlec.backends.base import CompiledModule
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.tree_ensemble import TreeEnsemble, prepare
from mlec.backends.tvm.lower_tree import constant_ensemble
from mlec.backends.tvm.lowering import Tensor, constant
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import DType, Graph, GraphBuilder, parse_graph, print_graph, run_graph, tensor
from mlec.ops.tree import OPERANDS, sample_ensemble
from mlec.packaging.packing import stored
from mlec.packaging.single_copies import unpacked, with_single_copies
from mlec.runtime import Program
from mlec.target import Target

HOST = TargetInfo.host()


def test_products_and_convolutions() -> None:
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return rng.integers(-128, 128, shape).astype(np.int8)

    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.U8, ("n", 6, 6, 8)))
    h = b("conv_int8", x, b.constant(weights(3, 3, 8, 20), "w"), pads=(1, 1, 1, 1), zero_point=3)
    h = b("quantize", b("cast", h, dtype=DType.F32), scale=300.0, zero_point=128)
    g = b("conv_int8", h, b.constant(weights(2, 3, 10, 34), "v"), groups=2, dilations=(1, 2))
    flat = b("reshape", b("quantize", b("cast", g, dtype=DType.F32), scale=300.0), shape=("n", 5 * 2 * 34))
    graph = b.finish([b("matmul_int8", flat, b.constant(weights(340, 7), "u"))])

    module = TVMBackend().compile(graph, Target())
    tensors = {**graph.constants, **module.constants}
    slim, left = with_single_copies(graph, tensors, set(module.program.constants))
    assert left.keys() == module.constants.keys(), "all that is left is what kernels read"
    again = parse_graph(print_graph(slim), left)
    images = rng.integers(0, 256, (3, 6, 6, 8)).astype(np.uint8)
    wanted = run_graph(graph, [images])[0]
    np.testing.assert_array_equal(run_graph(again, [images])[0], wanted)
    back = unpacked(again, _NamesOnly(left))
    assert not set(back.constants) & set(left), "names in the file stay those of what is in the file"
    assert not any(node.name == "unpack_int8" for node in back.nodes)
    assert sorted(a.shape for a in back.constants.values()) == sorted(a.shape for a in graph.constants.values())
    np.testing.assert_array_equal(run_graph(back, [images])[0], wanted)


class _NamesOnly(Mapping[str, np.ndarray]):
    """Tensors that would have to be decoded."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def __getitem__(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} is decoded")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def test_other_weights_stay() -> None:
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.U8, ("n", 8)))
    w = np.ones((8, 16), np.int8)
    graph = b.finish([b("matmul_int8", x, b.constant(w, "w"))])
    other = np.zeros((1, 1, 12, 64), np.int8)
    same, left = with_single_copies(graph, {"w": w, "w.quads1": other}, {"w.quads1"})
    assert print_graph(same) == print_graph(graph)
    assert left.keys() == {"w", "w.quads1"}
    assert unpacked(graph, left) is graph


def _forest(seed: int, width: int) -> tuple[np.ndarray, ...]:
    """Operands of trees of several depths with leaves of ``width`` values: -0.0 and two kinds of NaN among them."""
    rng = np.random.default_rng(seed)
    *structure, values, _ = sample_ensemble(rng, "float32", trees=30, features=4)
    wide = rng.normal(size=(len(values), width)).astype(np.float32)
    wide[:4, 0] = np.array([0, 1 << 31, 0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    structure[-1] = np.zeros(30, np.int32)
    return (*structure, wide, np.zeros(width, np.float32))


def _same(a: Graph, b: Graph) -> bool:
    """Whether two graphs of one input give the same bits."""
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    return all(p.tobytes() == q.tobytes() for p, q in zip(run_graph(a, [x]), run_graph(b, [x]), strict=True))


def _module(graph: Graph, strategy: str) -> CompiledModule:
    """What trees are packed to, without the kernels."""
    (node,) = (node for node in graph.nodes if node.name == "tree_ensemble")
    arrays = dict(zip(OPERANDS.split()[1:], map(graph.constant_value, node.inputs[1:]), strict=True))
    plan = prepare(TreeEnsemble(features=4, compare="lt", **arrays), HOST, strategy)
    constants = {f"trees.{name}": array for name, array in plan.packed.items()}
    return CompiledModule(Program("tvm", "cpu", constants=tuple(constants)), (), constants, graph.signature)


@pytest.mark.parametrize("strategy", ["walk", "sliced"])
@pytest.mark.parametrize("width", [1, 3])
def test_leaves_of_trees(width: int, strategy: str) -> None:
    """The graph of a file refers to the kernels' table; compiled again, and again, it gives the very same tables and file."""
    b = GraphBuilder("forest")
    x = b.input("x", tensor(DType.F32, ("n", 4)))
    operands = [b.constant(a, name) for a, name in zip(_forest(0, width), OPERANDS.split()[1:], strict=True)]
    graph = b.finish([b("tree_ensemble", x, *operands, compare="lt")])
    files = []
    for _ in range(3):
        tensors, (program,) = stored(graph, [_module(graph, strategy)])
        slim, left = with_single_copies(graph, tensors, program.constants)
        (node,) = (node for node in slim.nodes if node.name == "tree_ensemble")
        table = slim.constant_value(node.inputs[10])
        assert any(table is left[name] or np.shares_memory(table, left[name]) for name in program.constants)
        assert sum(a.ndim == 2 and a.shape[1] == width and a.dtype == np.float32 for a in left.values()) <= 1 + (
            width == 1
        )
        assert {str(node.inputs[i].type.dtype) for i in (1, 3, 4)} <= {"u8", "i8", "i16"}
        again = parse_graph(print_graph(slim), left)
        (node,) = (node for node in again.nodes if node.name == "tree_ensemble")
        assert _same(again, graph)
        files.append((print_graph(slim), {name: (a.shape, a.tobytes()) for name, a in left.items()}))
        structure = [constant(again.producer[value], again) for value in node.inputs[1:]]
        ensemble = constant_ensemble(node, (Tensor(x.type), *structure))
        assert ensemble.left.dtype == np.int32, "kernels are made of a graph that was not unpacked, too"
        graph = unpacked(again, left)
        assert _same(graph, again)
        assert {str(a.dtype) for name, a in graph.constants.items() if a.ndim == 1} == {"float32", "int32", "uint8"}
    assert files[1] == files[2]
    assert files[0][1].keys() == files[1][1].keys()


def test_constants_that_others_use_stay() -> None:
    """Two ensembles with one structure, whose leaves another op reads, too; a table that lacks a row, if only by a bit, is none."""
    *structure, values, base = _forest(1, 2)
    values[4:8, 1] = 0.0
    b = GraphBuilder("twins")
    x = b.input("x", tensor(DType.F32, ("n", 4)))
    shared = [b.constant(a, name) for a, name in zip(structure, OPERANDS.split()[1:], strict=False)]
    leaves, zeros = b.constant(values, "values"), b.constant(base, "base")
    outputs = [b("tree_ensemble", x, *shared, leaves, zeros, compare=compare) for compare in ("lt", "le")]
    graph = b.finish([*outputs, b("matmul", b("relu", outputs[0]), b("transpose", leaves, perm=(1, 0)))])

    rows = np.concatenate([values[::-1], values[:5]])
    slim, left = with_single_copies(graph, {**graph.constants, "k.table": rows}, {"k.table"})
    assert "values" in left
    assert "left" not in left, "the old children are gone"
    assert _same(slim, graph)
    assert _same(unpacked(slim, left), graph)

    same, left = with_single_copies(graph, {**graph.constants, "k.table": rows}, {*graph.constants, "k.table"})
    assert print_graph(same) == print_graph(graph), "kernels read all of it as it is"
    rows[rows.view(np.uint32) == 0] = -0.0
    same, left = with_single_copies(graph, {**graph.constants, "k.table": rows}, {"k.table"})
    for node in (node for node in same.nodes if node.name == "tree_ensemble"):
        assert same.constant_value(node.inputs[10]) is graph.constants["values"]

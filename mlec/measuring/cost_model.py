"""Predicts how long kernels take, from the work that their nodes state and what the machine does at most.

A kernel takes as long as its arithmetic or its traffic, whichever is longer, and the overhead of a call. Arithmetic of each *family* of ops
reaches a part of the machine's peak (`RATES`). Traffic goes at the rate of the cache that holds the data: intermediate values were
just written, weights were last used a whole call of the model ago. What a backend knows better - trees, whose time is a matter of
their shape - it says itself (`mlec.backends.base.RowTimes`).

The rates are parts of the peak, so that they hold from one machine to the next; ``python -m bench.cost_model`` compares predictions with
measurements, and says which models the rates were fitted on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.backends.base import CompiledModule, KernelNote
from mlec.ir import DType, Graph, Node
from mlec.ir.dim import Dim, evaluate, parse_dim, symbols_of
from mlec.ir.op import Trait
from mlec.measuring.machine import Machine
from mlec.runtime.program import KernelInfo
from mlec.signature import Signature

Binding = Mapping[str, int]

RATES: Mapping[str, float] = {
    "product": 0.78,
    "narrow product": 0.35,
    "product of bf16": 0.78,
    "product of bytes": 0.78,
    "attention": 0.46,
    "distance": 0.64,
    "convolution": 0.68,
    "winograd": 2.2,
    "depthwise": 0.35,
    "recurrent": 0.5,
    "fourier": 0.24,
    "transcendental": 0.085,
    "library": 0.01,
    "simple": 0.15,
    "reduction": 0.05,
    "movement": 0.2,
    "tree": 0.02,
}
"""By family, the part of one thread's peak of multiply-adds that its operations reach. Winograd's transformation leaves out most of those
that a convolution states."""

REQUANTISING = 6
"""Simple operations for each result of a convolution of bytes: on the way back to bytes, which takes longer than its few products; that
of a product of matrices is hidden behind them."""

WIDTHS: Mapping[str, int] = {"product of bf16": 16, "product of bytes": 8}
"""Of the families whose peak is one of their own (`Machine.peak`), the bits of their numbers."""

NARROW = 16
"""A product with fewer columns does not fill the registers."""
WINOGRAD_CHANNELS = 16
"""With so many input channels, Winograd's transformations take as long as its products."""
WINOGRAD_EXTENT = 8
"""The least height and width of images that it takes."""

FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("matmul", "matmul_packed", "matmul_narrow", "matmul_narrow_packed", "conv2d_narrow"), "product"),
    **dict.fromkeys(("matmul_int8", "conv_int8"), "product of bytes"),
    "attention": "attention",
    **dict.fromkeys(("pairwise_distance", "nearest"), "distance"),
    **dict.fromkeys(("conv", "conv2d_nchwc", "conv_transpose"), "convolution"),
    "depthwise2d_nchwc": "depthwise",
    **dict.fromkeys(("lstm", "gru", "rnn"), "recurrent"),
    **dict.fromkeys(("fft", "rfft", "irfft"), "fourier"),
    **dict.fromkeys(
        (
            "exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "silu", "gelu", "softmax", "log_softmax", "sqrt", "rsqrt", "div",
        ),
        "transcendental",
    ),
    "tree_ensemble": "tree",
}  # fmt: skip
"""Of the ops whose traits do not tell it."""

SHARED_FROM = 12.0
"""A kernel uses several threads where it takes this many times as long as sharing it out does."""

CHECK_OF_CALL = 0.6
CHECK_OF_TRAFFIC = 0.25
"""Looking for NaN in a table: as a part of what a call takes, and of the rate of a copy."""
FRAME_CALLS, CODED_CALLS, TENSOR_CALLS = 9.0, 3.0, 4.0
"""Reading a DataFrame, a column of categories and a tensor of another library, in the time of a call with arrays."""
CODE_SECONDS = 4.3e-9
"""Of finding the code of one category."""
LABEL_SECONDS = 2e-9
"""Of one label, from its number."""


@dataclass(frozen=True)
class Work:
    """What a kernel does.

    Attributes:
        operations: number of them, by family.
        weights, values: bytes of constants, and of intermediate values, that it reads or writes.
        bits: width of its widest floats.
    """

    operations: Mapping[str, int]
    weights: int
    values: int
    bits: int


@dataclass(frozen=True)
class CostModel:
    """Predicts seconds.

    Attributes:
        machine: where kernels run.
        threads: of one call; None: all of the machine.
    """

    machine: Machine
    threads: int | None = None

    def graph_seconds(self, graph: Graph, binding: Binding) -> float:
        """Of one call of a model whose nodes become a kernel each. Symbols that have no value in ``binding`` count as 1."""
        constants = {v for node in graph.nodes if node.is_constant for v in node.outputs}
        held = sum(array.nbytes for array in graph.constants.values())
        seconds = self.machine.call_seconds
        for node in graph.compute_nodes:
            if not node.op.has(Trait.VIEW):
                inputs = list(dict.fromkeys(node.inputs))
                weights = sum(value_of(v.type.nbytes, binding) for v in inputs if v in constants)
                values = sum(value_of(v.type.nbytes, binding) for v in (*inputs, *node.outputs) if v not in constants)
                floats = [v.type.dtype.bits for v in (*inputs, *node.outputs) if v.type.dtype.is_float]
                work = Work(operations_of(node, binding), weights, values, max(floats, default=32))
                seconds += self.seconds(work, held)
        return seconds

    def module_seconds(
        self, module: CompiledModule, binding: Binding, inputs: Sequence[Any] = ()
    ) -> tuple[float, dict[str, float]]:
        """Of one call of a compiled model, and of each of its kernels by symbol: those whose making is known.

        Args:
            module, binding: the model, and extents of the symbols.
            inputs: what it is called with, where that is known: tensors and DataFrames take longer than arrays.
        """
        notes = {note.symbol: note for note in module.notes}
        held = sum(array.nbytes for array in module.constants.values())
        kernels = {
            kernel.symbol: self.kernel_seconds(kernel, note, held, binding)
            for kernel in module.program.kernels
            if (note := notes.get(kernel.symbol)) is not None and note.node is not None
        }
        return sum(kernels.values()) + self._edge_seconds(module.signature, binding, inputs), kernels

    def _edge_seconds(self, signature: Signature, binding: Binding, inputs: Sequence[Any]) -> float:
        """Of what a call does besides: reading its inputs, checking a table, and giving labels their names."""
        table, seconds = signature.table, self.machine.call_seconds
        rows = max((value_of(parse_dim(spec.shape[0]), binding) for spec in signature.inputs if spec.shape), default=1)
        if table is not None and table.numbers != "any":
            nbytes = rows * table.n_features * 8
            seconds += CHECK_OF_CALL * self.machine.call_seconds + nbytes / (
                CHECK_OF_TRAFFIC * self.machine.traffic(nbytes)
            )
        coded = sum(len(feed.codings) for feed in table.feeds) if table is not None else 0
        frames = bool(coded) or any(hasattr(value, "columns") for value in inputs)
        tensors = sum(hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray) for value in inputs)
        seconds += self.machine.call_seconds * (FRAME_CALLS * frames + CODED_CALLS * coded + TENSOR_CALLS * tensors)
        seconds += CODE_SECONDS / self.machine.clock * rows * coded
        methods = filter(None, map(signature.method, signature.run))
        labels = sum(label is not None for method in methods for label in method.labels)
        return seconds + LABEL_SECONDS / self.machine.clock * rows * labels

    def kernel_seconds(self, kernel: KernelInfo, note: KernelNote, held: int, binding: Binding) -> float:
        """Of one call of a kernel.

        Args:
            kernel, note: what it moves, and what it was made of.
            held: bytes of all weights of the model.
            binding: extents of the symbols.
        """
        assert note.node is not None
        if note.rows is not None:
            rows = value_of(note.node.outputs[0].type.shape[0], binding)
            return note.rows.seconds(rows, self._threads, self.machine) + self.machine.kernel_seconds
        moved = value_of(parse_dim(kernel.bytes), binding)
        operations = Counter(operations_of(note.node, binding))
        if "product of bytes" in operations:  # of others, the rates have what follows them
            for node in note.tail:
                if family_of(node) == "transcendental":
                    operations.update(operations_of(node, binding))
        return self.seconds(Work(operations, note.weights, max(0, moved - note.weights), note.bits), held)

    def seconds(self, work: Work, held: int) -> float:
        """Of one call of a kernel that does this work, in a model with ``held`` bytes of weights."""
        dispatch = self.machine.dispatch_seconds
        seconds = self._busy_seconds(work, held, 1)
        if self._threads > 1 and seconds > SHARED_FROM * dispatch:
            seconds = self._busy_seconds(work, held, self._threads) + dispatch
        return seconds + self.machine.kernel_seconds

    def _busy_seconds(self, work: Work, held: int, threads: int) -> float:
        """Of arithmetic or traffic, by so many threads."""
        floats = 64 if work.bits == 64 else 32
        compute = sum(
            count / (RATES[family] * self.machine.peak(WIDTHS.get(family, floats), threads))
            for family, count in work.operations.items()
        )
        traffic = work.values / self.machine.traffic(work.values, threads)
        if work.weights:
            traffic += work.weights / self.machine.traffic(held + work.values, threads)
        return max(compute, traffic)

    @property
    def _threads(self) -> int:
        return self.threads or self.machine.threads


def operations_of(node: Node, binding: Binding) -> dict[str, int]:
    """The operations of a node by family, those in its body included; what only moves elements counts one for each."""
    operations: Counter[str] = Counter()
    body = node.attrs.get("body")
    nodes: Sequence[Node] = body.compute_nodes if isinstance(body, Graph) else [node]
    for inner in nodes:
        if inner.attrs.get("body") is not None and inner is not node:
            operations.update(operations_of(inner, binding))
        elif not inner.op.has(Trait.VIEW):
            flops = value_of(inner.cost.flops, binding)
            family = family_of(inner)
            if family == "winograd":
                flops += flops * WINOGRAD_CHANNELS // value_of(_input_channels(inner), binding)
            operations[family] += flops or sum(value_of(v.type.size, binding) for v in inner.outputs)
            if inner.name == "conv_int8" and family != "depthwise":
                operations["simple"] += REQUANTISING * value_of(inner.output.type.size, binding)
    return dict(operations)


def family_of(node: Node) -> str:
    """To which of `RATES` the arithmetic of a node counts."""
    if (known := FAMILIES.get(node.name)) is not None:
        if known == "product of bytes" and _is_depthwise(node):
            return "depthwise"
        if known == "product" and all(v.type.dtype is DType.BF16 for v in node.inputs):
            return "product of bf16"
        if known == "product" and _is_narrow(node):
            return "narrow product"
        return "winograd" if known == "convolution" and _takes_winograd(node) else known
    if node.op.has(Trait.LIBRARY_CALL):
        return "library"
    if node.op.has(Trait.REDUCTION):
        return "reduction"
    return "simple" if node.op.has(Trait.ELEMENTWISE) else "movement"


def _is_depthwise(node: Node) -> bool:
    shape = node.inputs[1].type.shape
    return node.name == "conv_int8" and shape[2] == 1 and shape[3] == node.attrs["groups"]


def _is_narrow(node: Node) -> bool:
    columns = node.outputs[0].type.shape[-1]
    return isinstance(columns, int) and columns < NARROW


def _takes_winograd(node: Node) -> bool:
    """A convolution of 3 x 3 with a step of 1, of images that are not too small."""
    if node.name == "conv_transpose":
        return False
    weights, extents = node.inputs[1].type, node.outputs[0].type.shape[2:4]
    kernel = weights.shape[2:] if node.name == "conv" else (weights.shape[2], weights.shape[4])
    steps = [node.attrs.get(name, 1) for name in ("strides", "dilations")]
    plain = all(step in (1, (1, 1), [1, 1]) for step in steps) and node.attrs.get("groups", 1) == 1
    large = all(not isinstance(extent, int) or extent >= WINOGRAD_EXTENT for extent in extents)
    blocked = node.name == "conv" or weights.shape[3] != 1
    return plain and large and blocked and tuple(kernel) == (3, 3)


def _input_channels(node: Node) -> Dim:
    shape = node.inputs[1].type.shape
    return shape[1] if node.name == "conv" else shape[1] * shape[3]


def value_of(dim: Dim, binding: Binding) -> int:
    """An extent or an amount of work; symbols that have no value in ``binding`` count as 1."""
    return evaluate(dim, {name: binding.get(name, 1) for name in symbols_of(dim)})

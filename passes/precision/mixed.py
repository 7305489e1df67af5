"""mixed-precision: weights in 16 bits; where the processor multiplies them so, the rows of products too; all sums in 32.

What is in 16 bits and what is not:

* Weights of products that come from behind the cache are read in 16 bits and widened on the way (`matmul_narrow`): half the bytes is twice
  the speed for few rows, and costs a few percent for many. So are the rows that are picked from a table.
* Other weights are rounded to numbers of 16 bits, and stay constants of float32 in the graph: their kernels are as fast as before, and the
  file holds them in 16 bits.
* Recurrent layers multiply inputs and states in 16 bits where the processor does that: their states, sums and gate functions stay in 32.
* The rows of a product are rounded only where the processor has instructions that multiply 16 bits by 16 bits into sums of 32, and where
  the range of their numbers allows it. Elsewhere they would have to be widened again, for each product.
* So are the images of 2-d convolutions, which such processors multiply as well: what one reads is rounded where it is made, and everything
  else that reads it takes the rounded numbers, so that nothing but these is stored.
* Everything else computes in float32: norms, softmax, exponentials, sums, whatever leaves the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mlec.errors import UsageError
from mlec.ir import DType, Graph, GraphBuilder, Location, Node, Trait, Value
from mlec.ir.dim import product
from mlec.ir.op import Array, ConstantRef
from mlec.passes.precision.convolutions import is_depthwise, why_not_narrow
from mlec.passes.precision.formats import Format, format_of
from mlec.passes.precision.observe import observe
from mlec.passes.stability.input_ranges import input_ranges
from mlec.passes.stability.intervals import Interval, value_intervals
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance

FEW_ROWS = 32
"""Of a product that is bound by its weights rather than by its arithmetic."""
RECURRENT = frozenset({"lstm", "gru", "rnn"})
FEW_SEQUENCES = 2
"""From which on a recurrent layer is faster in 16 bits: its time is that of reading weights, which are half as many bytes then."""
READERS = RECURRENT | {"gather", "add"}
"""What reads weights, beside contractions."""
SUMS = frozenset({"sum", "mean", "avg_pool", "cumsum", "logsumexp"})
EXACTING = frozenset({"exp", "expm1", "log", "log1p", "pow", "prod"})
"""Of what stays in float32 anyway, that for which it matters."""
SETTINGS = ("auto", "always", "never")


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Weights, and where that pays the rows of products, in 16 bits.

    Options:
        dtype: fp16 (10 bits of fraction, up to 65504) or bf16 (7 bits, the range of float32).
        activations: rows of products in 16 bits: always, never, or where the processor multiplies them so (auto).
        min_weights: elements of a constant that is worth the rounding.
        examples: inputs that show which numbers occur inside: batches of one array for each input of the graph.
    """

    dtype: str = "bf16"
    activations: str = "auto"
    min_weights: int = 4096
    examples: Any = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "mixed-precision"
    preserves: ClassVar[Tolerance] = Tolerance(rtol=0.05, atol=1e-3, signed_zeros=False, specials=False)
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        form = format_of(self.dtype)
        if self.activations not in SETTINGS:
            raise UsageError(
                f"mixed-precision takes activations {', '.join(SETTINGS)}, got {self.activations!r}",
                hint="mixed-precision{activations = never}",
            )
        return _Work(graph, context, form, self).run()


@dataclass(eq=False)
class _Work:
    graph: Graph
    context: PassContext
    form: Format
    options: MixedPrecision
    b: GraphBuilder = field(init=False)
    rounded: dict[Value, Array] = field(default_factory=dict)  # constants in 16 bits
    narrow: dict[Value, Value] = field(default_factory=dict)  # values and constants in 16 bits, in the new graph
    remarks: list[Remark] = field(default_factory=list)
    changed: bool = False

    def run(self) -> PassResult:
        self.b = GraphBuilder(self.graph.name)
        self.b.adopt_interface(self.graph)
        for value in self.graph.inputs:
            self.image(value)
        for node in self.graph.nodes:
            with self.b.at(Location.merged((node.loc,), self.options.name)):
                if not (
                    self.constant(node)
                    or self.product(node)
                    or self.recurrence(node)
                    or self.convolution(node)
                    or self.embedding(node)
                ):
                    self.explain(node)
                    self.b.keep(node)
                for value in node.outputs:
                    self.image(value)
        if not self.changed:
            return PassResult(self.graph, tuple(self.remarks))
        return PassResult(self.b.finish(self.graph.outputs, signature=self.graph.given_signature), tuple(self.remarks))

    def said(self, kind: str, node: Node, message: str) -> None:
        self.remarks.append(Remark("applied" if kind == "applied" else "missed", message, node.loc, self.options.name))

    # -- weights -------------------------------------------------------------------------------------------------

    def constant(self, node: Node) -> bool:
        """A constant that is worth it becomes one of numbers that the format holds."""
        if not node.is_constant or not isinstance(node.attrs["value"], ConstantRef):
            return False
        array, readers = self.graph.constant_value(node.output), self.graph.users.get(node.output, ())
        if array is None or array.dtype != DType.F32.numpy or array.ndim < 2:
            return False
        if not readers or not all(r.op.has(Trait.CONTRACTION) or r.name in READERS for r in readers):
            return False
        if array.size < self.options.min_weights and not any(map(self.convolved, readers)):
            few = f"fewer than {self.options.min_weights:,} elements"
            self.said("missed", readers[0], f"the weights of {readers[0].name} stay in f32: {few}")
            return False
        if reason := self.form.why_not_weights(array):
            self.said("missed", readers[0], f"the weights of {readers[0].name} stay in f32: {reason}")
            return False
        self.rounded[node.output] = narrow = array.astype(self.form.dtype.numpy)
        wide = narrow.astype(array.dtype)
        if np.array_equal(wide, array, equal_nan=True):
            return False
        self.changed = True
        self.b.replace(node.output, self.b.constant(wide, node.output.hint))
        plain = [
            r for r in readers if not (self.streams(r) or self.matrices(r) or r.name == "gather" or self.convolved(r))
        ]
        if plain:
            message = f"the weights of {plain[0].name} are rounded to {self.form.dtype} and stored so"
            self.said("applied", plain[0], f"{message}; {self.kept_wide(plain[0])}")
        return True

    def kept_wide(self, node: Node) -> str:
        """Why a kernel reads rounded weights in float32."""
        if node.name == "conv":
            nothing = f"nothing that multiplies {self.form.dtype} is known of this processor"
            reason = why_not_narrow(node, self.context.target) if self.multiplies() else nothing
            return f"its kernel reads them in f32: {reason or 'activations = never'}"
        if node.name != "matmul":
            return "its kernel reads them in f32"
        return "f32 from the cache is faster than widening them"

    def narrow_constant(self, value: Value) -> Value:
        """A constant in 16 bits, once for all that read it."""
        if value not in self.narrow:
            self.narrow[value] = self.b.constant(self.rounded[value], value.hint)
        return self.narrow[value]

    @cached_property
    def weights_nbytes(self) -> int:
        return sum(array.nbytes for array in self.graph.constants.values())

    def streams(self, node: Node) -> bool:
        """Whether a product reads weights of 16 bits: for few rows if they come from behind the cache, or if they are multiplied so."""
        if node.name != "matmul" or node.inputs[1].type.rank != 2 or node.inputs[0] in self.rounded:
            return False
        rows = product(node.output.type.shape[:-1])
        few = not isinstance(rows, int) or rows < FEW_ROWS
        return self.multiplied(node) or (few and self.weights_nbytes > self.context.target.cache_bytes)

    def multiplied(self, node: Node) -> bool:
        """Whether the processor multiplies the product's operands in 16 bits."""
        recurrent = node.name in RECURRENT  # its rows of a step are sequences
        rows = node.inputs[0].type.shape[0] if recurrent else product(node.output.type.shape[:-1])
        if not self.multiplies() or (recurrent and not self.context.target.bf16_tiles):
            return False
        if not isinstance(rows, int):
            return True
        if recurrent:
            return rows >= FEW_SEQUENCES
        k, n = node.inputs[1].type.shape[-2:]
        return rows > 1 and not (
            isinstance(n, int) and isinstance(k, int) and rows < self.context.target.bf16_rows(n, k)
        )

    def multiplies(self) -> bool:
        """Whether the processor multiplies numbers of the format."""
        return self.form.dtype is DType.BF16 and self.context.target.bf16_products > 1

    def product(self, node: Node) -> bool:
        """matmul(x, w) -> matmul_narrow(x, w in 16 bits), with x in 16 bits where that pays"""
        if node.name != "matmul" or node.inputs[1] not in self.rounded or not self.streams(node):
            return False
        x, w = node.inputs
        rows = self.rows(node, x)
        result = self.b("matmul_narrow", rows, self.narrow_constant(w), hint=node.output.hint)
        self.b.replace(node.output, result)
        self.changed = True
        shape = ", ".join(map(str, w.type.shape))
        self.said(
            "applied", node, f"weights [{shape}] are read in {self.form.dtype}, rows in {rows.type.dtype}, sums in f32"
        )
        return True

    def matrices(self, node: Node) -> Sequence[Value]:
        """Those of a recurrent layer that the processor multiplies in 16 bits; none if it doesn't, or if they stay in f32."""
        if node.name not in RECURRENT or self.options.activations == "never" or not self.multiplied(node):
            return ()
        found = node.inputs[len(node.outputs) : len(node.outputs) + 2]
        arrays = [self.graph.constant_value(w) for w in found]
        large = [
            a for a in arrays if a is not None and a.dtype == DType.F32.numpy and a.size >= self.options.min_weights
        ]
        fits = large and all(a is not None and not self.form.why_not_weights(a) for a in arrays)
        return found if fits else ()

    def recurrence(self, node: Node) -> bool:
        """lstm(x, states, matrices, biases) -> the same with matrices in 16 bits, by which inputs and state are multiplied so"""
        matrices = self.matrices(node)
        if not matrices:
            return False
        for w in matrices:
            array = self.graph.constant_value(w)
            assert array is not None
            self.rounded.setdefault(w, array.astype(self.form.dtype.numpy))
        inputs = [self.b.resolve(v) for v in node.inputs]
        first = len(node.outputs)
        inputs[0], inputs[first : first + 2] = (
            self.narrow.get(node.inputs[0], inputs[0]),
            map(self.narrow_constant, matrices),
        )
        results = self.b.multi(node.op, *inputs, hints=[v.hint for v in node.outputs], **node.attrs)
        for old, new in zip(node.outputs, results, strict=True):
            self.b.replace(old, new)
        self.changed = True
        self.said(
            "applied",
            node,
            f"inputs, states and matrices are multiplied in {self.form.dtype}; sums, states and gates in f32",
        )
        return True

    def embedding(self, node: Node) -> bool:
        """gather(table, i) -> the same of the table in 16 bits, widened"""
        if node.name != "gather" or node.inputs[0] not in self.rounded:
            return False
        picked = self.b("gather", self.narrow_constant(node.inputs[0]), node.inputs[1], **node.attrs)
        self.narrow[node.output], self.changed = picked, True
        self.b.replace(node.output, self.b("cast", picked, dtype=DType.F32, hint=node.output.hint))
        self.said("applied", node, f"rows of a table are picked in {self.form.dtype}")
        return True

    # -- images ------------------------------------------------------------------------------------------------------

    def convolved(self, node: Node) -> bool:
        """Whether a convolution reads its image in 16 bits."""
        if why_not_narrow(node, self.context.target) or not self.multiplies() or self.options.activations == "never":
            return False
        weights = self.graph.constant_value(node.inputs[1])
        return weights is not None and weights.dtype == DType.F32.numpy and not self.form.why_not_weights(weights)

    def reads_narrow(self, node: Node) -> bool:
        """Whether a convolution reads its image in 16 bits; one of each channel by itself does so for less to read, and computes in 32."""
        if self.convolved(node):
            return True
        allowed = self.multiplies() and self.options.activations != "never"
        return allowed and is_depthwise(node) and node.inputs[0] in self.graph.producer

    def image(self, value: Value) -> None:
        """Rounds what a convolution will read. Everything else takes the rounded numbers, unless they leave the graph."""
        readers = self.graph.users.get(value, ())
        if value in self.narrow or not any(r.inputs[0] is value and self.reads_narrow(r) for r in readers):
            return
        self.changed |= self.widened(value) is None
        narrow = self.halved(value)
        if value not in self.graph.outputs:
            self.b.replace(value, self.b("cast", narrow, dtype=DType.F32, hint=value.hint))

    def widened(self, value: Value) -> Value | None:
        """The value in 16 bits that this one is the same as."""
        made = self.graph.producer.get(value)
        if made is None or made.name != "cast" or made.inputs[0].type.dtype is not self.form.dtype:
            return None
        return made.inputs[0]

    def halved(self, value: Value) -> Value:
        """A value in 16 bits: largest elements are those of the rounded ones, and what is joined is rounded before."""
        if value not in self.narrow:
            made, same = self.graph.producer.get(value), self.widened(value)
            if same is not None:
                self.narrow[value] = same
            elif made is not None and made.name in ("max_pool", "concat") and value not in self.graph.outputs:
                operands = [self.halved(operand) for operand in made.inputs]
                self.narrow[value] = self.b(made.op, *operands, hint=value.hint, **made.attrs)
            else:
                self.narrow[value] = self.b("cast", value, dtype=self.form.dtype, hint=value.hint)
        return self.narrow[value]

    def convolution(self, node: Node) -> bool:
        """conv(x, w) -> the same of what x is in 16 bits, which the layout knows as a kernel of its own"""
        if not self.convolved(node):
            return False
        x, w = node.inputs
        if self.widened(x) is not None:
            return False
        wide = self.b("cast", self.narrow[x], dtype=DType.F32) if x in self.graph.outputs else x
        self.b.replace(node.output, self.b(node.op, wide, w, hint=node.output.hint, **node.attrs))
        self.changed = True
        shape = ", ".join(map(str, w.type.shape))
        self.said("applied", node, f"image and weights [{shape}] are multiplied in {self.form.dtype}, sums in f32")
        return True

    # -- activations ---------------------------------------------------------------------------------------------

    def rows(self, node: Node, x: Value) -> Value:
        """The rows of a product: in 16 bits if that is wanted and their numbers fit."""
        wanted = self.options.activations
        if wanted == "never" or (wanted == "auto" and not self.multiplied(node)):
            if wanted == "auto":
                self.said(
                    "missed",
                    node,
                    f"its rows stay in f32: this processor would have to widen {self.form.dtype} for each product",
                )
            return x
        if x in self.narrow:
            return self.narrow[x]
        if reason := self.form.why_not_values(self.proven[x], lambda: self.seen.get(x)):
            self.said("missed", node, f"its rows stay in f32: {reason}")
            return x
        self.narrow[x] = self.widened(x) or self.b("cast", x, dtype=self.form.dtype, hint=x.hint)
        return self.narrow[x]

    @cached_property
    def proven(self) -> Mapping[Value, Interval]:
        found = input_ranges(self.graph, self.context.given_ranges, self.context.seen_ranges)
        return value_intervals(self.graph, {value: r.interval for value, r in found.items()})

    @cached_property
    def seen(self) -> Mapping[Value, Interval]:
        """Where the rows of all products lie on the examples, if there are any."""
        batches: Sequence[Sequence[Array]] | None = self.options.examples
        if not batches:
            return {}
        rows = [node.inputs[0] for node in self.graph.nodes if node.name == "matmul" and node.inputs[1] in self.rounded]
        return observe(self.graph, rows, batches)

    # -- everything else -----------------------------------------------------------------------------------------

    def explain(self, node: Node) -> None:
        """Says why a node that works on floats computes in float32."""
        if node.outputs[0].type.dtype is not DType.F32 or not self.rounded:
            return
        if node.op.has(Trait.NORMALISATION):
            self.said("missed", node, f"{node.name} stays in f32: its statistics are sums")
        elif node.name in SUMS:
            self.said("missed", node, f"{node.name} stays in f32: the rounding of a sum grows with its length")
        elif node.name in EXACTING:
            self.said("missed", node, f"{node.name} stays in f32: it magnifies the rounding of its operand")

"""What it is worth to compute a value in the kernels that read it instead of in a kernel of its own, before them.

Gained are the store and the loads of the value, at the rate of the memory where it would lie between the two kernels, and a call. Paid is
what is computed more than once - in several kernels, or again for each element that the value is broadcast to - and what registers do not
hold: a kernel that keeps more vectors alive than there are registers stores some of them and loads them again.

All figures are for one thread and the nominal extents of symbolic dims, in cycles: only their order counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mlec.ir import ConstantRef, Dim, Graph, Node, Trait, Value
from mlec.ir.dim import product
from mlec.ir.types import Shape
from mlec.pipeline import TargetFacts, nominal

CACHED_BYTES, MEMORY_BYTES = 16.0, 4.0
"""Bytes that one thread moves in a cycle, from and to the cache of its core and the memory behind that: measured of copies."""
CALL = 400.0
"""Cycles that a kernel takes besides its work."""
LIBRARY_CALL = 64.0
"""Operations that take as long as a call into the C library for one element."""


@dataclass(frozen=True)
class Price:
    """Of computing a value where it is read.

    Attributes:
        saved: bytes that are not stored and not loaded.
        repeated: operations that are done again.
        live: vectors that the kernel keeps alive at a time.
        registers: that there are for them.
        cycles: gained by all this; below 0 they are lost.
    """

    saved: Dim
    repeated: int
    live: int
    registers: int
    cycles: float

    @property
    def pays(self) -> bool:
        return self.cycles > 0

    def __str__(self) -> str:
        parts = [f"{self.saved} bytes less to move"]
        if self.repeated:
            parts.append(f"{self.repeated} operations more")
        if self.live > self.registers:
            parts.append(f"{self.live} live vectors in {self.registers} registers")
        return ", ".join(parts)


@dataclass(frozen=True)
class Costs:
    """Prices for one target."""

    graph: Graph
    target: TargetFacts

    def price(self, node: Node, times: float, kernels: int, members: Sequence[Node], shape: Shape) -> Price:
        """Of computing the result of a node where it is read.

        Args:
            times: that each of its elements is computed, in all kernels together.
            kernels: in which it is read.
            members: the other nodes of one of them, users first.
            shape: of what that kernel loops over.
        """
        value = node.output
        loaded: Dim = 0
        for operand in dict.fromkeys(node.inputs):
            loaded = loaded + (0 if is_number(self.graph, operand) else operand.type.nbytes)
        saved = value.type.nbytes * (1 + kernels) - loaded * (kernels - 1)
        operations = nominal(node.cost.flops)
        if node.op.has(Trait.LIBRARY_CALL):
            operations += int(LIBRARY_CALL * self.lanes(node) * nominal(value.type.size))
        repeated = int(operations * (times - 1))
        live = self.live([*members, node])
        registers = self.target.vector_registers
        spilled = max(0, live - registers) - max(0, self.live(members) - registers)
        rate = CACHED_BYTES if nominal(value.type.nbytes) <= self.target.cache_bytes else MEMORY_BYTES
        vectors = nominal(product(shape)) / self.lanes(node)
        cycles = nominal(saved) / rate + CALL - repeated / self.lanes(node) - 2 * spilled * vectors
        return Price(saved, repeated, live, registers, cycles)

    def live(self, members: Collection[Node]) -> int:
        """The most vectors that are alive at a time, if the nodes are computed in the order of the graph, users given first.

        What is loaded for one use is no vector of its own: it is an operand in memory of that use.
        """
        inside = set(members)
        left = {
            v: sum(user in inside for user in self.graph.users.get(v, ()))
            for n in members
            for v in (*n.inputs, *n.outputs)
        }
        alive: set[Value] = set()
        most = 0
        for node in reversed(tuple(members)):
            loaded = {v for v in node.inputs if left[v] > 1 and not is_number(self.graph, v)}
            alive |= loaded | set(node.outputs)
            most = max(most, len(alive))
            for value in node.inputs:
                left[value] -= 1
            alive -= {v for v in node.inputs if left[v] <= 0}
        return most

    def lanes(self, node: Node) -> int:
        """Elements of a node's result in one vector."""
        return max(1, self.target.vector_bytes // node.output.type.dtype.itemsize)


def is_number(graph: Graph, value: Value) -> bool:
    """Whether a value is one number everywhere, which a kernel holds."""
    node = graph.producer.get(value)
    return node is not None and node.is_constant and not isinstance(node.attrs["value"], ConstantRef)

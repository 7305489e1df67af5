"""fold-constants: compute at compile time what depends on constants only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Graph, GraphBuilder, Node
from mlec.ir.op import Array, attr_symbols
from mlec.passes.cse import attrs_key
from mlec.pipeline import Pass, PassContext, PassResult, Remark


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluates nodes with constant operands by the reference interpreter; equal nodes on the same operands once, for one constant.

    Options:
        max_growth: a result may be this many times as large as its operands; beyond 64 KiB a larger one is computed at run time.
    """

    max_growth: int = 4
    name: ClassVar[str] = "fold-constants"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        known: dict[object, Array] = {}
        evaluated: dict[object, list[Array]] = {}
        remarks: list[Remark] = []
        for node in graph.nodes:
            if node.is_constant:
                value = graph.constant_value(node.output)
                assert value is not None
                known[node.output] = value
                b.keep(node)
                continue
            operands = [known.get(v) for v in node.inputs]
            if (
                any(a is None for a in operands)
                or attr_symbols(node.attrs)
                or not all(v.type.is_static for v in node.outputs)
            ):
                b.keep(node)
                continue
            arrays = [a for a in operands if a is not None]
            if self._grows(node, arrays):
                remarks.append(
                    Remark("missed", f"{node.name} is constant, but larger than what it is made from", node.loc)
                )
                b.keep(node)
                continue
            key = (node.name, attrs_key(node), tuple(map(id, arrays)))
            if key not in evaluated:
                with np.errstate(all="ignore"):
                    evaluated[key] = list(node.op.evaluate(arrays, node.attrs, {}))
            with b.at(node.loc):
                for output, result in zip(node.outputs, evaluated[key], strict=True):
                    known[output] = result
                    b.replace(output, b.constant(result, output.hint))
            remarks.append(Remark("applied", f"{node.name} of constants", node.loc))
        if not any(r.kind == "applied" for r in remarks):
            return PassResult(graph, tuple(remarks))
        return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(remarks))

    def _grows(self, node: Node, operands: list[Array]) -> bool:
        made = sum(v.type.nbytes for v in node.outputs if isinstance(v.type.nbytes, int))
        used = sum(a.nbytes for a in operands)
        return made > max(1 << 16, self.max_growth * used)

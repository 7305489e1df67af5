"""A backend of a third party: it runs graphs with mlec's interpreter, and counts the calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from mlec.backends.base import Backend, CompiledModule, CompileOptions
from mlec.ir import Graph, run_graph
from mlec.ir.op import OPS, Array
from mlec.registry import backend_of
from mlec.runtime.program import Program
from mlec.target import Target


class CountingBackend(Backend):
    """Serves targets of the kind ``"counting"``."""

    name = "counting"
    targets: ClassVar = {"counting": "an interpreter that counts", "counting:slowly": "the same"}

    def how(self, op: str, kind: str) -> str:
        return "counted" if op in OPS else ""

    def compile(self, graph: Graph, target: Target, options: CompileOptions | None = None) -> CompiledModule:
        facts: dict[str, str | int | list[str]] = {"kind": target.kind, "archs": list(target.archs)}
        program = Program(backend=self.name, device="cpu", constants=tuple(graph.constants), target=facts)
        return CompiledModule(program, (), graph.constants, graph.signature)

    def executable(self, graph: Graph, num_threads: int | None = None) -> Counted:
        return Counted(graph)


class Counted:
    """A graph that runs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.calls = 0

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.calls += 1
        return [a.copy() for a in run_graph(self.graph, inputs)]


class Greedy(CountingBackend):
    """Claims a target that another backend serves."""

    name = "greedy"
    targets: ClassVar = {"cuda": "mine"}


class Borrowing(Backend):
    """Hands over object files, as the tvm backend makes them."""

    name = "borrowing"
    targets: ClassVar = {"borrowing": "the processor of the machine that compiles"}

    def how(self, op: str, kind: str) -> str:
        return "borrowed"

    def compile(self, graph: Graph, target: Target, options: CompileOptions | None = None) -> CompiledModule:
        made = backend_of("cpu").compile(graph, Target(), options)
        program = msgspec.structs.replace(
            made.program, backend=self.name, target={**made.program.target, "kind": target.kind}
        )
        return dataclasses.replace(made, program=program)


class Narrow(CountingBackend):
    """Lowers everything but ``tanh``, and takes graphs without fused nodes unless the user says otherwise."""

    name = "narrow"
    targets: ClassVar = {"narrow": "no tanh"}
    pipeline = "O1"

    def how(self, op: str, kind: str) -> str:
        return "" if op == "tanh" else super().how(op, kind)

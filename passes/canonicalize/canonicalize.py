"""canonicalize: one spelling for each computation, and no work that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Graph, Rule, apply_rules
from mlec.passes.canonicalize import algebra, casts, views
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Algebraic identities, cancelling views and casts, recognition of relu and silu; to fixpoint."""

    name: ClassVar[str] = "canonicalize"
    preserves: ClassVar[Tolerance] = Tolerance(
        signed_zeros=False
    )  # of maximum(-0.0, 0.0), relu may give the other zero
    rules: ClassVar[Sequence[Rule]] = (*algebra.RULES, *views.RULES, *casts.RULES)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, context.taken(self.rules)))

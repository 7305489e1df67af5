"""recognize: normalisations, activations, attention and spectra that are spelled out become the one op that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Graph, apply_rules
from mlec.passes.recognize import activations, attention, norms, products, reductions, softmax, spectra
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance

EXACT_SPECIALS = Tolerance(rtol=2e-5, atol=1e-6)
ANY_SPECIALS = Tolerance(rtol=2e-5, atol=1e-6, specials=False)


@dataclass(frozen=True)
class Recognize(Pass):
    """Layer, root-mean-square, group and instance norms, softmax, GELU, SiLU, sigmoid, masked attention, shared heads, spectra in pairs.

    Options:
        specials: NaN and infinities stay where the spelled-out formula has them. Without, masks that hide later positions become
            causal attention, which never reads what it hides, and norms of length 1 become root-mean-square norms.
    """

    specials: bool = True
    name: ClassVar[str] = "recognize"
    before: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = EXACT_SPECIALS

    def __post_init__(self) -> None:
        if not self.specials:
            object.__setattr__(self, "preserves", ANY_SPECIALS)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        rules = [
            *norms.RULES,
            *softmax.RULES,
            *activations.RULES,
            *attention.RULES,
            *spectra.RULES,
            *reductions.RULES,
            *products.RULES,
        ]
        if not self.specials:
            rules += [*norms.LOOSE_RULES, *attention.LOOSE_RULES]
        return PassResult.of_edits(*apply_rules(graph, context.taken(rules)))

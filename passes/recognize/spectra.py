"""Complex spectra as tensors of real numbers: torch's `view_as_real` of a Fourier transform."""

from __future__ import annotations

from mlec.ir import Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value


class Pairs(Rule):
    """concat(re, im) of the parts of a spectrum -> the spectrum in pairs"""

    pattern = P("concat", P("reshape", "re", bind="first"), P("reshape", "im", bind="second"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        fft = graph.producer.get(m["re"])
        if fft is None or fft.name not in ("fft", "rfft") or list(fft.outputs) != [m["re"], m["im"]]:
            return Miss()
        shape, rank = (*m["re"].type.shape, 1), m.node.output.type.rank
        if m.nodes["first"].output.type.shape != shape or m.node.attrs["axis"] % rank != rank - 1:
            return Miss()
        return Miss("the parts are read by others too") if _others(graph, fft, m) else None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        fft = graph.producer[m["re"]]
        return b(fft.name, *fft.inputs, **{**fft.attrs, "pairs": True})


def _others(graph: Graph, fft: Node, m: Match) -> bool:
    """Whether the parts are needed apart as well."""
    between = [m.nodes["first"], m.nodes["second"]]
    values = [*fft.outputs, *(node.output for node in between)]
    readers = {user for value in values for user in graph.users.get(value, ())}
    return bool(readers - {*between, m.node}) or any(value in graph.outputs for value in values)


RULES = [Pairs()]

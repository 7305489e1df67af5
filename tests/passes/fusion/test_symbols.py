"""Kernels of extents that are sums of several symbols."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import parse_graph, run_graph
from mlec.pipeline import PassPipeline


@pytest.mark.parametrize("rows", [(3, 4), (4, 0), (0, 2)])
def test_what_was_joined_is_fused(rows: tuple[int, int]) -> None:
    """The body of the kernel has m + n, and neither m nor n."""
    graph = parse_graph("""graph @g(%x: f32[n, 5], %y: f32[m, 5]) -> (f32[m+n, 5]) {
      %joined = concat(%x, %y) {axis = 0} : f32[m+n, 5]
      %total = cumsum(%joined) {axis = 1} : f32[m+n, 5]
      %a = tanh(%total) : f32[m+n, 5]
      %b = exp(%a) : f32[m+n, 5]
      return %b
    }""")
    fused, _ = PassPipeline.parse("fuse", verify="numeric").run(graph)
    assert [node.name for node in fused.nodes] == ["concat", "cumsum", "fused"]
    inputs = [np.linspace(-1, 1, 5 * n, dtype=np.float32).reshape(n, 5) for n in rows]
    np.testing.assert_array_equal(run_graph(fused, inputs)[0], run_graph(graph, inputs)[0])


def test_joins_that_share_an_operand_are_fused() -> None:
    graph = parse_graph("""graph @g(%x: f32[n], %y: f32[m], %z: f32[k]) -> (f32[m+n, k+m]) {
      %a = concat(%x, %y) {axis = 0} : f32[m+n]
      %b = concat(%y, %z) {axis = 0} : f32[k+m]
      %c = reshape(%a) {shape = [m+n, 1]} : f32[m+n, 1]
      %d = add(%c, %b) : f32[m+n, k+m]
      %e = tanh(%d) : f32[m+n, k+m]
      return %e
    }""")
    fused, _ = PassPipeline.parse("fuse", verify="numeric").run(graph)
    assert fused.nodes[-1].name == "fused"
    inputs = [np.linspace(-1, 1, n, dtype=np.float32) for n in (3, 1, 2)]
    np.testing.assert_array_equal(run_graph(fused, inputs)[0], run_graph(graph, inputs)[0])

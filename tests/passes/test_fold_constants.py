"""Constants that are made of constants."""

from __future__ import annotations

import numpy as np

from mlec.ir import GraphBuilder, tensor
from mlec.pipeline import PassPipeline


def test_equal_nodes_of_a_large_constant_become_one_constant() -> None:
    b = GraphBuilder("shared")
    x = b.input("x", tensor("f32", ("n", 40)))
    w = b.constant(np.ones((60, 40), np.float32))
    for _ in range(3):  # a layer that is called in a loop turns its weights each time
        turned = b("transpose", w, perm=(1, 0))
        x = b("matmul", b("tanh", b("matmul", x, turned)), w)
    graph = PassPipeline.parse("fold-constants,cse").run(b.finish([x]))[0]
    assert len(graph.constants) == 2
    assert len([n for n in graph.nodes if n.is_constant]) == 2

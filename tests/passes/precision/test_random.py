"""Random graphs whose weights are numbers of 16 bits already: nothing may move but the order of sums."""

import ml_dtypes
import numpy as np

from mlec.ir import Graph, run_graph
from mlec.passes.precision import MixedPrecision
from mlec.pipeline import PassContext, PassPipeline, TargetFacts
from mlec.tolerance import Tolerance
from tests.fuzz.graphs import random_sample

HALVES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def test_weights_of_16_bits_give_the_same_results():
    changed = 0
    for seed in range(400):
        dtype = list(HALVES)[seed % 2]
        sample = random_sample(seed)
        old = sample.graph
        constants = {
            name: array.astype(HALVES[dtype]).astype(array.dtype) if array.dtype == np.float32 else array
            for name, array in old.constants.items()
        }
        graph = Graph(old.name, old.inputs, old.nodes, old.outputs, constants, old.signature)
        pipeline = PassPipeline([MixedPrecision(dtype, activations="never", min_weights=1)])
        with np.errstate(all="ignore"):
            after, _ = pipeline.run(graph, PassContext(TargetFacts(cache_bytes=0)))
            if after is graph:
                continue
            changed += 1
            wanted, got = run_graph(graph, sample.inputs), run_graph(after, sample.inputs)
        tolerance = Tolerance(rtol=512 * sample.coarsest, atol=512 * sample.coarsest, signed_zeros=False)
        for a, b in zip(wanted, got, strict=True):
            assert tolerance.excess(a, b) <= 1, f"seed {seed}: {after}"
    assert changed >= 3

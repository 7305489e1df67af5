"""Random graphs whose weights are numbers of 16 bits already: nothing may move but the order of sums."""

import ml_dtypes
import numpy as np

from mlec.ir import Graph, GraphBuilder, run_graph
from mlec.passes.precision import MixedPrecision
from mlec.pipeline import PassContext, PassPipeline, TargetFacts
from mlec.tolerance import Tolerance
from tests.fuzz.graphs import Sample, random_sample

HALVES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def with_known_weights(sample: Sample, half: type) -> Graph:
    """Constants, and inputs of known shape, become constants of rounded numbers."""
    old, b = sample.graph, GraphBuilder("rounded")

    def rounded(array):
        return array.astype(half).astype(array.dtype) if array.dtype == np.float32 else array

    b.adopt_interface(
        Graph(old.name, old.inputs, (), (), {name: rounded(a) for name, a in old.constants.items()}, None)
    )
    for value, array in zip(old.inputs, sample.inputs, strict=True):
        if value.type.is_static and value.type.rank >= 2 and array.dtype == np.float32:
            b.replace(value, b.constant(rounded(array)))
    for node in old.nodes:
        b.keep(node)
    return b.finish(old.outputs)


def test_weights_of_16_bits_give_the_same_results():
    changed = 0
    for seed in range(200):
        dtype = list(HALVES)[seed % 2]
        sample = random_sample(seed)
        graph = with_known_weights(sample, HALVES[dtype])
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
    assert changed >= 5

"""Which convolutions are computed in bf16 where a processor multiplies such numbers."""

from __future__ import annotations

from mlec.ir import Node
from mlec.ir.dim import product, static_dims
from mlec.ops.windows import Geometry
from mlec.pipeline import TargetFacts

LEAST_TERMS = 8
"""Products of a sum that are worth a step of a matrix unit."""
LEAST_POSITIONS = 16
"""Of the image: the rows of a tile."""
WHOLE_BLOCK = 32
"""Channels that a group must divide into: a row of a tile."""


def is_depthwise(node: Node) -> bool:
    """Whether each channel of an image is convolved by itself, in kernels that widen the image as they read it."""
    if node.name != "conv" or node.output.type.rank != 4:
        return False
    x, w = (value.type.shape for value in node.inputs)
    known = all(isinstance(extent, int) for extent in (*x[1:], *w))
    return known and node.attrs["groups"] == w[0] == x[1] and w[0] % 4 == 0


def why_not_narrow(node: Node, target: TargetFacts) -> str:
    """Why a convolution is not computed in bf16, whatever its numbers, where the processor multiplies such; empty if it can be."""
    if node.name != "conv" or node.output.type.rank != 4:
        return "there are kernels for 2-d convolutions only"
    x, w = (value.type.shape for value in node.inputs)
    groups = node.attrs["groups"]
    extents, positions = product(w), product(node.output.type.shape[2:])
    if not isinstance(extents, int) or not isinstance(positions, int) or not all(isinstance(d, int) for d in x[1:]):
        return "its image has a symbolic extent"
    outputs, channels = (d for d in w[:2] if isinstance(d, int))
    if not outputs:
        return "it has no channels"
    if groups != 1 and (channels % WHOLE_BLOCK or outputs // groups % WHOLE_BLOCK):
        return f"its {groups} groups have {channels} and {outputs // groups} channels, not multiples of {WHOLE_BLOCK}"
    if outputs % 4 or extents // outputs < LEAST_TERMS:
        return f"sums of {extents // outputs} products for {outputs} channels do not fill tiles"
    if positions < LEAST_POSITIONS:
        return f"{positions} positions do not fill tiles"
    dense = Geometry.of(node.attrs, 2)
    once = groups == 1 and {*dense.strides, *dense.dilations} == {1} and w[2:] == (3, 3)
    if once and target.winograd(channels, outputs, static_dims(node.output.type.shape[2:])):
        return "Winograd's sums take less time"
    return ""

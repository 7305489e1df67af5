"""layout: store weights and images the way the kernels read them.

* ``matmul`` by a constant matrix becomes ``matmul_packed``: columns in blocks of two vector registers, so that a register tile
  streams its weights from consecutive memory.
* 2-d convolutions work on channel blocks (NCHWc): the block is the vector, so that neither operand needs a shuffle. The first
  convolution reads the plain image, or one that is brought into blocks for it, whichever takes less time; from there on the image
  stays in blocks through convolutions (also those of each channel by itself), elementwise ops, pooling, concatenation and global
  means, and goes back only where something else reads it.
  Convolutions of numbers of bf16, where the processor multiplies such, do so in the same blocks, or for a matrix unit in ones of twice
  as many channels.
  Convolutions between which an image stays in blocks are decided together: they do so where their arithmetic is worth the
  transposes around them. Those of 1 x 1 are matrix products on plain images, and gain nothing from blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Trait, Value
from mlec.ir.dim import product, static_dims
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.ops.conv import blocked_depthwise_weights, blocked_weights, is_pointwise, paired_weights
from mlec.ops.linalg import pack_columns, pack_narrow
from mlec.ops.windows import Geometry
from mlec.passes.precision.convolutions import why_not_narrow
from mlec.pipeline import Pass, PassContext, PassResult, Remark, TargetFacts, Tolerance, nominal, ulp
from mlec.wording import plural

MIN_BLOCK = 4
PRODUCTS = {"matmul": pack_columns, "matmul_narrow": pack_narrow}
FLOPS_PER_BYTE = 10
"""Arithmetic that takes as long as a byte that a transpose writes: 50 ps."""
PLAIN_LOSS = 0.4
"""How much longer a convolution takes on a plain image, as a part of its time on blocks: measured at 4 to 400 FLOPs a byte."""
DEPTHWISE_LOSS = 2.5
"""The same of one of each channel by itself, which moves as much as it computes: measured at 14 x 14 to 56 x 56."""
GATHER_LOSS = 0.2
"""The same of one on blocks that reads a plain image: each step of its sums finds its values in another part of memory."""
POOLS = frozenset({"max_pool", "avg_pool"})
FEW_CHANNELS = 16
"""Images of fewer channels are read as they lie by convolutions of bf16, which copy the channels side by side."""


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Packs constant weights and blocks the channels of images.

    Options:
        block: vector lanes in a block; 0 takes what the target has.
        images: whether convolutions are moved to channel blocks.
    """

    block: int = 0
    images: bool = True
    name: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = ulp(16)  # a mean over an image in blocks is taken in another order

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        plain: dict[Node, str] = {}
        while True:
            work = _Layout(graph, self.block, context.target, self.images, plain)
            result = work.run()
            losing = work.losing()
            if not losing:
                return result
            plain |= losing


@dataclass
class _Layout:
    graph: Graph
    block: int
    target: TargetFacts
    images: bool
    stay_plain: Mapping[Node, str] = field(default_factory=dict)  # convolutions that keep their layout, and why
    b: GraphBuilder = field(init=False)
    blocked: dict[Value, Value] = field(default_factory=dict)  # old plain value -> new value in channel blocks
    blocked_from_plain: set[Value] = field(default_factory=set)  # values whose plain form exists as well
    remarks: list[Remark] = field(default_factory=list)
    changed: bool = False
    regions: dict[Value, Value] = field(default_factory=dict)  # blocked values with a neighbour in the same region
    saved: dict[Node, float] = field(default_factory=dict)  # FLOPs that blocks save convolutions
    transposed: dict[Value, int] = field(default_factory=dict)  # bytes of the values that are transposed

    def run(self) -> PassResult:
        self.b = GraphBuilder(self.graph.name)
        self.b.adopt_interface(self.graph)
        for node in self.graph.nodes:
            with self.b.at(Location.merged((node.loc,), "layout")):
                done = self.product(node) or (self.images and (self.convolution(node) or self.follower(node)))
            for value in node.inputs:
                if node.outputs[0] in self.blocked and value in self.blocked:
                    self.regions[self.region(value)] = self.region(node.outputs[0])
            if not done:
                self.need_plain(node)
                self.b.keep(node)
        for value in self.graph.outputs:
            self.plain(value)
        if not self.changed:
            return PassResult(self.graph, tuple(self.remarks))
        return PassResult(self.b.finish(self.graph.outputs, signature=self.graph.given_signature), tuple(self.remarks))

    def region(self, value: Value) -> Value:
        """The one that stands for all blocked values that a value is connected with."""
        while self.regions.get(value, value) is not value:
            value = self.regions[value]
        return value

    def losing(self) -> dict[Node, str]:
        """The convolutions of regions whose transposes cost more than their blocks save."""
        saved, moved = Counter[Value](), Counter[Value]()
        for node, count in self.saved.items():
            saved[self.region(node.output)] += round(count)
        for value, count in self.transposed.items():
            moved[self.region(value)] += count
        return {
            node: f"transposes of {moved[place]:,} bytes cost more than "
            + (
                f"the time of {saved[place]:,} FLOPs that blocks save"
                if saved[place]
                else "blocks, which save no time here"
            )
            for node in self.saved
            if saved[place := self.region(node.output)] < FLOPS_PER_BYTE * moved[place]
        }

    def lanes(self, value: Value) -> int:
        return self.block or max(1, self.target.vector_bytes // value.type.dtype.itemsize)

    def applied(self, node: Node, message: str) -> None:
        self.changed = True
        self.remarks.append(Remark("applied", message, node.loc, "layout"))

    # -- matrix products -----------------------------------------------------------------------------------------

    def product(self, node: Node) -> bool:
        """matmul(x, w) -> matmul_packed(x, w in column blocks), for a constant matrix w; the same of matmul_narrow"""
        if node.name not in PRODUCTS or node.inputs[1].type.rank != 2 or not node.output.type.dtype.is_float:
            return False
        weights = self.graph.constant_value(node.inputs[1])
        if weights is None or 0 in weights.shape:
            return False
        block = column_block(weights.shape[1], self.lanes(node.output))
        if block == 0:
            self.remarks.append(
                Remark("missed", f"{plural(weights.shape[1], 'column')}: less than half a vector", node.loc, "layout")
            )
            return False
        self.plain(node.inputs[0])
        pack = PRODUCTS[node.name]
        packed = self.b.constant(pack(weights, block), node.inputs[1].hint)
        result = self.b(f"{node.name}_packed", node.inputs[0], packed, n=weights.shape[1], hint=node.output.hint)
        self.b.replace(node.output, result)
        self.applied(node, f"weights [{weights.shape[0]}, {weights.shape[1]}] packed in blocks of {block} columns")
        return True

    # -- images --------------------------------------------------------------------------------------------------

    def convolution(self, node: Node) -> bool:
        """conv(x, w) -> conv2d_nchwc(x in blocks, w in blocks)"""
        if node.name != "conv" or node.output.type.rank != 4:
            return False
        x, w = node.inputs
        weights = self.graph.constant_value(w)
        symbolic = [extent for extent in x.type.shape[2:] if not isinstance(extent, int)]
        if node in self.stay_plain:
            message = f"the convolution keeps its layout: {self.stay_plain[node]}"
            self.remarks.append(Remark("missed", message, node.loc, "layout"))
            return False
        if weights is not None and not symbolic and self.is_depthwise(node):
            return self.depthwise(node, weights)
        if weights is not None and self.narrow_convolution(node, weights):
            return True
        if weights is None or symbolic or node.attrs["groups"] != 1:
            reason = (
                "its weights are not constant"
                if weights is None
                else f"its image has a symbolic extent, {symbolic[0]}"
                if symbolic
                else f"it has {node.attrs['groups']} groups"
            )
            self.remarks.append(Remark("missed", f"the convolution keeps its layout: {reason}", node.loc, "layout"))
            return False
        lanes = self.lanes(x)
        out_block = channel_block(weights.shape[0], lanes)
        if out_block < MIN_BLOCK:
            self.remarks.append(
                Remark("missed", f"{weights.shape[0]} output channels do not divide into vectors", node.loc, "layout")
            )
            return False
        source = self.to_blocks(x, lanes) if self.reads_blocks(node) else self.single_channels(x)
        packed = self.b.constant(blocked_weights(weights, _block_of(source), out_block), w.hint)
        attrs = {k: v for k, v in node.attrs.items() if k != "groups"}
        self.blocked[node.output] = self.b("conv2d_nchwc", source, packed, hint=node.output.hint, **attrs)
        self.saved[node] = nominal(node.cost.flops) * self.plain_loss(node)
        self.applied(node, f"convolution on blocks of {_block_of(source)} to {out_block} channels")
        return True

    def reads_blocks(self, node: Node) -> bool:
        """Whether the image of a convolution is in blocks, or is worth to be brought into them, whole vectors, for it."""
        x = node.inputs[0]
        channels = x.type.shape[1]
        whole = isinstance(channels, int) and channels % self.lanes(x) == 0
        worth = nominal(node.cost.flops) * GATHER_LOSS > nominal(x.type.nbytes) * FLOPS_PER_BYTE
        return x in self.blocked or (whole and worth)

    def plain_loss(self, node: Node) -> float:
        """How much longer the convolution takes on a plain image, as a part of its time on blocks.

        One of 1 x 1 is a matrix product there, whose vectors are of positions: their last one may be wanting.
        """
        positions, lanes = nominal(product(node.output.type.shape[2:])), self.lanes(node.output)
        if is_pointwise(static_dims(node.inputs[1].type.shape[2:]), Geometry.of(node.attrs, 2)):
            return -(-positions // lanes) * lanes / positions - 1
        return PLAIN_LOSS

    def narrow_convolution(self, node: Node, weights: Array) -> bool:
        """conv(cast(x), w) -> conv2d_narrow(x in blocks, w in pairs), where x and w hold numbers of bf16"""
        w, (k, c) = node.inputs[1], weights.shape[:2]
        x, narrow = self.narrow_image(node), weights.astype(DType.BF16.numpy)
        if x is None or why_not_narrow(node, self.target) or not np.array_equal(narrow, weights, equal_nan=True):
            return False
        few = x not in self.blocked and c < FEW_CHANNELS
        lanes = self.narrow_lanes(node, x)
        source = self.single_channels(x) if few else self.to_blocks(x, lanes)
        groups, block = node.attrs["groups"], channel_block(k // node.attrs["groups"], lanes)
        if c % _block_of(source):
            return False
        packed = self.b.constant(paired_weights(narrow, _block_of(source), groups), w.hint)
        attrs = {**node.attrs, "outputs": k, "block": block}
        self.blocked[node.output] = self.b("conv2d_narrow", source, packed, hint=node.output.hint, **attrs)
        self.saved[node] = nominal(node.cost.flops) * PLAIN_LOSS
        self.applied(node, f"convolution of bf16 on blocks of {_block_of(source)} to {block} channels")
        return True

    def narrow_lanes(self, node: Node, x: Value) -> int:
        """Channels of a block of an image of bf16: a row of a tile is a vector of these, the sums of vectors are as many as of float32."""
        return self.lanes(x if self.target.bf16_tiles else node.output)

    def narrow_image(self, node: Node) -> Value | None:
        """What the image of a convolution is in bf16, if it is and the processor multiplies that."""
        made = self.graph.producer.get(node.inputs[0])
        if made is None or made.name != "cast" or made.inputs[0].type.dtype is not DType.BF16:
            return None
        return made.inputs[0] if self.target.bf16_products > 1 else None

    def is_depthwise(self, node: Node) -> bool:
        """Whether each channel is convolved by itself, and enough of them make a block."""
        x, w = node.inputs
        channels, lanes = w.type.shape[0], self.lanes(x)
        assert isinstance(channels, int)
        block = channel_block(channels, lanes)
        wide = block >= MIN_BLOCK and (block * 2 >= lanes or x in self.blocked)
        return node.attrs["groups"] == channels == x.type.shape[1] and wide

    def depthwise(self, node: Node, weights: Array) -> bool:
        """conv(x, w, groups=channels) -> depthwise2d_nchwc(x in blocks, w in blocks), of x in bf16 where it is that"""
        x, w = self.narrow_image(node) or node.inputs[0], node.inputs[1]
        source = self.to_blocks(x, self.narrow_lanes(node, x))
        block = _block_of(source)
        packed = self.b.constant(blocked_depthwise_weights(weights, block), w.hint)
        attrs = {k: v for k, v in node.attrs.items() if k != "groups"}
        self.blocked[node.output] = self.b("depthwise2d_nchwc", source, packed, hint=node.output.hint, **attrs)
        self.saved[node] = nominal(node.cost.flops) * DEPTHWISE_LOSS
        self.applied(node, f"depthwise convolution on blocks of {block} channels")
        return True

    def follower(self, node: Node) -> bool:
        """Keeps blocks through pooling, elementwise ops and the global mean."""
        if not node.inputs or node.is_constant:
            return False
        if node.name in POOLS and node.inputs[0] in self.blocked:
            self.blocked[node.output] = self.b(
                node.op, self.blocked[node.inputs[0]], hint=node.output.hint, **node.attrs
            )
            return True
        if node.op.has(Trait.ELEMENTWISE):
            return self.elementwise(node)
        if node.name == "concat" and node.attrs["axis"] % node.output.type.rank == 1:
            return self.concat(node)
        if node.name in ("mean", "sum", "max", "min") and node.inputs[0] in self.blocked:
            return self.global_reduction(node)
        return False

    def elementwise(self, node: Node) -> bool:
        leader = next((v for v in node.inputs if v in self.blocked and v.type.shape == node.output.type.shape), None)
        if leader is None:
            return False
        block = _block_of(self.blocked[leader])
        operands: list[Value] = []
        for value in node.inputs:
            fitting = self.fitting_operand(value, node.output, block)
            if fitting is None:
                return False
            operands.append(fitting)
        self.blocked[node.output] = self.b(node.op, *operands, hint=node.output.hint, **node.attrs)
        return True

    def concat(self, node: Node) -> bool:
        """One image's channels after another's, where all have blocks of one size."""
        parts = [self.blocked.get(value) for value in node.inputs]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or len({_block_of(part) for part in known}) != 1:
            return False
        self.blocked[node.output] = self.b(node.op, *known, hint=node.output.hint, axis=1)
        return True

    def fitting_operand(self, value: Value, like: Value, block: int) -> Value | None:
        """The operand in channel blocks: an image of the same shape, or a constant that broadcasts over space."""
        if value.type.shape == like.type.shape:
            known = self.blocked.get(value)
            if known is not None and _block_of(known) == block:
                return known
            return self.to_blocks(value, block) if known is None else None
        if value.type.rank == 0:
            return value
        if value.type.shape == (
            *like.type.shape[:2],
            1,
            1,
        ):  # a factor for each channel of each image: no element moves
            channels = self.to_blocks(value, block)
            return channels if _block_of(channels) == block else None
        constant = self.graph.constant_value(value)
        if constant is None:
            return None
        full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
        if full.shape[0] != 1 or full.shape[2:] != (1, 1):
            return None
        if full.shape[1] == 1:
            return self.b.constant(full.reshape(()), value.hint)
        return self.b.constant(full.reshape(1, -1, 1, 1, block), value.hint)

    def global_reduction(self, node: Node) -> bool:
        axes = tuple(a % 4 for a in node.attrs["axes"])
        if sorted(axes) != [2, 3]:
            return False
        reduced = self.b(node.op, self.blocked[node.inputs[0]], axes=(2, 3), keepdims=False)
        self.b.replace(node.output, self.b("reshape", reduced, shape=node.output.type.shape, hint=node.output.hint))
        return True

    # -- between the layouts -------------------------------------------------------------------------------------

    def single_channels(self, value: Value) -> Value:
        """A plain image as blocks of one channel, which is the same memory. A convolution reads single elements: any block will do."""
        n, channels, h, w = value.type.shape
        return self.b("reshape", value, shape=(n, channels, h, w, 1), hint=value.hint)

    def to_blocks(self, value: Value, lanes: int) -> Value:
        """The image in channel blocks, converted where it is not."""
        if value not in self.blocked:
            n, channels, h, w = value.type.shape
            assert isinstance(channels, int)  # the type rule of conv ties them to the weights
            block = channel_block(channels, lanes)
            split = self.b("reshape", value, shape=(n, channels // block, block, h, w))
            self.blocked[value] = self.b("transpose", split, perm=(0, 1, 3, 4, 2), hint=value.hint)
            self.blocked_from_plain.add(value)
            self.transposed[value] = nominal(value.type.nbytes)
        return self.blocked[value]

    def plain(self, value: Value) -> None:
        """Makes sure that the value exists in the plain layout."""
        if value in self.blocked and value not in self.blocked_from_plain:
            source = self.blocked[value]
            split = self.b("transpose", source, perm=(0, 1, 4, 2, 3))
            self.b.replace(value, self.b("reshape", split, shape=value.type.shape, hint=value.hint))
            self.blocked_from_plain.add(value)
            self.transposed[value] = nominal(value.type.nbytes)

    def need_plain(self, node: Node) -> None:
        for value in node.inputs:
            self.plain(value)


def _block_of(value: Value) -> int:
    block = value.type.shape[-1]
    assert isinstance(block, int)
    return block


def channel_block(channels: int, lanes: int) -> int:
    """The largest divisor of the channels that is a power of two up to the lanes; all channels when there are fewer than four."""
    if channels < MIN_BLOCK:
        return channels
    block = 1
    while block * 2 <= lanes and channels % (block * 2) == 0:
        block *= 2
    return block


def padded_columns(columns: int, lanes: int) -> int:
    """Columns that are computed of a product with so many: whole blocks."""
    block = column_block(columns, lanes) or lanes
    return -(-columns // block) * block


def column_block(columns: int, lanes: int) -> int:
    """Two vectors for wide matrices, one for narrow ones, none (0) where most of a vector would be padding."""
    if columns * 2 < lanes:
        return 0
    return lanes if columns <= lanes else 2 * lanes

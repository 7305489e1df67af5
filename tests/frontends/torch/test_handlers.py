"""The table of handlers against torch's own: each key is an op that exists, and the usual networks' ops are there."""

from __future__ import annotations

import pytest
import torch

from mlec.frontends import fx_export  # noqa: F401  (fills the table)
from mlec.frontends.fx_context import HANDLERS

USUAL = """
add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar exp.default log.default sqrt.default rsqrt.default abs.default
relu.default gelu.default silu.default sigmoid.default tanh.default leaky_relu.default elu.default hardtanh.default
linear.default addmm.default mm.default bmm.default matmul.default convolution.default
max_pool2d.default avg_pool2d.default adaptive_avg_pool2d.default batch_norm.default layer_norm.default group_norm.default
softmax.int log_softmax.int scaled_dot_product_attention.default embedding.default lstm.input gru.input
mean.dim sum.dim_IntList amax.default argmax.default cumsum.default topk.default sort.default
view.default reshape.default permute.default transpose.int cat.default stack.default slice.Tensor select.int index.Tensor
gather.default where.self masked_fill.Scalar expand.default unsqueeze.default squeeze.dim pad.default
upsample_nearest2d.vec upsample_bilinear2d.vec arange.start_step full.default zeros_like.default
"""


def overload(name: str) -> object:
    """The op of a key such as ``aten.relu.default``.

    Raises:
        AttributeError: torch has none of that name.
    """
    namespace, op, kind = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), kind)


@pytest.mark.parametrize("name", sorted(HANDLERS))
def test_key_names_an_op_of_torch(name: str) -> None:
    found = overload(name)
    assert isinstance(found, torch._ops.OpOverload)
    assert str(found) == name


def test_a_typing_error_would_be_found() -> None:
    with pytest.raises(AttributeError):
        overload("aten.relu.defualt")
    with pytest.raises(AttributeError):
        overload("aten.rellu.default")


def test_the_ops_of_usual_networks_are_lowered() -> None:
    decomposed = {str(op) for op in torch.export.default_decompositions()}
    missing = [name for name in USUAL.split() if f"aten.{name}" not in HANDLERS and f"aten.{name}" not in decomposed]
    assert not missing

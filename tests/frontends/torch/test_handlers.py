"""The table of handlers against torch's own: each key is an op that exists and, where it goes over elements, gives what torch gives;
the usual networks' ops are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from mlec.errors import UnsupportedOpError
from mlec.frontends import fx_export  # noqa: F401  (fills the table)
from mlec.frontends.fx_context import HANDLERS
from tests.frontends.torch.common import lower
from tests.frontends.torch.test_ops import Together, first_rows, ints, special

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


# -- ops on elements -------------------------------------------------------------------------------------------------

OPERANDS: dict[str, Callable[[int], torch.Tensor]] = {
    "f32": lambda k: special().roll(5 * k, 1),
    "i64": lambda k: ints(3, 14, low=1, high=6).roll(5 * k, 1),
}
"""By element type, the k-th tensor of a call; numbers are 2."""
ARBITRARY = {
    "aten.empty_like.default": "what it holds is anybody's guess",
    "aten.searchsorted.Tensor": "of boundaries in no order it gives any place: see test_places_among_boundaries",
    "aten.gelu.default": "of an infinity it is NaN or the limit, depending on the position of the element: see test_gelu",
}
REFUSED = {
    "aten.pow.Scalar",
    "aten.pow.Tensor_Tensor",
}
"""Ops that are not lowered for integers, each with an error of its own."""


def call_of(name: str) -> tuple[Callable[..., Any], int] | None:
    """Calls an op with tensors, and how many; None for an op that needs more than tensors and numbers."""
    op: Any = overload(name)
    kinds = [str(a.type) for a in op._schema.arguments if not a.has_default_value()]
    if "Tensor" not in kinds or not set(kinds) <= {"Tensor", "number"}:
        return None

    def call(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return op(*[next(given) if kind == "Tensor" else 2 for kind in kinds])

    return call, kinds.count("Tensor")


def on_elements(name: str, dtype: str) -> bool:
    """Whether torch takes these elements, and gives a tensor of the same shape."""
    call, count = call_of(name) or (None, 0)
    if call is None or name in ARBITRARY:
        return False
    for tensors in (operands(dtype, count), first_rows(operands(dtype, count))):
        try:
            result = call(*tensors)
        except (RuntimeError, IndexError):  # of other shapes or elements: these ops have tests of their own
            return False
        if not isinstance(result, torch.Tensor) or result.shape != tensors[0].shape:
            return False
    return True


def operands(dtype: str, count: int) -> list[torch.Tensor]:
    return [OPERANDS[dtype](k) for k in range(count)]


CALLS = [(name, dtype) for name in sorted(HANDLERS) for dtype in OPERANDS if on_elements(name, dtype)]


@cache
def together(dtype: str, count: int) -> Together | None:
    """All ops of so many tensors in one graph, which is quicker; None if one of them fails."""
    found = {name: call_of(name) for name, of in CALLS if of == dtype and (of == "f32" or name not in REFUSED)}
    calls = {name.replace(".", "_"): made[0] for name, made in found.items() if made is not None and made[1] == count}
    group = Together(calls, *operands(dtype, count))
    try:
        group.outputs  # noqa: B018
    except Exception:
        return None
    return group


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_an_op_on_elements_gives_what_torch_gives(name: str, dtype: str) -> None:
    made = call_of(name)
    assert made is not None
    call, count = made
    key = name.replace(".", "_")
    if dtype != "f32" and name in REFUSED:
        with pytest.raises(UnsupportedOpError):
            lower(call, *operands(dtype, count))
        return
    (together(dtype, count) or Together({key: call}, *operands(dtype, count))).check(key)

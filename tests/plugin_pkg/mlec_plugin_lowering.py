"""How the tvm backend lowers the third party's op: for one element, on every device, alone and in fused loops."""

from __future__ import annotations

from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.vector import const_like, maximum, minimum
from mlec.backends.tvm.registry import lowers


@lowers("hard_swish", form="scalar")
def hard_swish(x: Expr) -> Expr:
    shifted = maximum(x + const_like(3.0, x), const_like(0.0, x))
    return x * minimum(shifted, const_like(6.0, x)) / const_like(6.0, x)

"""Every op of the IR: one declaration each, grouped by family. Importing this package fills `mlec.ir.OPS`."""

from mlec.ir.op import OPS
from mlec.ops import (
    attention,
    conv,
    elementwise,
    fourier,
    fused,
    linalg,
    norm,
    pool,
    quant,
    recurrent,
    reduce,
    resize,
    shape,
    tree,
)

__all__ = [
    "OPS", "attention", "conv", "elementwise", "fourier", "fused", "linalg", "norm", "pool", "quant", "recurrent", "reduce",
    "resize", "shape", "tree",
]  # fmt: skip

"""Every op of the IR: one declaration each, grouped by family. Importing this package fills `mlec.ir.OPS`."""

from mlec.ir.op import OPS
from mlec.ops import elementwise, fused, linalg, nn, reduce, shape, tree

__all__ = ["OPS", "elementwise", "fused", "linalg", "nn", "reduce", "shape", "tree"]

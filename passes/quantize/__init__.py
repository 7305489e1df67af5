"""quantize-int8: layers of a network on 8 bits, where that keeps their results and is faster."""

from mlec.passes.quantize.quantize import QuantizeInt8

__all__ = ["QuantizeInt8"]

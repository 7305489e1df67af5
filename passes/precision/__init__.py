"""mixed-precision: weights, and where that pays the rows of products, in 16 bits; sums in 32."""

from mlec.passes.precision.formats import FORMATS, Format
from mlec.passes.precision.mixed import MixedPrecision

__all__ = ["FORMATS", "Format", "MixedPrecision"]

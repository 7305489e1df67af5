"""Recognition: formulas that are spelled out become the op that computes them at once."""

from mlec.passes.recognize.recognize import Recognize

__all__ = ["Recognize"]

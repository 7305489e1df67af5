"""Numerical stability: intervals, hazards, inputs that show them, and stable rewrites."""

from mlec.passes.stability.check import CheckNumerics

__all__ = ["CheckNumerics"]

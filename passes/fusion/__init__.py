"""Fusion: several nodes become one kernel."""

from mlec.passes.fusion.fuse import FuseOperators

__all__ = ["FuseOperators"]

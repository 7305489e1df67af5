"""Vectorisation: work that the source wrote as many small equal steps becomes array work."""

from mlec.passes.vectorize.vectorize import Vectorize

__all__ = ["Vectorize"]

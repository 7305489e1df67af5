"""One spelling for each computation."""

from mlec.passes.canonicalize.canonicalize import Canonicalize

__all__ = ["Canonicalize"]

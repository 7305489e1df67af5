"""Passes on `tree_ensemble`: preprocessing goes into the thresholds, what no row needs goes away. All are exact."""

from mlec.passes.trees.fold_into_thresholds import FoldIntoThresholds
from mlec.passes.trees.merge import MergeTrees
from mlec.passes.trees.prune import PruneTrees

__all__ = ["FoldIntoThresholds", "MergeTrees", "PruneTrees"]

"""Tree ensembles: gradient boosting, forests, single trees; exact, from arrays (see `TreeEnsemble`)."""

from mlec.backends.tvm.kernels.tree_ensemble.ensemble import TreeEnsemble
from mlec.backends.tvm.kernels.tree_ensemble.kernel import build
from mlec.backends.tvm.kernels.tree_ensemble.plan import Plan, TreeSchedule, prepare

__all__ = ["Plan", "TreeEnsemble", "TreeSchedule", "build", "prepare"]

"""mlec: a compiler for trained models.

```python
import mlec

cm = mlec.compile(estimator)                  # scikit-learn, XGBoost, LightGBM, PyTorch, or a file of one
cm.predict(X)
cm.save("model.mle")
mlec.load("model.mle").predict(X)             # without the training framework
```
Importing this package imports nothing heavy: public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlec.api import compile, export_model, load_model, lower, optimize, validate_export
    from mlec.artifact import TrustDigest
    from mlec.errors import (
        ArtifactError,
        CorruptedFileError,
        FrontendError,
        InputError,
        LoweringError,
        MlecError,
        NotFittedModelError,
        ParseError,
        PassError,
        RuntimeUnavailableError,
        SecurityError,
        TargetError,
        ToleranceError,
        TypeRuleError,
        UnsupportedModelError,
        UnsupportedOpError,
        UntrustedPickleError,
        UsageError,
        VerifyError,
        VersionMismatchError,
        WriteError,
    )
    from mlec.ir import Graph
    from mlec.packaging.bundling import BundleResult, bundle
    from mlec.packaging.loading import load
    from mlec.passes.canonicalize import Canonicalize
    from mlec.passes.cse import EliminateCommonSubexpressions
    from mlec.passes.dce import EliminateDeadCode
    from mlec.passes.fold_batch_norm import FoldBatchNorm
    from mlec.passes.fold_constants import FoldConstants
    from mlec.passes.fold_lookups import FoldLookups
    from mlec.passes.fold_products import FoldProducts
    from mlec.passes.fold_scales import FoldScales
    from mlec.passes.fusion import FuseOperators
    from mlec.passes.hoist_slices import HoistSlices
    from mlec.passes.infer_shapes import InferShapes
    from mlec.passes.layout import ChooseLayout
    from mlec.passes.lift_sequences import LiftSequences
    from mlec.passes.merge_products import MergeProducts
    from mlec.passes.precision import MixedPrecision
    from mlec.passes.quantize import QuantizeInt8
    from mlec.passes.recognize import Recognize
    from mlec.passes.sink_transposes import SinkTransposes
    from mlec.passes.split_products import SplitProducts
    from mlec.passes.stability import CheckNumerics
    from mlec.passes.trees import FoldIntoThresholds, MergeTrees, PruneTrees
    from mlec.passes.vectorize import Vectorize
    from mlec.pipeline import Pass, PassContext, PassPipeline, PassResult, Remark, Tolerance, register_pass
    from mlec.report import OptimizationReport
    from mlec.runtime import BenchmarkResult, CompiledModel, Profile
    from mlec.signature import Signature
    from mlec.target import Target

__version__ = "0.1.0"

_ERRORS = (
    "ArtifactError CorruptedFileError FrontendError InputError LoweringError MlecError NotFittedModelError ParseError PassError "
    "RuntimeUnavailableError SecurityError TargetError ToleranceError TypeRuleError UnsupportedModelError UnsupportedOpError "
    "UntrustedPickleError UsageError VerifyError VersionMismatchError WriteError"
)
_WHERE = {
    "mlec.api": "compile export_model load_model lower optimize validate_export",
    "mlec.artifact": "TrustDigest",
    "mlec.packaging.bundling": "BundleResult bundle",
    "mlec.errors": _ERRORS,
    "mlec.ir": "Graph",
    "mlec.packaging.loading": "load",
    "mlec.passes.canonicalize": "Canonicalize",
    "mlec.passes.cse": "EliminateCommonSubexpressions",
    "mlec.passes.dce": "EliminateDeadCode",
    "mlec.passes.fold_batch_norm": "FoldBatchNorm",
    "mlec.passes.fold_constants": "FoldConstants",
    "mlec.passes.fold_lookups": "FoldLookups",
    "mlec.passes.fold_products": "FoldProducts",
    "mlec.passes.fold_scales": "FoldScales",
    "mlec.passes.fusion": "FuseOperators",
    "mlec.passes.hoist_slices": "HoistSlices",
    "mlec.passes.infer_shapes": "InferShapes",
    "mlec.passes.layout": "ChooseLayout",
    "mlec.passes.lift_sequences": "LiftSequences",
    "mlec.passes.merge_products": "MergeProducts",
    "mlec.passes.precision": "MixedPrecision",
    "mlec.passes.quantize": "QuantizeInt8",
    "mlec.passes.recognize": "Recognize",
    "mlec.passes.sink_transposes": "SinkTransposes",
    "mlec.passes.split_products": "SplitProducts",
    "mlec.passes.stability": "CheckNumerics",
    "mlec.passes.trees": "FoldIntoThresholds MergeTrees PruneTrees",
    "mlec.passes.vectorize": "Vectorize",
    "mlec.pipeline": "Pass PassContext PassPipeline PassResult Remark Tolerance register_pass",
    "mlec.report": "OptimizationReport",
    "mlec.runtime": "BenchmarkResult CompiledModel Profile",
    "mlec.signature": "Signature",
    "mlec.target": "Target",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = [
    "ArtifactError",
    "BenchmarkResult",
    "BundleResult",
    "Canonicalize",
    "CheckNumerics",
    "ChooseLayout",
    "CompiledModel",
    "CorruptedFileError",
    "EliminateCommonSubexpressions",
    "EliminateDeadCode",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldIntoThresholds",
    "FoldLookups",
    "FoldProducts",
    "FoldScales",
    "FrontendError",
    "FuseOperators",
    "Graph",
    "HoistSlices",
    "InferShapes",
    "InputError",
    "LiftSequences",
    "LoweringError",
    "MergeProducts",
    "MergeTrees",
    "MixedPrecision",
    "MlecError",
    "NotFittedModelError",
    "OptimizationReport",
    "ParseError",
    "Pass",
    "PassContext",
    "PassError",
    "PassPipeline",
    "PassResult",
    "Profile",
    "PruneTrees",
    "QuantizeInt8",
    "Recognize",
    "Remark",
    "RuntimeUnavailableError",
    "SecurityError",
    "Signature",
    "SinkTransposes",
    "SplitProducts",
    "Target",
    "TargetError",
    "Tolerance",
    "ToleranceError",
    "TrustDigest",
    "TypeRuleError",
    "UnsupportedModelError",
    "UnsupportedOpError",
    "UntrustedPickleError",
    "UsageError",
    "Vectorize",
    "VerifyError",
    "VersionMismatchError",
    "WriteError",
    "__version__",
    "bundle",
    "compile",
    "export_model",
    "load",
    "load_model",
    "lower",
    "optimize",
    "register_pass",
    "validate_export",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mlec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

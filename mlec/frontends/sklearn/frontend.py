"""`SklearnFrontend`: what the rest of mlec sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlec.frontends.base import LowerOptions, Oracle, SourceMethods
from mlec.frontends.sklearn.skops_files import OpenedEstimator, SkopsFile
from mlec.ir import Graph


class SklearnFrontend:
    """Lowers fitted scikit-learn estimators. The graph computes in float64, as the library does."""

    name = "sklearn"

    def accepts(self, model: object) -> bool:
        """Whether the model is an estimator of scikit-learn, of a class derived from one, or in a file of skops."""
        if isinstance(model, SkopsFile):
            return True
        modules = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
        own = type(model).__module__.partition(".")[0]
        return "sklearn" in modules and own not in ("xgboost", "lightgbm")

    def lower(self, model: Any, options: LowerOptions) -> Graph:
        """The model as a verified graph.

        Its inputs are columns of the source's table: (n, k) of f64 for numbers (f32 where the model rounds its input to
        float32 first) and (n, k) of i64 for coded categories.

        Raises:
            NotFittedModelError: the model, or a part of it, was never fitted.
            UnsupportedModelError: a part or a setting of it cannot be lowered exactly; names both.
        """
        if isinstance(model, SkopsFile):
            # Of the examples, how wide they are is all that counts.
            given = options.example_inputs
            rows = None if given is None else tuple(np.empty((0, *np.shape(example)[1:])) for example in given)
            return model.process.lower(replace(options, example_inputs=rows))
        from mlec.frontends.sklearn.lowering import lower

        if isinstance(model, OpenedEstimator):
            options.notes.extend(model.warnings)
            model = model.estimator
        return lower(model, options)

    def supported(self) -> list[str]:
        """Names of the scikit-learn classes that can be lowered."""
        import mlec.frontends.sklearn.lowering  # noqa: F401  imports every family, which fills the table
        from mlec.frontends.sklearn.registry import supported

        return supported()

    def oracle(self, model: Any) -> Oracle:
        """The model's own inference methods; sparse matrices as arrays, and so are the DataFrames of all but ``transform``.

        Which of several neighbours at the same distance count is arbitrary: see `ties`.
        """
        if isinstance(model, SkopsFile):
            return model.process
        from mlec.frontends.sklearn.lowering import METHODS
        from mlec.frontends.sklearn.ties import decided

        if isinstance(model, OpenedEstimator):
            model = model.estimator
        methods = {
            name: _array_result(getattr(model, name), frames=name == "transform")
            for name in METHODS
            if hasattr(model, name)
        }
        return SourceMethods(methods, decided(model, tuple(methods)))

    def sniff(self, head: bytes, path: Path) -> bool:
        """Whether the file is a pickle (of pickle or joblib, compressed or not) or a skops file of an estimator."""
        from mlec.frontends.sklearn.files import sniff

        return sniff(head, path)

    def load(self, path: Path, options: LowerOptions) -> Any:
        """The estimator in the file; of one of skops, a `SkopsFile`.

        Raises:
            UntrustedPickleError: the file is a pickle, and ``options.trust_pickle`` does not allow it.
            FrontendError: the file cannot be read.
        """
        from mlec.frontends.sklearn.files import load

        return load(path, options)

    def open_file(self, file: IO[bytes], kind: str) -> OpenedEstimator:
        """The estimator of a skops file in scikit-learn itself; for the process of `SourceProcess` only.

        Args:
            file: that `load` has checked.
            kind: ``"skops"``, or ``"trusted"`` where the user vouches for every type in it.
        """
        from mlec.frontends.sklearn.skops_files import open_skops

        return open_skops(file, kind)


def _array_result(function: Any, frames: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if hasattr(result, "toarray"):
            return result.toarray()
        return result.to_numpy() if hasattr(result, "to_numpy") and not frames else result

    return call

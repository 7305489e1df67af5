"""Files of skops. It reads them in a process of its own: this one looks at the archive, and gets a graph and arrays.

skops constructs only what it is told to trust: the estimators of scikit-learn, plain data, and `TRUSTED_TYPES`; nothing of what a file
itself names. What it constructs holds any numbers all the same, and scikit-learn's compiled code believes them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlec.errors import FrontendError, MlecError, UntrustedPickleError
from mlec.frontends.archives import checked_archive, read_json
from mlec.frontends.base import LowerOptions
from mlec.frontends.pickles import digest, is_trusted
from mlec.frontends.source_process import SourceProcess

SCHEMA = "schema.json"
OLDEST = (0, 13)
"""Version of skops; those before it construct more than they are told to trust."""
MOST_NAMES = 8
"""Of types that an error lists: there can be as many as the file likes."""

TRUSTED_TYPES = frozenset(
    {
        "collections.OrderedDict",
        "functools.partial",
        "numpy.dtype",
        "sklearn._loss.loss.HalfTweedieLoss",
        "sklearn._loss.loss.HalfTweedieLossIdentity",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.feature_selection._univariate_selection.chi2",
        "sklearn.feature_selection._univariate_selection.f_classif",
        "sklearn.feature_selection._univariate_selection.f_regression",
        "sklearn.metrics._scorer._PassthroughScorer",
        "sklearn.model_selection._split.KFold",
        "sklearn.model_selection._split.StratifiedKFold",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
        "sklearn.utils._bunch.Bunch",
        "sklearn.utils.validation.check_array",
    }
)
"""Types in skops files that we trust besides those that skops does: plain data, and trees, which lowering checks before use."""


@dataclass(frozen=True)
class SkopsFile:
    """An estimator in a process of its own.

    Attributes:
        process: has read the file; lowers the estimator, and answers as its methods.
    """

    path: Path
    process: SourceProcess


@dataclass(frozen=True)
class OpenedEstimator:
    """What that process has of the file.

    Attributes:
        warnings: of scikit-learn while it was read: that another version saved it.
    """

    estimator: Any
    warnings: tuple[str, ...]


def load_skops(path: Path, data: bytes, options: LowerOptions) -> SkopsFile:
    """The estimator of a skops file, which may hold types that skops or we trust; any type with the user's permission.

    Raises:
        UntrustedPickleError: it holds others.
        FrontendError: it is damaged, its archive is no model's, reading it takes too much time or memory, or crashes the libraries.
    """
    trusted = bool(options.trust_pickle) and is_trusted(path, data, options.trust_pickle)
    _check_version(path)
    with checked_archive(io.BytesIO(data), path) as archive:
        schema = read_json(archive, SCHEMA, path)
    if not isinstance(schema, dict):
        raise FrontendError(
            f"{path}: {SCHEMA} holds no object", code="E_FILE_JSON", hint="save the model again with skops"
        )
    process = SourceProcess("sklearn", "trusted" if trusted else "skops", data, (), path.name)
    try:
        process.wait()
    except MlecError as error:
        if error.code in ("E_FILE", "E_UNTRUSTED_PICKLE"):
            error.message = f"{path}: {error.message}"
        if error.code == "E_UNTRUSTED_PICKLE":
            error.hint = f"if you know where it comes from, pass trust_pickle=True (or trust_pickle={digest(data)!r} for this file alone)"
        raise
    return SkopsFile(path, process)


def open_skops(file: IO[bytes], kind: str) -> OpenedEstimator:
    """The estimator in a checked file; for the process of `SourceProcess` only.

    Args:
        file: its content.
        kind: ``"trusted"``: the user vouches for every type in it.

    Raises:
        UntrustedPickleError: it holds types that are not trusted.
        FrontendError: skops or scikit-learn cannot read it.
    """
    from skops import io as skops
    from skops.io.exceptions import UntrustedTypesFoundException

    data = file.read()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            known = skops.get_untrusted_types(data=data) if kind == "trusted" else sorted(TRUSTED_TYPES)
            estimator = skops.loads(data, trusted=known)
        except UntrustedTypesFoundException:
            raise UntrustedPickleError(
                f"it holds types that are not trusted: {_others(data)}",
                hint="if you know where it comes from, pass trust_pickle",
            ) from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:400]
            raise FrontendError(
                f"skops could not read it: {reason}",
                code="E_FILE",
                hint="load it with the library versions that it was saved with, and save it again",
            ) from error
    return OpenedEstimator(estimator, tuple(dict.fromkeys(str(w.message) for w in heard if _is_version(w.category))))


def _is_version(category: type[Warning]) -> bool:
    from sklearn.exceptions import InconsistentVersionWarning

    return issubclass(category, InconsistentVersionWarning)


def _others(data: bytes) -> str:
    """Names of the types in a file that nobody trusts."""
    from skops import io as skops

    names = [name[:100] for name in skops.get_untrusted_types(data=data) if name not in TRUSTED_TYPES]
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _check_version(path: Path) -> None:
    if importlib.util.find_spec("skops") is None:
        raise FrontendError(
            f"{path} is a skops file, and skops is not installed", code="E_MISSING_PACKAGE", hint="pip install skops"
        )
    version = importlib.metadata.version("skops")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise FrontendError(
            f"{path} is a skops file, and skops {version} constructs more than it is told to trust",
            code="E_MISSING_PACKAGE",
            hint=f"pip install 'skops>={'.'.join(map(str, OLDEST))}'",
        )

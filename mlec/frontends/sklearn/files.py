"""Reading saved estimators: pickles (pickle, joblib) with permission only, and skops files."""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlec.errors import FrontendError, UntrustedPickleError
from mlec.frontends.base import LowerOptions

LIBRARIES = (b"sklearn", b"xgboost", b"lightgbm")
"""Libraries whose estimators a pickle may hold; torch's pickles are another frontend's."""

DECOMPRESSORS: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    (b"\x78", zlib.decompressobj),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ", lzma.LZMADecompressor),
    (b"]\x00\x00", lzma.LZMADecompressor),
)
"""What the compressed files of joblib begin with."""

SKOPS_SCHEMA = "schema.json"

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


def sniff(head: bytes, path: Path) -> bool:
    """Whether these first bytes are of a pickled estimator, or the file is a skops archive."""
    if head.startswith(b"PK\x03\x04"):
        return _is_skops(path)
    plain = _plain(head)
    return (
        plain[:1] == b"\x80"
        and plain[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        and any(name in plain for name in LIBRARIES)
    )


def load(path: Path, options: LowerOptions) -> Any:
    """The object in the file, which is read once: what is compared with a digest must be what is executed."""
    data = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(data)):
        return _load_skops(path, data, options)
    if not is_allowed(path, data, options):
        raise UntrustedPickleError(
            f"{path} is a pickle: reading it would execute code that the file contains",
            hint=f"if you know where it comes from, pass trust_pickle=True (or trust_pickle={_digest(data)!r} for this file alone)",
        )
    import joblib

    try:
        return joblib.load(io.BytesIO(data))
    except Exception as error:
        raise _unreadable(path, error) from error


def is_allowed(path: Path, data: bytes, options: LowerOptions) -> bool:
    """Whether the user allows executing these bytes.

    Raises:
        UntrustedPickleError: the user allows another file only.
    """
    trust = options.trust_pickle
    if isinstance(trust, str) and trust.lower() != _digest(data):
        raise UntrustedPickleError(
            f"{path} is not the file that you trust: it is {_digest(data)}, not {trust}",
            hint="if this file is to be trusted too, give its digest",
        )
    return bool(trust)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _plain(head: bytes) -> bytes:
    """The first bytes after decompression."""
    for magic, decompressor in DECOMPRESSORS:
        if head.startswith(magic):
            try:
                return bytes(decompressor().decompress(head))
            except (zlib.error, OSError, EOFError, lzma.LZMAError):
                return b""
    return head


def _is_skops(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return SKOPS_SCHEMA in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _load_skops(path: Path, data: bytes, options: LowerOptions) -> Any:
    """The estimator of a skops file, which may hold types that skops or we trust; any type with the user's permission."""
    try:
        from skops import io as skops
    except ImportError as error:
        raise FrontendError(f"{path} is a skops file, and skops is not installed", hint="pip install skops") from error
    try:
        unknown = list(skops.get_untrusted_types(data=data))
    except Exception as error:
        raise _unreadable(path, error) from error
    refused = [name for name in unknown if name not in TRUSTED_TYPES]
    if refused and not is_allowed(path, data, options):
        raise UntrustedPickleError(
            f"{path} holds types that are not trusted: {', '.join(refused)}",
            hint="if you know where the file comes from, pass trust_pickle=True",
        )
    try:
        return skops.loads(data, trusted=unknown)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FrontendError:
    return FrontendError(
        f"{path}: the model could not be read: {type(error).__name__}: {error}",
        hint="a class of it was defined in the script that saved it: define it in a module of its own, in this folder or on PYTHONPATH, "
        "and save the model again"
        if "__main__' " in str(error)
        else "load it with the library versions that it was saved with",
    )

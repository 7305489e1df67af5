"""Estimators that Hummingbird turns into a torch module, which the torch frontend then lowers.

Hummingbird checks nothing, so only estimators that were measured to be right come here, and only those that have no converter of
our own: those keep the float64 of the source, where Hummingbird rounds the fitted arrays to float32. What it computes from them is
done in float64 again.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn import decomposition
from sklearn.preprocessing import normalize

from mlec.errors import MlecError
from mlec.frontends.base import LowerOptions
from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered
from mlec.frontends.sklearn.foreign import inlined
from mlec.frontends.sklearn.preprocessing import unit_rows
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value

KERNELS = ("linear", "poly", "rbf", "sigmoid", "cosine")


@converts(decomposition.KernelPCA)
def kernel_pca(ctx: Context, model: Any, columns: Columns) -> Lowered:
    if model.kernel not in KERNELS:
        ctx.refuse(f"kernel={model.kernel!r} is not supported", f"supported: {', '.join(KERNELS)}")
    x = ctx.matrix(columns)
    if model.kernel == "cosine":  # the linear kernel of rows of length 1; Hummingbird would divide rows of zeros by 0
        x, model = unit_rows(ctx, x), copy.copy(model)
        model.kernel, model.X_fit_ = "linear", normalize(model.X_fit_)
    (projected,) = by_hummingbird(ctx, model, x)
    return ctx.transformed(projected)


def by_hummingbird(ctx: Context, model: Any, x: Value) -> list[Value]:
    """What Hummingbird's module for the estimator computes from x, (n, features)."""
    width = x.type.shape[1]
    assert isinstance(width, int)
    try:
        module = torch_module(model, width)
    except ImportError as error:
        ctx.refuse(
            f"it is lowered through Hummingbird, which is not installed: {error}", "pip install mlec[hummingbird]"
        )
    import torch

    from mlec.frontends.fx import TorchFrontend

    example = torch.zeros(3, width, dtype=torch.float64)
    try:
        graph = TorchFrontend().lower(module, LowerOptions(example_inputs=(example,)))
    except MlecError as error:
        ctx.refuse(f"Hummingbird's module for it cannot be lowered: {error.message}")
    return inlined(ctx, graph, [x])


def torch_module(model: Any, n_features: int) -> Any:
    """Hummingbird's operator for one estimator, computing in float64."""
    with _without_tvm():
        import hummingbird.ml as hummingbird
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without "n_threads", Hummingbird would set torch's threads for the whole process.
        container = hummingbird.convert(
            copy.deepcopy(model), "torch", np.zeros((2, n_features)), extra_config={"n_threads": None}
        )
    (operator,) = container.model._operators
    return operator.double().eval().requires_grad_(False)


@contextmanager
def _without_tvm() -> Iterator[None]:
    """Hides TVM: Hummingbird imports parts of it that current versions lack, as soon as it finds any."""
    hidden = sys.modules.get("tvm")
    sys.modules["tvm"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["tvm"]
        if hidden is not None:
            sys.modules["tvm"] = hidden

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

from mlec.errors import MlecError
from mlec.frontends.base import LowerOptions
from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered
from mlec.frontends.sklearn.foreign import inlined
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value

KERNELS = ("linear", "poly", "rbf", "sigmoid", "cosine")


@converts(decomposition.KernelPCA)
def kernel_pca(ctx: Context, model: Any, columns: Columns) -> Lowered:
    if model.kernel not in KERNELS:
        ctx.refuse(f"kernel={model.kernel!r} is not supported", f"supported: {', '.join(KERNELS)}")
    (projected,) = by_hummingbird(ctx, model, columns)
    return ctx.transformed(projected)


def by_hummingbird(ctx: Context, model: Any, columns: Columns) -> list[Value]:
    """What Hummingbird's module for the estimator computes from the columns."""
    x = ctx.matrix(columns)
    try:
        module = torch_module(model, len(columns))
    except ImportError as error:
        ctx.refuse(
            f"it is lowered through Hummingbird, which is not installed: {error}", "pip install mlec[hummingbird]"
        )
    import torch

    from mlec.frontends.fx import TorchFrontend

    example = torch.zeros(3, len(columns), dtype=torch.float64)
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

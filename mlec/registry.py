"""Frontends, passes and backends by name: our own table, plus what other packages add by entry points.

An entry is ``"module:attribute"`` and is imported on first use only. A plugin declares, in its own pyproject.toml:

    [project.entry-points."mlec.passes"]
    my-pass = "my_package.my_module:MyPass"

The groups are ``mlec.frontends``, ``mlec.passes`` and ``mlec.backends``. A name that is taken is an error naming both owners.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mlec.errors import UsageError

FRONTENDS = {
    "torch": "mlec.frontends.fx:TorchFrontend",
    "xgboost": "mlec.frontends.xgboost:XGBoostFrontend",
    "lightgbm": "mlec.frontends.lightgbm:LightGBMFrontend",
    "sklearn": "mlec.frontends.sklearn:SklearnFrontend",
}
PASSES = {
    "infer-shapes": "mlec.passes.infer_shapes:InferShapes",
    "canonicalize": "mlec.passes.canonicalize:Canonicalize",
    "fold-constants": "mlec.passes.fold_constants:FoldConstants",
    "cse": "mlec.passes.cse:EliminateCommonSubexpressions",
    "dce": "mlec.passes.dce:EliminateDeadCode",
    "fold-batch-norm": "mlec.passes.fold_batch_norm:FoldBatchNorm",
    "fuse": "mlec.passes.fusion:FuseOperators",
    "layout": "mlec.passes.layout:ChooseLayout",
}
BACKENDS = {
    "numpy": "mlec.backends.numpy.backend:NumpyBackend",
    "tvm": "mlec.backends.tvm.backend:TVMBackend",
}
_BUILTIN = {"frontends": FRONTENDS, "passes": PASSES, "backends": BACKENDS}


@cache
def table(group: str) -> dict[str, str]:
    """Name to ``"module:attribute"`` for a group: frontends, passes or backends; both owners of a name that is taken."""
    known = dict(_BUILTIN[group])
    for point in entry_points(group=f"mlec.{group}"):
        known[point.name] = f"{known[point.name]} and {point.value}" if point.name in known else point.value
    return known


def load(group: str, name: str) -> Any:
    """The class registered under a name.

    Raises:
        UsageError: naming what exists, or why a plugin does not import.
    """
    known = table(group)
    if name not in known:
        raise UsageError(f"nothing named {name!r} among the {group}", hint=f"there are: {', '.join(known)}")
    if " and " in known[name]:
        raise UsageError(
            f"two {group} are named {name!r}: {known[name]}",
            code="E_PLUGIN_NAME",
            hint="uninstall the package of one of the two",
        )
    module_name, attribute = known[name].split(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        if (
            name in _BUILTIN[group]
            and isinstance(error, ModuleNotFoundError)
            and not str(error.name).startswith("mlec")
        ):
            raise UsageError(
                f"{name!r} needs the package {error.name!r}",
                code="E_MISSING_PACKAGE",
                hint=f"pip install 'mlec[{name}]'",
            ) from error
        raise UsageError(f"{known[name]} cannot be imported: {error}", code="E_PLUGIN_IMPORT") from error
    if found.name != name:
        raise UsageError(
            f"{known[name]} is registered as {name!r}, but calls itself {found.name!r}", code="E_PLUGIN_NAME"
        )
    return found


def names(group: str) -> tuple[str, ...]:
    return tuple(table(group))

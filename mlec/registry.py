"""Frontends, passes, backends, ops and lowerings by name: our own table, plus what other packages add by entry points.

An entry is ``"module:attribute"`` and is imported on first use only. A plugin declares, in its own pyproject.toml:

    [project.entry-points."mlec.passes"]
    my-pass = "my_package.my_module:MyPass"

The groups are ``mlec.frontends``, ``mlec.passes``, ``mlec.backends``, ``mlec.ops`` (each an `OpDef`) and ``mlec.lowerings`` (rules of
the tvm backend, each named after its op; our own ops and rules are in tables where they are written). A name that is taken is an error
naming both owners.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mlec.capabilities import TARGETS
from mlec.errors import MlecError, TargetError, UsageError

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
    "stability": "mlec.passes.stability:CheckNumerics",
    "vectorize": "mlec.passes.vectorize:Vectorize",
    "fold-into-thresholds": "mlec.passes.trees:FoldIntoThresholds",
    "prune-trees": "mlec.passes.trees:PruneTrees",
    "merge-trees": "mlec.passes.trees:MergeTrees",
    "recognize": "mlec.passes.recognize:Recognize",
    "hoist-slices": "mlec.passes.hoist_slices:HoistSlices",
    "merge-products": "mlec.passes.merge_products:MergeProducts",
    "sink-transposes": "mlec.passes.sink_transposes:SinkTransposes",
    "split-products": "mlec.passes.split_products:SplitProducts",
    "fold-batch-norm": "mlec.passes.fold_batch_norm:FoldBatchNorm",
    "fold-lookups": "mlec.passes.fold_lookups:FoldLookups",
    "fold-products": "mlec.passes.fold_products:FoldProducts",
    "fold-scales": "mlec.passes.fold_scales:FoldScales",
    "quantize-int8": "mlec.passes.quantize:QuantizeInt8",
    "mixed-precision": "mlec.passes.precision:MixedPrecision",
    "fuse": "mlec.passes.fusion:FuseOperators",
    "lift-sequences": "mlec.passes.lift_sequences:LiftSequences",
    "layout": "mlec.passes.layout:ChooseLayout",
}
BACKENDS = {
    "numpy": "mlec.backends.numpy.backend:NumpyBackend",
    "tvm": "mlec.backends.tvm.backend:TVMBackend",
}
_BUILTIN: dict[str, dict[str, str]] = {
    "frontends": FRONTENDS, "passes": PASSES, "backends": BACKENDS, "ops": {}, "lowerings": {},
}  # fmt: skip

_added: dict[tuple[str, str], tuple[str, Any]] = {}

logger = logging.getLogger("mlec")


def add(group: str, name: str, entry: object, declared: type) -> None:
    """Makes an entry known in this process. Declaring the same class again, as a notebook does, replaces it.

    Args:
        group: e.g. ``passes``.
        name: what it is called.
        entry: what `load` gives.
        declared: the class that the user wrote.

    Raises:
        UsageError: the name is taken.
    """
    owner = f"{declared.__module__}:{declared.__qualname__}"
    taken = table(group).get(name, owner)
    if taken != owner:
        raise UsageError(
            f"two {group} are named {name!r}: {taken} and {owner}", code="E_PLUGIN_NAME", hint="choose another name"
        )
    _added[group, name] = owner, entry
    table.cache_clear()


@cache
def table(group: str) -> dict[str, str]:
    """Name to ``"module:attribute"`` for a group, e.g. ``passes``; both owners of a name that is taken."""
    known = dict(_BUILTIN[group])
    for point in entry_points(group=f"mlec.{group}"):
        known[point.name] = f"{known[point.name]} and {point.value}" if point.name in known else point.value
    return known | {name: owner for (where, name), (owner, _) in _added.items() if where == group}


def load(group: str, name: str) -> Any:
    """What is registered under a name: a class, an `OpDef`, a function.

    Raises:
        UsageError: naming what exists, or why a plugin does not import.
    """
    if (group, name) in _added:
        return _added[group, name][1]
    known = table(group)
    if name not in known:
        raise UsageError(f"nothing named {name!r} among the {group}", hint=f"there are: {', '.join(known)}")
    if " and " in known[name]:
        raise UsageError(
            f"two {group} are named {name!r}: {known[name]}",
            code="E_PLUGIN_NAME",
            hint="uninstall the package of one of the two",
        )
    module_name, _, attribute = known[name].partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # another package's module can fail with anything
        if name in _BUILTIN[group]:
            if not isinstance(error, ModuleNotFoundError) or str(error.name).startswith("mlec"):
                raise
            raise UsageError(
                f"{name!r} needs the package {error.name!r}",
                code="E_MISSING_PACKAGE",
                hint=f"pip install 'mlec[{name}]'",
            ) from error
        raise UsageError(
            f"{known[name]} cannot be imported: {type(error).__name__}: {error}",
            code="E_PLUGIN_IMPORT",
            hint="update or uninstall the package that declares it",
        ) from error
    if getattr(found, "name", name) != name:  # functions have none
        raise UsageError(
            f"{known[name]} is registered as {name!r}, but calls itself {found.name!r}",
            code="E_PLUGIN_NAME",
            hint="let the entry point and the attribute `name` agree",
        )
    return found


def names(group: str) -> tuple[str, ...]:
    return tuple(table(group))


@cache
def target_forms() -> Mapping[str, Mapping[str, str]]:
    """By backend, the forms of the targets that it serves and what they mean.

    Our own backends are not imported for this. A plugin's is, for its attribute ``targets``; one that does not import is left out,
    with a warning, so that it does not stop the others.
    """
    forms: dict[str, Mapping[str, str]] = dict(TARGETS)
    for name in names("backends"):
        if name not in BACKENDS:
            try:
                forms[name] = load("backends", name).targets
            except MlecError as error:
                logger.warning("the backend %s is left out: %s", name, error.message)
    return forms


@cache
def target_kinds() -> Mapping[str, tuple[str, ...]]:
    """The backends that serve each kind of target; one, unless a plugin claims a kind that is taken."""
    kinds: dict[str, tuple[str, ...]] = {}
    for backend, forms in target_forms().items():
        for kind in dict.fromkeys(form.partition(":")[0] for form in forms):
            kinds[kind] = (*kinds.get(kind, ()), backend)
    return kinds


def check_kind(kind: str) -> None:
    """Refuses a kind of target that no backend serves.

    Raises:
        TargetError: listing the kinds there are.
    """
    if kind not in target_kinds():
        raise TargetError(f"there is no target {kind!r}; there are: {', '.join(target_kinds())}", hint=target_hint())


def backend_of(kind: str) -> Any:
    """The backend that serves a kind of target.

    Raises:
        TargetError: there is none.
        UsageError: ``E_PLUGIN_NAME``, two backends claim it; or its backend does not import.
    """
    check_kind(kind)
    serving = target_kinds()[kind]
    if len(serving) > 1:
        raise UsageError(
            f"{len(serving)} backends serve the target {kind!r}: {', '.join(table('backends')[name] for name in serving)}",
            code="E_PLUGIN_NAME",
            hint="uninstall the package of one of them",
        )
    return load("backends", serving[0])()


def target_hint() -> str:
    """The forms of targets, for the hint of an error."""
    return "a target reads " + ", ".join(f'"{form}"' for forms in target_forms().values() for form in forms)

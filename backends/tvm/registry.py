"""How each op is lowered: the one table of this backend.

A rule says how to lower an op on some devices. It has one of the forms of `FORMS`, and is registered where it is written:

    @lowers("matmul", form="anchor")
    def lower_matmul(lowering, node, operands, tail): ...

Where an op has rules of several forms for a device, `lowering_of` takes the first in the order of `FORMS`; the others serve where
the op is part of a fused body or of a region. `mlec ops` prints this table. A package adds rules for ops of its own by entry points
in the group ``mlec.lowerings``, each named after the op: ``my-op = "my_package.lowerings:lower_my_op"``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mlec import registry
from mlec.errors import LoweringError, UsageError

Device = Literal["cpu", "cuda"]
Form = Literal["template", "anchor", "prologue", "scalar", "element", "graph"]
Rule = Callable[..., Any]

CPU: tuple[Device, ...] = ("cpu",)
CUDA: tuple[Device, ...] = ("cuda",)
BOTH: tuple[Device, ...] = (*CPU, *CUDA)

FORMS: dict[Form, tuple[str, tuple[Device, ...]]] = {
    # ``(lowering, node, operands) -> results``: calls `Lowering.kernel`, or returns views.
    "template": ("template", CPU),
    # ``(lowering, node, operands, tail) -> result``: a template that also computes the elementwise nodes after the op.
    "anchor": ("template with epilogue", CPU),
    # ``(lowering, node, head, operands, tail) -> result``: one that also computes those before it, as it reads its first operand;
    # ``operands`` are the others. None where it cannot.
    "prologue": ("template with prologue", CPU),
    # ``(*elements, **attributes) -> element``: an elementwise op, as an expression (`scalar`).
    "scalar": ("loop", BOTH),
    # ``(region, node, index of the result) -> element``: an op that moves data (`region`).
    "element": ("loop", BOTH),
    # ``(builder, node, operands) -> results``: the op as a graph of simpler ones (`decompose`).
    "graph": ("decomposed", BOTH),
}
"""The forms of rules, the preferred ones first: what `mlec ops` calls them, and the devices they are for unless they say so."""

_STANDS_ALONE: tuple[Form, ...] = ("template", "anchor", "scalar", "element", "graph")


@dataclass(frozen=True)
class Entry:
    """One rule, and the module that registered it."""

    op: str
    form: Form
    device: Device
    rule: Rule
    module: str

    @property
    def file(self) -> str:
        """Where the rule is."""
        return f"{self.module.removeprefix('mlec.').replace('.', '/')}.py"

    def __str__(self) -> str:
        return f"{FORMS[self.form][0]}, {self.file}"


RULES: dict[str, dict[tuple[Form, Device], Entry]] = {}
"""By op; filled by `lowers`."""

_RuleT = TypeVar("_RuleT", bound=Rule)


def lowers(*ops: str, form: Form = "template", on: tuple[Device, ...] = ()) -> Callable[[_RuleT], _RuleT]:
    """Registers a rule.

    Args:
        ops: that it lowers.
        form: how it is called, see `FORMS`.
        on: `CPU`, `CUDA` or `BOTH`; by default those of the form.

    Raises:
        LoweringError: an op has such a rule already.
    """
    module = sys._getframe(1).f_globals["__name__"]  # not the rule's own: some are functions of TVM

    def add(rule: _RuleT) -> _RuleT:
        for op in ops:
            rules = RULES.setdefault(op, {})
            for device in on or FORMS[form][1]:
                if (form, device) in rules:
                    raise LoweringError(
                        f"{op} has a {form} rule for {device} already, in {rules[form, device].file}",
                        hint="remove one of the two rules",
                    )
                rules[form, device] = Entry(op, form, device, rule, module)
        return rule

    return add


def find(op: str, form: Form, device: Device = "cpu") -> Rule | None:
    """The rule of one form; those of a loop or a graph serve every device."""
    entry = _rules(op).get((form, device))
    return entry.rule if entry is not None else None


def lowering_of(op: str, device: Device) -> Entry | None:
    """How the op is lowered when it stands by itself; None where there is no way."""
    rules = _rules(op)
    return next((rules[form, device] for form in _STANDS_ALONE if (form, device) in rules), None)


def _rules(op: str) -> dict[tuple[Form, Device], Entry]:
    """The rules of an op; imports the plugin that has them when they are first asked for.

    Raises:
        UsageError: ``E_PLUGIN_NAME``, a plugin declares lowerings of an op and has none, or those of an op of ours.
    """
    rules = RULES.get(op, {})
    declared = registry.table("lowerings").get(op)
    if declared is None:
        return rules
    if ours := next((entry for entry in rules.values() if entry.module.startswith("mlec.")), None):
        raise UsageError(
            f"two packages lower {op!r}: {ours.module} and {declared}", code="E_PLUGIN_NAME",
            hint="uninstall the package of the second one",
        )  # fmt: skip
    registry.load("lowerings", op)
    if op not in RULES:
        raise UsageError(
            f"{declared} is declared as a lowering of {op!r}, but registers none", code="E_PLUGIN_NAME",
            hint=f'it should be decorated with @lowers("{op}")',
        )  # fmt: skip
    return RULES[op]

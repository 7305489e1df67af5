"""Op definitions: one record that says everything about an op except how a backend lowers it."""

from __future__ import annotations

import enum
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mlec import registry
from mlec.errors import TypeRuleError, UsageError
from mlec.ir.dim import Dim, SymDim, evaluate, parse_dim, product, substitute, symbols_of
from mlec.ir.dtype import DType
from mlec.ir.types import TensorType

Array = np.ndarray[Any, np.dtype[Any]]


class Trait(enum.Flag):
    """Facts about an op that passes ask for instead of keeping lists of names."""

    NONE = 0
    ELEMENTWISE = enum.auto()  # output[i] depends on input[i] only, operands broadcast
    COMMUTATIVE = enum.auto()  # f(a, b) == f(b, a), bit for bit
    ASSOCIATIVE = enum.auto()  # up to rounding
    IDEMPOTENT = enum.auto()  # f(f(x)) == f(x)
    INVOLUTION = enum.auto()  # f(f(x)) == x
    MONOTONE = enum.auto()  # x <= y implies f(x) <= f(y), for non-NaN x, y
    REDUCTION = enum.auto()  # collapses axes
    VIEW = enum.auto()  # moves elements without changing or dropping any
    INDEXING = enum.auto()  # picks elements
    CONTRACTION = enum.auto()  # multiply and add over a shared axis: matmul, conv
    NORMALISATION = enum.auto()  # a reduction and its elementwise use: softmax, layer_norm
    LIBRARY_CALL = enum.auto()  # elementwise, by a call into the C library for each element: vectors gain nothing


class AttrKind(enum.Enum):
    """What an attribute can hold; the value is the name used in messages."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    STR = "str"
    DTYPE = "dtype"
    INTS = "tuple of ints"
    DIM = "dim"
    DIMS = "tuple of dims"
    TENSOR = "a number, or @name of a constant"
    GRAPH = "graph"


@dataclass(frozen=True, slots=True)
class ConstantRef:
    """``@name``: an entry of `Graph.constants`."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


AttrValue = Any  # int | float | bool | str | DType | tuple[Dim, ...] | ConstantRef | Graph, checked by AttrKind
Attrs = Mapping[str, AttrValue]

REQUIRED = object()
"""Default of an attribute that has none."""


@dataclass(frozen=True, slots=True)
class Attr:
    """One attribute of an op's schema. ``choices`` limits a string to the values listed."""

    name: str
    kind: AttrKind
    default: AttrValue = REQUIRED
    choices: tuple[str, ...] = ()

    def check(self, value: AttrValue) -> AttrValue:
        """The value in canonical form.

        Raises:
            TypeRuleError: when it is not of this attribute's kind.
        """
        from mlec.ir.graph import Graph

        kind = self.kind
        number = (int, np.integer)
        if kind is AttrKind.INT and isinstance(value, number) and not isinstance(value, bool):
            return int(value)
        if kind is AttrKind.FLOAT and isinstance(value, (*number, float, np.floating)) and not isinstance(value, bool):
            return float(value)
        if kind is AttrKind.BOOL and isinstance(value, (bool, np.bool_)):
            return bool(value)
        if kind is AttrKind.STR and isinstance(value, str) and (not self.choices or value in self.choices):
            return value
        if kind is AttrKind.DTYPE and isinstance(value, (DType, str)):
            try:
                return DType.of(value)
            except (KeyError, TypeError, ValueError):
                pass
        if kind is AttrKind.INTS and _all_of(value, number):
            return tuple(int(v) for v in value)
        if kind is AttrKind.DIM and isinstance(value, (*number, SymDim, str)):
            return _dim(value)
        if kind is AttrKind.DIMS and _all_of(value, (*number, SymDim, str)):
            return tuple(_dim(v) for v in value)
        if kind is AttrKind.TENSOR:
            if isinstance(value, (ConstantRef, bool, int, float)):
                return value
            if isinstance(value, np.generic):
                return value.item()
        if kind is AttrKind.GRAPH and isinstance(value, Graph):
            return value
        wanted = f"one of {', '.join(self.choices)}" if self.choices else kind.value
        raise TypeRuleError(f"attribute {self.name!r} takes {wanted}, got {value!r}", code="E_ATTR")


def _all_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, kinds) for v in value)


def _dim(value: Any) -> Dim:
    return value if isinstance(value, SymDim) else parse_dim(value) if isinstance(value, str) else int(value)


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of an op's schema; only the last ones may be optional or variadic."""

    name: str
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic operations and bytes moved (operands read once, results written once); may be symbolic."""

    flops: Dim
    bytes: Dim


@dataclass(frozen=True, slots=True)
class Case:
    """One example call of an op: concrete operands and attributes.

    An extent of `SYMBOLIC_EXTENT` in a case stands for an axis that the op accepts as symbolic.
    """

    operands: tuple[Array, ...]
    attrs: Mapping[str, AttrValue]


SYMBOLIC_EXTENT = 7

TypeRule = Callable[[Sequence[TensorType], Attrs], TensorType | Sequence[TensorType]]
Reference = Callable[..., Any]
CostRule = Callable[[Sequence[TensorType], Sequence[TensorType], Attrs], Cost]
Sampler = Callable[[np.random.Generator], Case]


def elementwise_cost(operands: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    """One operation for each element of the first result."""
    return Cost(results[0].size, moved_bytes(operands, results))


def moved_bytes(operands: Sequence[TensorType], results: Sequence[TensorType]) -> Dim:
    total: Dim = 0
    for t in (*operands, *results):
        total = total + t.nbytes
    return total


@dataclass(frozen=True, eq=False)
class OpDef:
    """Everything that is known about an op.

    Attributes:
        name: as in the text form.
        operands, attrs: the schema.
        infer: type rule, from operand types and attributes to result types; raises `TypeRuleError`.
        reference: what the op means, on numpy arrays: ``reference(*operands, **attrs)``. Dims in attributes arrive as ints.
        cost: arithmetic and traffic.
        traits: see `Trait`.
        sample: draws an example call; the registry test feeds on it.
        tolerance: relative error that a backend may have against the reference, in units of the result's eps.
        doc: one line for the op table.
    """

    name: str
    operands: tuple[Operand, ...]
    attrs: tuple[Attr, ...]
    infer: TypeRule
    reference: Reference
    sample: Sampler
    cost: CostRule = elementwise_cost
    traits: Trait = Trait.NONE
    tolerance: float = 8.0
    doc: str = ""

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def has(self, trait: Trait) -> bool:
        return bool(self.traits & trait)

    @property
    def min_operands(self) -> int:
        return sum(not (o.optional or o.variadic) for o in self.operands)

    @property
    def max_operands(self) -> float:
        return math.inf if any(o.variadic for o in self.operands) else len(self.operands)

    def complete_attrs(self, given: Attrs) -> dict[str, AttrValue]:
        """Canonical attributes in schema order, defaults filled in.

        Raises:
            TypeRuleError: for an unknown, missing or ill-typed attribute.
        """
        known = {a.name for a in self.attrs}
        if unknown := sorted(set(given) - known):
            raise TypeRuleError(
                f"{self.name} has no attribute {unknown[0]!r}; it has: {', '.join(sorted(known)) or 'none'}",
                code="E_ATTR",
            )
        complete: dict[str, AttrValue] = {}
        for attr in self.attrs:
            value = given.get(attr.name, attr.default)
            if value is REQUIRED:
                raise TypeRuleError(f"{self.name} needs the attribute {attr.name!r} ({attr.kind.value})", code="E_ATTR")
            complete[attr.name] = attr.check(value)
        return complete

    def result_types(self, operands: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        """Applies the type rule.

        Raises:
            TypeRuleError: naming the op, the rule that was broken, and the operand types.
        """
        if not self.min_operands <= len(operands) <= self.max_operands:
            wanted = self.min_operands if self.min_operands == self.max_operands else f"{self.min_operands} or more"
            raise TypeRuleError(f"{self.name} takes {wanted} operands, got {len(operands)}", code="E_ARITY")
        try:
            inferred = self.infer(operands, attrs)
            results = (inferred,) if isinstance(inferred, TensorType) else tuple(inferred)
            for result in results:
                if any(isinstance(extent, int) and extent < 0 for extent in result.shape):
                    raise TypeRuleError(f"the result would be {result}, of a negative extent", code="E_SHAPE")
        except TypeRuleError as error:
            shown = ", ".join(map(str, operands))
            located = TypeRuleError(f"{self.name}({shown}): {error.message}", code=error.code, hint=error.hint)
            located.dims = error.dims
            raise located from None
        return results

    def evaluate(self, operands: Sequence[Array], attrs: Attrs, binding: Mapping[str, int]) -> tuple[Array, ...]:
        """Runs the reference with every dim in the attributes replaced by its value.

        Results come in C order: in which order numpy and its BLAS add up depends on how operands lie in memory, and what an op gives is
        to depend on their elements alone.
        """
        result = self.reference(*operands, **bind_attrs(attrs, binding))
        results = result if isinstance(result, (tuple, list)) else (result,)
        return tuple(np.asarray(array, order="C") for array in results)


def bind_attrs(attrs: Attrs, binding: Mapping[str, int]) -> dict[str, AttrValue]:
    """Attributes with symbolic dims evaluated."""

    def value(v: AttrValue) -> AttrValue:
        if isinstance(v, SymDim):
            return evaluate(v, binding)
        return tuple(value(x) for x in v) if isinstance(v, tuple) else v

    return {name: value(v) for name, v in attrs.items()}


def substitute_attrs(attrs: Attrs, binding: Mapping[str, Dim]) -> dict[str, AttrValue]:
    """Attributes with symbols renamed or replaced; graphs in attributes are left alone."""

    def value(v: AttrValue) -> AttrValue:
        if isinstance(v, SymDim):
            return substitute(v, binding)
        return tuple(value(x) for x in v) if isinstance(v, tuple) else v

    return {name: value(v) for name, v in attrs.items()}


def attr_symbols(attrs: Attrs) -> frozenset[str]:
    """Names of the symbols that occur in attributes."""

    def names(v: AttrValue) -> frozenset[str]:
        if isinstance(v, SymDim):
            return symbols_of(v)
        return frozenset().union(*map(names, v)) if isinstance(v, tuple) else frozenset()

    return frozenset().union(*map(names, attrs.values()))


OPS: dict[str, OpDef] = {}
"""Every op by name. `mlec.ops` fills it when it is imported, which `lookup` does where nobody did before; an op of another package
joins it when it is first looked up."""


def register(op: OpDef) -> OpDef:
    """Adds an op to the table.

    Raises:
        UsageError: when the name is taken.
    """
    if op.name in OPS:
        raise UsageError(
            f"an op named {op.name!r} is registered already", code="E_OP_TAKEN", hint="choose another name"
        )
    OPS[op.name] = op
    return op


def lookup(name: str) -> OpDef:
    """The op of that name: ours, or the one that an entry point in the group ``mlec.ops`` gives.

    Raises:
        TypeRuleError: with the nearest names when there is none.
        UsageError: two packages have an op of that name, or the one that has it does not import.
    """
    import difflib

    if name in registry.table("ops"):
        return _plugin(name)
    if name not in OPS:
        importlib.import_module("mlec.ops")
    if name not in OPS:
        near = difflib.get_close_matches(name, (*OPS, *registry.names("ops")), n=3)
        raise TypeRuleError(
            f"there is no op {name!r}",
            code="E_UNKNOWN_OP",
            hint=(f"did you mean {', '.join(near)}? " if near else "")
            + "`mlec ops` lists them all; a package that adds it (by an entry point in the group mlec.ops) may not be installed",
        )
    return OPS[name]


@cache
def _plugin(name: str) -> OpDef:
    """Adds an op of another package to the table."""
    importlib.import_module("mlec.ops")
    if name in OPS:
        raise UsageError(
            f"two ops are named {name!r}: mlec's own and {registry.table('ops')[name]}",
            code="E_PLUGIN_NAME",
            hint="uninstall the package of the second one",
        )
    op = registry.load("ops", name)
    if not isinstance(op, OpDef):
        raise UsageError(
            f"{registry.table('ops')[name]} is declared as an op, but is a {type(op).__name__}", code="E_PLUGIN_NAME",
            hint="an entry point in mlec.ops names an OpDef",
        )  # fmt: skip
    return register(op)


__all__ = [
    "OPS", "REQUIRED", "SYMBOLIC_EXTENT", "Array", "Attr", "AttrKind", "Attrs", "Case", "ConstantRef", "Cost", "OpDef",
    "Operand", "Trait", "attr_symbols", "bind_attrs", "elementwise_cost", "lookup", "moved_bytes", "product", "register",
    "substitute_attrs",
]  # fmt: skip

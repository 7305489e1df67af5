"""Tensor types and source locations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlec.ir import dim as dims
from mlec.ir.dim import Dim
from mlec.ir.dtype import DType

Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape (an int or a symbolic dim for each axis) and element type. Text form: ``f32[n, 8]``."""

    shape: Shape
    dtype: DType

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Dim:
        """Number of elements."""
        return dims.product(self.shape)

    @property
    def nbytes(self) -> Dim:
        return self.size * self.dtype.itemsize

    @property
    def is_static(self) -> bool:
        """Every extent is an int."""
        return all(isinstance(d, int) for d in self.shape)

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*(dims.symbols_of(d) for d in self.shape))

    def substitute(self, binding: Mapping[str, Dim]) -> TensorType:
        return TensorType(tuple(dims.substitute(d, binding) for d in self.shape), self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    __repr__ = __str__


def tensor(dtype: DType | str, shape: Iterable[int | str | Dim]) -> TensorType:
    """``tensor("f32", ("n", 8))``: a TensorType from names and dims as text."""
    return TensorType(tuple(dims.parse_dim(d) if isinstance(d, str) else d for d in shape), DType.of(dtype))


@dataclass(frozen=True, slots=True)
class Location:
    """Where a node came from in the user's code.

    Attributes:
        file, line: of the source line; empty and 0 when unknown.
        scope: path inside the model, e.g. ``"layers.0.attention"`` or ``"pipeline.scaler"``.
        parts: for a node made by a rewrite, the locations of the nodes it replaced.
        rule: name of the rewrite that made the node.
    """

    file: str = ""
    line: int = 0
    scope: str = ""
    parts: tuple[Location, ...] = field(default=(), repr=False)
    rule: str = ""

    def __bool__(self) -> bool:
        return bool(self.file or self.scope or self.parts or self.rule)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        text = f"{place} ({self.scope})" if place and self.scope else place or self.scope
        if not text and self.parts:
            text = next((str(p) for p in self.parts if str(p)), "")
        return text

    @property
    def leaves(self) -> tuple[Location, ...]:
        """The original locations, each once, in order."""
        if not self.parts:
            return (self,) if self.file or self.scope else ()
        return tuple(dict.fromkeys(leaf for part in self.parts for leaf in part.leaves))

    def summary(self, most: int = 3) -> str:
        """The original locations in one line, at most so many of them: ``"pipeline.scaler + pipeline.model"``."""
        places = tuple(dict.fromkeys(map(str, self.leaves)))
        rest = len(places) - most
        return " + ".join(places[:most]) + (f" + {rest} more" if rest > 0 else "")

    @staticmethod
    def merged(parts: Iterable[Location], rule: str = "") -> Location:
        """The location of a node that replaces the nodes at ``parts``."""
        leaves = tuple(dict.fromkeys(leaf for part in parts for leaf in part.leaves))
        if not leaves:
            return Location(rule=rule)
        first = leaves[0]
        return Location(first.file, first.line, first.scope, leaves if len(leaves) > 1 else (), rule)


UNKNOWN = Location()

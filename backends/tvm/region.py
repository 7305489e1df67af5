"""Regions of a graph in which every result element is an expression of input elements.

An op of a region is either elementwise (`scalar`), or it moves data: then its *element rule* says which element of which
operand stands at an index of its result. A region is evaluated backwards from the index of a result: rules turn it into
indices of the operands until inputs are reached, which are loads. So a chain of ops, or a whole fused body, becomes one
expression without a buffer in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlec.backends.tvm import scalar
from mlec.backends.tvm.compat import T, tirx, tvm
from mlec.backends.tvm.kernels.elementwise import Lanes, NotContiguousError
from mlec.backends.tvm.kernels.epilogue import Buffer, Expr
from mlec.backends.tvm.kernels.vector import Cell, broadcast, const_like, int64, lanes_of, ramp, share
from mlec.backends.tvm.registry import find
from mlec.ir.dim import Dim, Symbol, SymDim, symbols_of
from mlec.ir.dtype import DType
from mlec.ir.graph import Node, Value
from mlec.ir.op import Trait
from mlec.ir.types import TensorType

Index = Any
"""An ``int`` or an int64 expression."""


def is_elementwise(node: Node) -> bool:
    """Whether the node computes each element from the elements at the same place."""
    return find(node.name, "scalar") is not None


def is_injective(node: Node) -> bool:
    """Whether the node can be part of a region."""
    return is_elementwise(node) or find(node.name, "element") is not None


class Dims:
    """The extents of one function: a variable for each symbol.

    Args:
        opaque: extents that get a variable of their own. A buffer tells the value of an extent that is a variable, and
            nothing but that; so where ``12 * n`` occurs and ``n`` itself nowhere does, ``12 * n`` is the variable.
    """

    def __init__(self, opaque: Iterable[SymDim] = ()) -> None:
        self.symbols: dict[str, Expr] = {}
        self._opaque = {dim: tirx.Var(f"extent{i}", "int64") for i, dim in enumerate(opaque)}

    @staticmethod
    def of(types: Iterable[TensorType], given: Iterable[str] = ()) -> Dims:
        """For a function with buffers of these types, and scalar parameters for the symbols ``given``."""
        extents = [d for t in types for d in t.shape if isinstance(d, SymDim)]
        known = {str(d) for d in extents} | set(given)
        return Dims(dict.fromkeys(d for d in extents if not symbols_of(d) <= known))

    def __call__(self, dim: Dim) -> Any:
        """The extent as an int or an int64 expression."""
        if isinstance(dim, int):
            return dim
        if dim in self._opaque:
            return self._opaque[dim]
        total: Any = 0
        for monomial, coefficient in dim.terms:
            product: Any = coefficient
            for atom in monomial:
                if isinstance(atom, Symbol):
                    factor = self.symbols.setdefault(atom.name, tirx.Var(atom.name, "int64"))
                else:
                    factor = tirx.floordiv(self(atom.numerator), int64(atom.divisor))
                product = factor if isinstance(product, int) and product == 1 else factor * product
            total = product if isinstance(total, int) and total == 0 else total + product
        return total

    def shape(self, dims: Sequence[Dim]) -> tuple[Any, ...]:
        return tuple(self(d) for d in dims)

    def text(self, extent: Any) -> int | str:
        """An extent that a kernel made of others, as the runtime reads it (`mlec.runtime.dims`); what it divides by counts as 1 at least.

        Raises:
            TypeError: it is made of something else.
        """
        if isinstance(extent, int | tirx.IntImm):
            return int(extent)
        for name, variable in self.symbols.items():
            if variable.same_as(extent):
                return name
        for dim, variable in self._opaque.items():
            if variable.same_as(extent):
                return f"({dim})"
        form = _FORMS.get(type(extent))
        if form is None:
            raise TypeError(f"{extent} is made of other things than extents")
        left, right = self.text(extent.a), self.text(extent.b)
        if isinstance(extent, tirx.FloorDiv | tirx.FloorMod) and isinstance(right, str):
            right = f"max(1, {right})"
        return form.format(left, right)


_FORMS = {
    tirx.Add: "({}+{})", tirx.Sub: "({}-{})", tirx.Mul: "{}*{}", tirx.FloorDiv: "({}//{})", tirx.FloorMod: "({}%{})",
    tirx.Max: "max({}, {})", tirx.Min: "min({}, {})",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """An input of a region in memory.

    Attributes:
        buffer: flat; of bytes for booleans (a vector of booleans is loaded as bits, which is not how memory holds them).
        strides: by which it is read (0: repeated along that axis).
        boolean: the bytes are booleans.
    """

    buffer: Buffer
    strides: tuple[Any, ...]
    boolean: bool = False

    @staticmethod
    def of(buffer: Buffer, shape: Sequence[Any], dtype: DType) -> Load:
        """Reads a compact buffer of this shape that holds elements of this type."""
        strides: list[Any] = []
        stride: Any = 1
        for extent in reversed(shape):
            strides.append(0 if isinstance(extent, int) and extent == 1 else stride)
            stride = stride * extent
        return Load(buffer, tuple(reversed(strides)), dtype.is_bool)


@dataclass(frozen=True)
class Number:
    """An input of a region that is one number everywhere."""

    value: bool | int | float
    dtype: DType


@dataclass(frozen=True)
class Known:
    """An input of a region whose element at the index in question is known: the accumulator of a kernel."""

    value: Expr


Source = Load | Number | Known


class Region:
    """Evaluates values of a region at an index; needs an open builder.

    Args:
        producers: the node of each value that is not an input.
        sources: the inputs.
        dims: of the function under construction.
        lanes: the elements evaluated at once; their last index varies, and all expressions are written for the first.
        aligned: the sources' strides are for the index of the result (only in a region without moves of data), so that
            no op looks at the shapes of its operands.
    """

    def __init__(
        self,
        producers: Mapping[Value, Node],
        sources: Mapping[Value, Source],
        dims: Dims,
        lanes: Lanes,
        aligned: bool = False,
    ) -> None:
        self.producers = producers
        self.sources = sources
        self.dims = dims
        self.lanes = lanes
        self.aligned = aligned
        self._known: list[dict[tuple[Any, ...], Expr]] = [{}]
        self._analyzer = tvm.sym.Analyzer()
        if lanes.extent is not None:
            self._analyzer.bind(lanes.base, tvm.ir.Range(0, lanes.extent))

    def at(self, value: Value, indices: tuple[Index, ...]) -> Expr:
        """The element of a value, as a name or a constant: a vector, or a scalar if all lanes share it."""
        key = (value, *indices)
        for known in self._known:
            if key in known:
                return known[key]
        source = self.sources.get(value)
        if source is None:
            node = self.producers[value]
            rule = find(node.name, "element") or _elementwise
            result = rule(self, node, indices)
        elif isinstance(source, Load):
            result = self._load(source, indices)
        elif isinstance(source, Number):
            result = tirx.const(source.value, scalar.TVM_NAMES[source.dtype])
        else:
            result = source.value
        self._known[-1][key] = result
        return result

    def operand(self, value: Value, indices: tuple[Index, ...]) -> Expr:
        """The element of an operand that broadcasts to the shape that ``indices`` are in."""
        if self.aligned:
            return self.at(value, indices)
        shape = value.type.shape
        own = indices[len(indices) - len(shape) :]
        return self.at(value, tuple(0 if d == 1 else i for d, i in zip(shape, own, strict=True)))

    def index_value(self, index: Index, dtype: DType) -> Expr:
        """An index as a value of the region."""
        stride = self._stride(index)
        name = scalar.TVM_NAMES[dtype]
        whole = ramp(int64(index), self.lanes.count) if stride == 1 else int64(index)
        return share(scalar.cast(whole, name))

    def choose(
        self, condition: Expr | bool, when_true: Callable[[], Expr], when_false: Callable[[], Expr], dtype: DType
    ) -> Expr:
        """One of two values, of which only the chosen one is evaluated.

        Raises:
            NotContiguousError: when the lanes may choose differently.
        """
        condition = self.simplify(condition)
        if isinstance(condition, (bool, tirx.IntImm)):  # the same for all elements of the loop
            return (when_true if condition else when_false)()
        if self.lanes.is_vector and self._depends_on_lane(condition):
            raise NotContiguousError
        lanes = self.lanes.count
        cell = Cell(scalar.TVM_NAMES[dtype], lanes)
        with T.If(condition):
            for frame, branch in ((T.Then, when_true), (T.Else, when_false)):
                with frame(), self._inner():
                    cell.set(branch())
        return cell.value

    def scalar(self, value: Expr) -> Expr:
        """A value that is used as an index: it must be the same in all lanes."""
        if lanes_of(value) > 1:
            raise NotContiguousError
        return value

    def simplify(self, index: Index) -> Index:
        """The same by what is known of the lanes."""
        return self._analyzer.simplify(index) if not isinstance(index, int) else index

    @contextmanager
    def _inner(self) -> Iterator[None]:
        """What is evaluated in a branch is not known outside of it."""
        self._known.append({})
        try:
            yield
        finally:
            self._known.pop()

    def _load(self, source: Load, indices: tuple[Index, ...]) -> Expr:
        position: Any = int64(0)
        for index, stride in zip(indices, source.strides, strict=True):
            if not (isinstance(stride, int) and stride == 0):
                position = position + index * stride
        vector = self.lanes.is_vector and self._stride(position) == 1
        value = source.buffer[ramp(position, self.lanes.count if vector else 1)]
        return share(tirx.NE(value, const_like(0, value)) if source.boolean else value)

    def _stride(self, index: Index) -> int:
        """By how much an index grows from lane to lane: 0 or 1."""
        if not self.lanes.is_vector or isinstance(index, int) or not self._depends_on_lane(index):
            return 0
        linear = tvm.sym.detect_linear_equation(self._analyzer.simplify(index), [self.lanes.base])
        if linear and isinstance(linear[0], tirx.IntImm) and linear[0].value in (0, 1):
            return int(linear[0].value)
        raise NotContiguousError

    def _depends_on_lane(self, index: Expr) -> bool:
        return any(v.same_as(self.lanes.base) for v in tirx.analysis.undefined_vars(index))


def _elementwise(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    arguments = [region.operand(v, indices) for v in node.inputs]
    lanes = max(map(lanes_of, arguments))
    if lanes > 1 and node.op.has(Trait.LIBRARY_CALL) and not (node.inputs[0].type.dtype.is_int):
        raise NotContiguousError
    return share(scalar.apply(node.name, node.attrs, [broadcast(a, lanes) for a in arguments], node.output.type.dtype))

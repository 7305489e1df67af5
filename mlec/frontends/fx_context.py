"""What the lowering of one ATen call needs: the builder, the call's result types as torch states them, torch's promotion rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import sympy
import torch
from torch.utils._sympy.functions import CleanDiv, FloatPow, FloatTrueDiv, FloorDiv, IntTrueDiv, Mod, PythonMod, ToFloat

from mlec.errors import UnsupportedOpError
from mlec.ir import Dim, DType, GraphBuilder, SymDim, TensorType, Value
from mlec.ir.op import Array

TORCH_DTYPES = {
    DType.F64: torch.float64, DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16,
    DType.I64: torch.int64, DType.I32: torch.int32, DType.I16: torch.int16, DType.I8: torch.int8, DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}  # fmt: skip
_FROM_TORCH = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}

Number = bool | int | float
Operand = Value | Dim | Number


def dtype_of(dtype: torch.dtype) -> DType:
    """The IR's dtype.

    Raises:
        UnsupportedOpError: for an element type that the IR does not have (complex, quantised, 8-bit floats).
    """
    if dtype not in _FROM_TORCH:
        names = ", ".join(str(d).removeprefix("torch.") for d in _FROM_TORCH)
        raise UnsupportedOpError(
            f"element type {dtype} is not supported",
            code="E_DTYPE",
            hint="take real and imaginary parts as tensors of their own, and join them with torch.complex"
            if dtype.is_complex
            else f"supported are: {names}",
        )
    return _FROM_TORCH[dtype]


def to_numpy(tensor: torch.Tensor) -> Array:
    """A copy of a tensor's elements, so that the graph does not change when the module is trained on."""
    # Conjugates and negatives may be views that numpy has no word for.
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.dtype is torch.bfloat16:
        return plain.view(torch.int16).numpy().copy().view(DType.BF16.numpy)
    return np.array(plain.numpy(), copy=True)


def to_torch(array: Any) -> torch.Tensor:
    """A tensor from any array; a copy, so that a model that writes into its input does not touch the caller's."""
    if isinstance(array, torch.Tensor):
        return array.detach().clone()
    data = np.asarray(array)
    if data.dtype == DType.BF16.numpy:
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(data, order="C", copy=True))


class Dims:
    """Turns torch's symbolic sizes into dims; ``symbols`` says what each of torch's symbols is in our graph."""

    def __init__(self, symbols: Mapping[str, Dim]) -> None:
        self._symbols = symbols

    def of(self, size: Any) -> Dim:
        """The dim of an int or a `torch.SymInt`.

        Raises:
            UnsupportedOpError: for a size that is no polynomial or floor division of symbols.
        """
        return size if isinstance(size, int) else self.of_expression(size.node.expr)

    def shape(self, sizes: Sequence[Any]) -> tuple[Dim, ...]:
        return tuple(self.of(s) for s in sizes)

    def of_expression(self, expression: Any) -> Dim:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            name = str(expression)
            if name.startswith("u"):
                raise UnsupportedOpError(
                    "a size depends on the values of the inputs", code="E_DATA_DEPENDENT",
                    hint="boolean-mask indexing and nonzero() have no fixed shape; use torch.where or a multiplication by the mask",
                )  # fmt: skip
            return self._symbols.get(name, SymDim.named(name))
        args = [self.of_expression(a) for a in expression.args] if not expression.is_Pow else []
        if expression.is_Add:
            total: Dim = 0
            for a in args:
                total = total + a
            return total
        if expression.is_Mul:
            product: Dim = 1
            for a in args:
                product = product * a
            return product
        if expression.is_Pow and isinstance(expression.exp, sympy.Integer) and expression.exp > 0:
            base = self.of_expression(expression.base)
            power: Dim = 1
            for _ in range(int(expression.exp)):
                power = power * base
            return power
        if isinstance(expression, (FloorDiv, CleanDiv)) and isinstance(args[1], int) and args[1] > 0:
            return args[0] // args[1]
        if isinstance(expression, (Mod, PythonMod)) and isinstance(args[1], int) and args[1] > 0:
            return args[0] % args[1]
        raise UnsupportedOpError(
            f"a size is {expression}, which is no polynomial of the symbolic sizes", code="E_SYMBOLIC_SIZE",
            hint="fix that size: input_shapes with a number there, or dynamic_batch=False",
        )  # fmt: skip


_FRACTIONS: Mapping[Any, str] = {
    ToFloat: "", sympy.Add: "add", sympy.Mul: "mul", sympy.Pow: "pow", FloatPow: "pow", IntTrueDiv: "div", FloatTrueDiv: "div",
}  # fmt: skip


class Context:
    """One ATen call while it is lowered.

    Attributes:
        b: where nodes are added.
        target: name of the op, as ``aten.relu.default``.
        results: type of each result as torch states it, of complex ones that of their parts; None for a result that is no tensor.
        is_complex: whether the first result is complex.
        constants: arrays of the values that are weights.
        indexed: of calls so far: positions that may count from the end, and the extent of the axis they are on.
    """

    def __init__(self, builder: GraphBuilder, dims: Dims) -> None:
        self.b = builder
        self.dims = dims
        self.target = ""
        self.results: tuple[TensorType | None, ...] = ()
        self.is_complex = False
        self.constants: dict[Value, Array] = {}
        self.indexed: list[tuple[Value, Dim]] = []

    # -- the call's results --------------------------------------------------------------------------------------

    @property
    def type(self) -> TensorType:
        """Type of the first result."""
        result = self.results[0]
        assert result is not None, f"{self.target} returns no tensor"
        return result

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def wide(self) -> DType:
        """What torch computes the steps of one call in: of 16 bits, float32, which is rounded once at the end."""
        return DType.F32 if self.dtype in (DType.F16, DType.BF16) else self.dtype

    def unsupported(self, reason: str, hint: str = "") -> UnsupportedOpError:
        """An error about this call, to be raised."""
        return UnsupportedOpError(f"{self.target}: {reason}", hint=hint or None)

    # -- operands ------------------------------------------------------------------------------------------------

    def number(self, number: Dim | Number | Value, dtype: DType) -> Value:
        """A scalar of a number, of a symbolic size, or of what `fraction` made of sizes."""
        if isinstance(number, Value):
            return self.cast(number, dtype)
        if not isinstance(number, SymDim):
            with np.errstate(over="ignore"):  # 1e6 is infinite in float16, in torch as well
                return self.b.constant(np.asarray(number).astype(dtype.numpy))
        one = self.b.constant(1, dtype=DType.I64)
        return self.cast(self.b("sum", self.b("broadcast_to", one, shape=(number,)), axes=(0,)), dtype)

    def fraction(self, expression: Any) -> Value:
        """A float that is computed from symbolic sizes (the expression of a `torch.SymFloat`), as a scalar of float64.

        Raises:
            UnsupportedOpError: for anything but arithmetic and powers.
        """
        op = _FRACTIONS.get(expression.func)
        if op is None:
            size = expression if expression.is_Integer or not expression.is_number else float(expression)
            return self.number(size if isinstance(size, float) else self.dims.of_expression(size), DType.F64)
        first, *rest = (self.fraction(a) for a in expression.args)
        for value in rest:
            first = self.b(op, first, value)
        return first

    def cast(self, x: Value, dtype: DType) -> Value:
        return x if x.type.dtype is dtype else self.b("cast", x, dtype=dtype)

    def operand(self, x: Operand, dtype: DType) -> Value:
        """Anything that a call takes as a tensor or a number, as a value of this dtype."""
        return self.cast(x, dtype) if isinstance(x, Value) else self.number(x, dtype)

    def rounded(self, x: Operand, dtype: DType) -> Value:
        """An operand as the result's dtype has it, in a wider dtype that a call is computed in."""
        return self.cast(self.operand(x, self.dtype), dtype)

    def fits(self, x: Operand) -> bool:
        """Whether an operand loses nothing in the result's dtype that float32 would keep. Of a tensor with axes torch keeps no more."""
        if self.wide is self.dtype:
            return True
        if isinstance(x, Value):
            if x.type.rank or x.type.dtype is self.dtype:
                return True
            known: Any = self.constants.get(x)
        else:
            known = None if isinstance(x, SymDim) else x
        if known is None:
            return False
        with np.errstate(over="ignore"):
            single = np.asarray(known).astype(np.float32)
            return bool(single.astype(self.dtype.numpy).astype(np.float32) == single)

    def promoted(self, *operands: Operand) -> list[Value]:
        """The operands in the dtype that torch computes with."""
        dtype = promoted_dtype(operands)
        return [self.operand(x, dtype) for x in operands]

    # -- shapes --------------------------------------------------------------------------------------------------

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if x.type.shape == tuple(shape) else self.b("reshape", x, shape=tuple(shape))

    def broadcast(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if x.type.shape == tuple(shape) else self.b("broadcast_to", x, shape=tuple(shape))

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        return x if list(perm) == list(range(x.type.rank)) else self.b("transpose", x, perm=tuple(perm))

    def swap(self, x: Value, first: int, second: int) -> Value:
        """Two axes exchanged."""
        perm = list(range(x.type.rank))
        perm[first], perm[second] = perm[second], perm[first]
        return self.transpose(x, perm)

    def take(self, x: Value, axis: int, start: Dim, stop: Dim, step: int = 1) -> Value:
        """``x[..., start:stop:step, ...]``; bounds count from the front."""
        axis %= x.type.rank
        if start == 0 and stop == x.type.shape[axis] and step == 1:
            return x
        return self.b("slice", x, axis=axis, start=start, stop=stop, step=step)

    def pick(self, x: Value, axis: int, index: int) -> Value:
        """``x[..., index, ...]``: one entry, without the axis."""
        axis %= x.type.rank
        piece = self.take(x, axis, index, index + 1)
        return self.reshape(piece, (*x.type.shape[:axis], *x.type.shape[axis + 1 :]))

    def full(self, number: Number | Dim, shape: Sequence[Dim], dtype: DType) -> Value:
        return self.broadcast(self.number(number, dtype), shape)

    def static(self, x: Value, axis: int, what: str) -> int:
        """An extent that must be known."""
        extent = x.type.shape[axis]
        if not isinstance(extent, int):
            raise self.unsupported(f"{what} must be fixed, but it is {extent}", "give it as a number in input_shapes")
        return extent

    # -- pieces shared by several ops ----------------------------------------------------------------------------

    def float_op(self, op: str, x: Value) -> Value:
        """A unary float op; integers become floats first, as in torch."""
        return self.b(op, self.cast(x, self.dtype))

    def reduce(self, op: str, x: Value, axes: Sequence[int] | None, keepdims: bool) -> Value:
        """A reduction over some axes, or over all of them (None, or empty as in torch)."""
        rank = x.type.rank
        over = tuple(sorted(a % rank for a in axes)) if axes else tuple(range(rank))
        return self.b(op, x, axes=over, keepdims=keepdims) if rank else x


def promoted_dtype(operands: Sequence[Operand]) -> DType:
    """The dtype that torch computes an elementwise op in.

    Tensors with axes decide; a scalar tensor, and after it a Python number, only counts when it is of a higher kind
    (bool < integer < float).
    """
    groups: tuple[list[torch.dtype], list[torch.dtype], list[torch.dtype]] = ([], [], [])
    for x in operands:
        if isinstance(x, Value):
            groups[0 if x.type.rank else 1].append(TORCH_DTYPES[x.type.dtype])
        else:
            groups[2].append(
                torch.bool
                if isinstance(x, bool)
                else torch.get_default_dtype()
                if isinstance(x, float)
                else torch.int64
            )
    result: torch.dtype | None = None
    for group in groups:
        for candidate in group[:1]:
            for dtype in group[1:]:
                candidate = torch.promote_types(candidate, dtype)
            if result is None or _kind(candidate) > _kind(result):
                result = candidate
    assert result is not None
    return dtype_of(result)


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 0 if dtype is torch.bool else 1


Results = Value | Sequence[Value | None]
Handler = Callable[..., Results]
_HandlerT = TypeVar("_HandlerT", bound=Handler)

HANDLERS: dict[str, Handler] = {}
"""ATen op (``aten.relu.default``) to the function that lowers it: ``handler(context, *args, **kwargs)``.

Tensors arrive as values, symbolic sizes as dims, everything else as it stands in the call."""


def lowers(*names: str) -> Callable[[_HandlerT], _HandlerT]:
    """Enters a function into `HANDLERS` under some ATen names, written without the ``aten.``."""

    def enter(handler: _HandlerT) -> _HandlerT:
        for name in names:
            assert f"aten.{name}" not in HANDLERS, name
            HANDLERS[f"aten.{name}"] = handler
        return handler

    return enter

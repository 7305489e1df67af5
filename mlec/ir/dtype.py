"""Element types of tensors."""

from __future__ import annotations

import enum
from functools import cached_property
from typing import Any

import numpy as np


class DType(enum.Enum):
    """An element type. The value is the name in the text form; numeric facts are properties."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    def __repr__(self) -> str:
        return self.value

    __str__ = __repr__

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype with the same bits."""
        if self is DType.BF16:
            import ml_dtypes

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        return np.dtype(_NUMPY_NAMES[self.value])

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _BYTES[self.value]

    @property
    def bits(self) -> int:
        return 8 * self.itemsize

    @property
    def is_float(self) -> bool:
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def is_int(self) -> bool:
        """Signed and unsigned integers; not BOOL."""
        return self in (DType.I64, DType.I32, DType.I16, DType.I8, DType.U8)

    @property
    def is_bool(self) -> bool:
        return self is DType.BOOL

    @property
    def eps(self) -> float:
        """Distance from 1.0 to the next float; 0.0 for the exact types."""
        return _EPS.get(self.value, 0.0)

    @staticmethod
    def of(dtype: object) -> DType:
        """The DType of a numpy dtype, an array, or a name (numpy's or ours).

        Raises:
            KeyError: for an element type that the IR does not have.
        """
        if isinstance(dtype, DType):
            return dtype
        if isinstance(dtype, str) and dtype in _BYTES:
            return DType(dtype)
        plain: Any = getattr(dtype, "dtype", dtype)
        name = np.dtype(plain).name
        return DType(_FROM_NUMPY[name])


_NUMPY_NAMES = {
    "f64": "float64", "f32": "float32", "f16": "float16",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip
_FROM_NUMPY = {numpy_name: name for name, numpy_name in _NUMPY_NAMES.items()} | {"bfloat16": "bf16"}
_BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1}
_EPS = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}


def promote(a: DType, b: DType) -> DType:
    """The type that holds both, by numpy's rules (bf16 with f16 gives f32)."""
    if a is b:
        return a
    if DType.BF16 in (a, b):
        other = b if a is DType.BF16 else a
        if other is DType.F16:
            return DType.F32
        return other if other.is_float else DType.BF16
    return DType.of(np.promote_types(a.numpy, b.numpy))

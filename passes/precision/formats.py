"""The floats of 16 bits, and which numbers they can hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlec.errors import UsageError
from mlec.ir import DType
from mlec.ir.op import Array
from mlec.passes.stability.intervals import Interval

MARGIN = 8.0
"""How many times larger than on the examples numbers may become on other inputs."""


@dataclass(frozen=True)
class Format:
    """A float of 16 bits.

    Attributes:
        largest: finite number.
        normal: the smallest number with all its digits; below, they get lost one by one.
    """

    dtype: DType
    largest: float
    normal: float

    @property
    def covers_f32(self) -> bool:
        """Whether float32 reaches no further."""
        return self.largest > 1e38

    def why_not_weights(self, weights: Array) -> str:
        """Why known numbers would not be the same within the rounding of the format; empty if they would."""
        known = np.where(np.isfinite(weights), weights, 0).astype(np.float64)
        largest = float(np.abs(known).max(initial=0.0))
        if largest > self.largest:
            return f"numbers up to {largest:.4g} are beyond {self.largest:.5g}, the largest of {self.dtype}"
        total = float(np.linalg.norm(known))
        error = float(np.linalg.norm(known - known.astype(self.dtype.numpy).astype(np.float64)))
        if error > self.dtype.eps * total:
            return f"{error / total:.1%} of them would get lost: numbers below {self.normal:.2g} lose their digits in {self.dtype}"
        return ""

    def why_not_values(self, proven: Interval, seen: Callable[[], Interval | None]) -> str:
        """Why computed numbers might not be the same within the rounding of the format; empty if they are.

        Args:
            proven: where they lie for all inputs.
            seen: gives where they lie on examples, if there are any.
        """
        if self.covers_f32 or self.normal <= proven.magnitude <= self.largest / 2:
            return ""
        found = seen()
        if found is None and math.isinf(proven.magnitude):
            return f"nothing bounds them, and there are no examples: beyond {self.largest:.5g} {self.dtype} is infinite"
        size, where = (
            (proven.magnitude, "can be")
            if found is None
            else (found.magnitude * MARGIN, f"on the examples, times {MARGIN:g}, are")
        )
        if size > self.largest:
            return f"their magnitudes {where} up to {size:.4g}: beyond {self.largest:.5g} {self.dtype} is infinite"
        if 0 < size < self.normal:
            return f"their magnitudes {where} up to {size:.4g}: below {self.normal:.2g} {self.dtype} loses digits"
        return ""


FORMATS = {
    "fp16": Format(DType.F16, 65504.0, 2.0**-14),
    "bf16": Format(DType.BF16, float.fromhex("0x1.fep127"), 2.0**-126),
}
"""By the name of the precision."""


def format_of(name: str) -> Format:
    """The format of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(
            f"mixed-precision takes dtype {' or '.join(FORMATS)}, got {name!r}", hint="mixed-precision{dtype = bf16}"
        )
    return FORMATS[name]

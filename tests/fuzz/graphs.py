"""Random graphs of any op: each is grown from example calls of the registry, on values that the graph has already.

Graphs have one symbolic dim, ``n``. They come with inputs on which every value stays a number of moderate size, so that a difference
after a pass is one of the pass and not of an overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlec.errors import MlecError
from mlec.ir import DType, Graph, GraphBuilder, OpDef, SymDim, TensorType, Trait, Value, run_graph
from mlec.ir.dim import Dim
from mlec.ir.op import OPS, SYMBOLIC_EXTENT, Array, Attrs, Case, lookup
from tests.fuzz.motifs import MOTIFS, Motif

lookup("add")  # fills the table
N = SymDim.named("n")
BINDING = {"n": SYMBOLIC_EXTENT}
LARGEST = 1e4
LARGEST_SMALL = 41
SENSITIVE = 1e3
SENSITIVE_NARROW = 2.0
SOURCES = tuple(sorted(name for name in OPS if name not in ("constant", "fused")))
ELEMENTWISE = tuple(name for name in SOURCES if OPS[name].has(Trait.ELEMENTWISE))
STRUCTURAL = (
    "tree_ensemble",
    "matmul_packed",
    "matmul_narrow_packed",
    "conv2d_nchwc",
    "conv2d_narrow",
    "depthwise2d_nchwc",
)
"""Ops that backends and passes take with constants only, but for the first operand."""


@dataclass(frozen=True)
class Sample:
    """A graph, and inputs for ``n = 7``."""

    graph: Graph
    inputs: list[Array]

    @property
    def coarsest(self) -> float:
        """The largest eps among the float types of the graph."""
        types = {v.type.dtype for v in self.graph.inputs} | {v.type.dtype for n in self.graph.nodes for v in n.outputs}
        return max(
            (float(np.finfo(d.numpy).eps) if d is not DType.BF16 else 2.0**-7 for d in types if d.is_float), default=0.0
        )

    @property
    def is_narrow(self) -> bool:
        """Whether there are floats of 16 bits."""
        return self.coarsest > float(np.finfo(np.float32).eps)

    def is_stable(self) -> bool:
        """Whether inputs that are a little different give results that are little different."""
        rng = np.random.default_rng(0)
        step = 4 * self.coarsest
        nudged = [
            (x * (1 + step * rng.choice([-1, 1], x.shape))).astype(x.dtype) if x.dtype.kind in "fV" else x
            for x in self.inputs
        ]
        for a, b in zip(run_graph(self.graph, self.inputs), run_graph(self.graph, nudged), strict=True):
            if a.dtype.kind not in "fV":
                if not np.array_equal(a, b):
                    return False
                continue
            wanted, got = a.astype(np.float64), b.astype(np.float64)
            if not np.isfinite(got).all():
                return False
            scale = np.max(np.abs(wanted), initial=0.0)
            times = SENSITIVE_NARROW if self.is_narrow else SENSITIVE
            if np.max(np.abs(got - wanted), initial=0.0) > times * max(step, 1e-12) * max(scale, 1e-3):
                return False
        return True


def random_sample(seed: int) -> Sample:
    """A connected graph of 1 to 24 ops."""
    rng = np.random.default_rng(seed)
    return _grown(seed, rng, int(rng.integers(1, 25)), motifs=0.0)


def random_small_sample(seed: int) -> Sample:
    """A graph of 1 to 40 nodes, most of them small as each kernel costs time to compile, with patterns that passes look for."""
    rng = np.random.default_rng([seed, 4])
    return _grown(seed, rng, int(LARGEST_SMALL ** rng.random() ** 3), motifs=0.25)


def _grown(seed: int, rng: np.random.Generator, wanted: int, motifs: float) -> Sample:
    grower = _Grower(rng)
    for _ in range(4 * wanted):
        if (len(grower.values) - len(grower.inputs) if motifs else grower.count) >= wanted:
            break
        if motifs and rng.random() < motifs:
            grower.grow_motif(MOTIFS[int(rng.integers(len(MOTIFS)))])
            continue
        # Half of them are elementwise: fusion and most rules are about those.
        grower.grow(lookup(str(rng.choice(ELEMENTWISE if rng.random() < 0.5 else SOURCES))))
    return grower.finish(f"random_{seed}")


class _Grower:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.b = GraphBuilder("random")
        self.values: dict[Value, Array] = {}
        self.constants: dict[Value, Array] = {}
        self.inputs: list[Array] = []
        self.count = 0

    def grow(self, op: OpDef) -> None:
        """Adds one call, unless its results are no moderate numbers."""
        case = op.sample(self.rng)
        attrs = _symbolic_attrs(op, case.attrs)
        chosen = [self._operand(op, position, case) for position in range(len(case.operands))]
        arrays = [array for _, array in chosen]
        try:
            complete = op.complete_attrs(attrs)
            with np.errstate(all="ignore"):
                results = op.evaluate(arrays, complete, BINDING)
                if not all(map(_is_moderate, results)):
                    return
            operands = [
                self._value(value, array, case_array)
                for (value, array), case_array in zip(chosen, case.operands, strict=True)
            ]
            outputs = self.b.multi(op, *operands, **attrs)
        except (MlecError, ValueError, IndexError, ZeroDivisionError):
            return  # the call takes no such values
        self.values.update(zip(outputs, results, strict=True))
        self.count += 1

    def grow_motif(self, motif: Motif) -> None:
        """Adds a pattern on rows that the graph has, or on new ones, unless a value in it is no moderate number."""
        rows = [v for v in self.values if v.type.dtype is DType.F32 and v.type.rank == 2 and v.type.shape[0] == N]
        rows = [v for v in rows if isinstance(v.type.shape[1], int) and v.type.shape[1] > 0]
        if rows and self.rng.random() < 0.8:
            x = rows[int(self.rng.integers(len(rows)))]
        else:
            array = self.rng.normal(size=(SYMBOLIC_EXTENT, int(self.rng.choice([1, 3, 8, 19, 64])))).astype(np.float32)
            x = self._value("input", array, array)

        def constant(array: Array) -> Value:
            value = self.b.constant(np.asarray(array), "c")
            self.constants[value] = np.asarray(array)
            return value

        known = set(self.values)
        try:
            made = motif(self._call, constant, x, self.rng)
        except (MlecError, ValueError):
            made = []
        grown = [v for v in self.values if v not in known]
        if not made or not all(_is_moderate(self.values[v]) for v in grown):
            for value in grown:
                del self.values[value]
            return
        self.count += len(grown)

    def _operand(self, op: OpDef, position: int, case: Case) -> tuple[Value | str, Array]:
        """A value of the graph that fits, or what to make: an input or a constant of the example's array."""
        array = case.operands[position]
        constant = ("constant", array)
        if position and op.name in STRUCTURAL:
            return constant
        if array.dtype.kind in "fV" or (op.has(Trait.ELEMENTWISE) and array.dtype.kind == "b"):
            fitting = self._fitting(array)
            if fitting is not None and self.rng.random() < 0.8:
                return fitting
        if position and not _symbolic(array.shape) and self.rng.random() < 0.7:
            return constant
        return "input", array

    def _fitting(self, array: Array) -> tuple[Value, Array] | None:
        wanted = _type(array)
        recent = list(self.values)[-8:]
        same = [v for v in recent if v.type == wanted]
        if same and self.rng.random() < 0.8:
            value = same[int(self.rng.integers(len(same)))]
            return value, self.values[value]
        if not recent or array.dtype.kind not in "fV":
            return None
        return self._reshaped(recent[int(self.rng.integers(len(recent)))], wanted)

    def _reshaped(self, value: Value, wanted: TensorType) -> tuple[Value, Array] | None:
        """A value cast, flattened, repeated or cut, and brought into shape."""
        given, shape = value.type.shape, wanted.shape
        leads = bool(shape) and shape[0] == N
        if not value.type.dtype.is_float or (bool(given) and given[0] == N) != leads:
            return None
        if any(isinstance(d, SymDim) for d in (*given[leads:], *shape[leads:])):
            return None
        have, want = (math.prod(d for d in dims[leads:] if isinstance(d, int)) for dims in (given, shape))
        if not have or not want:
            return None
        known = set(self.values)
        head: tuple[Dim, ...] = (N,) if leads else ()
        result = value if value.type.dtype is wanted.dtype else self._call("cast", value, dtype=wanted.dtype)
        result = self._call("reshape", result, shape=(*head, have))
        if have < want:
            result = self._call("concat", *[result] * -(-want // have), axis=len(head))
        if -(-want // have) * have != want:
            result = self._call("slice", result, axis=len(head), start=0, stop=want, step=1)
        result = self._call("reshape", result, shape=shape)
        if _is_moderate(self.values[result]):
            return result, self.values[result]
        for made in [v for v in self.values if v not in known]:
            del self.values[made]
        return None

    def _call(self, op: str, *operands: Value, **attrs: object) -> Value:
        value = self.b(op, *operands, **attrs)
        arrays = [self.values[v] if v in self.values else self.constants[v] for v in operands]
        with np.errstate(all="ignore"):
            (self.values[value],) = lookup(op).evaluate(arrays, lookup(op).complete_attrs(attrs), BINDING)
        return value

    def _value(self, value: Value | str, array: Array, example: Array) -> Value:
        if isinstance(value, Value):
            return value
        if value == "constant":
            return self.b.constant(np.array(example), "c")
        self.inputs.append(array)
        new = self.b.input(f"x{len(self.inputs)}", _type(array))
        self.values[new] = array
        return new

    def finish(self, name: str) -> Sample:
        """With the values that nobody reads as outputs, and now and then another one."""
        self.b.name = name
        tell = self.b.input("batch", TensorType((N,), DType.BOOL))  # so that n has a value in any case
        self.inputs.append(np.zeros(SYMBOLIC_EXTENT, bool))
        self.values.setdefault(tell, self.inputs[-1])
        computed = [v for v in self.values if v not in set(self.b.finish([]).inputs)]
        whole = self.b.finish(computed or [tell])
        outputs = [v for v in computed if not whole.users.get(v) or self.rng.random() < 0.1]
        return Sample(self.b.finish(outputs or [tell]), list(self.inputs))


def _is_moderate(array: Array) -> bool:
    if array.dtype.kind not in "fV":
        return True
    numbers = array.astype(np.float64)
    return bool(np.isfinite(numbers).all() and np.max(np.abs(numbers), initial=0.0) < LARGEST)


def _symbolic(shape: tuple[int, ...]) -> bool:
    return any(extent and extent % SYMBOLIC_EXTENT == 0 for extent in shape)


def _dim(extent: int) -> Dim:
    return N * (extent // SYMBOLIC_EXTENT) if extent and extent % SYMBOLIC_EXTENT == 0 else extent


def _type(array: Array) -> TensorType:
    return TensorType(tuple(map(_dim, array.shape)), DType.of(array))


def _symbolic_attrs(op: OpDef, attrs: Attrs) -> dict[str, object]:
    dims = {a.name for a in op.attrs if a.kind.name in ("DIM", "DIMS")}

    def symbolic(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(symbolic, value))
        return _dim(value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {name: symbolic(value) if name in dims else value for name, value in attrs.items()}

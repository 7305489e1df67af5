"""Turns a graph into kernels and the sequence of their calls.

Each op is lowered by a rule of the table in `registry`. A template's is given the operands as `Tensor` and calls `Lowering.kernel`
once or more, or returns a view; they are in the ``lower_*`` modules of this package.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from mlec.backends.base import CompileOptions, KernelNote, RowTimes
from mlec.backends.tvm.compat import SCRATCH
from mlec.backends.tvm.kernels.direct import Spread, spread_on_cpu, spread_on_gpu
from mlec.backends.tvm.kernels.epilogue import BufferSpec
from mlec.backends.tvm.kernels.vector import cells_in
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import Device
from mlec.backends.tvm.scalar import TVM_NAMES
from mlec.backends.tvm.target import TargetInfo
from mlec.backends.tvm.tuning import Draft, Subject, Tuner
from mlec.ir.dim import Dim, SymDim, divide_exact, static_dims
from mlec.ir.dtype import DType
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import Array, ConstantRef, Trait
from mlec.ir.types import Location, TensorType
from mlec.measuring.tuning import TunedKernel
from mlec.runtime.program import KernelInfo


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in another one: from element ``offset`` on, if ``lines`` is 1; elsewhere in memory of its own."""

    whole: Tensor
    offset: Dim
    lines: Dim


@dataclass(eq=False)
class Tensor:
    """A value during lowering. Constants and transpositions are put into memory only where a kernel reads them.

    Attributes:
        type: shape and element type.
        array: the elements, where they are known at compile time.
        number: the one number that it holds everywhere, where it does.
        name: of a constant.
        transposed: the tensor that this one is a transposition of, and the permutation.
        viewed: the tensor whose memory this one is, with another shape.
        part: where it lies, if that is in another tensor.
    """

    type: TensorType
    array: Array | None = field(default=None, repr=False)
    number: bool | int | float | None = None
    name: str = ""
    transposed: tuple[Tensor, tuple[int, ...]] | None = None
    viewed: Tensor | None = None
    part: Part | None = None
    _memory: Tensor | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        """TVM's name of the element type."""
        return TVM_NAMES[self.type.dtype]

    @property
    def root(self) -> Tensor:
        """The tensor whose memory this one is: itself, or what it is a view of."""
        return self if self.viewed is None else self.viewed.root

    @property
    def promised(self) -> tuple[Tensor, tuple[int, ...]] | None:
        """The transposition that this tensor is, unless that has been carried out."""
        return self.transposed if self._memory is None else None


@dataclass(frozen=True, eq=False)
class CallStep:
    """One kernel call; ``extents`` are passed after the operands.

    ``function`` is None for a kernel that another call has made already: the one of the symbol ``code``. The call is not needed where
    ``lines`` is 1: it copies between a tensor and its parts. The result may lie in the memory of an operand whose number is in ``over``.
    The function takes ``scratch`` bytes in each thread, as in `mlec.runtime.program.Program`.
    """

    symbol: str
    code: str
    function: Any
    operands: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    extents: tuple[Dim, ...]
    lines: Dim | None = None
    over: tuple[int, ...] = ()
    scratch: int | str = 0


@dataclass(frozen=True, eq=False)
class ViewStep:
    """The same memory with another shape."""

    source: Tensor
    result: Tensor


@dataclass(frozen=True, eq=False)
class Lowered:
    """What lowering a graph gives.

    Attributes:
        inputs, outputs: of the graph, in memory.
        parameters: the constants that kernels read, by name.
        steps: the calls of the kernels, and views, in order.
        kernels: one for each call.
        notes: one for each call.
        tuned: the distinct kernels that were tuned.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, Tensor]
    steps: tuple[CallStep | ViewStep, ...]
    kernels: tuple[KernelInfo, ...]
    notes: tuple[KernelNote, ...]
    tuned: tuple[TunedKernel, ...] = ()

    @property
    def calls(self) -> tuple[CallStep, ...]:
        """The steps that call a kernel."""
        return tuple(step for step in self.steps if isinstance(step, CallStep))

    @property
    def aliases(self) -> dict[str, str]:
        """Calls that share the code of another one, and its symbol: their nodes differ in nothing but their operands."""
        return {call.symbol: call.code for call in self.calls if call.code != call.symbol}

    @property
    def constants(self) -> dict[str, Array]:
        """The elements of the parameters."""
        return {name: tensor.array for name, tensor in self.parameters.items() if tensor.array is not None}


BuildKernel = Callable[[str, Dims], Any]
"""``(name, extents) -> PrimFunc``: its parameters are the operands, scalars for some extents, the results."""

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Version:
    """A kernel as one schedule makes it.

    Attributes:
        build: makes it.
        operands: some constants are packed as the schedule wants them.
        strategy: what was chosen, for the report.
        rows: the time that is expected of it, where it is known.
        over: see `Lowering.kernel`.
    """

    build: BuildKernel
    operands: tuple[Tensor, ...]
    strategy: str
    rows: RowTimes | None = None
    over: tuple[int, ...] = ()


def constant(node: Node, graph: Graph) -> Tensor:
    """What a ``constant`` node of a graph, or of a body, holds."""
    value = node.attrs["value"]
    if isinstance(value, ConstantRef):
        return Tensor(node.output.type, graph.constants[value.name], name=value.name)
    return Tensor(node.output.type, number=value)


class Lowering:
    """State of lowering one graph.

    Args:
        graph: verified.
        target: what the kernels are generated for.
        made: is called with the symbol and the function of each kernel as soon as it is made.

    Attributes:
        device: whose rules are used.
        cell_scope: where the variables of a kernel live, see `kernels.vector.CELL_SCOPE`.
    """

    device: Device = "cpu"
    cell_scope = "global"

    def __init__(
        self,
        graph: Graph,
        target: TargetInfo,
        options: CompileOptions | None = None,
        made: Callable[[str, Any], None] | None = None,
    ) -> None:
        self.graph = graph
        self.target = target
        self._options = options or CompileOptions()
        self._tell = made
        self._steps: list[CallStep | ViewStep] = []
        self._constants: dict[str, Tensor] = {}
        self._arrays = dict(graph.constants)  # what is known by a name
        self._kernels: list[KernelInfo] = []
        self._notes: list[KernelNote] = []
        self._remark = ""
        self._tail: tuple[Node, ...] = ()
        self._names: set[str] = set()
        self._place = Location()
        self._label = ""
        self._form: Hashable = ()
        self._made_of_form = 0
        self._symbols: dict[tuple[Hashable, int], str] = {}
        self._content: Callable[[], str] = str
        self._placeable: set[Tensor] = set()
        self.joined: list[Joined] = []
        tuning = self._options.tuning
        self._tuner = None if tuning is None else Tuner(tuning, target, self._options.report)

    @cached_property
    def weights_nbytes(self) -> int:
        """Bytes of the graph's constants."""
        return sum(array.nbytes for array in self.graph.constants.values())

    def run(self) -> Lowered:
        """Lowers every node of the graph.

        Raises:
            UnsupportedOpError: naming the node that has no lowering.
        """
        values = {v: Tensor(v.type) for v in self.graph.inputs}
        for index, node in enumerate(self.graph.nodes):
            self._options.report("lower", index, len(self.graph.nodes))
            if node.is_constant:
                values[node.output] = constant(node, self.graph)
                continue
            self._place, self._label = node.loc, f"{_kernel_name(node)}_{index}"
            operands = tuple(values[v] for v in node.inputs)
            self._content = partial(_content, node, operands, not self.on_gpu)
            with self._lowering_of(node_form(node, operands, not self.on_gpu)):
                results = self.lower(node, operands)
            values.update(zip(node.outputs, results, strict=True))
        outputs = [self._whole(self.in_memory(values[v])) for v in self.graph.outputs]
        inputs = tuple(values[v] for v in self.graph.inputs)
        steps, kernels, notes = tuple(self._steps), tuple(self._kernels), tuple(self._notes)
        tuned = () if self._tuner is None else tuple(self._tuner.tuned)
        return Lowered(inputs, tuple(outputs), self._constants, steps, kernels, notes, tuned)

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels run on a GPU."""
        return self.device == "cuda"

    @property
    def spread(self) -> Spread:
        """How the tasks of a direct kernel run."""
        return spread_on_gpu if self.on_gpu else spread_on_cpu

    # -- what lowerings call -------------------------------------------------------------------------------------

    def lower(self, node: Node, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Lowers one node.

        Raises:
            UnsupportedOpError: it has no rule for the device.
        """
        from mlec.backends.tvm.lower_fused import lower_alone

        return lower_alone(self, node, operands)

    def kernel(
        self,
        build: BuildKernel,
        operands: Sequence[Tensor],
        results: Sequence[TensorType],
        *,
        node: Node,
        strategy: str,
        rows: RowTimes | None = None,
        extents: Sequence[str] = (),
        into: Tensor | None = None,
        lines: Dim | None = None,
        over: Sequence[int] = (),
        multiplied: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Adds a call of a kernel.

        Args:
            build: makes the kernel; its parameters are ``operands``, a scalar for each of ``extents``, and ``results``.
            results: types of what it computes.
            node: whose arithmetic this kernel does (for the profile).
            strategy: what was chosen, for the report.
            rows: the time that is expected of it, where it is known.
            extents: names of symbols that no buffer's shape tells.
            into: the tensor that it writes, where there is one already.
            lines: the call is not needed where this is 1, see `Part`.
            over: numbers of the operands in whose memory the result may lie, see `mlec.runtime.program.Call`.
            multiplied: bits of the numbers that it multiplies, where the operands do not tell.
        """
        symbol = self._next_name()
        self._names.add(symbol)
        memory = tuple(self.in_memory(t) for t in operands)
        made = tuple(Tensor(t) for t in results) if into is None else (into,)
        self._placeable.update(made if into is None else ())
        first = self._symbols.setdefault((self._form, self._made_of_form), symbol)
        self._made_of_form += 1
        function = None
        scratch: int | str = 0
        if first == symbol:
            dims = Dims.of([t.type for t in (*memory, *made)], extents)
            function = self._function(build, symbol, dims)
            if not self.on_gpu:
                scratch = dims.text(function.attrs[SCRATCH])
            if self._tell is not None:
                self._tell(symbol, function)
        named = tuple(SymDim.named(name) for name in extents)
        self._steps.append(CallStep(symbol, first, function, memory, made, named, lines, tuple(over), scratch))
        moved: Dim = 0
        for tensor in (*memory, *made):
            moved = moved + tensor.type.nbytes
        flops = _plain(node.cost.flops)
        self._kernels.append(KernelInfo(symbol, node.name, self._place.summary(), flops, _plain(moved)))
        widths = [t.type.dtype.bits for t in (*memory, *made) if t.type.dtype.is_float]
        if node.op.has(Trait.CONTRACTION):  # by instructions of their own, where the processor has such
            kinds = {value.type.dtype for value in node.inputs[:2]}
            widths = [8] if node.inputs[0].type.dtype.bits == 8 else [16] if kinds == {DType.BF16} else widths
        note = f"{strategy}, {self._remark}" if self._remark else strategy
        bits, tail = multiplied or max(widths, default=32), self._tail if node.op.has(Trait.CONTRACTION) else ()
        self._notes.append(KernelNote(symbol, node.name, note, bits, node, self._held(memory), rows, tail))
        return made

    def _held(self, operands: Sequence[Tensor]) -> int:
        """Bytes of the constants among the operands of a kernel."""
        constants = set(self._constants.values())
        return sum(int(str(t.type.nbytes)) for t in dict.fromkeys(operands) if t in constants)

    def scheduled(
        self,
        schedules: Iterator[S],
        version: Callable[[S], Version],
        results: Sequence[TensorType],
        *,
        node: Node,
        typical: Callable[[int], Array] | None = None,
    ) -> tuple[Tensor, ...]:
        """Adds a call of a kernel that can be made in several ways: in the one that its template prefers, or that is faster here.

        Args:
            schedules: the ways, see `kernels.schedule`.
            version: the kernel by one of them. It computes ``results`` whichever it is.
            typical: rows for the first operand, of a given number, where random numbers would not do for measuring.
        """
        place, self._made_of_form = self._made_of_form, self._made_of_form + 1

        def draft(schedule: S, name: str) -> Draft:
            made = version(schedule)
            types = [t.type for t in made.operands]
            function = self._function(made.build, name, Dims.of([*types, *results]))
            return Draft(function, tuple((t.type, _elements(t)) for t in made.operands), tuple(results))

        if self._tuner is None:
            chosen = next(schedules)
        else:
            weights = "beyond L2" if self.weights_nbytes > self.target.l2_bytes else "in L2"
            key = f"{self._content()} kernel {place} makes {', '.join(map(str, results))}, all weights {weights}"
            location = self._place.summary()
            chosen = self._tuner.choose(Subject(key, schedules, draft, self._next_name(), node.name, location, typical))
        made = version(chosen)
        with self._lowering_of((self._form, place, chosen)):
            return self.kernel(
                made.build, made.operands, results, node=node, strategy=made.strategy, rows=made.rows, over=made.over
            )

    def reshape(self, x: Tensor, shape: Sequence[Dim]) -> Tensor:
        """The same elements with another shape; costs nothing."""
        if tuple(shape) == x.shape:
            return x
        result_type = TensorType(tuple(shape), x.type.dtype)
        if x.number is not None:
            return Tensor(result_type, number=x.number)
        if x.array is not None:
            return self.packed(x, f"{'x'.join(map(str, shape))}", lambda a: a.reshape([int(str(d)) for d in shape]))
        result = Tensor(result_type, viewed=self.in_memory(x))
        self._steps.append(ViewStep(self.in_memory(x), result))
        return result

    def can_lie_in(self, x: Tensor, offset: Dim) -> bool:
        """Whether a tensor in memory could be part of another one: a kernel writes it, to where nothing has put it yet."""
        return x.root in self._placeable and is_aligned(x, offset)

    def put_in(self, x: Tensor, part: Part) -> None:
        """Lets a tensor that `can_lie_in` another one lie there."""
        self._placeable.remove(x.root)
        x.root.part = part

    def join(self, joined: Joined) -> None:
        """Tells of a concatenation whose operands lie in it, for those that continue it."""
        self.joined.append(joined)
        self._placeable.add(joined.whole)

    def packed(self, x: Tensor, what: str, pack: Callable[[Array], Array]) -> Tensor:
        """A constant in another layout, computed now. ``what`` names the layout."""
        assert x.array is not None
        array = np.ascontiguousarray(pack(x.array))
        return Tensor(TensorType(array.shape, x.type.dtype), array, name=f"{x.name}.{what}")

    def in_memory(self, x: Tensor) -> Tensor:
        """A tensor that kernels can read: constants become parameters of the program, transpositions are carried out."""
        if x._memory is None:
            if x.number is not None:
                shape = [int(str(d)) for d in x.shape]
                x._memory = self._parameter(np.full(shape, x.number, x.type.dtype.numpy), "number")
            elif x.array is not None:
                x._memory = self._parameter(x.array, x.name)
            elif x.transposed is not None:
                x._memory = self._transpose(x)
            else:
                x._memory = x
        return x._memory

    def spec(self, x: Tensor | TensorType, dims: Dims) -> BufferSpec:
        """The buffer of a tensor, with the extents of a kernel."""
        t = x.type if isinstance(x, Tensor) else x
        return BufferSpec(dims.shape(t.shape), TVM_NAMES[t.dtype])

    def variant(self, what: Hashable) -> AbstractContextManager[None]:
        """For kernels that depend on more than the form of their node: on ``what`` as well."""
        content = self._content
        return self._lowering_of((self._form, what), lambda: f"{content()} {what!r}")

    @contextmanager
    def noting(self, remark: str) -> Iterator[None]:
        """Adds a remark, if any, to the note of every kernel that is made inside."""
        before = self._remark
        self._remark = remark or before
        try:
            yield
        finally:
            self._remark = before

    @contextmanager
    def followed_by(self, tail: tuple[Node, ...]) -> Iterator[None]:
        """Notes what the kernel of a product that is made inside computes of its results besides."""
        before = self._tail
        self._tail = tail
        try:
            yield
        finally:
            self._tail = before

    # -- helpers -------------------------------------------------------------------------------------------------

    def _function(self, build: BuildKernel, name: str, dims: Dims) -> Any:
        """The program of a kernel."""
        with cells_in(self.cell_scope):
            return build(name, dims)

    def _parameter(self, array: Array, name: str) -> Tensor:
        """The constant parameter that holds the array, under that name or a similar one."""
        free, count = name, 1
        while self._arrays.setdefault(free, array) is not array:
            count += 1
            free = f"{name}.{count}"
        return self._constants.setdefault(
            free, Tensor(TensorType(array.shape, DType.of(array.dtype)), array, name=free)
        )

    def _whole(self, x: Tensor) -> Tensor:
        """An output in memory of its own."""
        from mlec.backends.tvm.lower_shape import copied

        if x.root.part is None:
            return x
        with self._lowering_of(("copy", str(x.type)), lambda: f"copy of {x.type}"):
            return copied(self, x)

    def _transpose(self, x: Tensor) -> Tensor:
        from mlec.backends.tvm.lower_shape import transposed

        assert x.transposed is not None
        source, perm = x.transposed
        with self._lowering_of(
            ("transpose", str(source.type), perm), lambda: f"transposition of {source.type} to {perm}"
        ):
            return transposed(self, x)

    @contextmanager
    def _lowering_of(self, form: Hashable, content: Callable[[], str] | None = None) -> Iterator[None]:
        """Kernels made inside are the first, second ... of this form; ``content`` says the same for the memory of measurements."""
        outer = self._form, self._made_of_form, self._content
        self._form, self._made_of_form, self._content = form, 0, content or self._content
        try:
            yield
        finally:
            self._form, self._made_of_form, self._content = outer

    def _next_name(self) -> str:
        """Of the kernel that will be added next."""
        name, count = self._label, 1
        while name in self._names:
            count += 1
            name = f"{self._label}_{count}"
        return name


@dataclass(frozen=True)
class Joined:
    """A concatenation along an axis of tensors in memory."""

    whole: Tensor
    axis: int
    operands: tuple[Tensor, ...]


PART_ALIGNMENT = 8
"""Bytes that a part's place in a buffer is a multiple of, as kernels are made for (`kernels.tile.PARAMETER_ALIGNMENT`)."""


def is_aligned(x: Tensor, offset: Dim) -> bool:
    """Whether kernels take a tensor that begins at this element of another one."""
    return divide_exact(offset * x.type.dtype.itemsize, PART_ALIGNMENT) is not None


def needed_extents(types: Sequence[TensorType], used: frozenset[str]) -> tuple[str, ...]:
    """Of the symbols that a kernel uses, those that no extent of its buffers is by itself."""
    plain = {str(d) for t in types for d in t.shape if not isinstance(d, int)}
    return tuple(sorted((used | frozenset().union(*(t.symbols for t in types))) - plain))


IN_WEIGHTS = {"matmul_int8": "zero_point"}
"""By op, the attribute that only changes what is packed of weights (operand 1) that are known."""


def node_form(
    node: Node, operands: Sequence[Tensor], packs: bool, identity: Callable[[Array], Hashable] = id
) -> Hashable:
    """All that decides which kernels a node becomes; nodes of equal form share them.

    Args:
        packs: whether rules pack weights that are known, instead of decomposing the node.
        identity: of arrays whose elements decide, too.
    """
    same: dict[int, int] = {}
    kinds = []
    for i, x in enumerate(operands):
        at_hand = x._memory if x._memory is not None else x
        place = same.setdefault(id(at_hand) if x.array is None else id(x.array), i)
        turned = None if x.promised is None else (str(x.promised[0].type), x.promised[1])
        # The kernel for a tree ensemble depends on the trees.
        content = identity(x.array) if node.name == "tree_ensemble" and x.array is not None else None
        kinds.append((place, x.array is not None, x.number, repr(x.number), turned, content))
    known = {v for v, x in zip(node.inputs, operands, strict=True) if packs and x.array is not None}
    return _node_form(node, known), tuple(kinds)


def _content(node: Node, operands: Sequence[Tensor], packs: bool) -> str:
    """The form of a node as a text that is the same in every process."""
    return repr(node_form(node, operands, packs, lambda a: hashlib.sha256(a.tobytes()).hexdigest()))


def _elements(x: Tensor) -> Array | None:
    """The elements of a tensor, where they are known."""
    if x.number is not None:
        return np.full(static_dims(x.shape), x.number, x.type.dtype.numpy)
    return x.array


def _node_form(node: Node, known: Set[Value]) -> Hashable:
    types = tuple(str(v.type) for v in (*node.inputs, *node.outputs))
    packed = IN_WEIGHTS.get(node.name) if node.inputs[1:2] and node.inputs[1] in known else None
    attrs = []
    for name, value in node.attrs.items():
        if isinstance(value, Graph):
            inner = zip(value.inputs, node.inputs, strict=True) if node.name == "fused" else ()
            attrs.append(_graph_form(value, {v for v, outer in inner if outer in known}))
        elif name != packed:
            attrs.append(repr(value))
    return node.name, types, tuple(attrs)


def _graph_form(graph: Graph, known: Set[Value]) -> Hashable:
    """Equal for graphs that differ in names and places only; ``known``: inputs that are constants."""
    numbers = {v: i for i, v in enumerate((*graph.inputs, *(v for n in graph.nodes for v in n.outputs)))}
    nodes = tuple((_node_form(n, known), tuple(numbers[v] for v in n.inputs)) for n in graph.nodes)
    return tuple(str(v.type) for v in graph.inputs), nodes, tuple(numbers[v] for v in graph.outputs)


def _plain(dim: Dim) -> int | str:
    return dim if isinstance(dim, int) else str(dim)


def _kernel_name(node: Node) -> str:
    """The op, or the ops of a fused body."""
    if node.name != "fused":
        return node.name
    ops = "_".join(n.name for n in node.attrs["body"].compute_nodes)
    return re.sub(r"\W", "_", ops if len(ops) <= 48 else f"{ops[:44]}_etc")


__all__ = ["CallStep", "Lowered", "Lowering", "Tensor", "Version", "ViewStep", "needed_extents"]

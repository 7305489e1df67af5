"""Walks an exported program and calls the handler of each op; collects every problem before it raises."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

import mlec.ops  # noqa: F401  (fills the op table)
from mlec.errors import MlecError, TypeRuleError, UnsupportedModelError, UnsupportedOpError
from mlec.frontends.base import LowerOptions
from mlec.frontends.fx_complex import COMPLEX, Complex, is_complex, part_dtype, parts_of, takes_complex
from mlec.frontends.fx_context import HANDLERS, Context, Dims, dtype_of, to_numpy
from mlec.frontends.fx_examples import example_problem
from mlec.frontends.fx_export import CHECKS, Exported, dotted, export_model
from mlec.frontends.fx_places import place_of
from mlec.ir import UNKNOWN, Graph, GraphBuilder, Location, Proof, TensorType, Value, proves_equal, verify
from mlec.ir.dim import Dim
from mlec.ir.op import Array
from mlec.signature import Signature, TensorSpec

_RANDOM = re.compile(
    r"aten\.(rand|randn|randint|randperm|bernoulli|normal|uniform|multinomial|poisson|exponential|rrelu)"
)
_SHOWN = 20


def lower_model(model: Any, options: LowerOptions) -> Graph:
    """The model in evaluation mode as a graph; see `mlec.frontends.fx.TorchFrontend.lower`."""
    try:
        graph = _Lowering(export_model(model, options)).graph()
    except (UnsupportedModelError, UnsupportedOpError) as error:
        if isinstance(model, torch.nn.Module) and options.example_inputs is not None:
            problem = example_problem(model, options)
            if problem is not None:
                raise problem from error
        raise
    verify(graph, after="the torch frontend")
    return graph


class _Failed:
    """Stands for the result of a call that could not be lowered, so that later problems are found as well."""


FAILED = _Failed()


class _Lowering:
    """Walks the nodes of an exported program and calls the handler of each."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.program = exported.program
        self.b = GraphBuilder(re.sub(r"\W", "_", exported.name) or "main")
        self.dims = Dims(exported.symbols)
        self.context = Context(self.b, self.dims)
        self.values: dict[torch.fx.Node, Any] = {}
        self.locations: dict[torch.fx.Node, Location] = {}
        self.problems: list[MlecError] = []
        self._weights: dict[tuple[object, ...], tuple[Array, ...]] = {}
        self._known: dict[torch.fx.Node, Any] = {}
        self._weight_names = {
            spec.arg.name: str(spec.target)
            for spec in self.program.graph_signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        }

    def graph(self) -> Graph:
        self._check_state()
        nodes = self.program.graph
        for node in reversed(list(nodes.nodes)):
            if str(node.target) in CHECKS and not node.users:
                nodes.erase_node(node)
        nodes.eliminate_dead_code()
        self._placeholders()
        for node in nodes.nodes:
            if node.op == "call_function":
                self._call(node)
        self._raise_problems()
        return self._finish()

    # -- interface -----------------------------------------------------------------------------------------------

    def _check_state(self) -> None:
        """Refuses programs that write into their inputs or into the module's state."""
        changed = [
            f"buffer {spec.target!r}"
            if spec.kind is OutputKind.BUFFER_MUTATION
            else f"{spec.kind.name.lower()} {spec.target!r}"
            for spec in self.program.graph_signature.output_specs
            if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.TOKEN)
        ]
        if changed:
            raise UnsupportedModelError(
                f"the model changes its own state or its inputs: {', '.join(changed)}", code="E_MUTATION",
                hint="a compiled model is a function of its inputs: return the new state as an output, copy an input before "
                "writing into it, and call model.eval() before torch.export (batch norm updates its statistics in training)",
            )  # fmt: skip

    def _placeholders(self) -> None:
        names = iter(self.exported.inputs)
        specs = self.program.graph_signature.input_specs
        placeholders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    self.values[node] = spec.arg.value
                    continue
                tensor = node.meta["val"]
                try:
                    kind = TensorType(self.dims.shape(tensor.shape), dtype_of(tensor.dtype))
                except UnsupportedOpError as error:
                    raise UnsupportedModelError(
                        f"input {node.name!r}: {error.message}", code=error.code, hint=error.hint
                    ) from None
                self.values[node] = self.b.input(next(names), kind)
            elif node.users and spec.kind is not InputKind.TOKEN:
                self.values[node] = self._weight(node, spec)

    def _weight(self, node: torch.fx.Node, spec: Any) -> Any:
        target = str(spec.target)
        stored = self.program.state_dict.get(target, self.program.constants.get(target))
        if not isinstance(stored, torch.Tensor) or stored.device.type == "meta":
            self.problems.append(
                UnsupportedOpError(
                    f"{target} is no tensor with values, but {type(stored).__name__}",
                    hint="keep what forward reads in tensors: parameters, or buffers with register_buffer",
                )
            )
            return FAILED
        key = (
            stored.untyped_storage().data_ptr(),
            stored.storage_offset(),
            stored.dtype,
            stored.shape,
            stored.stride(),
        )
        if key not in self._weights or not stored.numel():
            try:
                part_dtype(stored.dtype)
            except UnsupportedOpError as error:
                self.problems.append(UnsupportedOpError(f"{target}: {error.message}", code=error.code, hint=error.hint))
                return FAILED
            self._weights[key] = tuple(to_numpy(part) for part in parts_of(stored))
        arrays = self._weights[key]
        with self.b.at(Location(scope=target)):
            values = [self.b.constant(array, hint=target) for array in arrays]
        self.context.constants.update(zip(values, arrays, strict=True))
        return Complex(*values) if stored.is_complex() else values[0]

    def _finish(self) -> Graph:
        (output,) = (n for n in self.program.graph.nodes if n.op == "output")
        results: list[Value] = []
        names = self._output_names()
        kept: list[str] = []
        for name, node, spec in zip(names, output.args[0], self.program.graph_signature.output_specs, strict=True):
            if isinstance(spec.arg, TensorArgument):
                if isinstance(self.values[node], Complex):
                    raise UnsupportedModelError(
                        f"output {name!r} is complex, and the results of a compiled model are real", code="E_DTYPE",
                        loc=self.locations.get(node), hint="return torch.view_as_real of it, or its real and imaginary parts",
                    )  # fmt: skip
                results.append(self.values[node])
                kept.append(name)
            elif not isinstance(spec.arg, ConstantArgument):
                raise UnsupportedModelError(
                    f"output {name!r} is a size, not a tensor",
                    hint="return tensors only; sizes follow from the inputs' shapes",
                )
        graph = self.b.finish(results)
        ranges = self.exported.ranges()
        symbols = {s for v in graph.inputs for s in v.type.symbols}
        signature = Signature(
            inputs=tuple(_spec(v.hint, v.type, _position_limits(graph, v, self.context.indexed)) for v in graph.inputs),
            outputs=tuple(_spec(name, v.type) for name, v in zip(kept, results, strict=True)),
            symbols={name: ranges.get(name, (0, None)) for name in sorted(symbols)},
        )
        return graph.with_signature(signature)

    def _output_names(self) -> list[str]:
        """Keys for a dict, ``y`` for a single tensor, ``y0``, ``y1`` ... for a tuple."""
        spec = self.program.call_spec.out_spec
        count = len(self.program.graph_signature.output_specs)
        paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))[0]]
        names = [dotted(path) for path in paths]
        if count == 1 and names[0] in ("", "0"):
            return ["y"]
        return [f"y{name}" if name[:1].isdigit() else name or f"y{i}" for i, name in enumerate(names)]

    # -- calls ---------------------------------------------------------------------------------------------------

    def _call(self, node: torch.fx.Node) -> None:
        location = self.locations[node] = self._location(node)
        meta = node.meta.get("val")
        if isinstance(meta, (int, torch.SymInt)) and not isinstance(meta, bool):
            self.values[node] = self._attempt(node, location, lambda: self.dims.of(meta))
        elif isinstance(meta, torch.SymFloat):
            self.values[node] = self._attempt(node, location, lambda: self.context.fraction(meta.node.expr))
        elif isinstance(meta, (float, bool)):
            self.values[node] = meta
        elif node.target is operator.getitem:
            source, index = node.args
            results = self.values[source]  # type: ignore[index]
            self.values[node] = FAILED if results is FAILED else self._item(node, location, results, index)
        elif any(self.values.get(n) is FAILED for n in node.all_input_nodes):
            self.values[node] = FAILED
        else:
            self.values[node] = self._attempt(node, location, lambda: self._lowered(node))

    def _attempt(self, node: torch.fx.Node, location: Location, action: Callable[[], Any]) -> Any:
        """The result of an action, or FAILED with the problem noted."""
        try:
            with self.b.at(location):
                return action()
        except (UnsupportedOpError, TypeRuleError) as error:
            name = _op_name(node)
            message = error.message if name in error.message else f"{name}: {error.message}"
            code = error.code if isinstance(error, UnsupportedOpError) else None
            self.problems.append(
                UnsupportedOpError(message, code=code, hint=error.hint, loc=location, notes=error.notes)
            )
            return FAILED

    def _item(self, node: torch.fx.Node, location: Location, results: Any, index: Any) -> Any:
        value = results[index]
        if value is None and node.users:
            source = node.args[0]
            self.problems.append(
                UnsupportedOpError(
                    f"{source.target}: its result {index} is used, which is not supported",  # type: ignore[union-attr]
                    loc=location, hint="only the pooled or normalised values themselves can be used, not indices or statistics",
                )
            )  # fmt: skip
            return FAILED
        return value

    def _lowered(self, node: torch.fx.Node) -> Any:
        target = str(node.target)
        context = self.context
        context.target = target
        metas = _metas(node)
        context.results = tuple(self._type(m) for m in metas)
        context.is_complex = is_complex(metas[:1])
        handler = (COMPLEX if takes_complex(node) else HANDLERS).get(target)
        if handler is None:
            folded = self._folded(node)
            if folded is None:
                raise _unknown(node)
            return folded
        args = torch.fx.map_arg(node.args, self._argument)
        kwargs = torch.fx.map_arg(node.kwargs, self._argument)
        result = handler(context, *args, **kwargs)
        for value, stated in zip(
            result if isinstance(result, (tuple, list)) else (result,), context.results, strict=False
        ):
            if value is not None and stated is not None:
                for part in value.parts if isinstance(value, Complex) else (value,):
                    self._check_type(target, part.type, stated)
        return result

    def _folded(self, node: torch.fx.Node) -> Any:
        """The results of an op that takes nothing but weights, which torch computes now; None for any other op."""
        results = self._stored(node)
        if results is None:
            return None
        tensors = results if isinstance(results, (tuple, list)) else (results,)
        values = [self._constant(t) if isinstance(t, torch.Tensor) else None for t in tensors]
        return values if isinstance(results, (tuple, list)) else values[0]

    def _constant(self, tensor: torch.Tensor) -> Value | Complex:
        values = [self.b.constant(to_numpy(part)) for part in parts_of(tensor)]
        return Complex(*values) if tensor.is_complex() else values[0]

    def _stored(self, node: torch.fx.Node) -> Any:
        """What a node gives in every call, as torch has it; None if that depends on the inputs."""
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            name = self._weight_names.get(node.name)
            return self.program.state_dict.get(name, self.program.constants.get(name)) if name is not None else None
        if node.target is operator.getitem:
            whole, index = node.args
            assert isinstance(whole, torch.fx.Node)
            source = self._stored(whole)
            return None if source is None else source[index]
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in op.tags:
            return None
        inputs = {n: self._stored(n) for n in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        with torch.no_grad():
            return op(*torch.fx.map_arg(node.args, inputs.get), **torch.fx.map_arg(node.kwargs, inputs.get))

    def _argument(self, node: torch.fx.Node) -> Any:
        if node not in self.values or isinstance(node.meta.get("val"), torch.SymBool):
            raise UnsupportedOpError(
                f"takes {node.name}, which depends on the symbolic sizes in a way that has no value here",
                hint="fix the sizes it is computed from in input_shapes, or dynamic_batch=False",
            )
        return self.values[node]

    def _type(self, meta: Any) -> TensorType | None:
        if not isinstance(meta, torch.Tensor):
            return None
        return TensorType(self.dims.shape(meta.shape), part_dtype(meta.dtype))

    def _check_type(self, target: str, ours: TensorType, theirs: TensorType) -> None:
        """Guards against a handler that gets a promotion or a shape rule wrong."""
        same = ours.dtype is theirs.dtype and ours.rank == theirs.rank
        if not same or any(proves_equal(a, b) is Proof.NO for a, b in zip(ours.shape, theirs.shape, strict=True)):
            raise UnsupportedOpError(
                f"lowered to {ours}, but torch computes {theirs}", code="E_FRONTEND",
                hint="this is a fault of mlec, not of the model: please report it with this message",
            )  # fmt: skip

    # -- locations and errors ------------------------------------------------------------------------------------

    def _location(self, node: torch.fx.Node) -> Location:
        """The innermost line of the user's own code, and the path of the submodule."""
        place = place_of(node, self.exported.name)
        if place:
            return place
        known = (self.locations.get(n, UNKNOWN) for n in node.all_input_nodes)
        return next((place for place in known if place), Location(scope=self.exported.name))

    def _raise_problems(self) -> None:
        distinct = list({(e.message, str(e.loc)): e for e in self.problems}.values())
        if len(distinct) == 1:
            raise distinct[0]
        if distinct:
            lines = [f"{e.message}{f' at {e.loc}' if e.loc else ''}" for e in distinct[:_SHOWN]]
            if len(distinct) > _SHOWN:
                lines.append(f"... and {len(distinct) - _SHOWN} more")
            hints = list(dict.fromkeys(e.hint for e in distinct if e.hint))
            raise UnsupportedOpError(
                f"{len(distinct)} operations of {self.exported.name} cannot be lowered", notes=tuple(lines), loc=distinct[0].loc,
                hint="; ".join(hints[:3]) or None,
            )  # fmt: skip


def _metas(node: torch.fx.Node) -> Sequence[Any]:
    metas = node.meta.get("val")
    return metas if isinstance(metas, (tuple, list)) else (metas,)


def _op_name(node: torch.fx.Node) -> str:
    """The op as the model uses it; torch takes some apart into ops of its own (prims)."""
    target = str(node.target)
    return str(node.meta.get("original_aten") or target) if target.startswith("prims.") else target


def _unknown(node: torch.fx.Node) -> UnsupportedOpError:
    target = _op_name(node)
    if _RANDOM.match(target):
        return UnsupportedOpError(
            f"{target} is random; a compiled model is a function of its inputs",
            hint="make the random numbers an input of the model, or call model.eval() if they belong to training",
        )
    if takes_complex(node):
        return UnsupportedOpError(
            f"{target}: complex numbers are not supported there", code="E_DTYPE",
            hint="write that line with x.real and x.imag, which are real tensors, and torch.complex(re, im) after it",
        )  # fmt: skip
    return UnsupportedOpError(
        f"the op {target} is not supported",
        hint="write that line with other ops, or leave that part of the model outside",
    )


def _spec(name: str, kind: TensorType, limits: tuple[int, int] | None = None) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d) for d in kind.shape)
    return TensorSpec(name=name, dtype=kind.dtype.value, shape=shape, limits=limits)


def _position_limits(graph: Graph, value: Value, indexed: Sequence[tuple[Value, Dim]]) -> tuple[int, int] | None:
    """The positions that an input may hold where it picks entries by itself, as of an embedding: torch refuses others too.

    ``indexed``: positions that may count from the end, and the extent of the axis they are on.
    """
    same, extents = {value}, []
    for node in graph.nodes:
        if node.name in ("cast", "reshape") and node.inputs[0] in same and node.output.type.dtype.is_int:
            same.add(node.output)
        elif node.name in ("gather", "take_along_axis") and node.inputs[1] in same:
            extents.append(node.inputs[0].type.shape[node.attrs["axis"]])
        elif node.name == "one_hot" and node.inputs[0] in same:
            extents.append(node.attrs["depth"])
    static = [extent for extent in extents if isinstance(extent, int)]
    from_end = [extent for index, extent in indexed if index in same and isinstance(extent, int)]
    if not static and not from_end:
        return None
    return 0 if static else -min(from_end), min(static + from_end) - 1

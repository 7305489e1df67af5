"""From a module or an exported program to ATen ops with symbolic sizes that have names: what torch.export needs and gives."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram, default_decompositions
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mlec.errors import FrontendError, MlecError, UnsupportedModelError, UnsupportedOpError, UsageError
from mlec.frontends import fx_fourier, fx_nn, fx_ops, fx_shape  # noqa: F401  (they fill HANDLERS and COMPLEX)
from mlec.frontends.base import InputShapes, LowerOptions
from mlec.frontends.fx_complex import COMPLEX, takes_complex
from mlec.frontends.fx_context import HANDLERS, to_torch
from mlec.frontends.fx_places import place_of, place_of_call, place_of_error
from mlec.ir import Dim, SymDim, parse_dim

_LOG = logging.getLogger(__name__)

BATCH = "n"
_EXAMPLE_EXTENT = 2  # torch.export takes an extent of 0 or 1 for a constant
_EXAMPLE_SPACE = 64  # for a named axis other than the first, when there is no example: enough for any usual kernel
CHECKS = frozenset(
    f"aten.{name}"
    for name in (
        "_assert_scalar.default", "_assert_async.msg", "_assert_async.default", "_assert_tensor_metadata.default",
        "sym_constrain_range.default", "sym_constrain_range_for_size.default",
    )
)  # fmt: skip
"""Ops that compute nothing: what sizes and types have to be, which the signature says."""


@dataclass(frozen=True)
class Exported:
    """A program in ATen ops that `HANDLERS` has, as far as torch can decompose it.

    Attributes:
        program: its graph is functional: no op writes into its operands.
        name: class of the model.
        inputs: names of the user's inputs, in order.
        symbols: torch's name of each symbolic size to the dim that it is in our graph.
        stated: torch's names of the sizes whose bounds the user stated.
    """

    program: ExportedProgram
    name: str
    inputs: tuple[str, ...]
    symbols: Mapping[str, Dim]
    stated: Collection[str] = ()

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """For each of our symbols the smallest and the largest value that the model takes."""
        found: dict[str, tuple[int, int | None]] = {}
        for symbol, bounds in self.program.range_constraints.items():
            ours = self.symbols.get(str(symbol))
            if not isinstance(ours, SymDim):
                continue
            low = int(bounds.lower) if bounds.lower > 0 else 0
            high = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
            if low == _EXAMPLE_EXTENT and (high is None or str(symbol) not in self.stated):
                low = 0
            before = found.get(str(ours), (0, None))
            smallest = [h for h in (before[1], high) if h is not None]
            found[str(ours)] = (max(low, before[0]), min(smallest) if smallest else None)
        return found


def _stated_sizes(program: ExportedProgram) -> frozenset[str]:
    """Torch's names of the sizes whose bounds the user stated, as `Dim("n", min=2, max=512)`: those of inputs, where the code bounds none.

    Of the others, and of those without an upper bound, 2 is what torch.export assumes of each, and its programs do not check.
    """
    if getattr(program, "_guards_code", None):  # what the code demands of sizes
        return frozenset()
    return frozenset(
        str(size) for tensor in user_tensors(program) for size in tensor.shape if not isinstance(size, int)
    )


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Puts a module and its parts into eval mode, and each back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # its fused ops have no meaning in ATen's core
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from writing a failure, with its traceback, to stderr before raising it; TORCH_LOGS brings that back."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    loggers = [
        logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.split(".")[0] == "torch"
    ]
    levels = {handler: handler.level for logger in loggers for handler in logger.handlers}
    try:
        for handler in levels:
            handler.setLevel(logging.CRITICAL)
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


def export_model(model: torch.nn.Module | ExportedProgram, options: LowerOptions) -> Exported:
    """The model as ATen ops.

    Raises:
        UsageError: example inputs or shapes that are missing or contradict each other.
        UnsupportedModelError: a model that torch.export cannot capture, or that fixes its batch size.
    """
    if isinstance(model, ExportedProgram):
        names = _program_names(model)
        wanted = _wanted_shapes(options.input_shapes, names)
        symbols = _named_symbols(model, names, wanted, {})
        return Exported(_decomposed(model), "Program", names, symbols, _stated_sizes(model))
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "TorchScript modules are not supported", code="E_TORCHSCRIPT", hint="pass the nn.Module it was made from"
        )
    program, names, symbols = _export_module(model, options)
    exported = Exported(_decomposed(program), type(model).__name__, names, symbols)
    _tell_narrowed(exported, options)
    if model.training:  # in the report only: so is every module that was just built
        options.notes.append("the module was in training mode; dropout and batch norm were compiled as in eval()")
    return exported


def _tell_narrowed(exported: Exported, options: LowerOptions) -> None:
    """Notes the sizes that were to be free, and that torch.export found the model's code to depend on."""
    for symbol, (least, most) in exported.ranges().items():
        if least or most is not None:
            upper = "on" if most is None else f"to {most}"
            options.notes.append(
                f"{exported.name} takes {symbol} from {least} {upper} only: its code takes another way at other sizes; for these, "
                "compile it with an example of such a size"
            )
    for note in options.notes:
        _LOG.warning(note)


# -- modules ---------------------------------------------------------------------------------------------------------


def _export_module(
    module: torch.nn.Module, options: LowerOptions
) -> tuple[ExportedProgram, tuple[str, ...], Mapping[str, Dim]]:
    signature = inspect.signature(module.forward)
    wanted: dict[str, tuple[Dim, ...]]
    if options.example_inputs is None:
        wanted = _wanted_shapes(options.input_shapes, _parameter_names(signature))
        values: tuple[Any, ...] = tuple(_examples_from_shapes(module, wanted))
    else:
        values = tuple(
            pytree.tree_map(lambda leaf: example_tensor(leaf, module), options.example_inputs, is_leaf=is_array)
        )
    paths, structure = pytree.tree_flatten_with_path(named_arguments(module, values))
    # What *args takes are arguments like others: args_0, args_1.
    several = tuple(p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL)
    names = tuple(dotted(path).replace(".", "_", 1 if dotted(path[:1]) in several else 0) for path, _ in paths)
    leaves = [leaf for _, leaf in paths]
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise UsageError(
                f"example input {name!r} is of type {type(leaf).__name__}; the inputs of a compiled model are tensors",
                code="E_EXAMPLE_TYPE", hint="give that argument its value in a wrapping module's forward()",
            )  # fmt: skip
    if options.example_inputs is not None:
        wanted = _wanted_shapes(options.input_shapes, names)
    defaults = _batch_axes(names, leaves, wanted) if options.dynamic_batch else {}
    leaves, specs = _dynamic_examples(names, leaves, wanted, defaults)
    program = _run_export(module, signature, structure, leaves, specs, names)
    kept = tuple(name for name, leaf in zip(names, leaves, strict=True) if leaf is not None)
    symbols = _named_symbols(program, kept, wanted, defaults)
    inputs = dict(zip(kept, user_tensors(program), strict=True))
    options.notes.extend(
        f"the first axis of input {name!r} is fixed at {inputs[name].shape[0]}: the code of {type(module).__name__} turns that "
        "size into a constant"
        for name in defaults
        if not _is_free(inputs[name].shape[0])
    )
    return program, kept, symbols


def named_arguments(module: torch.nn.Module, values: Sequence[Any]) -> dict[str, Any]:
    """The values by the names of the parameters of ``forward``.

    Raises:
        UsageError: there are too few or too many.
    """
    signature = inspect.signature(module.forward)
    try:
        return dict(signature.bind(*values).arguments)
    except TypeError as error:
        shown = ", ".join(p.name for p in signature.parameters.values())
        raise UsageError(
            f"{len(values)} example inputs do not fit {type(module).__name__}.forward({shown}): {error}",
            code="E_EXAMPLE_COUNT",
            hint="give one for each parameter; what it takes in a dict or list is one example, in an .npz file named parameter.part",
        ) from None


def dotted(path: Sequence[Any]) -> str:
    """The way to a leaf, as ``x.mask`` or ``states.0``."""
    return ".".join(
        str(next((getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)), key)) for key in path
    )


def _parameter_names(signature: inspect.Signature) -> tuple[str, ...]:
    return tuple(signature.parameters)


def is_array(value: Any) -> bool:
    """Whether a value is an array or table of another library, not a container of tensors."""
    return isinstance(value, np.ndarray) or hasattr(value, "to_numpy")


def example_tensor(value: Any, module: torch.nn.Module) -> Any:
    """An array as a tensor of the device, and for arrays of floats of the dtype, that the module's parameters have."""
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        tensor = to_torch(value)
        if like is not None and tensor.is_floating_point():
            tensor = tensor.to(like.dtype)
    elif isinstance(value, torch.Tensor):
        tensor = value.detach()
    else:
        return value
    return tensor if like is None else tensor.to(like.device)


def _wanted_shapes(shapes: InputShapes | None, names: Sequence[str]) -> dict[str, tuple[Dim, ...]]:
    """The shapes that the user states, by input name."""
    if shapes is None:
        return {}
    if isinstance(shapes, Mapping):
        if unknown := [name for name in shapes if name not in names]:
            raise UsageError(
                f"input_shapes names {unknown[0]!r}, but the model's inputs are: {', '.join(names)}",
                code="E_INPUT_NAME",
                hint=f"for example input_shapes={{'{names[0]}': ('n', 8)}}" if names else None,
            )
        items = list(shapes.items())
    else:
        if len(shapes) > len(names):
            raise UsageError(
                f"{len(shapes)} input shapes for {len(names)} inputs ({', '.join(names)})",
                code="E_INPUT_COUNT",
                hint="give one shape for each input, or a mapping from their names",
            )
        items = list(zip(names, shapes, strict=False))
    found: dict[str, tuple[Dim, ...]] = {}
    for name, shape in items:
        try:
            found[name] = tuple(parse_dim(d) for d in shape)
        except ValueError as error:
            raise UsageError(
                f"shape of input {name!r}: {error}", code="E_INPUT_SHAPE", hint='for example ("n", 3, 224, 224)'
            ) from None
        if any(isinstance(d, SymDim) and not str(d).isidentifier() for d in found[name]):
            raise UsageError(
                f"shape of input {name!r}: an axis is a number or a plain name, got {list(shape)}",
                code="E_INPUT_SHAPE",
                hint='for example ("n", 3, 224, 224)',
            )
    return found


def _examples_from_shapes(module: torch.nn.Module, wanted: Mapping[str, tuple[Dim, ...]]) -> Iterator[torch.Tensor]:
    if not wanted:
        raise UsageError(
            f"{type(module).__name__} does not say what its inputs look like", code="E_EXAMPLE_NEEDED",
            hint='give example_inputs=(tensor, ...), or input_shapes={"x": ("n", 3, 224, 224)}',
        )  # fmt: skip
    extents: dict[str, int] = {}
    for shape in wanted.values():
        for axis, dim in enumerate(shape):
            if isinstance(dim, SymDim):
                extents.setdefault(str(dim), _EXAMPLE_SPACE + 32 * len(extents) if axis else _EXAMPLE_EXTENT)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    for shape in wanted.values():
        size = [extents[str(d)] if isinstance(d, SymDim) else d for d in shape]
        yield torch.rand(size, dtype=like.dtype, device=like.device)


def _batch_axes(
    names: Sequence[str], leaves: Sequence[Any], wanted: Mapping[str, tuple[Dim, ...]]
) -> dict[str, tuple[Dim | None, ...]]:
    """The inputs whose first axis is taken for the batch: those as long as the first input, without a stated shape."""
    tensors = {
        n: t for n, t in zip(names, leaves, strict=True) if isinstance(t, torch.Tensor) and t.ndim and n not in wanted
    }
    if not tensors:
        return {}
    batch = next(iter(tensors.values())).shape[0]
    return {name: (SymDim.named(BATCH), *[None] * (t.ndim - 1)) for name, t in tensors.items() if t.shape[0] == batch}


def _dynamic_examples(
    names: Sequence[str],
    leaves: Sequence[Any],
    wanted: Mapping[str, tuple[Dim, ...]],
    defaults: Mapping[str, tuple[Dim | None, ...]],
) -> tuple[list[Any], list[Any]]:
    """Examples in which no symbolic axis is shorter than 2, and for each which axes are symbolic."""
    examples: list[Any] = []
    specs: list[Any] = []
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is None:
            examples.append(None)
            specs.append(None)
            continue
        if any(leaf is earlier for earlier in examples):
            leaf = leaf.clone()  # each input has axes of its own
        shape = wanted.get(name) or defaults.get(name) or ()
        if name in wanted and len(wanted[name]) != leaf.ndim:
            raise UsageError(
                f"input {name!r}: the example has {leaf.ndim} axes, input_shapes states {len(wanted[name])}",
                code="E_INPUT_SHAPE",
                hint="let both have the same axes, or leave input_shapes out",
            )
        spec: dict[int, Any] = {}
        for axis, dim in enumerate(shape):
            if isinstance(dim, int) and dim != leaf.shape[axis]:
                raise UsageError(
                    f"input {name!r}, axis {axis}: the example has {leaf.shape[axis]}, input_shapes states {dim}",
                    code="E_INPUT_SHAPE",
                    hint="let both agree, or name the dim, e.g. 'n', to keep it free",
                )
            if isinstance(dim, SymDim):
                spec[axis] = ExportDim.DYNAMIC if name in wanted else ExportDim.AUTO
                if leaf.shape[axis] < _EXAMPLE_EXTENT:
                    size = list(leaf.shape)
                    size[axis] = _EXAMPLE_EXTENT
                    leaf = leaf.expand(size).clone() if leaf.shape[axis] else leaf.new_zeros(size)
        examples.append(leaf)
        specs.append(spec or None)
    return examples, specs


class _ForAnySize(TorchFunctionMode):
    """Calls of which torch would take another implementation for other sizes, so that these could not come any more."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        if func is torch.cdist and len(args) < 4:  # by a matrix product from 26 rows on; ours is the exact one
            settings["compute_mode"] = "donot_use_mm_for_euclid_dist"
        if func is torch.nn.functional.embedding_bag:
            return _bags(*args, **settings)
        if getattr(func, "__name__", "") == "_pack_padded_sequence":
            raise UnsupportedOpError(
                "pack_padded_sequence: the sizes of packed sequences depend on values", code="E_DATA_DEPENDENT", loc=place_of_call(),
                hint="give the recurrent layer the padded sequences, and pick the last output of each by its length with gather",
            )  # fmt: skip
        return func(*args, **settings)


def _bags(ids: torch.Tensor, weight: torch.Tensor, offsets: Any = None, *rest: Any, **settings: Any) -> torch.Tensor:
    """`torch.nn.functional.embedding_bag` as an embedding and a reduction: of bags in rows, (n, length), or one after another."""
    call = inspect.signature(torch.nn.functional.embedding_bag).bind(ids, weight, offsets, *rest, **settings)
    call.apply_defaults()
    given = call.arguments
    mode, padding, weights = given["mode"], given["padding_idx"], given["per_sample_weights"]
    if given["max_norm"] is not None or ids.ndim != (1 if offsets is not None else 2):
        unchanged: torch.Tensor = torch.nn.functional.embedding_bag(*call.args, **call.kwargs)
        return unchanged
    rows = torch.nn.functional.embedding(ids, weight)
    if offsets is not None:  # every row for each bag; those of other bags count for nothing
        bag = (torch.arange(ids.shape[0]) >= offsets[:, None]).sum(0) - 1
        kept = bag == torch.arange(offsets.shape[0] - given["include_last_offset"])[:, None]
        if padding is not None:
            kept = kept & (ids != padding % weight.shape[0])
        rows = rows.unsqueeze(0)
    elif padding is not None:
        kept = ids != padding % weight.shape[0]
    elif mode == "sum":
        return (rows if weights is None else rows * weights.unsqueeze(-1)).sum(1)
    else:
        return rows.mean(1) if mode == "mean" else rows.amax(1)
    mask = kept.unsqueeze(-1)
    if mode == "max":
        return torch.where(mask.any(1), rows.masked_fill(~mask, -float("inf")).amax(1), 0.0)
    factor = mask.to(rows.dtype) if weights is None else mask * weights.unsqueeze(-1)
    total: torch.Tensor = (rows * factor).sum(1)
    return total if mode == "sum" else total.div(mask.sum(1).clamp(min=1))


_FIXED_AXIS = re.compile(
    r"L((?:\[[^\]]+\])+)\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)"
)
"""What torch says of an axis that was to stay free, where the model fixes it."""


def _run_export(
    module: torch.nn.Module, signature: inspect.Signature, structure: Any, leaves: Sequence[Any], specs: Sequence[Any],
    names: Sequence[str],
) -> ExportedProgram:  # fmt: skip
    bound = inspect.BoundArguments(signature, pytree.tree_unflatten(list(leaves), structure))
    dynamic = any(specs)
    # It knows what stands for a record in dynamic_shapes.
    dynamic_shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, spec in zip(leaves, specs, strict=True):
        if spec:
            dynamic_shapes[leaf] = spec
    try:
        with evaluating(module), _quiet():
            shapes = dynamic_shapes.dynamic_shapes(module, bound.args, bound.kwargs) if dynamic else None
            with _ForAnySize():
                return torch.export.export(module, bound.args, bound.kwargs, dynamic_shapes=shapes, strict=False)
    except MlecError:
        raise
    except Exception as error:
        # Whatever a model's forward() raises comes through here.
        reason = str(error).strip().split("\n\n")[0]
        if fixed := _FIXED_AXIS.search(reason):
            where, axis, extent = fixed.groups()
            name = ".".join(re.findall(r"\['?(\w+)'?\]", where))
            raise UnsupportedModelError(
                f"input {name!r}, axis {axis}: input_shapes names this axis, and torch captures the model for an extent of {extent} alone",
                code="E_EXPORT",
                hint=f"write {extent} in input_shapes in the place of the name, and compile a model for each extent: layers such as LSTM "
                "and GRU are captured step by step",
                loc=type(module).__name__,
            ) from error
        hint = "torch.export must be able to capture the model: no Python control flow on tensor values, no data-dependent shapes"
        if dynamic:
            first = next(n for n, s in zip(names, specs, strict=True) if s)
            hint += (
                "; if the model needs a fixed batch size, pass dynamic_batch=False; if the batch is not the first axis, "
                f'say which it is: input_shapes={{"{first}": (...)}} with the name "n" on that axis'
            )
        raise UnsupportedModelError(
            f"{type(module).__name__} could not be captured by torch.export: {type(error).__name__}: {reason}",
            code="E_EXPORT",
            hint=hint,
            loc=place_of_error(error, type(module).__name__),
        ) from error


# -- programs --------------------------------------------------------------------------------------------------------


def _named_symbols(
    program: ExportedProgram,
    names: Sequence[str],
    wanted: Mapping[str, tuple[Dim, ...]],
    defaults: Mapping[str, tuple[Dim | None, ...]],
) -> Mapping[str, Dim]:
    """What each of torch's symbols is called (or fixed to) by the stated shapes, by ``n`` for the batch, or by a new name."""
    inputs = dict(zip(names, user_tensors(program), strict=True))
    symbols: dict[str, Dim] = {}

    def bind(size: Any, dim: Dim) -> bool:
        """Whether a size can be what a shape states."""
        if isinstance(size, int):
            return isinstance(dim, int) and size == dim
        expression = size.node.expr
        if not expression.is_Symbol:
            return False
        return symbols.setdefault(str(expression), dim) == dim

    for name, shape in wanted.items():
        sizes = inputs[name].shape
        if len(shape) != len(sizes) or not all(bind(size, dim) for size, dim in zip(sizes, shape, strict=True)):
            raise UsageError(
                f"input {name!r}: the model takes {list(sizes)}, input_shapes states {list(shape)}", code="E_INPUT_SHAPE",
                hint="a program that is exported already keeps the fixed sizes of its export; export it with dynamic_shapes",
            )  # fmt: skip
    batches = 0
    for name, default in defaults.items():
        size, dim = inputs[name].shape[0], default[0]
        assert dim is not None
        if not isinstance(size, int) and size.node.expr.is_Symbol:
            symbols.setdefault(str(size.node.expr), dim)
            batches += 1
    if defaults and not batches:
        name = next(iter(defaults))
        raise UnsupportedModelError(
            f"the model works for one size of the first axis of {name!r} only ({inputs[name].shape[0]}): "
            "its code turns that size into a constant", code="E_DYNAMIC_BATCH",
            hint="pass dynamic_batch=False to compile for that size; if the batch is another axis, name it: "
            f'input_shapes={{"{name}": {_example_shape(inputs[name])}}}',
        )  # fmt: skip
    taken = {str(dim) for dim in symbols.values()}
    for tensor in inputs.values():
        for axis, size in enumerate(tensor.shape):
            free_symbols: list[Any] = [] if isinstance(size, int) else sorted(size.node.expr.free_symbols, key=str)
            for symbol in free_symbols:
                if str(symbol) not in symbols:
                    free = (
                        BATCH
                        if axis == 0 and BATCH not in taken
                        else next(f"d{i}" for i in range(1, 1000) if f"d{i}" not in taken)
                    )
                    taken.add(free)
                    symbols[str(symbol)] = SymDim.named(free)
    return symbols


def _is_free(size: Any) -> bool:
    """Whether a size is symbolic still; one that the code turned into a constant is so in its expression only."""
    return not isinstance(size, int) and bool(size.node.expr.free_symbols)


def _example_shape(tensor: torch.Tensor) -> str:
    shown = [str(s) for s in tensor.shape]
    if len(shown) > 1:
        shown[1] = f'"{BATCH}"'
    return f"({', '.join(shown)},)"


def _program_names(program: ExportedProgram) -> tuple[str, ...]:
    """The names that torch gave the user's inputs; of nested ones the way to each, as for a module."""
    plain = tuple(str(name) for name in program.graph_signature.user_inputs)
    structure = program.call_spec.in_spec
    given = getattr(program.module_call_graph[0].signature, "forward_arg_names", None)
    if structure is None or given is None:
        return plain
    positional, named = pytree.tree_unflatten(list(range(structure.num_leaves)), structure)
    paths, _ = pytree.tree_flatten_with_path({**dict(zip(given, positional, strict=False)), **named})
    names = tuple(dotted(path) for path, _ in paths)
    return names if len(names) == len(plain) and any("." in name for name in names) else plain


def user_tensors(program: ExportedProgram) -> list[torch.Tensor]:
    """What torch.export traced the user's inputs with."""
    names = set(program.graph_signature.user_inputs)
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT and isinstance(
            spec.arg, torch.export.graph_signature.ConstantArgument
        ):
            if spec.arg.value is None:
                continue
            raise UnsupportedModelError(
                f"input {spec.arg.name!r} is the constant {spec.arg.value!r}; the inputs of a compiled model are tensors",
                hint="export a wrapping module whose forward() supplies that value",
            )
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                raise UnsupportedModelError(
                    f"input {node.name!r} is of type {type(value).__name__}; the inputs of a compiled model are tensors",
                    hint="export a wrapping module that makes that value from a tensor's shape",
                )
            found.append(value)
    return found


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program in ops that we lower, and in core ATen ops for the rest."""
    calls = [node for node in program.graph.nodes if node.op == "call_function" and not _is_about_sizes(node)]
    # What is lowered of real tensors only, torch may take apart where it is of complex ones.
    real_only = {str(node.target) for node in calls if str(node.target) not in COMPLEX and takes_complex(node)}
    lowered = (HANDLERS.keys() | COMPLEX.keys()) - real_only
    if all(str(node.target) in lowered for node in calls):
        return program  # torch would trace it once more, which takes as long as all else that is done here
    _keep_symbols(program)
    # Core ATen ops are more than we lower: of those torch has other decompositions.
    known = {**torch._decomp.decomposition_table, **default_decompositions()}
    table = {op: how for op, how in known.items() if str(op) not in lowered}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result: ExportedProgram = program.run_decompositions(table)
            return result
        except Exception as error:
            _refuse_complex(program)
            raise FrontendError(
                f"torch could not decompose the exported program: {type(error).__name__}: {error}",
                code="E_EXPORT",
                hint="check that the exported program runs in this version of torch: program.module()(*inputs)",
            ) from error


def _is_about_sizes(node: torch.fx.Node) -> bool:
    """Whether a call is one that needs no handler: it picks a result, computes a number from sizes, or checks one."""
    number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    return number or node.target is operator.getitem or str(node.target) in CHECKS


def _keep_symbols(program: ExportedProgram) -> None:
    """Leaves only the ranges of symbols: a file restores those of expressions (`2*n`) as well, on which torch's decomposition fails."""
    for tensor in user_tensors(program):
        for size in tensor.shape:
            if not isinstance(size, int):
                ranges = size.node.shape_env.var_to_range
                for expression in [key for key in ranges if not key.is_Symbol]:
                    del ranges[expression]
                return


def _refuse_complex(program: ExportedProgram) -> None:
    """Names the first op that computes with complex numbers: some of these torch cannot decompose."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype.is_complex:
            raise UnsupportedOpError(
                f"{node.target}: complex numbers are not supported", code="E_DTYPE", loc=place_of(node, "Program"),
                hint="write that line with x.real and x.imag, which are real tensors, and torch.complex(re, im) after it",
            )  # fmt: skip

"""The reference interpreter: what a graph means, on numpy arrays. It walks as the verifier does, over values instead of types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlec.errors import InputError
from mlec.ir.dim import Dim, evaluate, symbols_of
from mlec.ir.graph import Graph, Value, constant_array
from mlec.ir.op import Array
from mlec.ir.types import TensorType
from mlec.wording import plural


def run_graph(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    """The graph's outputs for these inputs.

    Raises:
        InputError: when an input does not fit its type.
    """
    values = trace_graph(graph, inputs)
    return [values[v] for v in graph.outputs]


def trace_graph(graph: Graph, inputs: Sequence[Array], binding: Mapping[str, int] | None = None) -> dict[Value, Array]:
    """Every value of the graph for these inputs. ``binding``: symbols known from outside (a body's caller)."""
    types = [v.type for v in graph.inputs]
    bound = bind_symbols(types, [np.shape(a) for a in inputs], [v.hint for v in graph.inputs], binding)
    values: dict[Value, Array] = {}
    for value, array in zip(graph.inputs, inputs, strict=True):
        values[value] = np.asarray(array, order="C")  # as every result is, see `OpDef.evaluate`
        if values[value].dtype != value.type.dtype.numpy:
            raise InputError(
                f"input {value.hint!r} takes {value.type.dtype.numpy}, got {values[value].dtype}",
                code="E_INPUT_DTYPE",
                hint="convert it with x.astype",
            )
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node.is_constant:
                results: tuple[Array, ...] = (constant_array(node, graph.constants),)
            else:
                results = node.op.evaluate([values[v] for v in node.inputs], node.attrs, bound)
            values.update(zip(node.outputs, results, strict=True))
    return values


def bind_symbols(
    types: Sequence[TensorType],
    shapes: Sequence[tuple[int, ...]],
    names: Sequence[str] = (),
    known: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Values of the symbols that make the types fit the shapes.

    Raises:
        InputError: naming the input, the axis, what was expected and what came.
    """
    if len(types) != len(shapes):
        raise InputError(
            f"expected {plural(len(types), 'input')}, got {len(shapes)}",
            code="E_INPUT_COUNT",
            hint="pass one array for each input of the graph, in order",
        )
    binding = dict(known or {})
    labels = [*names, *[""] * (len(types) - len(names))]
    labels = [label or f"#{i}" for i, label in enumerate(labels)]
    derived: list[tuple[str, int, Dim, int]] = []
    for label, kind, shape in zip(labels, types, shapes, strict=True):
        if len(shape) != kind.rank:
            raise InputError(
                f"input {label} takes shape {_shown(kind)}, got {list(shape)}",
                code="E_INPUT_SHAPE",
                hint="pass an array of this many axes",
            )
        for axis, (dim, extent) in enumerate(zip(kind.shape, shape, strict=True)):
            if not isinstance(dim, int) and str(dim) in symbols_of(dim):
                dim = binding.setdefault(str(dim), extent)
            derived.append((label, axis, dim, extent))
    for _, _, dim, extent in derived:
        _solve(dim, extent, binding)
    for label, axis, dim, extent in derived:
        found = evaluate(dim, binding) if symbols_of(dim) <= binding.keys() else None
        if found != extent:
            wanted = dim if isinstance(dim, int) or found is None else f"{dim} = {found}"
            raise InputError(
                f"input {label}, axis {axis}: expected {wanted}, got {extent}",
                code="E_INPUT_SHAPE",
                hint="a dim has one value in all inputs, which their extents tell",
            )
    return binding


def _solve(dim: Dim, extent: int, binding: dict[str, int]) -> None:
    """Binds the one symbol of ``dim`` that has no value yet, where its extent tells it: 4*n = 8."""
    unknown = symbols_of(dim) - binding.keys()
    if len(unknown) != 1:
        return
    (name,) = unknown
    least, next_one = (evaluate(dim, {**binding, name: value}) for value in (0, 1))
    if next_one != least:
        value = (extent - least) // (next_one - least)
        if value >= 0 and evaluate(dim, {**binding, name: value}) == extent:
            binding[name] = value


def _shown(kind: TensorType) -> str:
    return f"[{', '.join(map(str, kind.shape))}]"

"""The Relax module of a lowered graph: how programs for CUDA devices call their kernels."""

from __future__ import annotations

from typing import Any

from mlec.backends.tvm.compat import IRModule, T, prim_func, relax
from mlec.backends.tvm.kernels.vector import int64
from mlec.backends.tvm.lowering import Lowered, Tensor, ViewStep
from mlec.backends.tvm.region import Dims


def relax_module(lowered: Lowered) -> IRModule:
    """``main``, which takes the graph's inputs and then the constants, and the kernels that it calls.

    Calls that share another one's code call a symbol of their own, which the object files must define.
    """
    dims = Dims()

    def type_of(x: Tensor) -> Any:
        return relax.TensorType([int64(dims(d)) for d in x.shape], x.dtype)

    variables: dict[Tensor, Any] = {}
    for i, x in enumerate((*lowered.inputs, *lowered.parameters.values())):
        variables[x] = relax.Var(f"p{i}", type_of(x))
    parameters = list(variables.values())
    builder = relax.BlockBuilder()
    if not lowered.kernels:  # without any machine code, TVM would write C
        builder.add_func(_nothing(), "nothing")
    with builder.function("main", parameters, pure=not lowered.aliases):
        for step in lowered.steps:
            if isinstance(step, ViewStep):
                shape = relax.ShapeExpr([int64(dims(d)) for d in step.result.shape])
                variables[step.result] = builder.emit(relax.op.reshape(variables[step.source], shape))
                continue
            arguments = [*(variables[x] for x in step.operands), *(int64(dims(d)) for d in step.extents)]
            types = [type_of(x) for x in step.results]
            result = types[0] if len(types) == 1 else types
            if step.function is not None:
                call = relax.call_tir(builder.add_func(step.function, step.symbol), relax.Tuple(arguments), result)
            else:
                call = relax.call_dps_packed(step.symbol, relax.Tuple(arguments), result)
            made = builder.emit(call)
            for i, x in enumerate(step.results):
                variables[x] = made if len(types) == 1 else builder.emit(relax.TupleGetItem(made, i))
        results = [variables[x] for x in lowered.outputs]
        builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results))
    return builder.get()


def _nothing() -> Any:
    with prim_func("nothing") as kernel:
        T.evaluate(0)
    return kernel.func

"""Compiling and calling kernel templates on numpy arrays."""

import numpy as np

from mlec.backends.tvm.compat import IRModule, tvm
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.windows import Geometry

HOST = TargetInfo.host()


def compile_kernel(func, target=HOST):
    """The compiled program: call it with numpy inputs and the output's shape and dtype."""
    name = str(func.attrs["global_symbol"])
    entry = compile_for_cpu(IRModule({name: func}), target.tvm_target())[name]

    def run(*inputs, out, dtype="float32"):
        outputs = [tvm.runtime.tensor(np.full(shape, 99, dtype)) for shape in (out if isinstance(out, list) else [out])]
        entry(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs), *outputs)
        results = [o.numpy() for o in outputs]
        return results if isinstance(out, list) else results[0]

    return run


def geometry(strides, pads=(), dilations=()):
    """How windows lie; ``pads`` lists all befores, then all afters."""
    return Geometry.of({"strides": strides, "pads": pads, "dilations": dilations}, len(strides))

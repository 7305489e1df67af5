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


def same_by_threads(run, *inputs, out, dtype="float32"):
    """What a compiled program returns, which is the same bits by one thread and by two to four."""
    configure = tvm.get_global_func("runtime.config_threadpool")
    try:
        results = []
        for threads in (1, 2, 3, 4):
            configure(1, threads)
            results.append(run(*inputs, out=out, dtype=dtype))
    finally:
        configure(1, 0)
    one, *others = results
    for threads, other in enumerate(others, 2):
        assert other.tobytes() == one.tobytes(), f"{threads} threads"
    return one


def geometry(strides, pads=(), dilations=()):
    """How windows lie; ``pads`` lists all befores, then all afters."""
    return Geometry.of({"strides": strides, "pads": pads, "dilations": dilations}, len(strides))

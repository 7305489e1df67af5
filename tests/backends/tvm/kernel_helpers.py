"""Compiling and calling kernel templates on numpy arrays."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mlec.backends.tvm.compat import IRModule, tvm
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.windows import Geometry
from mlec.runtime.library import use_threads

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


def by_threads(call):
    """What ``call(threads)`` returns for one to four threads, by that number.

    On an OS thread of its own, whose pool is made for four: a pool stays as large as its first use made it.
    """

    def every():
        results = {}
        for threads in (4, 3, 2, 1):
            use_threads(threads)
            assert threads == 1 or tvm.get_global_func("runtime.NumThreads")() == threads
            results[threads] = call(threads)
        return results

    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(every).result()


def same_by_threads(run, *inputs, out, dtype="float32"):
    """What a compiled program returns, which is the same bits by one thread and by two to four."""
    results = by_threads(lambda threads: run(*inputs, out=out, dtype=dtype))
    one = results.pop(1)
    for threads, other in results.items():
        assert other.tobytes() == one.tobytes(), f"{threads} threads"
    return one


def geometry(strides, pads=(), dilations=()):
    """How windows lie; ``pads`` lists all befores, then all afters."""
    return Geometry.of({"strides": strides, "pads": pads, "dilations": dilations}, len(strides))

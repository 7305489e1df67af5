"""Compiling and calling kernel templates on numpy arrays."""

import numpy as np

from mlec.backends.tvm.compat import tvm
from mlec.backends.tvm.target import TargetInfo

HOST = TargetInfo.host()


def compile_kernel(func):
    """The compiled program: call it with numpy inputs and the output's shape and dtype."""
    module = tvm.compile(func, HOST.tvm_target())
    entry = module[func.attrs["global_symbol"]]

    def run(*inputs, out, dtype="float32"):
        outputs = [tvm.runtime.tensor(np.full(shape, 99, dtype)) for shape in (out if isinstance(out, list) else [out])]
        entry(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs), *outputs)
        results = [o.numpy() for o in outputs]
        return results if isinstance(out, list) else results[0]

    return run

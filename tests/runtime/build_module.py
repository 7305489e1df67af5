"""Compiles small kernels to pickled object files; run as a script, so that tests need not import TVM.

Writes for each entry of `programs.SEQUENCES` the object files of a program that makes its calls.
"""

import pickle
import sys
from pathlib import Path

from mlec.backends.tvm.compat import Target, tvm
from mlec.backends.tvm.driver import driver
from mlec.backends.tvm.objects import to_object
from mlec.backends.tvm.target import TargetInfo

sys.path.insert(0, str(Path(__file__).parent))
from programs import SEQUENCES
from tvm.script import ir as I  # noqa: N812
from tvm.script import tirx as T  # noqa: N812

# TVMScript has its own rules for names and types.
# ruff: noqa: N805
# mypy: ignore-errors


@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def matmul(x: T.handle, w: T.Buffer((8, 4), "float32"), y: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "matmul"})
        n = T.int64()
        X = T.match_buffer(x, (n, 8), "float32", align=8)
        Y = T.match_buffer(y, (n, 4), "float32", align=8)
        for i, j, k in T.grid(n, 4, 8):
            with T.sblock("matmul"):
                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                with T.init():
                    Y[vi, vj] = T.float32(0)
                Y[vi, vj] = Y[vi, vj] + X[vi, vk] * w[vk, vj]

    @T.prim_func(s_tir=True)
    def relu(x: T.handle, y: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "relu"})
        n = T.int64()
        X = T.match_buffer(x, (n, 4), "float32", align=8)
        Y = T.match_buffer(y, (n, 4), "float32", align=8)
        for i in T.parallel(n):
            for j in T.vectorized(4):
                with T.sblock("relu"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = T.max(X[vi, vj], T.float32(0))

    @T.prim_func(s_tir=True)
    def scale(x: T.handle, k: T.int64, y: T.handle):
        """Multiplies by k, which must not be 13."""
        T.func_attr({"tirx.noalias": True, "global_symbol": "scale"})
        n = T.int64()
        X = T.match_buffer(x, (n,), "float32", align=8)
        Y = T.match_buffer(y, (n,), "float32", align=8)
        assert k != T.int64(13), "thirteen"
        for i in T.serial(n):
            Y[i] = X[i] * T.cast(k, "float32")

    @T.prim_func(s_tir=True)
    def who(y: T.Buffer((64,), "int64")):
        """The thread that computes each element."""
        T.func_attr({"tirx.noalias": True, "global_symbol": "who"})
        for i in T.parallel(64):
            y[i] = T.call_extern("int64", "pthread_self")


if __name__ == "__main__":
    target = Target({"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 2})
    kernels = to_object(tvm.tirx.build(Module, target))
    triple = TargetInfo.host().triple
    objects = {name: (kernels, driver(sequence.codes, triple)) for name, sequence in SEQUENCES.items()}
    Path(sys.argv[1]).write_bytes(pickle.dumps(objects))

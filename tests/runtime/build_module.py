"""Compiles a small Relax module to pickled object files; run as a script, so that tests need not import TVM."""

import pickle
import sys
from pathlib import Path

import tvm
from tvm.script import ir as I  # noqa: N812
from tvm.script import relax as R  # noqa: N812
from tvm.script import tirx as T  # noqa: N812

from mlec.backends.tvm.objects import to_objects

# TVMScript has its own rules for names and types.
# ruff: noqa: B007, N805
# mypy: ignore-errors


@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def matmul(x: T.handle, w: T.Buffer((8, 4), "float32"), y: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "matmul"})
        n = T.int64()
        X = T.match_buffer(x, (n, 8), "float32")
        Y = T.match_buffer(y, (n, 4), "float32")
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
        X = T.match_buffer(x, (n, 4), "float32")
        Y = T.match_buffer(y, (n, 4), "float32")
        for i in T.parallel(n):
            for j in T.vectorized(4):
                with T.sblock("relu"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = T.max(X[vi, vj], T.float32(0))

    @T.prim_func(s_tir=True)
    def grind(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        """About 0.1 s of dependent arithmetic, split over the threads."""
        T.func_attr({"tirx.noalias": True, "global_symbol": "grind"})
        for i in T.parallel(64):
            y[i] = x[i]
            for k in range(400000):
                y[i] = y[i] * T.float32(0.999) + T.float32(0.5)

    @R.function
    def main(x: R.Tensor(("n", 8), "float32"), w: R.Tensor((8, 4), "float32")):
        n = T.int64()
        cls = Module
        with R.dataflow():
            h = R.call_tir(cls.matmul, (x, w), out_ty=R.Tensor((n, 4), "float32"))
            y = R.call_tir(cls.relu, (h,), out_ty=R.Tensor((n, 4), "float32"))
            out = (h, y)
            R.output(out)
        return out

    @R.function
    def aliases(x: R.Tensor(("n", 8), "float32"), w: R.Tensor((8, 4), "float32")):
        n = T.int64()
        cls = Module
        with R.dataflow():
            h = R.call_tir(cls.matmul, (x, w), out_ty=R.Tensor((n, 4), "float32"))
            out = (x, w, h, h)
            R.output(out)
        return out

    @R.function
    def heavy(x: R.Tensor((64,), "float32")):
        cls = Module
        with R.dataflow():
            y = R.call_tir(cls.grind, (x,), out_ty=R.Tensor((64,), "float32"))
            R.output(y)
        return y

    @R.function
    def bits(x: R.Tensor(("n",), "bfloat16"), b: R.Tensor(("n",), "bool")):
        return (x, b)


if __name__ == "__main__":
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 2})
    Path(sys.argv[1]).write_bytes(pickle.dumps(to_objects(tvm.compile(Module, target))))

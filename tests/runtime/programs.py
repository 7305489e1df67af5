"""Call sequences of the kernels in build_module.py."""

from mlec.runtime.program import Buffer, Call, CallSequence

X, W, H = Buffer("f32", ("n", 8)), Buffer("f32", (8, 4)), Buffer("f32", ("n", 4))
LINE = Buffer("f32", ("n",))
SEQUENCES = {
    # h = x @ w and max(h, 0)
    "main": CallSequence(1, 1, (X, W, H, H), (Call("matmul", (0, 1), (2,)), Call("relu", (2,), (3,))), (2, 3)),
    # an input, a constant, one value twice, and that value with another shape
    "aliases": CallSequence(
        1, 1, (X, W, H, Buffer("f32", ("4*n",), 2)), (Call("matmul", (0, 1), (2,)),), (0, 1, 2, 2, 3)
    ),
    # seven calls in a row: x * n^7
    "chain": CallSequence(
        1, 0, (LINE,) * 8, tuple(Call("scale", (i,), (i + 1,), ("n",)) for i in range(7)), (7,)
    ),
    "threads": CallSequence(0, 0, (Buffer("i64", (64,)),), (Call("who", (), (0,)),), (0,)),
    "bits": CallSequence(2, 0, (Buffer("bf16", ("n",)), Buffer("bool", ("n",))), (), (0, 1)),
}  # fmt: skip

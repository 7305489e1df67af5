"""What templates are made of, and the template that the documentation shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import BufferSpec
from mlec.backends.tvm.kernels.tile import flat_view, parameter
from mlec.ir import GraphBuilder, run_graph, tensor
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel

PAGE = Path(__file__).parents[3] / "docs" / "add-a-kernel.md"


@pytest.mark.parametrize("length", [1, 5, 16, 203])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_template_of_the_page(length: int, dtype: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (code,) = (block for block in blocks if "def unit_lines(" in block)
    space: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), space)
    run = compile_kernel(space["unit_lines"]((tirx.Var("n", "int64"), 3, length), dtype, HOST))
    for batch in (0, 1, 2, 5, 70):
        x = np.random.default_rng(batch).normal(size=(batch, 3, length)).astype(dtype)
        wanted = x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(run(x, out=x.shape, dtype=dtype), wanted, rtol=20 * np.finfo(dtype).eps)


def late() -> None:
    with prim_func("late"):
        x = parameter("x", BufferSpec((4,), "float32"))
        flat_view(x, (2, 2), "float32")
        parameter("y", BufferSpec((4,), "float32"))


def test_a_parameter_that_comes_too_late_says_so() -> None:
    with pytest.raises(ValueError, match="'y' is declared too late: first all parameters"):
        late()


def test_an_extent_that_divides_may_be_none_where_there_is_too_little_for_threads() -> None:
    b = GraphBuilder("rows")
    x, y = b.input("x", tensor("f32", ("n", 900, 4))), b.input("y", tensor("f32", (3, "n", 120_000)))
    edge = b.constant(np.ones((3, 1, 120_000), np.float32))
    graph = b.finish([b("transpose", x, perm=(2, 1, 0)), b("add", y, edge)])
    module = TVMBackend().compile(graph, Target())
    executable = Executable(module.program, module.objects, module.constants)
    for n in (0, 1, 17):
        arrays = [np.ones((n, 900, 4), np.float32).cumsum(1), np.ones((3, n, 120_000), np.float32).cumsum(2)]
        for got, wanted in zip(executable.run(arrays), run_graph(graph, arrays), strict=True):
            np.testing.assert_array_equal(got, wanted)

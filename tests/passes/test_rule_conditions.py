"""Graphs beside what rules look for: they keep their results, however close they come to a pattern."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import GraphBuilder, parse_graph, run_graph, tensor
from mlec.pipeline import PassPipeline

RNG = np.random.default_rng(0)
CONSTANTS = {
    "square": RNG.normal(size=(4, 4)).astype(np.float32),
    "ones": np.ones((3, 1, 1), np.float32),
    "counts": np.arange(20).reshape(5, 4),
    "large": np.array([2**53 + 2, 5, 7, 9]),
}

NEAR = {
    "one over a root of 16 bits, which is rounded": (
        "canonicalize", "%x: f16[n, 99]", """%a = abs(%x) : f16[n, 99] %r = sqrt(%a) : f16[n, 99]
        %one = constant {value = 1.0} : f16[] %y = div(%one, %r) : f16[n, 99]""", ["abs", "sqrt", "div"],
    ),
    "silu of 16 bits": (
        "canonicalize", "%x: f16[n, 99]", "%s = sigmoid(%x) : f16[n, 99] %y = mul(%x, %s) : f16[n, 99]", ["sigmoid", "mul"],
    ),
    "nothing, cut behind every second element": (
        "canonicalize", "%x: f32[5]", """%a = slice(%x) {axis = 0, stop = 5, step = 2} : f32[3]
        %y = slice(%a) {axis = 0, start = 3, stop = 3} : f32[0]""", ["slice", "slice"],
    ),
    "a further axis of extent 1": (
        "canonicalize", "%x: f32[2, 5]", """%a = reshape(%x) {shape = [10]} : f32[10] %b = relu(%a) : f32[10]
        %y = reshape(%b) {shape = [1, 2, 5]} : f32[1, 2, 5]""", ["reshape", "relu"],
    ),
    "a product with a matrix that is no constant": (
        "canonicalize", "%x: f32[2, 3, 8], %w: f32[8, n]", """%a = reshape(%x) {shape = [6, 8]} : f32[6, 8]
        %p = matmul(%a, %w) : f32[6, n] %b = relu(%p) : f32[6, n] %y = reshape(%b) {shape = [2, 3, n]} : f32[2, 3, n]""",
        ["reshape", "matmul", "relu", "reshape"],
    ),
    "a product that is not turned": (
        "recognize", "%x: f32[4, 4]", """%w = constant {value = @square} : f32[4, 4] %t = transpose(%x) {perm = [0, 1]} : f32[4, 4]
        %p = matmul(%w, %t) : f32[4, 4] %y = transpose(%p) {perm = [0, 1]} : f32[4, 4]""", ["transpose", "matmul", "transpose"],
    ),
    "softmax times an array of ones": (
        "recognize", "%x: f32[4, 5]", """%m = max(%x) {axes = [1], keepdims = true} : f32[4, 1] %s = sub(%x, %m) : f32[4, 5]
        %e = exp(%s) : f32[4, 5] %t = sum(%e) {axes = [1], keepdims = true} : f32[4, 1]
        %ones = constant {value = @ones} : f32[3, 1, 1] %i = div(%ones, %t) : f32[3, 4, 1] %y = mul(%e, %i) : f32[3, 4, 5]""",
        ["max", "sub", "exp", "sum", "div", "mul"],
    ),
    "integers that are scaled before a product": (
        "fold-scales", "%x: i64[n, 5]", """%s = constant {value = 3} : i64[] %a = mul(%x, %s) : i64[n, 5]
        %w = constant {value = @counts} : i64[5, 4] %y = matmul(%a, %w) : i64[n, 4]""", ["mul", "matmul"],
    ),
    "integers that are scaled behind a product": (
        "fold-scales", "%x: i64[n, 5]", """%s = constant {value = 3} : i64[] %w = constant {value = @counts} : i64[5, 4]
        %a = matmul(%x, %w) : i64[n, 4] %y = mul(%a, %s) : i64[n, 4]""", ["matmul", "mul"],
    ),
    "integers that no float64 holds": (
        "fold-scales", "%x: i64[n, 5]", """%one = constant {value = 1} : i64[] %s = constant {value = @large} : i64[4]
        %w = constant {value = @counts} : i64[5, 4] %a = matmul(%x, %w) : i64[n, 4] %b = add(%a, %s) : i64[n, 4]
        %y = add(%b, %one) : i64[n, 4]""", ["matmul", "add", "add"],
    ),
    "a difference of squares of integers": (
        "stability", "%x: i32[n, 1]", """%q = mul(%x, %x) : i32[n, 1] %a = sum(%q) {axes = [1]} : i32[n]
        %s = sum(%x) {axes = [1]} : i32[n] %p = mul(%s, %s) : i32[n] %y = sub(%a, %p) : i32[n]""",
        ["mul", "sum", "sum", "mul", "sub"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_near_a_pattern(name: str) -> None:
    passes, inputs, body, left = NEAR[name]
    kind = body.rpartition(" : ")[2]
    graph = parse_graph(f"graph @g({inputs}) -> ({kind}) {{ {body} return %y }}", CONSTANTS)
    after, _ = PassPipeline.parse(passes, verify="numeric").run(graph)
    assert [node.name for node in after.compute_nodes] == left


def test_casts_of_integers_through_floats_keep_what_is_out_of_range() -> None:
    """300 is 44 in 8 bits, but as a float it may be anything there."""
    for middle, end, left in (("f32", "i8", 2), ("f32", "i32", 1), ("i64", "i8", 1), ("f32", "bool", 1)):
        b = GraphBuilder("casts")
        cast = b("cast", b("cast", b.input("x", tensor("i16", ("n",))), dtype=middle), dtype=end)
        after, _ = PassPipeline.parse("canonicalize", verify="numeric").run(b.finish([cast]))
        assert len(after.nodes) == left, (middle, end)


@pytest.mark.parametrize("length", [60, 2000])
def test_a_reshape_meets_another_one_however_far_away(length: int) -> None:
    b = GraphBuilder("chain")
    value = b("reshape", b.input("x", tensor("f32", (2, 5))), shape=(10,))
    for i in range(length):
        value = b(("sin", "tanh")[i % 2], value)
    graph = b.finish([b("reshape", value, shape=(2, 5))])
    after, _ = PassPipeline.parse("canonicalize").run(graph)
    assert [node.name for node in after.nodes] == ["sin", "tanh"] * (length // 2)
    x = RNG.normal(size=(2, 5)).astype(np.float32)
    np.testing.assert_array_equal(run_graph(after, [x])[0], run_graph(graph, [x])[0])


@pytest.mark.parametrize("end", [-np.inf, np.inf])
def test_the_stable_sum_of_exponentials_of_equal_infinities(end: float) -> None:
    text = """graph @g(%x: f32[n], %y: f32[n]) -> (f32[n]) { %a = exp(%x) : f32[n] %b = exp(%y) : f32[n]
      %s = add(%a, %b) : f32[n] %z = log(%s) : f32[n] return %z }"""
    after, _ = PassPipeline.parse("stability{stabilize = true}").run(parse_graph(text))
    assert "log1p" in [node.name for node in after.nodes]
    x = np.array([end, 1.0], np.float32)
    np.testing.assert_allclose(run_graph(after, [x, x])[0], [end, 1 + np.log(2)], rtol=1e-6)


def test_one_minus_a_number_without_sign_stays() -> None:
    text = """graph @g(%x: u8[n]) -> (f32[n]) { %one = constant {value = 1} : u8[] %a = sub(%one, %x) : u8[n]
      %c = cast(%a) {dtype = f32} : f32[n] %y = log(%c) : f32[n] return %y }"""
    graph = parse_graph(text)
    after, _ = PassPipeline.parse("stability{stabilize = true}").run(graph)
    x = np.array([0, 1, 2], np.uint8)
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(run_graph(after, [x])[0], run_graph(graph, [x])[0])

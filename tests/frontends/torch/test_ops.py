"""Each ATen op that the tables lower, against torch itself: special values, a batch of one and of three, several dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mlec.errors import UnsupportedOpError
from mlec.ir import Graph, run_graph
from tests.frontends.torch.common import FRONTEND, Function, assert_same, compare, lower

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 100.0, -100.0, 1e-6, 3.0]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def ints(*shape: int, low: int = -5, high: int = 6, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def special(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([SPECIAL, SPECIAL[::-1], [0.1 * i for i in range(len(SPECIAL))]], dtype=dtype)


def check(function: Callable[..., Any], *inputs: torch.Tensor, rtol: float = 2e-6, batches: bool = True) -> None:
    """Lowers with a symbolic first axis, and compares on all rows and on the first row of every input that has it."""
    graph = lower(function, *inputs, dynamic_batch=batches)
    run = FRONTEND.oracle(Function(function, len(inputs)))["run"]
    compare(graph, run, inputs, rtol)
    if batches:
        compare(graph, run, first_rows(inputs), rtol)


def first_rows(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t[:1] if t.ndim and t.shape[0] == inputs[0].shape[0] else t for t in inputs]


class Together:
    """Functions of the same inputs, lowered as one graph: one capture by torch serves a whole table of them."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], *inputs: torch.Tensor) -> None:
        self.functions = dict(functions)
        self.inputs = inputs

    @cached_property
    def graph(self) -> Graph:
        return lower(lambda *args: {name: function(*args) for name, function in self.functions.items()}, *self.inputs)

    @cached_property
    def outputs(self) -> list[list[Any]]:
        batches = (self.inputs, first_rows(self.inputs))
        return [
            run_graph(self.graph, FRONTEND.oracle(Function(lambda *args: args, len(batch)))["run"](batch))
            for batch in batches
        ]

    def check(self, name: str, rtol: float = 2e-6) -> None:
        """Compares one function's results at both batch sizes."""
        names = [spec.name for spec in self.graph.signature.outputs]
        own = [i for i, output in enumerate(names) if output == name or re.fullmatch(rf"{name}(\.\w+)+", output)]
        run = FRONTEND.oracle(Function(self.functions[name], len(self.inputs)))["run"]
        for batch, outputs in zip((self.inputs, first_rows(self.inputs)), self.outputs, strict=True):
            assert_same([outputs[i] for i in own], run(batch), rtol)


ELEMENTWISE: dict[str, Callable[[torch.Tensor], Any]] = (
    {
        name: getattr(torch, name)
        for name in [
            "abs",
            "acos",
            "acosh",
            "asin",
            "asinh",
            "atan",
            "atanh",
            "ceil",
            "cos",
            "cosh",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "frac",
            "isfinite",
            "isinf",
            "isnan",
            "isneginf",
            "isposinf",
            "log",
            "log10",
            "log1p",
            "log2",
            "logical_not",
            "neg",
            "positive",
            "reciprocal",
            "relu",
            "round",
            "rsqrt",
            "sigmoid",
            "sign",
            "sin",
            "sinh",
            "sqrt",
            "square",
            "tan",
            "tanh",
            "trunc",
            "nan_to_num",
            "erf",
            "erfc",
            "deg2rad",
            "sgn",
            "selu",
            "celu",
        ]
    }
    | {
        name: getattr(F, name)
        for name in [
            "elu",
            "gelu",
            "hardshrink",
            "hardsigmoid",
            "hardswish",
            "hardtanh",
            "leaky_relu",
            "logsigmoid",
            "mish",
            "relu6",
            "silu",
            "softplus",
            "softshrink",
            "softsign",
            "tanhshrink",
        ]
    }
    | {
        "add_int": lambda x: x + 1,
        "add_float": lambda x: x + 0.1,
        "add_alpha": lambda x: torch.add(x, x, alpha=2),
        "rsub": lambda x: 1 - x,
        "sub_alpha": lambda x: torch.sub(x, 2.0, alpha=3),
        "mul": lambda x: x * 3,
        "div": lambda x: x / 3,
        "rdiv": lambda x: 3 / x,
        "div_floor": lambda x: torch.div(x, 0.7, rounding_mode="floor"),
        "div_trunc": lambda x: torch.div(x, 0.7, rounding_mode="trunc"),
        "remainder": lambda x: x % 0.7,
        "fmod": lambda x: torch.fmod(x, 0.7),
        "fmod_negative": lambda x: torch.fmod(x, -0.7),
        "pow0": lambda x: x**0,
        "pow2": lambda x: x**2,
        "pow3": lambda x: x**3,
        "pow_half": lambda x: x**0.5,
        "pow_negative": lambda x: x**-1,
        "pow_negative2": lambda x: x**-2,
        "pow_rsqrt": lambda x: x**-0.5,
        "pow_real": lambda x: x.abs() ** 1.7,
        "pow_scalar": lambda x: 2**x,
        "clamp": lambda x: x.clamp(-1, 2),
        "clamp_min": lambda x: x.clamp(min=-0.5),
        "clamp_max": lambda x: x.clamp(max=0.5),
        "clamp_zero": lambda x: x.clamp(min=0),
        "threshold": lambda x: F.threshold(x, 0.5, 7.0),
        "elu_alpha": lambda x: F.elu(x, 0.3),
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "softplus_beta": lambda x: F.softplus(x, 2.0, 5.0),
        "glu": lambda x: F.glu(x, 1),
        "eq": lambda x: x == 1,
        "ne": lambda x: x != 0.5,
        "lt": lambda x: x < 0,
        "le": lambda x: x <= 0.5,
        "gt": lambda x: x > 0,
        "ge": lambda x: x >= 1,
        "where": lambda x: torch.where(x > 0, x, -1.0),
        "where_self": lambda x: torch.where(x > 0, x, x * 2),
        "masked_fill": lambda x: x.masked_fill(x > 0, 3.0),
        "masked_fill_infinity": lambda x: x.masked_fill(x > 0, -math.inf),
        "to_f64": lambda x: x.double() + 1,
        "to_f16": lambda x: x.half(),
        "to_bool": lambda x: x.bool(),
        "and": lambda x: (x > 0) & (x < 2),
        "or": lambda x: (x > 1) | (x < 0),
        "xor": lambda x: (x > 1) ^ (x < 2),
        "invert": lambda x: ~(x > 1),
        "logical_and": lambda x: torch.logical_and(x, x > 1),
        "bool_mul": lambda x: (x > 1) * x,
        "bool_add": lambda x: (x > 1) + (x < 0),
        "bool_compare": lambda x: (x > 1) < (x > 0),
        "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
        "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
        "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=0.5),
        "clone": lambda x: x.clone(),
        "full_like": lambda x: torch.full_like(x, 3),
        "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.int64),
        "ones_like": lambda x: x + torch.ones_like(x),
        "new_zeros": lambda x: x + x.new_zeros(x.shape),
        "dropout": lambda x: F.dropout(x, 0.5, training=False),
        "in_place": lambda x: torch.relu_(x.add(1)).mul_(2),
        "times_batch": lambda x: x * x.shape[0],
    }
)
DOUBLE = ["sinh", "cosh", "asin", "asinh", "acosh", "atanh", "softplus", "elu", "log2", "pow_real", "mish", "div_floor"]
HALF = ["relu", "sigmoid", "add_int", "hardswish", "softplus", "clamp", "asinh", "acosh"]
GELU = ("gelu", "gelu_tanh")


# torch's own gelu of an infinity is NaN or the limit, depending on the position of the element.
SPECIALS = Together({name: f for name, f in ELEMENTWISE.items() if name not in GELU}, special())
DOUBLES = Together({name: ELEMENTWISE[name] for name in DOUBLE}, special(torch.float64))
HALVES = {
    dtype: Together({name: ELEMENTWISE[name] for name in HALF}, special(dtype))
    for dtype in (torch.float16, torch.bfloat16)
}
GELUS = Together({name: ELEMENTWISE[name] for name in GELU}, floats(3, 30) * 3)


@pytest.mark.parametrize("name", SPECIALS.functions)
def test_elementwise(name: str) -> None:
    SPECIALS.check(name)


@pytest.mark.parametrize("name", GELU)
def test_gelu(name: str) -> None:
    GELUS.check(name)


@pytest.mark.parametrize("name", DOUBLE)
def test_elementwise_float64(name: str) -> None:
    DOUBLES.check(name, rtol=1e-14)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", HALF)
def test_elementwise_low_precision(name: str, dtype: torch.dtype) -> None:
    HALVES[dtype].check(name, rtol=2e-2)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "floor_divide": torch.floor_divide,
    "trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "add_alpha": lambda x, y: torch.add(x, y, alpha=2),
}


PAIRS = ["f32 f32", "f32 i64", "i64 i64", "i32 i64", "u8 i8", "f64 f32", "bool f32", "f32 scalar_f64", "i64 scalar_f32"]


@pytest.mark.parametrize("pair", PAIRS)
def test_binary_promotion(pair: str) -> None:
    def operand(kind: str, rows: int) -> torch.Tensor:
        if kind.startswith("scalar"):
            return floats(dtype=torch.float64 if "64" in kind else torch.float32).abs() + 0.5
        if kind[0] == "f":
            return floats(rows, 4, dtype=torch.float64 if "64" in kind else torch.float32)
        if kind == "bool":
            return floats(rows, 4) > 0
        return ints(rows, 4, low=1, high=9, dtype=getattr(torch, {"i": "int", "u": "uint"}[kind[0]] + kind[1:]))

    left, right = pair.split()
    functions = {name: f for name, f in BINARY.items() if left != "bool" or name != "sub"}  # torch subtracts no masks
    together = Together(functions, operand(left, 3), operand(right, 3))
    for name in functions:
        together.check(name)


def test_integers_divide_as_in_torch() -> None:
    x, y = ints(3, 40), ints(3, 40)
    y[y == 0] = 3
    for mode in ("floor", "trunc"):
        check(lambda a, b, mode=mode: torch.div(a, b, rounding_mode=mode), x, y)
    check(torch.remainder, x, y)
    check(torch.fmod, x, y)
    check(torch.true_divide, x, y)
    check(lambda a, b: (a**3, abs(b), -a, a.clamp(-2, 2), ~b, torch.relu(a), torch.sign(b)), x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_bits_of_integers(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    x = torch.tensor([0, 1, 2, 3, 7, 77, limits.max, limits.min, *([-1, -2] if limits.min else [])])
    x = x.to(dtype).repeat(3, 1)
    y = torch.tensor([[0, 1, limits.bits - 1], [2, limits.bits, 100], [5, 3, -1 if limits.min else 4]], dtype=dtype)
    functions: dict[str, Callable[..., Any]] = {
        "logic": lambda a, b: (a & b, a | b, a ^ b, ~a),
        "numbers": lambda a, b: (a & 3, a | 3, a ^ 3, torch.bitwise_and(5, a)),
        "calls": lambda a, b: [
            f(a, b) for f in (torch.bitwise_and, torch.bitwise_left_shift, torch.bitwise_right_shift)
        ],
        "shifts": lambda a, b: (a << b, a >> b, a << 3, a >> 3, torch.bitwise_right_shift(a, 1), 1 << b),
        "nibbles": lambda a, b: torch.stack([a & 15, (a >> 4) & 15], -1),
    }
    together = Together(functions, x[:, :, None], y[:, None, :])
    for name in functions:
        together.check(name)


def test_bits_of_integers_of_two_types() -> None:
    check(lambda a, b: (a & b, a ^ b, a | (b > 2)), ints(3, 5), ints(3, 5, dtype=torch.int8))


BOUNDARIES = torch.tensor([-2.0, -1.0, -1.0, 0.0, 0.5, 2.5, math.inf])
SEARCHES: dict[str, Callable[[torch.Tensor], Any]] = {
    "searchsorted": lambda x: torch.searchsorted(BOUNDARIES, x),
    "right": lambda x: torch.searchsorted(BOUNDARIES, x, right=True),
    "side": lambda x: torch.searchsorted(BOUNDARIES, x, side="right", out_int32=True),
    "rows": lambda x: torch.searchsorted(torch.sort(torch.nan_to_num(x), 1)[0], x),
    "number": lambda x: torch.searchsorted(torch.sort(torch.nan_to_num(x), 1)[0][0], 0.5) + x,
    "bucketize": lambda x: torch.bucketize(x, BOUNDARIES),
    "bucketize_right": lambda x: torch.bucketize(x, BOUNDARIES, right=True, out_int32=True),
    "bucketize_number": lambda x: torch.bucketize(0.5, BOUNDARIES) + x,
}


@pytest.mark.parametrize("name", SEARCHES)
def test_places_among_boundaries(name: str) -> None:
    check(SEARCHES[name], special())


def test_places_among_whole_numbers() -> None:
    check(lambda x: (torch.bucketize(x, torch.arange(-3, 4)), torch.searchsorted(torch.arange(-3, 4), x)), ints(3, 9))


def test_places_among_boundaries_of_another_type() -> None:
    """The numbers are not cut to the type of the boundaries."""
    whole = torch.arange(-2, 3)
    check(lambda x: (torch.bucketize(x, whole), torch.searchsorted(whole, x, right=True)), special())
    check(lambda b: (torch.searchsorted(b, 0.5), torch.bucketize(-1.5, b, right=True)), whole)
    tenths = torch.tensor([0.1, 0.2, 0.3])
    check(lambda x: torch.bucketize(x, tenths, right=True), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    check(lambda x: torch.bucketize(x, tenths, right=True), torch.tensor(0.3, dtype=torch.float64))
    check(lambda x: torch.bucketize(x, tenths * 20), ints(3, 9))


def test_a_sorter_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="a sorter"):
        lower(lambda x: torch.searchsorted(x, x, sorter=torch.argsort(x, 1)), floats(2, 3))


def test_binary_special_values() -> None:
    x = special()
    functions = (torch.maximum, torch.minimum, torch.atan2, torch.fmax, torch.fmin)
    check(lambda a, b: [f(a, b) for f in functions], x.repeat(1, 2), x.repeat_interleave(2, 1))
    check(lambda a, b: torch.pow(a.abs(), b), x, x.flip(1), rtol=1e-5)
    check(lambda a, b: a.clamp(b, b + 1), x, x.flip(1))


X = floats(3, 4, 6)
REDUCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda x: x.sum((1, 2)),
    "sum_one": lambda x: x.sum(1, keepdim=True),
    "sum_all": lambda x: x.sum(),
    "sum_batch": lambda x: x.sum(0),
    "mean": lambda x: x.mean(-1),
    "mean_all": lambda x: x.mean(),
    "mean_batch": lambda x: x.mean(0),
    "prod": lambda x: x.prod(1),
    "prod_all": lambda x: x.prod(),
    "amax": lambda x: x.amax((1, 2), keepdim=True),
    "amin": lambda x: x.amin(2),
    "max_all": lambda x: x.max(),
    "min_all": lambda x: x.min(),
    "max_dim": lambda x: x.max(1),
    "min_dim": lambda x: x.min(2, keepdim=True),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(-1, keepdim=True),
    "argmax_all": lambda x: x.argmax(),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > 1).all(),
    "any_float": lambda x: x.any(2),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std((1, 2), keepdim=True),
    "var_population": lambda x: x.var(1, correction=0),
    "var_batch": lambda x: x.double().var(0, correction=0).float(),
    "var_mean": lambda x: torch.var_mean(x, 1),
    "std_mean": lambda x: torch.std_mean(x, -1),
    "cumsum": lambda x: x.cumsum(1),
    "topk": lambda x: x.topk(3, dim=2),
    "topk_small": lambda x: x.topk(2, dim=1, largest=False),
    "sort": lambda x: x.sort(2),
    "sort_down": lambda x: x.sort(dim=1, descending=True, stable=True),
    "argsort": lambda x: x.argsort(-1),
    "norm": lambda x: x.norm(dim=1),
    "norm1": lambda x: x.norm(p=1, dim=(1, 2)),
    "norm_max": lambda x: torch.linalg.vector_norm(x, math.inf, 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cumprod": lambda x: x.cumprod(2),
    "cummax": lambda x: (x.cummax(1).values, x.cummin(2).values),
    "median": lambda x: (x.median(1), x.median(2, keepdim=True)),
    "kthvalue": lambda x: x.kthvalue(2, 1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, dim=2),
    "softmax_f64": lambda x: F.softmax(x, 1, dtype=torch.float64),
    "cosine": lambda x: F.cosine_similarity(x, x + 1, dim=2),
    "cosine_broadcast": lambda x: F.cosine_similarity(x, x[:, :1] * 0.1, dim=1, eps=0.5),
    "norms": lambda x: [torch.linalg.vector_norm(x, p, (1, 2), keepdim=True) for p in (0, 1, 2, 3, 4, 2.5, -math.inf)],
    "norm_all": lambda x: torch.linalg.vector_norm(x, dtype=torch.float64),
    "aminmax": lambda x: torch.aminmax(x, dim=1),
    "counts": lambda x: (x > 0).sum(1),
    "cdist": lambda x: torch.cdist(x[:, 0], x[:, 1]),
    "mean_two": lambda x: x.mean((0, 1)),
}


ALL_REDUCTIONS = Together(REDUCTIONS, X)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    ALL_REDUCTIONS.check(name, rtol=1e-5)


MEET_SPECIAL = [
    "median",
    "cumprod",
    "cummax",
    "sum",
    "max_dim",
    "argmax",
    "amin",
    "logsumexp",
    "sort",
    "cumsum",
    "max_all",
]
SPECIAL_ROWS = Together(
    {name: REDUCTIONS[name] for name in MEET_SPECIAL}, special().reshape(3, 2, 7)[:, :, :6].repeat(1, 2, 1)
)


@pytest.mark.parametrize("name", MEET_SPECIAL)
def test_reductions_meet_special_values(name: str) -> None:
    SPECIAL_ROWS.check(name, rtol=1e-5)


def test_topk_ranks_nan_first() -> None:
    check(lambda x: x.topk(4).values, special())


def test_reductions_of_integers_and_masks() -> None:
    x = ints(3, 4, 6, dtype=torch.int32)
    check(
        lambda x: (
            x.sum(1),
            x.prod(2),
            x.cumsum(1),
            x.amax(1),
            x.argmax(2),
            (x > 0).sum(),
            (x > 0).cumsum(1),
            (x > 0).amax(1),
        ),
        x,
    )


SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "reshape": lambda x: x.reshape(-1, 6),
    "view": lambda x: x.view(x.shape[0], -1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (2, 3)),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "mT": lambda x: x.mT,
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "expand_new": lambda x: x.expand(2, *x.shape),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "cat": lambda x: torch.cat([x, x * 2, x[:, :1]], 1),
    "cat_types": lambda x: torch.cat([x, (x > 0)], 1),
    "cat_batch": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, -x], 2),
    "hstack": lambda x: torch.hstack([x, x]),
    "split": lambda x: x.split(4, 2),
    "split_sizes": lambda x: x.split([1, 3, 2], 2),
    "chunk": lambda x: x.chunk(2, 1),
    "chunk_uneven": lambda x: x.chunk(4, 2),
    "unbind": lambda x: x.unbind(1),
    "tensor_split": lambda x: x.tensor_split(2, 2),
    "slice": lambda x: x[:, 1:3],
    "slice_step": lambda x: x[:, :, 1::2],
    "slice_negative": lambda x: x[:, -2:, :-1],
    "slice_batch": lambda x: x[1:],
    "select": lambda x: x[:, 1],
    "select_last": lambda x: x[:, -1],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: x.roll(2, 1),
    "roll_batch": lambda x: x.roll(2, 0),
    "roll_all": lambda x: x.roll(7),
    "roll2": lambda x: x.roll((1, -2), (1, 2)),
    "repeat": lambda x: x.repeat(1, 2, 3),
    "repeat_new": lambda x: x.repeat(2, 1, 1, 2),
    "tile": lambda x: x.tile(2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad2": lambda x: F.pad(x, (1, 2, 0, 1), value=7.0),
    "pad_crop": lambda x: F.pad(x, (-1, 2)),
    "pad_reflect": lambda x: F.pad(x, (2, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (2, 1), mode="replicate"),
    "pad_circular": lambda x: F.pad(x, (2, 1), mode="circular"),
    "pad_reflect2d": lambda x: F.pad(x[:, None], (2, 1, 1, 2), mode="reflect"),
    "pad_mask": lambda x: F.pad(x > 0, (1, 1), value=True),
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "tril_mask": lambda x: (x > 0).tril(-1),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "movedim": lambda x: x.movedim(1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, :2], x[0, 1, :3], indexing="ij"),
    "index_int": lambda x: x[:, [2, 0]],
    "index_negative": lambda x: x[:, [-1, 0]],
    "index_two": lambda x: x[:, [1, 2], [3, -1]],
    "index_apart": lambda x: x[torch.arange(x.shape[0]), :, 1],
    "index_last": lambda x: x[torch.arange(x.shape[0]), torch.arange(x.shape[0]) % 4],
    "index_outer": lambda x: x[:, torch.tensor([[0], [1]]), [2, 3, 4]],
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 0])),
    "gather": lambda x: x.gather(2, x.argsort(2)),
    "gather_short": lambda x: x.gather(2, x[:, :2].argsort(2)),
    "arange": lambda x: x + torch.arange(6),
    "arange_float": lambda x: x + torch.arange(0.5, 3.5, 0.5),
    "arange_batch": lambda x: torch.arange(x.shape[0]),
    "linspace": lambda x: x * torch.linspace(0, 1, 6),
    "eye": lambda x: x[:, :, :4] @ torch.eye(4),
    "full": lambda x: x + torch.full((6,), 2.0),
    "zeros": lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 6)], 1),
    "one_hot": lambda x: F.one_hot(x.argmax(2), 6),
    "scalar_tensor": lambda x: x * torch.tensor(3),
    "assign_slice": lambda x: _assigned(x),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :, :, None], 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[:, None], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x[..., None], 2),
    "tolist_shape": lambda x: x.new_ones(list(x.shape)).cumsum(1),
    "ndim": lambda x: x.sum(x.ndim - 1),
    "broadcast": lambda x: torch.broadcast_to(x[:, :1], x.shape),
    "rot90": lambda x: x.rot90(1, (1, 2)),
    "where_number": lambda x: torch.where(x > 0, x, 0),
    "compare_all": lambda x: (x[..., None] > torch.tensor([0.0, 1.0])).sum(-1),
}


def _assigned(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, :2]
    y[:, 0, 2] = 5
    return y


ALL_SHAPES = Together(SHAPES, X)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    ALL_SHAPES.check(name)


PRODUCTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "matmul": lambda x: x @ x.mT,
    "matmul_wide": lambda x: x @ W,
    "matmul_vector": lambda x: x @ W[:, 0],
    "vector_matmul": lambda x: W[:, 0] @ x.mT,
    "bmm": lambda x: torch.bmm(x, x.mT),
    "mm": lambda x: x[:, 0] @ W,
    "addmm": lambda x: torch.addmm(W[0], x[:, 0], W, beta=2, alpha=0.5),
    "addmm_zero": lambda x: torch.addmm(W[0] * math.nan, x[:, 0], W, beta=0),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :4], x, x.mT, beta=0.5),
    "linear": lambda x: F.linear(x, W.T, W[0]),
    "linear_plain": lambda x: F.linear(x, W.T),
    "einsum": lambda x: torch.einsum("bij,jk->bik", x, W),
    "einsum2": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "einsum3": lambda x: torch.einsum("bij->bj", x),
    "outer": lambda x: torch.einsum("bi,bj->bij", x[:, 0], x[:, 1]),
    "dot": lambda x: torch.dot(x[0, 0], x[0, 1]),
    "mv": lambda x: torch.mv(x[0], W[:, 0]),
    "tensordot": lambda x: torch.tensordot(x, W, 1),
    "bilinear": lambda x: F.bilinear(x[:, 0], x[:, 1], B),
    "inner": lambda x: torch.inner(x, W.T),
    "ints": lambda x: x.round().long() @ W.round().long(),
}
W, B = floats(6, 5), floats(2, 6, 6)


ALL_PRODUCTS = Together(PRODUCTS, X)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    ALL_PRODUCTS.check(name, rtol=1e-5)


IMAGE = floats(3, 4, 9, 10)
K, K1, K3 = floats(8, 2, 3, 3), floats(6, 4, 3), floats(2, 1, 2, 2, 2)
NETWORK_OPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "conv2d": lambda x: F.conv2d(x, torch.cat([K, K], 1), K[:, 0, 0, 0]),
    "conv_groups": lambda x: F.conv2d(x, K, groups=2, stride=2, padding=1),
    "conv_dilated": lambda x: F.conv2d(x, K, groups=2, dilation=(2, 1)),
    "conv_same": lambda x: F.conv2d(x, K, groups=2, padding="same"),
    "conv_same_even": lambda x: F.conv2d(x, K[:, :, :2, :2], groups=2, padding="same"),
    "depthwise": lambda x: F.conv2d(x, K[:4, :1], groups=4, padding=(1, 0)),
    "conv1d": lambda x: F.conv1d(x[:, :, 0], K1, padding=2),
    "conv3d": lambda x: F.conv3d(x[:, None], K3),
    "conv_image": lambda x: F.conv2d(x[0], K, groups=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, K[:4], stride=2, padding=1, output_padding=1),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[:, :, 0], K1[:4, :2], stride=2, groups=2),
    "unfold": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "fold": lambda x: F.fold(F.unfold(x, 3, padding=1, stride=2), (9, 10), 3, padding=1, stride=2),
    "fold_apart": lambda x: F.fold(F.unfold(x, (3, 2), stride=(3, 2)), (9, 10), (3, 2), stride=(3, 2)),
    "fold_dilated": lambda x: F.fold(F.unfold(x, 2, dilation=(2, 3)), (9, 10), 2, dilation=(2, 3)),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_pad": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool_ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max_pool_dilated": lambda x: F.max_pool2d(x, 2, dilation=2, stride=1),
    "max_pool1d": lambda x: F.max_pool1d(x[:, :, 0], 3, 2),
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], 2),
    "max_pool_image": lambda x: F.max_pool2d(x[0], 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool_pad": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool_inner": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool_ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool_ceil2": lambda x: F.avg_pool2d(x, 2, 3, 0, ceil_mode=True),
    "avg_pool_divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=4),
    "avg_pool1d": lambda x: F.avg_pool1d(x[:, :, 0], 3, 2, 1),
    "avg_pool3d": lambda x: F.avg_pool3d(x[:, None], 2),
    "adaptive_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_even": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive_odd": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive_larger": lambda x: F.adaptive_avg_pool2d(x, (12, 10)),
    "adaptive_none": lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
    "adaptive1d": lambda x: F.adaptive_avg_pool1d(x[:, :, 0], 4),
    "adaptive3d": lambda x: F.adaptive_avg_pool3d(x[:, None], (2, 3, 5)),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (4, 2)),
    "adaptive_max1d": lambda x: F.adaptive_max_pool1d(x[:, :, 0], 5),
    "lp_pool": lambda x: F.lp_pool2d(x.abs(), 2, 2),
    "batch_norm": lambda x: F.batch_norm(x, K[:4, 0, 0, 0], K[:4, 0, 0, 1].abs(), K[:4, 0, 0, 2], K[:4, 0, 1, 0]),
    "batch_norm_plain": lambda x: F.batch_norm(x, K[:4, 0, 0, 0], K[:4, 0, 0, 1].abs()),
    "batch_norm_flat": lambda x: F.batch_norm(x[:, :, 0, 0], K[:4, 0, 0, 0], K[:4, 0, 0, 1].abs()),
    "batch_statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, (10,)),
    "layer_norm2": lambda x: F.layer_norm(x, (9, 10), IMAGE[0, 0], IMAGE[0, 1], 1e-3),
    "rms_norm": lambda x: F.rms_norm(x, (10,)),
    "rms_norm_scaled": lambda x: F.rms_norm(x, (10,), IMAGE[0, 0, 0], 1e-3),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x, weight=K[:4, 0, 0, 0], bias=K[:4, 0, 0, 1]),
    "local_response_norm": lambda x: F.local_response_norm(x, 2),
    "prelu": lambda x: F.prelu(x, K[:4, 0, 0, 0]),
    "prelu_one": lambda x: F.prelu(x, K[:1, 0, 0, 0]),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_size": lambda x: F.interpolate(x, size=(5, 13)),
    "nearest_exact": lambda x: F.interpolate(x, size=(5, 13), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear_size": lambda x: F.interpolate(x, size=(5, 13), mode="bilinear"),
    "bilinear_fraction": lambda x: F.interpolate(x, scale_factor=(1.7, 0.45), mode="bilinear"),
    "linear_fraction": lambda x: F.interpolate(x[:, :, 0], scale_factor=1.33, mode="linear"),
    "bilinear_corners": lambda x: F.interpolate(x, size=(18, 4), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "linear": lambda x: F.interpolate(x[:, :, 0], size=7, mode="linear"),
    "trilinear": lambda x: F.interpolate(x[:, None], size=(3, 5, 6), mode="trilinear"),
    "nearest1d": lambda x: F.interpolate(x[:, :, 0], size=23),
    "embedding": lambda x: F.embedding(x[:, 0, 0, :6].argsort(-1), W),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 0.5, x + 1),
    "attention_causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention_long": lambda x: F.scaled_dot_product_attention(x[:, :, :4], x, x, is_causal=True),
    "attention_scale": lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.1),
    "attention_mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :1, :, :9] > 0.5),
    "attention_bias": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[0, 0, :, :9]),
    "attention_blind": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.ones(9, 9, dtype=torch.bool).tril(-1)
    ),
    "attention_blind_bias": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.zeros(9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(0), -math.inf)
    ),
    "attention_grouped": lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True),
    "attention_flat": lambda x: F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2]),
    "distances": lambda x: [torch.cdist(x, x[:, :1] + 1, p) for p in (1.0, 2.0, 3.0, math.inf)],
    "pairwise": lambda x: F.pairwise_distance(x[:, 0, 0], x[:, 1, 0]),
    "grid": lambda x: F.affine_grid(x[:, 0, :2, :3], [x.shape[0], 1, 4, 5]),
}


ALL_NETWORK_OPS = Together(NETWORK_OPS, IMAGE)


@pytest.mark.parametrize("name", NETWORK_OPS)
def test_network_ops(name: str) -> None:
    ALL_NETWORK_OPS.check(name, rtol=1e-5)


def test_pooling_passes_nan_on() -> None:
    x = IMAGE.clone()
    x[0, 0, 3, 3], x[1, 1, 2, 2] = math.nan, math.inf
    check(lambda x: (F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, (4, 3))), x)


@pytest.mark.parametrize("name", ["conv2d", "avg_pool", "layer_norm", "attention", "bilinear"])
def test_network_ops_float64(name: str) -> None:
    if name == "conv2d":
        weight = torch.cat([K, K], 1).double()
        check(lambda x: F.conv2d(x, weight), IMAGE.double(), rtol=1e-12)
    else:
        check(NETWORK_OPS[name], IMAGE.double(), rtol=1e-12)


def test_scalars_without_axes() -> None:
    x = torch.tensor(2.5)
    check(lambda x: (x * 2, x.sum(), x.softmax(0), x.max(), x.cumsum(0), x.reshape(1), x.exp() > 1), x, batches=False)


def test_empty_axes() -> None:
    x = torch.zeros(3, 0, 4)
    check(lambda x: (x.sum(1), x * 2, torch.cat([x, x], 1), x.reshape(x.shape[0], 0)), x)

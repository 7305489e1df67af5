"""ATen ops of neural networks, as IR ops: convolution, pooling, normalisation, softmax, attention, recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mlec.frontends.fx_context import TORCH_DTYPES, Context, Number, lowers
from mlec.ir import Dim, DType, Value

# -- convolution -----------------------------------------------------------------------------------------------------


def _spread(values: Sequence[int] | int, rank: int, default: Sequence[int] = ()) -> tuple[int, ...]:
    """One number for each spatial axis."""
    given = [values] if isinstance(values, int) else list(values) or list(default)
    return tuple(int(v) for v in (given * rank if len(given) == 1 else given))


@lowers("convolution.default")
def _convolution(
    c: Context, x: Value, weight: Value, bias: Value | None, stride: Sequence[int] | int, padding: Sequence[int] | int,
    dilation: Sequence[int] | int, transposed: bool, output_padding: Sequence[int] | int, groups: int,
) -> Value:  # fmt: skip
    rank = x.type.rank - 2
    pads = _spread(padding, rank) * 2
    dilations = _spread(dilation, rank)
    settings: dict[str, Any] = {
        "strides": _spread(stride, rank), "pads": pads, "dilations": dilations, "groups": groups,
    }  # fmt: skip
    if transposed:
        result = c.b("conv_transpose", x, weight, **settings, output_padding=_spread(output_padding, rank))
    else:
        result = c.b("conv", x, weight, **settings)
    if bias is None:
        return result
    return c.b("add", result, c.reshape(bias, (*bias.type.shape, *[1] * rank)))


@lowers(*(f"conv{rank}d.default" for rank in (1, 2, 3)))
def _conv(
    c: Context, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Value:  # fmt: skip
    batched = _batched(c, x, weight.type.rank - 2)
    return c.reshape(_convolution(c, batched, weight, bias, stride, padding, dilation, False, 0, groups), c.shape)


# -- pooling ---------------------------------------------------------------------------------------------------------


def _batched(c: Context, x: Value, rank: int) -> Value:
    """With a batch axis; pooling and convolutions take inputs without one."""
    return x if x.type.rank == rank + 2 else c.reshape(x, (1, *x.type.shape))


def _checked_ceil(c: Context, x: Value, ceil_mode: bool) -> bool:
    if ceil_mode:
        for axis in range(2, x.type.rank):
            c.static(x, axis, "with ceil_mode, the pooled axis")
    return ceil_mode


@lowers(
    *(f"max_pool{rank}d.default" for rank in (1, 2, 3)), *(f"max_pool{rank}d_with_indices.default" for rank in (2, 3)),
    "max_pool1d_with_indices.default",
)  # fmt: skip
def _max_pool(
    c: Context, x: Value, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value | tuple[Value, None]:  # fmt: skip
    rank = int(c.target.split("pool")[1][0])
    kernel = _spread(kernel_size, rank)
    batched = _batched(c, x, rank)
    result = c.b(
        "max_pool", batched, kernel=kernel, strides=_spread(stride, rank, kernel), pads=_spread(padding, rank) * 2,
        dilations=_spread(dilation, rank), ceil_mode=_checked_ceil(c, batched, ceil_mode),
    )  # fmt: skip
    result = c.reshape(result, c.shape)
    return (result, None) if "indices" in c.target else result


@lowers(*(f"avg_pool{rank}d.default" for rank in (1, 2, 3)))
def _avg_pool(
    c: Context, x: Value, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    rank = int(c.target.split("pool")[1][0])
    kernel = _spread(kernel_size, rank)
    pads = _spread(padding, rank) * 2
    batched = _batched(c, x, rank)
    if divisor_override is not None and ceil_mode:
        raise c.unsupported("divisor_override together with ceil_mode")
    result = c.b(
        "avg_pool", batched, kernel=kernel, strides=_spread(stride, rank, kernel), pads=pads,
        ceil_mode=_checked_ceil(c, batched, ceil_mode), count_include_pad=count_include_pad or divisor_override is not None,
    )  # fmt: skip
    if divisor_override is not None:
        result = c.b("mul", result, math.prod(kernel) / divisor_override)
    return c.reshape(result, c.shape)


@lowers(
    *(f"{lead}adaptive_avg_pool{rank}d.default" for rank in (1, 2, 3) for lead in ("", "_") if lead == "" or rank > 1)
)
def _adaptive_avg_pool(c: Context, x: Value, output_size: Sequence[Dim]) -> Value:
    return _adaptive_pool(c, x, len(output_size), "mean", "avg_pool")


@lowers(*(f"adaptive_max_pool{rank}d.default" for rank in (1, 2, 3)))
def _adaptive_max_pool(c: Context, x: Value, output_size: Sequence[Dim]) -> tuple[Value, None]:
    return _adaptive_pool(c, x, len(output_size), "max", "max_pool"), None


def _adaptive_pool(c: Context, x: Value, rank: int, reduction: str, pool: str) -> Value:
    """Over everything: a reduction. Into equal windows: a pool. Else each window of an axis by itself."""
    batched = _batched(c, x, rank)
    outputs = c.shape[-rank:]
    if all(size == 1 for size in outputs):
        return c.reshape(c.b(reduction, batched, axes=tuple(range(2, 2 + rank)), keepdims=True), c.shape)
    extents = [c.static(batched, 2 + i, "the pooled axis") for i in range(rank)]
    sizes = [int(size) for size in outputs]  # type: ignore[arg-type]
    if all(extent % size == 0 for extent, size in zip(extents, sizes, strict=True)):
        kernel = tuple(extent // size for extent, size in zip(extents, sizes, strict=True))
        return c.reshape(c.b(pool, batched, kernel=kernel, strides=kernel), c.shape)
    for i, (extent, size) in enumerate(zip(extents, sizes, strict=True)):
        if extent == size:
            continue
        windows = [(j * extent // size, -(-(j + 1) * extent // size)) for j in range(size)]
        pieces = [
            c.b(reduction, c.take(batched, 2 + i, low, high), axes=(2 + i,), keepdims=True) for low, high in windows
        ]
        batched = c.b("concat", *pieces, axis=2 + i) if len(pieces) > 1 else pieces[0]
    return c.reshape(batched, c.shape)


# -- normalisation ---------------------------------------------------------------------------------------------------


def _or_full(c: Context, x: Value | None, number: float, shape: Sequence[Dim], dtype: DType) -> Value:
    """A parameter, or what stands for it when the layer has none."""
    return c.full(number, shape, dtype) if x is None else c.cast(x, dtype)


@lowers("batch_norm.default")
def _batch_norm(
    c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None, training: bool,
    momentum: float, eps: float, cudnn_enabled: bool = False,
) -> Value:  # fmt: skip
    if training or mean is None or var is None:
        raise c.unsupported(
            "batch norm with the statistics of the batch itself",
            "call model.eval(); layers need track_running_stats=True",
        )
    shape, dtype = (x.type.shape[1],), x.type.dtype
    scale, shift = _or_full(c, weight, 1, shape, dtype), _or_full(c, bias, 0, shape, dtype)
    return c.b("batch_norm", x, scale, shift, c.cast(mean, dtype), c.cast(var, dtype), eps=eps)


@lowers("_native_batch_norm_legit_no_training.default")
def _batch_norm_inference(
    c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, momentum: float, eps: float
) -> tuple[Value | None, ...]:
    return _batch_norm(c, x, weight, bias, mean, var, False, momentum, eps), None, None


@lowers("instance_norm.default")
def _instance_norm(
    c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Value:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(c, x, weight, bias, mean, var, False, momentum, eps)
    return _group_norm(c, x, c.static(x, 1, "the number of channels"), weight, bias, eps)


@lowers("layer_norm.default")
def _layer_norm(
    c: Context, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    shape, dtype = tuple(normalized_shape), x.type.dtype
    scale, shift = _or_full(c, weight, 1, shape, dtype), _or_full(c, bias, 0, shape, dtype)
    return c.b("layer_norm", x, scale, shift, axis=-len(shape), eps=eps)


@lowers("native_layer_norm.default")
def _native_layer_norm(c: Context, x: Value, *settings: Any) -> tuple[Value | None, ...]:
    return _layer_norm(c, x, *settings), None, None


@lowers("rms_norm.default")
def _rms_norm(
    c: Context, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    shape, dtype = tuple(normalized_shape), x.type.dtype
    if eps is None:
        eps = torch.finfo(TORCH_DTYPES[dtype]).eps
    return c.b("rms_norm", x, _or_full(c, weight, 1, shape, dtype), axis=-len(shape), eps=eps)


@lowers("group_norm.default")
def _group_norm(
    c: Context, x: Value, num_groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    shape, dtype = (x.type.shape[1],), x.type.dtype
    scale, shift = _or_full(c, weight, 1, shape, dtype), _or_full(c, bias, 0, shape, dtype)
    return c.b("group_norm", x, scale, shift, groups=num_groups, eps=eps)


@lowers("native_group_norm.default")
def _native_group_norm(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    n: Dim,
    channels: Dim,
    space: Dim,
    group: int,
    eps: float,
) -> tuple[Value | None, ...]:
    return _group_norm(c, x, group, weight, bias, eps), None, None


# -- softmax ---------------------------------------------------------------------------------------------------------


@lowers("softmax.int", "_softmax.default", "_safe_softmax.default", "log_softmax.int", "_log_softmax.default")
def _softmax(c: Context, x: Value, dim: int, dtype_or_half: Any = None, dtype: Any = None) -> Value:
    x = c.cast(x, c.dtype)
    if not x.type.rank:
        return c.reshape(c.b("log_softmax" if "log" in c.target else "softmax", c.reshape(x, (1,)), axis=0), ())
    result = c.b("log_softmax" if "log" in c.target else "softmax", x, axis=dim)
    if "_safe_softmax" in c.target:
        hidden = c.b("eq", c.b("max", x, axes=(dim,), keepdims=True), -math.inf)
        result = c.b("where", hidden, c.number(0, c.dtype), result)
    return result


# -- attention -------------------------------------------------------------------------------------------------------


@lowers("scaled_dot_product_attention.default")
def _attention(
    c: Context, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if dropout_p > 0:
        raise c.unsupported("dropout is active", "pass dropout_p=0.0 when the module is not training")
    if scale is None:
        scale = 1 / math.sqrt(c.static(q, -1, "the depth of a head"))
    if enable_gqa:
        heads = q.type.shape[-3]
        k, v = (_repeated_heads(c, x, heads) for x in (k, v))
    mask = [] if attn_mask is None else [attn_mask]
    result = c.b("attention", q, k, v, *mask, scale=scale, causal=is_causal)
    if attn_mask is None:
        return result
    # A position that may look at nothing gets zeros, where a plain softmax would give NaN.
    if attn_mask.type.dtype.is_bool:
        seen = c.b("any", attn_mask, axes=(-1,), keepdims=True)
    else:
        seen = c.b("ne", c.b("max", attn_mask, axes=(-1,), keepdims=True), -math.inf)
    return c.b("where", seen, result, c.number(0, c.dtype))


def _repeated_heads(c: Context, x: Value, heads: Dim) -> Value:
    """Grouped queries: each head of x serves several neighbouring heads of q."""
    *batch, own, length, depth = x.type.shape
    if own == heads:
        return x
    if not isinstance(own, int) or not isinstance(heads, int):
        raise c.unsupported(f"the number of heads must be fixed, but it is {own} and {heads}")
    apart = c.reshape(x, (*batch, own, 1, length, depth))
    return c.reshape(c.broadcast(apart, (*batch, own, heads // own, length, depth)), (*batch, heads, length, depth))


# -- recurrence ------------------------------------------------------------------------------------------------------


@lowers("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def _recurrent(
    c: Context, x: Value, state: Value | Sequence[Value], params: Sequence[Value], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Value, ...]:  # fmt: skip
    """Layers and directions become one op each. States are [layers * directions, n, h]."""
    kind = c.target.split(".")[1]
    if train and dropout > 0:
        raise c.unsupported("dropout between the layers is active", "call model.eval() before exporting")
    states = [state] if isinstance(state, Value) else list(state)
    directions = 2 if bidirectional else 1
    per_direction = 4 if has_biases else 2
    if len(params) != per_direction * directions * num_layers:
        raise c.unsupported("projections (proj_size > 0)", "apply a Linear layer to the outputs instead")
    if not batch_first:
        x = c.swap(x, 0, 1)
    last: list[list[Value]] = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            weights = params[i * per_direction : (i + 1) * per_direction]
            initial = [c.pick(s, 0, i) for s in states]
            y, *final = _direction(c, kind, x, initial, weights, direction == 1)
            outputs.append(y)
            for collected, value in zip(last, final, strict=True):
                collected.append(c.reshape(value, (1, *value.type.shape)))
        x = outputs[0] if directions == 1 else c.b("concat", *outputs, axis=2)
    finals = [parts[0] if len(parts) == 1 else c.b("concat", *parts, axis=0) for parts in last]
    return (x if batch_first else c.swap(x, 0, 1), *finals)


def _direction(
    c: Context, kind: str, x: Value, initial: Sequence[Value], weights: Sequence[Value], reverse: bool
) -> tuple[Value, ...]:
    w_ih, w_hh, *biases = weights
    zero = c.full(0, (w_ih.type.shape[0],), x.type.dtype)
    b_ih, b_hh = biases or (zero, zero)
    if kind == "gru":  # the reset gate acts on the hidden part with its bias, so the two biases stay apart
        return c.b.multi("gru", x, *initial, w_ih, w_hh, b_ih, b_hh, reverse=reverse)
    bias = c.b("add", b_ih, b_hh) if biases else zero
    if kind == "lstm":
        return c.b.multi("lstm", x, *initial, w_ih, w_hh, bias, reverse=reverse)
    return c.b.multi("rnn", x, *initial, w_ih, w_hh, bias, activation=kind.removeprefix("rnn_"), reverse=reverse)


@lowers("prelu.default", "_prelu_kernel.default")
def _prelu(c: Context, x: Value, weight: Value) -> Value:
    if "kernel" not in c.target and x.type.rank > 2 and weight.type.shape != (1,):
        weight = c.reshape(weight, (*weight.type.shape, *[1] * (x.type.rank - 2)))
    elif "kernel" not in c.target and weight.type.shape == (1,):
        weight = c.reshape(weight, (1,) * x.type.rank)
    return c.b("where", c.b("gt", x, 0), x, c.b("mul", x, weight))


@lowers("softplus.default")
def _softplus(c: Context, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    return c.cast(_softened(c, c.cast(x, c.wide), beta, threshold), c.dtype)


def _softened(c: Context, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    """Softplus in the dtype of x."""
    scaled = c.b("mul", x, beta) if beta != 1 else x
    soft = c.b("log1p", c.b("exp", scaled))
    return c.b("where", c.b("gt", scaled, threshold), x, c.b("div", soft, beta) if beta != 1 else soft)


@lowers("mish.default")
def _mish(c: Context, x: Value) -> Value:
    x = c.cast(x, c.wide)
    return c.cast(c.b("mul", x, c.b("tanh", _softened(c, x))), c.dtype)


@lowers("glu.default")
def _glu(c: Context, x: Value, dim: int = -1) -> Value:
    x = c.cast(x, c.wide)
    extent = x.type.shape[dim]
    value, gate = c.take(x, dim, 0, extent // 2), c.take(x, dim, extent // 2, extent)
    return c.cast(c.b("mul", value, c.b("sigmoid", gate)), c.dtype)

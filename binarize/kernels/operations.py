"""The kernels on bits as torch operators: tracing and export see one node each, the CPU runs C, or torch without a compiler.

Activations are bits (rows, words) int32 and weights panels (panels, words, 32) int32, see kernels.c and oracle.py.
"""

import torch
from torch import Tensor

from binarize.kernels import oracle
from binarize.kernels.engine import are_rows, for_c, refuse

MOST_PROTOTYPES, MOST_CHANNELS = 64, 4096
_KEY_PADDING = 16


@torch.library.custom_op("binaryad::pack", mutates_args=())
def pack(x: Tensor, threshold: Tensor) -> Tensor:
    """Bits of x (rows, k) - threshold (k) >= 0."""
    if not are_rows(x, None, threshold):
        refuse("x and threshold do not fit", x, threshold)
    c = for_c(x)
    if c is None:
        return oracle.pack(x, threshold)
    x = x.float()
    bits = x.new_empty(len(x), oracle.words_of(x.shape[1]), dtype=torch.int32)
    c.call("pack", x, len(x), x.shape[1], threshold, bits)
    return bits


@pack.register_fake
def _(x: Tensor, threshold: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], oracle.words_of(x.shape[1]), dtype=torch.int32)


@torch.library.custom_op("binaryad::layer_norm_pack", mutates_args=())
def layer_norm_pack(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    """Bits of layer_norm(x (rows, k)) - threshold (k) >= 0."""
    if not are_rows(x, None, weight, bias, threshold):
        refuse("x, norm and threshold do not fit", x, weight, bias, threshold)
    c = for_c(x)
    if c is None:
        return oracle.layer_norm_pack(x, weight, bias, eps, threshold)
    x = x.float()
    bits = x.new_empty(len(x), oracle.words_of(x.shape[1]), dtype=torch.int32)
    c.call("layer_norm_pack", x, len(x), x.shape[1], weight, bias, float(eps), threshold, bits)
    return bits


@layer_norm_pack.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], oracle.words_of(x.shape[1]), dtype=torch.int32)


@torch.library.custom_op("binaryad::linear", mutates_args=())
def linear(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """scale * (signs of bits @ signs of weights) + bias (+ residual (rows, out)), (rows, out) float32."""
    check_product(bits, panels, in_features, scale, bias)
    shape = (len(bits), len(scale))
    if residual is not None and residual.shape != shape:
        refuse(f"residual is not {shape}", residual)
    c = for_c(bits)
    if c is None:
        return oracle.linear(bits, panels, in_features, scale, bias, residual)
    out = scale.new_empty(shape)
    residual = None if residual is None else residual.float()
    c.call("linear", bits, len(bits), panels, in_features, len(scale), scale, bias, residual, out)
    return out


@linear.register_fake
def _(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return scale.new_empty(bits.shape[0], scale.shape[0])


@torch.library.custom_op("binaryad::linear_to_bits", mutates_args=())
def linear_to_bits(bits: Tensor, panels: Tensor, in_features: int, low: Tensor, span: Tensor) -> Tensor:
    """Bits that are 0 where low (out) <= mismatches <= low + span (out), else 1: what follows the product is folded in."""
    check_product(bits, panels, in_features, low, span)
    c = for_c(bits)
    if c is None:
        return oracle.linear_to_bits(bits, panels, in_features, low, span)
    out = bits.new_empty(len(bits), oracle.words_of(len(low)))
    c.call("linear_to_bits", bits, len(bits), panels, in_features, len(low), low, span, out)
    return out


@linear_to_bits.register_fake
def _(bits: Tensor, panels: Tensor, in_features: int, low: Tensor, span: Tensor) -> Tensor:
    return bits.new_empty(bits.shape[0], oracle.words_of(low.shape[0]))


@torch.library.custom_op("binaryad::prototype_attention", mutates_args=())
def prototype_attention(
    query: Tensor,
    projected: Tensor,
    head_scale: Tensor,
    share: Tensor | None,
    slope: Tensor | None,
    middle: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    """Attention of query (B, N, C) over keys and values projected (B, M, 2C), softmax-aware binarization, then bits.

    head_scale, share, slope, middle: (heads). Without `share` the map stays float, without `slope` the gate is 1.
    Returns (B * N, words).
    """
    heads, gates = len(head_scale), (head_scale, share, slope, middle)
    if query.ndim != 3 or projected.ndim != 3 or (slope is None) != (middle is None):
        refuse("queries, prototypes or gates are not what they must be", query, projected, *gates)
    (batch, tokens, width), count = query.shape, projected.shape[1]
    fits = projected.shape == (batch, count, 2 * width) and width % heads == 0 and threshold.shape == (width,)
    if not (fits and all(values is None or values.shape == (heads,) for values in gates)):
        refuse("queries, prototypes, gates and threshold do not fit", query, projected, *gates, threshold)
    c = for_c(query)
    if c is None or count > MOST_PROTOTYPES or width > MOST_CHANNELS:
        return oracle.prototype_attention(query, projected, head_scale, share, slope, middle, threshold)
    keys = query.new_empty(batch * width * (-(-count // _KEY_PADDING) * _KEY_PADDING))
    bits = query.new_empty(batch * tokens, oracle.words_of(width), dtype=torch.int32)
    sizes = (count, heads, width // heads)
    c.call("prototype_attention", query, batch, tokens, projected, *sizes, keys, *gates, threshold, bits)
    return bits


@prototype_attention.register_fake
def _(query, projected, head_scale, share, slope, middle, threshold) -> Tensor:
    return query.new_empty(query.shape[0] * query.shape[1], oracle.words_of(query.shape[2]), dtype=torch.int32)


@torch.library.custom_op("binaryad::linear_attention", mutates_args=())
def linear_attention(projected: Tensor, tokens: int, heads: int, threshold: Tensor | None) -> Tensor:
    """Linear attention of queries, keys and values projected (B * tokens, 3C), see models/layers.py.

    Returns bits of attention - threshold (C) >= 0, (B * tokens, words); without `threshold` the attention (B * tokens, C).
    """
    fits = projected.ndim == 2 and projected.shape[1] > 0 and min(tokens, heads) >= 1
    if not fits or len(projected) % tokens or projected.shape[1] % (3 * heads):
        refuse(f"queries, keys and values are not for {tokens} tokens and {heads} heads", projected)
    width = projected.shape[1] // 3
    if threshold is not None and threshold.shape != (width,):
        refuse(f"threshold is not for {width} channels", threshold)
    c = for_c(projected)
    if c is None or width > MOST_CHANNELS:
        return oracle.linear_attention(projected, tokens, heads, threshold)
    images, d = len(projected) // tokens, width // heads
    summaries = projected.new_empty(images * heads * (d + 1) * d)
    out = _attended_like(projected, threshold)
    bits, floats = (None, out) if threshold is None else (out, None)
    c.call("linear_attention", projected, images, tokens, heads, d, summaries, threshold, bits, floats)
    return out


@linear_attention.register_fake
def _(projected: Tensor, tokens: int, heads: int, threshold: Tensor | None) -> Tensor:
    return _attended_like(projected, threshold)


def _attended_like(projected: Tensor, threshold: Tensor | None) -> Tensor:
    width = projected.shape[1] // 3
    if threshold is None:
        return projected.new_empty(projected.shape[0], width)
    return projected.new_empty(projected.shape[0], oracle.words_of(width), dtype=torch.int32)


def check_product(bits: Tensor, panels: Tensor, in_features: int, *per_output: Tensor) -> None:
    """Raise ValueError unless bits (rows, words) and panels are of so many inputs, panels and the rest of as many outputs."""
    words, outputs = oracle.words_of(in_features), per_output[0].shape[:1]
    fits = bits.shape[1:] == (words,) and panels.shape == (-(-len(per_output[0]) // 32), words, 32)
    fits = fits and bits.dtype == panels.dtype == torch.int32
    if not (fits and all(values.shape == outputs for values in per_output)):
        what = f"bits, panels and outputs do not fit, or not to {in_features} inputs, or bits are not int32"
        refuse(what, bits, panels, *per_output)

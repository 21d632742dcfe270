"""The kernels on bits as torch operators: tracing and export see one node each, the CPU runs C, or torch without a compiler.

Activations are bits (rows, words) int32 and weights panels (panels, words, 32) int32, see kernels.c and oracle.py.
"""

import torch
from torch import Tensor

from binarize.kernels import oracle
from binarize.kernels.argument_types import SIGNATURES
from binarize.kernels.engine import for_c, refuse, refuse_uneven

MOST_PROTOTYPES, MOST_CHANNELS = 64, 4096


@torch.library.custom_op("binaryad::pack", mutates_args=())
def pack(x: Tensor, threshold: Tensor) -> Tensor:
    """Bits of x (rows, k) - threshold (k) >= 0."""
    sizes = SIGNATURES["pack"].check(x, threshold)
    c = for_c(x)
    if c is None:
        return oracle.pack(x, threshold)
    x = x.float()
    bits = x.new_empty(len(x), sizes["words"], dtype=torch.int32)
    c.call("pack", x, len(x), x.shape[1], threshold, bits)
    return bits


@pack.register_fake
def _(x: Tensor, threshold: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], oracle.words_of(x.shape[1]), dtype=torch.int32)


@torch.library.custom_op("binaryad::layer_norm_pack", mutates_args=())
def layer_norm_pack(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    """Bits of layer_norm(x (rows, k)) - threshold (k) >= 0."""
    sizes = SIGNATURES["layer_norm_pack"].check(x, weight, bias, threshold)
    c = for_c(x)
    if c is None:
        return oracle.layer_norm_pack(x, weight, bias, eps, threshold)
    x = x.float()
    bits = x.new_empty(len(x), sizes["words"], dtype=torch.int32)
    c.call("layer_norm_pack", x, len(x), x.shape[1], weight, bias, float(eps), threshold, bits)
    return bits


@layer_norm_pack.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], oracle.words_of(x.shape[1]), dtype=torch.int32)


@torch.library.custom_op("binaryad::linear", mutates_args=())
def linear(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """scale * (signs of bits @ signs of weights) + bias (+ residual (rows, out)), (rows, out) float32."""
    SIGNATURES["linear"].check(bits, panels, scale, bias, residual, inputs=in_features)
    c = for_c(bits)
    if c is None:
        return oracle.linear(bits, panels, in_features, scale, bias, residual)
    out = scale.new_empty(len(bits), len(scale))
    residual = None if residual is None else residual.float()
    c.call("linear", bits, len(bits), panels, in_features, len(scale), scale, bias, residual, out)
    return out


@linear.register_fake
def _(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return scale.new_empty(bits.shape[0], scale.shape[0])


@torch.library.custom_op("binaryad::linear_to_bits", mutates_args=())
def linear_to_bits(bits: Tensor, panels: Tensor, in_features: int, low: Tensor, span: Tensor) -> Tensor:
    """Bits that are 0 where low (out) <= mismatches <= low + span (out), else 1: what follows the product is folded in."""
    sizes = SIGNATURES["linear_to_bits"].check(bits, panels, low, span, inputs=in_features)
    c = for_c(bits)
    if c is None:
        return oracle.linear_to_bits(bits, panels, in_features, low, span)
    out = bits.new_empty(len(bits), sizes["words of outputs"])
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
    gates = (head_scale, share, slope, middle)
    sizes = SIGNATURES["prototype_attention"].check(query, projected, *gates, threshold)
    (batch, tokens, width), count, heads = query.shape, sizes["prototypes"], sizes["heads"]
    if width % heads or (slope is None) != (middle is None):
        refuse(f"prototype_attention: gates are not for {width} channels, or only one of slope and middle is there", *gates)
    c = for_c(query)
    if c is None or count > MOST_PROTOTYPES or width > MOST_CHANNELS:
        return oracle.prototype_attention(query, projected, head_scale, share, slope, middle, threshold)
    keys = query.new_empty(batch * width * sizes["padded prototypes"])
    bits = query.new_empty(batch * tokens, sizes["words"], dtype=torch.int32)
    c.call("prototype_attention", query, batch, tokens, projected, count, heads, width // heads, keys, *gates, threshold, bits)
    return bits


@prototype_attention.register_fake
def _(query, projected, head_scale, share, slope, middle, threshold) -> Tensor:
    return query.new_empty(query.shape[0] * query.shape[1], oracle.words_of(query.shape[2]), dtype=torch.int32)


@torch.library.custom_op("binaryad::linear_attention", mutates_args=())
def linear_attention(projected: Tensor, tokens: int, heads: int, threshold: Tensor | None) -> Tensor:
    """Linear attention of queries, keys and values projected (B * tokens, 3C), see models/layers.py.

    Returns bits of attention - threshold (C) >= 0, (B * tokens, words); without `threshold` the attention (B * tokens, C).
    """
    refuse_uneven("linear_attention", projected, tokens, heads)
    sizes = SIGNATURES["linear_attention"].check(projected, threshold, tokens=tokens, heads=heads)
    width = sizes["channels"]
    c = for_c(projected)
    if c is None or width > MOST_CHANNELS:
        return oracle.linear_attention(projected, tokens, heads, threshold)
    images, d = sizes["images"], sizes["head width"]
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

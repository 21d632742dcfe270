"""The kernels' arithmetic in plain torch, exact in the integers: the truth in tests, and the way without a compiler."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import layers
from models.layers import merge_heads, split_heads

_SMALLEST_SCALE = 1e-6


def words_of(features: int) -> int:
    """32-bit words of a row of bits: an even number."""
    return 2 * -(-features // 64)


def pack_signs(positive: Tensor) -> Tensor:
    """(rows, k) bool -> (rows, words) int32: bit j of word w is column 32 w + j, unused bits are 0."""
    features = positive.shape[1]
    padded = F.pad(positive, (0, 32 * words_of(features) - features)).unflatten(1, (-1, 32))
    values = (padded.long() << torch.arange(32, device=positive.device)).sum(dim=-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def unpack_signs(bits: Tensor, features: int) -> Tensor:
    """(rows, words) int32 -> (rows, features) float32 of +1 and -1."""
    single = (bits.long().unsqueeze(-1) >> torch.arange(32, device=bits.device)) & 1
    return single.flatten(1)[:, :features].float() * 2 - 1


def panels_of(bits: Tensor) -> Tensor:
    """Bits of weights (out, words) -> (panels, words, 32), the order in which the kernels read them."""
    padded = F.pad(bits, (0, 0, 0, -len(bits) % 32))
    return padded.unflatten(0, (-1, 32)).transpose(1, 2).contiguous()


def bits_of_panels(panels: Tensor, features: int) -> Tensor:
    """Undo `panels_of`: (panels, words, 32) -> (features, words)."""
    return panels.transpose(1, 2).flatten(0, 1)[:features]


def products(bits: Tensor, panels: Tensor, in_features: int, out_features: int) -> Tensor:
    """Exact products of rows of signs and weight signs, (rows, out) float32; integers up to 2^24 are exact."""
    weights = unpack_signs(bits_of_panels(panels, out_features), in_features)
    return unpack_signs(bits, in_features) @ weights.T


def pack(x: Tensor, threshold: Tensor) -> Tensor:
    """Bits of x - threshold >= 0."""
    return pack_signs(x - threshold >= 0)


def layer_norm_pack(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    """Bits of layer_norm(x) - threshold >= 0."""
    return pack(F.layer_norm(x, x.shape[-1:], weight, bias, eps), threshold)


def linear(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """scale * product + bias (+ residual)."""
    out = products(bits, panels, in_features, len(scale)) * scale + bias
    return out if residual is None else out + residual


def linear_to_bits(bits: Tensor, panels: Tensor, in_features: int, low: Tensor, span: Tensor) -> Tensor:
    """Bits that are 0 where low <= mismatches <= low + span; mismatches = (in_features - product) / 2."""
    mismatches = (in_features - products(bits, panels, in_features, len(low)).int()) // 2
    return pack_signs((mismatches < low) | (mismatches - low > span))


def prototype_attention(
    query: Tensor,
    projected: Tensor,
    head_scale: Tensor,
    share: Tensor | None,
    slope: Tensor | None,
    middle: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    """Attention of tokens over prototypes as in binarize/attention.py, then bits at `threshold`: (B * N, words)."""
    heads = len(head_scale)
    queries = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(2, dim=-1))
    scale = head_scale.reshape(heads, 1, 1)
    entries = F.relu(scale * (F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(-2, -1)))
    if share is not None:
        maximum = entries.amax(dim=-1, keepdim=True)
        chosen = ((entries >= share.reshape(heads, 1, 1) * maximum) & (maximum > 0)).float()
        row_scale = (entries * chosen).sum(dim=-1, keepdim=True) / chosen.sum(dim=-1, keepdim=True).clamp_min(1)
        gate = torch.ones_like(maximum)
        if slope is not None and middle is not None:
            relative = maximum / scale.abs().clamp_min(_SMALLEST_SCALE)
            gate = torch.sigmoid(slope.reshape(heads, 1, 1) * (relative - middle.reshape(heads, 1, 1)))
        entries = (1 - gate) * entries + gate * row_scale * chosen
    return pack((entries @ values).transpose(1, 2).flatten(2).flatten(0, 1), threshold)


def linear_attention(projected: Tensor, tokens: int, heads: int, threshold: Tensor | None) -> Tensor:
    """Linear attention of queries, keys and values (B * tokens, 3C) -> (B * tokens, C), or its bits at `threshold`."""
    parts = projected.unflatten(0, (len(projected) // tokens, tokens)).chunk(3, dim=-1)
    attended = merge_heads(layers.linear_attention(*(split_heads(part, heads) for part in parts))).flatten(0, 1)
    return attended if threshold is None else pack(attended, threshold)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as bytes 128 + round(x / scale), and their scales (rows,)."""
    scales = x.abs().amax(dim=-1) / 127
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0, scales)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return ((x * inverse.unsqueeze(-1)).round() + 128).to(torch.uint8), scales


def layer_norm_quantize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize` of layer_norm(x)."""
    return quantize(F.layer_norm(x, x.shape[-1:], weight, bias, eps))


def gelu_quantize(sums: Tensor, row_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` of gelu(sums * row_scales + bias)."""
    return quantize(F.gelu(sums * row_scales.unsqueeze(1) + bias))


def rescale(sums: Tensor, row_scales: Tensor, bias: Tensor, layer_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + layer_scale (sums * row_scales + bias)."""
    out = sums * row_scales.unsqueeze(1) + bias
    out = out if layer_scale is None else out * layer_scale
    return out if residual is None else residual + out


def softmax_attention(projected: Tensor, tokens: int, heads: int) -> Tensor:
    """Softmax attention of queries, keys and values (B * tokens, 3C) -> (B * tokens, C)."""
    query, key, value = projected.unflatten(1, (3, heads, -1)).unflatten(0, (-1, tokens)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)

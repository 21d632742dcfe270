"""What lies between the products of 8-bit layers, and their softmax attention, as torch operators (see operations.py)."""

import torch
from torch import Tensor

from binarize.kernels import oracle
from binarize.kernels.argument_types import SIGNATURES
from binarize.kernels.engine import for_c, refuse_uneven


def _quantized_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:1])


@torch.library.custom_op("binaryad::quantize", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) -> bytes 128 + round(x / scale), and scale = max |x| / 127 of each row."""
    SIGNATURES["quantize"].check(x)
    c = for_c(x)
    if c is None:
        return oracle.quantize(x)
    out, scales = _quantized_like(x)
    c.call("quantize", x, *x.shape, out, scales)
    return out, scales


@quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized_like(x)


@torch.library.custom_op("binaryad::layer_norm_quantize", mutates_args=())
def layer_norm_quantize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize` of layer_norm(x (rows, n))."""
    SIGNATURES["layer_norm_quantize"].check(x, weight, bias)
    c = for_c(x)
    if c is None:
        return oracle.layer_norm_quantize(x, weight, bias, eps)
    out, scales = _quantized_like(x)
    c.call("layer_norm_quantize", x, *x.shape, weight, bias, float(eps), out, scales)
    return out, scales


@layer_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _quantized_like(x)


@torch.library.custom_op("binaryad::gelu_quantize", mutates_args=())
def gelu_quantize(sums: Tensor, row_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` of gelu(sums (rows, n) * row_scales (rows) + bias (n))."""
    SIGNATURES["gelu_quantize"].check(sums, row_scales, bias)
    c = for_c(sums)
    if c is None:
        return oracle.gelu_quantize(sums, row_scales, bias)
    out, scales = _quantized_like(sums)
    c.call("gelu_quantize", sums, *sums.shape, row_scales, bias, out, scales)
    return out, scales


@gelu_quantize.register_fake
def _(sums: Tensor, row_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized_like(sums)


@torch.library.custom_op("binaryad::rescale", mutates_args=())
def rescale(sums: Tensor, row_scales: Tensor, bias: Tensor, layer_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual (rows, n) + layer_scale (n) (sums (rows, n) * row_scales (rows) + bias (n)); the last two may be absent."""
    SIGNATURES["rescale"].check(sums, row_scales, bias, layer_scale, residual)
    c = for_c(sums)
    if c is None:
        return oracle.rescale(sums, row_scales, bias, layer_scale, residual)
    out = torch.empty_like(sums, memory_format=torch.contiguous_format)
    c.call("rescale", sums, *sums.shape, row_scales, bias, layer_scale, residual, out)
    return out


@rescale.register_fake
def _(sums, row_scales, bias, layer_scale, residual) -> Tensor:
    return torch.empty_like(sums, memory_format=torch.contiguous_format)


@torch.library.custom_op("binaryad::softmax_attention", mutates_args=())
def softmax_attention(sums: Tensor, row_scales: Tensor, bias: Tensor, tokens: int, heads: int) -> Tensor:
    """Attention of queries, keys and values sums * row_scales + bias (B * tokens, 3C) -> (B * tokens, C).

    With AVX-512 BF16 the products are bfloat16, the sums float32; elsewhere torch's float32 attention.
    """
    refuse_uneven("softmax_attention", sums, tokens, heads)
    width = SIGNATURES["softmax_attention"].check(sums, row_scales, bias)["channels"]
    c = for_c(sums)
    if c is None or not c.has_softmax_attention or width // heads % 32:
        return oracle.softmax_attention(rescale(sums, row_scales, bias, None, None), tokens, heads)
    out = sums.new_empty(len(sums), width)
    images = len(sums) // tokens
    if not c.call("softmax_attention", sums, images, tokens, heads, width // heads, row_scales, bias, out):
        raise MemoryError("no memory for the attention's keys and scores")
    return out


@softmax_attention.register_fake
def _(sums: Tensor, row_scales: Tensor, bias: Tensor, tokens: int, heads: int) -> Tensor:
    return sums.new_empty(sums.shape[0], sums.shape[1] // 3)

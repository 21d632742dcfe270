"""Stretches of a decoder block as one operator each: a few rows go all the way, so that what lies between stays in the cache.

They give what the operators of `operations` give one after the other, to the last bit.
"""

import torch
from torch import Tensor

from binarize.kernels import operations
from binarize.kernels.argument_types import PANEL, SIGNATURES
from binarize.kernels.engine import for_c, refuse


@torch.library.custom_op("binaryad::project_and_attend", mutates_args=())
def project_and_attend(
    bits: Tensor, panels: Tensor, scale: Tensor, bias: Tensor, tokens: int, heads: int, threshold: Tensor
) -> Tensor:
    """Bits (B * tokens, words) -> queries, keys and values by a binary layer -> linear attention -> its bits at `threshold`.

    `threshold` is (C,), `scale` and `bias` are (3C,), `panels` those of C inputs and 3C outputs.
    """
    uneven = min(tokens, heads) < 1 or (bits.ndim and len(bits) % tokens) or (threshold.ndim and len(threshold) % heads)
    if uneven:
        refuse(f"project_and_attend: bits and threshold are not for {tokens} tokens and {heads} heads", bits, threshold)
    sizes = SIGNATURES["project_and_attend"].check(bits, panels, scale, bias, threshold, tokens=tokens, heads=heads)
    images, width, d = sizes["images"], sizes["channels"], sizes["head width"]
    c = for_c(scale)
    if c is None or width > operations.MOST_CHANNELS or d % PANEL:
        projected = operations.linear(bits, panels, width, scale, bias, None)
        return operations.linear_attention(projected, tokens, heads, threshold)
    summaries = scale.new_empty(images * heads * (d + 1) * d)
    out = torch.empty_like(bits, memory_format=torch.contiguous_format)
    c.call("project_and_attend", bits, panels, scale, bias, images, tokens, heads, d, summaries, threshold, out)
    return out


@project_and_attend.register_fake
def _(bits, panels, scale, bias, tokens, heads, threshold) -> Tensor:
    return torch.empty_like(bits, memory_format=torch.contiguous_format)


@torch.library.custom_op("binaryad::project_and_transform", mutates_args=())
def project_and_transform(
    bits: Tensor,
    proj: list[Tensor],
    residual: Tensor | None,
    norm: list[Tensor],
    eps: float,
    fc1: list[Tensor],
    fc2: list[Tensor],
) -> Tensor:
    """Bits of the attention (rows, words) -> x = proj (+ residual (rows, C)) -> x + MLP of its norm, (rows, C).

    Args:
        proj, fc2: panels, scale and bias of a binary layer.
        norm: weight, bias and the threshold of fc1.
        fc1: panels, low and span of a folded layer, see `operations.linear_to_bits`.
    """
    if any(len(operands) != 3 for operands in (proj, norm, fc1, fc2)):
        refuse("project_and_transform: proj, norm, fc1 and fc2 must be three tensors each", bits)
    sizes = SIGNATURES["project_and_transform"].check(bits, *proj, residual, *norm, *fc1, *fc2)
    width, hidden = sizes["channels"], sizes["hidden"]
    c = for_c(proj[1]) and for_c(fc1[1])
    if c is None:
        x = operations.linear(bits, proj[0], width, *proj[1:], residual)
        normal = operations.layer_norm_pack(x, *norm[:2], eps, norm[2])
        return operations.linear(operations.linear_to_bits(normal, fc1[0], width, *fc1[1:]), fc2[0], hidden, *fc2[1:], x)
    out = proj[1].new_empty(len(bits), width)
    residual = None if residual is None else residual.float()
    rest = (*proj, residual, *norm[:2], float(eps), norm[2], *fc1, *fc2)
    c.call("project_and_transform", bits, len(bits), width, hidden, *rest, out)
    return out


@project_and_transform.register_fake
def _(bits, proj, residual, norm, eps, fc1, fc2) -> Tensor:
    return proj[1].new_empty(bits.shape[0], proj[1].shape[0])

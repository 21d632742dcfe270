"""The float parts of a packed model in 8 bits: linear layers with a scale per output channel and, at run time, per token.

The integer products are oneDNN's (through torch), what lies between them is fused in binarize/kernels.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from binarize.kernels.int8_operations import gelu_quantize, layer_norm_quantize, quantize, rescale, softmax_attention
from models.layers import Mlp

logger = logging.getLogger(__name__)

_LARGEST = 127
_ZERO_POINT = 128  # oneDNN is fast for unsigned activations only


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, in) -> int8 and scale (out,), largest magnitude of each row at 127."""
    scale = (weight.abs().amax(dim=1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """y = (bytes - 128) @ weight.T * weight_scale, then times the tokens' scales, plus bias; see `kernels.int8_operations`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight, scale = quantize_weight(layer.weight.detach().float())
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().float().clone()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self._product = None

    def prepare_weights(self) -> None:
        """Choose the product's implementation for this machine and lay the weights out for it."""
        bits = _exact_weight_bits() if self.weight.device.type == "cpu" else None
        if bits is None:
            self._product = _float_product(self.weight, self.weight_scale)
        elif bits == 8:
            self._product = _onednn_product(self.weight, self.weight_scale)
        else:
            self._product = _onednn_product((self.weight.float() / 2).round().to(torch.int8), 2 * self.weight_scale)

    def sums(self, rows: Tensor) -> Tensor:
        """Bytes (rows, in) -> float32 (rows, out), still to be multiplied with the rows' scales."""
        return self._product(rows)

    def forward(self, inputs: Tensor) -> Tensor:
        rows, scales = quantize(inputs.reshape(-1, inputs.shape[-1]).float())
        return rescale(self.sums(rows), scales, self.bias, None, None).unflatten(0, inputs.shape[:-1])


def _onednn_product(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero_points = torch.zeros(len(weight), dtype=torch.int64)

    def product(rows: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, _ZERO_POINT, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return product


def _float_product(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    unpacked = weight.float() * scale.unsqueeze(1)

    def product(rows: Tensor) -> Tensor:
        return F.linear(rows.float() - _ZERO_POINT, unpacked)

    return product


@cache
def _exact_weight_bits() -> int | None:
    """Bits of weights whose 8-bit products are exact here: 8, or 7 without VNNI instructions, or None; said once if not 8.

    Without VNNI, sums of two products saturate at 16 bits, which the largest weights of 8 bits reach.
    """
    for bits, largest in ((8, _LARGEST), (7, 64)):
        rows = torch.full((4, 64), 255, dtype=torch.uint8)
        weight = torch.full((16, 64), largest, dtype=torch.int8)
        try:
            found = _onednn_product(weight, torch.ones(16))(rows)
        except (RuntimeError, AttributeError) as error:
            logger.warning("8-bit layers run in float32: torch has no 8-bit product here (%s)", str(error).splitlines()[0])
            return None
        if bool((found == 64 * largest * (255 - _ZERO_POINT)).all()):
            if bits != 8:
                logger.warning("8-bit layers run with weights rounded to 7 bits: this CPU has no 8-bit dot product (VNNI)")
            return bits
    logger.warning("8-bit layers run in float32: this CPU's 8-bit products are not exact")
    return None


class Int8Convolution(nn.Module):
    """A convolution whose weights are 8 bits in the file only: it is one layer of many and computes in float32."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.shape, self.stride, self.padding = layer.weight.shape, layer.stride, layer.padding
        weight, scale = quantize_weight(layer.weight.detach().float().flatten(1))
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().float().clone())
        self._weight = None

    def prepare_weights(self) -> None:
        """Unpack the weights."""
        self._weight = (self.weight.float() * self.weight_scale.unsqueeze(1)).reshape(self.shape)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self._weight, self.bias, self.stride, self.padding)


class Int8Mlp(nn.Module):
    """Linear, GELU, Linear in 8 bits."""

    def __init__(self, mlp: Mlp | TimmMlp):
        super().__init__()
        self.fc1, self.fc2 = Int8Linear(mlp.fc1), Int8Linear(mlp.fc2)

    def hidden(self, rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized rows -> quantized hidden rows, both with their scales."""
        return gelu_quantize(self.fc1.sums(rows), scales, self.fc1.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        rows, scales = self.hidden(*quantize(inputs.reshape(-1, inputs.shape[-1]).float()))
        return rescale(self.fc2.sums(rows), scales, self.fc2.bias, None, None).unflatten(0, inputs.shape[:-1])


class Int8Block(nn.Module):
    """A pre-norm transformer block (timm's) in 8 bits: norms, softmax and residual sums stay float32.

    The norms' affine part is shared out between activations and weights first, so that no channel's range spoils the
    others' resolution (as SmoothQuant does, Xiao et al. 2023, but from the norm's own weight and bias: no data needed).
    """

    def __init__(self, block: Block):
        super().__init__()
        attention = block.attn
        self.num_heads = attention.num_heads
        self.norm1, qkv = _smoothed(block.norm1, attention.qkv)
        self.norm2, fc1 = _smoothed(block.norm2, block.mlp.fc1)
        self.qkv, self.proj, self.fc1, self.fc2 = map(Int8Linear, (qkv, attention.proj, fc1, block.mlp.fc2))
        for name, layer_scale in (("layer_scale_1", block.ls1), ("layer_scale_2", block.ls2)):
            self.register_buffer(name, layer_scale.gamma.detach().clone() if hasattr(layer_scale, "gamma") else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) float32 -> the same."""
        x = tokens.flatten(0, 1)
        rows, scales = _normed_rows(x, self.norm1)
        sums = self.qkv.sums(rows)
        attended = softmax_attention(sums, scales, self.qkv.bias, tokens.shape[1], self.num_heads)
        rows, scales = quantize(attended)
        x = rescale(self.proj.sums(rows), scales, self.proj.bias, self.layer_scale_1, x)
        rows, scales = _normed_rows(x, self.norm2)
        rows, scales = gelu_quantize(self.fc1.sums(rows), scales, self.fc1.bias)
        x = rescale(self.fc2.sums(rows), scales, self.fc2.bias, self.layer_scale_2, x)
        return x.view_as(tokens)


def _normed_rows(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return layer_norm_quantize(x, norm.weight, norm.bias, norm.eps)


def _smoothed(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[nn.LayerNorm, nn.Linear]:
    """An equal pair in which a channel's typical activation and its largest weight are of like size."""
    activation = (norm.weight.detach() ** 2 + norm.bias.detach() ** 2).sqrt().clamp_min(1e-6)
    factor = (activation / layer.weight.detach().abs().amax(dim=0).clamp_min(1e-6)).sqrt()
    factor = factor / factor.log().mean().exp()
    new_norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, device=norm.weight.device)
    new_layer = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device)
    with torch.no_grad():
        new_norm.weight.copy_(norm.weight / factor)
        new_norm.bias.copy_(norm.bias / factor)
        new_layer.weight.copy_(layer.weight * factor)
        new_layer.bias.copy_(torch.zeros_like(new_layer.bias) if layer.bias is None else layer.bias)
    return new_norm, new_layer


def _is_plain_block(block: nn.Module) -> bool:
    """Whether `Int8Block` computes what this block does: timm's pre-norm block without norms within the attention."""
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.attn.k_norm, nn.Identity)
        and isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity)
        and type(block.mlp) is TimmMlp
        and isinstance(block.mlp.act, nn.GELU)
        and isinstance(block.mlp.norm, nn.Identity)
    )


def _is_plain_convolution(layer: nn.Module) -> bool:
    """Whether `Int8Convolution` computes what this layer does."""
    return type(layer) is nn.Conv2d and (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")


def to_int8(module: nn.Module) -> None:
    """Replace every transformer block, MLP, linear layer and convolution below a module by its 8-bit form, in place."""
    for name, child in list(module.named_children()):
        if _is_plain_block(child):
            setattr(module, name, Int8Block(child))
        elif type(child) is Mlp and type(child.fc1) is nn.Linear:  # else its weights are bits already
            setattr(module, name, Int8Mlp(child))
        elif type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child))
        elif _is_plain_convolution(child):
            setattr(module, name, Int8Convolution(child))
        else:
            to_int8(child)

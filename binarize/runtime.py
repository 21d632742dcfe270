"""Packed layers: what computes on bits, made from a trained binary layer or filled from a file's tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels import operations, oracle
from binarize.linear import BinaryLinear


def bits_of_signs(signs: Tensor) -> Tensor:
    """Signs (rows, k) -> (rows, ceil(k / 8)) uint8, bit j of byte i is column 8 i + j, 1 for +1: the form in files."""
    padded = F.pad((signs >= 0).to(torch.uint8), (0, -signs.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=signs.device)).sum(dim=-1, dtype=torch.uint8)


def words_of_bytes(bits: Tensor, features: int) -> Tensor:
    """The file's bytes (rows, ceil(k / 8)) as the kernels' words (rows, words) int32."""
    return F.pad(bits, (0, 4 * oracle.words_of(features) - bits.shape[1])).contiguous().view(torch.int32)


class PackedLinear(nn.Module):
    """A binary linear layer on bits: y = scale * (signs of the input . signs of the weights) + bias.

    `threshold` (in,) is where the input turns into bits; who packs the input applies it. It is None behind a
    `FoldedLinear`, which contains it.
    """

    def __init__(self, layer: BinaryLinear, follows_folded: bool = False):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bits", bits_of_signs(layer.weight_signs().detach()))
        self.register_buffer("threshold", None if follows_folded else layer.threshold.detach().clone())
        self.register_buffer("scale", layer.output_scale().detach())
        self.register_buffer("bias", layer.bias.detach().clone())
        self._panels = None

    def prepare_weights(self) -> None:
        """Lay the weights out as the kernels read them."""
        self._panels = oracle.panels_of(words_of_bytes(self.bits, self.in_features))

    @property
    def operands(self) -> list[Tensor]:
        """What the kernels need: panels, scale, bias."""
        return [self._panels, self.scale, self.bias]

    def forward(self, bits: Tensor, residual: Tensor | None = None) -> Tensor:
        """Bits (rows, words) -> (rows, out), plus the residual."""
        return operations.linear(bits, self._panels, self.in_features, self.scale, self.bias, residual)


class FoldedLinear(nn.Module):
    """fc1 of a binary MLP with all that follows it up to the bits of fc2: scale, bias, GELU and fc2's threshold.

    Every one of the in + 1 possible products is put through the float formula at export. The output bit is 0 on one interval
    of mismatch counts, because GELU falls once and then rises: two integers per channel replace the rest. (In its flat left
    tail float32's GELU wavers: there, counts within 2e-6 of the threshold may fall on its other side.)
    """

    def __init__(self, layer: BinaryLinear, following: BinaryLinear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        low, span = fold(layer, following)
        self.register_buffer("bits", bits_of_signs(layer.weight_signs().detach()))
        self.register_buffer("threshold", layer.threshold.detach().clone())
        self.register_buffer("low", low)
        self.register_buffer("span", span)
        self._panels = None

    prepare_weights = PackedLinear.prepare_weights

    @property
    def operands(self) -> list[Tensor]:
        """What the kernels need: panels, low, span."""
        return [self._panels, self.low, self.span]

    def forward(self, bits: Tensor) -> Tensor:
        """Bits (rows, words) -> bits (rows, words of out)."""
        return operations.linear_to_bits(bits, self._panels, self.in_features, self.low, self.span)


@torch.no_grad()
def fold(layer: BinaryLinear, following: BinaryLinear) -> tuple[Tensor, Tensor]:
    """(low, span), both (out,) int32: the next layer's bit is 0 where low <= mismatches <= low + span."""
    mismatches = torch.arange(layer.in_features + 1, device=layer.weight.device)
    products = (layer.in_features - 2 * mismatches).float()
    hidden = F.gelu(products * layer.output_scale().unsqueeze(1) + layer.bias.unsqueeze(1))  # (out, in + 1)
    scale = following.log_activation_scale.exp()
    zero = (hidden - following.threshold.unsqueeze(1)) / scale < 0
    first = zero.int().argmax(dim=1)
    last = layer.in_features - zero.flip(1).int().argmax(dim=1)
    any_zero = zero.any(dim=1)
    beyond = torch.full_like(first, layer.in_features + 1)  # no count is ever there
    low = torch.where(any_zero, first, beyond)
    span = torch.where(any_zero, last - first, torch.zeros_like(first))
    return low.to(torch.int32), span.to(torch.int32)


class WeightOnlyLinear(nn.Module):
    """A layer of 1-bit weights and float inputs: small in the file, unpacked to float at load, no faster than float."""

    def __init__(self, layer: BinaryLinear):
        super().__init__()
        self.in_features = layer.in_features
        self.register_buffer("bits", bits_of_signs(layer.weight_signs().detach()))
        self.register_buffer("alpha", layer.output_scale().detach().clone())
        self.register_buffer("bias", layer.bias.detach().clone())
        self._weight = None

    def prepare_weights(self) -> None:
        """Unpack the weights."""
        signs = oracle.unpack_signs(words_of_bytes(self.bits, self.in_features), self.in_features)
        self._weight = self.alpha.unsqueeze(1) * signs

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self._weight, self.bias)


def prepare_modules(detector: nn.Module) -> None:
    """Let every module derive what it computes with from what is stored; needed again after a move to another device."""
    for module in detector.modules():
        if hasattr(module, "prepare_weights"):
            module.prepare_weights()

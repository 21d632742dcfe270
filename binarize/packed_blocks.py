"""Decoder blocks on bits, made from a trained binary network's, and how a whole detector gets them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels import block_operations, operations
from binarize.linear import BinaryLinear
from binarize.runtime import FoldedLinear, PackedLinear, WeightOnlyLinear
from models.detector import Detector
from models.layers import (
    DecoderBlock,
    LinearSelfAttention,
    Mlp,
    PrototypeDecoderBlock,
    merge_heads,
    softmax_map,
    split_heads,
)
from models.state_space import StateSpaceBlock


class PackedBlock(nn.Module):
    """What packed decoder blocks share: `norm2`, the packed `proj`, and `mlp`, packed or not.

    With `fused` several layers are one operator; without, every packed layer is called, with the same result, so that hooks
    see its bits.
    """

    norm2: nn.LayerNorm
    proj: PackedLinear
    mlp: nn.Module
    fused = True

    def after_attention(self, bits: Tensor, residual: Tensor | None) -> Tensor:
        """Bits of the attention (rows, words) -> x = proj (+ residual), then x + MLP of its norm, (rows, C)."""
        norm, mlp = self.norm2, self.mlp
        if not isinstance(mlp, PackedMlp):
            x = self.proj(bits, residual)
            return x + mlp(norm(x))
        if self.fused:
            affine = [norm.weight, norm.bias, mlp.fc1.threshold]
            return block_operations.project_and_transform(
                bits, self.proj.operands, residual, affine, norm.eps, mlp.fc1.operands, mlp.fc2.operands
            )
        x = self.proj(bits, residual)
        return mlp(_normed_bits(x, norm, mlp.fc1.threshold), x)


class PackedPrototypeBlock(PackedBlock):
    """INP-Former's decoder block on bits: the norm, the threshold and the packing before each layer are one pass."""

    def __init__(self, block: PrototypeDecoderBlock):
        super().__init__()
        attention = block.attn
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.q, self.kv, self.proj = PackedLinear(attention.q), PackedLinear(attention.kv), PackedLinear(attention.proj)
        self.register_buffer("head_scale", attention.learn_scale.detach().flatten().clone())
        sab = attention.sab
        share = None if sab is None else sab.threshold_share(attention.q.alpha).detach().flatten()
        gated = sab is not None and sab.mode == "mixed"
        self.register_buffer("share", share)
        self.register_buffer("gate_slope", sab.gate_slope.detach().flatten().clone() if gated else None)
        self.register_buffer("gate_middle", sab.gate_middle.detach().flatten().clone() if gated else None)
        self.mlp = _packed_mlp(block.mlp)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """Tokens (B, N, C) and prototypes (B, M, C) -> (B, N, C)."""
        query = self.q(_normed_bits(tokens, self.norm1, self.q.threshold)).view_as(tokens)
        projected = self.kv(_normed_bits(prototypes, self.norm1, self.kv.threshold)).unflatten(0, prototypes.shape[:2])
        gates = (self.head_scale, self.share, self.gate_slope, self.gate_middle)
        bits = operations.prototype_attention(query, projected, *gates, self.proj.threshold)
        return self.after_attention(bits, None).view_as(tokens)


class PackedDecoderBlock(PackedBlock):
    """Dinomaly's decoder block on bits; linear attention is one pass, softmax attention plain torch."""

    def __init__(self, block: DecoderBlock):
        super().__init__()
        attention = block.attn
        self.num_heads = attention.num_heads
        self.is_linear = isinstance(attention, LinearSelfAttention)
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.proj = PackedLinear(attention.qkv), PackedLinear(attention.proj)
        self.sab = None if self.is_linear else attention.sab
        share = None if self.sab is None else self.sab.threshold_share(attention.query_alpha()).detach()
        self.register_buffer("share", share)
        self.mlp = _packed_mlp(block.mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        bits = self._attended_bits(_normed_bits(tokens, self.norm1, self.qkv.threshold), tokens.shape[:2])
        return self.after_attention(bits, tokens.flatten(0, 1)).view_as(tokens)

    def _attended_bits(self, bits: Tensor, shape: torch.Size) -> Tensor:
        """Bits of the normed tokens of `shape` (B, N) -> bits of the attention."""
        sizes = (shape[1], self.num_heads, self.proj.threshold)
        if self.is_linear and self.fused:
            return block_operations.project_and_attend(bits, *self.qkv.operands, *sizes)
        projected = self.qkv(bits)
        if self.is_linear:
            return operations.linear_attention(projected, *sizes)
        return operations.pack(self._softmax_attention(projected.unflatten(0, shape)), self.proj.threshold)

    def _softmax_attention(self, projected: Tensor) -> Tensor:
        """Projections (B, N, 3C) -> (B * N, C), as `BinarySoftmaxAttention`."""
        query, key, value = (split_heads(part, self.num_heads) for part in projected.chunk(3, dim=-1))
        if self.sab is None:
            heads = F.scaled_dot_product_attention(query, key, value)
        else:
            heads = self.sab.mix(softmax_map(query, key), self.share, self.share.new_ones(())) @ value
        return merge_heads(heads).flatten(0, 1)


class FusedLinearAttention(nn.Module):
    """Linear attention in one pass between two layers that take and give floats."""

    def __init__(self, attention: LinearSelfAttention):
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, tokens: Tensor) -> Tensor:
        projected = self.qkv(tokens).flatten(0, 1)
        return self.proj(operations.linear_attention(projected, tokens.shape[1], self.num_heads, None).view_as(tokens))


class PackedMlp(nn.Module):
    """Binary MLP whose hidden layer exists as bits only."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1 = FoldedLinear(mlp.fc1, mlp.fc2)
        self.fc2 = PackedLinear(mlp.fc2, follows_folded=True)

    def forward(self, bits: Tensor, residual: Tensor) -> Tensor:
        """Bits of the normed input, and the input itself (rows, C) -> (rows, C)."""
        return self.fc2(self.fc1(bits), residual)


class OnBits(nn.Module):
    """Packed layers one after the other, between neighbours that give and take floats (..., channels)."""

    def __init__(self, *layers: PackedLinear | FoldedLinear):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        bits = operations.pack(inputs.reshape(-1, inputs.shape[-1]), self.layers[0].threshold)
        for layer in self.layers:
            bits = layer(bits)
        return bits.view(*inputs.shape[:-1], -1)


def _packed_mlp(mlp: Mlp) -> nn.Module:
    return PackedMlp(mlp) if isinstance(mlp.fc1, BinaryLinear) else mlp


def _normed_bits(tokens: Tensor, norm: nn.LayerNorm, threshold: Tensor) -> Tensor:
    flat = tokens.reshape(-1, tokens.shape[-1])
    return operations.layer_norm_pack(flat, norm.weight, norm.bias, norm.eps, threshold)


_PACKED_BLOCKS = {PrototypeDecoderBlock: PackedPrototypeBlock, DecoderBlock: PackedDecoderBlock}


def pack_modules(detector: Detector) -> None:
    """Replace everything binary in a detector by its packed form, in place; `prepare_modules` must follow."""
    for index, block in enumerate(detector.decoder):
        if isinstance(block, StateSpaceBlock):
            _pack_state_space(block)
        elif _is_on_bits(block.attn.proj):
            detector.decoder[index] = _PACKED_BLOCKS[type(block)](block)
    for module in list(detector.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BinaryLinear):
                setattr(module, name, WeightOnlyLinear(child))
    fuse_linear_attention(detector)


def _pack_state_space(block: StateSpaceBlock) -> None:
    """The scan and all else stays float: each packed layer turns its own inputs into bits."""
    for name in ("in_proj", "out_proj"):
        if _is_on_bits(getattr(block, name)):
            setattr(block, name, OnBits(PackedLinear(getattr(block, name))))
    if block.mlp is not None and _is_on_bits(block.mlp.fc1):
        packed = _packed_mlp(block.mlp)
        block.mlp = OnBits(packed.fc1, packed.fc2)


def _is_on_bits(layer: nn.Module) -> bool:
    return isinstance(layer, BinaryLinear) and layer.options.activation_bits == 1


def fuse_linear_attention(detector: Detector) -> None:
    """Give every linear attention between float layers its fused form, in place."""
    for block in detector.decoder:
        if isinstance(getattr(block, "attn", None), LinearSelfAttention):
            block.attn = FusedLinearAttention(block.attn)

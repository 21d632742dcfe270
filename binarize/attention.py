"""Binary attention: 1-bit projections and a partly binary attention map (softmax-aware binarization, SAB)."""

import torch
from torch import Tensor, nn

from binarize.linear import BinarizationOptions, BinaryLinear
from models.layers import PrototypeAttention, SoftmaxSelfAttention, softmax_map

_THRESHOLD_SHARE = 0.25  # of the row maximum (BiViT, He et al. 2023)
_SCALE_DRIFT_LIMITS = (0.5, 2.0)
# initial k and m: at the start no row is more than half binary (docs/RESULTS.md compares with m = 0.5)
_GATE_SLOPE, _GATE_MIDDLE = 4.0, 1.0
_SMALLEST_SCALE = 1e-6


class SoftmaxAwareBinarization(nn.Module):
    """Replaces a non-negative attention map A (B, h, N, M) by a gated mixture of itself and a scaled binary map.

    r = row maximum; tau = lambda r with lambda = 0.25 clamp(mean alpha of the head / its value at conversion, 0.5, 2);
    B = [A >= tau and r > 0]; c = sum(A B) / sum(B), the least-squares scale of the row; g = sigmoid(k (r / s - m)) with
    k, m learned per head and s the head's scale; result (1 - g) A + g c B, the gradient of B straight through A.

    Args:
        alpha: scales of the query projection, (h * d,), at conversion.
        mode: "mixed", or "binary" for g = 1.
    """

    def __init__(self, alpha: Tensor, num_heads: int, mode: str):
        super().__init__()
        self.mode = mode
        self.gate_slope = nn.Parameter(torch.full((num_heads, 1, 1), _GATE_SLOPE))  # k
        self.gate_middle = nn.Parameter(torch.full((num_heads, 1, 1), _GATE_MIDDLE))  # m
        self.register_buffer("alpha_at_conversion", _head_means(alpha, num_heads))
        self.forced_gate: float | None = None  # evaluation only: replaces g
        self.mean_gate: Tensor | None = None  # of the last forward pass: the share of the map that is binary

    def scale_parameters(self) -> list[nn.Parameter]:
        """Gate parameters: trained without weight decay."""
        return [self.gate_slope, self.gate_middle]

    def gate(self, row_maximum: Tensor, scale: Tensor) -> Tensor:
        """Confidence gate g (B, h, N, 1) of row maxima (B, h, N, 1), for head scales (h, 1, 1)."""
        if self.forced_gate is not None:
            return torch.full_like(row_maximum, self.forced_gate)
        if self.mode == "binary":
            return torch.ones_like(row_maximum)
        relative = row_maximum / scale.abs().clamp_min(_SMALLEST_SCALE)
        return torch.sigmoid(self.gate_slope * (relative - self.gate_middle))

    def threshold_share(self, alpha: Tensor) -> Tensor:
        """lambda (h, 1, 1) for scales alpha (h * d,) of the query projection."""
        drift = _head_means(alpha, self.gate_slope.shape[0]) / self.alpha_at_conversion.clamp_min(_SMALLEST_SCALE)
        return _THRESHOLD_SHARE * drift.detach().clamp(*_SCALE_DRIFT_LIMITS)

    def forward(self, attention_map: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
        return self.mix(attention_map, self.threshold_share(alpha), scale)

    def mix(self, attention_map: Tensor, share: Tensor, scale: Tensor) -> Tensor:
        """The result for shares lambda (h, 1, 1)."""
        row_maximum = attention_map.amax(dim=-1, keepdim=True)
        with torch.no_grad():
            chosen = ((attention_map >= share * row_maximum) & (row_maximum > 0)).to(attention_map.dtype)
        row_scale = (attention_map * chosen).sum(dim=-1, keepdim=True) / chosen.sum(dim=-1, keepdim=True).clamp_min(1)
        straight_through = chosen + attention_map - attention_map.detach()
        gate = self.gate(row_maximum, scale)
        self.mean_gate = gate.detach().mean()
        return (1 - gate) * attention_map + gate * row_scale * straight_through


def _head_means(alpha: Tensor, num_heads: int) -> Tensor:
    return alpha.detach().reshape(num_heads, 1, -1).mean(dim=-1, keepdim=True)  # (h, 1, 1)


def _gates(alpha: Tensor, num_heads: int, options: BinarizationOptions) -> SoftmaxAwareBinarization | None:
    """For scales alpha (h * d,) of the query projection; None with `sab` off."""
    return None if options.sab == "off" else SoftmaxAwareBinarization(alpha, num_heads, options.sab).to(alpha.device)


class BinaryPrototypeAttention(PrototypeAttention):
    """Prototype attention with 1-bit q, kv and proj; the products q.k and attention.v stay float."""

    def __init__(self, attention: PrototypeAttention, options: BinarizationOptions):
        nn.Module.__init__(self)  # takes over the layers of `attention` instead of making new ones
        self.num_heads = attention.num_heads
        self.learn_scale = attention.learn_scale
        self.q, self.kv, self.proj = (
            BinaryLinear.from_linear(layer, options) for layer in (attention.q, attention.kv, attention.proj)
        )
        self.sab = _gates(self.q.alpha, self.num_heads, options)

    def attention_map(self, query: Tensor, key: Tensor) -> Tensor:
        attention_map = super().attention_map(query, key)
        return attention_map if self.sab is None else self.sab(attention_map, self.q.alpha, self.learn_scale)


class BinarySoftmaxAttention(SoftmaxSelfAttention):
    """Softmax self-attention with 1-bit qkv and proj; the products q.k and attention.v stay float."""

    def __init__(self, attention: SoftmaxSelfAttention, options: BinarizationOptions):
        nn.Module.__init__(self)  # takes over the layers of `attention` instead of making new ones
        self.num_heads = attention.num_heads
        self.qkv, self.proj = (BinaryLinear.from_linear(layer, options) for layer in (attention.qkv, attention.proj))
        self.sab = _gates(self.query_alpha(), self.num_heads, options)

    def query_alpha(self) -> Tensor:
        """Scales of the query projection, (C,): the first third of qkv's."""
        return self.qkv.alpha.chunk(3)[0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.sab is None:
            return super().attend(query, key, value)
        attention_map = softmax_map(query, key)
        return self.sab(attention_map, self.query_alpha(), attention_map.new_ones(())) @ value

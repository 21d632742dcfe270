"""Building blocks of the reconstruction networks. B images, N tokens, M prototypes, C channels, h heads of d channels."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-8  # of the INP-Former and Dinomaly decoders (the encoder has 1e-6)
LINEAR_ATTENTION_EPS = 1e-8  # added to the normaliser, which is 0 where all queries or keys underflow


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, d)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, C)."""
    return heads.transpose(1, 2).flatten(2)


def positive_features(values: Tensor) -> Tensor:
    """phi(u) = ELU(u) + 1 > 0, in the form e^min(u, 0) + ReLU(u), which does not cancel for negative u."""
    return values.clamp_max(0).exp() + F.relu(values)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """phi(q_t)^T (sum_s phi(k_s) v_s^T) / (phi(q_t) . sum_s phi(k_s)) for (B, h, N, d) each.

    Computed in float32, returned in the values' type, without a scale 1 / sqrt(d). The cost grows with N d^2 instead of N^2 d
    (Katharopoulos et al. 2020; Dinomaly, decoder).
    """
    with _without_autocast(query):  # sums over all tokens
        query, key = positive_features(query.float()), positive_features(key.float())
        summary = key.transpose(-2, -1) @ value.float()  # (B, h, d, d)
        normaliser = query @ key.sum(dim=-2).unsqueeze(-1) + LINEAR_ATTENTION_EPS  # (B, h, N, 1)
        return (query @ summary / normaliser).to(value.dtype)


class Mlp(nn.Module):
    """Linear C -> 4C, GELU, Linear 4C -> C, with biases; `dropout`, at first 0, acts before each layer and after the last."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(self.dropout(tokens)))
        return self.dropout(self.fc2(self.dropout(hidden)))


class CrossAttention(nn.Module):
    """Softmax attention of queries (B, M, C) over tokens (B, N, C)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each head makes of its projections, all (B, h, tokens, d)."""
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        query = split_heads(self.q(queries), self.num_heads)
        key, value = (split_heads(part, self.num_heads) for part in self.kv(tokens).chunk(2, dim=-1))
        return self.proj(merge_heads(self.attend(query, key, value)))


class PrototypeAttention(CrossAttention):
    """Attention of tokens over prototypes by ReLU(s * cosine): no softmax, no row normalisation (INP-Former, decoder)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.learn_scale = nn.Parameter(torch.ones(num_heads, 1, 1))

    def attention_map(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, h, N, d) and (B, h, M, d) -> (B, h, N, M), every entry between 0 and the head's scale."""
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return F.relu(self.learn_scale * cosine)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention_map(query, key) @ value


class PrototypeExtractorBlock(nn.Module):
    """Learnable queries read an image's tokens and become its intrinsic normal prototypes; one norm serves both sides."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = queries + self.attn(self.norm1(queries), self.norm1(tokens))
        return queries + self.mlp(self.norm2(queries))


class PrototypeDecoderBlock(nn.Module):
    """Rewrites every token from the prototypes alone: the attention has no residual, so a defect cannot slip through."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = PrototypeAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        tokens = self.attn(self.norm1(tokens), self.norm1(prototypes))
        return tokens + self.mlp(self.norm2(tokens))


class SelfAttention(nn.Module):
    """Attention of tokens (B, N, C) over themselves; subclasses say how queries, keys and values meet."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each head makes of its projections, all (B, h, N, d)."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        return self.proj(merge_heads(self.attend(query, key, value)))


class LinearSelfAttention(SelfAttention):
    """Self-attention whose cost is linear in the number of tokens: it cannot focus on single ones (Dinomaly, decoder)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(query, key, value)


def softmax_map(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of q . k / sqrt(d): (B, h, N, d) twice -> (B, h, N, N), rows with sum 1."""
    return (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)


class SoftmaxSelfAttention(SelfAttention):
    """Self-attention by softmax."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with a residual around attention and MLP (Dinomaly, decoder)."""

    def __init__(self, dim: int, attention: SelfAttention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

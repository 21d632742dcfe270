"""Building blocks of the reconstruction networks. B images, N tokens, M prototypes, C channels, h heads of d channels."""

import torch.nn.functional as F
from torch import Tensor, nn, ones

LAYER_NORM_EPS = 1e-8  # of the INP-Former and Dinomaly decoders (the encoder has 1e-6)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, d)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, C)."""
    return heads.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear C -> 4C, GELU, Linear 4C -> C, with biases."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


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
        self.learn_scale = nn.Parameter(ones(num_heads, 1, 1))

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

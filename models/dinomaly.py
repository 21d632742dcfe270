"""Dinomaly (Guo et al., CVPR 2025): rebuild features through a noisy bottleneck with attention that cannot focus."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import FrozenEncoder
from models.layers import LAYER_NORM_EPS, DecoderBlock, LinearSelfAttention, Mlp, SoftmaxSelfAttention
from models.losses import hard_mining_loss
from models.reconstruction import DECODER_DEPTH, ReconstructionDetector, group_means, initialise_decoder

MINING_WARMUP = 1000
ATTENTIONS = {"linear": LinearSelfAttention, "softmax": SoftmaxSelfAttention}


@dataclass(frozen=True)
class DinomalyOptions:
    """The network, where the authors vary it; the defaults are theirs.

    Attributes:
        decoder_attention: `linear` or `softmax`.
        groups: compare the mean of all eight layers (1), or of the lower and the upper four (2).
        remove_class_token: keep class and register tokens out of bottleneck and decoder.
        recentre: rebuild the layer norm of patch - class token instead of the patch (Dinomaly2).
    """

    decoder_attention: str = "linear"
    groups: int = 2
    remove_class_token: bool = False
    recentre: bool = False

    def __post_init__(self):
        if self.groups not in (1, 2):
            raise ValueError(f"{self.groups} groups, not 1 or 2")


@dataclass(frozen=True)
class DinomalyTraining:
    """What makes the reconstruction hard, in training only.

    Attributes:
        bottleneck_dropout: rate, at all three places of the bottleneck.
        mining_final: share of the tokens that counts as easy, after the warm-up.
        mining_warmup: iterations in which that share grows from 0; None: 1000, at most a fifth of the training.
        mining_factor: what the gradient of easy tokens is multiplied by.
    """

    bottleneck_dropout: float = 0.2
    mining_final: float = 0.9
    mining_warmup: int | None = None
    mining_factor: float = 0.1

    def mined_share(self, iteration: int, total_iterations: int) -> float:
        """Share of easy tokens in a 0-based iteration."""
        warmup = min(MINING_WARMUP, total_iterations // 5) if self.mining_warmup is None else self.mining_warmup
        return self.mining_final * min(1, iteration / warmup) if warmup else self.mining_final


class Dinomaly(ReconstructionDetector):
    """Frozen encoder, noisy bottleneck and a decoder of pre-norm blocks; its last blocks rebuild the encoder's lower taps.

    The features hold the class token and the registers before the patches, (B, 2, P + N, C); they pass through the decoder
    and are left out of loss and map.

    Args:
        encoder: frozen ViT with C channels.
        num_heads: attention heads of the decoder.
    """

    def __init__(self, encoder: FrozenEncoder, num_heads: int, options: DinomalyOptions):
        super().__init__(encoder)
        self.options = options
        dim, attention = encoder.embed_dim, ATTENTIONS[options.decoder_attention]
        self.bottleneck = nn.ModuleList([Mlp(dim)])
        self.decoder = nn.ModuleList([DecoderBlock(dim, attention(dim, num_heads)) for _ in range(DECODER_DEPTH)])
        for part in (self.bottleneck, self.decoder):
            initialise_decoder(part)
        self.train_with(DinomalyTraining())

    def train_with(self, training: DinomalyTraining) -> None:
        """Set dropout and mining; mining starts at its first iteration."""
        self.training_options = training
        self._mined_share = 0.0
        for layer in self.bottleneck:
            layer.dropout.p = training.bottleneck_dropout

    def begin_iteration(self, iteration: int, total_iterations: int) -> None:
        self._mined_share = self.training_options.mined_share(iteration, total_iterations)

    def encode(self, images: Tensor) -> Tensor:
        return group_means(self.encoder(images, with_prefix=True)).float()

    def feature_identity(self) -> dict[str, object]:
        return {"prefix_tokens": self.encoder.prefix_tokens}

    def fuse(self, features: Tensor) -> Tensor:
        fused = super().fuse(features)
        return self._patches(fused) if self.options.remove_class_token else fused

    def grouped(self, outputs: list[Tensor]) -> Tensor:
        means = group_means(outputs, self.options.groups)
        return means if self.options.remove_class_token else self._patches(means)

    def target(self, features: Tensor) -> Tensor:
        """Features (B, 2, P + N, C) -> patches (B, groups, N, C), as they are or relative to the class token."""
        if self.options.groups == 1:
            features = features.mean(dim=1, keepdim=True)
        patches = self._patches(features)
        if not self.options.recentre:
            return patches
        class_token = features[..., :1, :]
        return F.layer_norm(patches - class_token, (self.encoder.embed_dim,), eps=LAYER_NORM_EPS)

    def training_loss(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean hard mining loss of the groups (+ distillation, if a teacher is set)."""
        features = self.features_of(inputs)
        reconstruction = self.reconstruct(features)
        groups = zip(self.target(features).unbind(1), reconstruction.float().unbind(1), strict=True)
        mining = [hard_mining_loss(*group, self._mined_share, self.training_options.mining_factor) for group in groups]
        losses = {
            "reconstruction": torch.stack(mining).mean(),
            **self.distillation_loss(features, reconstruction),
        }
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    def _patches(self, tokens: Tensor) -> Tensor:
        return tokens[..., self.encoder.prefix_tokens :, :]

"""INP-Former (Luo et al., CVPR 2025): rebuild an image's features from its own normal prototypes."""

import torch
from torch import Tensor, nn

from models.encoder import FrozenEncoder
from models.layers import Mlp, PrototypeDecoderBlock, PrototypeExtractorBlock
from models.losses import nearest_prototype_distance, prototype_coherence_loss, soft_mining_loss
from models.reconstruction import DECODER_DEPTH, ReconstructionDetector, enlarged, initialise_decoder

COHERENCE_WEIGHT = 0.2


class INPFormer(ReconstructionDetector):
    """Frozen encoder, prototype extractor, bottleneck and prototype-guided decoder.

    Module names are those of the published checkpoints: `aggregation` extracts the prototypes.

    Args:
        encoder: frozen ViT with C channels.
        num_heads: attention heads of extractor and decoder.
        prototype_count: number M of prototypes per image (`--INP_num`).
    """

    def __init__(self, encoder: FrozenEncoder, num_heads: int, prototype_count: int):
        super().__init__(encoder)
        dim = encoder.embed_dim
        self.bottleneck = nn.ModuleList([Mlp(dim)])
        self.aggregation = nn.ModuleList([PrototypeExtractorBlock(dim, num_heads)])
        self.decoder = nn.ModuleList([PrototypeDecoderBlock(dim, num_heads) for _ in range(DECODER_DEPTH)])
        self.prototype_token = nn.Parameter(torch.randn(prototype_count, dim))
        for part in (self.bottleneck, self.aggregation, self.decoder):
            initialise_decoder(part)

    def prototypes(self, tokens: Tensor) -> Tensor:
        """Intrinsic normal prototypes (B, M, C) of fused tokens (B, N, C)."""
        queries = self.prototype_token.expand(len(tokens), -1, -1)
        for block in self.aggregation:
            queries = block(queries, tokens)
        return queries

    def context(self, fused: Tensor) -> tuple[Tensor, ...]:
        return (self.prototypes(fused),)

    @torch.no_grad()
    def prototype_map(self, inputs: Tensor) -> Tensor:
        """Distance of every fused token to its nearest prototype as a map like `anomaly_map`; the decoder has no part.

        For categories that the decoder was not trained on (INP-Former, zero-shot).
        """
        fused = self.fuse(self.features_of(inputs))
        distance = nearest_prototype_distance(fused.float(), self.prototypes(fused).float())
        return enlarged(distance.unsqueeze(1), self.encoder.patch_size)

    def training_loss(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean soft mining loss of the two groups + 0.2 x prototype coherence (+ distillation, if a teacher is set)."""
        features = self.features_of(inputs)
        fused = self.fuse(features)
        prototypes = self.prototypes(fused)
        reconstruction = self.decode(self.through_bottleneck(fused), (prototypes,))
        groups = zip(features.unbind(1), reconstruction.float().unbind(1), strict=True)
        losses = {
            "reconstruction": torch.stack([soft_mining_loss(target, rebuilt) for target, rebuilt in groups]).mean(),
            "coherence": COHERENCE_WEIGHT * prototype_coherence_loss(fused, prototypes.float()),
            **self.distillation_loss(features, reconstruction),
        }
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

"""Detectors that rebuild an encoder's features and look where that fails: shared by INP-Former and Dinomaly."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detector import Detector
from models.encoder import FrozenEncoder
from models.losses import cosine_distance

DECODER_DEPTH = 8
_DECODER_INIT_STD = 0.01
_DECODER_INIT_LIMIT = 0.03


def initialise_decoder(module: nn.Module) -> None:
    """Truncated normal weights (std 0.01, cut at +-0.03) and zero biases for every Linear below `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=_DECODER_INIT_STD, a=-_DECODER_INIT_LIMIT, b=_DECODER_INIT_LIMIT)
            nn.init.zeros_(layer.bias)


def group_means(layers: list[Tensor], groups: int = 2) -> Tensor:
    """Means of equal, neighbouring parts of a list of token maps (B, N, C): (B, groups, N, C)."""
    size = len(layers) // groups
    return torch.stack([torch.stack(layers[start : start + size]).mean(dim=0) for start in range(0, len(layers), size)], dim=1)


def enlarged(distances: Tensor, patch_size: int) -> Tensor:
    """Token distances (B, K, N) -> the mean of the K maps at the input's resolution (B, H, W), bilinear."""
    grid = math.isqrt(distances.shape[-1])
    size = grid * patch_size
    maps = F.interpolate(distances.unflatten(-1, (grid, grid)), size=(size, size), mode="bilinear", align_corners=True)
    return maps.mean(dim=1)


class ReconstructionDetector(Detector):
    """Means of encoder taps are the target, means of decoder blocks (last block first) the reconstruction.

    The features of an image are two means of taps, (B, 2, N, C) float32: all that follows is a function of them. A subclass
    makes `bottleneck` and `decoder`, lists of modules; the decoder's blocks also take what `context` returns.
    """

    bottleneck: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(self, encoder: FrozenEncoder):
        super().__init__()
        self.encoder = encoder
        self._teacher: tuple[ReconstructionDetector, ...] = ()  # in a tuple, so that it is no sub-module
        self._distillation_weight = 0.0

    def encode(self, images: Tensor) -> Tensor:
        return group_means(self.encoder(images)).float()

    def fuse(self, features: Tensor) -> Tensor:
        """What enters the bottleneck, (B, N, C): the mean of the two group means is the mean of the eight taps."""
        return features.mean(dim=1)

    def context(self, fused: Tensor) -> tuple[Tensor, ...]:
        """What the decoder's blocks see beside the tokens."""
        return ()

    def through_bottleneck(self, fused: Tensor) -> Tensor:
        """(B, N, C) -> the decoder's input (B, N, C)."""
        for layer in self.bottleneck:
            fused = layer(fused)
        return fused

    def decode(self, tokens: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """The decoder's input (B, N, C) -> means of its blocks' outputs, the last block first (B, K, N, C)."""
        outputs = []
        for block in self.decoder:
            tokens = block(tokens, *context)
            outputs.append(tokens)
        return self.grouped(outputs[::-1])

    def grouped(self, outputs: list[Tensor]) -> Tensor:
        """Outputs of the decoder's blocks as they are compared with the target."""
        return group_means(outputs)

    def target(self, features: Tensor) -> Tensor:
        """Features -> what is rebuilt of them (B, K, N, C)."""
        return features

    def reconstruct(self, features: Tensor) -> Tensor:
        """Features -> the reconstruction of their target (B, K, N, C)."""
        fused = self.fuse(features)
        return self.decode(self.through_bottleneck(fused), self.context(fused))

    def distil_from(self, teacher: "ReconstructionDetector", weight: float) -> None:
        """Add `weight` x the per-token cosine distance to a frozen teacher's reconstruction to the training loss."""
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self._distillation_weight = weight

    def distillation_loss(self, features: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Weighted distance to the teacher's reconstruction under its name, nothing without a teacher."""
        if not self._teacher:
            return {}
        with torch.no_grad():
            goal = self._teacher[0].reconstruct(features)
        return {"distillation": self._distillation_weight * cosine_distance(goal.float(), reconstruction.float()).mean()}

    @torch.no_grad()
    def anomaly_map(self, inputs: Tensor) -> Tensor:
        features = self.features_of(inputs)
        distances = cosine_distance(self.target(features).float(), self.reconstruct(features).float())
        return enlarged(distances, self.encoder.patch_size)

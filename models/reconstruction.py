"""Detectors that rebuild an encoder's features and look where that fails: shared by INP-Former and Dinomaly."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detector import Detector
from models.encoder import FrozenEncoder
from models.losses import cosine_distance

_DECODER_INIT_STD = 0.01
_DECODER_INIT_LIMIT = 0.03


def initialise_decoder(module: nn.Module) -> None:
    """Truncated normal weights (std 0.01, cut at +-0.03) and zero biases for every Linear below `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=_DECODER_INIT_STD, a=-_DECODER_INIT_LIMIT, b=_DECODER_INIT_LIMIT)
            nn.init.zeros_(layer.bias)


def group_means(layers: list[Tensor]) -> Tensor:
    """Means of the first and of the second half of a list of token maps (B, N, C): (B, 2, N, C)."""
    half = len(layers) // 2
    return torch.stack([torch.stack(part).mean(dim=0) for part in (layers[:half], layers[half:])], dim=1)


class ReconstructionDetector(Detector):
    """Two means of encoder taps are the target, two means of decoder blocks (last block first) the reconstruction.

    The features of an image are those two target means, (B, 2, N, C) float32: all that follows is a function of them.
    """

    def __init__(self, encoder: FrozenEncoder):
        super().__init__()
        self.encoder = encoder
        self._teacher: tuple[ReconstructionDetector, ...] = ()  # in a tuple, so that it is no sub-module
        self._distillation_weight = 0.0

    def encode(self, images: Tensor) -> Tensor:
        return group_means(self.encoder(images)).float()

    @abstractmethod
    def reconstruct(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2, N, C) -> their reconstruction (B, 2, N, C) and the prototypes or other by-product."""

    def distil_from(self, teacher: "ReconstructionDetector", weight: float) -> None:
        """Add `weight` x the per-token cosine distance to a frozen teacher's reconstruction to the training loss."""
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self._distillation_weight = weight

    def distillation_loss(self, features: Tensor, reconstruction: Tensor) -> Tensor | None:
        """Weighted distance to the teacher's reconstruction, or None without a teacher."""
        if not self._teacher:
            return None
        with torch.no_grad():
            goal, _ = self._teacher[0].reconstruct(features)
        return self._distillation_weight * cosine_distance(goal.float(), reconstruction.float()).mean()

    def enlarged(self, distances: Tensor) -> Tensor:
        """Token distances (B, K, N) -> the mean of the K maps at the input's resolution (B, H, W), bilinear."""
        grid = math.isqrt(distances.shape[-1])
        size = grid * self.encoder.patch_size
        maps = F.interpolate(distances.unflatten(-1, (grid, grid)), size=(size, size), mode="bilinear", align_corners=True)
        return maps.mean(dim=1)

    @torch.no_grad()
    def anomaly_map(self, inputs: Tensor) -> Tensor:
        features = self.features_of(inputs)
        reconstruction, _ = self.reconstruct(features)
        return self.enlarged(cosine_distance(features.float(), reconstruction.float()))

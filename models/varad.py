"""VarAD: predict each token of a high-resolution image from far-away earlier ones; where that fails, there is the defect."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detector import Detector
from models.encoder import FrozenEncoder
from models.losses import cosine_distance
from models.reconstruction import enlarged
from models.state_space import DIRECTIONS, PRESETS, StateSpaceBlock

HIERARCHIES = (1, 2, 3)
ADAPTERS = ("none", "linear", "resblock", "lora", "lora+linear", "lora+resblock")
LOSSES = ("released", "l2")


@dataclass(frozen=True)
class VarADOptions:
    """The network, where the authors vary it and where it was found weak.

    Attributes:
        preset: form of the state-space block, one of `PRESETS`.
        directions: some of `DIRECTIONS`.
        hierarchies: which of the encoder's three taps are predicted.
        adapter: trained layer on the tokens, low-rank changes of the encoder itself, or both; one of `ADAPTERS`.
        zero_init_adapter: start it as the identity.
        m: how many rows before a token its prediction ends.
        pred_next_n: that distance in tokens for the first hierarchy, halved for each further (the release's 256); None: by m.
        d_state: states per channel; None: the preset's.
        learn_start: train the start tokens.
        standardise: maps relative to what is usual at a position, learned on normal images after the training.
    """

    preset: str = "released"
    directions: tuple[str, ...] = DIRECTIONS
    hierarchies: tuple[int, ...] = HIERARCHIES
    adapter: str = "linear"
    zero_init_adapter: bool = False
    m: float = 4.0
    pred_next_n: int | None = None
    d_state: int | None = None
    learn_start: bool = False
    standardise: bool = False

    def distance(self, hierarchy: int, grid: int) -> int:
        """M: tokens between the last one seen and the predicted one, in a map of grid x grid."""
        return int(self.m * grid) if self.pred_next_n is None else self.pred_next_n // 2 ** (hierarchy - 1)


@dataclass(frozen=True)
class VarADTraining:
    """What is minimised.

    Attributes:
        loss: `released` (1 - cosine over channels, plus 1 - cosine over positions) or `l2` (the paper's Eq. 9).
        detach_target: train the adapter through the predictions alone, not to be predictable.
        variance_floor: penalise a target whose tokens vary less; 0: never.
    """

    loss: str = "released"
    detach_target: bool = False
    variance_floor: float = 0.0


class ResidualBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU, 3x3 convolution, batch norm, added to the input, ReLU, on a token map (B, N, C)."""

    def __init__(self, dim: int, grid: int):
        super().__init__()
        self.grid = grid
        self.convolution1, self.norm1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.convolution2, self.norm2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        hidden = F.relu(self.norm1(self.convolution1(maps)))
        return F.relu(maps + self.norm2(self.convolution2(hidden))).flatten(2).transpose(1, 2)


class LinearAdapter(nn.Module):
    """phi(F) + F with phi one linear layer, at first random as in the release or, with `zero_init`, nothing."""

    def __init__(self, dim: int, zero_init: bool):
        super().__init__()
        self.phi = nn.Linear(dim, dim)
        if zero_init:
            nn.init.zeros_(self.phi.weight)
            nn.init.zeros_(self.phi.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.phi(tokens) + tokens


class LowRankQueryValue(nn.Module):
    """LoRA (Hu et al. 2022): what is added to a block's queries and values, of rank 3 and at first nothing."""

    RANK = 3

    def __init__(self, dim: int):
        super().__init__()
        for name in ("query", "value"):
            down, up = torch.empty(self.RANK, dim), torch.zeros(dim, self.RANK)
            self.register_parameter(f"{name}_down", nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5))))
            self.register_parameter(f"{name}_up", nn.Parameter(up))

    def added(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook of the layer that makes queries, keys and values of tokens."""
        query = F.linear(F.linear(inputs[0], self.query_down), self.query_up)
        value = F.linear(F.linear(inputs[0], self.value_down), self.value_up)
        return output + torch.cat([query, torch.zeros_like(query), value], dim=-1)


class VarAD(Detector):
    """Frozen encoder with three taps, an adapter and a state-space block for each (Cao et al., "VarAD", 2025).

    The features hold the patch tokens of the three taps after the encoder's final norm, (B, N, 3, C), not like images.

    Args:
        encoder: frozen ViT with three taps and C channels.

    Raises:
        ValueError: the prediction distance leaves nothing to predict from.
    """

    def __init__(self, encoder: FrozenEncoder, options: VarADOptions):
        super().__init__()
        self.encoder, self.options = encoder, options
        dim, grid = encoder.embed_dim, encoder.grid
        numbers = replace(PRESETS[options.preset], d_state=options.d_state or PRESETS[options.preset].d_state)
        self.lora = nn.ModuleList([LowRankQueryValue(dim) for _ in encoder.vit.blocks] if self.trains_encoder else [])
        self.adapters = nn.ModuleList([self._adapter(dim, grid) for _ in options.hierarchies])
        self.decoder = nn.ModuleList(
            [
                StateSpaceBlock(dim, grid, options.distance(hierarchy, grid), options.directions, numbers, options.learn_start)
                for hierarchy in options.hierarchies
            ]
        )
        if options.standardise:
            self.register_buffer("usual_error", torch.zeros(len(options.hierarchies), grid * grid))
            self.register_buffer("error_deviation", torch.ones(len(options.hierarchies), grid * grid))
        self.scan_backend = "auto"
        self.train_with(VarADTraining())

    @property
    def trains_encoder(self) -> bool:
        return "lora" in self.options.adapter

    @property
    def caches_features(self) -> bool:
        return not self.trains_encoder

    def _adapter(self, dim: int, grid: int) -> nn.Module:
        kind = self.options.adapter.removeprefix("lora+")
        if kind == "linear":
            return LinearAdapter(dim, self.options.zero_init_adapter)
        return ResidualBlock(dim, grid) if kind == "resblock" else nn.Identity()

    def train_with(self, training: VarADTraining) -> None:
        """Set the loss."""
        self.training_options = training

    def encode(self, images: Tensor) -> Tensor:
        if not self.trains_encoder:
            return torch.stack(self.encoder(images), dim=2)
        with ExitStack() as stack:  # for this pass alone: other detectors may share the encoder
            for block, change in zip(self.encoder.vit.blocks, self.lora, strict=True):
                stack.callback(block.attn.qkv.register_forward_hook(change.added).remove)
            return torch.stack(self.encoder(images, differentiable=True), dim=2)

    def feature_identity(self) -> dict[str, object]:
        return {"final_norm": self.encoder.final_norm}

    def parameters_without_decay(self) -> list[nn.Parameter]:
        """The scans' own, and all biases and norms."""
        vectors = [parameter for parameter in self.trainable_parameters() if parameter.ndim == 1]
        return [parameter for block in self.decoder for parameter in block.parameters_without_decay()] + vectors

    def targets_and_predictions(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per hierarchy the adapted tokens and their predictions, both (B, N, C) of length 1."""
        pairs = []
        for hierarchy, adapter, block in zip(self.options.hierarchies, self.adapters, self.decoder, strict=True):
            target = F.normalize(adapter(features[:, :, hierarchy - 1]).float(), dim=-1)
            pairs.append((target, F.normalize(block(target, self.scan_backend).float(), dim=-1)))
        return pairs

    def training_loss(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the hierarchies of the loss and of what the variance lacks; the parts also tell each target's variance."""
        pairs, options = self.targets_and_predictions(self.features_of(inputs)), self.training_options
        variances = [token_variance(target) for target, _ in pairs]
        losses = {
            "prediction": sum(
                self._distance(target.detach() if options.detach_target else target, prediction) for target, prediction in pairs
            )
        }
        if options.variance_floor:
            losses["variance"] = sum(F.relu(options.variance_floor - variance) for variance in variances)
        told = {f"variance_{hierarchy}": value for hierarchy, value in zip(self.options.hierarchies, variances, strict=True)}
        return sum(losses.values()), {name: value.detach() for name, value in {**losses, **told}.items()}

    def _distance(self, target: Tensor, prediction: Tensor) -> Tensor:
        per_token = cosine_distance(target, prediction).mean()
        if self.training_options.loss == "l2":
            return 2 * per_token  # squared distance of vectors of length 1
        return per_token + cosine_distance(target.transpose(1, 2), prediction.transpose(1, 2)).mean()

    def errors(self, inputs: Tensor) -> Tensor:
        """1 - cosine of every token and its prediction, (B, hierarchies, N)."""
        pairs = self.targets_and_predictions(self.features_of(inputs))
        return torch.stack([cosine_distance(*pair) for pair in pairs], dim=1)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Learn what `standardise` subtracts and divides by; does nothing without it."""
        if not self.options.standardise:
            return
        errors = torch.cat([self.errors(inputs).cpu() for inputs in batches])
        self.usual_error.copy_(errors.mean(dim=0))
        deviation = errors.std(dim=0, correction=0)
        self.error_deviation.copy_(deviation + deviation.mean(dim=1, keepdim=True))  # few images: a position's own is noisy

    @torch.no_grad()
    def anomaly_map(self, inputs: Tensor) -> Tensor:
        errors = self.errors(inputs)
        if self.options.standardise:
            errors = (errors - self.usual_error) / self.error_deviation
        return enlarged(errors, self.encoder.patch_size)


def token_variance(tokens: Tensor) -> Tensor:
    """Variance of tokens (B, N, C) over an image, summed over channels, mean over the batch; 1 if nothing is common to them."""
    return tokens.var(dim=1, correction=0).sum(dim=-1).mean()

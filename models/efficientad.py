"""EfficientAD: a student and an autoencoder imitate a frozen teacher on good images; where they fail, there is the defect.

Batzner et al., "EfficientAD", WACV 2024: the float baseline of RAAD. B images, C channels of the teacher, s the maps' side.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from common.errors import NumericError
from common.normalisation import IMAGENET_MEAN, IMAGENET_STD
from models.detector import Detector
from models.patch_description import Autoencoder, FrozenTeacher, PatchDescriptionNetwork, map_side

MAP_NORMALISATIONS = ("quantile", "none")

_QUANTILES = (0.9, 0.995)  # of the maps of normal images: they become 0 and
_UPPER = 0.1  # this much
_AUTOENCODER_WIDTHS = {"small": 64, "medium": 64, "tiny": 8}


@dataclass(frozen=True)
class EfficientADOptions:
    """The network, where the authors vary it.

    Attributes:
        padding: zeros around the images, so that the maps reach their border; the teacher's network must have it alike.
        map_normalisation: one of `MAP_NORMALISATIONS`: bring both maps to one scale by quantiles on normal images, or do not.
    """

    padding: bool = False
    map_normalisation: str = "quantile"


@dataclass(frozen=True)
class EfficientADTraining:
    """What is minimised.

    Attributes:
        hard_quantile: the student learns from the squared errors from this quantile on; 0: from all.
        jitter: the autoencoder's image is changed in brightness, contrast or saturation by a factor within 1 +- this.
    """

    hard_quantile: float = 0.999
    jitter: float = 0.2


class EfficientAD(Detector):
    """Teacher, student and autoencoder; the student's second half of channels imitates the autoencoder.

    Args:
        teacher: gives C channels; its padding is that of the options.
        image_size: side of the images in pixels.

    Raises:
        ValueError: the teacher pads otherwise, or the images are too small.
    """

    caches_features = False  # there is nothing to cache: the autoencoder sees images that change at every step

    def __init__(self, teacher: FrozenTeacher, options: EfficientADOptions, image_size: int):
        super().__init__()
        if teacher.network.padding != options.padding:
            raise ValueError(f"the teacher's network was built with padding={teacher.network.padding}, not {options.padding}")
        channels, side = teacher.network.outputs, map_side(teacher.size, image_size, options.padding)
        self.encoder, self.options = teacher, options
        self.quantized_teacher: nn.Module | None = None
        self.student = PatchDescriptionNetwork(teacher.size, 2 * channels, options.padding)
        self.autoencoder = Autoencoder(image_size, channels, side, _AUTOENCODER_WIDTHS[teacher.size])
        self.register_buffer("teacher_mean", torch.zeros(channels))
        self.register_buffer("teacher_std", torch.ones(channels))
        # rows: map of the student, of the autoencoder; columns: what becomes 0, what becomes 0.1; these change nothing
        self.register_buffer("map_quantiles", torch.tensor([[0.0, _UPPER]] * 2))
        self.train_with(EfficientADTraining())

    @property
    def teacher(self) -> nn.Module:
        """The network to imitate: the frozen one or, once there is one, its quantized copy."""
        return self.encoder.network if self.quantized_teacher is None else self.quantized_teacher

    @property
    def runs_encoder(self) -> bool:
        return self.quantized_teacher is None

    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Steps of quantizers: decay would draw them to 1."""
        return [value for name, value in self.named_parameters() if name.endswith(".log_step") and value.requires_grad]

    def train(self, mode: bool = True) -> "EfficientAD":
        super().train(mode)
        self.teacher.eval()  # a quantized copy is as frozen as the original
        return self

    def train_with(self, training: EfficientADTraining, penalty: Callable[[int], Tensor] | None = None) -> None:
        """Set the loss; `penalty(count)` gives that many normalised images of anything but the product (count, 3, S, S)."""
        self.training_options, self._penalty = training, penalty

    def encode(self, images: Tensor) -> Tensor:
        return images

    @torch.no_grad()
    def teacher_maps(self, images: Tensor) -> Tensor:
        """(B, C, s, s) float32 with mean 0 and deviation 1 per channel on the training images."""
        return (self.teacher(images).float() - self.teacher_mean[:, None, None]) / self.teacher_std[:, None, None]

    def student_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the student says of the teacher and of the autoencoder, (B, C, s, s) float32 each."""
        as_teacher, as_autoencoder = self.student(images).float().chunk(2, dim=1)
        return as_teacher, as_autoencoder

    @torch.no_grad()
    def prepare(self, batches: Callable[[], Iterable[Tensor]]) -> None:
        """Learn the teacher's mean and deviation per channel from normal training images, which are gone through twice.

        Mean of the images' means, then root of the mean of the images' mean squared deviations; a channel that never changes
        keeps its scale.

        Raises:
            NumericError: the teacher's maps are not finite.
        """
        mean = self._mean_of_images(batches(), lambda maps: maps)
        variance = self._mean_of_images(batches(), lambda maps: (maps - mean[:, None, None]).square())
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise NumericError(
                f"the teacher's maps of the training images are not finite; check its weights ({self.encoder.source})"
            )
        never_changes = variance.sqrt() <= torch.finfo(torch.float32).eps * mean.abs()
        self.teacher_mean.copy_(mean)
        self.teacher_std.copy_(variance.sqrt().masked_fill(never_changes, 1.0))

    def _mean_of_images(self, batches: Iterable[Tensor], of_maps: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean per channel (C,) float64 of what `of_maps` makes of the teacher's maps (B, C, s, s)."""
        means = [of_maps(self.teacher(images).double()).mean(dim=(2, 3)) for images in batches]
        return torch.cat(means).mean(dim=0)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Learn the quantiles of all values of both maps of normal images; does nothing without `map_normalisation`.

        Raises:
            NumericError: the two quantiles of a map are equal or not finite.
        """
        if self.options.map_normalisation == "none":
            return
        per_batch = [torch.stack(self.maps(images)).flatten(1).cpu() for images in batches]
        values = torch.cat(per_batch, dim=1).double().numpy()
        quantiles = np.quantile(values, _QUANTILES, axis=1).T.astype(np.float32)  # torch.quantile refuses more than 2^24 values
        for name, (lower, upper) in zip(("student", "autoencoder"), quantiles, strict=True):
            if not lower < upper < math.inf:
                raise NumericError(
                    f"the {name}'s map has the quantiles {lower:g} and {upper:g} on normal images, which give it no scale; "
                    "check the training and the normal images, or switch the normalisation of the maps off"
                )
        self.map_quantiles.copy_(torch.from_numpy(quantiles))

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Parts of the loss: hard errors of the student, errors of the autoencoder, of the student on it, and the penalty.

        The penalty is on what the student says of the teacher on other images. The teacher gets no gradient; the student's
        errors on the autoencoder train both.
        """
        count, changed = len(images), jittered(images, self.training_options.jitter)
        others = [] if self._penalty is None else [self._penalty(count).to(images)]
        target, changed_target = self.teacher_maps(torch.cat([images, changed])).chunk(2)
        as_teacher, as_autoencoder = self.student_maps(torch.cat([images, changed, *others]))
        rebuilt = self.autoencoder(changed).float()
        parts = {
            "hard": hard_feature_loss((target - as_teacher[:count]).square(), self.training_options.hard_quantile),
            "autoencoder": F.mse_loss(rebuilt, changed_target),
            "student_autoencoder": F.mse_loss(as_autoencoder[count : 2 * count], rebuilt),
        }
        if others:
            parts["penalty"] = as_teacher[2 * count :].square().mean()
        return parts

    def training_loss(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the `losses`."""
        losses = self.losses(inputs)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of the student on the teacher and on the autoencoder, mean over channels: (B, s, s) each."""
        as_teacher, as_autoencoder = self.student_maps(images)
        student_map = (self.teacher_maps(images) - as_teacher).square().mean(dim=1)
        return student_map, (self.autoencoder(images).float() - as_autoencoder).square().mean(dim=1)

    @torch.no_grad()
    def anomaly_map(self, inputs: Tensor) -> Tensor:
        """Mean of the two normalised maps; without padding, the border of 4 of their pixels that nothing describes is 0."""
        lower, upper = self.map_quantiles.T[:, :, None, None, None]  # (2, 1, 1, 1) each
        combined = (_UPPER * (torch.stack(self.maps(inputs)) - lower) / (upper - lower)).mean(dim=0)
        border = (math.ceil(inputs.shape[-1] / 4) - combined.shape[-1]) // 2  # 4: a window has 33 pixels, a step is 4
        whole = F.pad(combined, (border, border, border, border))
        return F.interpolate(whole[:, None], size=inputs.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def hard_feature_loss(squared_errors: Tensor, quantile: float) -> Tensor:
    """Mean of the squared errors from their quantile on, over all elements of the batch (EfficientAD, hard feature loss).

    Equal to taking those not below torch.quantile's linear interpolation, which refuses more than 2^24 elements.
    Where several processes share a batch, each takes the quantile of its own part.
    """
    if quantile == 0:
        return squared_errors.mean()
    count = squared_errors.numel()
    hard_count = count - math.ceil(quantile * (count - 1))
    threshold = squared_errors.detach().flatten().topk(hard_count, sorted=False).values.min()
    hard = squared_errors >= threshold
    return (squared_errors * hard).sum() / hard.sum()


def jittered(images: Tensor, amount: float) -> Tensor:
    """Each normalised image (B, 3, S, S) with its brightness, contrast or saturation multiplied by a factor in 1 +- amount.

    Which of the three and how much is drawn per image from torch's global generator; colours are kept within 0 to 1.
    """
    mean, std = (torch.tensor(values).to(images)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    adjustments = (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation)
    kinds = torch.randint(len(adjustments), (len(images),)).tolist()
    factors = torch.empty(len(images)).uniform_(1 - amount, 1 + amount).tolist()
    colours = images * std + mean
    changed = [adjustments[kind](image, factor) for kind, image, factor in zip(kinds, colours, factors, strict=True)]
    return (torch.stack(changed) - mean) / std

"""What a distillation reads: its options, images in two sizes, their order, and the statistics of targets."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from datasets.images import DEFAULT_MAX_PIXELS, load_image
from datasets.transforms import image_transform
from utils.training import ShuffledBatches

_GREY_SHARE = 0.1
_LEAST_STD = 1e-6  # of a channel that is the same everywhere

Draw = tuple[int, int]  # index of an image, and the number that decides whether it is grey this time


@dataclass(frozen=True)
class DistillationOptions:
    """Every number that changes the teacher; `image_size` is the teacher's, the feature source sees images twice as large."""

    size: str
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    image_size: int = 256
    statistics_images: int = 10_000
    seed: int = 0
    precision: str = "fp32"


class ImagePairs(Dataset):
    """Draw -> the image for the source (3, 2S, 2S) in 0..1 and for the teacher (3, S, S) normalised; one in ten is grey."""

    def __init__(self, paths: list[Path], options: DistillationOptions, max_pixels: int = DEFAULT_MAX_PIXELS):
        self.paths, self.seed, self.max_pixels = paths, options.seed, max_pixels
        side = 2 * options.image_size
        self.for_source = transforms.Compose([transforms.Resize((side, side)), transforms.ToTensor()])
        self.for_teacher = image_transform(options.image_size, options.image_size)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor | str]:
        index, number = draw
        photo = load_image(self.paths[index], self.max_pixels)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if torch.rand((), generator=generator) < _GREY_SHARE:
            photo = photo.convert("L").convert("RGB")
        return {"large": self.for_source(photo), "image": self.for_teacher(photo), "path": str(self.paths[index])}


class NumberedBatches(ShuffledBatches):
    """Shuffled batches of draws; the number is that of images drawn before, so nothing depends on where a run stopped."""

    def __iter__(self) -> Iterator[list[Draw]]:
        for iteration, batch in enumerate(super().__iter__(), self.start):
            yield [(index, iteration * self.batch_size + place) for place, index in enumerate(batch)]


class ChannelStatistics:
    """Mean and standard deviation of every channel over maps (B, C, s, s), from sums that can be saved and continued."""

    def __init__(self, channels: int):
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)
        self.images, self.pixels = 0, 0

    def add(self, maps: Tensor) -> None:
        """Take the maps of a batch into account."""
        values = maps.double()
        self.total += values.sum(dim=(0, 2, 3)).cpu()
        self.squares += values.square().sum(dim=(0, 2, 3)).cpu()
        self.images += len(maps)
        self.pixels += len(maps) * maps.shape[2] * maps.shape[3]

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Two tensors (C, 1, 1) in float32."""
        mean = self.total / self.pixels
        std = (self.squares / self.pixels - mean.square()).clamp_min(0).sqrt().clamp_min(_LEAST_STD)
        return mean.float()[:, None, None], std.float()[:, None, None]

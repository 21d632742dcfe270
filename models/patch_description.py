"""EfficientAD's networks: the patch description network of teacher and student, the frozen teacher, and the autoencoder.

Batzner et al., "EfficientAD", WACV 2024. B images, S their side, s the side of the maps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEACHER_CHANNELS = {"small": 384, "medium": 384, "tiny": 48}  # tiny: for tests
SIZES = tuple(TEACHER_CHANNELS)

# per convolution: kernel, outputs (None: as asked for), padding where padding is on
_CONVOLUTIONS = {
    "small": ((4, 128, 3), (4, 256, 3), (3, 256, 1), (4, None, 0)),
    "medium": ((4, 256, 3), (4, 512, 3), (1, 512, 0), (3, 512, 1), (4, None, 0), (1, None, 0)),
    "tiny": ((4, 16, 3), (4, 32, 3), (3, 32, 1), (4, None, 0)),
}
_POOLED = 2  # so many convolutions, the first ones, are followed by 2x2 average pooling
_DROPOUT = 0.2


def map_side(size: str, image_size: int, padding: bool) -> int:
    """Side of the maps of a network of this size: ceil(image_size / 4) with padding, 8 less without.

    Raises:
        ValueError: no window of 33 pixels fits into the image.
    """
    side = image_size
    for index, (kernel, _, padded) in enumerate(_CONVOLUTIONS[size]):
        side += 2 * padded * padding - kernel + 1
        if index < _POOLED:
            side = (side + 2 * padding) // 2
    if side < 1:
        raise ValueError(f"images of {image_size} x {image_size} pixels are too small for a patch description network; use 64")
    return side


class PatchConvolution(nn.Conv2d):
    """Convolution with bias and, if `rectified`, a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, *, rectified: bool):
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.rectified = rectified

    def before_activation(self, inputs: Tensor) -> Tensor:
        """The convolution alone."""
        return super().forward(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.before_activation(inputs)
        return F.relu(output) if self.rectified else output


class PatchDescriptionNetwork(nn.Module):
    """Convolutions `conv1`, `conv2`, ... of which the first two are pooled: each output describes a window of 33 pixels.

    Images (B, 3, S, S) -> (B, outputs, s, s) with s = `map_side`. Its children are its convolutions and nothing else.

    Args:
        size: one of `SIZES`.
        outputs: channels of the last convolution (of the last two for "medium").
        padding: zeros around the images and the maps within (they count in the pools' means), so that windows at the
            border are described as well.
    """

    def __init__(self, size: str, outputs: int, padding: bool = False):
        super().__init__()
        self.size, self.outputs, self.padding = size, outputs, padding
        numbers, inputs = _CONVOLUTIONS[size], 3
        for index, (kernel, width, padded) in enumerate(numbers, start=1):
            width = width or outputs
            convolution = PatchConvolution(inputs, width, kernel, padding=padded * padding, rectified=index < len(numbers))
            self.add_module(f"conv{index}", convolution)
            inputs = width

    @property
    def convolutions(self) -> list[nn.Module]:
        """In order; after a quantization what replaced them."""
        return list(self.children())

    def _pooled(self, index: int, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, 2, padding=int(self.padding)) if index < _POOLED else maps

    def forward(self, images: Tensor) -> Tensor:
        for index, convolution in enumerate(self.convolutions):
            images = self._pooled(index, convolution(images))
        return images

    def layer_outputs(self, images: Tensor) -> list[Tensor]:
        """What each convolution makes of images, before its ReLU; hooks of the convolutions do not see this pass."""
        outputs = []
        for index, convolution in enumerate(self.convolutions):
            outputs.append(convolution.before_activation(images))
            images = self._pooled(index, F.relu(outputs[-1]) if convolution.rectified else outputs[-1])
        return outputs


class FrozenTeacher(nn.Module):
    """A distilled patch description network that is never trained.

    Args:
        network: with its weights loaded.
        source: where the weights came from, for logs and reports.
        weights_sha256: hash of the weights' content.
    """

    def __init__(self, network: PatchDescriptionNetwork, source: str, weights_sha256: str):
        super().__init__()
        self.network = network
        self.size = network.size
        self.name = f"pdn_{network.size}"
        self.source = source
        self.weights_sha256 = weights_sha256
        self.published_parameters = sum(parameter.numel() for parameter in network.parameters())
        self.taps: list[int] = []  # of a transformer alone
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode whatever the surrounding model does."""
        return super().train(False)

    def with_padding(self, padding: bool) -> "FrozenTeacher":
        """The same weights in a network that pads its images, or does not."""
        if self.network.padding == padding:
            return self
        with torch.device("meta"):  # draws no random numbers
            network = PatchDescriptionNetwork(self.size, self.network.outputs, padding)
        network.load_state_dict(self.network.state_dict(), assign=True)
        return FrozenTeacher(network, self.source, self.weights_sha256)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, s, s), as they are: not normalised by channel."""
        return self.network(images)


class Autoencoder(nn.Module):
    """Images (B, 3, S, S) through 1 x 1 x `width` values (where S < 288) to maps (B, outputs, map_side, map_side).

    Its children are its 14 convolutions and nothing else: encoder1 to encoder6, decoder1 to decoder8.

    Args:
        image_size: S, at least 32.
        outputs: channels of the maps.
        map_side: side of the maps.
        width: channels within (half of them at first); EfficientAD's 64, less for tests.
    """

    def __init__(self, image_size: int, outputs: int, map_side: int, width: int = 64):
        super().__init__()
        shares = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))  # 3, 8, 15, 32, 63 and 127 of 256
        self.sides = [max(1, image_size // divisor - less) for divisor, less in shares]
        self.map_side = map_side
        widths = [3, width // 2, width // 2, width, width, width]
        for index in range(5):
            self.add_module(f"encoder{index + 1}", PatchConvolution(widths[index], widths[index + 1], 4, 2, 1, rectified=True))
        self.encoder6 = PatchConvolution(width, width, min(8, image_size // 32), rectified=False)
        for index in range(len(self.sides)):
            self.add_module(f"decoder{index + 1}", PatchConvolution(width, width, 4, padding=2, rectified=True))
        self.decoder7 = PatchConvolution(width, width, 3, padding=1, rectified=True)
        self.decoder8 = PatchConvolution(width, outputs, 3, padding=1, rectified=False)

    @property
    def convolutions(self) -> list[nn.Module]:
        """In order; after a quantization what replaced them."""
        return list(self.children())

    def forward(self, images: Tensor) -> Tensor:
        layers = self.convolutions
        for convolution in layers[:6]:
            images = convolution(images)
        for side, convolution in zip(self.sides, layers[6:12], strict=True):
            images = F.dropout(convolution(_resized(images, side)), _DROPOUT, self.training)
        return layers[13](layers[12](_resized(images, self.map_side)))


def _resized(maps: Tensor, side: int) -> Tensor:
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)

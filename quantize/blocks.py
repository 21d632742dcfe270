"""What the reconstruction of a layer is fitted on: crops of images, its inputs and targets, and how much each error counts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from quantize.layers import QuantizedConvolution, quantized_layers

STRIDE = 4  # pixels between windows of a patch description network
WINDOW = 33  # pixels that one of its outputs sees
BATCH = 16  # crops in a pass that only gathers
SMALLEST_SCALE = 1e-12
ACTIVATION_EXPONENT = 2.4  # of the errors that steps of activations are fitted with


@dataclass(frozen=True)
class Crops:
    """Squares cut from images, and where: pixels (n, 3, c, c), index of the image, row and column of the corner, (n,)."""

    pixels: Tensor
    images: Tensor
    rows: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, device: torch.device) -> "list[Crops]":
        """In order, pixels on a device."""
        parts = zip(*(part.split(BATCH) for part in (self.pixels, self.images, self.rows, self.columns)), strict=True)
        return [Crops(pixels.to(device), *where) for pixels, *where in parts]


# (outputs (n, C, s, s) of the network, those of the float network, their crops) -> mean over the crops of a loss. What goes
# with a crop in a map of a whole image starts there at row `rows / 4` and column `columns / 4`.
GradientLoss = Callable[[Tensor, Tensor, Crops], Tensor]


def draw_crops(images: Tensor, side: int | None, count: int, generator: torch.Generator) -> Crops:
    """`count` crops from images (N, 3, S, S) in turn, at random offsets that are multiples of 4; without side the first images.

    Raises:
        UserError: a side that is not 33 + 4 k or does not fit.
    """
    if side is None:
        corner = torch.zeros(min(count, len(images)), dtype=torch.long)
        return Crops(images[:count], torch.arange(len(corner)), corner, corner)
    smallest = min(images.shape[2:])
    if side < WINDOW or (side - WINDOW) % STRIDE or side > smallest:
        raise UserError(
            f"crops of {side} pixels for the reconstruction: {WINDOW} + {STRIDE} k pixels that fit into {smallest} are possible"
        )
    which = torch.arange(count) % len(images)
    rows, columns = (
        STRIDE * torch.randint((extent - side) // STRIDE + 1, (count,), generator=generator) for extent in images.shape[2:]
    )
    where = zip(which.tolist(), rows.tolist(), columns.tolist(), strict=True)
    pixels = torch.stack([images[i, :, row : row + side, column : column + side] for i, row, column in where])
    return Crops(pixels, which, rows, columns)


class Block:
    """What one layer is fitted on: inputs (n, C, h, w), targets (n, C', h', w') and the weights of their errors, or None.

    `target_means` (C',): of the float convolution before its ReLU.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, error_weights: Tensor | None, target_means: Tensor):
        self.inputs, self.targets, self.error_weights, self.target_means = inputs, targets, error_weights, target_means
        self._scales = {
            exponent: targets.abs().pow(exponent).mean().clamp_min(SMALLEST_SCALE) for exponent in (2.0, ACTIVATION_EXPONENT)
        }

    def error(self, output: Tensor, picks: Tensor | slice, exponent: float = 2.0) -> Tensor:
        """Weighted |error|^exponent (2 or 2.4) of the outputs for some of the inputs: sum over channels, mean over the rest.

        Relative to the targets', since the regulariser of the rounding knows nothing of the size of the activations.
        """
        target = self.targets[picks]
        difference = (output - target).abs().pow(exponent)
        if self.error_weights is not None:
            difference = difference * self.error_weights[picks]
        return target.shape[1] * difference.mean() / self._scales[exponent]


def normalised_fisher(gradients: Tensor, damping: float) -> Tensor:
    """Squared gradients with mean 1 over the block, damped and with mean 1 again; all 1 where there is no gradient."""
    squares = gradients.square()
    mean = squares.mean()
    if not mean > 0:
        return torch.ones_like(squares)
    return (squares / mean + damping) / (1 + damping)


def _tapped(network: nn.Module, layer: QuantizedConvolution, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and output of a layer, and the network's output as a function of that output alone."""
    taken = []

    def tap(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        taken.extend([arguments[0].detach(), output.detach().requires_grad_()])
        return taken[1]

    hook = layer.register_forward_hook(tap)
    try:
        final = network(pixels)
    finally:
        hook.remove()
    return (*taken, final)


def output_distance(outputs: Tensor, float_outputs: Tensor, crops: Crops) -> Tensor:
    """Squared distance of outputs (n, C, s, s) to those of the float network, mean over the crops."""
    return (outputs - float_outputs).square().sum() / len(crops)


def gather(
    network: nn.Module, reference: nn.Module, index: int, crops: Crops, loss: GradientLoss | None, damping: float
) -> Block:
    """Pass crops through a network whose layers up to this one are quantized, and through its float original.

    With a loss, errors are weighed by the squares of its gradient by the layer's output, after the ReLU.
    """
    layer, original = quantized_layers(network)[index], quantized_layers(reference)[index]
    all_inputs, targets, gradients, sums = [], [], [], []
    for batch in crops.batches(layer.weight.device):
        with torch.no_grad():
            float_inputs, _, float_outputs = _tapped(reference, original, batch.pixels)
            before = original.before_activation(float_inputs)
        with torch.set_grad_enabled(loss is not None):
            inputs, output, outputs = _tapped(network, layer, batch.pixels)
            if loss is not None:
                (gradient,) = torch.autograd.grad(loss(outputs, float_outputs, batch), output)
                gradients.append(len(batch) * gradient)  # of the crop's own loss, not of the mean
        all_inputs.append(inputs)
        targets.append(F.relu(before) if layer.rectified else before)
        sums.append(len(batch) * before.mean(dim=(0, 2, 3)))
    weights = normalised_fisher(torch.cat(gradients), damping) if gradients else None
    return Block(torch.cat(all_inputs), torch.cat(targets), weights, sum(sums) / len(crops))

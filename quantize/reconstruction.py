"""Reconstruction of a quantized network, layer by layer: learned rounding of the weights, then steps of the activations.

After BRECQ (Li et al., ICLR 2021): each layer with its ReLU is fitted to the float network's output, its inputs coming from
the layers before it as they are already quantized, and errors count by the squared gradients of a loss (the diagonal of its
Fisher information). A patch description network without padding is fitted on small crops of its images: on the grid of its
stride they give the very features of the whole image.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import NumericError, UserError
from common.progress import ProgressBar
from quantize.blocks import ACTIVATION_EXPONENT, BATCH, SMALLEST_SCALE, Block, GradientLoss, draw_crops, gather, output_distance
from quantize.layers import QuantizationOptions, QuantizedConvolution, calibrate, quantized_layers, set_quantization
from quantize.quantizers import AdaptiveRounding

logger = logging.getLogger(__name__)

FISHER = ("none", "task", "output")


@dataclass(frozen=True)
class ReconstructionOptions:
    """How long and on what the layers are fitted; defaults are BRECQ's where it has them.

    Attributes:
        iterations: of the rounding of each layer.
        activation_iterations: of the steps of each layer's activations, afterwards.
        batch_size: crops per iteration.
        learning_rate: of the rounding. In few iterations nothing is rounded another way unless it is larger.
        activation_learning_rate: of the logarithms of the steps, falling to 0 along a cosine.
        regularisation: lambda, weight of what pulls h to 0 or 1.
        beta: first and last exponent of that, in between linear.
        warm_up: share of the iterations without it.
        crop: side of the crops, 33 + 4 k pixels; None: whole images, which padding makes necessary.
        crops: how many are drawn. What one layer gives for all of them is kept: 0.5 GB for 256 crops of 65 pixels and the first
            layer of the small network, twice that with `fisher`, and for a moment again as much.
        fisher: gradients that weigh errors: `none`, of the caller's loss (`task`), or of the squared distance of the
            network's output to that of the float network (`output`).
        damping: added to the squared gradients, whose mean is 1: errors without a gradient count as well.
        seed: of crops and batches.
    """

    iterations: int = 20_000
    activation_iterations: int = 5_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    activation_learning_rate: float = 4e-4
    regularisation: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warm_up: float = 0.2
    crop: int | None = 65
    crops: int = 256
    fisher: Literal["none", "task", "output"] = "none"
    damping: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class LayerError:
    """Squared error of a layer's output relative to the float output's square: rounded to nearest, and reconstructed."""

    bits: int
    nearest: float
    reconstructed: float


def _minimise(
    parameters: list[nn.Parameter],
    loss_at: Callable[[int, Tensor], Tensor],
    rate_at: Callable[[int], float],
    iterations: int,
    draw: Callable[[], Tensor],
    bar: ProgressBar,
) -> None:
    """Adam on a loss of (iteration, which crops); leaves all other gradients alone."""
    optimizer = torch.optim.Adam(parameters)
    for iteration in range(iterations):
        loss = loss_at(iteration, draw())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = rate_at(iteration)
        optimizer.step()
        bar.update()
    optimizer.zero_grad(set_to_none=True)
    if iterations and not math.isfinite(loss.item()):
        raise NumericError(
            f"the reconstruction's loss is {loss.item()}: check the weights of the network for values that are not finite, "
            "or lower the learning rate of the reconstruction"
        )


def regularisation_at(iteration: int, options: ReconstructionOptions) -> tuple[float, float]:
    """Weight and exponent beta of the rounding's regulariser: nothing while warming up, then beta falls linearly."""
    share = iteration / max(1, options.iterations)
    if share < options.warm_up:
        return 0.0, options.beta[0]
    done = (share - options.warm_up) / max(1e-9, 1 - options.warm_up)
    return options.regularisation, options.beta[0] + done * (options.beta[1] - options.beta[0])


def _learn_rounding(
    layer: QuantizedConvolution, block: Block, options: ReconstructionOptions, draw: Callable[[], Tensor], bar: ProgressBar
) -> None:
    """Round the weights so that the layer's output stays; inputs are not quantized yet. They become values of the grid."""
    rounding = AdaptiveRounding(layer.weight_quantizer, layer.weight)

    def loss_at(iteration: int, picks: Tensor) -> Tensor:
        output = layer.convolve(block.inputs[picks], rounding())
        weight, beta = regularisation_at(iteration, options)
        error = block.error(F.relu(output) if layer.rectified else output, picks)
        return error + weight * rounding.regulariser(beta) if weight else error

    _minimise([rounding.alpha], loss_at, lambda _: options.learning_rate, options.iterations, draw, bar)
    with torch.no_grad():
        layer.weight.copy_(rounding.rounded())


def _learn_activation_step(
    layer: QuantizedConvolution, block: Block, options: ReconstructionOptions, draw: Callable[[], Tensor], bar: ProgressBar
) -> None:
    """Fit the step of the layer's inputs."""
    step = layer.input_quantizer.log_step
    learned = step.requires_grad
    step.requires_grad_(True)

    def loss_at(_: int, picks: Tensor) -> Tensor:
        return block.error(layer(block.inputs[picks]), picks, ACTIVATION_EXPONENT)

    def rate_at(iteration: int) -> float:
        return options.activation_learning_rate * (1 + math.cos(math.pi * iteration / options.activation_iterations)) / 2

    _minimise([step], loss_at, rate_at, options.activation_iterations, draw, bar)
    step.requires_grad_(learned)


@torch.no_grad()
def _relative_error(layer: QuantizedConvolution, block: Block) -> float:
    """Squared error of the quantized layer's outputs, unweighted, relative to the square of the float outputs."""
    pairs = zip(block.inputs.split(BATCH), block.targets.split(BATCH), strict=True)
    total = sum((layer(inputs) - targets).square().sum() for inputs, targets in pairs)
    return (total / block.targets.square().sum().clamp_min(SMALLEST_SCALE)).item()


@torch.no_grad()
def _correct_bias(layer: QuantizedConvolution, block: Block) -> None:
    """Give the channels' means before the ReLU the values of the float network, whatever moved them."""
    sums = [len(inputs) * layer.before_activation(inputs).mean(dim=(0, 2, 3)) for inputs in block.inputs.split(BATCH)]
    layer.bias += block.target_means - sum(sums) / len(block.inputs)


def reconstruct(
    network: nn.Module,
    images: Tensor,
    options: ReconstructionOptions,
    loss: GradientLoss | None = None,
    bias_correction: bool = True,
    description: str = "reconstructing",
    quiet: bool = False,
) -> list[LayerError]:
    """Fit a calibrated quantized network, in place and in order, to what its latent float weights compute now.

    Afterwards the latent weights of each layer are values of its grid, so that fine-tuning starts where this ended.

    Args:
        images: (N, 3, S, S), to draw crops from.
        loss: for fisher `task`; see `GradientLoss`.
        bias_correction: afterwards, layer by layer.

    Raises:
        UserError: crops that do not fit, or that the network's padding forbids.
        ValueError: fisher `task` without a loss.
        NumericError: a loss that is not finite.
    """
    if (options.fisher == "task") != (loss is not None):
        raise ValueError("a loss belongs to fisher 'task' and to no other")
    if options.crop is not None and any(any(layer.padding) for layer in quantized_layers(network)):
        raise UserError("a network with padding sees the borders of its images: reconstruct it on whole images, with no crop")
    gradient_loss = output_distance if options.fisher == "output" else loss
    generator = torch.Generator().manual_seed(options.seed)
    crops = draw_crops(images, options.crop, options.crops, generator)
    training, layers = network.training, quantized_layers(network.eval())
    set_quantization(network, False)
    reference, errors = copy.deepcopy(network), []

    def draw() -> Tensor:
        return torch.randint(len(crops), (options.batch_size,), generator=generator)

    total = len(layers) * (options.iterations + options.activation_iterations)
    with ProgressBar(total=total, desc=description, unit="it", disable=quiet or None) as bar:
        for index, layer in enumerate(layers):
            layer.quantizing = True
            block = gather(network, reference, index, crops, gradient_loss, options.damping)
            nearest = _relative_error(layer, block)
            _learn_rounding(layer, block, options, draw, bar)
            _learn_activation_step(layer, block, options, draw, bar)
            if bias_correction:
                _correct_bias(layer, block)
            errors.append(LayerError(layer.bits, nearest, _relative_error(layer, block)))
            logger.info(
                "%s: layer %d of %d, %d bits, error %.2e rounded to nearest, %.2e reconstructed",
                description,
                index + 1,
                len(layers),
                layer.bits,
                nearest,
                errors[-1].reconstructed,
            )
    network.train(training)
    return errors


def fit(
    network: nn.Module,
    images: Tensor,
    options: QuantizationOptions,
    reconstruction: ReconstructionOptions | None = None,
    loss: GradientLoss | None = None,
    description: str = "reconstructing",
    quiet: bool = False,
) -> list[LayerError]:
    """Calibrate what `quantize_network` made and, if its rounding is to be learned, reconstruct it; then its layers' errors."""
    calibrate(network, images, options)
    if options.round == "nearest":
        return []
    reconstruction = reconstruction or ReconstructionOptions()
    return reconstruct(network, images, reconstruction, loss, options.bias_correction, description, quiet)

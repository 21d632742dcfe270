"""Convolutions of few bits in the place of float ones, and the calibration that gives them ranges and corrects their biases."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.patch_description import PatchConvolution
from quantize.quantizers import RangeMethod, UniformQuantizer

_INT8_BITS = 8
_SAMPLES = 2**16  # activations per tensor that a range search looks at


@dataclass(frozen=True)
class QuantizationOptions:
    """How the layers of a network become quantized; how many bits each has is said elsewhere (`quantize.allocation`).

    Attributes:
        range_init: of weights and activations: `minmax`, or `search` for the shrunken range with the least error. The search
            without `bias_correction` can be far worse than `minmax` at 2 bits, with it it is better.
        round: `nearest`, or `adaround` to learn the rounding (`quantize.reconstruction`).
        bias_correction: absorb into the biases what quantization adds to the mean of each output channel.
        learn_step: train the steps with the weights (LSQ).
        output_bits: of what a rectified layer gives, so that integer engines can fuse convolution and ReLU; None: float.
    """

    range_init: RangeMethod = "search"
    round: Literal["nearest", "adaround"] = "adaround"
    bias_correction: bool = True
    learn_step: bool = False
    output_bits: int | None = 8


class QuantizedConvolution(PatchConvolution):
    """A convolution whose weights (a grid per output channel) and inputs (one grid) have `bits` bits.

    `weight` are the latent float weights: gradients reach them straight through the rounding. The rounded ones are integers
    q - Z of int8: below 8 bits q and Z are at most 127, at 8 bits the grid is symmetric, Z = 128. Zero is on the grid of the
    inputs, so padding before or after their quantization is the same.

    `quantizing` off makes it the float convolution of its latent weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        rectified: bool,
        bits: int,
        options: QuantizationOptions,
    ):
        super().__init__(inputs, outputs, kernel, stride, padding, rectified=rectified)
        learn = options.learn_step
        self.weight_quantizer = UniformQuantizer(bits, outputs, symmetric=bits >= _INT8_BITS, learn_step=learn)
        self.input_quantizer = UniformQuantizer(bits, learn_step=learn)
        self.output_quantizer = None
        if rectified and options.output_bits is not None:
            self.output_quantizer = UniformQuantizer(options.output_bits, learn_step=learn)
        self.quantizing = True

    @classmethod
    def from_convolution(cls, convolution: nn.Conv2d, bits: int, options: QuantizationOptions) -> "QuantizedConvolution":
        """Same weights and bias, whose ranges are taken; ranges of activations come from `calibrate`.

        Raises:
            ValueError: a convolution with groups or dilation, or bits that no quantizer has.
        """
        if convolution.groups != 1 or convolution.dilation != (1, 1):
            raise ValueError("only convolutions without groups and dilation are quantized")
        quantized = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            rectified=getattr(convolution, "rectified", False),
            bits=bits,
            options=options,
        ).to(convolution.weight)
        with torch.no_grad():
            quantized.weight.copy_(convolution.weight)
            quantized.bias.copy_(0 if convolution.bias is None else convolution.bias)
        quantized.weight_quantizer.fit(convolution.weight, options.range_init)
        trained = convolution.weight.requires_grad  # a frozen network stays frozen, its steps included
        for parameter in quantized.parameters():
            parameter.requires_grad_(parameter.requires_grad and trained)
        return quantized.train(convolution.training)

    @property
    def bits(self) -> int:
        return self.weight_quantizer.bits

    def quantized_weight(self) -> Tensor:
        """Weights as they are used: values of the grid."""
        return self.weight_quantizer(self.weight)

    def weight_codes(self) -> Tensor:
        """Codes q of the weights, int32 in 0 ... 2^bits - 1; less the zero point of their channel they fit int8."""
        return self.weight_quantizer.codes(self.weight)

    def convolve(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Plain convolution of inputs and weights as they are, bias added."""
        return F.conv2d(inputs, weight, self.bias, self.stride, self.padding)

    def before_activation(self, inputs: Tensor) -> Tensor:
        """The convolution, quantized, without what follows it."""
        if not self.quantizing:
            return self.convolve(inputs, self.weight)
        return self.convolve(self.input_quantizer(inputs), self.quantized_weight())

    def forward(self, inputs: Tensor) -> Tensor:
        output = super().forward(inputs)
        return self.output_quantizer(output) if self.quantizing and self.output_quantizer is not None else output


def quantize_network(network: nn.Module, bits: Sequence[int], options: QuantizationOptions | None = None) -> None:
    """Replace the convolutions of a network, in its order, by quantized ones; needs no data, `calibrate` does.

    To load a quantized network, any bits will do here: its state brings its own.

    Raises:
        ValueError: not one number of bits per convolution.
    """
    convolutions = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    for (name, convolution), layer_bits in zip(convolutions, bits, strict=True):
        path, _, attribute = name.rpartition(".")
        quantized = QuantizedConvolution.from_convolution(convolution, layer_bits, options or QuantizationOptions())
        setattr(network.get_submodule(path), attribute, quantized)


@torch.no_grad()
def dequantize_network(network: nn.Module) -> None:
    """Replace the quantized convolutions of a network by float ones with the rounded weights."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, QuantizedConvolution):
                numbers = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
                convolution = PatchConvolution(*numbers, rectified=layer.rectified).to(layer.weight)
                convolution.weight.copy_(layer.quantized_weight())
                convolution.bias.copy_(layer.bias)
                setattr(parent, name, convolution.train(layer.training))


def quantized_layers(network: nn.Module) -> list[QuantizedConvolution]:
    """All quantized convolutions in the order of the network."""
    return [module for module in network.modules() if isinstance(module, QuantizedConvolution)]


def set_quantization(network: nn.Module, enabled: bool) -> None:
    """Whether the quantized layers of a network quantize, or compute with their latent float weights."""
    for layer in quantized_layers(network):
        layer.quantizing = enabled


@contextmanager
def quantization_off(network: nn.Module) -> Iterator[None]:
    """Float passes; afterwards each layer quantizes as it did before."""
    layers = quantized_layers(network)
    states = [layer.quantizing for layer in layers]
    set_quantization(network, False)
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.quantizing = state


def window_means(inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Mean over images and output positions of what each weight of a convolution is multiplied with, (C, k, k).

    The mean of a convolution's output is the sum of its weights times these.
    """
    inputs = F.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = ((side - size) // step for side, size, step in zip(inputs.shape[2:], kernel, stride, strict=True))
    means = [
        inputs[:, :, i : i + rows * stride[0] + 1 : stride[0], j : j + columns * stride[1] + 1 : stride[1]].mean(dim=(0, 2, 3))
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(means, dim=1).unflatten(1, tuple(kernel))


class _Observer:
    """Extent and a sample of the activations that a quantizer will see."""

    def __init__(self, sample: int):
        self.sample, self.low, self.high, self.samples = sample, [], [], []
        self.generator = torch.Generator().manual_seed(0)

    def add(self, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        self.low.append(low)
        self.high.append(high)
        picks = torch.randint(values.numel(), (self.sample,), generator=self.generator)  # every n-th would keep to few pixels
        self.samples.append(values.flatten()[picks.to(values.device)] if values.numel() > self.sample else values.flatten())

    def fit(self, quantizer: UniformQuantizer, method: RangeMethod) -> None:
        extent = torch.stack(self.low).amin(), torch.stack(self.high).amax()
        quantizer.fit(torch.cat(self.samples), method, extent)


class _LayerObserver:
    """Hooks of one layer: what goes in, what comes out, and the mean inputs of each weight."""

    def __init__(self, layer: QuantizedConvolution, sample: int):
        self.layer, self.means = layer, []
        self.inputs, self.outputs = _Observer(sample), _Observer(sample)
        self.hook = layer.register_forward_hook(self._observe)

    def _observe(self, layer: QuantizedConvolution, arguments: tuple[Tensor], output: Tensor) -> None:
        (inputs,) = arguments
        self.inputs.add(inputs)
        self.outputs.add(output)
        self.means.append(len(inputs) * window_means(inputs, layer.kernel_size, layer.stride, layer.padding))

    def finish(self, options: QuantizationOptions, images: int) -> None:
        """Set the ranges; with rounding to nearest also correct the bias: after a learned rounding it is corrected there."""
        self.hook.remove()
        self.inputs.fit(self.layer.input_quantizer, options.range_init)
        if self.layer.output_quantizer is not None:
            self.outputs.fit(self.layer.output_quantizer, options.range_init)
        if options.bias_correction and options.round == "nearest":
            error = self.layer.quantized_weight() - self.layer.weight
            self.layer.bias -= (error * (sum(self.means) / images)).sum(dim=(1, 2, 3))


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor, options: QuantizationOptions, batch_size: int = 8) -> None:
    """Ranges of all activations from one float pass over images (N, 3, S, S), and, if rounding to nearest, corrected biases.

    The correction takes the mean of (W_q - W) * x from each channel, so that the mean of its output stays that of the float
    network (Nagel et al., ICCV 2019, from data).
    """
    batches = images.split(batch_size)
    observers = [_LayerObserver(layer, max(1, _SAMPLES // len(batches))) for layer in quantized_layers(network)]
    training, device = network.training, next(network.parameters()).device
    with quantization_off(network.eval()):
        for batch in batches:
            network(batch.to(device))
    network.train(training)
    for observer in observers:
        observer.finish(options, len(images))

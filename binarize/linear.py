"""A linear layer whose weights, and by default activations, are single bits with learned scales."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.sign import Gradient, binary_sign

_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class BinarizationOptions:
    """How layers become binary: `activation_bits` 1 or 32, `sab` mixed, binary or off, and the two sign gradients."""

    activation_bits: int = 1
    sab: str = "mixed"
    weight_gradient: Gradient = "clip"
    activation_gradient: Gradient = "triangle"


class BinaryLinear(nn.Module):
    """y = alpha * (sign(W - row mean) @ a) + bias, alpha learned per output channel (parameterised weight scales).

    With 1-bit activations a = gamma * sign((x - beta) / gamma): beta is a learned threshold per input channel, gamma a
    learned positive scalar, kept as its logarithm. Both start from the first batch (`binarize.stages.calibrate`);
    `calibrated` remembers that in the state dict. With 32-bit activations a = x.
    """

    def __init__(self, in_features: int, out_features: int, options: BinarizationOptions):
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(out_features, in_features))  # latent: only its signs reach the output
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.alpha = nn.Parameter(torch.ones(out_features))
        if options.activation_bits == 1:
            self.threshold = nn.Parameter(torch.zeros(in_features))  # beta
            self.log_activation_scale = nn.Parameter(torch.zeros(()))  # log gamma
            self.register_buffer("calibrated", torch.tensor(False))

    @classmethod
    def from_linear(cls, linear: nn.Linear, options: BinarizationOptions) -> "BinaryLinear":
        """Binary form of a float layer: same latent weights and bias, alpha = mean |W - row mean| of its row."""
        binary = cls(linear.in_features, linear.out_features, options)
        with torch.no_grad():
            binary.weight.copy_(linear.weight)
            if linear.bias is not None:
                binary.bias.copy_(linear.bias)
            binary.alpha.copy_(binary.centred_weight().abs().mean(dim=1))
        return binary.to(linear.weight.device)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def centred_weight(self) -> Tensor:
        """Latent weight minus its row means, (out, in)."""
        return self.weight - self.weight.mean(dim=1, keepdim=True)

    def scale_parameters(self) -> list[nn.Parameter]:
        """Scales and thresholds: trained without weight decay."""
        learned = [self.alpha]
        if self.options.activation_bits == 1:
            learned += [self.threshold, self.log_activation_scale]
        return learned

    @torch.no_grad()
    def calibrate(self, inputs: Tensor) -> None:
        """Set beta to the channel means and gamma to the mean absolute deviation of inputs (..., in)."""
        tokens = inputs.float().reshape(-1, self.in_features)
        self.threshold.copy_(tokens.mean(dim=0))
        deviation = (tokens - self.threshold).abs().mean()
        self.log_activation_scale.copy_(deviation.clamp_min(_SMALLEST_SCALE).log())
        self.calibrated.fill_(True)

    def weight_signs(self) -> Tensor:
        """+1 and -1, (out, in)."""
        return binary_sign(self.centred_weight(), self.options.weight_gradient)

    def output_scale(self) -> Tensor:
        """What a product of signs is multiplied with: alpha, times gamma with 1-bit activations, (out,)."""
        return self.alpha * self.log_activation_scale.exp() if self.options.activation_bits == 1 else self.alpha

    def forward(self, inputs: Tensor) -> Tensor:
        signs = self.weight_signs()
        scale = 1.0
        if self.options.activation_bits == 1:
            scale = self.log_activation_scale.exp()
            inputs = binary_sign((inputs - self.threshold) / scale, self.options.activation_gradient)
        if torch.is_autocast_enabled("cuda" if inputs.is_cuda else "cpu"):
            # mixed precision rounds the product anyway: one operation, whose output keeps the low precision
            return F.linear(scale * inputs, self.alpha.unsqueeze(1) * signs, self.bias)
        # scaled after the product, which is then an exact integer: packed execution finds the same numbers
        return F.linear(inputs, signs) * self.output_scale() + self.bias

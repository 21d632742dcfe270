"""Uniform quantizers of weights and activations, their ranges, learned steps and learned rounding.

A grid of b bits has the values S (q - Z), with step S, integer zero point Z and codes q = 0 ... 2^b - 1, so that zero is always
one of them.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

RangeMethod = Literal["minmax", "search"]
_SMALLEST_STEP = 1e-8
_SHRINK_FACTORS = [1 - index / 100 for index in range(80)]  # 1.00 ... 0.21, of the range search
_SEARCH_EXPONENT = 2.4  # of the errors that the search sums
_STRETCH = 1.2  # h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1): reaches 0 and 1 at finite alpha
_SHIFT = 0.1


def uniform_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Step and zero point (int32) that cover low ... high, once those are widened to include zero.

    Asymmetric: S = (high - low) / (2^b - 1), Z = clip(round(-low / S), 0, 2^b - 1) (RAAD, eq. 2, at b bits). Symmetric:
    Z = 2^(b-1), so that q - Z is a signed integer of b bits.
    """
    low, high, top = low.clamp_max(0), high.clamp_min(0), 2**bits - 1
    if symmetric:
        half = 2 ** (bits - 1)
        step = torch.maximum(-low / half, high / max(half - 1, 1)).clamp_min(_SMALLEST_STEP)
        return step, torch.full_like(step, half, dtype=torch.int32)
    step = ((high - low) / top).clamp_min(_SMALLEST_STEP)
    return step, (-low / step).round().clamp(0, top).to(torch.int32)


def on_grid(values: Tensor, step: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Nearest values of the grid with codes 0 ... top."""
    return (values / step).round_().add_(zero_point).clamp_(0, top).sub_(zero_point).mul_(step)


def searched_range(values: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Of 80 shrunken forms of low ... high, (channels,), those with the least sum of |error|^2.4 of values (channels, n).

    As BRECQ's code does it (Li et al., ICLR 2021).
    """
    least, chosen = torch.full_like(low, math.inf), torch.ones_like(low)
    for factor in _SHRINK_FACTORS:
        step, zero_point = uniform_grid(factor * low, factor * high, bits, symmetric)
        rounded = on_grid(values, step.unsqueeze(1), zero_point.unsqueeze(1), 2**bits - 1)
        error = (rounded - values).abs_().pow_(_SEARCH_EXPONENT).sum(dim=1)
        chosen = torch.where(error < least, factor, chosen)
        least = torch.minimum(error, least)
    return chosen * low, chosen * high


class _FakeQuantization(torch.autograd.Function):
    """`on_grid` with straight-through gradients; one of torch's own would be several times slower on a CPU."""

    @staticmethod
    def forward(ctx, values: Tensor, step: Tensor, zero_point: Tensor, top: int, gradient_scale: float) -> Tensor:
        ctx.top, ctx.gradient_scale = top, gradient_scale
        codes = (values.to(step.dtype) / step).round_().add_(zero_point)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(values, step, zero_point)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward((codes >= 0) & (codes <= top))
        return codes.clamp_(0, top).sub_(zero_point).mul_(step)

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[1]:
            return outer * ctx.saved_tensors[0], None, None, None, None
        values, step, zero_point = ctx.saved_tensors
        scaled = values.to(step.dtype) / step
        codes = scaled.round() + zero_point
        inside = (codes >= 0) & (codes <= ctx.top)
        by_step = torch.where(inside, codes - zero_point - scaled, codes.clamp(0, ctx.top) - zero_point)
        return outer * inside, (outer * by_step).sum_to_size(step.shape) * ctx.gradient_scale, None, None, None


class UniformQuantizer(nn.Module):
    """Rounds to a uniform grid; gradients pass straight through where a value rounds to a code of the grid, else are zero.

    The step is kept as its logarithm, so that it stays positive and an Adam step changes it by a share of itself. If learned,
    its gradient is LSQ's (Esser et al., ICLR 2020): round(v/S) - v/S inside and the clipped code outside, times
    1 / sqrt(N (2^b - 1)) with N values per channel or image, 2^(b-1) - 1 instead of 2^b - 1 where symmetric. The zero point
    stays: integer engines need an integer, and LSQ+'s learned offset is not one.

    The state dict holds step, zero point, bits, symmetry and whether there is a range: loading restores all of them.

    Args:
        bits: 2 ... 8.
        channels: a grid per index of the first axis; None: one grid for all.
        symmetric: see `uniform_grid`.
        learn_step: whether the step is trained.

    Raises:
        ValueError: bits outside 2 ... 8.
    """

    def __init__(self, bits: int, channels: int | None = None, symmetric: bool = False, learn_step: bool = False):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"a quantizer of {bits} bits; 2 to 8 are possible")
        self.bits, self.symmetric, self.has_range = bits, symmetric, False
        shape = () if channels is None else (channels,)
        self.log_step = nn.Parameter(torch.zeros(shape), requires_grad=learn_step)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def step(self) -> Tensor:
        """S, () or (channels,)."""
        return self.log_step.exp()

    @torch.no_grad()
    def fit(self, values: Tensor, method: RangeMethod = "minmax", extent: tuple[Tensor, Tensor] | None = None) -> None:
        """Take the range of values (channels, ...) or, with one grid, of any shape.

        Args:
            method: `minmax`, or `search` for `searched_range`.
            extent: low and high, () or (channels,), where values are only a sample of what they come from.
        """
        per_channel = self.log_step.ndim == 1
        rows = values.detach().flatten(1) if per_channel else values.detach().reshape(1, -1)
        low, high = torch.aminmax(rows, dim=1) if extent is None else (side.reshape(len(rows)) for side in extent)
        if method == "search":
            low, high = searched_range(rows, low, high, self.bits, self.symmetric)
        step, zero_point = uniform_grid(low, high, self.bits, self.symmetric)
        self.log_step.copy_(step.log().view_as(self.log_step))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))
        self.has_range = True

    def grid(self, dimensions: int) -> tuple[Tensor, Tensor]:
        """Step and zero point in a shape that broadcasts against values of so many axes."""
        shape = (-1, *[1] * (dimensions - 1)) if self.log_step.ndim else ()
        return self.step.view(shape), self.zero_point.view(shape)

    def forward(self, values: Tensor) -> Tensor:
        if not self.has_range:
            raise RuntimeError("a quantizer without a range: calibrate the network, or load its state")
        largest = 2 ** (self.bits - 1) - 1 if self.symmetric else self.top
        gradient_scale = 1 / math.sqrt(max(1, values[0].numel()) * largest)
        return _FakeQuantization.apply(values, *self.grid(values.ndim), self.top, gradient_scale)

    @torch.no_grad()
    def codes(self, values: Tensor) -> Tensor:
        """q of what `forward` makes of values, int32 in 0 ... 2^b - 1."""
        step, zero_point = self.grid(values.ndim)
        return (self(values) / step).round().to(torch.int32) + zero_point

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.bits, self.symmetric, self.has_range], dtype=torch.int32)

    def set_extra_state(self, state: Tensor) -> None:
        self.bits, self.symmetric, self.has_range = int(state[0]), bool(state[1]), bool(state[2])


class AdaptiveRounding(nn.Module):
    """AdaRound (Nagel et al., ICML 2020): learns per weight whether it is rounded down (h = 0) or up (h = 1).

    `forward` gives S (clip(floor(W / S) + h + Z, 0, 2^b - 1) - Z) with h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1). It starts
    with h = W / S - floor(W / S), that is, from the weights themselves, cut to the range.
    """

    def __init__(self, quantizer: UniformQuantizer, weight: Tensor):
        super().__init__()
        step, zero_point = quantizer.grid(weight.ndim)
        self.step, self.zero_point, self.top = step.detach(), zero_point, quantizer.top
        scaled = weight.detach() / self.step
        self.floor = scaled.floor()
        self.alpha = nn.Parameter(-(_STRETCH / (scaled - self.floor + _SHIFT) - 1).log())

    def opening(self) -> Tensor:
        """h, in the shape of the weights."""
        return (_STRETCH * self.alpha.sigmoid() - _SHIFT).clamp(0, 1)

    def _weights(self, opening: Tensor) -> Tensor:
        return ((self.floor + opening + self.zero_point).clamp(0, self.top) - self.zero_point) * self.step

    def forward(self) -> Tensor:
        return self._weights(self.opening())

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """Weights with h rounded to 0 or 1: values of the grid."""
        return self._weights((self.opening() >= 0.5).to(self.floor.dtype))

    def regulariser(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta, zero once every h is 0 or 1."""
        return (1 - (2 * self.opening() - 1).abs().pow(beta)).sum()

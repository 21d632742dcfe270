"""The sign function and the two gradients it is trained with."""

from typing import Literal

import torch
from torch import Tensor

Gradient = Literal["clip", "triangle"]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, gradient: Gradient) -> Tensor:
        ctx.save_for_backward(values)
        ctx.gradient = gradient
        return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        if ctx.gradient == "clip":
            return outer * (values.abs() <= 1), None
        return outer * (2 - 2 * values.abs()).clamp_min(0), None


def binary_sign(values: Tensor, gradient: Gradient) -> Tensor:
    """+1 where values >= 0, else -1 (zero is +1, so that one bit can hold it).

    Gradient "clip" passes where |value| <= 1 (straight-through estimator); "triangle" is 2 - 2|value|, cut at 0
    (Bi-Real Net, Liu et al. 2018).
    """
    return _Sign.apply(values, gradient)

"""Losses of the reconstruction networks, on tokens (B, N, C)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_MEAN = 1e-12  # a perfect reconstruction has mean distance 0 and needs no weights


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return gradient * weights, None


def scale_gradient(values: Tensor, weights: Tensor) -> Tensor:
    """Identity whose gradient is multiplied by `weights` (broadcast)."""
    return _ScaleGradient.apply(values, weights)


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine over the channels: (B, N, C) twice -> (B, N)."""
    return 1 - F.cosine_similarity(first, second, dim=-1)


def global_cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine of all tokens of an image taken as one vector, mean over the batch: a scalar."""
    return (1 - F.cosine_similarity(first.flatten(1), second.flatten(1), dim=-1)).mean()


def _mean_of_whole_batch(values: Tensor) -> Tensor:
    """Mean over the equal parts of all processes that train together, or of this one."""
    mean = values.mean()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def soft_mining_loss(target: Tensor, reconstruction: Tensor, exponent: float = 3.0) -> Tensor:
    """Global cosine distance whose gradient is weighted per token (INP-Former, soft mining loss).

    A token's weight is (distance / mean distance of the batch) ** exponent: what is badly reconstructed pulls harder.
    The value is unweighted. `target` receives no gradient. Where several processes share a batch in equal parts, the mean
    distance is that of the whole batch, and the mean of their gradients is the gradient of the whole batch.
    """
    target = target.detach()
    with torch.no_grad():
        distance = cosine_distance(target, reconstruction)  # (B, N)
        weights = (distance / _mean_of_whole_batch(distance).clamp_min(_SMALLEST_MEAN)) ** exponent
    return global_cosine_distance(target, scale_gradient(reconstruction, weights.unsqueeze(-1)))


def _of_whole_batch(values: Tensor) -> Tensor:
    """The equal parts of all processes that train together as one batch, or this one's own."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def hard_mining_loss(target: Tensor, reconstruction: Tensor, mined_share: float, factor: float = 0.1) -> Tensor:
    """Global cosine distance whose gradient is multiplied by `factor` at all but the hardest tokens (Dinomaly, loose loss).

    The share `mined_share` of the tokens, those with the smallest distance in the batch, counts as easy. The value is
    unweighted, `target` receives no gradient. Where several processes share a batch in equal parts, the tokens are those of
    the whole batch.
    """
    target = target.detach()
    with torch.no_grad():
        distance = cosine_distance(target, reconstruction)  # (B, N)
        batch = _of_whole_batch(distance).flatten()
        hard = max(1, int(len(batch) * (1 - mined_share)))
        threshold = batch.kthvalue(len(batch) - hard + 1).values  # the hard-th largest
        weights = torch.ones_like(distance).masked_fill_(distance < threshold, factor)
    return global_cosine_distance(target, scale_gradient(reconstruction, weights.unsqueeze(-1)))


def nearest_prototype_distance(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """1 - cosine of every token (B, N, C) to the nearest prototype (B, M, C) of its image: (B, N)."""
    with torch.autocast(tokens.device.type, enabled=False):
        similarity = F.normalize(tokens, dim=-1) @ F.normalize(prototypes, dim=-1).transpose(-2, -1)  # (B, N, M)
        return (1 - similarity).amin(dim=-1)


def prototype_coherence_loss(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Mean distance of every token (B, N, C) to its nearest prototype (B, M, C) of the image (INP-Former, L_c)."""
    return nearest_prototype_distance(tokens, prototypes).mean()

"""Losses and their gradients against slow loops in float64."""

import math

import numpy as np
import pytest
import torch

from models.losses import (
    cosine_distance,
    global_cosine_distance,
    prototype_coherence_loss,
    scale_gradient,
    soft_mining_loss,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape)


def slow_cosine(first: list[float], second: list[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))


def slow_global_cosine_distance(target: np.ndarray, reconstruction: np.ndarray) -> float:
    distances = [
        1 - slow_cosine(image.ravel().tolist(), rebuilt.ravel().tolist())
        for image, rebuilt in zip(target, reconstruction, strict=True)
    ]
    return sum(distances) / len(distances)


def slow_weights(target: np.ndarray, reconstruction: np.ndarray, exponent: float) -> np.ndarray:
    """(distance / mean distance over all images and tokens) ** exponent, per token."""
    distances = np.empty(target.shape[:2])
    for image in range(target.shape[0]):
        for token in range(target.shape[1]):
            distances[image, token] = 1 - slow_cosine(target[image, token], reconstruction[image, token])
    return (distances / (distances.sum() / distances.size)) ** exponent


def finite_differences(function, values: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.empty_like(values)
    for index in np.ndindex(values.shape):
        raised, lowered = values.copy(), values.copy()
        raised[index] += step
        lowered[index] -= step
        gradient[index] = (function(raised) - function(lowered)) / (2 * step)
    return gradient


@pytest.mark.parametrize("exponent", [3.0, 1.0, 0.0])
@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 2, 7), (2, 1, 3)])
def test_soft_mining_loss_value_and_gradient(shape, exponent):
    target, reconstruction = normal(*shape), normal(*shape, seed=1)
    rebuilt = torch.tensor(reconstruction, requires_grad=True)
    loss = soft_mining_loss(torch.tensor(target), rebuilt, exponent)
    loss.backward()

    assert loss.item() == pytest.approx(slow_global_cosine_distance(target, reconstruction), abs=1e-12)
    unweighted = finite_differences(lambda values: slow_global_cosine_distance(target, values), reconstruction)
    expected = unweighted * slow_weights(target, reconstruction, exponent)[:, :, None]
    np.testing.assert_allclose(rebuilt.grad.numpy(), expected, atol=1e-9)


def test_soft_mining_loss_has_the_exponent_three():
    target, reconstruction = torch.tensor(normal(2, 6, 4)), torch.tensor(normal(2, 6, 4, seed=1))
    gradients = []
    for arguments in ((), (3.0,)):
        rebuilt = reconstruction.clone().requires_grad_()
        soft_mining_loss(target, rebuilt, *arguments).backward()
        gradients.append(rebuilt.grad)
    assert torch.equal(*gradients)


def test_soft_mining_weights_are_relative_to_the_whole_batch():
    """The second image is rebuilt almost perfectly, so its gradient nearly vanishes; alone it would not."""
    target = normal(2, 6, 4)
    reconstruction = np.concatenate([normal(1, 6, 4, seed=1), target[1:] + 0.01 * normal(1, 6, 4, seed=2)])
    gradients = []
    for part in (slice(0, 2), slice(1, 2)):
        rebuilt = torch.tensor(reconstruction[part], requires_grad=True)
        soft_mining_loss(torch.tensor(target[part]), rebuilt).backward()
        gradients.append(rebuilt.grad[-1].abs().max().item())
    together, alone = gradients
    assert 0 < together < 1e-6 * alone


def test_soft_mining_loss_leaves_the_target_alone():
    target = torch.tensor(normal(2, 3, 4), requires_grad=True)
    rebuilt = torch.tensor(normal(2, 3, 4, seed=1), requires_grad=True)
    soft_mining_loss(target, rebuilt).backward()
    assert target.grad is None
    assert rebuilt.grad.abs().sum() > 0


def test_a_perfect_reconstruction_has_loss_zero_and_a_finite_gradient():
    target = torch.tensor([[[1.0, 2.0, 2.0], [2.0, -1.0, 2.0]]])
    rebuilt = target.clone().requires_grad_()
    loss = soft_mining_loss(target, rebuilt)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert rebuilt.grad.isfinite().all()


@pytest.mark.parametrize("weight_shape", [(2, 3, 4), (2, 3, 1), (4,), ()])
def test_scale_gradient_is_the_identity_with_a_scaled_gradient(weight_shape):
    values = torch.tensor(normal(2, 3, 4), requires_grad=True)
    weights = torch.tensor(normal(*weight_shape, seed=1))
    incoming = torch.tensor(normal(2, 3, 4, seed=2))
    result = scale_gradient(values, weights)
    result.backward(incoming)
    assert torch.equal(result, values)
    np.testing.assert_allclose(values.grad.numpy(), incoming.numpy() * weights.numpy(), rtol=1e-12)


def test_scale_gradient_gives_the_weights_no_gradient_and_keeps_the_incoming_one():
    values = torch.ones(3, requires_grad=True)
    weights = torch.full((3,), 5.0, requires_grad=True)
    incoming = torch.ones(3)
    scale_gradient(values, weights).backward(incoming)
    assert weights.grad is None
    assert incoming.tolist() == [1, 1, 1]
    assert values.grad.tolist() == [5, 5, 5]


def test_cosine_distances():
    first, second = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    expected = [[1 - slow_cosine(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    per_token = cosine_distance(torch.tensor(first), torch.tensor(second))
    np.testing.assert_allclose(per_token.numpy(), expected, atol=1e-12)
    whole = global_cosine_distance(torch.tensor(first), torch.tensor(second)).item()
    assert whole == pytest.approx(slow_global_cosine_distance(first, second), abs=1e-12)


def slow_coherence(tokens: np.ndarray, prototypes: np.ndarray) -> float:
    total = 0.0
    for image in range(len(tokens)):
        for token in tokens[image]:
            total += min(1 - slow_cosine(token, prototype) for prototype in prototypes[image])
    return total / (tokens.shape[0] * tokens.shape[1])


@pytest.mark.parametrize(("images", "tokens", "prototypes"), [(2, 5, 3), (1, 1, 6), (3, 4, 1)])
def test_prototype_coherence_loss_value_and_gradient(images, tokens, prototypes):
    values, centres = normal(images, tokens, 4), normal(images, prototypes, 4, seed=1)
    learned = torch.tensor(centres, requires_grad=True)
    loss = prototype_coherence_loss(torch.tensor(values), learned)
    loss.backward()
    assert loss.item() == pytest.approx(slow_coherence(values, centres), abs=1e-12)
    expected = finite_differences(lambda changed: slow_coherence(values, changed), centres)
    np.testing.assert_allclose(learned.grad.numpy(), expected, atol=1e-8)


def test_prototype_coherence_is_zero_when_every_token_points_along_a_prototype():
    prototypes = torch.tensor(normal(2, 3, 4))
    tokens = torch.stack([7 * prototypes[:, 2], 0.1 * prototypes[:, 0], prototypes[:, 1]], dim=1)
    assert prototype_coherence_loss(tokens, prototypes).item() == pytest.approx(0, abs=1e-12)
    assert prototype_coherence_loss(-tokens, prototypes).item() > 0.1

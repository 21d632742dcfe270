"""Sign, binary linear layer, softmax-aware binarization and stages against slow plain formulas in float64."""

import copy

import numpy as np
import pytest
import torch

from binarize.attention import BinaryPrototypeAttention, SoftmaxAwareBinarization
from binarize.linear import BinarizationOptions, BinaryLinear
from binarize.sign import binary_sign
from binarize.stages import (
    attention_gates,
    binarize,
    binary_layers,
    calibrate,
    force_gates,
    mean_gate,
    parameter_groups,
    scale_parameters,
)
from models.layers import PrototypeAttention

OPTIONS = BinarizationOptions()


def signs(values: np.ndarray) -> np.ndarray:
    return np.where(values >= 0, 1.0, -1.0)


def test_sign_of_zero_is_plus_one():
    values = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    assert binary_sign(values, "clip").tolist() == [-1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [("clip", [0, 1, 1, 1, 1, 1, 0]), ("triangle", [0, 0, 1, 2, 1.5, 0, 0])],
)
def test_sign_gradients(gradient, expected):
    values = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 1.01], dtype=torch.float64, requires_grad=True)
    (3 * binary_sign(values, gradient)).sum().backward()
    assert values.grad.tolist() == [3 * value for value in expected]


@pytest.fixture
def layer():
    """A calibrated 5 -> 4 layer in float64."""
    torch.manual_seed(0)
    layer = BinaryLinear.from_linear(torch.nn.Linear(5, 4), OPTIONS).double()
    layer.calibrate(torch.randn(7, 5, dtype=torch.float64) * 2 + 1)
    with torch.no_grad():
        layer.bias.copy_(torch.randn(4))
        layer.alpha.mul_(torch.rand(4) + 0.5)
    return layer


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_binary_linear_forward(layer):
    inputs = torch.randn(3, 5, dtype=torch.float64) * 2
    scale, threshold = np.exp(numbers(layer.log_activation_scale)), numbers(layer.threshold)
    weight = numbers(layer.weight)
    weight_signs = signs(weight - weight.mean(axis=1, keepdims=True))
    activations = scale * signs((numbers(inputs) - threshold) / scale)
    expected = np.array(
        [
            [
                layer.alpha[o].item() * sum(weight_signs[o, i] * row[i] for i in range(5)) + layer.bias[o].item()
                for o in range(4)
            ]
            for row in activations
        ]
    )
    np.testing.assert_allclose(numbers(layer(inputs)), expected, rtol=1e-12)


def test_weight_only_linear_forward():
    torch.manual_seed(0)
    layer = BinaryLinear.from_linear(torch.nn.Linear(5, 4), BinarizationOptions(activation_bits=32)).double()
    inputs = torch.randn(3, 5, dtype=torch.float64)
    weight = numbers(layer.weight)
    weight_signs = signs(weight - weight.mean(axis=1, keepdims=True))
    expected = numbers(inputs) @ (numbers(layer.alpha)[:, None] * weight_signs).T + numbers(layer.bias)
    np.testing.assert_allclose(numbers(layer(inputs)), expected, rtol=1e-12)
    assert set(layer.state_dict()) == {"weight", "bias", "alpha"}


def test_binary_linear_gradients(layer):
    inputs = (torch.randn(3, 5, dtype=torch.float64) * 2).requires_grad_()
    upstream = torch.randn(3, 4, dtype=torch.float64)
    (layer(inputs) * upstream).sum().backward()

    scale, threshold, alpha = np.exp(numbers(layer.log_activation_scale)), numbers(layer.threshold), numbers(layer.alpha)
    centred = numbers(layer.weight) - numbers(layer.weight).mean(axis=1, keepdims=True)
    u = (numbers(inputs) - threshold) / scale
    triangle = np.maximum(0, 2 - 2 * np.abs(u))
    activations, up = scale * signs(u), numbers(upstream)
    at_activation = up @ (alpha[:, None] * signs(centred))
    np.testing.assert_allclose(numbers(inputs.grad), at_activation * triangle, rtol=1e-10)
    np.testing.assert_allclose(numbers(layer.threshold.grad), -(at_activation * triangle).sum(axis=0), rtol=1e-10)
    by_scale = (at_activation * (signs(u) - triangle * u)).sum()
    np.testing.assert_allclose(numbers(layer.log_activation_scale.grad), by_scale * scale, rtol=1e-10)
    np.testing.assert_allclose(numbers(layer.alpha.grad), (up * (activations @ signs(centred).T)).sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(numbers(layer.bias.grad), up.sum(axis=0), rtol=1e-10)
    at_weight = (up.T @ activations) * alpha[:, None] * (np.abs(centred) <= 1)
    np.testing.assert_allclose(numbers(layer.weight.grad), at_weight - at_weight.mean(axis=1, keepdims=True), rtol=1e-10)


def test_conversion_keeps_weights_and_takes_alpha_from_the_row_deviation():
    linear = torch.nn.Linear(6, 3)
    layer = BinaryLinear.from_linear(linear, OPTIONS)
    weight = numbers(linear.weight)
    np.testing.assert_allclose(
        numbers(layer.alpha), np.abs(weight - weight.mean(axis=1, keepdims=True)).mean(axis=1), rtol=1e-6
    )
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


def test_calibration_is_remembered_in_the_state_dict():
    layer = BinaryLinear.from_linear(torch.nn.Linear(6, 3), OPTIONS)
    inputs = torch.randn(2, 9, 6) * 3 + 1
    layer.calibrate(inputs)
    tokens = numbers(inputs).reshape(-1, 6)
    np.testing.assert_allclose(numbers(layer.threshold), tokens.mean(axis=0), rtol=1e-5)
    deviation = np.abs(tokens - tokens.mean(axis=0)).mean()
    np.testing.assert_allclose(numbers(layer.log_activation_scale), np.log(deviation), rtol=1e-5)
    other = BinaryLinear(6, 3, OPTIONS)
    assert not other.calibrated
    other.load_state_dict(layer.state_dict())
    assert other.calibrated


def plain_sab(attention_map, alpha, alpha_at_conversion, scale, slope, middle, forced=None):
    """Softmax-aware binarization, entry by entry."""
    batch, heads, rows, columns = attention_map.shape
    mixed = np.empty_like(attention_map)
    for b in range(batch):
        for h in range(heads):
            drift = alpha[h].mean() / alpha_at_conversion[h].mean()
            share = 0.25 * min(2.0, max(0.5, drift))
            for n in range(rows):
                row = attention_map[b, h, n]
                maximum = row.max()
                chosen = [maximum > 0 and value >= share * maximum for value in row]
                row_scale = sum(v for v, c in zip(row, chosen, strict=True) if c) / max(1, sum(chosen))
                gate = 1 / (1 + np.exp(-slope[h] * (maximum / scale[h] - middle[h]))) if forced is None else forced
                for m in range(columns):
                    mixed[b, h, n, m] = (1 - gate) * row[m] + gate * row_scale * chosen[m]
    return mixed


@pytest.fixture
def sab_case():
    """Two heads of three channels, a map with an all-zero row, and alphas that drifted beyond both limits."""
    generator = torch.Generator().manual_seed(0)
    attention_map = torch.relu(torch.randn(2, 2, 4, 6, generator=generator, dtype=torch.float64))
    attention_map[0, 0, 1] = 0
    start = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
    sab = SoftmaxAwareBinarization(start, 2, "mixed").double()
    with torch.no_grad():
        sab.gate_slope.copy_(torch.tensor([3.0, 5.0]).reshape(2, 1, 1))
        sab.gate_middle.copy_(torch.tensor([0.4, 0.9]).reshape(2, 1, 1))
    scale = torch.tensor([1.5, 0.8], dtype=torch.float64).reshape(2, 1, 1)
    alpha = start * torch.tensor([4.0] * 3 + [0.1] * 3, dtype=torch.float64)
    return sab, attention_map, start, alpha, scale


@pytest.mark.parametrize("drifted", [False, True])
@pytest.mark.parametrize("forced", [None, 0.0, 1.0, 0.3])
def test_softmax_aware_binarization_is_the_plain_formula(sab_case, drifted, forced):
    sab, attention_map, start, alpha, scale = sab_case
    used = alpha if drifted else start
    sab.forced_gate = forced
    expected = plain_sab(
        numbers(attention_map),
        numbers(used).reshape(2, 3),
        numbers(start).reshape(2, 3),
        numbers(scale).ravel(),
        numbers(sab.gate_slope).ravel(),
        numbers(sab.gate_middle).ravel(),
        forced,
    )
    np.testing.assert_allclose(numbers(sab(attention_map, used, scale)), expected, rtol=1e-12)
    if forced == 0:
        np.testing.assert_array_equal(expected, numbers(attention_map))


def test_row_scale_of_the_binary_map_is_the_least_squares_one(sab_case):
    sab, attention_map, start, _, scale = sab_case
    sab.mode = "binary"
    mixed = numbers(sab(attention_map, start, scale))
    for row, result in zip(numbers(attention_map).reshape(-1, 6), mixed.reshape(-1, 6), strict=True):
        assert len(set(np.round(result[result > 0], 12))) <= 1
        chosen = result > 0
        best = min(np.linspace(0, 3, 30001), key=lambda c: ((row - c * chosen) ** 2).sum())
        assert result.max() == pytest.approx(best if chosen.any() else 0, abs=2e-4)


def test_gradient_of_the_binary_map_goes_straight_through(sab_case):
    sab, attention_map, start, _, scale = sab_case
    sab.forced_gate = 1.0
    attention_map = attention_map.requires_grad_()
    upstream = torch.randn(attention_map.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (sab(attention_map, start, scale) * upstream).sum().backward()
    values, up = numbers(attention_map), numbers(upstream)
    maximum = values.max(axis=-1, keepdims=True)
    chosen = ((values >= 0.25 * maximum) & (maximum > 0)).astype(float)
    count = np.maximum(1, chosen.sum(axis=-1, keepdims=True))
    row_scale = (values * chosen).sum(axis=-1, keepdims=True) / count
    through_scale = (up * chosen).sum(axis=-1, keepdims=True) * chosen / count
    np.testing.assert_allclose(numbers(attention_map.grad), up * row_scale + through_scale, rtol=1e-10)


def test_gate_parameters_learn(sab_case):
    sab, attention_map, start, _, scale = sab_case
    sab(attention_map, start, scale).square().sum().backward()
    assert sab.gate_slope.grad.abs().min() > 0
    assert sab.gate_middle.grad.abs().min() > 0


def test_binary_attention_without_sab_is_float_attention_of_binary_projections():
    torch.manual_seed(0)
    attention = PrototypeAttention(8, 2)
    binary = BinaryPrototypeAttention(copy.deepcopy(attention), BinarizationOptions(sab="off"))
    tokens, prototypes = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    attention.q, attention.kv, attention.proj = binary.q, binary.kv, binary.proj
    assert torch.equal(binary(tokens, prototypes), attention(tokens, prototypes))


def names_of_binary_layers(detector) -> set[str]:
    return {name for name, module in detector.named_modules() if isinstance(module, BinaryLinear)}


def expected_names(layers: list[str]) -> set[str]:
    return {f"decoder.{block}.{layer}" for block in range(8) for layer in layers}


def test_stages_are_exactly_attention_then_mlp(tiny_detector):
    attention, mlp = ["attn.q", "attn.kv", "attn.proj"], ["mlp.fc1", "mlp.fc2"]
    for stage, layers in ((0, []), (1, attention), (1, attention), (2, attention + mlp), (2, attention + mlp)):
        binarize(tiny_detector, stage, OPTIONS)
        assert names_of_binary_layers(tiny_detector) == expected_names(layers)
    assert len(attention_gates(tiny_detector)) == 8


def test_stage_2_keeps_what_stage_1_learned(tiny_detector):
    features = torch.randn(2, 2, 16, 32)
    binarize(tiny_detector, 1, OPTIONS)
    assert calibrate(tiny_detector, features) == 24
    with torch.no_grad():
        for parameter in scale_parameters(tiny_detector):
            parameter.add_(0.01)
    before = copy.deepcopy(tiny_detector.trained_state())
    binarize(tiny_detector, 2, OPTIONS)
    assert calibrate(tiny_detector, features) == 16
    assert calibrate(tiny_detector, features) == 0
    after = tiny_detector.trained_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(layer.calibrated) for layer in binary_layers(tiny_detector))


def test_optimiser_groups_hold_every_trained_parameter_once(tiny_detector):
    binarize(tiny_detector, 2, OPTIONS)
    weights, scales = parameter_groups(tiny_detector, 0.1)
    assert (weights["weight_decay"], scales["weight_decay"]) == (0.1, 0.0)
    grouped = [id(parameter) for group in (weights, scales) for parameter in group["params"]]
    trained = {id(value) for name, value in tiny_detector.named_parameters() if not name.startswith("encoder.")}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trained
    without_decay = {id(parameter) for parameter in scales["params"]}
    for name, parameter in tiny_detector.named_parameters():
        is_scale = name.endswith(("alpha", "threshold", "log_activation_scale", "gate_slope", "gate_middle"))
        assert (id(parameter) in without_decay) == is_scale


def test_forced_gates_and_their_mean(tiny_detector):
    features = torch.randn(2, 2, 16, 32)
    assert mean_gate(tiny_detector) is None
    binarize(tiny_detector, 1, OPTIONS)
    calibrate(tiny_detector, features)
    learned = tiny_detector.anomaly_map(features)
    for value in (0.0, 1.0):
        force_gates(tiny_detector, value)
        assert not torch.equal(tiny_detector.anomaly_map(features), learned)
        assert mean_gate(tiny_detector) == value
    force_gates(tiny_detector, None)
    assert torch.equal(tiny_detector.anomaly_map(features), learned)
    assert 0 < mean_gate(tiny_detector) < 1


def test_one_training_step_changes_latent_weights_and_scales(tiny_detector):
    features = torch.randn(2, 2, 16, 32)
    binarize(tiny_detector, 2, OPTIONS)
    calibrate(tiny_detector, features)
    loss, parts = tiny_detector.training_loss(features)
    loss.backward()
    assert set(parts) == {"reconstruction", "coherence"}
    for layer in binary_layers(tiny_detector):
        assert layer.weight.grad.abs().sum() > 0
        assert layer.alpha.grad.abs().sum() > 0


def test_distillation_adds_the_distance_to_the_teacher(tiny_detector):
    features = torch.randn(2, 2, 16, 32)
    teacher = copy.deepcopy(tiny_detector)
    binarize(tiny_detector, 1, OPTIONS)
    calibrate(tiny_detector, features)
    plain, _ = tiny_detector.training_loss(features)
    tiny_detector.distil_from(teacher, 0.5)
    loss, parts = tiny_detector.training_loss(features)
    first, second = (numbers(detector.reconstruct(features)) for detector in (teacher, tiny_detector))
    cosine = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    assert parts["distillation"].item() == pytest.approx(0.5 * (1 - cosine).mean(), rel=1e-4)
    assert loss.item() == pytest.approx(plain.item() + parts["distillation"].item(), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any("teacher" in name for name in tiny_detector.state_dict())

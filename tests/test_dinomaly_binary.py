"""Dinomaly at stages 1 and 2: which layers are binary, softmax-aware binarization of its maps, and calibration."""

import copy

import numpy as np
import pytest
import torch

from binarize.attention import BinarySoftmaxAttention
from binarize.linear import BinarizationOptions, BinaryLinear
from binarize.stages import attention_gates, binarize, binary_layers, calibrate, force_gates, scale_parameters
from models.dinomaly import Dinomaly, DinomalyTraining
from models.layers import LinearSelfAttention, SoftmaxSelfAttention
from tests.test_binarize import expected_names, names_of_binary_layers, numbers, plain_sab
from tests.test_dinomaly import normal, random_dinomaly, random_features

LINEAR, SOFTMAX = "linear", "softmax"
CASES = [(LINEAR, "off"), (SOFTMAX, "off"), (SOFTMAX, "mixed"), (SOFTMAX, "binary")]
HEADS, CHANNELS = 2, 32


def binary_dinomaly(encoder, attention: str, stage: int, sab: str = "off", bits: int = 1) -> Dinomaly:
    detector = random_dinomaly(encoder, decoder_attention=attention)
    binarize(detector, stage, BinarizationOptions(bits, sab))
    return detector


@pytest.mark.parametrize(("attention", "sab"), [*CASES, (LINEAR, "mixed")])
def test_stages_are_exactly_attention_then_mlp(tiny_encoder, attention, sab):
    detector = random_dinomaly(tiny_encoder, decoder_attention=attention)
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    options = BinarizationOptions(sab=sab)
    for stage, count in ((0, 0), (1, 2), (1, 2), (2, 4), (2, 4), (1, 4)):
        before = dict(detector.named_modules())
        binarize(detector, stage, options)
        assert names_of_binary_layers(detector) == expected_names(layers[:count])
        kept = [name for name, module in before.items() if isinstance(module, (BinaryLinear, BinarySoftmaxAttention))]
        assert all(detector.get_submodule(name) is before[name] for name in kept)  # what is binary stays as it is
    kinds = {type(block.attn) for block in detector.decoder}
    assert kinds == {LinearSelfAttention if attention == LINEAR else BinarySoftmaxAttention}
    has_gates = attention == SOFTMAX and sab != "off"
    assert [gate.mode for gate in attention_gates(detector)] == [sab] * (8 if has_gates else 0)


@pytest.mark.parametrize(("attention", "sab"), CASES)
def test_what_the_stage_before_has_learned_is_kept(tiny_encoder, attention, sab):
    detector = random_dinomaly(tiny_encoder, decoder_attention=attention)
    features = random_features(tiny_encoder)
    for stage, fresh_layers in ((1, 16), (2, 16)):
        before = copy.deepcopy(detector.trained_state())
        binarize(detector, stage, BinarizationOptions(sab=sab))
        assert calibrate(detector, features) == fresh_layers
        assert calibrate(detector, features) == 0
        after = detector.trained_state()
        assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
        with torch.no_grad():
            for parameter in scale_parameters(detector):
                parameter.add_(0.01)
    assert all(bool(layer.calibrated) for layer in binary_layers(detector))


@pytest.mark.parametrize("forced", [None, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("mode", ["mixed", "binary"])
def test_softmax_maps_are_mixed_by_the_scales_of_the_queries_and_head_scale_1(mode, forced):
    torch.manual_seed(0)
    attention = BinarySoftmaxAttention(SoftmaxSelfAttention(6, HEADS), BinarizationOptions(sab=mode)).double()
    start = numbers(attention.qkv.alpha).copy()
    with torch.no_grad():
        attention.qkv.alpha *= torch.tensor([1.7] * 3 + [0.6] * 3 + [9.0] * 6 + [0.01] * 6)  # queries of both heads, the rest
        attention.sab.gate_slope.copy_(torch.tensor([3.0, 5.0]).reshape(HEADS, 1, 1))
        attention.sab.gate_middle.copy_(torch.tensor([0.4, 0.9]).reshape(HEADS, 1, 1))
    attention.sab.forced_gate = forced
    query, key, value = (2 * normal(2, HEADS, 5, 3, seed=seed).double() for seed in range(3))
    logits = np.einsum("bhtd,bhsd->bhts", numbers(query), numbers(key)) / np.sqrt(3)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    alphas = [values[:6].reshape(HEADS, 3) for values in (numbers(attention.qkv.alpha), start)]
    gate_numbers = [numbers(values).ravel() for values in (attention.sab.gate_slope, attention.sab.gate_middle)]
    constant = 1.0 if mode == "binary" and forced is None else forced
    mixed = plain_sab(weights, *alphas, np.ones(HEADS), *gate_numbers, constant)
    expected = np.einsum("bhts,bhsd->bhtd", mixed, numbers(value))
    np.testing.assert_allclose(numbers(attention.attend(query, key, value)), expected, rtol=1e-12)


@pytest.mark.parametrize(("attention", "sab"), CASES)
def test_gradients_reach_every_trained_parameter_and_no_other(tiny_encoder, attention, sab):
    detector = binary_dinomaly(tiny_encoder, attention, 2, sab)
    features = random_features(tiny_encoder)
    calibrate(detector, features)
    detector.train().begin_iteration(500, 10_000)
    torch.manual_seed(0)
    loss, parts = detector.training_loss(features)
    loss.backward()
    assert list(parts) == ["reconstruction"]
    fixed_gates = {id(value) for gate in attention_gates(detector) for value in gate.scale_parameters() if sab == "binary"}
    for name, parameter in detector.named_parameters():
        if name.startswith("encoder.") or id(parameter) in fixed_gates:
            assert parameter.grad is None, name
        else:
            assert 0 < parameter.grad.abs().sum() < np.inf, name


@pytest.mark.parametrize("training", [False, True])
def test_calibration_sees_no_dropout_and_leaves_the_mode_as_it_was(tiny_encoder, training):
    detector = binary_dinomaly(tiny_encoder, SOFTMAX, 2, "mixed")
    detector.train_with(DinomalyTraining(bottleneck_dropout=0.5))
    features = random_features(tiny_encoder, images=3)
    detector.train(training)
    modes, state = [module.training for module in detector.modules()], torch.get_rng_state()
    assert calibrate(detector, features) == 32
    assert [module.training for module in detector.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)

    tokens = numbers(detector.eval().through_bottleneck(detector.fuse(features)))
    norm, layer = detector.decoder[0].norm1, detector.decoder[0].attn.qkv
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-8) * numbers(norm.weight) + numbers(norm.bias)
    normed = normed.reshape(-1, CHANNELS)  # of all tokens, the class token too
    assert len(normed) == 3 * 17
    np.testing.assert_allclose(numbers(layer.threshold), normed.mean(axis=0), rtol=1e-4, atol=1e-5)
    deviation = np.abs(normed - normed.mean(axis=0)).mean()
    np.testing.assert_allclose(numbers(layer.log_activation_scale.exp()), deviation, rtol=1e-5)


def test_forced_gates_are_those_of_softmax_maps(tiny_encoder):
    features = random_features(tiny_encoder)
    for attention, sab, changes in ((LINEAR, "mixed", False), (SOFTMAX, "off", False), (SOFTMAX, "mixed", True)):
        detector = binary_dinomaly(tiny_encoder, attention, 1, sab)
        calibrate(detector, features)
        learned = detector.anomaly_map(features)
        force_gates(detector, 1.0)
        assert torch.equal(detector.anomaly_map(features), learned) != changes

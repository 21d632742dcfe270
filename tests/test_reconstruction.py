"""Crops, weights of errors and the reconstruction of a quantized network against plain formulas and what they promise."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import NumericError, UserError
from models.patch_description import Autoencoder, PatchDescriptionNetwork
from quantize.blocks import Block, draw_crops, gather, normalised_fisher, output_distance
from quantize.layers import QuantizationOptions, calibrate, quantize_network, quantized_layers, set_quantization
from quantize.reconstruction import ReconstructionOptions, fit, reconstruct, regularisation_at

SHORT = ReconstructionOptions(
    iterations=80, activation_iterations=30, batch_size=8, learning_rate=0.02, crop=37, crops=24, regularisation=0.01
)
SHORTEST = replace(SHORT, iterations=12, activation_iterations=2, learning_rate=0.1, crops=12)
LEARNED = QuantizationOptions()


def network_of(size: str = "tiny", padding: bool = False) -> PatchDescriptionNetwork:
    """Heavy-tailed weights, as training leaves them."""
    torch.manual_seed(0)
    network = PatchDescriptionNetwork(size, 8, padding)
    with torch.no_grad():
        for layer in network.convolutions:
            draws = torch.distributions.StudentT(4.0).sample(layer.weight.shape)
            layer.weight.copy_(draws * layer.weight[0].numel() ** -0.5)
    return network.eval()


def images_of(count: int = 6, side: int = 49, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(count, 3, 8, 8, generator=generator), size=side, mode="bicubic")
    return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)


def quantized_of(bits=(8, 4, 4, 8), options: QuantizationOptions = LEARNED) -> PatchDescriptionNetwork:
    network = network_of()
    quantize_network(network, bits, options)
    return network


def relative_error(network: torch.nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        expected = network_of()(images)
        return float((network(images) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("size", ["tiny", "medium"])
def test_crops_give_the_very_features_of_the_whole_image(size):
    network = network_of(size).double()
    images = images_of(2, 62).double()  # no multiple of 4
    crops = draw_crops(images, 37, 12, torch.Generator().manual_seed(0))
    whole, cut = network(images).detach(), network(crops.pixels).detach()
    assert cut.shape[2:] == (2, 2)
    for features, image, row, column in zip(cut, crops.images, crops.rows // 4, crops.columns // 4, strict=True):
        torch.testing.assert_close(features, whole[image, :, row : row + 2, column : column + 2], rtol=1e-10, atol=1e-12)
    assert crops.images.tolist() == [0, 1] * 6
    assert len({*zip(crops.rows.tolist(), crops.columns.tolist(), strict=True)}) > 4
    assert int(crops.rows.max()) == 24  # the last offset whose crop fits


def test_without_a_side_the_first_whole_images_are_taken():
    images = images_of(3)
    crops = draw_crops(images, None, 2, torch.Generator())
    assert torch.equal(crops.pixels, images[:2])
    assert (crops.rows.tolist(), crops.images.tolist()) == ([0, 0], [0, 1])


@pytest.mark.parametrize("side", [29, 35, 53])
def test_crops_off_the_grid_or_too_large_are_refused(side):
    with pytest.raises(UserError, match=rf"crops of {side} pixels .* fit into 49"):
        draw_crops(images_of(), side, 4, torch.Generator())


def block_of(error_weights: torch.Tensor | None) -> tuple[Block, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs, targets, output = (torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    return Block(inputs, targets, error_weights, targets.mean(dim=(0, 2, 3))), output


@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_error_of_a_block_follows_its_formula(exponent):
    weights = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    block, output = block_of(weights)
    picks = torch.tensor([2, 0])
    difference = np.abs(output[picks].numpy() - block.targets[picks].numpy()) ** exponent * weights[picks].numpy()
    expected = difference.sum(axis=1).mean() / (np.abs(block.targets.numpy()) ** exponent).mean()
    assert block.error(output[picks], picks, exponent).item() == pytest.approx(expected)


def test_fisher_weights_of_one_leave_the_squared_error():
    plain, output = block_of(None)
    weighted, _ = block_of(torch.ones(4, 3, 2, 2, dtype=torch.float64))
    every = slice(None)
    assert weighted.error(output, every) == plain.error(output, every)
    mse = F.mse_loss(output, plain.targets) / plain.targets.square().mean()
    torch.testing.assert_close(plain.error(output, every), 3 * mse)


def test_fisher_weights_have_mean_one_and_are_damped():
    gradients = torch.tensor([0.0, 1.0, -3.0, 2.0])
    assert normalised_fisher(gradients, 0.0).tolist() == pytest.approx([0, 1 / 3.5, 9 / 3.5, 4 / 3.5])
    assert normalised_fisher(gradients, 1.0).tolist() == pytest.approx([(square / 3.5 + 1) / 2 for square in (0, 1, 9, 4)])
    assert normalised_fisher(torch.zeros(3), 1.0).tolist() == [1, 1, 1]


def test_a_block_holds_quantized_inputs_float_targets_and_the_squared_gradients_of_every_crop():
    options = QuantizationOptions(output_bits=None)
    network = quantized_of((8, 2, 2, 8), options)
    calibrate(network, images_of(), options)
    original = copy.deepcopy(network)
    set_quantization(original, False)
    set_quantization(network, False)
    network.conv1.quantizing = network.conv2.quantizing = True
    crops = draw_crops(images_of(), 37, 18, torch.Generator().manual_seed(1))  # more than a batch, the last one smaller
    block = gather(network, original, 1, crops, output_distance, damping=0.0)

    with torch.no_grad():
        torch.testing.assert_close(block.inputs, F.avg_pool2d(network.conv1(crops.pixels), 2))
        float_inputs = F.avg_pool2d(network_of().conv1(crops.pixels), 2)
        torch.testing.assert_close(block.targets, network_of().conv2(float_inputs))
        before = network_of().conv2.before_activation(float_inputs)
        torch.testing.assert_close(block.target_means, before.mean(dim=(0, 2, 3)))
        output = network.conv2(block.inputs)
        expected_final = network_of()(crops.pixels)
    output.requires_grad_()
    final = network_of().conv4(network_of().conv3(F.avg_pool2d(output, 2)))
    (gradient,) = torch.autograd.grad((final - expected_final).square().sum(), output)
    squares = gradient.square()
    torch.testing.assert_close(block.error_weights, squares / squares.mean(), rtol=1e-3, atol=1e-4)


def test_regularisation_waits_and_its_exponent_falls_linearly():
    options = ReconstructionOptions(iterations=100)
    assert regularisation_at(19, options) == (0.0, 20.0)
    assert regularisation_at(20, options) == (0.01, 20.0)
    assert regularisation_at(60, options)[1] == pytest.approx(11.0)
    assert regularisation_at(100, options)[1] == pytest.approx(2.0)


def test_reconstruction_beats_rounding_to_nearest():
    nearest, learned = QuantizationOptions(round="nearest"), LEARNED
    errors = {}
    for options in (nearest, learned):
        network = quantized_of(options=options)
        of_layers = fit(network, images_of(), options, SHORT, quiet=True)
        errors[options.round] = relative_error(network, images_of(4, seed=9))  # images that it has not seen
    assert errors["adaround"] < 0.9 * errors["nearest"]
    assert [error.bits for error in of_layers] == [8, 4, 4, 8]
    assert all(error.reconstructed < error.nearest for error in of_layers[1:])


def test_reconstructed_weights_are_values_of_the_grid_and_can_be_tuned():
    network = quantized_of()
    before = {name: value.clone() for name, value in network.state_dict().items() if name.endswith(".weight")}
    fit(network, images_of(), LEARNED, SHORT, quiet=True)
    for name, layer in zip(("conv1", "conv2", "conv3", "conv4"), quantized_layers(network), strict=True):
        torch.testing.assert_close(layer.weight, layer.quantized_weight(), rtol=1e-5, atol=0)
        step, zero_point = layer.weight_quantizer.grid(4)
        moved = layer.weight - before[f"{name}.weight"].clamp(
            -zero_point * step, (layer.weight_quantizer.top - zero_point) * step
        )
        assert (moved.abs() < 1.001 * step).all()  # rounded up or down
        assert (moved.abs() > 0.501 * step).any() or layer.bits == 8  # and not all to nearest
        assert layer.quantizing
        assert layer.weight.grad is None
    assert not any(
        parameter.requires_grad for parameter in (layer.input_quantizer.log_step for layer in quantized_layers(network))
    )
    for layer in quantized_layers(network):  # straight through to every weight, those at the ends of the grid included
        layer.quantized_weight().sum().backward()
        assert (layer.weight.grad == 1).all()


def test_bias_correction_gives_the_float_means_on_what_it_saw():
    shifts = []
    for correction in (False, True):
        options = QuantizationOptions(bias_correction=correction)
        network = quantized_of((8, 2, 2, 8), options)
        fit(network, images_of(), options, SHORTEST, quiet=True)
        crops = draw_crops(images_of(), SHORTEST.crop, SHORTEST.crops, torch.Generator().manual_seed(SHORTEST.seed))
        with torch.no_grad():
            shift = network(crops.pixels).mean(dim=(0, 2, 3)) - network_of()(crops.pixels).mean(dim=(0, 2, 3))
        shifts.append(float(shift.abs().max()))
    assert shifts[0] > 0.01
    assert shifts[1] < 1e-4


def task_loss(outputs: torch.Tensor, float_outputs: torch.Tensor, crops) -> torch.Tensor:
    assert outputs.shape == float_outputs.shape
    assert len(outputs) == len(crops)
    return outputs[:, 0].square().sum() / len(crops)


def test_same_seed_same_network_other_weights_of_errors_another_one():
    codes = []
    for fisher, loss, seed in (
        ("none", None, 0),
        ("none", None, 0),
        ("output", None, 0),
        ("task", task_loss, 0),
        ("none", None, 1),
    ):
        network = quantized_of((8, 2, 2, 8))
        options = replace(SHORTEST, fisher=fisher, seed=seed)
        torch.manual_seed(len(codes))  # of no influence
        fit(network, images_of(), LEARNED, options, loss, quiet=True)
        codes.append(torch.cat([layer.weight_codes().flatten() for layer in quantized_layers(network)]))
    assert torch.equal(codes[0], codes[1])
    assert all(not torch.equal(codes[0], other) for other in codes[2:])
    assert not torch.equal(codes[2], codes[3])


def test_steps_of_activations_are_fitted_but_stay_frozen_afterwards():
    steps = []
    for iterations in (0, 40):
        network = quantized_of((8, 2, 2, 8))
        options = replace(SHORT, iterations=0, activation_iterations=iterations, activation_learning_rate=0.01)
        error = fit(network, images_of(), LEARNED, options, quiet=True)[2]
        steps.append((network.conv3.input_quantizer.step.item(), error.reconstructed))
    assert abs(steps[1][0] / steps[0][0] - 1) > 0.02
    assert steps[1][1] < steps[0][1]


def test_a_network_with_padding_needs_whole_images():
    network = network_of(padding=True)
    quantize_network(network, [4] * 4)
    calibrate(network, images_of(), LEARNED)
    with pytest.raises(UserError, match="whole images"):
        reconstruct(network, images_of(), SHORT, quiet=True)
    errors = reconstruct(
        network,
        images_of(),
        replace(SHORT, crop=None, iterations=20, activation_iterations=0, learning_rate=0.05, batch_size=2),
        quiet=True,
    )
    assert errors[1].reconstructed < errors[1].nearest


def test_an_autoencoder_is_quantized_too():
    torch.manual_seed(0)
    network = Autoencoder(64, 8, 8, width=8).eval()
    original, images = copy.deepcopy(network), images_of(3, 64)
    options = QuantizationOptions(round="nearest")
    quantize_network(network, [8] * 14, options)
    assert fit(network, images, options) == []
    with torch.no_grad():
        torch.testing.assert_close(network(images), original(images), rtol=0, atol=0.02 * float(original(images).abs().max()))


def test_a_loss_without_its_fisher_or_the_other_way_round_is_refused():
    network = quantized_of()
    for fisher, loss in (("task", None), ("none", task_loss)):
        with pytest.raises(ValueError, match="'task'"):
            reconstruct(network, images_of(), ReconstructionOptions(fisher=fisher), loss, quiet=True)


def test_weights_that_are_not_finite_end_in_one_sentence():
    network = quantized_of()
    calibrate(network, images_of(), LEARNED)
    with torch.no_grad():
        network.conv3.bias[0] = float("nan")
    with pytest.raises(NumericError, match="not finite"):
        reconstruct(network, images_of(), SHORTEST, quiet=True)

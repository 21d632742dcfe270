"""Quantizers and quantized convolutions against plain formulas, torch's own fake quantization and values by hand."""

import copy
import io
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.patch_description import PatchConvolution, PatchDescriptionNetwork
from quantize.layers import (
    QuantizationOptions,
    QuantizedConvolution,
    calibrate,
    quantization_off,
    quantize_network,
    quantized_layers,
    window_means,
)
from quantize.quantizers import AdaptiveRounding, RangeMethod, UniformQuantizer, searched_range, uniform_grid

EVERY_BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
EVERY_FORM = pytest.mark.parametrize("symmetric", [False, True])
NEAREST = QuantizationOptions(round="nearest")


def weights_of(seed: int = 0, outputs: int = 6) -> torch.Tensor:
    """(outputs, 3, 4, 4), each channel of another size, the last one of positive values alone."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, 3, 4, 4, generator=generator) * torch.logspace(-2, 1, outputs).view(-1, 1, 1, 1)
    weight[-1].abs_()
    return weight


def quantizer_of(values: torch.Tensor, bits: int, **options) -> UniformQuantizer:
    quantizer = UniformQuantizer(bits, len(values), **options).to(values.dtype)
    quantizer.fit(values)
    return quantizer


def test_grid_by_hand():
    step, zero_point = uniform_grid(torch.tensor([-1.0, 1.0, -6.0]), torch.tensor([2.0, 3.0, -3.0]), bits=2)
    assert step.tolist() == [1.0, 1.0, 2.0]  # the range always includes 0
    assert zero_point.tolist() == [1, 0, 3]
    step, zero_point = uniform_grid(torch.tensor([-1.0, -0.25]), torch.tensor([0.5, 127.0]), bits=8, symmetric=True)
    assert step.tolist() == [1 / 128, 1.0]
    assert zero_point.tolist() == [128, 128]


@EVERY_BITS
@EVERY_FORM
def test_no_channel_has_more_levels_than_its_bits_and_zero_is_one_of_them(bits, symmetric):
    weight = weights_of()
    quantizer = quantizer_of(weight, bits, symmetric=symmetric)
    for channel in quantizer(weight):
        assert len(channel.unique()) <= 2**bits
    assert torch.equal(quantizer(torch.zeros_like(weight)), torch.zeros_like(weight))


@EVERY_BITS
@EVERY_FORM
def test_round_trip_errs_by_half_a_step_at_most(bits, symmetric):
    weight = weights_of().double()
    quantizer = quantizer_of(weight, bits, symmetric=symmetric)
    half = quantizer.step.detach().view(-1, 1, 1, 1) / 2
    error = (quantizer(weight) - weight).abs()
    assert (error <= half * (1 + 1e-9)).all()
    assert error.max() > 0.8 * half.max()  # and by as much where many values are


@EVERY_BITS
def test_forward_is_torchs_fake_quantization(bits):
    weight = weights_of()
    quantizer = quantizer_of(weight * 0.7, bits)  # some values lie outside
    step, zero_point = quantizer.step.detach(), quantizer.zero_point
    expected = torch.fake_quantize_per_channel_affine(weight, step, zero_point, 0, 0, 2**bits - 1)
    torch.testing.assert_close(quantizer(weight), expected, rtol=1e-6, atol=0)
    one = UniformQuantizer(bits)
    one.fit(weight * 0.7)
    expected = torch.fake_quantize_per_tensor_affine(weight, float(one.step), int(one.zero_point), 0, 2**bits - 1)
    torch.testing.assert_close(one(weight), expected, rtol=1e-6, atol=0)


@EVERY_BITS
@EVERY_FORM
def test_codes_say_what_forward_gives(bits, symmetric):
    weight = weights_of()
    quantizer = quantizer_of(weight, bits, symmetric=symmetric)
    codes, zero_point = quantizer.codes(weight), quantizer.zero_point.view(-1, 1, 1, 1)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 0
    assert int(codes.max()) == 2**bits - 1
    step = quantizer.step.detach().view(-1, 1, 1, 1)
    assert torch.equal((codes - zero_point) * step, quantizer(weight).detach())


def test_search_takes_the_shrunken_range_with_the_least_error():
    values = torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values[1, 0] = 9.0  # an outlier that is not worth its range
    low, high = values.amin(dim=1), values.amax(dim=1)
    found = searched_range(values, low, high, 3, False)
    for channel in range(2):
        errors = []
        for factor in np.arange(100, 20, -1) / 100:
            bottom, top = float(low[channel]) * factor, float(high[channel]) * factor
            step = (top - bottom) / 7
            zero_point = np.clip(np.round(-bottom / step), 0, 7)
            codes = np.clip(np.round(values[channel].numpy() / step) + zero_point, 0, 7)
            errors.append((np.abs(step * (codes - zero_point) - values[channel].numpy()) ** 2.4).sum())
        best = 1 - 0.01 * int(np.argmin(errors))
        assert (float(found[0][channel]), float(found[1][channel])) == pytest.approx(
            (float(low[channel]) * best, float(high[channel]) * best)
        )
    assert found[1][1] < 0.8 * high[1]


def test_gradients_pass_inside_the_grid_and_stop_outside():
    quantizer = UniformQuantizer(2).double()
    quantizer.fit(torch.tensor([-1.0, 2.0]))
    values = torch.tensor([-1.6, -1.4, -1.0, 0.3, 2.0, 2.4, 2.6], dtype=torch.float64, requires_grad=True)
    (3 * quantizer(values)).sum().backward()
    assert values.grad.tolist() == [0, 3, 3, 3, 3, 3, 0]
    assert quantizer.log_step.grad is None


def test_learned_step_has_the_gradient_of_lsq_by_hand():
    quantizer = UniformQuantizer(2, learn_step=True).double()
    quantizer.fit(torch.tensor([-0.5, 1.0], dtype=torch.float64))  # S = 0.5, Z = 1: codes less Z are -1 ... 2
    values = torch.tensor([[-2.0, 0.1, 0.7, 3.0]], dtype=torch.float64, requires_grad=True)
    outer = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], dtype=torch.float64)
    (outer * quantizer(values)).sum().backward()
    by_step = -1 * 1 + (0 - 0.2) * 10 + (1 - 1.4) * 100 + 2 * 1000
    expected = 0.5 * by_step / np.sqrt(4 * 3)  # by the logarithm of S; 4 values per image, largest code 3
    assert quantizer.log_step.grad.item() == pytest.approx(expected)
    assert values.grad.tolist() == [[0, 10, 100, 0]]


@EVERY_FORM
def test_learned_steps_of_channels_against_finite_differences_of_lsqs_surrogate(symmetric):
    """The rounding's residue held fixed, the gradient is that of S (v/S + residue) inside and of S times a code outside."""
    weight = weights_of().double()
    quantizer = quantizer_of(0.6 * weight, 3, symmetric=symmetric, learn_step=True)
    outer = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (outer * quantizer(weight)).sum().backward()
    step, zero_point = (part.detach().numpy() for part in quantizer.grid(4))
    array = weight.numpy()
    codes = np.round(array / step) + zero_point
    residue, cut = codes - zero_point - array / step, codes.clip(0, 7) - zero_point

    def surrogate(scale: np.ndarray) -> np.ndarray:
        surrogate_codes = np.where((codes >= 0) & (codes <= 7), array / scale + residue, cut)
        return (outer.numpy() * scale * surrogate_codes).sum(axis=(1, 2, 3))

    change = 1e-6
    finite = (surrogate(step * (1 + change)) - surrogate(step * (1 - change))) / (2 * change)
    scale = 1 / np.sqrt(48 * (3 if symmetric else 7))
    np.testing.assert_allclose(quantizer.log_step.grad.numpy(), scale * finite, rtol=1e-4, atol=1e-7)


@EVERY_BITS
def test_learned_rounding_starts_from_the_weights_and_ends_on_the_grid(bits):
    weight = weights_of().double()
    quantizer = quantizer_of(weight, bits)
    rounding = AdaptiveRounding(quantizer, weight)
    step, zero_point = (part.detach() for part in quantizer.grid(4))
    low, high = -zero_point * step, (quantizer.top - zero_point) * step
    torch.testing.assert_close(rounding(), weight.clamp(low, high), rtol=1e-9, atol=1e-12)  # cut to the range
    assert ((weight >= low) & (weight <= high)).double().mean() > 0.9
    torch.testing.assert_close(rounding.rounded(), quantizer(weight).detach(), rtol=1e-9, atol=1e-12)  # untrained: to nearest


def test_regulariser_draws_every_h_to_zero_or_one():
    weight = weights_of().double()
    rounding = AdaptiveRounding(quantizer_of(weight, 3), weight)
    by_hand = (1 - np.abs(2 * rounding.opening().detach().numpy() - 1) ** 3).sum()
    assert rounding.regulariser(3).item() == pytest.approx(by_hand)
    optimizer = torch.optim.Adam([rounding.alpha], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        rounding.regulariser(3).backward()
        optimizer.step()
    opening = rounding.opening()
    assert ((opening == 0) | (opening == 1)).double().mean() > 0.99
    torch.testing.assert_close(rounding()[(opening == 0) | (opening == 1)], rounding.rounded()[(opening == 0) | (opening == 1)])


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_no_byte_holds_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits} bits"):
        UniformQuantizer(bits)


def network_of(padding: bool = False) -> PatchDescriptionNetwork:
    torch.manual_seed(0)
    return PatchDescriptionNetwork("tiny", 8, padding)


def images_of(count: int = 3, side: int = 44) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def quantized_of(bits=(8, 2, 4, 8), options=NEAREST, padding: bool = False) -> PatchDescriptionNetwork:
    network = network_of(padding)
    quantize_network(network, bits, options)
    calibrate(network, images_of(), options)
    return network


@EVERY_BITS
def test_weights_less_their_zero_point_fit_int8(bits):
    layer = quantized_of([bits] * 4).conv2
    integers = layer.weight_codes() - layer.weight_quantizer.zero_point.view(-1, 1, 1, 1)
    assert (integers >= -128).all()
    assert (integers <= 127).all()
    assert layer.bits == bits
    step = layer.weight_quantizer.step.view(-1, 1, 1, 1)
    assert torch.equal(integers.to(torch.int8) * step, layer.quantized_weight())


@pytest.mark.parametrize("padding", [False, True])
def test_layer_follows_its_formula(padding):
    network = quantized_of(padding=padding)
    layer, inputs = network.conv1, images_of()

    def rounded(values, quantizer):
        step, zero_point = (part.detach().double() for part in quantizer.grid(values.ndim))
        return step * ((values.double() / step).round().add(zero_point).clamp(0, 2**quantizer.bits - 1) - zero_point)

    weight = rounded(layer.weight.detach(), layer.weight_quantizer)
    expected = F.conv2d(rounded(inputs, layer.input_quantizer), weight, layer.bias.detach().double(), padding=3 * padding)
    torch.testing.assert_close(layer.before_activation(inputs).detach().double(), expected, rtol=0, atol=1e-5)
    output = rounded(F.relu(expected), layer.output_quantizer)
    difference = (layer(inputs).detach() - output).abs()
    assert difference.max() <= 1.001 * layer.output_quantizer.step  # float32 may fall on the other side of a tie
    assert (difference > 1e-5).double().mean() < 1e-3


def test_switched_off_a_network_is_its_float_original():
    network, original, images = quantized_of(options=QuantizationOptions()), network_of(), images_of()
    with quantization_off(network):
        assert torch.equal(network(images), original(images))
    assert not torch.allclose(network(images), original(images), atol=1e-3)


def test_only_rectified_layers_quantize_what_they_give():
    assert [layer.output_quantizer is not None for layer in quantized_layers(quantized_of())] == [True, True, True, False]
    without = quantized_of(options=QuantizationOptions(round="nearest", output_bits=None))
    assert [layer.output_quantizer for layer in quantized_layers(without)] == [None] * 4


@pytest.mark.parametrize("method", get_args(RangeMethod))
def test_ranges_are_those_of_the_float_network(method):
    network = quantized_of(options=QuantizationOptions(range_init=method, round="nearest"))
    inputs = images_of()
    for layer in network_of().convolutions[:2]:
        quantizer = network.get_submodule(f"conv{1 if layer.in_channels == 3 else 2}").input_quantizer
        expected = UniformQuantizer(quantizer.bits)
        expected.fit(inputs, method)
        torch.testing.assert_close(quantizer.step, expected.step)
        assert torch.equal(quantizer.zero_point, expected.zero_point)
        inputs = F.avg_pool2d(layer(inputs), 2).detach()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 1, 0), (4, 1, 3), (4, 2, 1), (3, 1, 1)])
def test_mean_of_a_convolution_from_the_means_of_its_windows(kernel, stride, padding):
    convolution = torch.nn.Conv2d(3, 5, kernel, stride, padding).double()
    inputs = images_of(2, 17).double()
    means = window_means(inputs, convolution.kernel_size, convolution.stride, convolution.padding)
    expected = convolution(inputs).mean(dim=(0, 2, 3))
    torch.testing.assert_close((convolution.weight * means).sum(dim=(1, 2, 3)) + convolution.bias, expected)


@pytest.mark.parametrize("padding", [False, True])
def test_bias_correction_removes_the_shift_of_the_means(padding):
    original, images = network_of(padding), images_of() + 1
    shifts = []
    for correction in (False, True):
        network = network_of(padding)
        options = QuantizationOptions(round="nearest", bias_correction=correction)
        quantize_network(network, [2] * 4, options)
        calibrate(network, images, options, batch_size=2)
        layer = network.conv1
        mean = layer.convolve(images, layer.quantized_weight()).mean(dim=(0, 2, 3))
        shifts.append((mean - original.conv1.before_activation(images).mean(dim=(0, 2, 3))).abs())
    assert shifts[0].max() > 0.05
    assert shifts[1].max() < 1e-5


@pytest.mark.parametrize("learn_step", [False, True])
def test_fine_tuning_moves_weights_and_steps_only_if_they_are_learned(learn_step):
    network = quantized_of(options=QuantizationOptions("minmax", "nearest", learn_step=learn_step))
    network(images_of()).square().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in quantized_layers(network))
    network.zero_grad()
    for layer in quantized_layers(network):
        layer.quantized_weight().sum().backward()
        assert (layer.weight.grad == 1).all()
    network.zero_grad()
    network(images_of()).square().sum().backward()
    steps = [step for name, step in network.named_parameters() if name.endswith("log_step") and step.requires_grad]
    assert len(steps) == (4 + 4 + 3 if learn_step else 0)
    assert all(step.grad.abs().sum() > 0 for step in steps)


def test_a_frozen_network_stays_frozen():
    network = network_of().requires_grad_(False)
    quantize_network(network, [4] * 4, QuantizationOptions(learn_step=True))
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("bits", [(8, 2, 4, 8), (3, 3, 3, 3)])
def test_state_brings_everything_into_a_network_that_saw_no_data(bits):
    network, images, file = quantized_of(bits), images_of(), io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    restored = PatchDescriptionNetwork("tiny", 8)
    quantize_network(restored, [8] * 4, NEAREST)
    with pytest.raises(RuntimeError, match="calibrate"):
        restored(images)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(images), network(images))
    assert [layer.bits for layer in quantized_layers(restored)] == list(bits)
    assert torch.equal(restored.conv2.weight_codes(), network.conv2.weight_codes())


def test_a_copy_is_independent():
    network = quantized_of()
    other = copy.deepcopy(network)
    other.conv1.quantizing = False
    assert network.conv1.quantizing


def test_a_plain_convolution_without_bias_can_be_quantized():
    plain = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    layer = QuantizedConvolution.from_convolution(plain, 8, NEAREST)
    layer.input_quantizer.fit(images_of())
    torch.testing.assert_close(layer(images_of()), plain(images_of()), rtol=0, atol=0.05)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="groups"):
        QuantizedConvolution.from_convolution(torch.nn.Conv2d(4, 4, 3, groups=2), 8, NEAREST)
    with pytest.raises(ValueError, match="zip"):
        quantize_network(torch.nn.Sequential(PatchConvolution(3, 4, 4, rectified=True)), [8, 8])


def test_ranges_are_searched_on_the_whole_of_maps_of_many_images():
    """Most pixels of products on a plain ground are ground; a sample at regular places may be nothing else."""
    network = nn.Sequential(PatchConvolution(1, 1, 1, rectified=False))
    nn.init.ones_(network[0].weight)
    quantize_network(network, [8], QuantizationOptions(range_init="search"))
    images = torch.zeros(256, 1, 64, 64)  # 2048 of the 32768 pixels of each batch of 8 are looked at
    images[:, :, 20:44, 20:44] = torch.rand(256, 1, 24, 24, generator=torch.Generator().manual_seed(0)) + 4
    calibrate(network, images, QuantizationOptions(range_init="search"))
    quantizer = network[0].input_quantizer
    top = float(quantizer.step * (255 - quantizer.zero_point))
    _, high = searched_range(images[:8].reshape(1, -1), torch.zeros(1), images.amax().reshape(1), 8, False)
    assert top == pytest.approx(float(high), rel=0.02)
    assert top > 4.9

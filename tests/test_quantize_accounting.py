"""Effective parameters against the published tables, bytes against sums by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from models.patch_description import Autoencoder, PatchDescriptionNetwork
from quantize.accounting import LayerSize, at_bits, detector_size, effective_parameters, file_bytes, layer_sizes
from quantize.layers import quantize_network

# kernel x kernel x inputs x outputs and one bias per output (EfficientAD, appendix A)
TEACHER = [6_144 + 128, 524_288 + 256, 589_824 + 256, 1_572_864 + 384]
STUDENT = [6_144 + 128, 524_288 + 256, 589_824 + 256, 3_145_728 + 768]
AUTOENCODER = 1_096_320


@pytest.fixture(scope="module")
def detector():
    """Layers of EfficientAD-S: teacher, student, autoencoder."""
    with torch.device("meta"):
        networks = [PatchDescriptionNetwork("small", 384), PatchDescriptionNetwork("small", 768), Autoencoder(256, 384, 56)]
    return [layer_sizes(network) for network in networks]


def millions(sizes) -> float:
    return round(effective_parameters(sizes) / 1e6, 3)


def as_printed(sizes) -> float:
    """RAAD's tables cut to two decimals: 8,057,856 parameters are its "8.05 M"."""
    return math.floor(effective_parameters(sizes) / 1e4) / 100


def quantized_pair(detector, bits) -> list[LayerSize]:
    return at_bits(detector[0], bits) + at_bits(detector[1], bits)


def test_layers_of_efficientad_have_the_parameters_of_their_shapes(detector):
    teacher, student, autoencoder = detector
    assert [size.parameters for size in teacher] == TEACHER
    assert [size.parameters for size in student] == STUDENT
    assert sum(size.parameters for size in autoencoder) == AUTOENCODER
    assert as_printed(teacher + student + autoencoder) == 8.05


@pytest.mark.parametrize(("bits", "exact", "printed"), [(2, 0.504, 0.50), (3, 0.755, 0.75), (4, 1.007, 1.00), (8, 2.014, 2.01)])
def test_lsq_rows_of_table_4_count_all_three_networks(detector, bits, exact, printed):
    layers = [size for network in detector for size in at_bits(network, [bits] * len(network))]
    assert (millions(layers), as_printed(layers)) == (exact, printed)


def test_a_bias_counts_the_bits_of_its_layer():
    """Table 4's 1.00 at 4 bits decides it: biases of 32 bits would be printed as 1.01."""
    biases = 2 * (128 + 256 + 256) + 384 + 768 + 32 + 32 + 4 * 64 + 6 * 64 + 64 + 384
    weights = sum(TEACHER) + sum(STUDENT) + AUTOENCODER - biases
    assert math.floor((weights * 4 / 32 + biases) / 1e4) / 100 == 1.01
    assert effective_parameters([LayerSize(weights=100, channels=10, biases=10, bits=4)]) == 110 * 4 / 32


@pytest.mark.parametrize(("bits", "exact", "printed"), [(2, 1.322, 1.32), (3, 1.392, 1.39), (4, 1.462, 1.46), (8, 1.740, 1.74)])
def test_raad_rows_of_table_4_count_teacher_and_student_with_ends_of_8_bits(detector, bits, exact, printed):
    pair = quantized_pair(detector, (8, bits, bits, 8))
    assert (millions(pair), as_printed(pair)) == (exact, printed)


def test_no_other_bits_than_8_4_4_8_are_printed_as_1_46(detector):
    printed = {free: as_printed(quantized_pair(detector, (8, *free, 8))) for free in itertools.product((2, 3, 4, 8), repeat=2)}
    assert [free for free, value in printed.items() if value == 1.46] == [(4, 4)]
    assert 1.20 not in printed.values()  # what Table 4 prints for 3 bits is a misprint


def test_the_float_autoencoder_is_no_less_part_of_the_detector(detector):
    teacher, student, autoencoder = detector
    size = detector_size(at_bits(teacher, (8, 4, 4, 8)), at_bits(student, (8, 4, 4, 8)), autoencoder)
    assert size.parameters == 8_057_856
    assert size.effective_teacher_student == 1_461_728
    assert size.effective_all == 1_461_728 + AUTOENCODER
    assert round(size.effective_all / 1e6, 2) == 2.56
    assert round(size.float32_bytes / 2**20, 2) == 30.74  # RAAD's "30.70 MB"


def test_bytes_of_a_layer_by_hand():
    layer = LayerSize(weights=27, channels=3, biases=3, bits=3, activation_quantizers=2)
    grids_and_biases = (3 + 2) * (4 + 1) + 3 * 4
    assert file_bytes([layer], packed=False) == 27 + grids_and_biases
    assert file_bytes([layer], packed=True) == 11 + grids_and_biases  # 81 bits are 11 bytes
    assert file_bytes([layer, layer], packed=True) == 2 * (11 + grids_and_biases)
    assert layer.float_bytes == 30 * 4
    assert file_bytes([LayerSize(27, 3, 3)], packed=True) == 30 * 4


def test_bytes_of_a_detector_by_hand(detector):
    teacher, student, autoencoder = detector
    bits = (8, 4, 4, 8)
    size = detector_size(at_bits(teacher, bits), at_bits(student, bits), autoencoder)
    channels = 2 * (128 + 256 + 256) + 384 + 768
    weights = [6_144 * 2, 524_288 * 2, 589_824 * 2, 1_572_864 + 3_145_728]
    assert size.int8_bytes == sum(weights) + channels * 9 + AUTOENCODER * 4
    packed_weights = weights[0] + (weights[1] + weights[2]) // 2 + weights[3]
    assert size.packed_bytes == packed_weights + channels * 9 + AUTOENCODER * 4


def test_quantized_layers_tell_their_bits_and_quantizers_themselves():
    network = PatchDescriptionNetwork("tiny", 48)
    floats = layer_sizes(network)
    quantize_network(network, (8, 3, 4, 8))
    quantized = layer_sizes(network)
    assert [(size.bits, size.activation_quantizers) for size in quantized] == [(8, 2), (3, 2), (4, 2), (8, 1)]
    assert [(size.weights, size.channels, size.biases) for size in quantized] == [
        (size.weights, size.channels, size.biases) for size in floats
    ]


def test_a_convolution_without_bias_and_what_is_no_convolution():
    network = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1, bias=False), nn.BatchNorm2d(2))
    assert layer_sizes(network) == [LayerSize(60, 5, 5), LayerSize(10, 2, 0)]


def test_what_cannot_be_counted_is_refused():
    layer = LayerSize(27, 3, 3)
    with pytest.raises(ValueError, match="16 bits"):
        file_bytes(at_bits([layer], [16]), packed=True)
    with pytest.raises(ValueError, match="shorter"):
        at_bits([layer, layer], [8])

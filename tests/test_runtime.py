"""Packed networks against the trained ones, against slow formulas in float64, and against their own files."""

import copy
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import utils.agreement
from binarize.attention import SoftmaxAwareBinarization
from binarize.kernels import engine, operations
from binarize.kernels.library import PATHS, available_paths, load_library
from binarize.linear import BinarizationOptions, BinaryLinear
from binarize.packed_blocks import PackedPrototypeBlock
from binarize.runtime import (
    FoldedLinear,
    PackedLinear,
    WeightOnlyLinear,
    bits_of_signs,
    fold,
    prepare_modules,
    words_of_bytes,
)
from binarize.stages import binarize, binary_layers, calibrate
from common.errors import UserError
from models.build import RANDOM_TINY_ENCODER, build_encoder, build_inp_former
from models.encoder import FrozenEncoder
from models.inp_former import INPFormer
from models.layers import PrototypeDecoderBlock
from tests.packed_files import DECISION, PROTOCOL, preprocessing
from tests.test_binarize import numbers, plain_sab, signs
from tests.test_packed import plain_read, rewritten, trained_like
from utils.agreement import compare_on_bits, packed_copy
from utils.hosts import HOSTS
from utils.packed_model import ENCODER_PRECISIONS, TRAINED_PRECISIONS, PackingOptions, describe, load_packed, packed_bytes

FLOAT = PackingOptions("fp32", "fp32")
SABS = ("mixed", "binary", "off")
SMALLEST_MARGIN = 1e-5


@pytest.fixture(params=["torch", *PATHS])
def path(request):
    """Every way to compute that this machine has."""
    before, library = engine.kernels(), load_library()
    if request.param != "torch" and (library is None or request.param not in available_paths(library)):
        pytest.skip(f"the path {request.param} does not run here")
    engine.use_kernels(None if request.param == "torch" else engine.Kernels(library, request.param))
    yield request.param
    engine.use_kernels(before)


def build_detector(width: int, side: int) -> INPFormer:
    """A float INP-Former for side x side images; of another width than the tiny encoder's its sizes are odd for the kernels."""
    torch.manual_seed(0)
    if width == 32:
        return build_inp_former(build_encoder(RANDOM_TINY_ENCODER, side), 6)
    vit = VisionTransformer(img_size=side, patch_size=14, embed_dim=width, depth=10, num_heads=3, num_classes=0)
    return INPFormer(FrozenEncoder(vit, list(range(2, 10)), "odd", "random weights", "", 0), 3, 7)


def smallest_margin(detector: nn.Module, inputs: torch.Tensor) -> float:
    """How near the nearest decision of a trained binary network comes to its threshold, in units of the layer's scale."""
    margins = [1.0]

    def of_layer(layer, arguments):
        margins.append(((arguments[0] - layer.threshold) / layer.log_activation_scale.exp()).abs().min().item())

    def of_map(sab, arguments):
        attention_map, alpha, _ = arguments
        maximum = attention_map.amax(dim=-1, keepdim=True)
        distance = (attention_map - sab.threshold_share(alpha) * maximum).abs()
        margins.append(distance[(maximum > 0).expand_as(distance)].min().item())

    one_bit = [layer for layer in binary_layers(detector) if layer.options.activation_bits == 1]
    hooks = [layer.register_forward_pre_hook(of_layer) for layer in one_bit]
    hooks += [m.register_forward_pre_hook(of_map) for m in detector.modules() if isinstance(m, SoftmaxAwareBinarization)]
    detector.anomaly_map(inputs)
    for hook in hooks:
        hook.remove()
    return min(margins)


def images_without_ties(detector: nn.Module, count: int, side: int) -> torch.Tensor:
    """Random images on which no decision is so near to its threshold that rounding could turn it."""
    generator, images = torch.Generator().manual_seed(2), []
    while len(images) < count:
        image = torch.randn(1, 3, side, side, generator=generator)
        if smallest_margin(detector, image) > SMALLEST_MARGIN:
            images.append(image)
    return torch.cat(images)


@dataclass(frozen=True)
class Case:
    """A trained detector, its packed form, images and the trained detector's maps of them."""

    trained: nn.Module
    packed: nn.Module
    images: torch.Tensor
    maps: torch.Tensor


@cache
def case_of(stage: int, activation_bits: int, sab: str, width: int, side: int) -> Case:
    trained = trained_like(build_detector(width, side), stage, activation_bits, sab)
    images = images_without_ties(trained, 3, side)
    return Case(trained, packed_copy(trained, FLOAT), images, trained.anomaly_map(images))


def decisions_of(stage: int, width: int, side: int, prototypes: int) -> int:
    """Binary decisions on three images: inputs of q, kv and proj, of fc1 and of fc2, in eight blocks."""
    tokens = (side // 14) ** 2
    return 3 * 8 * width * (2 * tokens + prototypes + (5 * tokens if stage == 2 else 0))


@pytest.mark.parametrize(("width", "side"), [(32, 56), (32, 70), (39, 70)])
@pytest.mark.parametrize("sab", SABS)
@pytest.mark.parametrize("stage", [1, 2])
def test_packed_network_decides_as_the_trained_one(path, stage, sab, width, side):
    case = case_of(stage, 1, sab, width, side)
    for images, maps in ((case.images, case.maps), (case.images[1:2], case.maps[1:2])):
        torch.testing.assert_close(case.packed.anomaly_map(images), maps, rtol=0, atol=1e-5)
    agreement = compare_on_bits(case.trained, case.trained.encode(case.images))
    assert agreement.decisions == decisions_of(stage, width, side, 6 if width == 32 else 7)
    assert agreement.differing == 0
    assert agreement.largest_map_difference < 1e-5


@pytest.mark.parametrize("sab", SABS)
@pytest.mark.parametrize("stage", [1, 2])
def test_network_of_binary_weights_alone(stage, sab):
    case = case_of(stage, 32, sab, 32, 56)
    kinds = [type(module) for module in case.packed.modules()]
    assert kinds.count(WeightOnlyLinear) == 8 * (3 if stage == 1 else 5)
    assert BinaryLinear not in kinds
    torch.testing.assert_close(case.packed.anomaly_map(case.images), case.maps, rtol=0, atol=1e-5)
    torch.testing.assert_close(case.packed.anomaly_map(case.images[:1]), case.maps[:1], rtol=0, atol=1e-5)


def test_packing_leaves_the_trained_detector_alone():
    detector = trained_like(build_detector(32, 56), 2)
    before = copy.deepcopy(detector.state_dict())
    packed = packed_copy(detector, PackingOptions("int8", "int8"))
    assert packed.encoder is not detector.encoder
    assert packed_copy(detector, FLOAT).encoder is detector.encoder
    after = detector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for name, parameter in detector.named_parameters() if not name.startswith("encoder."))


def test_a_packed_detector_is_a_detector():
    case = case_of(2, 1, "mixed", 32, 56)
    for packed in (case.packed, packed_copy(case.trained, PackingOptions("int8", "int8"))):
        maps = packed.anomaly_map(case.images)
        assert (maps.shape, maps.dtype) == ((3, 56, 56), torch.float32)
        assert torch.equal(packed.anomaly_map(packed.encode(case.images)), maps)
        assert packed.encode(case.images).shape == (3, 2, 16, 32)
        assert list(packed.trainable_parameters()) == []
        assert packed.device == torch.device("cpu")
        assert not packed.training
        assert not any(isinstance(module, BinaryLinear) for module in packed.modules())


def test_agreement_counts_what_differs(monkeypatch):
    """Other weights in the last layer change no decision, only the map; in an early layer they change decisions."""
    case = case_of(2, 1, "off", 32, 56)
    features = case.trained.encode(case.images)

    def compare_with_changed(layer_of) -> tuple:
        packed = packed_copy(case.trained, FLOAT)
        layer_of(packed).bits[0] ^= 255
        prepare_modules(packed)
        monkeypatch.setattr(utils.agreement, "packed_copy", lambda detector, options: packed)
        agreement = compare_on_bits(case.trained, features)
        expected = (packed.anomaly_map(features) - case.maps).abs().max().item()
        assert agreement.largest_map_difference == pytest.approx(expected, abs=1e-6)
        assert expected > 1e-4
        assert f"{agreement.differing} of {agreement.decisions} binary decisions differ" in agreement.describe()
        return agreement.decisions, agreement.differing

    count = decisions_of(2, 32, 56, 6)
    assert compare_with_changed(lambda packed: packed.decoder[-1].mlp.fc2) == (count, 0)
    decisions, differing = compare_with_changed(lambda packed: packed.decoder[0].mlp.fc2)
    assert decisions == count
    assert 0 < differing < count / 2


# ---------------------------------------------------------------------------- single layers


def one_layer(rows: int, columns: int, activation_bits: int = 1) -> BinaryLinear:
    """A layer with random values everywhere."""
    generator = torch.Generator().manual_seed(rows + columns)
    layer = BinaryLinear(columns, rows, BinarizationOptions(activation_bits))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (5, 31), (33, 64), (2, 65), (40, 130)])
def test_bits_of_signs(rows, columns):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 0.0
    bits = bits_of_signs(values)
    np.testing.assert_array_equal(bits.numpy(), np.packbits(values.numpy() >= 0, axis=1, bitorder="little"))
    words = words_of_bytes(bits, columns)
    assert (words.dtype, words.shape) == (torch.int32, (rows, 2 * -(-columns // 64)))
    found = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(found[:, :columns], values.numpy() >= 0)
    assert not found[:, columns:].any()


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 1, 1), (32, 64, 8), (37, 65, 9), (70, 33, 35), (5, 2100, 3)])
def test_packed_linear(path, rows, columns, tokens):
    layer, inputs = one_layer(rows, columns), torch.randn(tokens, columns)
    residual = torch.randn(tokens, rows)
    packed = PackedLinear(layer)
    packed.prepare_weights()
    bits = operations.pack(inputs, packed.threshold)
    weight = numbers(layer.weight)
    products = signs(numbers(inputs) - numbers(layer.threshold)) @ signs(weight - weight.mean(axis=1, keepdims=True)).T
    expected = products * numbers(layer.alpha) * np.exp(numbers(layer.log_activation_scale)) + numbers(layer.bias)
    np.testing.assert_allclose(numbers(packed(bits)), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(numbers(packed(bits, residual)), expected + numbers(residual), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed(bits), layer(inputs), rtol=1e-6, atol=1e-6)
    packed.scale.fill_(1)
    packed.bias.fill_(0)
    np.testing.assert_array_equal(numbers(packed(bits)), products)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 31), (37, 65)])
def test_weight_only_linear(rows, columns):
    layer, inputs = one_layer(rows, columns, activation_bits=32), torch.randn(2, 3, columns)
    packed = WeightOnlyLinear(layer)
    packed.prepare_weights()
    weight = numbers(layer.weight)
    scaled = signs(weight - weight.mean(axis=1, keepdims=True)) * numbers(layer.alpha)[:, None]
    expected = F.linear(inputs.double(), torch.from_numpy(scaled), layer.bias.detach().double())
    np.testing.assert_allclose(numbers(packed(inputs)), numbers(expected), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- fc1 folded into two integers


def folded_pair(columns: int, scale: list, bias: list, beta: list, gamma: float) -> tuple[BinaryLinear, BinaryLinear]:
    """fc1 with the given alpha x gamma and bias, and fc2 with thresholds beta."""
    layer = BinaryLinear(columns, len(scale), BinarizationOptions())
    following = BinaryLinear(len(scale), 1, BinarizationOptions())
    with torch.no_grad():
        layer.log_activation_scale.fill_(np.log(gamma))
        layer.alpha.copy_(torch.tensor(scale) / gamma)
        layer.bias.copy_(torch.tensor(bias))
        following.threshold.copy_(torch.tensor(beta))
        following.log_activation_scale.fill_(0.7)
    return layer, following


def check_fold(columns: int, layer: BinaryLinear, following: BinaryLinear) -> tuple[int, int]:
    """Compare the intervals with the float32 formula at every count, one by one; returns how many bits are 0 and how many 1."""
    low, span = (values.tolist() for values in fold(layer, following))
    scales, gamma = layer.output_scale().tolist(), following.log_activation_scale.exp().item()
    ones = zeros = 0
    for channel, scale in enumerate(scales):
        bias, beta = layer.bias[channel].item(), following.threshold[channel].item()
        for mismatches in range(columns + 1):
            product = np.float32(columns - 2 * mismatches) * np.float32(scale) + np.float32(bias)
            hidden = F.gelu(torch.tensor(product)).item()
            expected = (np.float32(hidden) - np.float32(beta)) / np.float32(gamma) >= 0
            found = not low[channel] <= mismatches <= low[channel] + span[channel]
            # float32's GELU is not monotonic in its flat left tail, and differs by an ulp between one number and a vector
            assert found == expected or abs(hidden - beta) < 2e-6, (channel, mismatches, product, hidden, beta)
            ones, zeros = ones + found, zeros + (not found)
    return zeros, ones


GELU_MINIMUM = -0.169971


@pytest.mark.parametrize("columns", [1, 2, 7, 32, 65])
def test_folding_keeps_every_decision(columns):
    """Alphas of both signs, tiny to huge; thresholds beyond GELU's minimum, near it, on both sides of 0 and far above."""
    generator = np.random.default_rng(columns)
    count = 40
    zeros = ones = 0
    for centre, spread in ((0, 1), (GELU_MINIMUM, 1e-3), (0, 1e-4), (-0.1, 0.05), (GELU_MINIMUM - 0.1, 0.05), (20, 10)):
        scale = generator.normal(size=count) * 10.0 ** generator.uniform(-6, 3, count)
        bias = generator.normal(size=count) * 10.0 ** generator.uniform(-3, 1, count)
        beta = generator.normal(centre, spread, count)
        found = check_fold(columns, *folded_pair(columns, scale.tolist(), bias.tolist(), beta.tolist(), 1.7))
        zeros, ones = zeros + found[0], ones + found[1]
    assert min(zeros, ones) > 0.1 * (zeros + ones)


def test_folding_of_a_channel_with_zeros_on_both_sides_of_the_interval():
    """GELU(x) < -0.1 for about -1.5 < x < -0.25 only; far to the left it comes back to 0."""
    low, span = fold(*folded_pair(32, [0.1, -0.1, 1e-3, 0.0, 0.0, 0.5], [0, 0, 0, 1, -1, 0], [-0.1, -0.1, -0.1, 2, -0.5, 0], 1))
    middle = [m for m in range(33) if -1.5 < 0.1 * (32 - 2 * m) < -0.25]
    assert (low[0].item(), low[0].item() + span[0].item()) == (middle[0], middle[-1])
    assert (low[1].item(), low[1].item() + span[1].item()) == (32 - middle[-1], 32 - middle[0])
    assert low[2].item() > 32
    assert (low[3].item(), span[3].item()) == (0, 32)
    assert low[4].item() > 32
    assert low[5].item() == 17


def test_a_threshold_that_is_met_exactly_is_plus_one():
    bias = torch.tensor([0.3, -0.4, 5.0])
    low, _ = fold(*folded_pair(8, [0.0] * 3, bias.tolist(), F.gelu(bias).tolist(), 1))
    assert low.tolist() == [9, 9, 9]
    low, span = fold(*folded_pair(8, [1.0], [0.0], [0.0], 1))
    assert low.item() == 5
    assert low.item() + span.item() >= 6


@pytest.mark.parametrize(("hidden", "columns"), [(32, 64), (37, 65), (130, 33), (1, 1)])
def test_folded_linear_gives_the_bits_of_the_next_layer(path, hidden, columns):
    layer, following, inputs = one_layer(hidden, columns), one_layer(3, hidden), torch.randn(19, columns)
    folded = FoldedLinear(layer, following)
    folded.prepare_weights()
    found = folded(operations.pack(inputs, folded.threshold))
    expected = numbers(F.gelu(layer(inputs)) - following.threshold) >= 0
    plain = np.unpackbits(found.numpy().view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(plain[:, :hidden], expected)
    assert not plain[:, hidden:].any()


# ---------------------------------------------------------------------------- one block in float64


def plain_norm(tokens: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    return normal * numbers(norm.weight) + numbers(norm.bias)


def plain_binary(layer: BinaryLinear, inputs: np.ndarray, margins: list) -> np.ndarray:
    """A binary layer on (..., in); how near its decisions came to the threshold goes to `margins`."""
    weight = numbers(layer.weight)
    scale = np.exp(numbers(layer.log_activation_scale))
    distance = (inputs - numbers(layer.threshold)) / scale
    margins.append(np.abs(distance).min())
    return numbers(layer.alpha) * scale * (signs(distance) @ signs(weight - weight.mean(axis=1, keepdims=True)).T) + numbers(
        layer.bias
    )


def plain_attention_map(attention, query: np.ndarray, key: np.ndarray, margins: list) -> np.ndarray:
    """Of (B, N, C) and (B, M, C): (B, h, N, M)."""
    heads = attention.num_heads
    query, key = (part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in (query, key))
    query, key = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (query, key))
    scale = numbers(attention.learn_scale)
    attention_map = np.maximum(0, scale * (query @ key.transpose(0, 1, 3, 2)))
    sab = attention.sab
    if sab is None:
        return attention_map
    alpha = numbers(attention.q.alpha).reshape(heads, -1)
    start = numbers(sab.alpha_at_conversion).reshape(heads, 1)
    share = 0.25 * np.clip(alpha.mean(axis=1) / start[:, 0], 0.5, 2)
    maximum = attention_map.max(axis=-1, keepdims=True)
    distance = np.abs(attention_map - share.reshape(1, heads, 1, 1) * maximum)
    margins.append(np.where(maximum > 0, distance, 1).min())
    forced = 1.0 if sab.mode == "binary" else None
    gates = (numbers(values).ravel() for values in (sab.gate_slope, sab.gate_middle))
    return plain_sab(attention_map, alpha, start, np.abs(scale).ravel(), *gates, forced)


def plain_block(block: PrototypeDecoderBlock, tokens: np.ndarray, prototypes: np.ndarray) -> tuple[np.ndarray, float]:
    """The decoder block, step by step, and how near its nearest decision came to its threshold."""
    margins: list[float] = []
    attention, heads = block.attn, block.attn.num_heads
    query = plain_binary(attention.q, plain_norm(tokens, block.norm1), margins)
    key, value = np.split(plain_binary(attention.kv, plain_norm(prototypes, block.norm1), margins), 2, axis=-1)
    attention_map = plain_attention_map(attention, query, key, margins)
    value = value.reshape(*value.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    mixed = (attention_map @ value).transpose(0, 2, 1, 3).reshape(tokens.shape)
    attended = plain_binary(attention.proj, mixed, margins)
    normal = plain_norm(attended, block.norm2)
    if isinstance(block.mlp.fc1, nn.Linear):
        with torch.no_grad():
            return attended + numbers(copy.deepcopy(block.mlp).double()(torch.from_numpy(normal))), min(margins)
    hidden = plain_binary(block.mlp.fc1, normal, margins)
    hidden = numbers(F.gelu(torch.from_numpy(hidden)))
    return attended + plain_binary(block.mlp.fc2, hidden, margins), min(margins)


@cache
def block_case(stage: int, sab: str, sizes: tuple[int, ...]):
    """A trained-like block, inputs without ties, and what the plain formulas make of them."""
    width, heads, tokens, prototypes, batch = sizes
    torch.manual_seed(0)
    block = PrototypeDecoderBlock(width, heads)
    holder = nn.Module()
    holder.decoder = [block]
    binarize(holder, stage, BinarizationOptions(sab=sab))
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x, p = (torch.randn(batch, n, width, generator=generator) + 0.5 for n in (tokens, prototypes))
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            block.norm1.weight += 1
            block.attn.learn_scale += 1
        expected, margin = plain_block(block, numbers(x), numbers(p))
        if margin > SMALLEST_MARGIN:
            return block, x, p, expected
    raise AssertionError("no inputs without ties")


# width, heads, tokens, prototypes, batch: all even; all odd; one of each; more prototypes than the kernel takes
BLOCK_SIZES = [(32, 2, 16, 6, 2), (33, 3, 25, 7, 3), (70, 5, 1, 1, 1), (24, 1, 17, 66, 1)]


@pytest.mark.parametrize("sizes", BLOCK_SIZES)
@pytest.mark.parametrize("sab", SABS)
@pytest.mark.parametrize("stage", [1, 2])
def test_packed_block_is_the_plain_formula(path, stage, sab, sizes):
    block, tokens, prototypes, expected = block_case(stage, sab, sizes)
    packed = PackedPrototypeBlock(copy.deepcopy(block))
    prepare_modules(packed)
    with torch.no_grad():
        found = packed(tokens, prototypes)
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- files

CONFIG = {"INP_num": 6, "input_size": 64, "crop_size": 56, "pos_embed": "paper"}
OTHER_KINDS = [(1, 1, "binary"), (1, 32, "mixed"), (2, 32, "off")]
MATCHING_PRECISIONS = list(zip(ENCODER_PRECISIONS, TRAINED_PRECISIONS, strict=True))
PRECISIONS = [(encoder, trained) for encoder in ENCODER_PRECISIONS for trained in TRAINED_PRECISIONS]


def content_of(stage: int, activation_bits: int, sab: str) -> dict:
    """What a checkpoint would say of such a model."""
    binary = {"act_bits": activation_bits, "sab": sab, "weight_gradient": "clip", "activation_gradient": "triangle"}
    return {
        "host": "INP-Former",
        "item": "bottle",
        "stage": stage,
        "config": {**CONFIG, **binary},
        "protocol": PROTOCOL,
        "calibration": {"map_median": 0.1, "map_limit": 0.5, "scores": [0.2]},
    }


@cache
def file_of(stage: int, activation_bits: int, sab: str, options: PackingOptions) -> tuple[bytes, nn.Module]:
    """A packed file and the packed detector that it was made from."""
    packed = packed_copy(case_of(stage, activation_bits, sab, 32, 56).trained, options)
    description = describe(packed, content_of(stage, activation_bits, sab), DECISION, preprocessing(64, 56))
    return packed_bytes(packed, options, description), packed


@pytest.fixture
def load(tmp_path):
    """Write a file's content and open it as a user would."""

    def call(content: bytes, encoder_weights: str | None = None):
        file = tmp_path / "model.binaryad"
        file.write_bytes(content)
        return load_packed(file, encoder_weights=encoder_weights)

    return call


@pytest.mark.parametrize(
    ("stage", "activation_bits", "sab", "encoder", "trained"),
    [(2, 1, "mixed", *precision) for precision in PRECISIONS]
    + [(*kind, *precision) for kind in OTHER_KINDS for precision in MATCHING_PRECISIONS],
)
def test_loaded_file_is_the_packed_detector_bit_for_bit(load, stage, activation_bits, sab, encoder, trained):
    content, packed = file_of(stage, activation_bits, sab, PackingOptions(encoder, trained))
    detector, description = load(content)
    images = case_of(stage, activation_bits, sab, 32, 56).images
    assert torch.equal(detector.anomaly_map(images), packed.anomaly_map(images))
    assert torch.equal(detector.anomaly_map(images[:1]), packed.anomaly_map(images[:1]))
    assert list(detector.trainable_parameters()) == []
    assert detector.device == torch.device("cpu")
    assert not detector.training
    assert description["precision"] == {"encoder": encoder, "trained": trained, "encoder_reference": False}
    assert description["decision"] == DECISION
    assert description["calibration"] == {"map_median": 0.1, "map_limit": 0.5}
    assert description["encoder"]["sha256"] == packed.encoder.weights_sha256


@pytest.mark.parametrize(("stage", "activation_bits", "sab"), [(1, 1, "mixed"), (2, 1, "binary"), (1, 32, "mixed")])
def test_only_weights_lose_precision(stage, activation_bits, sab):
    """Scales, thresholds, gates, biases, norms and prototypes are in the file as they were trained."""
    trained = case_of(stage, activation_bits, sab, 32, 56).trained
    arrays, _ = plain_read(file_of(stage, activation_bits, sab, PackingOptions("int8", "int8"))[0])
    single = {
        name: values.ravel() for name, values in arrays.items() if not name.startswith("encoder.") and values.dtype == "<f4"
    }
    half = {name for name, values in arrays.items() if not name.startswith("encoder.") and values.dtype == "<f2"}
    state = {name: numbers(value).ravel() for name, value in trained.trained_state().items()}
    assert half == set()
    for name in ("prototype_token", "bottleneck.0.fc1.bias", "aggregation.0.norm1.weight", "decoder.3.norm2.bias"):
        np.testing.assert_array_equal(single[name], state[name])
    attention = "decoder.3.attn." if activation_bits == 32 else "decoder.3."
    scale = f"{attention}{'learn_scale' if activation_bits == 32 else 'head_scale'}"
    np.testing.assert_array_equal(single[scale], state["decoder.3.attn.learn_scale"])
    for name in ("q.bias", "kv.threshold", "proj.threshold") if activation_bits == 1 else ("q.alpha", "sab.gate_slope"):
        np.testing.assert_array_equal(single[attention + name], state[f"decoder.3.attn.{name}"])


def test_sizes_of_the_precisions():
    """A file of fewer bits is smaller, and its int8 part is int8."""
    sizes = {pair: len(file_of(1, 1, "mixed", PackingOptions(*pair))[0]) for pair in PRECISIONS}
    for trained in TRAINED_PRECISIONS:
        assert sizes["fp32", trained] > sizes["bf16", trained] > sizes["int8", trained]
    for encoder in ENCODER_PRECISIONS:
        assert sizes[encoder, "fp32"] > sizes[encoder, "fp16"] > sizes[encoder, "int8"]
    arrays, _ = plain_read(file_of(1, 1, "mixed", PackingOptions("int8", "int8"))[0])
    for name in ("encoder.vit.blocks.0.qkv.weight", "bottleneck.0.fc1.weight", "decoder.0.mlp.fc2.weight"):
        assert arrays[name].dtype == "i1"
        assert np.abs(arrays[name].astype(int)).max() == 127


@pytest.mark.parametrize(("encoder", "trained"), MATCHING_PRECISIONS)
def test_file_that_only_names_its_encoder(load, encoder, trained):
    content, packed = file_of(2, 1, "mixed", PackingOptions(encoder, trained, encoder_reference=True))
    assert not any(name.startswith("encoder.") for name in plain_read(content)[0])
    assert len(content) < len(file_of(2, 1, "mixed", PackingOptions(encoder, trained))[0])
    detector, _ = load(content)
    images = case_of(2, 1, "mixed", 32, 56).images
    assert torch.equal(detector.anomaly_map(images), packed.anomaly_map(images))
    complete, _ = load(file_of(2, 1, "mixed", PackingOptions(encoder, trained))[0])
    assert torch.equal(detector.anomaly_map(images), complete.anomaly_map(images))


def test_file_that_only_names_its_encoder_finds_the_weights_or_says_what_is_wrong(load, monkeypatch):
    content, packed = file_of(2, 1, "mixed", PackingOptions("fp32", "fp32", encoder_reference=True))
    asked = []

    def look_up(name, crop_size, weights_file, position_embedding):
        asked.append((name, crop_size, weights_file, position_embedding))
        return build_encoder(name, crop_size)

    monkeypatch.setitem(HOSTS, "INP-Former", replace(HOSTS["INP-Former"], build_encoder=look_up))
    detector, _ = load(content, "weights.pth")
    assert asked == [(RANDOM_TINY_ENCODER, 56, "weights.pth", "paper")]
    images = case_of(2, 1, "mixed", 32, 56).images
    assert torch.equal(detector.anomaly_map(images), packed.anomaly_map(images))
    other = rewritten(content, lambda header, entry: entry["encoder"].update(sha256="f" * 64))
    with pytest.raises(UserError, match=r"wrong encoder: .* of sha256 ffffffffffffffff, .*--encoder_weights FILE"):
        load(other)


def renamed_tensor(header, entry):
    header["decoder.0.kv.biass"] = header.pop("decoder.0.kv.bias")


def missing_tensor(header, entry):
    entry["compressed"].pop("decoder.0.q.threshold", None)
    header.pop("decoder.0.q.threshold")


def other_shape(header, entry):
    header["decoder.0.q.bits"]["shape"].reverse()


def other_type(header, entry):
    header["decoder.0.q.bits"]["dtype"] = "I8"


def number_for_an_integer(header, entry):
    entry["compressed"]["decoder.0.mlp.fc1.low"]["dtype"] = "float16"


def changed(key: str, value, *parents: str):
    def change(header, entry):
        for parent in parents:
            entry = entry[parent]
        entry[key] = value

    return change


def without(key: str, *parents: str):
    def change(header, entry):
        for parent in parents:
            entry = entry[parent]
        del entry[key]

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (renamed_tensor, r"tensors \['decoder.0.kv.bias', 'decoder.0.kv.biass'\] are missing or surplus"),
        (missing_tensor, r"written wrongly|decoder.0.q.threshold"),
        (other_shape, r"decoder.0.q.bits has shape \(4, 32\), expected \(32, 4\)"),
        (other_type, r"decoder.0.q.bits has type torch.int8, expected torch.uint8"),
        (number_for_an_integer, r"decoder.0.mlp.fc1.low has type torch.float16, expected torch.int32"),
        (changed("host", "Dinomaly 9"), r"host should be 'INP-Former' or .*, found 'Dinomaly 9'"),
        (changed("name", "resnet18", "encoder"), r"encoder.name should be .*, found 'resnet18'"),
        (changed("name", ["x"], "encoder"), r""),
        (changed("stage", 1), r"are missing or surplus"),
        (changed("stage", "two"), r""),
        (changed("act_bits", 32, "config"), r"are missing or surplus"),
        (changed("sab", "off", "config"), r"are missing or surplus"),
        (changed("INP_num", 7, "config"), r"prototype_token has shape \(6, 32\), expected \(7, 32\)"),
        (changed("INP_num", -1, "config"), r""),
        (changed("crop_size", 70, "config"), r"config.crop_size should be 56 as in preprocessing, found 70"),
        (changed("crop_size", "56", "config"), r""),
        (changed("config", []), r""),
        (changed("precision", {"encoder": "int8"}), r""),
        (
            changed("precision", {"decoder": "int8"}),
            r"'precision.encoder', 'precision.trained', 'precision.encoder_reference' are missing",
        ),
        (changed("precision", None), r""),
        (without("config"), r"'config'"),
        (without("encoder"), r"'encoder'"),
        (without("INP_num", "config"), r"'config.INP_num' is missing"),
        (without("precision"), r"'precision'"),
    ],
)
def test_file_of_a_model_that_nobody_can_build(load, change, expected):
    content, _ = file_of(2, 1, "mixed", FLOAT)
    with pytest.raises(UserError, match=rf"model unusable: .*model.binaryad.*({expected})"):
        load(rewritten(content, change))


def test_calibration_of_a_fresh_detector_is_what_gets_packed():
    """Without a training step too: thresholds of a detector that was only calibrated reach the packed form."""
    detector = build_detector(32, 56)
    binarize(detector, 2, BinarizationOptions())
    calibrate(detector, torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1)))
    images = images_without_ties(detector.eval(), 2, 56)
    found = packed_copy(detector, FLOAT).anomaly_map(images)
    torch.testing.assert_close(found, detector.anomaly_map(images), rtol=0, atol=1e-5)

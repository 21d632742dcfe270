"""8-bit layers against exact integer formulas, and against the float layers that they replace."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Attention, Block
from torch import nn

from binarize import int8
from binarize.int8 import Int8Block, Int8Convolution, Int8Linear, Int8Mlp, to_int8
from binarize.kernels import engine
from binarize.runtime import prepare_modules
from models.build import RANDOM_TINY_ENCODER, build_encoder, build_encoder_without_weights
from models.layers import Mlp, PrototypeExtractorBlock
from tests.test_binarize import numbers

SHAPES = [(1, 1, 1), (16, 32, 5), (17, 33, 7), (5, 130, 40)]  # out, in, tokens


@pytest.fixture(params=["kernels", "torch"])
def between_products(request):
    """What lies between the products: the fastest C path of this machine, or plain torch."""
    before = engine.kernels()
    if request.param == "torch":
        engine.use_kernels(None)
    elif before is None:
        pytest.skip("no C compiler here")
    yield
    engine.use_kernels(before)


@pytest.fixture
def machine(monkeypatch):
    """Let the 8-bit products of this machine be `product`; what the module found out before is forgotten and restored."""

    def pretend(product) -> None:
        monkeypatch.setattr(int8, "_onednn_product", product)
        int8._exact_weight_bits.cache_clear()

    yield pretend
    monkeypatch.undo()
    int8._exact_weight_bits.cache_clear()


def saturating_product(limit: int):
    """Products of unsigned and signed bytes whose sums of two saturate at `limit`, as without VNNI at 2^15."""

    def make(weight, scale):
        pairs = F.pad(weight, (0, weight.shape[1] % 2)).long().unflatten(1, (-1, 2))

        def product(rows):
            activations = F.pad(rows, (0, rows.shape[1] % 2)).long().unflatten(1, (-1, 2))
            sums = (activations.unsqueeze(1) * pairs).sum(dim=-1).clamp(-limit, limit - 1).sum(dim=-1)
            return (sums - 128 * weight.long().sum(dim=1)).float() * scale

        return product

    return make


def linear(rows: int, columns: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows + columns)
    return nn.Linear(columns, rows, bias).requires_grad_(False)


def prepared(module: nn.Module) -> nn.Module:
    prepare_modules(module)
    return module


def inputs_without_ties(tokens: int, width: int) -> torch.Tensor:
    """Random rows of very different sizes that no rounding of the quantization's own arithmetic could push over a half."""
    generator = torch.Generator().manual_seed(0)
    while True:
        values = torch.randn(tokens, width, generator=generator) * 10 ** torch.linspace(-3, 3, tokens).unsqueeze(1)
        scaled = values.double() / values.double().abs().amax(dim=1, keepdim=True) * 127
        if ((scaled - scaled.floor() - 0.5).abs() > 1e-4).all():
            return values


def plain_quantized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -127 to 127 and a scale for each row."""
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    return np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)), scale


def weight_bits_here() -> int:
    """7 on machines whose 8-bit products saturate."""
    return int8._exact_weight_bits() or 8


def plain_int8_linear(layer: nn.Linear, inputs: np.ndarray, weight_bits: int) -> np.ndarray:
    """Exact integers, then float64."""
    weight, weight_scale = plain_quantized(numbers(layer.weight))
    if weight_bits == 7:
        weight, weight_scale = np.rint(weight / 2), 2 * weight_scale
    rows, row_scale = plain_quantized(inputs)
    return (rows @ weight.T) * row_scale * weight_scale.T + (0 if layer.bias is None else numbers(layer.bias))


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_linear_is_the_formula_in_exact_integers(between_products, rows, columns, tokens):
    layer, inputs = linear(rows, columns), inputs_without_ties(tokens, columns)
    found = prepared(Int8Linear(layer))(inputs)
    expected = plain_int8_linear(layer, numbers(inputs), weight_bits_here())
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())
    assert torch.equal(prepared(Int8Linear(layer))(inputs.unflatten(0, (1, -1))), found.unflatten(0, (1, -1)))


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_error_is_bounded_by_the_steps_of_both_sides(between_products, rows, columns, tokens):
    """|y - y'| <= sum over inputs of |w| s_x / 2 + |x| s_w / 2 + s_x s_w / 4, with weights of 7 bits at twice the s_w."""
    layer, inputs = linear(rows, columns, bias=False), inputs_without_ties(tokens, columns)
    x, w = np.abs(numbers(inputs)), np.abs(numbers(layer.weight))
    step_x = x.max(axis=1, keepdims=True) / 127
    step_w = w.max(axis=1, keepdims=True) / 127 * 2 ** (8 - weight_bits_here())
    bound = (step_x / 2) * w.sum(axis=1) + x.sum(axis=1, keepdims=True) * step_w.T / 2 + columns * step_x * step_w.T / 4
    error = np.abs(numbers(prepared(Int8Linear(layer))(inputs)) - numbers(inputs) @ numbers(layer.weight).T)
    assert (error <= 1.001 * bound).all()
    assert error.max() > 0.01 * bound.max() or columns == 1


def test_largest_magnitudes_of_rows_are_127_and_zeros_stay():
    layer = linear(6, 9)
    layer.weight[2] = 0
    layer.weight[3, 4] = -5
    quantized = Int8Linear(layer)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127, 127]
    assert quantized.weight[3, 4] == -127
    torch.testing.assert_close(quantized.weight_scale[3], torch.tensor(5 / 127))
    torch.testing.assert_close(prepared(quantized)(torch.randn(4, 9))[:, 2], layer.bias[2].expand(4))


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_zeros_give_the_bias(between_products, bias):
    layer, inputs = linear(17, 33, bias), torch.randn(5, 33)
    inputs[[0, 3]] = 0
    found = prepared(Int8Linear(layer))(inputs)
    assert found.isfinite().all()
    for row in (0, 3):
        assert torch.equal(found[row], layer.bias if bias else torch.zeros(17))
    assert not torch.equal(found[1], found[0])
    assert prepared(Int8Linear(layer))(inputs[:0]).shape == (0, 17)


@pytest.mark.parametrize("count", [1, 8, 9, 300])
def test_both_products_agree(count):
    if int8._exact_weight_bits() != 8:
        pytest.skip("this machine has only one exact product")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (count, 130), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-127, 128, (37, 130), dtype=torch.int8, generator=generator)
    rows[0], weight[0] = 255, 127
    scale = torch.rand(37, generator=generator) + 0.1
    exact = (numbers(rows) - 128) @ numbers(weight).T * numbers(scale)
    for make in (int8._onednn_product, int8._float_product):
        found = numbers(make(weight, scale)(rows))
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_exact_products_are_used_silently(machine, caplog):
    machine(saturating_product(2**40))
    layer, inputs = linear(16, 32), inputs_without_ties(5, 32)
    expected = plain_int8_linear(layer, numbers(inputs), 8)
    np.testing.assert_allclose(numbers(prepared(Int8Linear(layer))(inputs)), expected, rtol=1e-5, atol=1e-5 * expected.max())
    assert warnings_of(caplog) == []


def test_where_sums_of_two_saturate_weights_have_7_bits(machine, caplog):
    machine(saturating_product(2**15))
    layer = linear(16, 32)
    layer.weight[:, :2] = layer.weight.abs().max()  # with 8 bits these two would saturate
    inputs = inputs_without_ties(5, 32)
    inputs[:, :2] = inputs.abs().amax(dim=1, keepdim=True)
    quantized = [prepared(Int8Linear(layer)) for _ in range(3)]
    expected = plain_int8_linear(layer, numbers(inputs), 7)
    for module in quantized:
        np.testing.assert_allclose(numbers(module(inputs)), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    (warning,) = warnings_of(caplog)
    assert "7 bits" in warning


@pytest.mark.parametrize("broken", ["inexact", "absent"])
def test_without_an_exact_product_layers_run_in_float(machine, caplog, broken):
    def absent(weight, scale):
        raise RuntimeError("no operator of that name\nand a long explanation")

    machine(absent if broken == "absent" else saturating_product(2**10))
    layer, inputs = linear(16, 32), inputs_without_ties(5, 32)
    quantized = [prepared(Int8Linear(layer)) for _ in range(3)]
    expected = plain_int8_linear(layer, numbers(inputs), 8)
    for module in quantized:
        np.testing.assert_allclose(numbers(module(inputs)), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    (warning,) = warnings_of(caplog)
    assert "8-bit layers run in float32" in warning
    assert ("no operator of that name" in warning) == (broken == "absent")
    assert "long explanation" not in warning


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", [Mlp, TimmMlp])
def test_mlp(between_products, kind):
    torch.manual_seed(0)
    mlp = (Mlp(33) if kind is Mlp else TimmMlp(33, 130)).requires_grad_(False)
    tokens = torch.randn(2, 7, 33)
    tokens[0, 3] = 0
    found = prepared(Int8Mlp(mlp))(tokens)
    assert found.shape == tokens.shape
    assert 1e-4 < relative_error(found, mlp(tokens)) < 0.04
    # in either quantization rounding may turn a tie, which is one step more or less of one input
    bits = weight_bits_here()
    hidden = F.gelu(torch.from_numpy(plain_int8_linear(mlp.fc1, numbers(tokens.flatten(0, 1)), bits)))
    expected = plain_int8_linear(mlp.fc2, numbers(hidden), bits).reshape(tokens.shape)
    np.testing.assert_allclose(numbers(found), expected, atol=0.004 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options", [dict(stride=13), dict(bias=False, stride=13), dict(stride=(3, 5), padding=(2, 1)), dict(padding="same")]
)
def test_convolution_is_that_of_the_quantized_weights(options):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 7, 13, **options).requires_grad_(False)
    plain.weight *= torch.tensor([0, 1e-3, 1, 2, 3, 4, 1e3]).reshape(7, 1, 1, 1)
    images = torch.randn(2, 3, 42, 56)
    weight, scale = plain_quantized(numbers(plain.weight).reshape(7, -1))
    exact = copy.deepcopy(plain).double()
    exact.weight.copy_(torch.from_numpy((weight * scale).reshape(7, 3, 13, 13)))
    quantized = prepared(Int8Convolution(plain))
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.abs().amax(dim=1).tolist() == [0] + [127] * 6
    expected = exact(images.double())
    torch.testing.assert_close(quantized(images), expected.float(), rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [({}, True), ({"groups": 3}, False), ({"dilation": 2}, False), ({"padding_mode": "reflect"}, False)],
)
def test_only_plain_convolutions_are_converted(options, is_plain):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, **options)).requires_grad_(False)
    quantized = copy.deepcopy(plain)
    to_int8(quantized)
    prepare_modules(quantized)
    assert type(quantized[0]) is (Int8Convolution if is_plain else nn.Conv2d)
    images = torch.randn(1, 3, 8, 8)
    assert relative_error(quantized(images), plain(images)) < 0.02


def block(width: int = 96, heads: int = 3, **options) -> Block:
    """timm's block with every parameter moved from its first value."""
    torch.manual_seed(0)
    made = Block(width, heads, **options).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter += (0.3 if name.startswith(("norm", "ls")) else 0.1) * torch.randn_like(parameter)
    return made


BLOCKS = {
    "DINOv2": dict(qkv_bias=True, init_values=0.7),
    "without layer scale": dict(qkv_bias=True),
    "without qkv bias": dict(init_values=0.7),
    "odd width, head of 11 channels": dict(width=33, qkv_bias=True, init_values=0.7),
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_block_is_near_timms(between_products, options):
    plain = block(**options)
    tokens = torch.randn(2, 13, plain.norm1.weight.shape[0])
    quantized = prepared(Int8Block(plain))
    expected, found = plain(tokens), quantized(tokens)
    assert found.shape == tokens.shape
    assert 1e-4 < relative_error(found, expected) < 0.04
    assert relative_error(found - tokens, expected - tokens) < 0.04
    assert relative_error(quantized(tokens[1:]), found[1:]) < 1e-4  # images do not see each other


@pytest.mark.parametrize("bias", [False, True])
def test_smoothing_does_not_change_the_function(bias):
    """Norm and layer together, in float64, also with channels that the norm or the layer ignores."""
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(40, eps=1e-6), nn.Linear(40, 9, bias)
    with torch.no_grad():
        norm.weight.mul_(10 ** torch.linspace(-3, 3, 40))
        norm.bias.copy_(torch.randn(40))
        norm.weight[3] = norm.bias[3] = norm.weight[4] = layer.weight[:, 5] = 0
    inputs = torch.randn(7, 40, dtype=torch.float64)
    expected = copy.deepcopy(layer).double()(copy.deepcopy(norm).double()(inputs))
    new_norm, new_layer = int8._smoothed(norm, layer)
    assert new_norm.eps == norm.eps
    found = new_layer.double()(new_norm.double()(inputs))
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    before, after = (values.abs().log().std() for values in (norm.weight[6:], new_norm.weight[6:]))
    assert after < 0.7 * before


def test_an_outlier_channel_costs_less_with_smoothing(monkeypatch):
    """A channel that the norm makes a hundred times larger, read by small weights: the others keep their resolution."""
    plain = block(init_values=0.7, qkv_bias=True)
    for norm, layer in ((plain.norm1, plain.attn.qkv), (plain.norm2, plain.mlp.fc1)):
        norm.weight[7] *= 100
        layer.weight[:, 7] /= 100
    tokens = torch.randn(2, 13, 96)
    expected = plain(tokens)
    smoothed = relative_error(prepared(Int8Block(plain))(tokens), expected)
    monkeypatch.setattr(int8, "_smoothed", lambda norm, layer: (norm, layer))
    unsmoothed = relative_error(prepared(Int8Block(plain))(tokens), expected)
    assert smoothed < 0.04
    assert unsmoothed > 4 * smoothed


class Unknown(nn.Module):
    """A structure that the conversion has never heard of."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48)), "norm": nn.LayerNorm(48)})
        self.second = nn.Linear(48, 32, bias=False)
        self.convolution = nn.Conv1d(32, 32, 1)  # a layer without an 8-bit form

    def forward(self, tokens):
        hidden = self.layers["norm"](torch.tanh(self.layers["first"](tokens)))
        return self.convolution((tokens + self.second(hidden)).transpose(1, 2)).transpose(1, 2)


def test_unknown_structures_keep_working():
    torch.manual_seed(0)
    plain, tokens = Unknown().requires_grad_(False), torch.randn(2, 5, 32)
    quantized = copy.deepcopy(plain)
    to_int8(quantized)
    prepare_modules(quantized)
    assert type(quantized.layers["first"][1]) is type(quantized.second) is Int8Linear
    assert type(quantized.convolution) is nn.Conv1d
    assert 1e-4 < relative_error(quantized(tokens), plain(tokens)) < 0.04


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({}, True),
        ({"qk_norm": True}, False),
        ({"scale_attn_norm": True}, False),
        ({"scale_mlp_norm": True}, False),
        ({"act_layer": nn.ReLU}, False),
    ],
)
def test_blocks_with_parts_that_int8_block_lacks_are_converted_layer_by_layer(options, is_plain):
    plain = block(**options)
    holder = nn.ModuleList([copy.deepcopy(plain)])
    to_int8(holder)
    prepare_modules(holder)
    assert type(holder[0]) is (Int8Block if is_plain else Block)
    kinds = [type(module) for module in holder.modules()]
    assert kinds.count(Int8Linear) == 4
    assert nn.Linear not in kinds
    tokens = torch.randn(2, 13, 96)
    assert 1e-4 < relative_error(holder[0](tokens), plain(tokens)) < 0.04


@pytest.mark.parametrize("part", ["q_norm", "k_norm"])
def test_one_norm_within_the_attention_is_enough_to_keep_a_block(part):
    plain = block()
    setattr(plain.attn, part, nn.LayerNorm(32))
    holder = nn.ModuleList([plain])
    to_int8(holder)
    assert type(holder[0]) is Block


def test_subclasses_are_not_mistaken_for_what_they_derive_from():
    class OtherAttention(Attention):
        def forward(self, x, *arguments, **options):
            return 2 * super().forward(x, *arguments, **options)

    plain = block()
    plain.attn.__class__ = OtherAttention
    holder = nn.ModuleList([copy.deepcopy(plain)])
    to_int8(holder)
    prepare_modules(holder)
    tokens = torch.randn(2, 13, 96)
    assert relative_error(holder[0](tokens), plain(tokens)) < 0.04


def test_prototype_extractor():
    torch.manual_seed(0)
    plain = PrototypeExtractorBlock(32, 2).requires_grad_(False)
    quantized = copy.deepcopy(plain)
    to_int8(quantized)
    prepare_modules(quantized)
    assert type(quantized.mlp) is Int8Mlp
    assert type(quantized.attn.q) is type(quantized.attn.kv) is type(quantized.attn.proj) is Int8Linear
    queries, tokens = torch.randn(2, 6, 32), torch.randn(2, 16, 32)
    assert 1e-4 < relative_error(quantized(queries, tokens), plain(queries, tokens)) < 0.04


@pytest.mark.parametrize("name", [RANDOM_TINY_ENCODER, "dinov2reg_vit_small_14", "dinov3_vit_small_16"])
def test_every_family_of_encoders(name):
    """DINOv3's blocks are converted layer by layer, the others as a whole."""
    if name == RANDOM_TINY_ENCODER:
        encoder = build_encoder(name, 56)
    else:
        torch.manual_seed(0)
        encoder = build_encoder_without_weights(name, 64 if "dinov3" in name else 56, "random weights", "", 0)
        for parameter_name, parameter in encoder.named_parameters():  # their layer scales start from almost nothing
            parameter += 0.5 if "gamma" in parameter_name else 0.02 * torch.randn_like(parameter)
        encoder.vit.blocks = encoder.vit.blocks[:4]  # the others would only take time
        encoder.taps = [2, 3]
    images = torch.randn(1, 3, *encoder.vit.patch_embed.img_size)
    expected = torch.stack(encoder(images))
    to_int8(encoder)
    prepare_modules(encoder)
    kinds = {type(module) for module in encoder.modules()}
    assert nn.Linear not in kinds
    assert (Int8Block in kinds) == (name != "dinov3_vit_small_16")
    assert Int8Convolution in kinds
    assert nn.Conv2d not in kinds
    assert relative_error(torch.stack(encoder(images)), expected) < 0.04

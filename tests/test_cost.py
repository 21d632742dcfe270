"""Parameters, sizes and multiply-accumulates of the real model sizes, pinned to published and hand-derived figures."""

import functools

import pytest
import timm
import torch

from binarize.cost import Cost, cost_table
from binarize.linear import BinarizationOptions
from binarize.stages import binarize
from models.build import ENCODERS, build_inp_former
from models.encoder import FrozenEncoder

CROP, PATCHES, PROTOTYPES, BLOCKS = 392, 784, 6, 8
WIDTHS = {"small": (384, 6), "base": (768, 12), "large": (1024, 16)}
SIZES = list(WIDTHS)


@functools.cache
def costs(size: str, stage: int, activation_bits: int = 1, sab: str = "mixed") -> dict[str, Cost]:
    """Cost table of a model of shapes only, without weights."""
    name = f"dinov2reg_vit_{size}_14"
    numbers = ENCODERS[name]
    with torch.device("meta"):
        published = timm.create_model(numbers.timm_name, pretrained=False, num_classes=0)
        vit = timm.create_model(numbers.timm_name, pretrained=False, num_classes=0, img_size=CROP)
        count = sum(parameter.numel() for parameter in published.parameters())
        detector = build_inp_former(FrozenEncoder(vit, numbers.taps, name, "", "", count), PROTOTYPES)
        binarize(detector, stage, BinarizationOptions(activation_bits=activation_bits, sab=sab))
        return cost_table(detector, CROP)


@pytest.mark.parametrize(
    ("size", "trained", "total"), [("small", 17.15, 39.21), ("base", 68.52, 155.10), ("large", 121.77, 426.14)]
)
def test_parameters_in_millions(size, trained, total):
    table = costs(size, 0)
    assert table["decoder side"].parameters / 1e6 == pytest.approx(trained, abs=0.005)
    assert table["with unused blocks"].parameters / 1e6 == pytest.approx(total, abs=0.005)


PARTS = ("bottleneck", "aggregation", "decoder")
MILLIONS = {"small": (1.18, 1.77, 14.20), "base": (4.72, 7.09, 56.70), "large": (8.39, 12.60, 100.77)}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_parts_in_millions(size):
    table = costs(size, 0)
    for part, millions in zip(PARTS, MILLIONS[size], strict=True):
        rows = [name for name in table if name.split()[0] == part and name != "decoder side"]
        count = sum(table[name].parameters for name in rows)
        assert count / 1e6 == pytest.approx(millions, abs=0.005), part


# encoder, bottleneck, extractor, decoder attention linears, products of the attention map, decoder MLP, total
GIGA_MACS = {
    "small": (18.9, 0.92, 0.24, 1.86, 0.03, 7.40, 29.4),
    "base": (65.8, 3.70, 0.97, 7.46, 0.06, 29.60, 107.5),
    "large": (213.3, 6.58, 1.72, 13.25, 0.08, 52.61, 287.6),
}


@pytest.mark.parametrize("size", SIZES)
def test_multiply_accumulates_of_one_image(size):
    table = costs(size, 0)
    encoder, bottleneck, extractor, linears, products, mlp, total = GIGA_MACS[size]
    giga = {part: cost.macs / 1e9 for part, cost in table.items()}
    assert giga["encoder"] == pytest.approx(encoder, abs=0.05)
    assert giga["bottleneck"] == pytest.approx(bottleneck, abs=0.005)
    assert giga["aggregation"] == pytest.approx(extractor, abs=0.005)
    assert giga["decoder attention"] == pytest.approx(linears + products, abs=0.01)
    assert giga["decoder MLP"] == pytest.approx(mlp, abs=0.005)
    assert giga["whole model"] == pytest.approx(total, abs=0.05)
    assert giga["with unused blocks"] == giga["whole model"]
    assert giga["decoder side"] == pytest.approx(giga["whole model"] - giga["encoder"])
    assert sum(cost.binary_macs for cost in table.values()) == 0


@pytest.mark.parametrize("size", SIZES)
def test_multiply_accumulates_behind_the_encoder_by_hand(size):
    table, (width, _) = costs(size, 0), WIDTHS[size]
    square, mlp = width * width, 8 * width * width
    assert table["bottleneck"].macs == PATCHES * mlp
    products = 2 * PROTOTYPES * PATCHES * width
    extractor = PROTOTYPES * square + PATCHES * 2 * square + products + PROTOTYPES * (square + mlp)
    assert table["aggregation"].macs == extractor
    linears = PATCHES * square + PROTOTYPES * 2 * square + PATCHES * square
    assert table["decoder attention"].macs == BLOCKS * (linears + products)
    assert table["decoder MLP"].macs == BLOCKS * PATCHES * mlp
    assert table["decoder norms"].macs == table["prototype_token"].macs == 0


@pytest.mark.parametrize("size", SIZES)
def test_encoder_multiply_accumulates_by_hand(size):
    width, _ = WIDTHS[size]
    blocks, tokens = (19 if size == "large" else 10), PATCHES + 5
    per_block = tokens * 12 * width * width + 2 * tokens * tokens * width
    assert costs(size, 0)["encoder"].macs == PATCHES * 3 * 14 * 14 * width + blocks * per_block


@pytest.mark.parametrize("size", SIZES)
def test_binary_macs_are_the_linear_layers_of_the_stage(size):
    width, _ = WIDTHS[size]
    attention = BLOCKS * (2 * PATCHES + 2 * PROTOTYPES) * width * width
    mlp = BLOCKS * PATCHES * 8 * width * width
    float_table = costs(size, 0)
    for stage, expected in ((1, attention), (2, attention + mlp)):
        table = costs(size, stage)
        for part in ("decoder side", "whole model", "with unused blocks"):
            assert table[part].binary_macs == expected
            assert table[part].macs == float_table[part].macs
            float_macs = float_table[part].macs - expected
            assert table[part].equivalent_macs == pytest.approx(float_macs + expected / 64)
            assert table[part].mac_ratio == pytest.approx(float_table[part].macs / (float_macs + expected / 64))


@pytest.mark.parametrize("size", SIZES)
def test_binary_and_added_parameters_by_hand(size):
    """alpha per output, threshold per input and one activation scale per layer; two gate numbers per head."""
    width, heads = WIDTHS[size]
    attention_layers, mlp_layers = [(1, 1), (2, 1), (1, 1)], [(4, 1), (1, 4)]  # outputs, inputs in widths
    for stage, layers in ((1, attention_layers), (2, attention_layers + mlp_layers)):
        whole = costs(size, stage)["decoder side"]
        assert whole.binary_parameters == BLOCKS * sum(outputs * inputs for outputs, inputs in layers) * width**2
        scales = sum((outputs + inputs) * width + 1 for outputs, inputs in layers)
        assert whole.added_parameters == BLOCKS * (scales + 2 * heads)
        assert whole.parameters == costs(size, 0)["decoder side"].parameters + whole.added_parameters


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_and_size_ratio_by_hand(size, stage):
    for part in ("decoder side", "whole model", "with unused blocks"):
        cost, published = costs(size, stage)[part], costs(size, 0)[part].parameters
        expected = (cost.parameters - cost.binary_parameters) * 4 + cost.binary_parameters / 8
        assert cost.bytes == pytest.approx(expected, abs=1)
        assert cost.size_ratio == pytest.approx(4 * published / expected, rel=1e-6)


STAGE_2 = {  # decoder side: size, MACs; with the float encoder: size "with unused blocks", MACs
    "small": (4.91, 7.79, 1.53, 1.45),
    "base": (4.98, 7.88, 1.55, 1.51),
    "large": (4.99, 7.90, 1.30, 1.29),
}


@pytest.mark.parametrize("size", SIZES)
def test_ratios_of_the_binary_model(size):
    table = costs(size, 2)
    decoder_size, decoder_macs, whole_size, whole_macs = STAGE_2[size]
    assert table["decoder side"].size_ratio == pytest.approx(decoder_size, abs=0.005)
    assert table["decoder side"].mac_ratio == pytest.approx(decoder_macs, abs=0.005)
    assert table["with unused blocks"].size_ratio == pytest.approx(whole_size, abs=0.005)
    assert table["with unused blocks"].mac_ratio == pytest.approx(whole_macs, abs=0.005)


def test_ratios_of_stage_1():
    decoder = costs("base", 1)["decoder side"]
    assert decoder.size_ratio == pytest.approx(1.36, abs=0.005)
    assert decoder.mac_ratio == pytest.approx(1.21, abs=0.005)


def test_the_float_model_has_ratio_one():
    for part, cost in costs("small", 0).items():
        assert cost.size_ratio == 1
        assert cost.mac_ratio == (1 if cost.macs else None), part


def test_float_activations_save_size_but_no_multiplications():
    table = costs("small", 2, activation_bits=32, sab="off")["decoder side"]
    assert table.binary_macs == 0
    assert table.mac_ratio == 1
    assert table.binary_parameters == costs("small", 2)["decoder side"].binary_parameters
    assert table.added_parameters == BLOCKS * 9 * WIDTHS["small"][0]  # alpha alone: 1 + 2 + 1 + 4 + 1 widths


def test_sums_are_the_sums_of_their_parts():
    table = dict(costs("base", 2))
    sums = {name: table.pop(name) for name in ("decoder side", "whole model", "with unused blocks")}
    assert sum(table.values(), Cost()) == sums["whole model"]
    encoder = table.pop("encoder")
    assert sum(table.values(), Cost()) == sums["decoder side"]
    assert sums["decoder side"] + encoder == sums["whole model"]


@pytest.mark.parametrize(("binary", "expected"), [(0, 40), (3, 29), (10, 2)])
def test_bits_are_rounded_up_to_bytes(binary, expected):
    """Ten parameters: 32 bits each, or one."""
    assert Cost(parameters=10, binary_parameters=binary).bytes == expected


def test_counting_leaves_the_detector_as_it_was(tiny_detector):
    binarize(tiny_detector, 2, BinarizationOptions())
    before = {name: value.clone() for name, value in tiny_detector.state_dict().items()}
    first, second = cost_table(tiny_detector, 56), cost_table(tiny_detector, 56)
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in tiny_detector.state_dict().items())
    assert torch.isfinite(tiny_detector.anomaly_map(torch.ones(1, 3, 56, 56))).all()

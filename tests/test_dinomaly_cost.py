"""Parameters, sizes and multiply-accumulates of Dinomaly in its real sizes, pinned to published and hand-derived figures."""

import functools

import pytest
import torch

from binarize.cost import Cost, cost_table
from binarize.linear import BinarizationOptions
from binarize.stages import binarize
from models.build import build_dinomaly, build_encoder_without_weights, published_parameter_count
from models.dinomaly import DinomalyOptions
from models.encoder import FrozenEncoder

LINEAR, SOFTMAX = "linear", "softmax"
TOKENS, BLOCKS = 28 * 28 + 5, 8
WIDTHS = {"small": (384, 6, 10), "base": (768, 12, 10), "large": (1024, 16, 19)}  # channels, heads, blocks of the encoder
SIZES = list(WIDTHS)


@functools.cache
def encoder_of(size: str) -> FrozenEncoder:
    """Shapes only, without weights."""
    name = f"dinov2reg_vit_{size}_14"
    with torch.device("meta"):
        return build_encoder_without_weights(name, 392, "", "", published_parameter_count(name))


@functools.cache
def costs(size: str, stage: int, attention: str = LINEAR) -> dict[str, Cost]:
    with torch.device("meta"):
        detector = build_dinomaly(encoder_of(size), DinomalyOptions(decoder_attention=attention))
        binarize(detector, stage, BinarizationOptions(sab="mixed" if attention == SOFTMAX else "off"))
        return cost_table(detector, 392)


def attention_products(size: str) -> tuple[int, int, int]:
    """MACs of q.k and attention.v: in the encoder, and in a decoder of linear and of softmax attention."""
    width, heads, blocks = WIDTHS[size]
    d = width // heads
    linear = BLOCKS * heads * TOKENS * (2 * d * d + d)  # keys x values, queries x their sum, and the normaliser
    return blocks * heads * 2 * TOKENS**2 * d, linear, BLOCKS * heads * 2 * TOKENS**2 * d


def test_base_has_the_published_parameters_and_multiply_accumulates():
    whole = costs("base", 0)["with unused blocks"]
    assert round(whole.parameters / 1e6, 1) == 148.0
    encoder, linear, _ = attention_products("base")
    assert whole.macs - encoder - linear == pytest.approx(104.7e9, rel=0.002)


@pytest.mark.parametrize("size", SIZES)
def test_multiply_accumulates_by_hand(size):
    width, _, blocks = WIDTHS[size]
    encoder, linear, softmax = attention_products(size)
    table = costs(size, 0)
    assert table["encoder"].macs == 784 * 3 * 14 * 14 * width + blocks * TOKENS * 12 * width**2 + encoder
    assert table["bottleneck"].macs == TOKENS * 8 * width**2
    assert table["decoder MLP"].macs == BLOCKS * TOKENS * 8 * width**2
    assert table["decoder attention"].macs == BLOCKS * TOKENS * 4 * width**2 + linear
    if size == "base":
        assert costs(size, 0, SOFTMAX)["decoder attention"].macs == BLOCKS * TOKENS * 4 * width**2 + softmax


STAGES = {1: (4, 4, 2), 2: (12, 9, 7)}  # weights of a block in squared widths; outputs and inputs of its layers in widths


@pytest.mark.parametrize(
    ("size", "stage", "attention"),
    [*((size, 2, LINEAR) for size in SIZES), ("base", 1, LINEAR), ("base", 1, SOFTMAX), ("base", 2, SOFTMAX)],
)
def test_binary_parts_by_hand(size, stage, attention):
    (width, heads, _), (weights, outputs, inputs) = WIDTHS[size], STAGES[stage]
    cost = costs(size, stage, attention)["decoder side"]
    assert cost.binary_parameters == BLOCKS * weights * width**2
    assert cost.binary_macs == TOKENS * cost.binary_parameters
    gates = 2 * heads if attention == SOFTMAX else 0
    assert cost.added_parameters == BLOCKS * ((outputs + inputs) * width + 2 * stage + gates)
    assert cost.macs == costs(size, 0, attention)["decoder side"].macs


@pytest.mark.parametrize(("size", "smaller", "fewer"), [("small", 8.98, 8.75), ("base", 9.21, 9.71), ("large", 9.27, 9.99)])
def test_ratios_of_the_decoder_side_at_stage_2(size, smaller, fewer):
    """Of weights alone 104 / (8 + 96 / 32) = 9.45; scales, norms and biases take the rest."""
    cost, width = costs(size, 2)["decoder side"], WIDTHS[size][0]
    assert cost.size_ratio == pytest.approx(smaller, abs=0.005)
    assert cost.mac_ratio == pytest.approx(fewer, abs=0.005)
    small = 5 * width + BLOCKS * 13 * width  # biases of the bottleneck, biases and norms of the blocks
    floats = 8 * width**2 + small + cost.added_parameters
    assert cost.size_ratio == pytest.approx((104 * width**2 + small) / (floats + 96 * width**2 / 32), rel=1e-6)

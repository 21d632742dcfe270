"""Dinomaly on bits: packed networks decide as the trained ones, on every path, and survive their files."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from binarize.attention import SoftmaxAwareBinarization
from binarize.kernels import engine
from binarize.kernels.library import PATHS, available_paths, load_library
from binarize.linear import BinaryLinear
from binarize.packed_blocks import FusedLinearAttention, PackedDecoderBlock
from binarize.runtime import WeightOnlyLinear
from binarize.stages import attention_gates, binary_layers
from models.build import RANDOM_TINY_ENCODER, build_dinomaly, build_encoder, build_encoder_without_weights
from models.dinomaly import Dinomaly, DinomalyOptions
from models.encoder import FrozenEncoder
from tests.packed_files import DECISION, PROTOCOL, preprocessing
from tests.test_dinomaly import encoder_with_registers
from tests.test_packed import trained_like
from utils.agreement import compare_on_bits, packed_copy
from utils.packed_model import ENCODER_PRECISIONS, TRAINED_PRECISIONS, PackingOptions, describe, load_packed, packed_bytes

SIDE, PATCHES, BLOCKS = 56, 16, 8
FLOAT = PackingOptions("fp32", "fp32")
ATTENTIONS = [("linear", "off"), ("softmax", "off"), ("softmax", "mixed"), ("softmax", "binary")]
# of no decision: a layer's in units of its scale, a map's in its own; the entries of a softmax map lie near each other
SMALLEST_MARGIN, SMALLEST_MAP_MARGIN = 1e-5, 1e-6


@pytest.fixture(params=["torch", *PATHS])
def path(request):
    """Every way to compute that this machine has."""
    before, library = engine.kernels(), load_library()
    if request.param != "torch" and (library is None or request.param not in available_paths(library)):
        pytest.skip(f"the path {request.param} does not run here")
    engine.use_kernels(None if request.param == "torch" else engine.Kernels(library, request.param))
    yield request.param
    engine.use_kernels(before)


def build_detector(kind: str, **options) -> Dinomaly:
    """With the class token before the patches, with four registers too, or 39 channels wide, odd for the kernels."""
    torch.manual_seed(0)
    if kind == "class token":
        return build_dinomaly(build_encoder(RANDOM_TINY_ENCODER, SIDE), DinomalyOptions(**options))
    if kind == "registers":
        return build_dinomaly(encoder_with_registers(), DinomalyOptions(**options))
    vit = VisionTransformer(img_size=SIDE, patch_size=14, embed_dim=39, depth=10, num_heads=3, num_classes=0)
    return Dinomaly(FrozenEncoder(vit, list(range(2, 10)), "odd", "random weights", "", 0), 3, DinomalyOptions(**options))


def has_no_tie(detector: Dinomaly, image: torch.Tensor) -> bool:
    """Whether no decision on an image is so near to its threshold that rounding could turn it."""
    margins = []

    def of_layer(layer, arguments):
        margins.append(((arguments[0] - layer.threshold) / layer.log_activation_scale.exp()).abs().min() / SMALLEST_MARGIN)

    def of_map(sab, arguments):
        attention_map, alpha, _ = arguments
        threshold = sab.threshold_share(alpha) * attention_map.amax(dim=-1, keepdim=True)
        margins.append((attention_map - threshold).abs().min() / SMALLEST_MAP_MARGIN)

    one_bit = [layer for layer in binary_layers(detector) if layer.options.activation_bits == 1]
    hooks = [layer.register_forward_pre_hook(of_layer) for layer in one_bit]
    hooks += [m.register_forward_pre_hook(of_map) for m in detector.modules() if isinstance(m, SoftmaxAwareBinarization)]
    detector.anomaly_map(image)
    for hook in hooks:
        hook.remove()
    return min(margins, default=2) > 1


@dataclass(frozen=True)
class Case:
    """A trained detector, three images and its maps of them."""

    trained: Dinomaly
    images: torch.Tensor
    maps: torch.Tensor


@cache
def case_of(kind: str, stage: int, bits: int, attention: str, sab: str, **options) -> Case:
    trained = trained_like(build_detector(kind, decoder_attention=attention, **options), stage, bits, sab)
    with torch.no_grad():
        for block in trained.decoder if attention == "softmax" else ():
            block.attn.qkv.alpha *= 5  # so that rows have a maximum
            for gate in attention_gates(block):
                gate.alpha_at_conversion *= 5
    generator, images = torch.Generator().manual_seed(2), []
    while len(images) < 3:
        image = torch.randn(1, 3, SIDE, SIDE, generator=generator)
        if has_no_tie(trained, image):
            images.append(image)
    return Case(trained, torch.cat(images), trained.anomaly_map(torch.cat(images)))


def check_maps(packed: Dinomaly, case: Case) -> None:
    assert case.maps.std() > 1e-3
    for chosen in (slice(None), slice(0, 1), slice(2, 3)):
        torch.testing.assert_close(packed.anomaly_map(case.images[chosen]), case.maps[chosen], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("attention", "sab"), ATTENTIONS)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("kind", "channels", "prefix"), [("registers", 32, 5), ("odd", 39, 1)])
def test_packed_network_decides_as_the_trained_one(path, kind, channels, prefix, stage, attention, sab):
    case = case_of(kind, stage, 1, attention, sab)
    packed = packed_copy(case.trained, FLOAT)
    assert [type(block) for block in packed.decoder] == [PackedDecoderBlock] * BLOCKS
    assert not any(isinstance(module, BinaryLinear) for module in packed.modules())
    check_maps(packed, case)
    agreement = compare_on_bits(case.trained, case.trained.encode(case.images))
    inputs = channels * (2 if stage == 1 else 7)  # of qkv and proj, of fc1, and four times as many of fc2
    assert agreement.decisions == 3 * BLOCKS * (prefix + PATCHES) * inputs
    assert agreement.differing == 0
    assert agreement.largest_map_difference < 1e-5


@pytest.mark.parametrize(("attention", "sab"), [("linear", "off"), ("softmax", "mixed")])
@pytest.mark.parametrize("stage", [1, 2])
def test_network_of_binary_weights_alone(path, stage, attention, sab):
    case = case_of("registers", stage, 32, attention, sab)
    packed = packed_copy(case.trained, FLOAT)
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(WeightOnlyLinear) == BLOCKS * 2 * stage
    assert kinds.count(FusedLinearAttention) == (BLOCKS if attention == "linear" else 0)
    assert BinaryLinear not in kinds
    check_maps(packed, case)


@pytest.mark.parametrize("options", [{"groups": 1}, {"remove_class_token": True}, {"recentre": True}], ids=str)
def test_options_of_the_network_are_those_of_its_packed_form(options):
    case = case_of("registers", 2, 1, "linear", "off", **options)
    assert not torch.allclose(case.maps, case_of("registers", 2, 1, "linear", "off").maps, atol=1e-3)
    check_maps(packed_copy(case.trained, FLOAT), case)


# ---------------------------------------------------------------------------- files


def content_of(detector: Dinomaly, stage: int, bits: int, sab: str) -> dict:
    """What a checkpoint would say of such a model."""
    binary = {"act_bits": bits, "sab": sab, "weight_gradient": "clip", "activation_gradient": "triangle"}
    sizes = {"input_size": 64, "crop_size": SIDE, "pos_embed": "paper"}
    return {
        "host": "Dinomaly",
        "item": "multi",
        "stage": stage,
        "config": {**sizes, **binary, **vars(detector.options), "bottleneck_dropout": 0.2},
        "protocol": PROTOCOL,
        "calibration": {"map_median": 0.1, "map_limit": 0.5, "scores": [0.2]},
    }


def written_and_loaded(packed: Dinomaly, options: PackingOptions, content: dict, folder) -> tuple[Dinomaly, dict]:
    description = describe(packed, content, DECISION, preprocessing(64, content["config"]["crop_size"]))
    (folder / "model.binaryad").write_bytes(packed_bytes(packed, options, description))
    return load_packed(folder / "model.binaryad")


PRECISIONS = [(encoder, trained) for encoder in ENCODER_PRECISIONS for trained in TRAINED_PRECISIONS]
OTHER_KINDS = [(1, 1, "linear", "off"), (1, 1, "softmax", "mixed"), (2, 1, "softmax", "binary"), (1, 32, "softmax", "mixed")]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [((2, 1, "linear", "off"), pair) for pair in PRECISIONS]
    + [(kind, pair) for kind in [*OTHER_KINDS, (2, 32, "linear", "off")] for pair in (("fp32", "fp16"), ("int8", "int8"))],
    ids=str,
)
def test_loaded_file_is_the_packed_detector_bit_for_bit(tmp_path, kind, precision):
    case, options = case_of("class token", *kind), PackingOptions(*precision)
    packed = packed_copy(case.trained, options)
    stage, bits, _, sab = kind
    detector, description = written_and_loaded(packed, options, content_of(case.trained, stage, bits, sab), tmp_path)
    for images in (case.images, case.images[:1]):
        assert torch.equal(detector.anomaly_map(images), packed.anomaly_map(images))
    assert detector.options == case.trained.options
    assert (description["host"], description["stage"]) == ("Dinomaly", stage)
    assert not {"INP_num", "bottleneck_dropout"} & description["config"].keys()
    difference = (detector.anomaly_map(case.images) - case.maps).abs()
    if precision == ("fp32", "fp32"):
        assert difference.max() < 1e-5
    assert difference.mean() < 0.4 * case.maps.std()  # noise has many decisions near their thresholds


def test_options_of_the_network_are_in_its_file(tmp_path):
    options = {"groups": 1, "remove_class_token": True, "recentre": True}
    case = case_of("class token", 2, 1, "softmax", "mixed", **options)
    packed = packed_copy(case.trained, FLOAT)
    detector, _ = written_and_loaded(packed, FLOAT, content_of(case.trained, 2, 1, "mixed"), tmp_path)
    assert vars(detector.options) == {"decoder_attention": "softmax", **options}
    check_maps(detector, case)


def test_file_of_an_encoder_with_registers(tmp_path):
    """The small encoder with random weights and 2 x 2 patches: of five prefix tokens as of patches."""
    torch.manual_seed(0)
    encoder = build_encoder_without_weights("dinov2reg_vit_small_14", 28, "random weights", "0" * 64, 0)
    detector = trained_like(build_dinomaly(encoder, DinomalyOptions()), 2, 1, "off")
    assert encoder.prefix_tokens == 5
    packed, options = packed_copy(detector, PackingOptions()), PackingOptions()
    content = content_of(detector, 2, 1, "off")
    content["config"]["crop_size"] = 28
    loaded, _ = written_and_loaded(packed, options, content, tmp_path)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    assert torch.equal(loaded.anomaly_map(images), packed.anomaly_map(images))
    assert loaded.encode(images).shape == (2, 2, 5 + 4, 384)

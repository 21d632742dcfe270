"""The teacher's weights in every layout, and the features it can be distilled from."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import wide_resnet101_2

import models.teacher
from common.errors import UserError
from models.feature_sources import (
    EFFICIENTNET_LITE0_FILE,
    FeatureSource,
    WideResNetMaps,
    build_feature_source,
    to_timm_names,
)
from models.patch_description import TEACHER_CHANNELS, PatchDescriptionNetwork
from models.teacher import build_teacher
from models.weight_files import state_sha256

PLACES = {"tiny": (0, 3, 6, 8), "small": (0, 3, 6, 8), "medium": (0, 3, 6, 8, 10, 12)}


def named_state(size: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return PatchDescriptionNetwork(size, TEACHER_CHANNELS[size]).state_dict()


def numbered_state(size: str) -> dict[str, Tensor]:
    """The same weights, named by their places in an nn.Sequential."""
    state = named_state(size)
    kinds = ("weight", "bias")
    return {
        f"{place}.{kind}": state[f"conv{number}.{kind}"] for number, place in enumerate(PLACES[size], start=1) for kind in kinds
    }


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("layout", [named_state, numbered_state])
@pytest.mark.parametrize(
    ("size", "prefix", "suffix"),
    [
        *(("tiny", prefix, suffix) for prefix in ("", "teacher.", "module.teacher.") for suffix in (".pth", ".safetensors")),
        ("medium", "module.", ".pth"),
    ],
)
def test_every_layout_gives_the_same_teacher(tmp_path, size, layout, prefix, suffix):
    state, path = prefixed(layout(size), prefix), tmp_path / f"teacher{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(state, path)
    teacher = build_teacher(size, str(path))
    expected = named_state(size)
    assert teacher.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in teacher.network.state_dict().items())
    assert teacher.weights_sha256 == state_sha256(expected)
    assert (teacher.source, teacher.size, teacher.training) == (path.name, size, False)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_sequential_network_and_the_teacher_from_its_file_agree(tmp_path):
    """The numbers are those of a real nn.Sequential, with its ReLUs and pools."""
    torch.manual_seed(2)
    network = nn.Sequential(
        *(nn.Conv2d(3, 128, 4), nn.ReLU(inplace=True), nn.AvgPool2d(2, 2)),
        *(nn.Conv2d(128, 256, 4), nn.ReLU(inplace=True), nn.AvgPool2d(2, 2)),
        *(nn.Conv2d(256, 256, 3), nn.ReLU(inplace=True), nn.Conv2d(256, 384, 4)),
    )
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "small.pth")
    images = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(build_teacher("small", str(tmp_path / "small.pth"))(images), network(images))


def test_the_file_says_where_its_weights_are_from_and_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(models.teacher, "LOCAL_WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"--teacher_weights FILE.*python -m scripts\.distill_teacher --size tiny"):
        build_teacher("tiny")
    safetensors.torch.save_file(named_state("tiny"), tmp_path / "pdn_tiny.safetensors", {"source": "distilled from a dream"})
    assert build_teacher("tiny").source == "distilled from a dream"


@pytest.mark.parametrize("asked", ["small", "tiny"])
@pytest.mark.parametrize("layout", [named_state, numbered_state])
def test_a_file_of_another_size_is_refused_and_named(tmp_path, asked, layout):
    torch.save(layout("medium"), tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=rf"has 4 too many .*it is a teacher of size medium, not {asked}"):
        build_teacher(asked, str(tmp_path / "teacher.pth"))


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in named_state("tiny").items() if key != name}


REFUSED = {
    "missing": (without("conv2.bias"), r"lacks 1 tensors \['conv2\.bias'\], has 0 too many .*expected .* of size tiny"),
    "surplus": (named_state("tiny") | {"mean": torch.zeros(1)}, r"lacks 0 tensors .*has 1 too many \['mean'\]"),
    "shape": (named_state("tiny") | {"conv1.bias": torch.zeros(9)}, r"1 of another shape \['conv1\.bias'\]"),
    "student": (
        prefixed(named_state("tiny"), "teacher.") | prefixed(named_state("tiny"), "student."),
        r"lacks 8 tensors .*has 16 too many",
    ),
    "not finite": (named_state("tiny") | {"conv3.bias": torch.full((32,), torch.nan)}, r"not finite in \['conv3\.bias'\]"),
    "nested": ({"a": {"b": 1}}, "no flat state dict"),
    "whole network": (nn.Linear(1, 1), r"refused: .*state_dict\(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_files_are_refused_in_a_sentence(tmp_path, case):
    content, sentence = REFUSED[case]
    torch.save(content, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=sentence) as raised:
        build_teacher("tiny", str(tmp_path / "teacher.pth"))
    assert str(tmp_path / "teacher.pth") in str(raised.value)


def test_absent_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"not found: .*nowhere\.pth.*--teacher_weights"):
        build_teacher("tiny", str(tmp_path / "nowhere.pth"))
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"unreadable: .*bad\.safetensors"):
        build_teacher("tiny", str(tmp_path / "bad.safetensors"))


def test_a_random_teacher_comes_by_its_seed_alone_and_says_so():
    torch.manual_seed(5)
    first, drawn = build_teacher("tiny", "random", seed=3), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the rest of the program draws as without it
    assert build_teacher("tiny", "random", seed=3).weights_sha256 == first.weights_sha256
    assert build_teacher("tiny", "random", seed=4).weights_sha256 != first.weights_sha256
    assert "random weights (seed 3)" in first.source


class FixedMaps(nn.Module):
    """Maps that are the same whatever the images."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, *maps: Tensor):
        super().__init__()
        self.fixed, self.widths = list(maps), [values.shape[1] for values in maps]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.fixed


def neighbourhoods(maps: Tensor) -> Tensor:
    """(1, C, s, s) -> (s, s, C * 9): every pixel's 3 x 3 neighbours, zeros beyond the border, channel by channel."""
    padded, side = F.pad(maps[0].double(), (1, 1, 1, 1)), maps.shape[-1]
    rows = [[padded[:, y : y + 3, x : x + 3].reshape(-1) for x in range(side)] for y in range(side)]
    return torch.stack([torch.stack(row) for row in rows])


def averaged(values: Tensor, count: int) -> Tensor:
    """The last dimension averaged to `count` windows, window by window."""
    total = values.shape[-1]
    windows = [(i * total // count, -(-(i + 1) * total // count)) for i in range(count)]
    return torch.stack([values[..., start:end].mean(dim=-1) for start, end in windows], dim=-1)


def test_neighbourhoods_are_averaged_as_in_patchcore():
    """Against the steps one by one: neighbourhoods, enlarging, averaging to 1024 each, stacking, averaging to the channels."""
    torch.manual_seed(0)
    maps = torch.randn(1, 130, 4, 4), torch.randn(1, 60, 2, 2)  # 9 * 130 are averaged to 1024, 9 * 60 repeated to 1024
    fine, coarse = map(neighbourhoods, maps)
    coarse = F.interpolate(coarse.permute(2, 0, 1)[None], size=(4, 4), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    stacked = torch.cat([averaged(fine, 1024), averaged(coarse, 1024)], dim=-1)  # (4, 4, 2048)
    expected = averaged(stacked, 48).permute(2, 0, 1)
    found = FeatureSource(FixedMaps(*maps), 48, "", "", "")(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)


def old_names() -> list[str]:
    """Names of an EfficientNet-Lite0 in efficientnet-lite-pytorch, in the order of its layers."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{kind}" for kind in norm)]
    for block in range(16):
        for layer, after in (("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2")):
            if block or layer != "expand_conv":  # the first block expands nothing
                names += [f"_blocks.{block}._{layer}.weight", *(f"_blocks.{block}._{after}.{kind}" for kind in norm)]
    return [*names, "_conv_head.weight", *(f"_bn1.{kind}" for kind in norm), "_fc.weight", "_fc.bias"]


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    """timm's network with random weights and batch norms that have seen something."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for name, value in network.state_dict().items():
        if "running_mean" in name:
            value.uniform_(-0.1, 0.1)
        elif "running_var" in name:
            value.uniform_(0.01, 0.02)  # small, so that the image is still felt in the last maps
    return network


def test_both_networks_have_the_same_layers_in_the_same_order(lite0):
    """Name by name: both define their layers in the order in which they run."""
    renamed = to_timm_names(dict.fromkeys(old_names(), torch.zeros(())))
    assert list(renamed) == list(lite0.state_dict())


@pytest.mark.parametrize("naming", ["old", "timm"])
def test_lite0_from_a_file_gives_maps_of_stride_8_and_16(lite0, tmp_path, naming):
    state = lite0.state_dict()
    names = old_names() if naming == "old" else [f"module.{name}" for name in state]
    torch.save(dict(zip(names, state.values(), strict=True)), tmp_path / "lite0.pth")
    source = build_feature_source(str(tmp_path / "lite0.pth"), 48, 128)
    images = torch.rand(2, 3, 128, 128)
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(2, 3)).eval()
    reference.load_state_dict(state, strict=False)
    with torch.no_grad():
        expected = reference((images - 0.5) / 0.5)
        found = source.maps((images - 0.5) / 0.5)
    assert reference.feature_info.reduction() == [8, 16]
    assert all(values.std(dim=(2, 3)).mean() > 0.1 for values in expected)  # they depend on the image
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert source(images).shape == (2, 48, 16, 16)
    assert torch.equal(source(images), FeatureSource(FixedMaps(*expected), 48, "", "", "")(images))
    assert source.train().training is False
    assert source.maps.bn1.training is False
    assert (source.name, source.source) == ("efficientnet_lite0", "lite0.pth")


@pytest.mark.skipif(not EFFICIENTNET_LITE0_FILE.is_file(), reason="python -m scripts.fetch_teacher_source was not run")
def test_the_fetched_network_computes_what_its_own_package_does():
    """Numbers printed by efficientnet-lite-pytorch 0.1.0 in float64 for this input, after its blocks 4 and 10."""
    source = build_feature_source("efficientnet_lite0", 384, 64)
    inputs = (torch.arange(3 * 64 * 64, dtype=torch.float64).reshape(1, 3, 64, 64) * 0.05).sin()
    with torch.no_grad():
        fine, coarse = source.maps.double()(inputs)
    close = {"rel": 1e-9}
    assert (fine.mean().item(), fine.std().item()) == pytest.approx((-0.7860753784915836, 8.229406749813956), **close)
    assert fine[0, :3, 1, 2].tolist() == pytest.approx([-16.404912264602693, -4.829115841359882, -0.14417769969925587], **close)
    assert (coarse.mean().item(), coarse.std().item()) == pytest.approx((0.7223351741559529, 6.728789474530352), **close)
    assert coarse[0, :3, 1, 2].tolist() == pytest.approx([-2.394740018406745, 3.7169466553001187, 4.259494373513512], **close)


def test_wide_resnet_gives_the_outputs_of_its_second_and_third_layer():
    torch.manual_seed(0)
    with torch.device("meta"):
        network, maps = wide_resnet101_2().eval(), WideResNetMaps().eval()
    state = {
        name: torch.ones(value.shape) if "running" in name or value.ndim < 2 else 0.02 * torch.randn(value.shape)
        for name, value in network.state_dict().items()
        if not name.startswith(("layer4", "fc"))
    }
    network.load_state_dict(state, strict=False, assign=True)
    maps.load_state_dict(state, assign=True)
    expected = []
    for layer in (network.layer2, network.layer3):
        layer.register_forward_hook(lambda module, inputs, output: expected.append(output))
    network.layer4, network.fc = nn.Identity(), nn.Identity()
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        network(images)
        found = maps(images)
    assert [tuple(values.shape) for values in found] == [(1, 512, 8, 8), (1, 1024, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_encoder_of_this_project_is_a_source():
    source = build_feature_source("random_vit_tiny_14", 48, 128)
    images = torch.rand(1, 3, 128, 128)
    assert source(images).shape == (1, 48, 16, 16)
    first, second = source.maps(images)
    tokens = torch.stack(source.maps.encoder(F.interpolate(images, size=(126, 126), mode="bilinear")))
    torch.testing.assert_close(first[0, :, 1, 2], tokens[:4, 0, 1 * 9 + 2].mean(0))
    torch.testing.assert_close(second[0, :, 8, 0], tokens[4:, 0, 8 * 9].mean(0))


def test_other_networks_are_no_source(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"unknown feature source: .*other\.pth"):
        build_feature_source(str(tmp_path / "other.pth"), 48, 128)
    torch.save({"layer2.0.conv1.weight": torch.zeros(3)}, tmp_path / "partial.pth")
    with pytest.raises(UserError, match=r"/partial\.pth' lacks \d+ tensors .* 1 of another shape"):
        build_feature_source(str(tmp_path / "partial.pth"), 48, 128)


@pytest.mark.parametrize(
    "name", ["_blocks.16._bn0.weight", f"_blocks.{'9' * 5000}._bn0.weight", "_blocks.0._bn0.weight", "_x.y"]
)
def test_names_that_no_layer_has_are_no_crash(tmp_path, name):
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3), name: torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"/odd\.pth' lacks \d+ tensors"):
        build_feature_source(str(tmp_path / "odd.pth"), 48, 64)


def test_old_files_without_counters_fit(lite0, tmp_path):
    torch.save(lite0.state_dict(), tmp_path / "new.pth")
    old = {name: value for name, value in lite0.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    new, old = (build_feature_source(str(tmp_path / name), 48, 64) for name in ("new.pth", "old.pth"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(new(images), old(images))
    assert new.weights_sha256 == old.weights_sha256

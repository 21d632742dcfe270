"""The frozen encoder: weights of either naming, position tables, errors a user can act on, and which blocks run."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.errors import UserError
from models import encoder as encoder_module
from models.build import ENCODERS, RANDOM_TINY_ENCODER, EncoderNumbers, build_encoder
from models.encoder import (
    FrozenEncoder,
    load_encoder_weights,
    read_weights_file,
    resample_position_grid,
    state_sha256,
)

CHANNELS, SIDE, REGISTERS, DEPTH = 32, 5, 4, 4
SHARED_WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights" / "dinov2_vits14_imgfocus_fp16.safetensors"


def small_vit(grid: int = SIDE, registers: int = REGISTERS, depth: int = DEPTH) -> VisionTransformer:
    """A ViT in the manner of DINOv2, with registers or without."""
    return VisionTransformer(
        img_size=14 * grid,
        patch_size=14,
        embed_dim=CHANNELS,
        depth=depth,
        num_heads=2,
        num_classes=0,
        init_values=1e-5,
        reg_tokens=registers,
        no_embed_class=registers > 0,
    )


def facebook_state(registers: int = REGISTERS) -> dict[str, Tensor]:
    """A state dict as facebookresearch/dinov2 writes it, with random content."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in small_vit(registers=registers).state_dict().items()
        if name.startswith(("blocks.", "norm.", "patch_embed."))
    }
    for name, shape in {
        "cls_token": (1, 1, CHANNELS),
        "pos_embed": (1, 1 + SIDE**2, CHANNELS),
        "mask_token": (1, CHANNELS),
        **({"register_tokens": (1, registers, CHANNELS)} if registers else {}),
    }.items():
        state[name] = torch.randn(shape, generator=generator)
    return state


def timm_state(facebook: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as timm publishes them."""
    state = {name: value for name, value in facebook.items() if name.startswith(("blocks.", "norm.", "patch_embed."))}
    return {
        **state,
        "reg_token": facebook["register_tokens"],
        "cls_token": facebook["cls_token"] + facebook["pos_embed"][:, 0],
        "pos_embed": facebook["pos_embed"][:, 1:],
    }


def test_both_namings_give_the_same_weights_and_hash():
    facebook = facebook_state()
    first, second = small_vit(), small_vit()
    hashes = {
        load_encoder_weights(first, facebook, SIDE, "paper", "first"),
        load_encoder_weights(second, timm_state(facebook), SIDE, "paper", "second"),
    }
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64
    for name, value in second.state_dict().items():
        assert torch.equal(first.state_dict()[name], value), name


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes_and_a_classification_head_are_dropped(prefix):
    facebook = facebook_state()
    wrapped = {prefix + name: value for name, value in facebook.items()}
    wrapped["head.weight"] = torch.zeros(10, CHANNELS)
    plain = load_encoder_weights(small_vit(), facebook, SIDE, "paper", "plain")
    assert load_encoder_weights(small_vit(), wrapped, SIDE, "paper", "wrapped") == plain


def test_loading_leaves_the_given_state_dict_alone():
    facebook = facebook_state()
    copies = {name: value.clone() for name, value in facebook.items()}
    load_encoder_weights(small_vit(4), facebook, 4, "paper", "file")
    assert facebook.keys() == copies.keys()
    assert all(torch.equal(facebook[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("registers", [REGISTERS, 0])
def test_tokens_are_class_registers_patches_with_positions_on_class_and_patches_only(registers):
    facebook = facebook_state(registers)
    vit = small_vit(registers=registers)
    sha256 = load_encoder_weights(vit, facebook, SIDE, "paper", "file")
    encoder = FrozenEncoder(vit, [1, 3], "tiny", "file", sha256, 0)
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(1))

    kernel = facebook["patch_embed.proj.weight"].reshape(CHANNELS, -1)
    patches = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(2, SIDE**2, -1)
    patches = patches @ kernel.T + facebook["patch_embed.proj.bias"] + facebook["pos_embed"][:, 1:]
    class_token = facebook["cls_token"] + facebook["pos_embed"][:, :1]
    first = [class_token.expand(2, -1, -1)]
    if registers:
        first.append(facebook["register_tokens"].expand(2, -1, -1))
    tokens = torch.cat([*first, patches], dim=1)
    expected = []
    for block in encoder.vit.blocks:
        tokens = block(tokens)
        expected.append(tokens[:, 1 + registers :])
    features = encoder(images)
    assert len(features) == 2
    torch.testing.assert_close(features[0], expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features[1], expected[3], atol=1e-4, rtol=1e-4)


def test_the_hash_depends_on_content_only():
    state = facebook_state()
    reordered = dict(reversed(list(state.items())))
    assert state_sha256(state) == state_sha256(reordered)
    transposed = state["patch_embed.proj.weight"].transpose(2, 3).contiguous().transpose(2, 3)
    assert state_sha256(state) == state_sha256({**state, "patch_embed.proj.weight": transposed})


@pytest.mark.parametrize("change", ["value", "name", "shape", "type", "absent"])
def test_the_hash_notices_every_change(change):
    state = facebook_state()
    changed = dict(state)
    bias = changed.pop("norm.bias")
    replacement = {
        "value": {"norm.bias": torch.nextafter(bias, bias + 1)},
        "name": {"norm.beta": bias},
        "shape": {"norm.bias": bias[None]},
        "type": {"norm.bias": bias.view(torch.int32)},
        "absent": {},
    }[change]
    assert state_sha256(state) != state_sha256({**changed, **replacement})


def test_the_hash_is_that_of_the_file_whatever_the_crop():
    facebook = facebook_state()
    hashes = {load_encoder_weights(small_vit(grid), facebook, grid, "paper", "file") for grid in (3, SIDE, 7)}
    assert len(hashes) == 1


def bicubic_weight(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_resample(table: np.ndarray, grid: int) -> np.ndarray:
    """(S, S, C) -> (grid, grid, C): bicubic at scale (grid + 0.1) / S, pixel centres at halves, borders repeated."""
    side = len(table)
    scale = (grid + 0.1) / side
    matrix = np.zeros((grid, side))
    for row in range(grid):
        centre = (row + 0.5) / scale - 0.5
        for source in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(source, 0), side - 1)] += bicubic_weight(centre - source)
    return np.einsum("is,jt,stc->ijc", matrix, matrix, table)


@pytest.mark.parametrize(("side", "grid"), [(37, 28), (37, 5), (5, 4), (5, 9)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_position_tables_are_resized_as_in_the_paper(side, grid, prefix):
    table = torch.randn(1, prefix + side**2, 3, generator=torch.Generator().manual_seed(0))
    resized = resample_position_grid(table, grid, prefix, "paper")
    assert resized.shape == (1, prefix + grid**2, 3)
    assert torch.equal(resized[:, :prefix], table[:, :prefix])
    expected = slow_resample(table[0, prefix:].double().numpy().reshape(side, side, 3), grid)
    np.testing.assert_allclose(resized[0, prefix:].numpy().reshape(grid, grid, 3), expected, atol=2e-5)


def test_the_two_position_modes_differ():
    table = torch.randn(1, 1 + 37**2, 3, generator=torch.Generator().manual_seed(0))
    paper, library = (resample_position_grid(table, 28, 1, mode) for mode in ("paper", "timm"))
    assert paper.shape == library.shape
    assert torch.equal(paper[:, :1], library[:, :1])
    assert (paper - library)[:, 1:].norm() > 0.03 * paper[:, 1:].norm()


@pytest.mark.parametrize("mode", ["paper", "timm"])
def test_a_table_of_the_right_size_is_not_touched(mode):
    table = torch.randn(1, 1 + SIDE**2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample_position_grid(table, SIDE, 1, mode), table)


def test_half_precision_tables_stay_half_precision():
    table = torch.randn(1, 1 + 37**2, 3, generator=torch.Generator().manual_seed(0))
    resized = resample_position_grid(table.half(), 28, 1, "paper")
    assert resized.dtype == torch.float16
    torch.testing.assert_close(resized.float(), resample_position_grid(table, 28, 1, "paper"), atol=4e-3, rtol=0)


def test_the_position_mode_reaches_the_model():
    facebook = facebook_state()
    vits = {mode: small_vit(4) for mode in ("paper", "timm")}
    for mode, vit in vits.items():
        load_encoder_weights(vit, facebook, 4, mode, "file")
        expected = resample_position_grid(facebook["pos_embed"][:, 1:], 4, 0, mode)
        assert torch.equal(vit.pos_embed.data, expected)
    assert not torch.equal(vits["paper"].pos_embed, vits["timm"].pos_embed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": torch.zeros(CHANNELS + 1)}, r"1 of another shape \['norm\.bias'\]"),
        ({"blocks.4.norm1.bias": torch.zeros(CHANNELS)}, r"1 too many \['blocks\.4\.norm1\.bias'\]"),
        ({"norm.bias": None}, r"lacks 1 tensors \['norm\.bias'\]"),
        ({"cls_token": torch.zeros(1, 1, CHANNELS // 2)}, "."),
        ({"pos_embed": torch.zeros(1, 1 + SIDE**2, CHANNELS // 2)}, "."),
        ({"cls_token": None}, "cls_token"),
        ({"pos_embed": None}, "pos_embed"),
    ],
    ids=["shape", "surplus", "missing", "class width", "position width", "no class token", "no positions"],
)
def test_weights_that_do_not_fit_are_a_user_error_that_names_the_file(change, message):
    state = {name: value for name, value in (facebook_state() | change).items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        load_encoder_weights(small_vit(), state, SIDE, "paper", "some/file.pth")
    assert "some/file.pth" in str(error.value)


@pytest.mark.parametrize("grid", [SIDE, 4])
@pytest.mark.parametrize(
    ("model", "file", "missing_or_surplus"),
    [({"depth": 3}, {}, "blocks"), ({}, {"registers": 0}, "reg_token"), ({"registers": 0}, {}, "reg_token")],
    ids=["fewer blocks", "file without registers", "file with registers"],
)
def test_the_weights_of_another_encoder_are_a_user_error(model, file, missing_or_surplus, grid):
    with pytest.raises(UserError, match=missing_or_surplus):
        load_encoder_weights(small_vit(grid, **model), facebook_state(**file), grid, "paper", "file")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weight_files_are_read_back(tmp_path, suffix, nested):
    state, path = facebook_state(), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": state} if nested else state, path)
    else:
        safetensors.torch.save_file(state, path, {"source": "a sentence on the origin"} if nested else None)
    read, source = read_weights_file(path)
    assert state_sha256(read) == state_sha256(state)
    assert source == ("a sentence on the origin" if suffix == ".safetensors" and nested else path.name)


def test_a_missing_weights_file_is_a_user_error(tmp_path):
    missing = tmp_path / "absent.safetensors"
    with pytest.raises(UserError, match=r"absent\.safetensors.*--encoder_weights"):
        build_encoder("dinov2_vit_small_14", 70, str(missing))


@pytest.mark.parametrize("name", ["damaged.safetensors", "damaged.pth", "empty.pth", "empty.safetensors"])
def test_a_damaged_weights_file_is_a_user_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"" if name.startswith("empty") else b"\x80\x02 this is no state dict" * 10)
    with pytest.raises(UserError, match=name):
        read_weights_file(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(1)], {"model": {"teacher": {"bias": torch.zeros(1)}}}])
def test_a_file_without_a_flat_state_dict_is_a_user_error(tmp_path, content):
    path = tmp_path / "strange.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"strange\.pth"):
        read_weights_file(path)


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_file_that_runs_code_is_refused_unrun(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": RunsCode(tmp_path / "proof")}, path)
    with pytest.raises(UserError, match=r"evil\.pth"):
        read_weights_file(path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != RANDOM_TINY_ENCODER])
def test_no_weights_and_no_network_is_a_user_error_that_says_what_to_fetch(name, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "_hub_is_reachable", lambda: False)
    monkeypatch.setattr(encoder_module, "LOCAL_WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        build_encoder(name, 224)
    message = str(error.value)
    assert "model.safetensors" in message
    assert f"https://huggingface.co/{timm.get_pretrained_cfg(ENCODERS[name].timm_name).hf_hub_id}" in message
    assert "--encoder_weights" in message
    assert "\n" not in message


class TransportError(Exception):
    """As the hub's HTTP client raises for a proxy that refuses or a connection that breaks: no OSError."""


@pytest.mark.parametrize("failure", [TransportError("403 Forbidden"), TimeoutError("timed out")])
def test_a_download_that_fails_is_a_user_error(failure, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(encoder_module, "_hub_is_reachable", lambda: True)
    monkeypatch.setattr(encoder_module, "LOCAL_WEIGHTS_FOLDER", tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match=r"https://huggingface\.co/.*--encoder_weights"):
        build_encoder("dinov2reg_vit_small_14", 56)


def test_offline_mode_asks_no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.create_connection", refuse)
    assert encoder_module._hub_is_reachable() is False


def test_a_file_in_the_weights_folder_is_found_by_the_encoders_name(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "LOCAL_WEIGHTS_FOLDER", tmp_path)
    state = facebook_state()
    safetensors.torch.save_file(state, tmp_path / "dinov2reg_vit_small_14.safetensors")
    found, source = encoder_module.find_weights("dinov2reg_vit_small_14", "irrelevant", None)
    assert state_sha256(found) == state_sha256(state)
    assert source == "dinov2reg_vit_small_14.safetensors"


@pytest.fixture
def small_family(monkeypatch):
    """Makes `small` a value of --encoder whose timm model is `small_vit`."""

    def create_model(name: str, pretrained: bool, num_classes: int, img_size: int) -> VisionTransformer:
        assert (name, pretrained, num_classes) == ("small_timm", False, 0)
        return small_vit(img_size // 14)

    monkeypatch.setitem(ENCODERS, "small", EncoderNumbers("small_timm", CHANNELS, 2, [0, 2], 14, 3))
    monkeypatch.setattr("timm.create_model", create_model)


def test_an_encoder_built_from_a_file_of_either_naming_is_the_same(small_family, tmp_path):
    facebook = facebook_state()
    torch.save(facebook, tmp_path / "facebook.pth")
    safetensors.torch.save_file(timm_state(facebook), tmp_path / "timm.safetensors")
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    encoders = [build_encoder("small", 56, str(tmp_path / name)) for name in ("facebook.pth", "timm.safetensors")]
    first, second = encoders
    assert (first.name, first.source, first.taps) == ("small", "facebook.pth", [0, 2])
    assert first.weights_sha256 == second.weights_sha256
    assert all(torch.equal(*pair) for pair in zip(first(images), second(images), strict=True))
    assert len(first.vit.blocks) == 3


def test_published_parameters_do_not_depend_on_the_naming_of_the_file(small_family, tmp_path):
    """All blocks, the final norm and the position table of the file; not what only pre-training uses."""
    facebook = facebook_state()
    full = sum(value.numel() for value in small_vit().state_dict().values())
    torch.save(facebook, tmp_path / "facebook.pth")
    torch.save(timm_state(facebook), tmp_path / "timm.pth")
    assert build_encoder("small", 56, str(tmp_path / "timm.pth")).published_parameters == full
    assert build_encoder("small", 56, str(tmp_path / "facebook.pth")).published_parameters == full


ADVERTISED = {
    "dinov2reg_vit_small_14": (384, 6, [2, 3, 4, 5, 6, 7, 8, 9], 14),
    "dinov2reg_vit_base_14": (768, 12, [2, 3, 4, 5, 6, 7, 8, 9], 14),
    "dinov2reg_vit_large_14": (1024, 16, [4, 6, 8, 10, 12, 14, 16, 18], 14),
    "dinov2_vit_small_14": (384, 6, [2, 3, 4, 5, 6, 7, 8, 9], 14),
    "dinov2_vit_base_14": (768, 12, [2, 3, 4, 5, 6, 7, 8, 9], 14),
}


@pytest.mark.parametrize(("name", "expected"), ADVERTISED.items())
def test_encoder_numbers_are_the_papers(name, expected):
    numbers = ENCODERS[name]
    assert (numbers.embed_dim, numbers.num_heads, numbers.taps, numbers.patch_size) == expected


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != RANDOM_TINY_ENCODER])
def test_encoder_numbers_fit_timms_model(name):
    numbers = ENCODERS[name]
    with torch.device("meta"):
        vit = timm.create_model(numbers.timm_name, pretrained=False, num_classes=0, img_size=14 * numbers.patch_size)
    assert vit.embed_dim == numbers.embed_dim
    assert vit.patch_embed.patch_size == (numbers.patch_size, numbers.patch_size)
    assert vit.num_prefix_tokens == (5 if name.startswith(("dinov2reg", "dinov3")) else 1)
    assert len(vit.blocks) == (24 if "large" in name else 12)


@pytest.mark.parametrize(("name", "depth", "kept"), [("small", 12, 10), ("base", 12, 10), ("large", 24, 19)])
def test_only_the_blocks_up_to_the_last_tap_are_kept(name, depth, kept):
    taps = ENCODERS[f"dinov2reg_vit_{name}_14"].taps
    full = small_vit(depth=depth).eval()
    images = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    outputs = []
    for block in full.blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output[:, 1 + REGISTERS :]))
    with torch.no_grad():
        full(images)
    assert len(outputs) == depth

    encoder = FrozenEncoder(full, taps, name, "random", "", 0)
    assert len(encoder.vit.blocks) == kept
    features = encoder(images)
    assert len(features) == 8
    for tap, feature in zip(taps, features, strict=True):
        assert feature.shape == (1, SIDE**2, CHANNELS)
        torch.testing.assert_close(feature, outputs[tap])


def test_features_are_raw_without_the_final_norm():
    state = facebook_state()
    features = []
    for factor in (1.0, 100.0):
        vit = small_vit()
        load_encoder_weights(vit, {**state, "norm.weight": factor * state["norm.weight"]}, SIDE, "paper", "file")
        features.append(FrozenEncoder(vit, [3], "tiny", "file", "", 0)(torch.ones(1, 3, 70, 70))[0])
    assert torch.equal(*features)


def test_the_random_encoder_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_encoder(RANDOM_TINY_ENCODER, 56)
    assert torch.equal(torch.rand(3), expected)
    second = build_encoder(RANDOM_TINY_ENCODER, 56)
    assert first.weights_sha256 == second.weights_sha256
    assert first.published_parameters == sum(parameter.numel() for parameter in first.parameters()) + 2 * CHANNELS
    images = torch.ones(1, 3, 56, 56)
    assert all(torch.equal(*pair) for pair in zip(first(images), second(images), strict=True))


@pytest.mark.skipif(not SHARED_WEIGHTS.is_file(), reason="real DINOv2-derived weights are not beside the repository")
def test_a_real_encoder_gives_finite_features():
    encoder = build_encoder("dinov2_vit_small_14", 70, str(SHARED_WEIGHTS))
    features = encoder(torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0)))
    assert [feature.shape for feature in features] == [(1, 25, 384)] * 8
    assert all(feature.isfinite().all() for feature in features)
    assert all(feature.dtype == torch.float32 for feature in features)
    assert len(encoder.vit.blocks) == 10
    assert encoder.published_parameters == pytest.approx(22.06e6, rel=1e-3)
    neighbours = torch.nn.functional.cosine_similarity(features[0][:, :-1], features[-1][:, :-1], dim=-1)
    assert neighbours.max() < 0.999  # early and late taps are different maps

"""The numbers of every model, in one place: names to sizes, sizes to networks."""

from dataclasses import dataclass
from typing import Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from common.errors import UserError
from models.dinomaly import Dinomaly, DinomalyOptions
from models.encoder import FrozenEncoder, find_weights, load_encoder_weights, to_timm_names
from models.inp_former import INPFormer
from models.patch_description import TEACHER_CHANNELS
from models.varad import VarAD, VarADOptions
from models.weight_files import state_sha256

Taps = Literal["middle", "thirds"]  # eight blocks as they are; the ends of three equal parts, each with the final norm

_MIDDLE_TAPS = list(range(2, 10))


@dataclass(frozen=True)
class EncoderNumbers:
    """Size of an encoder: token width, heads of the decoder that follows it, blocks tapped in the middle, patch side in pixels.

    `depth`: blocks in all.
    """

    timm_name: str | None
    embed_dim: int
    num_heads: int
    taps: list[int]
    patch_size: int
    depth: int

    def tapped(self, taps: Taps) -> list[int]:
        """0-based indices of the blocks that leave the encoder."""
        return self.taps if taps == "middle" else [self.depth * part // 3 - 1 for part in (1, 2, 3)]


def _family(prefix: str, pattern: str, patch_size: int, sizes: tuple[str, ...]) -> dict[str, EncoderNumbers]:
    numbers = {
        "small": (384, 6, _MIDDLE_TAPS, patch_size, 12),
        "base": (768, 12, _MIDDLE_TAPS, patch_size, 12),
        "large": (1024, 16, list(range(4, 19, 2)), patch_size, 24),
    }
    return {f"{prefix}_vit_{size}_{patch_size}": EncoderNumbers(pattern.format(size), *numbers[size]) for size in sizes}


PDN_ENCODERS = {f"pdn_{size}": size for size in TEACHER_CHANNELS}
_PDN_SIDES = 32  # the autoencoder halves images five times
RANDOM_TINY_ENCODER = "random_vit_tiny_14"
ENCODERS: dict[str, EncoderNumbers] = {
    **_family("dinov2reg", "vit_{}_patch14_reg4_dinov2.lvd142m", 14, ("small", "base", "large")),
    **_family("dinov2", "vit_{}_patch14_dinov2.lvd142m", 14, ("small", "base", "large")),
    **_family("dinov3", "vit_{}_patch16_dinov3.lvd1689m", 16, ("small", "base", "large")),
    # ablations of VarAD
    "vit_base_16": EncoderNumbers("vit_base_patch16_224.augreg2_in21k_ft_in1k", 768, 12, _MIDDLE_TAPS, 16, 12),
    "clip_vit_base_16": EncoderNumbers("vit_base_patch16_clip_quickgelu_224.openai", 768, 12, _MIDDLE_TAPS, 16, 12),
    "mae_vit_base_16": EncoderNumbers("vit_base_patch16_224.mae", 768, 12, _MIDDLE_TAPS, 16, 12),
    RANDOM_TINY_ENCODER: EncoderNumbers(None, 32, 2, _MIDDLE_TAPS, 14, 10),  # for tests: its weights know nothing
}


def patch_size_of(encoder_name: str) -> int:
    """What image sides must be a multiple of."""
    return _PDN_SIDES if encoder_name in PDN_ENCODERS else ENCODERS[encoder_name].patch_size


def check_sizes(encoder_name: str, input_size: int, crop_size: int) -> None:
    """Raise UserError unless the crop fits into the resized image and is a multiple of the patch."""
    patch = patch_size_of(encoder_name)
    if crop_size % patch:
        below, above = crop_size // patch * patch, (crop_size // patch + 1) * patch
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"--crop_size {crop_size} is no multiple of the patch of {encoder_name} ({patch}); use {nearest}")
    if crop_size > input_size:
        raise UserError(
            f"--crop_size {crop_size} is larger than --input_size {input_size}; lower the crop to "
            f"{input_size // patch * patch} or raise the input to at least {crop_size}"
        )


def build_encoder(
    name: str, crop_size: int, weights_file: str | None = None, position_embedding: str = "paper", taps: Taps = "middle"
) -> FrozenEncoder:
    """The frozen encoder `name` for crop_size x crop_size images; raises UserError if its weights cannot be had."""
    numbers = ENCODERS[name]
    if name == RANDOM_TINY_ENCODER:
        vit = _build_vit(name, crop_size)
        state, source = vit.state_dict(), "random weights, for tests only"
        return _tapped(vit, name, taps, source, state_sha256(state), _count(state))
    state, source = find_weights(name, numbers.timm_name, weights_file)  # first: it may fail, and a large network takes a while
    vit = _build_vit(name, crop_size)
    file = repr(str(weights_file)) if weights_file else source
    sha256 = load_encoder_weights(vit, state, crop_size // numbers.patch_size, position_embedding, file)
    return _tapped(vit, name, taps, source, sha256, _count(to_timm_names(state)))


def build_encoder_without_weights(
    name: str, crop_size: int, source: str, weights_sha256: str, published_parameters: int, taps: Taps = "middle"
) -> FrozenEncoder:
    """The encoder `name` with random weights, to be overwritten by those it is said to have."""
    return _tapped(_build_vit(name, crop_size), name, taps, source, weights_sha256, published_parameters)


def _tapped(vit: torch.nn.Module, name: str, taps: Taps, source: str, sha256: str, parameters: int) -> FrozenEncoder:
    return FrozenEncoder(vit, ENCODERS[name].tapped(taps), name, source, sha256, parameters, final_norm=taps == "thirds")


def published_parameter_count(name: str) -> int:
    """Parameters of a hub encoder as published: all blocks, positions for its own image size."""
    with torch.device("meta"):
        vit = timm.create_model(ENCODERS[name].timm_name, pretrained=False, num_classes=0)
    return sum(parameter.numel() for parameter in vit.parameters())


def _build_vit(name: str, crop_size: int) -> torch.nn.Module:
    if name == RANDOM_TINY_ENCODER:
        return _random_tiny_vit(ENCODERS[name], crop_size)
    return timm.create_model(ENCODERS[name].timm_name, pretrained=False, num_classes=0, img_size=crop_size)


def _count(state: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in state.values())


def _random_tiny_vit(numbers: EncoderNumbers, crop_size: int) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=crop_size,
            patch_size=numbers.patch_size,
            embed_dim=numbers.embed_dim,
            depth=numbers.depth,
            num_heads=numbers.num_heads,
            num_classes=0,
        )


def build_inp_former(encoder: FrozenEncoder, prototype_count: int) -> INPFormer:
    """INP-Former with the width of its encoder, freshly initialised from torch's global generator."""
    return INPFormer(encoder, ENCODERS[encoder.name].num_heads, prototype_count)


def build_dinomaly(encoder: FrozenEncoder, options: DinomalyOptions) -> Dinomaly:
    """Dinomaly with the width of its encoder, freshly initialised from torch's global generator."""
    return Dinomaly(encoder, ENCODERS[encoder.name].num_heads, options)


def build_varad(encoder: FrozenEncoder, options: VarADOptions) -> VarAD:
    """VarAD on an encoder built with the taps `thirds`, freshly initialised from torch's global generator."""
    return VarAD(encoder, options)

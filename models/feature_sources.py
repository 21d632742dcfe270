"""Frozen networks whose features a teacher learns to describe, reduced to the teacher's channels.

Target of the distillation in EfficientAD (Batzner et al., WACV 2024, appendix A), computed as PatchCore does (Roth et al.,
CVPR 2022, section 3.1). B images, S their side, s the side of the maps: S / 8.
"""

import re
from pathlib import Path
from urllib.error import URLError

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor, nn
from torchvision.models import Wide_ResNet101_2_Weights, wide_resnet101_2

from common.errors import UserError
from models.build import ENCODERS, build_encoder
from models.encoder import LOCAL_WEIGHTS_FOLDER, FrozenEncoder
from models.weight_files import check_file_hash, read_state_dict, state_sha256

EFFICIENTNET_LITE0 = "efficientnet_lite0"
WIDE_RESNET = "wide_resnet101_2"
EFFICIENTNET_LITE0_FILE = LOCAL_WEIGHTS_FOLDER / f"{EFFICIENTNET_LITE0}.safetensors"

_NEIGHBOURHOOD = 3
_CHANNELS_PER_MAP = 1024  # PatchCore averages every map's neighbourhoods to so many values first
_COUNTER = "num_batches_tracked"  # of batch norms; says nothing in evaluation mode, and old files lack it

# efficientnet-lite-pytorch's names -> timm's
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_STAGE_OF_BLOCK = [(stage, place) for stage, count in enumerate(_BLOCKS_PER_STAGE) for place in range(count)]
_OUTER_LAYERS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK_LAYERS = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}  # expands nothing
_BLOCK_LAYERS = {
    "expand_conv": "conv_pw",
    "bn0": "bn1",
    "depthwise_conv": "conv_dw",
    "bn1": "bn2",
    "project_conv": "conv_pwl",
    "bn2": "bn3",
}


class WideResNetMaps(nn.Module):
    """Images (B, 3, S, S) -> outputs of layer2 (B, 512, S/8, S/8) and layer3 (B, 1024, S/16, S/16) of Wide-ResNet-101-2."""

    widths = (512, 1024)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def __init__(self):
        super().__init__()
        network = wide_resnet101_2()
        for name in ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3"):
            self.add_module(name, getattr(network, name))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.layer2(self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(images))))))
        return [maps, self.layer3(maps)]


class EfficientNetLiteMaps(nn.Module):
    """Images (B, 3, S, S) -> last maps of side S/8 (B, 40, ...) and of side S/16 (B, 112, ...) of EfficientNet-Lite0.

    Its inputs are centred on 0.5 and its convolutions pad as TensorFlow's.
    """

    widths = (40, 112)
    mean, std = IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

    def __init__(self):
        super().__init__()
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks[:5]

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.blocks[:3](self.bn1(self.conv_stem(images)))
        return [fine, self.blocks[3:](fine)]


class TokenMaps(nn.Module):
    """Images (B, 3, S, S) -> means of the first and of the last half of a transformer's tapped blocks, as maps of its grid."""

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # what every encoder of this project is given

    def __init__(self, encoder: FrozenEncoder):
        super().__init__()
        self.encoder = encoder
        self.widths = (encoder.embed_dim, encoder.embed_dim)

    def forward(self, images: Tensor) -> list[Tensor]:
        side = self.encoder.grid * self.encoder.patch_size
        images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        tokens = torch.stack(self.encoder(images))  # (taps, B, N, C)
        half = len(tokens) // 2
        halves = (tokens[:half].mean(0), tokens[half:].mean(0))
        return [values.transpose(1, 2).unflatten(2, (self.encoder.grid,) * 2) for values in halves]


class FeatureSource(nn.Module):
    """Two maps of a frozen network, every pixel with its 3 x 3 neighbours, averaged to `channels` values and stacked.

    As in PatchCore, a neighbourhood's C * 9 values are averaged in order to 1024 by adaptive pooling, the maps' 2 * 1024 then
    to `channels`. All of that is linear, so it is one fixed convolution for each map, before instead of after the enlargement.

    Args:
        maps: images (B, 3, S, S), normalised -> [(B, C1, s, s), (B, C2, ...)], with their `widths`, `mean` and `std`.
        channels: of the result, an even number.
        name: value of `--source`.
        source: where the weights came from, for logs and reports.
        weights_sha256: hash of the weights that are used.
    """

    def __init__(self, maps: nn.Module, channels: int, name: str, source: str, weights_sha256: str):
        super().__init__()
        self.maps = maps
        self.name, self.source, self.weights_sha256 = name, source, weights_sha256
        for number, width in enumerate(maps.widths):
            self.register_buffer(f"reduction{number}", neighbourhood_weights(width, channels // 2))
        self.register_buffer("mean", torch.tensor(maps.mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(maps.std).reshape(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FeatureSource":
        """Stay in evaluation mode whatever happens around it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) of 0..1 -> targets (B, channels, S/8, S/8)."""
        side = images.shape[-1] // 8
        parts = []
        for number, values in enumerate(self.maps((images - self.mean) / self.std)):
            reduced = F.conv2d(values, self.get_buffer(f"reduction{number}"), padding=_NEIGHBOURHOOD // 2)
            parts.append(F.interpolate(reduced, size=(side, side), mode="bilinear", align_corners=False))
        return torch.cat(parts, dim=1)


def neighbourhood_weights(width: int, channels: int) -> Tensor:
    """Weights (channels, width, 3, 3) of a convolution that averages neighbourhoods to 1024 values and these to `channels`."""
    values = width * _NEIGHBOURHOOD**2
    weights = _pooling_matrix(_CHANNELS_PER_MAP, channels) @ _pooling_matrix(values, _CHANNELS_PER_MAP)
    return weights.reshape(channels, width, _NEIGHBOURHOOD, _NEIGHBOURHOOD).float()


def _pooling_matrix(inputs: int, outputs: int) -> Tensor:
    """Adaptive average pooling from `inputs` to `outputs` values as a matrix (outputs, inputs)."""
    place, window = torch.arange(inputs), torch.arange(outputs)[:, None]
    inside = (place >= window * inputs // outputs) & (place < -(-(window + 1) * inputs // outputs))
    return inside.double() / inside.sum(dim=1, keepdim=True)


def build_feature_source(name: str, channels: int, image_size: int) -> FeatureSource:
    """The source of `--source` for images of `image_size` pixels.

    Args:
        name: "efficientnet_lite0", "wide_resnet101_2", an encoder of this project, or a file with weights of the first two.

    Raises:
        UserError: there is no such source, or its weights cannot be had or are of another network.
    """
    if name in ENCODERS:
        patch = ENCODERS[name].patch_size
        encoder = build_encoder(name, round(image_size / patch) * patch)
        return FeatureSource(TokenMaps(encoder), channels, name, encoder.source, encoder.weights_sha256)
    if name == WIDE_RESNET:
        state, source = _wide_resnet_weights()
        place = source
    else:
        path = EFFICIENTNET_LITE0_FILE if name == EFFICIENTNET_LITE0 else Path(name)
        state, source = read_state_dict(path, "weights of the feature source", "--source")
        place = repr(str(path))
    architecture, maps, state = _recognised(state, name)
    return FeatureSource(maps, channels, architecture, source, _load(maps, state, place))


def _wide_resnet_weights() -> tuple[dict[str, Tensor], str]:
    """From `weights/wide_resnet101_2.safetensors` beside the scripts, or torchvision's download (or its cache)."""
    local = LOCAL_WEIGHTS_FOLDER / f"{WIDE_RESNET}.safetensors"
    if local.is_file():
        return read_state_dict(local, "weights of the feature source", "--source")
    weights = Wide_ResNet101_2_Weights.IMAGENET1K_V1
    name = weights.url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name  # torchvision trusts what is there
    if cached.is_file():
        check_file_hash(cached, name.removesuffix(".pth").rpartition("-")[2], "weights of the feature source", "its name")
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True), f"torchvision {weights}"
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"no weights for {WIDE_RESNET}: {weights.url} is neither cached nor can it be downloaded now; fetch that file "
            f"elsewhere and give --source FILE, or use --source {EFFICIENTNET_LITE0}"
        ) from error


def _recognised(state: dict[str, Tensor], named: str) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Which network a state dict is of: its name, the network without weights, and the tensors under that network's names."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    with torch.device("meta"):  # draws no random numbers
        if "layer2.0.conv1.weight" in state:
            return WIDE_RESNET, WideResNetMaps(), state
        if "_conv_stem.weight" in state:
            return EFFICIENTNET_LITE0, EfficientNetLiteMaps(), to_timm_names(state)
        if "conv_stem.weight" in state:
            return EFFICIENTNET_LITE0, EfficientNetLiteMaps(), state
    raise UserError(
        f"unknown feature source: {named!r} holds weights neither of {EFFICIENTNET_LITE0} nor of {WIDE_RESNET}; give a file "
        f"of one of these, or --source {EFFICIENTNET_LITE0}"
    )


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an EfficientNet-Lite0 of the package efficientnet-lite-pytorch to timm's names; others stay as they are."""
    renamed = {}
    for name, value in state.items():
        block = re.fullmatch(r"_blocks\.(\d{1,3})\._(\w+)\.(\w+)", name)
        if block and int(block[1]) < len(_STAGE_OF_BLOCK):
            stage, place = _STAGE_OF_BLOCK[int(block[1])]
            layers = _FIRST_BLOCK_LAYERS if stage == 0 else _BLOCK_LAYERS
            renamed[f"blocks.{stage}.{place}.{layers.get(block[2], block[2])}.{block[3]}"] = value
        else:
            layer, _, kind = name.rpartition(".")
            renamed[f"{_OUTER_LAYERS.get(layer, layer)}.{kind}"] = value
    return renamed


def _load(maps: nn.Module, state: dict[str, Tensor], place: str) -> str:
    """Load what the network uses of a state dict, which is from `place`; returns the sha256 of that."""
    expected = maps.state_dict()
    counters = {name: torch.zeros((), dtype=torch.long) for name in expected if name.endswith(_COUNTER)}
    used = {name: state[name].float() for name in expected if name in state and name not in counters}
    missing = sorted(expected.keys() - used.keys() - counters.keys())
    shapes = sorted(name for name, value in used.items() if value.shape != expected[name].shape)
    if missing or shapes:
        raise UserError(
            f"weights of the feature source do not fit: {place} lacks {len(missing)} tensors {missing[:3]} and has "
            f"{len(shapes)} of another shape {shapes[:3]}; give a file of {EFFICIENTNET_LITE0} or {WIDE_RESNET}"
        )
    maps.load_state_dict(counters | used, assign=True)
    return state_sha256(used)
